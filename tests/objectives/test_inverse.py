"""Rewards out of demonstrations: by hand, on a chain whose reward is known, and against other programs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from tutelage.errors import InputError, RecipeError
from tutelage.objectives.inverse import (
    choice_gradient,
    fit_choices,
    inverse_q,
    inverse_q_parts,
    reward_distance,
    without_shaping,
)

F64 = torch.float64
SEEDS = st.integers(0, 9999)


# ---- token by token ----


def two_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, math.log(2)], [7.0, 7.0]]], dtype=F64, requires_grad=True)
    return logits, torch.tensor([[0, 1, 0]]), torch.tensor([[1.0, 1.0, 0.0]], dtype=F64)


@pytest.mark.parametrize("stop", [False, True])
def test_value_and_gradient_by_hand(stop: bool) -> None:
    """Q = (log 3, 0), then (0, log 2); tokens 0 and 1; gamma 1/2, weight 2.

    V = log 4, log 3. nll: (log 4/3 + log 3/2) / 2 = log(2) / 2. r = log 3 - log(3)/2 = log(3)/2, and log 2 at the end.
    penalty: (log(3)^2 / 4 + log(2)^2) / 2. Gradient of the mean nll: (p - 1[token]) / 2; of 2 * penalty: 2 r_t on
    the token's Q, and -gamma p 2 r_1 = -p log(3)/2 on the second Q, unless it is stopped.
    """
    logits, tokens, keep = two_tokens()
    got = inverse_q(logits, tokens, keep, weight=2.0, gamma=0.5, stop_gradient=stop)
    l2, l3 = math.log(2), math.log(3)
    assert got.nll == pytest.approx(l2 / 2) and got.penalty == pytest.approx((l3**2 / 4 + l2**2) / 2)
    assert float(got.value.detach()) == pytest.approx(l2 / 2 + l3**2 / 4 + l2**2)
    assert got.reward_BT[0].tolist() == pytest.approx([l3 / 2, l2, math.nan], nan_ok=True)
    (grad,) = torch.autograd.grad(got.value, logits)
    through = 0.0 if stop else l3 / 2
    expected = [[-1 / 8 + l3, 1 / 8], [1 / 6 - through / 3, -1 / 6 + 2 * l2 - through * 2 / 3], [0.0, 0.0]]
    assert torch.allclose(grad[0], torch.tensor(expected, dtype=F64))


def test_a_reply_that_was_cut_off_has_no_last_reward() -> None:
    """The first token's reward still stands; the last one trains by likelihood alone."""
    logits, tokens, keep = two_tokens()
    got = inverse_q(logits, tokens, keep, weight=2.0, gamma=0.5, ended_B=torch.tensor([False]))
    assert got.reward_BT[0].isnan().tolist() == [False, True, True]
    assert got.penalty == pytest.approx(math.log(3) ** 2 / 4) and got.nll == pytest.approx(math.log(2) / 2)
    ended = inverse_q(logits, tokens, keep, weight=2.0, gamma=0.5, ended_B=torch.tensor([True]))
    assert ended.penalty == inverse_q(logits, tokens, keep, weight=2.0, gamma=0.5).penalty


@given(seed=SEEDS, gamma=st.floats(0.0, 1.0))
def test_weight_zero_is_supervised_learning_and_parts_are_the_whole(seed: int, gamma: float) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 4, 6, generator=random, dtype=F64)
    tokens = torch.randint(6, (3, 4), generator=random)
    keep = (torch.arange(4) < torch.tensor([[4], [2], [1]])).to(F64)
    got = inverse_q(logits, tokens, keep, weight=0.0, gamma=gamma)
    plain = torch.nn.functional.cross_entropy(logits[keep > 0], tokens[keep > 0])
    assert float(got.value) == pytest.approx(float(plain)) and got.nll == pytest.approx(float(plain))
    logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    parts = inverse_q_parts(logp, logits.logsumexp(-1), keep, weight=0.5, gamma=gamma)
    whole = inverse_q(logits, tokens, keep, weight=0.5, gamma=gamma)
    assert float(parts.value) == pytest.approx(float(whole.value), abs=1e-12)
    # With gamma 1 and V = 0 at the end, rewards of a reply add up to log pi(y) + V at its start.
    if gamma == 1.0:
        assert whole.reward_BT.nansum(-1).tolist() == pytest.approx(
            ((logp * keep).sum(-1) + logits[:, 0].logsumexp(-1)).tolist()
        )


def test_half_precision_is_summed_in_full() -> None:
    """50,000 equal logits in bfloat16: V = log 50000 to float32's precision, not bfloat16's."""
    got = inverse_q(
        torch.zeros(1, 1, 50_000, dtype=torch.bfloat16),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.ones(1, 1),
        weight=0.0,
    )
    assert got.nll == pytest.approx(math.log(50_000), rel=1e-6)


def test_bad_input_is_refused() -> None:
    logits, tokens, keep = two_tokens()
    for weight, gamma in ((-1.0, 1.0), (math.nan, 1.0), (0.1, 1.1), (0.1, -0.1)):
        with pytest.raises(RecipeError, match="weight"):
            inverse_q(logits, tokens, keep, weight=weight, gamma=gamma)
    for wrong in (torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 1.0]])):
        with pytest.raises(InputError, match="gap"):
            inverse_q(logits, tokens, wrong, weight=0.1)


# ---- a chain of five states: left, right; beyond the last one it ends ----

GAMMA = 0.9
REWARD_SA = np.array([[0.5, -0.2], [-0.1, 0.3], [0.4, -0.6], [-0.3, 0.2], [0.1, 1.5]])
NEXT_SA = np.array([[max(s - 1, 0), s + 1 if s < 4 else -1] for s in range(5)])


def soft_optimal() -> np.ndarray:
    value_S = np.zeros(6)  # the last one is the end
    for _ in range(500):
        q_SA = REWARD_SA + GAMMA * value_S[NEXT_SA]
        value_S[:5] = np.log(np.exp(q_SA).sum(1))
    return q_SA


def demonstrations(
    count: int = 300, longest: int = 30
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(states_BT, actions_BT, keep_BT, ended_B) of the soft-optimal demonstrator, from every state in turn."""
    random, q_SA = np.random.default_rng(0), soft_optimal()
    right_S = 1 / (1 + np.exp(q_SA[:, 0] - q_SA[:, 1]))
    states, actions, keep = (np.zeros((count, longest), dtype=int) for _ in range(3))
    now = np.arange(count) % 5
    for t in range(longest):
        alive = now >= 0
        drawn = (random.random(count) < right_S[now]).astype(int)
        states[alive, t], actions[alive, t], keep[alive, t] = now[alive], drawn[alive], 1
        now = np.where(alive, NEXT_SA[now, drawn], -1)
    return torch.tensor(states), torch.tensor(actions), torch.tensor(keep).double(), torch.tensor(now < 0)


def learn(weight: float, start: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(Q, implied rewards) of every state and action, after fitting a table."""
    states, actions, keep, ended = demonstrations()
    q_SA = start.clone().requires_grad_(True)
    search = torch.optim.LBFGS([q_SA], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = inverse_q(q_SA[states], actions, keep, weight=weight, gamma=GAMMA, ended_B=ended).value
        loss.backward()
        return loss

    search.step(closure)
    q = q_SA.detach()
    value = torch.cat([q.logsumexp(-1), torch.zeros(1, dtype=F64)])
    return q.numpy(), (q - GAMMA * value[torch.tensor(NEXT_SA)]).numpy()


def bare(reward_SA: np.ndarray) -> np.ndarray:
    return without_shaping(reward_SA.ravel(), np.arange(5).repeat(2), NEXT_SA.ravel(), gamma=GAMMA)


def test_the_chains_reward_is_recovered_up_to_shaping() -> None:
    q_SA, implied_SA = learn(0.01, torch.zeros(5, 2, dtype=F64))
    truth, got = bare(REWARD_SA), bare(implied_SA)
    assert np.abs(truth).max() > 0.1  # something is left to be recovered
    assert np.corrcoef(truth, got)[0, 1] > 0.95
    assert reward_distance(truth, got) < 0.16  # sqrt((1 - 0.95) / 2)
    # The rewards as they stand are not those: shaping hides them.
    assert reward_distance(REWARD_SA.ravel(), implied_SA.ravel()) > 1.5 * reward_distance(truth, got)
    right = np.exp(q_SA - np.logaddexp.reduce(q_SA, axis=1, keepdims=True))
    wanted = np.exp(soft_optimal() - np.logaddexp.reduce(soft_optimal(), axis=1, keepdims=True))
    assert np.abs(right - wanted).max() < 0.05


def test_the_penalty_pins_the_shift_that_likelihood_leaves_open() -> None:
    start = torch.tensor([3.0, -1.0, 0.0, 2.0, -4.0], dtype=F64)[:, None] * torch.ones(1, 2, dtype=F64)
    pinned, free = ([learn(weight, s)[0] for s in (torch.zeros(5, 2, dtype=F64), start)] for weight in (0.05, 0.0))
    assert np.abs(pinned[0] - pinned[1]).max() < 1e-3
    assert np.abs(free[0] - free[1]).max() > 2.0
    # A heavy penalty shrinks what is left of the reward after shaping.
    small, large = (np.abs(bare(learn(w, torch.zeros(5, 2, dtype=F64))[1])).mean() for w in (0.01, 3.0))
    assert large < 0.5 * small


# ---- comparing rewards ----


@given(seed=SEEDS, gamma=st.floats(0.0, 1.0), scale=st.floats(0.1, 9.0))
def test_shaping_and_scale_make_no_difference(seed: int, gamma: float, scale: float) -> None:
    random = np.random.default_rng(seed)
    state, after = random.integers(0, 5, 40), random.integers(-1, 5, 40)
    reward, potential = random.normal(size=40), np.append(random.normal(size=5), 0.0)
    shaped = scale * reward + potential[state] - gamma * potential[after]
    first, second = (without_shaping(r, state, after, gamma=gamma) for r in (reward, shaped))
    assert np.allclose(scale * first, second, atol=1e-8)
    assert reward_distance(first, second) == pytest.approx(0.0, abs=1e-6)


def test_distance_by_hand() -> None:
    """(1, 2, 3) and (1, 3, 2): deviations (-1, 0, 1) and (-1, 1, 0), correlation 1/2, distance 1/2."""
    one = np.array([1.0, 2.0, 3.0])
    assert reward_distance(one, np.array([1.0, 3.0, 2.0])) == pytest.approx(0.5)
    assert reward_distance(one, -4 * one + 7) == pytest.approx(1.0)
    assert reward_distance(one, 4 * one + 7) == pytest.approx(0.0, abs=1e-7)
    assert reward_distance(np.append(one, np.nan), np.array([1.0, 3.0, 2.0, 99.0])) == pytest.approx(0.5)
    assert reward_distance(one, np.full(3, 0.1)) is None
    assert reward_distance(np.array([1.0, np.nan]), np.array([1.0, 2.0])) is None
    with pytest.raises(InputError, match="states"):
        without_shaping(one, [0, 1], [1, -1], gamma=0.9)
    with pytest.raises(InputError, match="states"):
        without_shaping(one, [0, 1, -1], [1, 0, 0], gamma=0.9)


# ---- choices among candidates ----


def choices(seed: int = 0, prompts: int = 60, candidates: int = 4, features: int = 3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    phi = random.normal(size=(prompts, candidates, features))
    chosen = (phi @ np.array([1.5, -1.0, 0.0][:features]) + random.gumbel(size=(prompts, candidates))).argmax(1)
    return phi, np.eye(candidates)[chosen]


def test_choice_gradient_by_hand() -> None:
    """Features 1, 0, -1, the first chosen, w = 0: log 1/3; phi_E - E[phi] = 1 - 0; variance 2/3."""
    phi = np.array([[[1.0], [0.0], [-1.0], [np.nan]]])
    value, slope, curvature = choice_gradient(np.zeros(1), phi, np.array([[1.0, 0.0, 0.0, 0.0]]))
    assert value == pytest.approx(math.log(1 / 3))
    assert slope[0] == pytest.approx(1.0) and curvature[0, 0] == pytest.approx(2 / 3)


@settings(max_examples=30)
@given(seed=SEEDS)
def test_gradient_and_curvature_agree_with_differences(seed: int) -> None:
    phi, share = choices(seed, 5)
    phi[0, 3], share[0] = np.nan, [0.5, 0.25, 0.25, 0.0]
    w = np.random.default_rng(seed).normal(size=3)
    _, slope, curvature = choice_gradient(w, phi, share)
    for k, step in enumerate(np.eye(3) * 1e-5):
        up, down = (choice_gradient(w + s, phi, share) for s in (step, -step))
        assert (up[0] - down[0]) / 2e-5 == pytest.approx(slope[k], abs=1e-5)
        assert (down[1] - up[1]) / 2e-5 == pytest.approx(curvature[k], abs=1e-5)


def test_two_candidates_are_logistic_regression() -> None:
    phi, share = choices(candidates=2, prompts=200)
    fit = fit_choices(phi, share, prior=1.0)
    delta, label = phi[:, 0] - phi[:, 1], share[:, 0].astype(int)
    oracle = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10).fit(delta, label)
    assert fit.weights_K == pytest.approx(oracle.coef_[0], abs=1e-4)
    assert fit.reward(phi[:, 0]) - fit.reward(phi[:, 1]) == pytest.approx(oracle.decision_function(delta), abs=1e-3)
    p = 1 / (1 + np.exp(-delta @ fit.weights_K))
    assert np.linalg.inv(fit.covariance_KK) == pytest.approx((delta.T * p * (1 - p)) @ delta + np.eye(3), rel=1e-6)


def test_many_choices_recover_the_weights_and_the_prior_holds_few() -> None:
    fit = fit_choices(*choices(prompts=3000), prior=10.0)
    error = fit.weights_K - [1.5, -1.0, 0.0]
    assert np.abs(error).max() < 0.15 and np.abs(error / np.sqrt(np.diag(fit.covariance_KK))).max() < 3.0
    narrow = fit_choices(*choices(prompts=30), prior=0.1)
    assert np.abs(narrow.weights_K).max() < 0.5


def test_votes_weigh_and_prompts_without_choices_do_not() -> None:
    phi, share = choices(prompts=20)
    twice = fit_choices(np.concatenate([phi, phi]), np.concatenate([share, share]))
    assert fit_choices(phi, 2 * share).weights_K == pytest.approx(twice.weights_K, abs=1e-6)
    empty = np.concatenate([phi, np.full((1, 4, 3), np.nan)]), np.concatenate([share, np.zeros((1, 4))])
    assert fit_choices(*empty).weights_K == pytest.approx(fit_choices(phi, share).weights_K, abs=1e-8)
    nothing = fit_choices(phi, np.zeros_like(share), prior=2.0)
    assert nothing.weights_K == pytest.approx(np.zeros(3)) and nothing.covariance_KK == pytest.approx(4 * np.eye(3))
    torn = phi.copy()
    torn[0, share[0].argmax()] = np.nan
    for wrong in ((torn, share), (phi, -share), (phi, share[:, :2]), (phi, share * np.nan)):
        with pytest.raises(InputError):
            fit_choices(*wrong)
    with pytest.raises(RecipeError, match="prior"):
        fit_choices(phi, share, prior=0.0)
