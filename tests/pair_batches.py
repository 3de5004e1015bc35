"""Batches of pairs for tests of what learns from them."""

from __future__ import annotations

import torch

from tutelage.engines.batch import Batch

F64 = torch.float64


def pair_batch(logp: list[list[float]], ref: list[list[float]], labels: list[float], pairs: int | None = None) -> Batch:
    """Rows y1, y2, y1, y2, ...; NaN marks places beyond a reply's end. `labels` has one p a pair."""
    return rows_batch(logp, ref, [x for p in labels for x in (p, 1.0 - p)], 2 * (pairs or len(labels)))


def rows_batch(logp: list[list[float]], ref: list[list[float]], labels: list[float], rows: int | None = None) -> Batch:
    """Rows with one label each, at every token."""
    table = torch.tensor(logp, dtype=F64)
    keep = (~table.isnan()).to(F64)
    now = table.nan_to_num(0.0).requires_grad_(True)
    then = torch.tensor(ref, dtype=F64).nan_to_num(0.0)
    label = torch.tensor(labels, dtype=F64)[:, None] * keep
    return Batch(now, keep, torch.zeros_like(then), then, label, rows or len(labels), int(keep.sum()))
