"""Bias of every estimator, exactly: 3 tokens, length 2, all nine sequences and all pairs of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.loss_batches import F64, REWARDS, SEQUENCES, Table, expected_gradient

from tutelage.engines.batch import Batch
from tutelage.objectives.advantages import (
    advantages_grpo,
    advantages_opo,
    advantages_reinforce,
    advantages_whitened,
    gae,
)
from tutelage.objectives.divergence import importance, kl_k1
from tutelage.objectives.policy_gradient import DrGrpo, Grpo, Reinforce
from tutelage.objectives.ppo import Ppo
from tutelage.objectives.weighted import Gspo

COSINE_GROUP = 0.9442  # 19 degrees off
LENGTHS = torch.tensor([[2, 2]])


def on_policy(objective: Any, advantage: Any, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    policy = Table(seed)
    return expected_gradient(policy, policy.logp_ST().detach(), objective, advantage), policy.exact()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.mark.parametrize(
    ("advantage", "factor"),
    [
        (lambda r: advantages_reinforce(r, baseline="none"), 1.0),
        (lambda r: advantages_reinforce(r, baseline="moving", before=0.7), 1.0),  # knows nothing of these replies
        (advantages_reinforce, 0.5),  # (n - 1) / n with n = 2
        (lambda r: advantages_opo(r, LENGTHS), 0.5),  # equal lengths: the group's mean
    ],
)
def test_reinforce_is_unbiased_up_to_a_known_factor(advantage: Any, factor: float) -> None:
    got, exact = on_policy(Reinforce(kl=0.0), advantage)
    assert torch.allclose(got, factor * exact, atol=1e-10)


def test_dr_grpo_is_unbiased_up_to_a_known_factor() -> None:
    got, exact = on_policy(DrGrpo(kl=0.0, longest=2), lambda r: advantages_grpo(r, scale="none"))
    assert torch.allclose(got, exact / 4, atol=1e-10)  # 1/2 of the group's mean, 1/2 of the length


@pytest.mark.parametrize("objective", [Grpo(kl=0.0), Gspo(kl=0.0)], ids=lambda o: o.name)
def test_how_far_the_groups_deviation_turns_the_gradient(objective: Any, record_property: Any) -> None:
    got, exact = on_policy(objective, advantages_grpo)
    record_property("cosine with the exact gradient", cosine(got, exact))
    assert cosine(got, exact) == pytest.approx(COSINE_GROUP, abs=2e-3)


def test_whitening_the_batch_turns_it_as_much_where_the_batch_is_one_group() -> None:
    got, exact = on_policy(Reinforce(kl=0.0), advantages_whitened)
    assert cosine(got, exact) == pytest.approx(COSINE_GROUP, abs=2e-3)


def test_charging_k1_to_the_reward_is_the_gradient_of_the_divergence() -> None:
    policy, reference = Table(0), Table(1).logp_ST().detach()
    logp = policy.logp_ST()
    spent = kl_k1(logp.detach(), reference).sum(-1)
    whole = logp.sum(-1).exp() * (REWARDS - 0.3 * (logp - reference).sum(-1))
    (exact,) = torch.autograd.grad(whole.sum(), policy.logits)
    sampler = logp.detach()
    total = torch.zeros((), dtype=F64)
    logp = policy.logp_ST()
    for s in range(9):
        a = (REWARDS[s] - 0.3 * spent[s]).expand(1, 2)
        b = Batch(logp[s : s + 1], torch.ones(1, 2, dtype=F64), sampler[s : s + 1], reference[s : s + 1], a, 1, 2)
        total = total - sampler[s].sum().exp() * Reinforce(kl=0.3, kl_estimator="k1-reward")(b).value
    (got,) = torch.autograd.grad(total, policy.logits)
    assert torch.allclose(got, exact, atol=1e-10)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_ppo_with_the_true_values_is_unbiased_for_every_lambda(lam: float) -> None:
    """And with wrong values only for lambda = 1."""
    policy = Table(0)
    logp, odds = policy.logp_ST(), policy.logp_ST().detach()
    first = (odds.sum(-1).exp() * REWARDS).sum()
    second = torch.stack([(odds[3 * a : 3 * a + 3, 1].exp() * REWARDS[3 * a : 3 * a + 3]).sum() for a in range(3)])

    def gradient(wrong: float) -> torch.Tensor:
        total = torch.zeros((), dtype=F64)
        for s, (a, _) in enumerate(SEQUENCES):
            value = torch.stack([first, second[a] + wrong * a])[None]
            reward = torch.stack([torch.zeros((), dtype=F64), REWARDS[s]])[None]
            keep = torch.ones(1, 2, dtype=F64)
            advantage, returns = gae(reward, value, keep, 1.0, lam)
            b = Batch(logp[s : s + 1], keep, odds[s : s + 1], odds[s : s + 1], advantage, 1, 2)
            full = Batch(**{**vars(b), "value_BT": value, "old_value_BT": value, "return_BT": returns})
            total = total - 2 * odds[s].sum().exp() * Ppo(kl=0.0)(full).value  # the mean over 2 tokens halves it
        (grad,) = torch.autograd.grad(total, policy.logits, retain_graph=True)
        return grad

    assert torch.allclose(gradient(0.0), policy.exact(), atol=1e-10)
    assert torch.allclose(gradient(1.0), policy.exact(), atol=1e-10) == (lam == 1.0)


# ---- another model drew ------------------------------------------------------------------------


def corrected(policy: Table, sampler: torch.Tensor, method: Any, **more: Any) -> torch.Tensor:
    """Expected gradient with importance weights on the advantages; a constant baseline."""
    logp = policy.logp_ST()
    more = {"cap": 1e9, "low": 0.0} | more
    weight, _ = importance(logp.detach(), sampler, torch.ones(9, 2, dtype=F64), method=method, **more)
    odds = sampler.sum(-1).exp()
    b = Batch(logp, torch.ones(9, 2, dtype=F64), sampler, sampler, (odds * (REWARDS - REWARDS.mean()))[:, None] * weight, 1, 18)  # fmt: skip
    (grad,) = torch.autograd.grad(-Reinforce(kl=0.0)(b).value, policy.logits)
    return grad


def rounded(policy: Table, kind: str) -> torch.Tensor:
    """Log-probabilities of a slightly other sampler: a temperature, or logits rounded to steps of 1/4."""
    logits = policy.logits.detach()
    table = (logits / 1.3 if kind == "tempered" else (logits * 4).round() / 4).log_softmax(-1)
    return torch.stack([torch.stack([table[0, a], table[1 + a, b]]) for a, b in SEQUENCES])


@pytest.mark.parametrize("kind", ["tempered", "rounded"])
def test_off_policy_bias(kind: str, record_property: Any) -> None:
    """The sequence ratio is unbiased, token ratios within their bound, and no correction is worst.

    Worst on average over policies: for one in six, what token ratios get wrong is by chance more.
    The bound: for each token t the weight lacks the ratios of the other T - 1 tokens, each of which
    moves at most 2 Delta of probability, Delta the largest total variation of a next-token
    distribution; |grad log softmax| <= sqrt 2. So |bias| <= 2 sqrt 2 T (T - 1) Delta max|r|.
    """
    errors: dict[str, list[float]] = {"sequence": [], "token": [], "none": []}
    for seed in range(20):
        policy = Table(seed)
        sampler, exact = rounded(policy, kind), policy.exact()
        error = {m: float((corrected(policy, sampler, m) - exact).norm()) for m in errors}
        now = policy.logp_ST().detach().exp()
        moved = [0.5 * float((now[::3, 0] - sampler[::3, 0].exp()).abs().sum())]
        moved += [0.5 * float((now[i : i + 3, 1] - sampler[i : i + 3, 1].exp()).abs().sum()) for i in (0, 3, 6)]
        bound = 2 * math.sqrt(2) * 2 * max(moved) * float((REWARDS - REWARDS.mean()).abs().max())
        assert error["sequence"] < 1e-10
        assert 1e-6 < error["token"] < bound
        for method, one in error.items():
            errors[method].append(one / float(exact.norm()))
    mean = {method: sum(found) / len(found) for method, found in errors.items()}
    record_property("mean relative bias", mean)
    assert mean["token"] < 0.85 * mean["none"]


def test_truncation_and_masks_trade_bias_for_variance() -> None:
    policy = Table(0)
    sampler, exact = rounded(policy, "tempered"), policy.exact()
    bias = [float((corrected(policy, sampler, "sequence", cap=c) - exact).norm()) for c in (9.0, 1.2, 1.05, 0.8)]
    assert bias == sorted(bias)
    assert bias[0] < 1e-10 < bias[1]
    wide = corrected(policy, sampler, "mask")
    assert torch.allclose(wide, corrected(policy, sampler, "token"), atol=1e-12)  # nothing is masked
    assert not torch.allclose(wide, corrected(policy, sampler, "mask", cap=1.2, low=0.8))
    assert torch.allclose(corrected(policy, sampler, "geometric"), corrected(policy, sampler, "none"), atol=1e-12)
    assert not torch.allclose(corrected(policy, sampler, "geometric", cap=1.1, low=0.9), corrected(policy, sampler, "none"))  # fmt: skip
