"""What a unit of an explained reward is worth within its group: by hand, and never beyond the cap."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutelage.credit.signed import CAP, slopes
from tutelage.credit.tokens import assign_signed, reward_to_go


def test_slope_by_hand() -> None:
    """Rewards 0, 1, 2 and advantages -3, 0, 3: three of advantage a unit of reward."""
    got = slopes(torch.tensor([[-3.0, 0.0, 3.0]]), torch.tensor([[0.0, 1.0, 2.0]]), torch.full((1, 3, 2), 0.5))
    assert got.slope_P.tolist() == pytest.approx([3.0])
    assert not (got.flat_P | got.against_P | got.capped_P).any()


def test_what_others_made_stays_in_equal_parts_or_on_the_last() -> None:
    """Advantage 3, slope 3, scores 1 and -0.5: 3 and -1.5, and 1.5 left over."""
    scaled = 3.0 * torch.tensor([[1.0, -0.5]])
    keep, advantage = torch.ones(1, 2), torch.tensor([3.0])
    assert assign_signed(advantage, scaled, keep, beta=1.0).tolist() == [[3.0, 0.0]]
    assert assign_signed(advantage, scaled, keep, beta=1.0, rest="spread").tolist() == [[3.75, -0.75]]
    assert assign_signed(advantage, scaled, keep, beta=0.5, rest="spread").tolist() == [[2.625, 0.375]]


def test_a_reply_without_a_reward_does_not_count() -> None:
    """Without the middle one: rewards -1, 1 around their mean, advantages -3, 1: 2 a unit."""
    reward = torch.tensor([[0.0, math.nan, 2.0]])
    got = slopes(torch.tensor([[-3.0, 9.0, 1.0]]), reward, torch.zeros(1, 3, 2))
    assert got.slope_P.tolist() == pytest.approx([2.0])


@pytest.mark.parametrize(
    ("reward", "which"),
    [
        ([1.0, 1.0, 1.0], "flat_P"),
        ([1e6, 1e6 + 1e-3, 1e6], "flat_P"),
        ([math.nan, 2.0, math.nan], "flat_P"),
        ([math.nan] * 3, "flat_P"),
        ([2.0, 1.0, 0.0], "against_P"),
    ],
)
def test_where_the_reward_explains_nothing_the_slope_is_zero(reward: list[float], which: str) -> None:
    got = slopes(torch.tensor([[-1.0, 0.0, 1.0]]), torch.tensor([reward]).float(), torch.ones(1, 3, 2))
    assert got.slope_P.tolist() == [0.0]
    assert [name for name in ("flat_P", "against_P", "capped_P") if getattr(got, name).any()] == [which]


def test_groups_have_slopes_of_their_own() -> None:
    advantage = torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]])
    got = slopes(advantage, torch.tensor([[0.0, 1.0], [0.0, 4.0], [0.0, 1.0]]), torch.zeros(3, 2, 1))
    assert got.slope_P.tolist() == pytest.approx([2.0, 0.5, 0.0])


numbers = st.floats(-5, 5, allow_nan=False, width=32)


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=2, max_size=6))
def test_credit_sums_to_the_advantage_and_moves_no_token_beyond_the_cap(rows: list[tuple[float, ...]]) -> None:
    """Whatever the group: scores that nearly cancel, rewards that hardly differ."""
    table = torch.tensor(rows)
    advantage_B, reward_B, score_BT = table[:, 0], table[:, 1], table[:, 2:]
    got = slopes(advantage_B[None], reward_B[None], score_BT[None])
    assert got.slope_P.isfinite().all() and (got.slope_P >= 0).all()
    scaled_BT = float(got.slope_P) * score_BT
    most = CAP * float(advantage_B.abs().max())
    assert float(reward_to_go(scaled_BT).abs().max()) <= most * (1 + 1e-5) + 1e-12
    credit_BT = assign_signed(advantage_B, scaled_BT, torch.ones_like(score_BT), beta=1.0)
    torch.testing.assert_close(credit_BT.sum(-1), advantage_B, atol=1e-4, rtol=1e-5)
