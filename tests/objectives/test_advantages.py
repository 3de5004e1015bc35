"""Advantages by hand, with missing rewards, and their invariants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.loss_batches import F64, NAN

from tutelage.objectives.advantages import (
    advantages_grpo,
    advantages_opo,
    advantages_reinforce,
    advantages_whitened,
    gae,
    moving_mean,
    overlong_penalty,
    whiten,
)

ROWS = [[1.0, 3.0], [5.0, NAN], [0.0, 4.0]]  # the 5 has nothing to be compared with


def table(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=F64)


def close(got: torch.Tensor, wanted: list[list[float]]) -> bool:
    return torch.allclose(got, table(wanted), atol=1e-12)


def test_whose_deviation_divides() -> None:
    # Groups' means 2 and 2. Deviations: groups' sqrt 2 and sqrt 8; of 1, 3, 0, 4 about 2: sqrt(10 / 3).
    whole = math.sqrt(10 / 3)
    assert close(advantages_grpo(table(ROWS), scale="none"), [[-1, 1], [0, 0], [-2, 2]])
    assert close(advantages_grpo(table(ROWS), scale="batch", eps=0.0), [[-1 / whole, 1 / whole], [0, 0], [-2 / whole, 2 / whole]])  # fmt: skip
    half = 1 / math.sqrt(2)
    assert close(advantages_grpo(table(ROWS), eps=0.0), [[-half, half], [0, 0], [-half, half]])


def test_one_number_for_all_replies() -> None:
    assert close(advantages_reinforce(table(ROWS)), [[-1, 1], [0, 0], [-2, 2]])  # mean of 1, 3, 0, 4
    assert close(advantages_reinforce(table(ROWS), baseline="none"), [[1, 3], [0, 0], [0, 4]])
    assert close(advantages_reinforce(table(ROWS), baseline="moving", before=0.5), [[0.5, 2.5], [0, 0], [-0.5, 3.5]])
    assert close(advantages_reinforce(table(ROWS), baseline="moving"), [[-1, 1], [0, 0], [-2, 2]])  # nothing earlier


def test_a_moving_mean_remembers() -> None:
    assert moving_mean(None, table(ROWS), decay=0.9) == pytest.approx(2.0)
    assert moving_mean(1.0, table(ROWS), decay=0.9) == pytest.approx(0.9 + 0.2)
    assert moving_mean(1.0, table([[NAN, 3.0]]), decay=0.9) == 1.0


def test_opo_weighs_the_baseline_by_length() -> None:
    # (1 * 1 + 3 * 3) / 4 = 2.5; equal lengths give the mean; a missing reward's length counts nothing
    lengths = torch.tensor([[1, 3], [2, 9], [5, 5]])
    assert close(advantages_opo(table(ROWS), lengths), [[-1.5, 0.5], [0, 0], [-2, 2]])
    three = torch.tensor([[1, 3, 50]])
    assert close(advantages_opo(table([[1.0, 3.0, NAN]]), three), [[-1.5, 0.5, 0]])


def test_whitening_the_batch() -> None:
    whole = math.sqrt(10 / 3)
    assert close(advantages_whitened(table(ROWS), eps=0.0), [[-1 / whole, 1 / whole], [0, 0], [-2 / whole, 2 / whole]])
    # Another level of the first group: 11, 13, 0, 4 have mean 7; with the group's mean off it is as before.
    lifted = [[11.0, 13.0], *ROWS[1:]]
    spread = math.sqrt((16 + 36 + 49 + 9) / 3)
    assert close(advantages_whitened(table(lifted), eps=0.0), [[4 / spread, 6 / spread], [0, 0], [-7 / spread, -3 / spread]])  # fmt: skip
    assert close(advantages_whitened(table(lifted), baseline="group", eps=0.0), [[-1 / whole, 1 / whole], [0, 0], [-2 / whole, 2 / whole]])  # fmt: skip


def test_nothing_known_is_nothing_learned() -> None:
    silent = table([[NAN, NAN], [1.0, NAN]])
    lengths = torch.ones(2, 2)
    for got in (
        advantages_grpo(silent),
        advantages_grpo(silent, scale="batch"),
        advantages_reinforce(silent),
        advantages_reinforce(silent, baseline="none"),
        advantages_reinforce(silent, baseline="moving", before=3.0),
        advantages_whitened(silent),
        advantages_whitened(silent, baseline="group"),
        advantages_opo(silent, lengths),
    ):
        assert got.tolist() == [[0.0, 0.0]] * 2


REWARD = st.one_of(st.just(NAN), st.floats(-10, 10, width=32))
GROUPS = st.integers(2, 5).flatmap(lambda g: st.lists(st.lists(REWARD, min_size=g, max_size=g), min_size=1, max_size=4))


@settings(max_examples=40)
@given(rows=GROUPS, shift=st.floats(-5, 5))
def test_a_baseline_takes_a_shift_off_and_what_is_missing_stays_zero(rows: list[list[float]], shift: float) -> None:
    rewards = table(rows)
    valid = ~rewards.isnan()
    taught = valid & (valid.sum(-1, keepdim=True) > 1)
    lengths = torch.arange(1, rewards.numel() + 1).view_as(rewards)
    found: list[Any] = [
        lambda r: advantages_grpo(r, scale="none"),
        advantages_reinforce,
        lambda r: advantages_whitened(r, eps=1e-3),
        lambda r: advantages_opo(r, lengths),
    ]
    for one in found:
        got = one(rewards)
        assert torch.isfinite(got).all()
        assert not got[~taught].any()
        assert torch.allclose(one(rewards + shift), got, atol=1e-6)
    white = advantages_whitened(rewards, eps=0.0)[taught]
    if len(white) > 1 and float(rewards[taught].std()) > 1e-3:
        assert float(white.mean()) == pytest.approx(0.0, abs=1e-9)
        assert float(white.std()) == pytest.approx(1.0)


def test_whiten_by_hand() -> None:
    got = whiten(table([[1.0, 3.0, 99.0]]), table([[1.0, 1.0, 0.0]]), eps=0.0)
    assert close(got, [[-1 / math.sqrt(2), 1 / math.sqrt(2), 0]])
    assert not whiten(table([[4.0]]), table([[0.0]])).any()


def test_the_overlong_penalty_by_hand() -> None:
    """Limit 20, share 0.25: the last 5 tokens. 15 costs nothing, 16 a fifth, 20 all."""
    got = overlong_penalty(torch.tensor([[3, 15, 16, 20, 21]]), limit=20, share=0.25)
    assert got[0].tolist() == pytest.approx([0.0, 0.0, -0.2, -1.0, -1.0])
    assert not overlong_penalty(torch.tensor([[20]]), limit=20, share=0.0).any()


# ---- GAE ---------------------------------------------------------------------------------------


def test_gae_by_hand() -> None:
    """gamma 0.5, lambda 0.5. d_2 = 4 - 2 = 2; d_1 = 0 + 0.5 * 2 - 1 = 0; d_0 = 1 + 0.5 * 1 - 0.5 = 1.

    A_2 = 2, A_1 = 0 + 0.25 * 2 = 0.5, A_0 = 1 + 0.25 * 0.5 = 1.125. The second row ends after one token.
    """
    reward, value = table([[1.0, 0.0, 4.0], [3.0, 7.0, 7.0]]), table([[0.5, 1.0, 2.0], [1.0, 9.0, 9.0]])
    advantage, returns = gae(reward, value, table([[1.0] * 3, [1.0, 0.0, 0.0]]), 0.5, 0.5)
    assert close(advantage, [[1.125, 0.5, 2.0], [2.0, 0.0, 0.0]])
    assert close(returns, [[1.625, 1.5, 4.0], [3.0, 0.0, 0.0]])


@given(seed=st.integers(0, 10_000), gamma=st.floats(0, 1))
def test_gae_at_its_two_ends(seed: int, gamma: float) -> None:
    """lambda 1 is return minus value, lambda 0 one step's surprise; right values leave no surprise."""
    random = torch.Generator().manual_seed(seed)
    reward, value = (torch.randn(2, 5, generator=random, dtype=F64) for _ in range(2))
    keep = (torch.arange(5)[None] < torch.tensor([[5], [3]])).to(F64)
    reward, value = reward * keep, value * keep
    wanted = torch.zeros(2, 5, dtype=F64)
    for t in range(5):
        wanted[:, t] = sum((gamma**n * reward[:, t + n] for n in range(5 - t)), torch.zeros(2, dtype=F64))
    whole, returns = gae(reward, value, keep, gamma, 1.0)
    assert torch.allclose(whole, (wanted - value) * keep)
    assert torch.allclose(returns, wanted * keep)
    step, _ = gae(reward, value, keep, gamma, 0.0)
    following = torch.cat([value[:, 1:], torch.zeros(2, 1, dtype=F64)], -1)
    assert torch.allclose(step, (reward + gamma * following - value) * keep)
    assert torch.allclose(gae(reward, wanted * keep, keep, gamma, 0.7)[0], torch.zeros(2, 5, dtype=F64), atol=1e-10)
