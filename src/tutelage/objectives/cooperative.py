"""Cooperation: whether to ask somebody what they value, and which question, given what is known of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from tutelage.errors import InputError, RecipeError
from tutelage.objectives.values import NODE_WEIGHTS, ValuePosterior, answer_probabilities

__all__ = ["Decision", "ValuePosterior", "bald", "choose_batch", "decide", "evoi", "plausible"]


def _entropy(p: np.ndarray) -> np.ndarray:
    found: np.ndarray = -(p * np.log(np.maximum(p, 1e-300)) + (1 - p) * np.log(np.maximum(1 - p, 1e-300)))
    return found


def bald(mean_K: np.ndarray, covariance_KK: np.ndarray, delta_NK: np.ndarray) -> np.ndarray:
    """Nats that the answer to each comparison is expected to tell about w: H(E p) - E H(p).

    Source: Houlsby et al. 2011 (arXiv 1112.5745), equation 2; here by a sum over the margin, the only
    direction of w that the answer depends on.
    """
    p = answer_probabilities(mean_K, covariance_KK, delta_NK)
    found: np.ndarray = np.maximum(_entropy(p @ NODE_WEIGHTS) - _entropy(p) @ NODE_WEIGHTS, 0.0)
    return found


def evoi(
    particles_SK: np.ndarray, delta_NK: np.ndarray, options_AK: np.ndarray, starts_D: Sequence[int] = (0,)
) -> np.ndarray:
    """How much better the best option gets, in worth, when each comparison is answered first.

    E over answers of max_a E[w . phi_a | answer] - max_a E[w . phi_a], exact over the given draws of w and
    so never negative. Zero where no answer would change what is done, however much it told. Of several decisions
    that the same answer serves, the sum.

    Args:
        particles_SK: Draws of w.
        delta_NK: Features of the first text minus those of the second.
        options_AK: Features of what could be done.
        starts_D: Row of `options_AK` at which the options of each decision begin, rising from 0.

    Source: Howard 1966, "Information value theory".
    """
    yes_SN = expit(particles_SK @ delta_NK.T)
    worth_SA = particles_SK @ options_AK.T
    yes_NA, now_A = yes_SN.T @ worth_SA, worth_SA.sum(0)
    told_N = (np.maximum.reduceat(yes_NA, starts_D, 1) + np.maximum.reduceat(now_A - yes_NA, starts_D, 1)).sum(1)
    found: np.ndarray = np.maximum(told_N - np.maximum.reduceat(now_A, starts_D).sum(), 0.0) / len(particles_SK)
    return found


def plausible(delta_NK: np.ndarray, *, neighbours: int = 5, cut: float = 6.0) -> np.ndarray:
    """Which comparisons are like others: True where a question is well-formed and not far out.

    Both criteria of choice favour large differences, and so the garbled text and the feature that went
    wrong. A question is out when its mean distance to its nearest neighbours exceeds the median by `cut`
    robust deviations. Turning a question around does not change it; one without a difference is no question.

    Args:
        delta_NK: Differences of features, NaN where they could not be computed.
        neighbours: How many count, at least 1. With no more questions than that, all well-formed ones stay.
        cut: In deviations (1.4826 median absolute deviations, at least a tenth of the usual size).

    Raises:
        RecipeError: neighbours is below 1.
    """
    if neighbours < 1:
        raise RecipeError(f"{neighbours} neighbours", expected="at least 1", fix="take 5")
    good_N: np.ndarray = np.isfinite(delta_NK).all(1)
    good_N &= (np.where(good_N[:, None], delta_NK, 0.0) != 0.0).any(1)
    rows = np.flatnonzero(good_N)
    if len(rows) <= neighbours + 1:
        return good_N
    usual_K = np.median(np.abs(delta_NK[rows]), axis=0)
    z_NK = delta_NK[rows] / np.where(usual_K > 0, usual_K, 1.0)
    square_N, inner_NN = (z_NK**2).sum(1), np.abs(z_NK @ z_NK.T)
    far_NN = np.sqrt(np.maximum(square_N[:, None] + square_N - 2 * inner_NN, 0.0))
    np.fill_diagonal(far_NN, np.inf)
    near_N = np.partition(far_NN, neighbours - 1, axis=1)[:, :neighbours].mean(1)
    middle = float(np.median(near_N))
    # Where most questions are copies of each other, distances say nothing; sizes then do.
    deviation = max(1.4826 * float(np.median(np.abs(near_N - middle))), 0.1 * float(np.median(np.sqrt(square_N))))
    good_N[rows] = near_N <= middle + cut * deviation
    return good_N


def choose_batch(posterior: ValuePosterior, delta_NK: np.ndarray, count: int, *, cut: float = 6.0) -> list[int]:
    """Questions to ask together: the most telling one, then the most telling given that it will be answered.

    After each choice the covariance shrinks as the expected answer's curvature says, without knowing the
    answer. So two questions that ask the same are not both chosen while another tells more; the k best
    by BALD alone often are one question k times.

    Args:
        posterior: What is known.
        delta_NK: Differences of features of the questions that could be asked.
        count: How many to choose, fewer where fewer are plausible.
        cut: See `plausible`.

    Returns:
        Their rows, in order of choice.
    """
    left = np.flatnonzero(plausible(delta_NK, cut=cut))
    mean_K, covariance_KK = posterior.mean_K, posterior.covariance_KK.copy()
    chosen: list[int] = []
    while len(chosen) < count and len(left):
        best = int(left[int(bald(mean_K, covariance_KK, delta_NK[left]).argmax())])
        chosen.append(best)
        left = left[left != best]
        p = answer_probabilities(mean_K, covariance_KK, delta_NK[best : best + 1])[0]
        told = float((p * (1 - p)) @ NODE_WEIGHTS)
        along_K = covariance_KK @ delta_NK[best]
        covariance_KK -= np.outer(along_K, along_K) * told / (1.0 + told * float(delta_NK[best] @ along_K))
    return chosen


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whether to ask, what (`query`, None when nothing can be asked), and what to do if not (`act`).

    `gain` is the best question's expected value in units of worth, `cost` what asking takes of it.
    """

    ask: bool
    query: int | None
    act: int
    gain: float
    cost: float


def decide(
    posterior: ValuePosterior,
    delta_NK: np.ndarray,
    options_AK: np.ndarray,
    *,
    cost: float,
    draws: int = 2000,
    seed: int = 0,
    cut: float = 6.0,
) -> Decision:
    """Ask if and only if the best question is worth more than it costs; otherwise do what is best so far.

    Args:
        posterior: What is known.
        delta_NK: Questions that could be asked; see `plausible` for those that are not.
        options_AK: Features of what could be done, at least one.
        cost: Of asking, in units of worth, at least 0.
        draws: Of w.
        seed: Of the draws.
        cut: See `plausible`.

    Raises:
        InputError: There is no option.
        RecipeError: The cost is negative or not a number.

    Source: one step of an assistance game, Hadfield-Menell et al. 2016 (arXiv 1606.03137).
    """
    if not len(options_AK):
        raise InputError("no option to act on", expected="at least one", fix="doing nothing is an option, too")
    if not cost >= 0.0:
        raise RecipeError(f"cost {cost}", expected="at least 0", fix="0 asks whenever it may help")
    act = int((options_AK @ posterior.mean_K).argmax())
    rows = np.flatnonzero(plausible(delta_NK, cut=cut)) if len(delta_NK) else np.zeros(0, dtype=int)
    if not len(rows):
        return Decision(False, None, act, 0.0, cost)
    gain_N = evoi(posterior.sample(draws, np.random.default_rng(seed)), delta_NK[rows], options_AK)
    best = int(gain_N.argmax())
    return Decision(bool(gain_N[best] > cost), int(rows[best]), act, float(gain_N[best]), cost)
