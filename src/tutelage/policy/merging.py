"""Adapters made of adapters: every mix is one of their products B A, never of their factors.

Summing factors instead, (sum w B)(sum w A), holds products of one adapter's B with another's A, which nobody
trained, and half of an adapter plus half of it again would be right only by luck of the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from tutelage.errors import InputError, ModelError
from tutelage.policy.lora import Adapter, attach
from tutelage.policy.saved import Factors, SavedAdapter

__all__ = ["Gates", "Method", "Mixed", "check_same_model", "dare", "mix", "put_on", "ties", "truncate"]

Method = Literal["sum", "soup", "ties", "dare"]


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A mix, and what is known of how it was made.

    Args:
        adapter: The result.
        shares: Factor with which each part went in: its weight, for a soup its weight over the sum.
        slices: Rows of A, first and one behind the last, that are each part's own; empty unless the parts
            were set side by side.
        error: Frobenius distance of the result from the mix at full rank, relative to the latter.
    """

    adapter: SavedAdapter
    shares: tuple[float, ...]
    slices: tuple[tuple[int, int], ...]
    error: float


def mix(
    name: str,
    parts: Sequence[SavedAdapter],
    weights: Sequence[float],
    method: Method = "sum",
    *,
    rank: int | None = None,
    density: float = 0.2,
    drop: float = 0.5,
    scale: float = 1.0,
    seed: int = 0,
) -> Mixed:
    """One adapter from several: `sum` of w dW, `soup` (their weighted mean), `ties`, or `dare`.

    Args:
        name: Of the result.
        parts: At least one; all of one base model.
        weights: One a part, none of them zero. Negative ones turn a trait around.
        method: How.
        rank: Of the result. Without it, sum and soup set the factors side by side, which is exact, and the
            other two keep the sum of the ranks. With it, the best product of that rank is kept.
        density: `ties`: share of each layer's entries that stay.
        drop: `dare`: probability with which an entry is dropped.
        scale: `ties`: factor on the result.
        seed: `dare`: of what is dropped.

    Raises:
        ModelError: The parts are of different base models or shapes.
        InputError: The numbers make no sense.
    """
    _check(parts, weights, method, rank, density, drop)
    shares = tuple(w / math.fsum(weights) for w in weights) if method == "soup" else tuple(weights)
    ranks = [p.rank for p in parts]
    paths = sorted({path for p in parts for path in p.layers})
    side_by_side = method in ("sum", "soup") and rank is None
    generator = torch.Generator().manual_seed(seed)
    layers, cut, whole = {}, 0.0, 0.0
    for path in paths:
        if side_by_side:
            layers[path] = _side_by_side([p.layers.get(path) for p in parts], shares, ranks)
            continue
        there = [(p.layers[path], w) for p, w in zip(parts, shares, strict=True) if path in p.layers]
        if method in ("sum", "soup"):
            full = _side_by_side([f for f, _ in there], [w for _, w in there], [f.rank for f, _ in there])
            layers[path], lost, size = truncate(full, rank or 1)
        else:
            each = [f.dense() for f, _ in there]
            own = [w for _, w in there]
            if method == "ties":
                dense = ties(each, own, density=density, scale=scale)
            else:
                dense = sum((w * dare(d, drop, generator) for d, w in zip(each, own, strict=True)), torch.zeros(()))
            layers[path], lost, size = truncate(dense, rank or sum(ranks))
        cut, whole = cut + lost**2, whole + size**2
    ends = [sum(ranks[: k + 1]) for k in range(len(ranks))]
    slices = tuple((end - r, end) for end, r in zip(ends, ranks, strict=True)) if side_by_side else ()
    made = SavedAdapter(name, parts[0].base, layers)
    return Mixed(made, shares, slices, math.sqrt(cut / whole) if whole else 0.0)


def _check(
    parts: Sequence[SavedAdapter],
    weights: Sequence[float],
    method: str,
    rank: int | None,
    density: float,
    drop: float,
) -> None:
    if not parts or len(parts) != len(weights) or any(not math.isfinite(w) or w == 0.0 for w in weights):
        raise InputError(
            f"{len(parts)} adapters and weights {', '.join(f'{w:g}' for w in weights)}",
            expected="at least one adapter, and a finite weight other than 0 for each",
            fix="leave out an adapter that is to have no part",
        )
    if method == "soup" and min(weights) < 0:
        raise InputError(f"a soup with weight {min(weights):g}", expected="weights above 0", fix="take method sum")
    wrong = {"rank": rank is not None and rank < 1, "density": not 0 < density <= 1, "drop": not 0 <= drop < 1}
    for key, value in (("rank", rank), ("density", density), ("drop", drop)):
        if wrong[key]:
            expected = "rank from 1, density in (0, 1], drop in [0, 1)"
            raise InputError(f"{key} {value} for a mix", expected=expected, fix=f"change {key}")
    check_same_model(parts)


def check_same_model(parts: Sequence[SavedAdapter]) -> None:
    """Refuse adapters that do not belong together.

    Raises:
        ModelError: Their base models differ, or the shape of a layer that two of them change.
    """
    first = parts[0]
    for other in parts[1:]:
        if other.base != first.base:
            raise ModelError(
                f"'{first.name}' belongs to {first.base or 'no named model'}, '{other.name}' to "
                f"{other.base or 'no named model'}",
                expected="adapters of one base model: a change of one model's weights says nothing about another's",
                fix="mix adapters of the same model; where only its path differs, correct "
                "base_model_name_or_path in adapter_config.json",
            )
    shapes: dict[str, tuple[int, int]] = {}
    for part in parts:
        for path, (b, a) in part.layers.items():
            shape = (b.shape[0], a.shape[1])
            if shapes.setdefault(path, shape) != shape:
                raise ModelError(
                    f"'{part.name}' changes {path} of shape {shape}",
                    expected=f"shape {shapes[path]}, as the other adapters have it",
                    fix="mix adapters of the same model",
                )


def _side_by_side(parts: Sequence[Factors | None], shares: Sequence[float], ranks: Sequence[int]) -> Factors:
    """A = [A_1; A_2], B = [w_1 B_1, w_2 B_2]: exact; a part that lacks the layer has zeros in its place."""
    outs, ins = next((len(f.b_OR), f.a_RI.shape[1]) for f in parts if f is not None)
    b_OR, a_RI = torch.zeros(outs, sum(ranks)), torch.zeros(sum(ranks), ins)
    at = 0
    for f, share, r in zip(parts, shares, ranks, strict=True):
        if f is not None:
            b_OR[:, at : at + f.rank], a_RI[at : at + f.rank] = share * f.b_OR, f.a_RI
        at += r
    return Factors(b_OR, a_RI)


def truncate(change: Factors | torch.Tensor, rank: int) -> tuple[Factors, float, float]:
    """The product of `rank` that is nearest to a change; also how far it is, and how large the change is.

    A product of factors is never written out: the SVD is that of a small matrix between two orthogonal ones.
    Source: Eckart and Young 1936, the theorem that bears their names.
    """
    if isinstance(change, Factors):
        q_b, r_b = torch.linalg.qr(change.b_OR.double())
        q_a, r_a = torch.linalg.qr(change.a_RI.double().T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        u, vh = q_b @ u, vh @ q_a.T
    else:
        u, s, vh = torch.linalg.svd(change.double(), full_matrices=False)
    root = s[:rank].sqrt()
    # Both factors get the same size, so that neither loses digits in a narrower number format.
    b_OR, a_RI = (u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float()
    more = rank - len(root)
    kept = Factors(nn.functional.pad(b_OR, (0, more)), nn.functional.pad(a_RI, (0, 0, 0, more)))
    return kept, float(s[rank:].norm()), float(s.norm())


def ties(
    changes: Sequence[torch.Tensor], weights: Sequence[float], *, density: float, scale: float = 1.0
) -> torch.Tensor:
    """Trim, elect a sign for each entry, and take the mean of those that agree with it.

    Objective: of each w dW only the largest entries stay; the sign with more mass wins an entry; the result
        is scale times the weighted mean of the entries of that sign.
    Difference: a sum lets opposite entries cancel, so that neither trait survives.
    Assumption: an entry is either needed or not, whatever the others are: true of sparse changes in the
        weights' own basis, not of changes along few directions that share all entries.
    Source: Yadav et al. 2023 (arXiv 2306.01708), section 4, algorithm 1. Unlike there, the largest entries
        are those of each matrix and not of the whole model, and weights count before signs are elected.

    Args:
        changes: Of one layer, (O, I) each.
        weights: How much each counts; only their proportions matter.
        density: Share of entries that stay.
        scale: Factor on the result.
    """
    w = torch.tensor(list(weights), dtype=changes[0].dtype).view(-1, 1, 1)
    kept = torch.stack([_largest(c, density) for c in changes])
    mass = (w * kept).sum(0)
    # Where two signs weigh the same, the sign that wins most entries of the matrix wins here, too.
    sign = torch.where(mass == 0, 1.0 if mass.sign().sum() >= 0 else -1.0, mass.sign())
    agrees = (w * kept).sign() == sign
    total = (w * kept * agrees).sum(0)
    return scale * total / (w.abs() * agrees).sum(0).clamp_min(torch.finfo(w.dtype).tiny)


def _largest(change: torch.Tensor, density: float) -> torch.Tensor:
    flat = change.flatten()
    keep = flat.abs().topk(max(1, int(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy_(0, keep, flat[keep]).view(change.shape)


def dare(change: torch.Tensor, drop: float, generator: torch.Generator) -> torch.Tensor:
    """Drop entries at random and scale the others up, so that the expectation stays.

    Source: Yu et al. 2023 (arXiv 2311.03099), drop and rescale.
    """
    stays = torch.rand(change.shape, generator=generator) >= drop
    return change * stays / (1.0 - drop)


def put_on(model: nn.Module, saved: SavedAdapter) -> Adapter:
    """Attach a saved adapter to a model, in place.

    Raises:
        ModelError: It does not fit the model.
    """
    numbers = [re.search(r"\.(\d+)\.", path) for path in saved.layers]
    first = min((int(n[1]) if n else 1 << 30 for n in numbers), default=0)
    targets = sorted({path.rsplit(".", 1)[-1] for path in saved.layers})
    adapter = attach(
        model, rank=saved.rank, alpha=saved.rank, seed=0, targets=targets, first_layer=first, model_name=saved.base
    )
    # A name may be adapted in some layers only; the others get a change of zero.
    blank = {key: torch.zeros_like(value) for key, value in adapter.state().items()}
    adapter.load_state(blank | saved.state(), where=saved.source or saved.name)
    return adapter


class Gates:
    """Parts of a mix that was set side by side, or layers, switched on and off in a model.

    Args:
        adapter: The mix, attached.
        slices: Each part's own rows of A.
    """

    def __init__(self, adapter: Adapter, slices: Mapping[str, tuple[int, int]]) -> None:
        self._adapter, self._slices = adapter, dict(slices)

    @contextlib.contextmanager
    def only(self, parts: Collection[str] | None = None, *, paths: Collection[str] | None = None) -> Iterator[None]:
        """Inside the block the model has only these parts, on these layers; None means all.

        Raises:
            InputError: There is no such part or layer.
        """
        layers = self._adapter.layers
        unknown = sorted(set(parts or ()) - set(self._slices)) + sorted(set(paths or ()) - set(layers))
        if unknown:
            raise InputError(f"'{unknown[0]}' is no part of this mix", expected=f"some of: {', '.join(self._slices)}")
        before = {path: layer.lora_b.detach().clone() for path, layer in layers.items()}
        try:
            with torch.no_grad():
                for path, layer in layers.items():
                    for name, (first, end) in self._slices.items():
                        if (parts is not None and name not in parts) or (paths is not None and path not in paths):
                            layer.lora_b[:, first:end] = 0.0
            self._adapter.merge()
            yield
        finally:
            with torch.no_grad():
                for path, layer in layers.items():
                    layer.lora_b.copy_(before[path])
            self._adapter.merge()
