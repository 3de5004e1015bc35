"""How far a policy is from another: estimates of a divergence from sampled tokens, and weights that bridge it."""

from __future__ import annotations

from typing import Literal

import torch

__all__ = ["Correction", "Estimator", "importance", "kl_k1", "kl_k2", "kl_k3", "kl_term"]

Estimator = Literal["k1-reward", "k2", "k3", "k3-weighted"]
Correction = Literal["token", "mask", "sequence", "geometric", "none"]

_FAR = 20.0  # exp of more says nothing, and of 90 is no float


def kl_k1(logp_BT: torch.Tensor, ref_logp_BT: torch.Tensor) -> torch.Tensor:
    """Difference log pi - log pi_ref: an unbiased value of KL(pi || ref), of either sign.

    As a term of a loss it does nothing: its gradient is the score, whose mean over the policy is zero.
    It belongs in the reward, where its gradient is that of the divergence.
    Source: Schulman 2020, "Approximating KL divergence", estimator k1.
    """
    return logp_BT - ref_logp_BT


def kl_k2(logp_BT: torch.Tensor, ref_logp_BT: torch.Tensor) -> torch.Tensor:
    """(log pi - log pi_ref)^2 / 2: a biased value, whose mean gradient on policy is that of KL(pi || ref).

    Source: Schulman 2020, "Approximating KL divergence", estimator k2.
    """
    return 0.5 * (logp_BT - ref_logp_BT).clamp(-_FAR, _FAR) ** 2


def kl_k3(logp_BT: torch.Tensor, ref_logp_BT: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1 with d = log pi_ref - log pi, clamped to |d| <= 20: non-negative, unbiased on policy.

    As a term of a loss it pulls in another direction: its mean gradient on policy is that of
    KL(ref || pi), the divergence the other way round; the two agree where the policies do.
    Source: Schulman 2020, "Approximating KL divergence", estimator k3.
    """
    gap = (ref_logp_BT - logp_BT).clamp(-20.0, 20.0)
    return gap.exp() - gap - 1.0


def kl_term(
    estimator: Estimator, logp_BT: torch.Tensor, old_logp_BT: torch.Tensor, ref_logp_BT: torch.Tensor
) -> torch.Tensor:
    """What a loss adds for each token, before its weight.

    Args:
        estimator: `k2` and `k3` as above. `k3-weighted` is k3 times pi / pi_old, ratio and k3 both
            with gradient: unbiased in value and gradient (that of KL(pi || ref)) for tokens that an
            older policy drew, given what came before them. `k1-reward` adds nothing here: the
            divergence has been taken off the reward.
        logp_BT: Under the policy; carries the gradient.
        old_logp_BT: Under the policy that drew the tokens.
        ref_logp_BT: Under the start model.

    Source: `k3-weighted` is DeepSeek-AI 2025 (arXiv 2512.02556), section 3.1.
    """
    if estimator == "k1-reward":
        return torch.zeros_like(logp_BT)
    if estimator == "k2":
        return kl_k2(logp_BT, ref_logp_BT)
    if estimator == "k3-weighted":
        return (logp_BT - old_logp_BT).clamp(-_FAR, _FAR).exp() * kl_k3(logp_BT, ref_logp_BT)
    return kl_k3(logp_BT, ref_logp_BT)


def importance(
    old_logp_BT: torch.Tensor,
    sampled_logp_BT: torch.Tensor,
    keep_BT: torch.Tensor,
    *,
    cap: float,
    method: Correction = "token",
    low: float = 0.5,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Importance weights pi_old / pi_sampler, for tokens drawn by a slightly other model.

    Args:
        old_logp_BT: Log-probabilities under the policy that is to be improved.
        sampled_logp_BT: Those recorded when the tokens were drawn.
        keep_BT: 1.0 where there is a token.
        cap: Largest weight; it bounds the variance and biases towards the sampler.
        method: `token` truncates each token's ratio at the cap. `mask` keeps a ratio within
            [low, cap] as it is and drops the token otherwise. `sequence` gives all tokens the
            truncated ratio of their whole reply: unbiased below the cap, of a variance that grows with
            the length. `geometric` drops a reply whose mean ratio, exp of the mean log, lies outside
            [low, cap], and weighs no other. `none` corrects nothing, and measures.
        low: Least ratio that `mask` and `geometric` keep.

    Returns:
        weight_BT (zero where there is no token), and how far the two models are apart: `mismatch_kl`,
        the mean of log pi_sampler - log pi_old over tokens; `mismatch_k3`, the same by k3;
        `effective_sample_size`, the share (sum w)^2 / (n sum w^2) of the untruncated weights, over
        tokens, or over replies for `sequence` and `geometric`; `truncated`, the share of tokens whose
        weight was cut or set to zero.

    Source: `token` and `sequence`: Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"; `mask`: Ling team 2025 (arXiv 2510.18855), section 3.1 (IcePop);
    `geometric`: Liu et al. 2025, "When speed kills stability".
    """
    gap = (old_logp_BT - sampled_logp_BT) * keep_BT
    count = float(keep_BT.sum().clamp_min(1.0))
    length_B1 = keep_BT.sum(-1, keepdim=True)
    if method in ("sequence", "geometric"):
        whole_B1 = gap.sum(-1, keepdim=True)
        if method == "geometric":
            whole_B1 = whole_B1 / length_B1.clamp_min(1.0)
        ratio = whole_B1.clamp(-_FAR, _FAR).exp() * keep_BT
        units = torch.where(length_B1 > 0, whole_B1.clamp(-_FAR, _FAR).exp(), 0.0)
        number = float((length_B1 > 0).sum().clamp_min(1))
    else:
        ratio = gap.clamp(-20.0, 20.0).exp() * keep_BT
        units, number = ratio, count
    outside = ((ratio > cap) | (ratio < low)) & (keep_BT > 0)
    cut = (ratio > cap) if method in ("token", "sequence") else outside & (method != "none")
    weight = {
        "token": lambda: ratio.clamp_max(cap),
        "sequence": lambda: ratio.clamp_max(cap),
        "mask": lambda: torch.where(outside, 0.0, ratio),
        "geometric": lambda: torch.where(outside, 0.0, keep_BT),
        "none": lambda: keep_BT.clone(),
    }[method]()
    return weight, {
        "mismatch_kl": float(-gap.sum()) / count,
        "mismatch_k3": float((kl_k3(-gap, torch.zeros_like(gap)) * keep_BT).sum()) / count,
        "effective_sample_size": float(units.sum() ** 2 / (units**2).sum().clamp_min(1e-12)) / number,
        "truncated": float(cut.sum()) / count,
    }
