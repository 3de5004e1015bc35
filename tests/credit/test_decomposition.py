"""Rewards of replies as sums over their tokens: by hand, invariants, and what is known recovered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from tutelage.credit.decomposition import Decomposition
from tutelage.errors import StoreError


def filled(mean_PGF: torch.Tensor, reward_PG: torch.Tensor) -> Decomposition:
    found = Decomposition(mean_PGF.shape[-1])
    found.add(mean_PGF, reward_PG)
    return found


def drawn(seed: int, groups: int, size: int = 6, tokens: int = 8, noise: float = 0.1) -> tuple[torch.Tensor, ...]:
    """Token states, true weights, and rewards that are sums of what the states are worth, by group of 4."""
    draw = torch.Generator().manual_seed(seed)
    state_PGTF = torch.randn(groups, 4, tokens, size, generator=draw) + torch.randn(groups, 1, 1, size, generator=draw)
    weight_F = torch.randn(size, generator=draw)
    easy_P1 = 5.0 * torch.randn(groups, 1, generator=draw)
    reward_PG = (state_PGTF @ weight_F).mean(-1) + easy_P1 + noise * torch.randn(groups, 4, generator=draw)
    return state_PGTF, weight_F, reward_PG


def test_by_hand() -> None:
    """Ten times two replies with means 0 and 2, rewards 0 and 1: about their means -1, 1 and -1/2, 1/2, a slope of 1/2.

    The column's deviation is the root of 20 / 10, so that a penalty of 1e-4 a row makes it 10 / (20 (1 + 1e-4)).
    """
    found = filled(torch.tensor([[[0.0], [2.0]]]).repeat(10, 1, 1), torch.tensor([[0.0, 1.0]]).repeat(10, 1)).fit()
    assert float(found.weight_F) == pytest.approx(0.5 / 1.0001, rel=1e-6)
    assert found.share == pytest.approx(1.0, abs=1e-6)


def test_what_tokens_are_worth_is_found_from_sums_alone() -> None:
    state_PGTF, weight_F, reward_PG = drawn(0, groups=100)
    found = filled(state_PGTF.mean(2), reward_PG).fit()
    assert float(torch.nn.functional.cosine_similarity(found.weight_F, weight_F, dim=0)) > 0.98
    assert found.share > 0.8


def test_it_is_ridge_regression_within_groups() -> None:
    """Against scikit-learn, at one of the penalties; the choice among them is by generalised cross-validation."""
    state_PGTF, _, reward_PG = drawn(1, groups=12, noise=1.0)
    mean_PGF = state_PGTF.mean(2)
    x_NF = (mean_PGF - mean_PGF.mean(1, keepdim=True)).flatten(0, 1).double().numpy()
    r_N = (reward_PG - reward_PG.mean(1, keepdim=True)).flatten().double().numpy()
    free = 12 * 3
    scale_F = np.sqrt((x_NF**2).sum(0) / free)
    tried = []
    for penalty in (10.0**k for k in range(-4, 5)):
        weight_F = Ridge(alpha=penalty * free, fit_intercept=False).fit(x_NF / scale_F, r_N).coef_
        hat_NN = (
            x_NF
            / scale_F
            @ np.linalg.solve((x_NF / scale_F).T @ (x_NF / scale_F) + penalty * free * np.eye(6), (x_NF / scale_F).T)
        )
        error = ((r_N - x_NF / scale_F @ weight_F) ** 2).sum() / free / (1 - np.trace(hat_NN) / free) ** 2
        tried.append((error, weight_F / scale_F))
    error, weight_F = min(tried, key=lambda one: one[0])
    found = filled(mean_PGF, reward_PG).fit()
    assert found.weight_F.numpy() == pytest.approx(weight_F, rel=1e-4)
    assert found.share == pytest.approx(1 - error / ((r_N**2).sum() / free), abs=1e-6)


@given(seed=st.integers(0, 999))
def test_prompts_drop_out_and_order_does_not_count(seed: int) -> None:
    state_PGTF, _, reward_PG = drawn(seed, groups=6)
    mean_PGF = state_PGTF.mean(2)
    plain = filled(mean_PGF, reward_PG).fit()
    moved = filled(mean_PGF + 3.0, reward_PG + torch.arange(6.0)[:, None]).fit()
    assert torch.allclose(plain.weight_F, moved.weight_F, atol=1e-3)
    parts = Decomposition(6)
    for p in reversed(range(6)):
        parts.add(mean_PGF[p : p + 1].flip(1), reward_PG[p : p + 1].flip(1))
    assert torch.allclose(plain.weight_F, parts.fit().weight_F, atol=1e-5)


def test_a_reply_without_a_reward_is_as_if_it_were_not_there() -> None:
    state_PGTF, _, reward_PG = drawn(2, groups=9)
    mean_PGF = state_PGTF.mean(2)
    gone_PG = reward_PG.clone()
    gone_PG[:, 3] = torch.nan
    assert torch.equal(
        filled(mean_PGF, gone_PG).fit().weight_F, filled(mean_PGF[:, :3], reward_PG[:, :3]).fit().weight_F
    )
    alone = filled(mean_PGF[:, :1], reward_PG[:, :1])
    assert alone.freedom == 0.0 and not alone.fit().weight_F.any()


def test_of_noise_little_is_believed_and_of_nothing_nothing() -> None:
    shares = []
    for seed in range(20):
        state_PGTF, _, reward_PG = drawn(seed, groups=20)
        found = filled(state_PGTF.mean(2), torch.randn(20, 4, generator=torch.Generator().manual_seed(seed))).fit()
        assert not reward_PG.isnan().any()
        shares.append(found.share)
    assert sum(shares) / 20 < 0.05 and min(shares) == 0.0
    state_PGTF, _, _ = drawn(0, groups=4)
    assert not filled(state_PGTF.mean(2), torch.ones(4, 4)).fit().weight_F.any()
    assert not filled(torch.zeros(4, 4, 6), torch.randn(4, 4)).fit().weight_F.any()


def test_it_is_kept_and_taken_over(tmp_path: Path) -> None:
    state_PGTF, _, reward_PG = drawn(3, groups=5)
    first, second = filled(state_PGTF.mean(2), reward_PG), Decomposition(6)
    first.save(tmp_path)
    second.load(tmp_path)
    assert torch.equal(first.fit().weight_F, second.fit().weight_F)
    with pytest.raises(StoreError, match="of a model of size 6"):
        Decomposition(7).load(tmp_path)
    next(tmp_path.iterdir()).write_bytes(b"nothing")
    with pytest.raises(StoreError, match="cannot be read"):
        second.load(tmp_path)
    (tmp_path / "other").mkdir()
    first.load(tmp_path / "other")
    assert not first.fit().weight_F.any() and first.freedom == 0.0
