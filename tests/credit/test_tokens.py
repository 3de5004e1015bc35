"""Credit by hand, and the one law: a row's credit sums to its advantage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutelage.credit.tokens import as_loud, assign, assign_signed, reward_to_go, weights

METHODS = ("attention", "uniform", "last")
KEEP = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
# The last token's attention on itself (0.4, 0.7, 0.2) says nothing about the others and is dropped.
ATTENTION = torch.tensor([[0.1, 0.3, 0.2, 0.4], [0.05, 0.7, 0.9, 0.9], [0.2, 0.9, 0.9, 0.9]])


def table(got: torch.Tensor) -> list[Any]:
    return [pytest.approx(row) for row in got.tolist()]


def test_uniform_by_hand() -> None:
    assert table(weights("uniform", KEEP, None)) == [[0.25] * 4, [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]


def test_last_by_hand() -> None:
    assert weights("last", KEEP, None).tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]]


def test_attention_by_hand() -> None:
    """0.1, 0.3, 0.2 over 0.6; one other token takes all; a single token falls back to uniform."""
    got = table(weights("attention", KEEP, ATTENTION))
    assert got == [[1 / 6, 1 / 2, 1 / 3, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]


def test_attention_on_itself_alone_falls_back_to_uniform() -> None:
    got = weights("attention", torch.ones(1, 3), torch.tensor([[0.0, 0.0, 1.0]]))
    assert got[0].tolist() == pytest.approx([1 / 3] * 3)


def test_a_critics_attention_may_lie_on_the_last_token() -> None:
    keep, seen = torch.ones(2, 2), torch.tensor([[0.25, 0.75], [0.0, 0.0]])
    assert weights("attention", keep, seen, observer=False).tolist() == [[0.25, 0.75], [0.5, 0.5]]


def test_attention_must_be_given() -> None:
    with pytest.raises(ValueError, match="attention"):
        weights("attention", KEEP, None)


def test_credit_by_hand() -> None:
    """A = 2, beta = 0.8: 1.6 spread by 1/6, 1/2, 1/3, and 0.4 on the last token."""
    w = weights("attention", KEEP, ATTENTION)
    got = assign(torch.tensor([2.0, -1.0, 3.0]), w, KEEP, beta=0.8)
    assert got[0].tolist() == pytest.approx([1.6 / 6, 0.8, 1.6 / 3, 0.4])
    assert got[1].tolist() == pytest.approx([-0.8, -0.2, 0.0, 0.0])
    assert got[2].tolist() == pytest.approx([3.0, 0.0, 0.0, 0.0])


def test_discounted_credit_as_loud_as_the_advantages_by_hand() -> None:
    """Two replies of two tokens, as in docs/credit.md."""
    credit = torch.tensor([[0.5, 0.5], [-1.0, 0.0]])
    ahead = reward_to_go(credit, discount=0.5)
    assert torch.equal(ahead, torch.tensor([[0.75, 0.5], [-1.0, 0.0]]))
    loud = as_loud(ahead, credit, torch.ones(2, 2))
    assert torch.allclose(loud, torch.tensor([[1.3333, 0.8889], [-1.7778, 0.0]]), atol=1e-4)
    assert torch.equal(reward_to_go(credit, discount=0.0), credit)
    assert torch.equal(as_loud(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2, 2)), torch.zeros(2, 2))


@given(seed=st.integers(0, 9999), discount=st.floats(0.0, 1.0))
def test_a_discount_sums_by_powers_and_keeps_signs_and_loudness(seed: int, discount: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    keep = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    credit = torch.randn(2, 4, generator=draw) * keep
    ahead = reward_to_go(credit, discount=discount)
    power = torch.tensor([[discount ** (s - t) if s >= t else 0.0 for t in range(4)] for s in range(4)])
    assert torch.allclose(ahead, credit @ power, atol=1e-5)
    loud = as_loud(ahead, credit, keep)
    assert torch.equal(loud.sign(), ahead.sign())
    assert float(loud.abs().sum()) == pytest.approx(float((credit.sum(-1).abs() * keep.sum(-1)).sum()), rel=1e-4)


def test_even_credit_without_what_comes_later_is_the_sequences_advantage() -> None:
    """So that a discount of 0 with uniform weights is what `last` is without one, where replies are equally long."""
    advantage, keep = torch.tensor([1.5, -0.5]), torch.ones(2, 6)
    even = assign(advantage, weights("uniform", keep, None), keep, beta=0.8, rest="spread")
    assert torch.allclose(as_loud(reward_to_go(even, discount=0.0), even, keep), advantage[:, None].expand(2, 6))


def test_reward_to_go_by_hand() -> None:
    got = reward_to_go(torch.tensor([[1.0, 2.0, -0.5], [0.0, 0.0, 4.0]]))
    assert got.tolist() == [[2.5, 1.5, -0.5], [4.0, 4.0, 4.0]]


@st.composite
def rows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(keep_BT, attention_BT, advantage_B); attention may hold rubbish beyond a row's length."""
    width = draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(1, width), min_size=1, max_size=5))
    keep = torch.tensor([[1.0] * n + [0.0] * (width - n) for n in lengths])
    cell = st.one_of(st.just(0.0), st.floats(0, 1, width=32))
    attention = torch.tensor([draw(st.lists(cell, min_size=width, max_size=width)) for _ in lengths])
    advantage = torch.tensor([draw(st.floats(-100, 100, width=32)) for _ in lengths])
    return keep, attention, advantage


@given(case=rows(), method=st.sampled_from(METHODS), beta=st.floats(0, 1))
def test_credit_sums_to_the_advantage_and_stays_within_the_reply(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor], method: Any, beta: float
) -> None:
    keep, attention, advantage = case
    w = weights(method, keep, attention)
    assert torch.allclose(w.sum(-1), torch.ones(len(w)), atol=1e-5)
    assert (w >= 0).all()
    credit = assign(advantage, w, keep, beta=beta)
    assert torch.allclose(credit.double().sum(-1), advantage.double(), rtol=1e-6, atol=1e-6)
    assert not credit[keep == 0].any()
    assert not w[keep == 0].any()
    # No token is blamed for what the reply is praised for, beyond rounding.
    assert (credit * advantage.sign()[:, None] >= -1e-4 * (1 + advantage.abs()[:, None])).all()
    # What padding a row got in its batch does not matter.
    n = int(keep[0].sum())
    alone = assign(advantage[:1], weights(method, keep[:1, :n], attention[:1, :n]), keep[:1, :n], beta=beta)
    assert torch.allclose(alone[0], credit[0, :n], atol=1e-4)


@given(case=rows(), beta=st.floats(0, 1))
def test_all_credit_on_the_last_token_is_the_sequence_advantage_everywhere(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor], beta: float
) -> None:
    keep, _, advantage = case
    for method, share in (("last", beta), ("uniform", 0.0)):
        credit = assign(advantage, weights(method, keep, None), keep, beta=share)  # type: ignore[arg-type]
        value = reward_to_go(credit)
        assert torch.allclose(value * keep, advantage[:, None] * keep, rtol=1e-5, atol=1e-5)


@given(case=rows(), beta=st.floats(0, 1))
def test_the_first_token_is_worth_the_whole_advantage(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor], beta: float
) -> None:
    keep, attention, advantage = case
    value = reward_to_go(assign(advantage, weights("attention", keep, attention), keep, beta=beta))
    assert torch.allclose(value[:, 0], advantage, rtol=1e-5, atol=1e-4)


# -- sinks dropped, and signed credit ---------------------------------------------------------------


def test_dropped_columns_by_hand() -> None:
    """0.1, 0.3, 0.2 without the first: 0.6 and 0.4 of the rest; with all dropped it is uniform."""
    drop = torch.tensor([[True, False, False, False], [True, False, False, False], [False] * 4])
    got = table(weights("attention", KEEP, ATTENTION, drop))
    assert got == [[0.0, 0.6, 0.4, 0.0], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    assert torch.equal(weights("uniform", KEEP, None, drop), weights("uniform", KEEP, None))


def test_signed_credit_by_hand() -> None:
    """A = 1, beta 0.5, scores 2, -4, 0, 1: 1, -2, 0, 0.5 leave 1.5, for the last or 0.375 for each."""
    score, advantage = torch.tensor([[2.0, -4.0, 0.0, 1.0]]), torch.tensor([1.0])
    last = assign_signed(advantage, score, torch.ones(1, 4), beta=0.5)
    assert last.tolist() == [[1.0, -2.0, 0.0, 2.0]]
    spread = assign_signed(advantage, score, torch.ones(1, 4), beta=0.5, rest="spread")
    assert spread.tolist() == [[1.375, -1.625, 0.375, 0.875]]


def test_with_the_rest_on_the_last_token_reward_to_go_is_the_advantage_less_what_came_before() -> None:
    """So it is a baseline: it cannot depend on the token itself or on later ones."""
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(2, 5, generator=generator)
    score[1, :3] = score[0, :3]  # the same beginning, other ends
    value = reward_to_go(assign_signed(torch.tensor([2.0, -1.0]), score, torch.ones(2, 5), beta=0.7))
    baseline = value - torch.tensor([[2.0], [-1.0]])
    assert baseline[0, :4].tolist() == pytest.approx(baseline[1, :4].tolist(), abs=1e-5)
    assert baseline[0].tolist() == pytest.approx([-0.7 * float(score[0, :t].sum()) for t in range(5)], abs=1e-5)


@given(case=rows(), beta=st.floats(0, 2), rest=st.sampled_from(["last", "spread"]))
def test_signed_credit_sums_to_the_advantage(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor], beta: float, rest: Any
) -> None:
    keep, scores, advantage = case
    credit = assign_signed(advantage, 20.0 * (scores - 0.5), keep, beta=beta, rest=rest)
    assert torch.allclose(credit.double().sum(-1), advantage.double(), rtol=1e-6, atol=2e-5)
    assert not credit[keep == 0].any()
