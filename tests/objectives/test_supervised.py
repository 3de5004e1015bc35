"""The supervised loss worked by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tutelage.engines.batch import Batch
from tutelage.objectives.supervised import Supervised


def batch(logp: list[list[float]], keep: list[list[float]], weight: list[list[float]], rows: int) -> Batch:
    table = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros_like(table).detach()
    return Batch(table, torch.tensor(keep).double(), zeros, zeros, torch.tensor(weight).double(), rows, 99)


def test_by_hand() -> None:
    """Row 0: three tokens, weight 2; row 1: one token, weight 0.5, the padding holds rubbish.

    L = -1/2 [ 2 (-0.5 - 1.5 - 1) + 0.5 (-4) ] = -1/2 [ -6 - 2 ] = 4
    dL/dlogp = -w/2 at each token: -1 in row 0, -0.25 in row 1; a long row's tokens weigh no less.
    """
    b = batch(
        [[-0.5, -1.5, -1.0], [-4.0, -70.0, -80.0]],
        [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]],
        [[2.0, 2.0, 2.0], [0.5, 0.5, 0.5]],
        rows=2,
    )
    loss = Supervised()(b)
    (grad,) = torch.autograd.grad(loss.value, b.logp_BT)
    assert float(loss.value.detach()) == pytest.approx(4.0)
    assert grad.tolist() == [[-1.0, -1.0, -1.0], [-0.25, 0.0, 0.0]]
    assert loss.sums == {"nll": 7.0, "tokens": 4.0}  # unweighted: 3 + 4 over four tokens


def test_parts_of_a_step_add_up() -> None:
    logp, keep, weight = [[-1.0, -2.0], [-3.0, -4.0]], [[1.0, 1.0]] * 2, [[1.0, 1.0], [3.0, 3.0]]
    whole = Supervised()(batch(logp, keep, weight, rows=2))
    parts = [Supervised()(batch(logp[i : i + 1], keep[:1], weight[i : i + 1], rows=2)) for i in (0, 1)]
    assert float(whole.value.detach()) == pytest.approx(sum(float(p.value.detach()) for p in parts))
    assert float(whole.value.detach()) == pytest.approx((3 + 21) / 2)


def test_a_weight_of_zero_teaches_nothing() -> None:
    b = batch([[-1.0, -2.0]], [[1.0, 1.0]], [[0.0, 0.0]], rows=1)
    (grad,) = torch.autograd.grad(Supervised()(b).value, b.logp_BT)
    assert not grad.any()


def test_an_anchored_row_adds_its_drift() -> None:
    """Row 0 is imitated (weight 2), row 1 held: L = 1/2 [ 2 (0.5 + 1.5) + 3 (0.25 + 0.75) ] = 3.5."""
    b = batch([[-0.5, -1.5], [-4.0, -5.0]], [[1.0, 1.0]] * 2, [[2.0, 2.0], [0.0, 0.0]], rows=2)
    drift = torch.tensor([[0.0, 0.0], [0.25, 0.75]], dtype=torch.float64, requires_grad=True)
    anchor = torch.tensor([[0.0, 0.0], [3.0, 3.0]], dtype=torch.float64)
    loss = Supervised()(dataclasses.replace(b, anchor_BT=anchor, drift_BT=drift))
    by_logp, by_drift = torch.autograd.grad(loss.value, (b.logp_BT, drift))
    assert float(loss.value.detach()) == pytest.approx(3.5)
    assert by_logp.tolist() == [[-1.0, -1.0], [0.0, 0.0]]
    assert by_drift.tolist() == [[0.0, 0.0], [1.5, 1.5]]
    assert loss.sums["drift"] == pytest.approx(1.0)
