"""The measures of credit, on rewards whose parts are known."""

from __future__ import annotations

import itertools

import pytest
import torch

from tutelage.credit.faithfulness import additive_reward, additive_truth, completeness_error, correlation, deletion
from tutelage.credit.shapley import Game, shapley
from tutelage.errors import InputError

TOKENS = torch.tensor([[0, 2, 1], [1, 1, 0]])
WORTH = torch.tensor([2.0, -1.0, 0.5])
KEEP = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


def test_the_additive_reward_by_hand() -> None:
    assert additive_truth(TOKENS, WORTH, KEEP).tolist() == [[2.0, 0.5, -1.0], [-1.0, -1.0, 0.0]]
    assert additive_reward(TOKENS, WORTH, KEEP).tolist() == [1.5, -2.0]


def test_completeness_error_by_hand() -> None:
    credit = torch.tensor([[1.0, 0.25], [0.0, -1.0]])
    assert completeness_error(credit, torch.tensor([1.0, -1.0])).tolist() == [0.25, 0.0]


def test_correlation_by_hand() -> None:
    """Around their means: (1, 0, -1) with itself 1, with its negative -1, with (1, -2, 1) 0."""
    truth, one = torch.tensor([[3.0, 2.0, 1.0]]), torch.ones(1, 3)
    assert correlation(5 + 2 * truth, truth, one) == pytest.approx(1.0)
    assert correlation(-truth, truth, one) == pytest.approx(-1.0)
    assert correlation(torch.tensor([[1.0, -2.0, 1.0]]), truth, one) == pytest.approx(0.0, abs=1e-12)


def test_getting_a_rows_total_right_is_no_correlation() -> None:
    """Uniform credit follows each row's total, and says nothing within a row."""
    truth = additive_truth(TOKENS, WORTH, KEEP)
    uniform = truth.sum(-1, keepdim=True) / KEEP.sum(-1, keepdim=True) * KEEP
    assert correlation(uniform, truth, KEEP) is None
    padded = truth.clone()
    padded[1, 2] = 99.0
    assert correlation(padded, truth, KEEP) == pytest.approx(1.0)  # padding does not count


def test_deletion_by_hand() -> None:
    """w = 3, 1, -1: 3, 0, -1, 0 has mean height 0.5 - ... trapezoids 1.5, -0.5, -0.5 over 3."""
    w = torch.tensor([3.0, 1.0, -1.0])
    got = deletion(lambda stays: stays @ w, w, orders=4000)
    assert got.curve == (3.0, 0.0, -1.0, 0.0)
    assert got.by_credit == pytest.approx(0.5 / 3)
    assert got.by_chance == pytest.approx(1.5, abs=0.05)  # additive: half of v(all) + v(none)


def test_the_shapley_oracle_deletes_best_of_all_orders() -> None:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(5, generator=generator).double()

    def value(stays_NT: torch.Tensor) -> torch.Tensor:
        return stays_NT.double() @ w

    names = [str(k) for k in range(5)]
    oracle = shapley(Game(names, lambda s: float(w[[k for k in range(5) if str(k) in s]].sum())))
    assert [oracle[n] for n in names] == pytest.approx(w.tolist(), abs=1e-12)
    best = deletion(value, torch.tensor([oracle[n] for n in names]))
    others = [deletion(value, torch.tensor(p).double(), orders=1).by_credit for p in itertools.permutations(range(5))]
    assert best.by_credit == pytest.approx(min(others)) and best.by_credit < best.by_chance
    assert deletion(value, -w).by_credit == pytest.approx(max(others))


def test_the_seed_decides_the_random_orders() -> None:
    w = torch.tensor([3.0, 1.0, -1.0, 0.5])
    one, same, other = (deletion(lambda s: s @ w, w, orders=3, seed=k).by_chance for k in (0, 0, 1))
    assert one == same != other


def test_no_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="0 tokens"):
        deletion(lambda s: s.sum(-1), torch.zeros(0))
    with pytest.raises(InputError, match="0 random"):
        deletion(lambda s: s.sum(-1), torch.zeros(2), orders=0)
