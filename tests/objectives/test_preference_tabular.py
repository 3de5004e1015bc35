"""Where the objectives end: one prompt with five replies whose optimum is known, and pairs with known votes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from tests.pair_batches import F64

from tutelage.engines.batch import Batch, Loss
from tutelage.feedback.votes import VotePrior
from tutelage.objectives.preference import Dpo, ExoPair, RobustDpo

Objective = Callable[[Batch], Loss]

REF_K = torch.tensor([0.70, 0.10, 0.10, 0.05, 0.05], dtype=F64)
REWARD_K = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8], dtype=F64)
BETA = 0.5
ALL = list(itertools.combinations(range(5), 2))


def votes(reward_K: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry: P(i beats j) of every two replies."""
    return torch.stack([torch.sigmoid(reward_K[i] - reward_K[j]) for i, j in ALL])


def replies(logits_K: torch.Tensor, label_N: torch.Tensor) -> Batch:
    """Every two of the replies as a pair; a reply is one token."""
    rows = [k for pair in ALL for k in pair]
    logp = torch.log_softmax(logits_K, -1)[rows][:, None]
    label = torch.stack([label_N, 1 - label_N], 1).reshape(-1, 1)
    ref = REF_K.log()[rows][:, None]
    return Batch(logp, torch.ones_like(ref), torch.zeros_like(ref), ref, label, len(rows), len(rows))


def fitted(objective: Objective, label_N: torch.Tensor, iterations: int = 200) -> torch.Tensor:
    logits_K = REF_K.log().clone().requires_grad_(True)
    search = torch.optim.LBFGS([logits_K], max_iter=iterations, tolerance_grad=1e-12, tolerance_change=1e-14,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> torch.Tensor:
        search.zero_grad()
        value = objective(replies(logits_K, label_N)).value
        value.backward()
        return value

    search.step(closure)
    return torch.softmax(logits_K.detach(), -1)


OPTIMUM_K = torch.softmax(REF_K.log() + REWARD_K / BETA, -1)


@pytest.mark.parametrize("objective", [Dpo(BETA), ExoPair(BETA, smoothing=1e-9)])
def test_soft_labels_recover_the_regularised_optimum(objective: Objective) -> None:
    """pi* is proportional to pi_ref exp(r / beta)."""
    assert (REF_K - OPTIMUM_K).abs().max() > 0.2
    assert (fitted(objective, votes(REWARD_K)) - OPTIMUM_K).abs().max() < 1e-3


def test_robust_recovers_it_from_flipped_labels_and_smoothing_does_not() -> None:
    flipped = 0.8 * votes(REWARD_K) + 0.2 * (1 - votes(REWARD_K))
    assert (fitted(RobustDpo(BETA, flip=0.2), flipped) - OPTIMUM_K).abs().max() < 1e-3
    assert (fitted(Dpo(BETA), flipped) - OPTIMUM_K).abs().max() > 0.1


def test_matching_keeps_the_mode_and_improving_moves_it_to_the_best_reply() -> None:
    assert int(OPTIMUM_K.argmax()) == 0 and int(REWARD_K.argmax()) == 4
    matched = fitted(Dpo(BETA), votes(REWARD_K))
    improved = fitted(Dpo(BETA, mode="improve"), votes(REWARD_K), iterations=15)
    assert int(matched.argmax()) == 0
    assert int(improved.argmax()) == 4 and float(improved @ REWARD_K) > float(matched @ REWARD_K) + 0.2


SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=F64)  # of three groups of people
LIKING_GM = torch.tensor([[2.0, -1.0, 0.3, 1.5], [-1.0, 2.5, 0.0, 1.0], [-3.0, -2.0, 1.0, 0.5]], dtype=F64)
SPLIT_M = SHARES @ torch.sigmoid(LIKING_GM)  # of four questions, each with its own two replies


def predicted(objective: Objective, label_M: torch.Tensor, beta: float, rate: float = 20.0) -> torch.Tensor:
    """Share of people that the policy's odds predict for each question, after plain gradient descent."""
    gain_M = torch.zeros(4, dtype=F64, requires_grad=True)
    label = torch.stack([label_M, 1 - label_M], 1).reshape(-1, 1)
    for _ in range(300):
        logp = torch.stack([gain_M, torch.zeros_like(gain_M)], 1).reshape(-1, 1)
        zeros = torch.zeros_like(label)
        value = objective(Batch(logp, torch.ones_like(label), zeros, zeros, label, 8, 8)).value
        (slope,) = torch.autograd.grad(value, gain_M)
        gain_M = (gain_M - rate * slope).detach().requires_grad_(True)
    return torch.sigmoid(beta * gain_M.detach())


def test_match_reproduces_how_people_split() -> None:
    """Total variation on two answers is the difference of the shares. No single reward explains these people."""
    assert 0.3 < float(SPLIT_M.min()) < 0.5 < float(SPLIT_M.max()) < 0.8
    matched = predicted(Dpo(1.0), SPLIT_M, 1.0)
    assert float((matched - SPLIT_M).abs().max()) < 0.01
    hard = predicted(Dpo(1.0), (SPLIT_M > 0.5).to(F64), 1.0)
    improved = predicted(Dpo(1.0, mode="improve"), SPLIT_M, 1.0)
    assert float((hard - SPLIT_M).abs().min()) > 0.1 and float((improved - SPLIT_M).abs().max()) > 0.1


def test_match_on_few_votes_gives_the_posterior_share() -> None:
    """Three of three votes under Beta(2, 2) are 5/7: the policy ends at odds of 5 to 2 and not at certainty."""
    label = VotePrior(2.0).posterior(3, 3).mean
    found = predicted(Dpo(1.0), torch.full((4,), label, dtype=F64), 1.0)
    assert torch.allclose(found, torch.full((4,), 5 / 7, dtype=F64), atol=1e-4)
