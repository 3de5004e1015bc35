"""Advantages and losses worked by hand, and unbiasedness by exact enumeration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.loss_batches import F64, LN2, NAN, REWARDS, SEQUENCES, Table, batch, expected_gradient, slope

from tutelage.engines.batch import Batch
from tutelage.objectives.policy_gradient import Grpo, Rloo, advantages_grpo, advantages_rloo, importance, kl_k3

# ---- advantages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "wanted"),
    [
        ([1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]),  # mean 2, deviation sqrt((1 + 0 + 1) / 2) = 1
        ([0.0, 0.0, 0.0, 4.0], [-0.5, -0.5, -0.5, 1.5]),  # mean 1, sqrt((1 + 1 + 1 + 9) / 3) = 2
        ([1.0, NAN, 3.0], [-1 / math.sqrt(2), 0.0, 1 / math.sqrt(2)]),  # mean 2, sqrt((1 + 1) / 1) = sqrt 2
        ([5.0, NAN, NAN], [0.0, 0.0, 0.0]),  # one value has nothing to be compared with
        ([NAN, NAN], [0.0, 0.0]),
    ],
)
def test_grpo_advantages_by_hand(rewards: list[float], wanted: list[float]) -> None:
    got = advantages_grpo(torch.tensor([rewards], dtype=F64), eps=0.0)
    assert got[0].tolist() == pytest.approx(wanted)


def test_grpo_does_not_explode_in_a_tied_group() -> None:
    assert advantages_grpo(torch.tensor([[2.0, 2.0, 2.0]])).tolist() == [[0.0, 0.0, 0.0]]
    # 1e-6 apart: deviation 7e-7 against eps 1e-4, so noise of that size stays below a hundredth.
    assert float(advantages_grpo(torch.tensor([[1.0, 1.000001]])).abs().max()) < 0.01


@pytest.mark.parametrize(
    ("rewards", "wanted"),
    [
        # 1 - (2 + 6)/2 = -3; 2 - (1 + 6)/2 = -1.5; 6 - (1 + 2)/2 = 4.5
        ([1.0, 2.0, 6.0], [-3.0, -1.5, 4.5]),
        ([1.0, NAN, 3.0], [-2.0, 0.0, 2.0]),  # each against the one other that is there
        ([7.0, NAN], [0.0, 0.0]),
        ([NAN, NAN], [0.0, 0.0]),
    ],
)
def test_rloo_advantages_by_hand(rewards: list[float], wanted: list[float]) -> None:
    assert advantages_rloo(torch.tensor([rewards], dtype=F64))[0].tolist() == pytest.approx(wanted)


REWARD = st.one_of(st.just(NAN), st.floats(-10, 10, width=32))


@given(group=st.lists(REWARD, min_size=1, max_size=8), shift=st.floats(-5, 5), scale=st.floats(0.5, 4))
def test_advantages_sum_to_zero_and_ignore_a_shift(group: list[float], shift: float, scale: float) -> None:
    rewards = torch.tensor([group], dtype=F64)
    for advantage in (advantages_grpo, advantages_rloo):
        got = advantage(rewards)
        assert abs(float(got.sum())) < 1e-8
        assert torch.isfinite(got).all()
        assert not got[rewards.isnan()].any()
        assert torch.allclose(advantage(rewards + shift), got, atol=1e-8)
    assert torch.allclose(advantages_rloo(rewards * scale), advantages_rloo(rewards) * scale, atol=1e-8)
    for g, value in enumerate(group):  # leave-one-out, literally
        others = [r for i, r in enumerate(group) if i != g and r == r]
        if value == value and others:
            assert float(advantages_rloo(rewards)[0, g]) == pytest.approx(value - sum(others) / len(others), abs=1e-9)


def test_groups_do_not_mix() -> None:
    both = torch.tensor([[1.0, 2.0, 3.0], [10.0, NAN, 30.0]])
    for advantage in (advantages_grpo, advantages_rloo):
        for p in (0, 1):
            assert torch.equal(advantage(both)[p], advantage(both[p : p + 1])[0])


# ---- KL --------------------------------------------------------------------------------------


def test_k3_by_hand() -> None:
    logp = torch.tensor([[-1.0, -1.0, -1.0]], dtype=F64, requires_grad=True)
    got = kl_k3(logp, torch.tensor([[-1.0, -1.0 + LN2, -1.0 - LN2]], dtype=F64))
    # d = 0: 0.  d = ln 2: 2 - ln 2 - 1.  d = -ln 2: 1/2 + ln 2 - 1.
    assert got[0].tolist() == pytest.approx([0.0, 1 - LN2, LN2 - 0.5])
    got.sum().backward()
    assert logp.grad is not None
    assert logp.grad[0].tolist() == pytest.approx([0.0, -1.0, 0.5])  # 1 - exp(d)


@given(a=st.floats(-40, 0, width=32), b=st.floats(-40, 0, width=32))
def test_k3_is_never_negative(a: float, b: float) -> None:
    double = kl_k3(torch.tensor([[a]], dtype=F64), torch.tensor([[b]], dtype=F64))
    assert float(double) >= -1e-12
    assert torch.isfinite(double).all()
    assert float(kl_k3(torch.tensor([[a]]), torch.tensor([[b]]))) >= -1e-6  # float32 rounding of exp


def test_k3_is_unbiased_on_policy() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([0.2, 0.2, 0.6], dtype=F64)
    exact = float((p * (p / q).log()).sum())
    assert float((p * kl_k3(p.log()[None], q.log()[None])[0]).sum()) == pytest.approx(exact)


# ---- GRPO ------------------------------------------------------------------------------------


def test_grpo_by_hand() -> None:
    """Two rows of two and one token; the padding holds rubbish that must not count.

    row 0, A = 2:  ratio 1 -> 2;  ratio 1.5 -> min(3, 1.2 * 2) = 2.4, clipped
    row 1, A = -1: ratio 0.5 -> min(-0.5, 0.8 * -1) = -0.8, clipped
    KL of the first token: d = ln 2 -> 1 - ln 2 = 0.306853, beta = 0.5
    L = -1/2 [ (2 - 0.153426 + 2.4) / 2 - 0.8 ] = -1/2 [ 2.123287 - 0.8 ] = -0.661643
    dL/dlogp of the first token: -1/2 * 1/2 * (1 * 2 - 0.5 * (1 - 2)) = -0.625; the others are clipped
    """
    b = batch(
        [[1.0, 1.5], [0.5, 7.0]],
        [[2.0, 2.0], [-1.0, 9.0]],
        gap_BT=[[LN2, 0.0], [0.0, 3.0]],
        keep_BT=[[1.0, 1.0], [1.0, 0.0]],
    )
    value, grad = slope(Grpo(clip=0.2, kl=0.5), b)
    assert value == pytest.approx(-(4.4 - 0.5 * (1 - LN2)) / 4 + 0.4)
    assert value == pytest.approx(-0.661643, abs=1e-6)
    assert grad[0] == pytest.approx([-0.625, 0.0])
    assert grad[1] == pytest.approx([0.0, 0.0])
    sums = Grpo(clip=0.2, kl=0.5)(b).sums
    # Ratios outside [0.8, 1.2]: two of three tokens; ratios sum to 1 + 1.5 + 0.5.
    assert sums == pytest.approx({"kl_to_start": 1 - LN2, "clip_fraction": 2.0, "ratio": 3.0, "tokens": 3.0})


def test_grpo_weighs_rows_not_tokens() -> None:
    """-1/B 1/|y| rho A: a token of the long row gets 1/(2*4), of the short one 1/(2*1)."""
    b = batch([[1.0] * 4, [1.0] * 4], [[1.0] * 4, [1.0] * 4], keep_BT=[[1.0] * 4, [1.0, 0.0, 0.0, 0.0]])
    value, grad = slope(Grpo(kl=0.0), b)
    assert value == pytest.approx(-1.0)
    assert grad[0] == pytest.approx([-0.125] * 4)
    assert grad[1] == pytest.approx([-0.5, 0, 0, 0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows"),
    [
        (1.5, 1.0, False),  # already likelier than the clip allows, and praised: no more of it
        (0.5, 1.0, True),  # praised but rarer than before: learn
        (0.5, -1.0, False),  # already rarer, and blamed: no more
        (1.5, -1.0, True),  # blamed but likelier: learn
        (1.1, 1.0, True),
        (0.9, -1.0, True),
    ],
)
@pytest.mark.parametrize("objective", [Grpo(0.2, 0.0), Rloo(0.2, 0.0)], ids=lambda o: o.name)
def test_the_clip_holds_on_the_pessimistic_side_only(
    objective: Any, ratio: float, advantage: float, flows: bool
) -> None:
    value, grad = slope(objective, batch([[ratio]], [[advantage]]))
    assert grad[0][0] == pytest.approx(-ratio * advantage if flows else 0.0)
    held = min(max(ratio, 0.8), 1.2)
    assert value == pytest.approx(-min(ratio * advantage, held * advantage))


@pytest.mark.parametrize("objective", [Grpo(0.2, 0.3), Rloo(0.2, 0.3)], ids=lambda o: o.name)
def test_parts_of_a_step_add_up_to_the_whole(objective: Any) -> None:
    ratio, advantage = [[1.0, 1.3], [0.9, 0.6], [1.1, 1.0]], [[1.0, 0.5], [-1.0, -0.2], [0.3, 0.3]]
    gap = [[0.1, -0.2], [0.3, 0.0], [0.0, 0.4]]
    whole, grad = slope(objective, batch(ratio, advantage, gap_BT=gap))
    parts = [slope(objective, batch(ratio[i:j], advantage[i:j], gap_BT=gap[i:j], rows=3)) for i, j in ((0, 1), (1, 3))]
    assert sum(p[0] for p in parts) == pytest.approx(whole)
    for got, wanted in zip(parts[0][1] + parts[1][1], grad, strict=True):
        assert got == pytest.approx(wanted)


def test_a_runaway_ratio_stays_finite() -> None:
    for objective in (Grpo(), Rloo()):
        b = batch([[1.0, 1.0]], [[1.0, -1.0]])
        far = Batch(b.logp_BT, b.keep_BT, b.old_logp_BT - 500.0, b.ref_logp_BT - 500.0, b.advantage_BT, 1, 2)
        assert math.isfinite(slope(objective, far)[0])


# ---- RLOO ------------------------------------------------------------------------------------


def test_rloo_by_hand_on_policy() -> None:
    """Ratios one: the slope of each token is -A_t / B, its own reward-to-go, whatever the length."""
    b = batch([[1.0, 1.0, 1.0], [1.0] * 3], [[3.0, 2.0, 0.5], [-1.0] * 3], keep_BT=[[1.0] * 3, [1.0, 0.0, 0.0]])
    _, grad = slope(Rloo(kl=0.0), b)
    assert grad[0] == pytest.approx([-1.5, -1.0, -0.25])
    assert grad[1] == pytest.approx([0.5, 0.0, 0.0])


def test_rloo_kl_by_hand() -> None:
    """beta/B sum_t (1 - exp d): 0.5/1 * (1 - 2) = -0.5 where d = ln 2, 0.5 * (1 - 1/2) = 0.25 where -ln 2."""
    value, grad = slope(Rloo(kl=0.5), batch([[1.0, 1.0]], [[0.0, 0.0]], gap_BT=[[LN2, -LN2]]))
    assert value == pytest.approx(0.5 * ((1 - LN2) + (LN2 - 0.5)))
    assert grad[0] == pytest.approx([-0.5, 0.25])


def test_rloo_with_equal_advantages_has_the_sequence_ratios_slope() -> None:
    """rho_b G = 1.1 * 1.05 * 2 = 2.31; its slope in every token's log-probability is rho_b G again."""
    _, grad = slope(Rloo(clip=0.2, kl=0.0), batch([[1.1, 1.05]], [[2.0, 2.0]]))
    assert grad[0] == pytest.approx([-2.31, -2.31])


def test_rloo_clips_by_the_whole_reply() -> None:
    """1.15 * 1.15 = 1.3225 is beyond 1.2, though no single token is."""
    _, grad = slope(Rloo(clip=0.2, kl=0.0), batch([[1.15, 1.15]], [[1.0, 1.0]]))
    assert grad[0] == [0.0, 0.0]


# ---- the tabular problem: 3 tokens, length 2, 9 sequences --------------------------------------


def test_rloo_is_unbiased() -> None:
    policy = Table(0)
    got = expected_gradient(policy, policy.logp_ST().detach(), Rloo(kl=0.0), advantages_rloo)
    assert torch.allclose(got, policy.exact(), atol=1e-10)


def test_rloo_is_unbiased_with_three_samples() -> None:
    policy = Table(1)
    got = expected_gradient(policy, policy.logp_ST().detach(), Rloo(kl=0.0), advantages_rloo, group=3)
    assert torch.allclose(got, policy.exact(), atol=1e-10)


def test_the_group_mean_as_baseline_shrinks_the_gradient_by_g_minus_one_over_g() -> None:
    policy = Table(0)

    def centred(rewards: torch.Tensor) -> torch.Tensor:
        return rewards - rewards.mean(-1, keepdim=True)

    got = expected_gradient(policy, policy.logp_ST().detach(), Rloo(kl=0.0), centred)
    assert torch.allclose(got, policy.exact() / 2, atol=1e-10)


def test_dividing_by_the_deviation_biases_grpo() -> None:
    """With G = 2 the normalised advantage is +-1/sqrt 2 whatever the rewards: only their order is left."""
    policy = Table(0)
    sampler = policy.logp_ST().detach()
    got, exact = expected_gradient(policy, sampler, Grpo(kl=0.0), advantages_grpo), policy.exact()
    cosine = float(torch.cosine_similarity(got.flatten(), exact.flatten(), dim=0))
    assert 0.5 < cosine < 0.99  # another direction, but not a wrong one


def test_off_policy_rloo_is_unbiased_through_the_sequence_ratio() -> None:
    """Sampled at temperature 1.5, clip out of the way: importance weighting must undo the sampler."""
    policy = Table(0)
    hot = (policy.logits.detach() / 1.5).log_softmax(-1)
    sampler = torch.stack([torch.stack([hot[0, a], hot[1 + a, b]]) for a, b in SEQUENCES])
    plain = REWARDS.mean()  # a constant baseline: what is tested here is the ratio

    def shifted(rewards: torch.Tensor) -> torch.Tensor:
        return rewards - plain

    got = expected_gradient(policy, sampler, Rloo(clip=1e9, kl=0.0), shifted)
    ignored = expected_gradient(policy, policy.logp_ST().detach(), Rloo(clip=1e9, kl=0.0), shifted)
    assert torch.allclose(ignored, policy.exact(), atol=1e-10)
    assert torch.allclose(got, policy.exact(), atol=1e-10)


# ---- importance of tokens that another model drew --------------------------------------------


def test_importance_by_hand() -> None:
    """Ratios 2, 1/2 and 4, capped at 3; the fourth place holds no token."""
    old = torch.tensor([[2.0, 0.5], [4.0, 9.0]]).log()
    keep = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    weight, apart = importance(old, torch.zeros(2, 2), keep, cap=3.0)
    assert torch.allclose(weight, torch.tensor([[2.0, 0.5], [3.0, 0.0]]))
    assert apart["mismatch_kl"] == pytest.approx(-(LN2 - LN2 + 2 * LN2) / 3)
    assert apart["effective_sample_size"] == pytest.approx(6.5**2 / (4 + 0.25 + 16) / 3)
    assert apart["truncated"] == pytest.approx(1 / 3)


def test_the_same_model_weighs_every_token_one() -> None:
    logp = torch.tensor([[-1.0, -2.0, -3.0]])
    weight, apart = importance(logp, logp, torch.ones(1, 3), cap=2.0)
    assert weight.tolist() == [[1.0, 1.0, 1.0]]
    whole = {"mismatch_kl": 0.0, "mismatch_k3": 0.0, "effective_sample_size": pytest.approx(1.0), "truncated": 0.0}
    assert apart == whole


@given(st.integers(0, 10_000))
def test_untruncated_weights_make_the_samplers_mean_the_policys(seed: int) -> None:
    """Exact over a small vocabulary: E_q[w f] = E_p[f]."""
    random = torch.Generator().manual_seed(seed)
    p, q, f = (torch.randn(5, generator=random, dtype=F64) for _ in range(3))
    p, q = p.log_softmax(0), q.log_softmax(0)
    weight, _ = importance(p[None], q[None], torch.ones(1, 5, dtype=F64), cap=1e9)
    assert float((q.exp() * weight[0] * f).sum()) == pytest.approx(float((p.exp() * f).sum()))
