"""DPO worked by hand, its gradient, and its symmetry."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutelage.engines.batch import Batch
from tutelage.objectives.preference import Dpo

F64 = torch.float64
FLOATS = st.floats(-3.0, 3.0)


def batch(logp: list[list[float]], ref: list[list[float]], labels: list[float], pairs: int | None = None) -> Batch:
    """Rows y1, y2, y1, y2, ...; NaN marks places beyond a reply's end. `labels` has one p a pair."""
    table = torch.tensor(logp, dtype=F64)
    keep = (~table.isnan()).to(F64)
    label = torch.tensor([x for p in labels for x in (p, 1.0 - p)], dtype=F64)
    now = table.nan_to_num(0.0).requires_grad_(True)
    then = torch.tensor(ref, dtype=F64).nan_to_num(0.0)
    rows = 2 * (pairs if pairs is not None else len(labels))
    return Batch(now, keep, torch.zeros_like(then), then, label[:, None] * keep, rows, int(keep.sum()))


def test_by_hand() -> None:
    """d = (-1 - 2 + 4) - (-3 + 2) = 2, so with beta 0.5 the loss is log(1 + e^-1)."""
    b = batch([[-1.0, -2.0], [-3.0, math.nan]], [[-2.0, -2.0], [-2.0, math.nan]], [1.0])
    loss = Dpo(beta=0.5)(b)
    assert float(loss.value.detach()) == pytest.approx(math.log(1 + math.exp(-1.0)))
    assert loss.sums["accuracy"] == 1.0 and loss.sums["margin"] == pytest.approx(1.0)
    assert loss.sums["chosen_gain"] == pytest.approx(1.0) and loss.sums["rejected_gain"] == pytest.approx(-1.0)
    (grad,) = torch.autograd.grad(loss.value, b.logp_BT)
    push = 0.5 / (1 + math.exp(1.0))  # beta * sigmoid(-margin), towards y1 and away from y2, at every token alike
    assert torch.allclose(grad, torch.tensor([[-push, -push], [push, 0.0]], dtype=F64))


def test_at_the_start_the_loss_is_log_two_whatever_the_pair() -> None:
    b = batch([[-1.0], [-5.0], [-2.0], [-0.1]], [[-1.0], [-5.0], [-2.0], [-0.1]], [1.0, 0.0])
    assert float(Dpo()(b).value.detach()) == pytest.approx(math.log(2))


def test_a_soft_label_is_the_mixture_of_both_directions() -> None:
    rows = [[-1.0], [-2.0]], [[-1.5], [-1.0]]
    first, second = (float(Dpo(beta=0.7)(batch(*rows, [p])).value.detach()) for p in (1.0, 0.0))
    assert float(Dpo(beta=0.7)(batch(*rows, [0.3])).value.detach()) == pytest.approx(0.3 * first + 0.7 * second)


def test_a_soft_label_has_its_optimum_at_its_own_odds() -> None:
    """With p = 0.8 the gradient vanishes where sigmoid(beta d) = 0.8."""
    gap = math.log(0.8 / 0.2) / 0.1
    b = batch([[gap], [0.0]], [[0.0], [0.0]], [0.8])
    (grad,) = torch.autograd.grad(Dpo(beta=0.1)(b).value, b.logp_BT)
    assert grad.abs().max() < 1e-12


@given(st.lists(st.tuples(FLOATS, FLOATS, FLOATS, FLOATS, st.floats(0.0, 1.0)), min_size=1, max_size=5))
def test_swapping_the_replies_and_their_label_changes_nothing(pairs: list[tuple[float, ...]]) -> None:
    there = batch([[x] for a, b, _, _, _ in pairs for x in (a, b)], [[x] for _, _, c, d, _ in pairs for x in (c, d)],
                  [p for *_, p in pairs])  # fmt: skip
    back = batch([[x] for a, b, _, _, _ in pairs for x in (b, a)], [[x] for _, _, c, d, _ in pairs for x in (d, c)],
                 [1 - p for *_, p in pairs])  # fmt: skip
    assert float(Dpo()(there).value.detach()) == pytest.approx(float(Dpo()(back).value.detach()))


def test_parts_of_a_step_add_up_to_the_step() -> None:
    logp, ref, labels = [[-1.0], [-2.0], [-0.5], [-3.0]], [[-1.2], [-1.0], [-1.0], [-2.0]], [1.0, 0.25]
    whole = float(Dpo()(batch(logp, ref, labels)).value.detach())
    parts = [
        float(Dpo()(batch(logp[i : i + 2], ref[i : i + 2], [labels[i // 2]], pairs=2)).value.detach()) for i in (0, 2)
    ]
    assert whole == pytest.approx(sum(parts))
