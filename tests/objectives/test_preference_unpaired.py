"""KTO worked by hand, its reference point, and its saturation."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tests.pair_batches import F64, rows_batch

from tutelage.engines.batch import Batch
from tutelage.errors import RecipeError
from tutelage.objectives.unpaired import Kto, mismatched_kl

KTO = Kto(beta=0.5, desirable=1.5, undesirable=0.5, z0=0.4)


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def case(first: float = 1.0, second: float = -1.0) -> Batch:
    """A reply that gained 1 over two tokens, and one that lost 1."""
    return rows_batch([[-1.0, -2.0], [-3.0, math.nan]], [[-2.0, -2.0], [-2.0, math.nan]], [first, second])


def gradient(objective: Kto, b: Batch) -> torch.Tensor:
    (grad,) = torch.autograd.grad(objective(b).value, b.logp_BT)
    return grad


def test_kto_by_hand() -> None:
    """Leads over z0 are 0.5 (1 - 0.4) = 0.3 and 0.5 (-1 - 0.4) = -0.7: (1.5 s(-0.3) + 0.5 s(-0.7))/2."""
    loss = KTO(case())
    assert float(loss.value.detach()) == pytest.approx((1.5 * s(-0.3) + 0.5 * s(-0.7)) / 2)
    up, down = 1.5 * 0.5 * s(0.3) * s(-0.3) / 2, 0.5 * 0.5 * s(0.7) * s(-0.7) / 2
    assert torch.allclose(gradient(KTO, case()), torch.tensor([[-up, -up], [down, 0.0]], dtype=F64))
    assert loss.sums["desirable"] == 1.0 and loss.sums["tokens"] == 2.0 and loss.sums["accuracy"] == 2.0
    assert loss.sums["desirable_gain"] == pytest.approx(1.0) and loss.sums["undesirable_gain"] == pytest.approx(-1.0)


def test_the_size_of_a_label_weighs_its_row() -> None:
    whole, half = gradient(KTO, case()), gradient(KTO, case(0.5, -1.0))
    assert torch.allclose(half[0], whole[0] / 2) and torch.equal(half[1], whole[1])


def test_a_row_without_a_label_teaches_nothing() -> None:
    loss = KTO(case(1.0, 0.0))
    assert float(loss.value.detach()) == pytest.approx(1.5 * s(-0.3) / 2) and loss.sums["tokens"] == 1.0


def test_both_ends_saturate() -> None:
    for gain in (-200.0, 200.0):
        far = rows_batch([[gain]], [[0.0]], [1.0])
        assert gradient(KTO, far).abs().max() < 1e-20
    assert gradient(KTO, rows_batch([[0.4]], [[0.0]], [1.0])).abs().max() == pytest.approx(1.5 * 0.5 / 4)


def test_z0_moves_the_reference_point() -> None:
    """At z0 = 1 the good reply only equals the average: the loss is that of a coin."""
    b = rows_batch([[-1.0]], [[-2.0]], [1.0])
    assert float(Kto(z0=1.0)(b).value.detach()) == pytest.approx(0.5)
    assert float(Kto(z0=0.0)(b).value.detach()) < 0.5


def test_mismatched_kl_by_hand() -> None:
    """Rows gain 1 - 0.5 and 0.25: a mean of 0.375; what lies beyond a row's end is not counted."""
    now = torch.tensor([[-1.0, -1.0], [-1.0, 9.0]])
    then = torch.tensor([[-2.0, -0.5], [-1.25, 0.0]])
    keep = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert mismatched_kl(now, then, keep) == pytest.approx(0.375)
    assert mismatched_kl(then, now, keep) == 0.0  # a divergence is not negative
    assert mismatched_kl(now[:0], then[:0], keep[:0]) == 0.0


def test_parts_of_a_step_add_up_to_the_step() -> None:
    whole = KTO(case())
    rows = [
        KTO(dataclasses.replace(rows_batch([row], [ref], [label]), rows_in_step=2))
        for row, ref, label in (([-1.0, -2.0], [-2.0, -2.0], 1.0), ([-3.0], [-2.0], -1.0))
    ]
    assert float(whole.value.detach()) == pytest.approx(sum(float(r.value.detach()) for r in rows))


@pytest.mark.parametrize("change", [{"beta": 0.2}, {"desirable": 1.0}, {"undesirable": 1.0}, {"z0": 0.0}])
def test_every_option_changes_something(change: dict[str, float]) -> None:
    other = dataclasses.replace(KTO, **change)
    assert not torch.allclose(gradient(KTO, case()), gradient(other, case()), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("change", [{"beta": 0.0}, {"desirable": -1.0}, {"undesirable": math.nan}, {"z0": -0.1}])
def test_an_option_that_makes_no_sense_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        dataclasses.replace(KTO, **change)
