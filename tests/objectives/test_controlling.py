"""Losses on choices: values and gradients worked by hand, and the exact gradient of a bandit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.objectives.controlling import ActionGradient, LatentPreference
from tutelage.objectives.policy_gradient import advantages_rloo


def gradient_of_scores(loss: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, scores)
    return found


# -- policy gradient --------------------------------------------------------------------------------


def test_the_gradient_loss_and_its_gradient_by_hand() -> None:
    """Two settings, probabilities 3/4 and 1/4; two replies, one by each, rewards 1 and 0.

    Leave-one-out advantages are +1 and -1, on policy the ratios are 1, so the gains cancel:
    L = -1/2 [(1 - 1) + eta (H + H)] = -eta H. d log p(a) / d scores = onehot(a) - p, so the gain's part of
    the gradient is -1/2 [(1/4, -1/4) - (-3/4, 3/4)] = (-1/2, 1/2). dH/ds_i = -p_i (log p_i + H).
    """
    scores = torch.tensor([math.log(3.0), 0.0], requires_grad=True)
    logp = scores.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum().expand(2, 1)
    advantage = advantages_rloo(torch.tensor([[1.0, 0.0]])).flatten()
    assert advantage.tolist() == [1.0, -1.0]
    taken = logp[:, None]
    loss = ActionGradient(entropy=0.1, clip=0.2)(taken, taken.detach(), entropy, advantage, torch.ones(2, 1))
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert loss.value.item() == pytest.approx(-0.1 * h, abs=1e-6)
    bonus = [0.1 * p * (math.log(p) + h) for p in (0.75, 0.25)]
    assert gradient_of_scores(loss.value, scores).tolist() == pytest.approx([-0.5 + bonus[0], 0.5 + bonus[1]], abs=1e-6)
    assert loss.sums["entropy"] == pytest.approx(2 * h, abs=1e-6)
    assert (loss.sums["choices"], loss.sums["clip_fraction"]) == (2.0, 0.0)


def test_choices_beyond_the_end_of_a_reply_do_not_count() -> None:
    logp = torch.tensor([[-0.5, -9.0], [-1.0, -0.2]], requires_grad=True)
    keep = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    entropy = torch.tensor([[0.4, 5.0], [0.3, 0.2]])
    loss = ActionGradient(entropy=0.5)(logp, logp.detach(), entropy, torch.tensor([2.0, -1.0]), keep)
    # Ratios 1: gains 2, -1, -1; entropies 0.4, 0.3, 0.2; two replies.
    assert loss.value.item() == pytest.approx(-(2.0 - 2.0 + 0.5 * 0.9) / 2, abs=1e-6)
    assert gradient_of_scores(loss.value, logp).flatten().tolist() == pytest.approx([-1.0, 0.0, 0.5, 0.5], abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, -1.0, False), (0.5, 1.0, True), (1.1, 1.0, True)],
)
def test_a_choice_that_has_moved_far_enough_is_let_be(ratio: float, advantage: float, moves: bool) -> None:
    old = torch.tensor([[-1.0]])
    logp = (old + math.log(ratio)).requires_grad_()
    loss = ActionGradient(entropy=0.0, clip=0.2)(
        logp, old, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1)
    )
    found = float(gradient_of_scores(loss.value, logp))
    assert found == pytest.approx(-ratio * advantage if moves else 0.0, abs=1e-6)
    assert loss.sums["clip_fraction"] == float(abs(ratio - 1) > 0.2)


def test_over_all_pairs_of_draws_the_gradient_is_that_of_the_expected_reward() -> None:
    """Three settings, G = 2, all nine pairs weighed by their probability: unbiased, to rounding."""
    scores = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 0.2, -0.7], dtype=torch.float64)
    logp = scores.log_softmax(-1)
    truth = gradient_of_scores((logp.exp() * rewards).sum(), scores)
    objective, mean = ActionGradient(entropy=0.0), torch.zeros(3, dtype=torch.float64)
    for pair in itertools.product(range(3), repeat=2):
        logp = scores.log_softmax(-1)
        rows = list(pair)
        advantage = advantages_rloo(rewards[rows][None]).flatten()
        taken, keep = logp[rows][:, None], torch.ones(2, 1, dtype=torch.float64)
        loss = objective(taken, taken.detach(), torch.zeros_like(keep), advantage, keep)
        mean += logp.detach()[rows].sum().exp() * gradient_of_scores(-loss.value, scores)
    assert torch.allclose(mean, truth, atol=1e-12)


# -- latent preferences -----------------------------------------------------------------------------


def test_the_preference_loss_and_its_gradient_by_hand() -> None:
    """One pair of three positions, of which the second has the same choice on both sides.

    Gap (-0.2 + 1.2) + (-0.5 + 0.3) = 0.8; b = 2: margin 1.6; L = log(1 + e^-1.6) = 0.183894...
    dL/d better = -b s(-1.6) = -2 * 0.167982 = -0.335963 where the choices differ, and the opposite for the worse.
    """
    better = torch.tensor([[-0.2, -0.7, -0.5]], requires_grad=True)
    worse = torch.tensor([[-1.2, -0.1, -0.3]], requires_grad=True)
    loss = LatentPreference(beta=2.0)(better, worse, torch.tensor([[1.0, 0.0, 1.0]]))
    assert loss.value.item() == pytest.approx(math.log1p(math.exp(-1.6)), abs=1e-6)
    assert loss.value.item() == pytest.approx(0.183894, abs=1e-5)
    up, down = torch.autograd.grad(loss.value, (better, worse))
    assert up[0].tolist() == pytest.approx([-0.335963, 0.0, -0.335963], abs=1e-5)
    assert down[0].tolist() == pytest.approx([0.335963, 0.0, 0.335963], abs=1e-5)
    assert loss.sums["margin"] == pytest.approx(1.6)
    assert (loss.sums["accuracy"], loss.sums["differ"], loss.sums["pairs"]) == (1.0, 2.0, 1.0)


def test_a_frozen_head_is_taken_off() -> None:
    """Where nothing has moved from the frozen head the margin is 0 and the loss log 2, whatever the head says."""
    better, worse = torch.tensor([[-0.1]]), torch.tensor([[-4.0]])
    objective, differ = LatentPreference(beta=3.0), torch.ones(1, 1)
    assert float(objective(better, worse, differ, better, worse).value) == pytest.approx(math.log(2.0))
    # Gap 3.9 less the frozen 3.4: margin 3 * 0.5.
    held = objective(better, worse, differ, torch.tensor([[-0.5]]), torch.tensor([[-3.9]]))
    assert float(held.value) == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-6)
    assert float(objective(better, worse, differ).value) == pytest.approx(math.log1p(math.exp(-11.7)), abs=1e-6)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.floats(-8, 0), st.floats(-8, 0), st.booleans()), min_size=1, max_size=6),
    st.floats(0.1, 4.0),
)
def test_swapping_the_pair_turns_the_margin(rows: list[tuple[float, float, bool]], beta: float) -> None:
    better, worse, differ = (torch.tensor([column], dtype=torch.float64) for column in zip(*rows, strict=True))
    one = LatentPreference(beta)(better, worse, differ)
    other = LatentPreference(beta)(worse, better, differ)
    assert one.sums["margin"] == pytest.approx(-other.sums["margin"])
    # log s(m) - log s(-m) = m.
    assert float(other.value - one.value) == pytest.approx(one.sums["margin"], abs=1e-9)
