"""Rewards from demonstrations: read off a policy's own logits, or fitted to choices among candidates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax

from tutelage.engines.batch import Batch, Loss
from tutelage.errors import InputError, RecipeError

__all__ = [
    "ChoiceFit",
    "InverseLoss",
    "InverseQ",
    "choice_gradient",
    "fit_choices",
    "inverse_q",
    "inverse_q_parts",
    "reward_distance",
    "without_shaping",
]


@dataclasses.dataclass(frozen=True)
class InverseLoss:
    """Loss over the tokens that count, its two parts, and the reward that the logits stand for.

    `reward_BT` is detached, and NaN where there is none: at padding, and at the last token of a reply that
    was cut off, whose next state nobody has seen.
    """

    value: torch.Tensor
    nll: float
    penalty: float
    reward_BT: torch.Tensor


def inverse_q(
    logits_BTV: torch.Tensor,
    tokens_BT: torch.Tensor,
    keep_BT: torch.Tensor,
    *,
    weight: float,
    gamma: float = 1.0,
    stop_gradient: bool = False,
    ended_B: torch.Tensor | None = None,
) -> InverseLoss:
    """Maximum likelihood with a penalty on the reward that the logits imply when they are taken for Q.

    Objective: mean over tokens of -log pi(y_t | s_t) + weight * mean of r_t^2, with r_t = Q(s_t, y_t) -
    gamma V(s_(t+1)), Q the logits, V = logsumexp Q, and V = 0 after the end.
    Difference: without the penalty (weight 0) this is supervised learning, which leaves one number a state
    undetermined: logits may be shifted. The penalty chooses the shifts that make rewards small, and so
    the logits can be read as values.
    Assumption: the demonstrator is soft-optimal for some reward. The reward is known up to shaping only
    (`without_shaping`), and a large weight shrinks it, towards the policy of no reward but entropy.
    Source: Wulfmeier et al. 2024 (arXiv 2409.01369); the chi-squared form after Garg et al. 2021, IQ-Learn
    (arXiv 2106.12142).

    Args:
        logits_BTV: Logits that predict tokens_BT; taken to float32 before the sum over the vocabulary.
        tokens_BT: The demonstrated tokens.
        keep_BT: 1.0 where there is a token; each row's kept tokens follow each other.
        weight: Of the penalty, at least 0.
        gamma: Discount, from 0 to 1.
        stop_gradient: Let no gradient through V(s_(t+1)): a target, not a variable.
        ended_B: Whether each reply reached its end; None means that all did. The last token of one that
            was cut off is trained on, but has no reward.

    Raises:
        RecipeError: weight or gamma is outside its range.
        InputError: No token counts, or a row's tokens have a gap.
    """
    logits = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    value_BT = logits.logsumexp(-1)
    logp_BT = logits.gather(-1, tokens_BT[..., None])[..., 0] - value_BT
    return inverse_q_parts(
        logp_BT, value_BT, keep_BT, weight=weight, gamma=gamma, stop_gradient=stop_gradient, ended_B=ended_B
    )


def inverse_q_parts(
    logp_BT: torch.Tensor,
    value_BT: torch.Tensor,
    keep_BT: torch.Tensor,
    *,
    weight: float,
    gamma: float = 1.0,
    stop_gradient: bool = False,
    ended_B: torch.Tensor | None = None,
) -> InverseLoss:
    """As `inverse_q`, for a caller who has each token's log-probability and logsumexp, not all its logits.

    r_t = log pi(y_t | s_t) + V(s_t) - gamma V(s_(t+1)), which is the same.
    """
    if not (weight >= 0.0 and math.isfinite(weight)) or not 0.0 <= gamma <= 1.0:
        raise RecipeError(
            f"weight {weight} and gamma {gamma}", expected="weight at least 0, gamma from 0 to 1", fix="take 0.1 and 1"
        )
    kept_BT = keep_BT > 0
    follows_BT = torch.cat([kept_BT[:, 1:], torch.zeros_like(kept_BT[:, :1])], 1)
    last_BT = kept_BT & ~follows_BT
    if not bool(kept_BT.any()) or bool((last_BT.sum(1) > 1).any()):
        raise InputError(
            "no token counts, or the tokens of a row have a gap",
            expected="one run of kept tokens in a row, and at least one in all",
            fix="give each reply's own tokens as one run",
        )
    next_BT = torch.cat([value_BT[:, 1:], torch.zeros_like(value_BT[:, :1])], 1)
    next_BT = torch.where(follows_BT, next_BT, 0.0)
    reward_BT = logp_BT + value_BT - gamma * (next_BT.detach() if stop_gradient else next_BT)
    known_BT = kept_BT if ended_B is None else kept_BT & ~(last_BT & ~ended_B.bool()[:, None])
    nll = -torch.where(kept_BT, logp_BT, 0.0).sum() / kept_BT.sum()
    penalty = torch.where(known_BT, reward_BT, 0.0).square().sum() / known_BT.sum().clamp_min(1)
    shown_BT = torch.where(known_BT, reward_BT.detach(), math.nan)
    return InverseLoss(nll + weight * penalty, float(nll.detach()), float(penalty.detach()), shown_BT)


@dataclasses.dataclass(frozen=True)
class InverseQ:
    """`inverse_q` as the learner's objective: one part of a step, of demonstrations that all reached their end.

    Objective: mean over the step's tokens of -log pi(y_t | s_t) + weight * r_t^2, with r_t = Q(s_t, y_t) -
    gamma V(s_(t+1)).
    Difference: `Supervised` sums over each reply, so that long ones weigh more, and has no penalty; with
    weight 0 this is its mean over tokens, and the totals are not asked for.
    Assumption: as `inverse_q`; besides, no demonstration was cut off.
    Source: Wulfmeier et al. 2024 (arXiv 2409.01369); Garg et al. 2021, IQ-Learn (arXiv 2106.12142), algorithm 1.
    """

    weight: float
    gamma: float = 1.0
    name: str = "demonstrations"

    @property
    def wants_totals(self) -> bool:
        """The penalty alone needs each token's logsumexp."""
        return self.weight > 0.0

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        kept = float(batch.keep_BT.sum())
        if batch.total_BT is None:
            nll = -(batch.logp_BT * batch.keep_BT).sum()
            return Loss(nll / batch.tokens_in_step, {"nll": float(nll.detach()), "tokens": kept})
        found = inverse_q_parts(batch.logp_BT, batch.total_BT, batch.keep_BT, weight=self.weight, gamma=self.gamma)
        sums = {"nll": found.nll, "penalty": found.penalty, "implied_reward": float(found.reward_BT.nanmean())}
        return Loss(
            found.value * (kept / batch.tokens_in_step), {k: v * kept for k, v in sums.items()} | {"tokens": kept}
        )


@dataclasses.dataclass(frozen=True)
class ChoiceFit:
    """Weights of the features, their covariance under the posterior, and how likely the choices are."""

    weights_K: np.ndarray
    covariance_KK: np.ndarray
    log_likelihood: float

    def reward(self, phi_NK: np.ndarray) -> np.ndarray:
        """Reward w . phi of each row."""
        found: np.ndarray = phi_NK @ self.weights_K
        return found


def choice_gradient(
    weights_K: np.ndarray, phi_PCK: np.ndarray, share_PC: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Log-likelihood of choices among candidates, its gradient, and minus its Hessian.

    P(c | p) is proportional to exp(w . phi_pc) over the candidates that are there, so the gradient is
    phi_expert - E_model[phi], summed over prompts.

    Args:
        weights_K: w.
        phi_PCK: Features of C candidates; a row with a NaN is no candidate.
        share_PC: How often each was chosen; not negative, zero for what is no candidate.
    """
    there_PC = np.isfinite(phi_PCK).all(-1)
    phi_PCK = np.where(there_PC[..., None], phi_PCK, 0.0)
    logp_PC = log_softmax(np.where(there_PC, phi_PCK @ weights_K, -np.inf), axis=1)
    total_P, p_PC = share_PC.sum(1), np.exp(logp_PC)
    model_PK = (p_PC[:, None, :] @ phi_PCK)[:, 0]
    features = phi_PCK.shape[2]
    slope_K = (share_PC - total_P[:, None] * p_PC).ravel() @ phi_PCK.reshape(-1, features)
    centred_NK = (phi_PCK - model_PK[:, None, :]).reshape(-1, features)
    curvature_KK = (centred_NK.T * (total_P[:, None] * p_PC).ravel()) @ centred_NK
    return float((share_PC * np.where(there_PC, logp_PC, 0.0)).sum()), slope_K, curvature_KK


def fit_choices(phi_PCK: np.ndarray, share_PC: np.ndarray, *, prior: float = 1.0) -> ChoiceFit:
    """Maximum-entropy inverse reinforcement learning over lists of candidates.

    Objective: max over w of sum_pc share_pc log P(c | p; w) - |w|^2 / (2 prior^2): multinomial logistic
    regression, concave, without any sampling from a policy.
    Difference: over all texts the expectation needs a policy trained in the loop; a list of candidates
    stands in for it. With two candidates it is Bradley-Terry.
    Assumption: the candidates cover what the demonstrator could have chosen. A choice that wins against
    nothing comparable says little, and features that never differ within a list keep their prior.
    Source: Ziebart et al. 2008, Maximum entropy inverse reinforcement learning, section "Learning from
    demonstrated behavior".

    Args:
        phi_PCK: Features of up to C candidates of P prompts; a row with a NaN is no candidate.
        share_PC: Choices: how often each was chosen, or shares of votes. A prompt may have none.
        prior: Standard deviation of each weight beforehand, in units of 1 / feature.

    Raises:
        InputError: Shapes do not fit, a share is negative or not finite, or what is no candidate was chosen.
        RecipeError: prior is not above 0.
    """
    if not (prior > 0.0 and math.isfinite(prior)):
        raise RecipeError(f"prior {prior}", expected="above 0", fix="take 1 and standardise the features")
    if phi_PCK.ndim != 3 or share_PC.shape != phi_PCK.shape[:2]:
        raise InputError(
            f"features {phi_PCK.shape} with choices {share_PC.shape}",
            expected="(prompts, candidates, features) and (prompts, candidates)",
            fix="give one number of choices a candidate",
        )
    there_PC = np.isfinite(phi_PCK).all(-1)
    # A prompt without choices has nothing to say, and may have no candidate at all.
    used_P = share_PC.sum(1) > 0
    if not np.isfinite(share_PC).all() or (share_PC < 0).any() or (share_PC[~there_PC] > 0).any():
        raise InputError(
            "a choice that is negative, not finite, or falls on what is no candidate",
            expected="0 or more, and 0 where features are missing",
            fix="leave out prompts whose chosen reply has no features",
        )
    phi_PCK, share_PC = phi_PCK[used_P], share_PC[used_P]
    count = phi_PCK.shape[2]

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope, _ = choice_gradient(w, phi_PCK, share_PC)
        return 0.5 * float(w @ w) / prior**2 - value, w / prior**2 - slope

    tight = {"gtol": 1e-9, "ftol": 1e-15, "maxiter": 1000}
    found = minimize(loss, np.zeros(count), jac=True, method="L-BFGS-B", options=tight).x
    likelihood, _, curvature_KK = choice_gradient(found, phi_PCK, share_PC)
    return ChoiceFit(found, np.linalg.inv(curvature_KK + np.eye(count) / prior**2), likelihood)


def without_shaping(reward_N: np.ndarray, state_N: Sequence[int], next_N: Sequence[int], *, gamma: float) -> np.ndarray:
    """What is left of rewards on transitions once no potential can explain any more of it.

    The residual of least squares on all phi(s) - gamma phi(s'): two rewards that differ by shaping leave
    the same. Which transitions are given, and how often, is the weighting; give both rewards the same.

    Args:
        reward_N: Reward of each transition.
        state_N: Its state, numbered from 0.
        next_N: The next one; -1 is the end, whose potential is 0.
        gamma: Discount.

    Raises:
        InputError: Lengths differ, or a state is below -1.

    Source: Ng et al. 1999 for the class; a projection instead of EPIC's canonical form, as in Skalse et al.
    2023, STARC (arXiv 2309.15257).
    """
    state, after = np.asarray(state_N, dtype=int), np.asarray(next_N, dtype=int)
    if not len(reward_N) == len(state) == len(after) or not len(state) or state.min() < 0 or after.min() < -1:
        raise InputError(
            f"{len(reward_N)} rewards, {len(state)} states, {len(after)} next states",
            expected="as many of each, at least one; states from 0, -1 for the end",
            fix="give one of each a transition",
        )
    rows, places = np.arange(len(state)), int(max(state.max(), after.max())) + 1
    shaping_NS = np.zeros((len(state), places))
    shaping_NS[rows, state] += 1.0
    inner = after >= 0
    shaping_NS[rows[inner], after[inner]] -= gamma
    potential_S = np.linalg.lstsq(shaping_NS, reward_N, rcond=None)[0]
    residual: np.ndarray = reward_N - shaping_NS @ potential_S
    return residual


def reward_distance(first_N: np.ndarray, second_N: np.ndarray) -> float | None:
    """sqrt((1 - correlation) / 2): 0 for the same up to scale and shift, 1 for the opposite; NaNs are left out.

    None where fewer than two entries are common, or one of them does not vary: nothing can be said.

    Source: Gleave et al. 2020, EPIC (arXiv 2006.13900), the Pearson distance.
    """
    common = np.isfinite(first_N) & np.isfinite(second_N)
    if common.sum() < 2:
        return None
    first, second = (x[common] - x[common].mean() for x in (first_N, second_N))
    size = float(np.sqrt((first @ first) * (second @ second)))
    if size <= 1e-12 * float(np.abs(first_N[common]).max() * np.abs(second_N[common]).max()) * len(first):
        return None
    return float(np.sqrt(max(0.0, (1.0 - float(first @ second) / size) / 2.0)))
