"""Policy gradient: advantages within a group of replies, and the clipped, KL-regularised loss."""

from __future__ import annotations

import dataclasses

import torch

from tutelage.engines.batch import Batch, Loss

__all__ = ["Grpo", "Rloo", "advantages_grpo", "advantages_rloo", "importance", "kl_k3"]


def advantages_grpo(rewards_PG: torch.Tensor, *, eps: float = 1e-4) -> torch.Tensor:
    """(r - group mean) / (group standard deviation + eps); zero where a reward is missing.

    Args:
        rewards_PG: Rewards, NaN where missing. Mean and (n-1) deviation are over what is there.
        eps: Keeps near-tied groups from exploding.

    Returns:
        advantages_PG. Groups with fewer than two valid rewards get zeros.

    Source: Shao et al. 2024 (arXiv 2402.03300), section 4.1.
    """
    centred, valid, count = _centred(rewards_PG)
    variance = (centred**2).sum(-1, keepdim=True) / (count - 1).clamp_min(1)
    return torch.where(valid & (count > 1), centred / (variance.sqrt() + eps), 0.0)


def advantages_rloo(rewards_PG: torch.Tensor) -> torch.Tensor:
    """r_i minus the mean of the others, which is n/(n-1) (r_i - group mean); zero where missing.

    Args:
        rewards_PG: Rewards, NaN where missing.

    Returns:
        advantages_PG. Groups with fewer than two valid rewards get zeros.

    Source: Ahmadian et al. 2024 (arXiv 2402.14740), section 3.
    """
    centred, valid, count = _centred(rewards_PG)
    return torch.where(valid & (count > 1), centred * count / (count - 1).clamp_min(1), 0.0)


def _centred(rewards_PG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    valid = ~rewards_PG.isnan()
    count = valid.sum(-1, keepdim=True)
    filled = rewards_PG.nan_to_num(0.0)
    mean = filled.sum(-1, keepdim=True) / count.clamp_min(1)
    return torch.where(valid, filled - mean, 0.0), valid, count


def kl_k3(logp_BT: torch.Tensor, ref_logp_BT: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1 with d = log pi_ref - log pi, clamped to |d| <= 20: non-negative, unbiased on policy.

    Source: Schulman 2020, "Approximating KL divergence", estimator k3.
    """
    gap = (ref_logp_BT - logp_BT).clamp(-20.0, 20.0)
    return gap.exp() - gap - 1.0


def importance(
    old_logp_BT: torch.Tensor, sampled_logp_BT: torch.Tensor, keep_BT: torch.Tensor, *, cap: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Truncated importance weights min(pi_old / pi_sampler, cap), for tokens drawn by a slightly other model.

    Args:
        old_logp_BT: Log-probabilities under the policy that is to be improved.
        sampled_logp_BT: Those recorded when the tokens were drawn.
        keep_BT: 1.0 where there is a token.
        cap: Largest weight; it bounds the variance and biases towards the sampler.

    Returns:
        weight_BT (zero where there is no token), and how far the two models are apart: `mismatch_kl`,
        the mean of log pi_sampler - log pi_old over tokens; `effective_sample_size`, the share
        (sum w)^2 / (n sum w^2) of the untruncated weights; `truncated`, the share above the cap.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
    """
    gap = (old_logp_BT - sampled_logp_BT) * keep_BT
    weight = gap.clamp(-20.0, 20.0).exp() * keep_BT
    count = float(keep_BT.sum().clamp_min(1.0))
    return weight.clamp_max(cap), {
        "mismatch_kl": float(-gap.sum()) / count,
        "effective_sample_size": float(weight.sum() ** 2 / (weight**2).sum().clamp_min(1e-12)) / count,
        "truncated": float((weight > cap).sum()) / count,
    }


def _sums(batch: Batch, ratio_BT: torch.Tensor, kl_BT: torch.Tensor, clip: float) -> dict[str, float]:
    keep = batch.keep_BT
    with torch.no_grad():
        outside = ((ratio_BT - 1.0).abs() > clip).to(keep.dtype)
        return {
            "kl_to_start": float((kl_BT * keep).sum()),
            "clip_fraction": float((outside * keep).sum()),
            "ratio": float((ratio_BT * keep).sum()),
            "tokens": float(keep.sum()),
        }


@dataclasses.dataclass(frozen=True)
class Grpo:
    """Group-relative policy optimisation with per-token clipping and a KL term to the start.

    Objective: L = - 1/B sum_b 1/|y_b| sum_t [ min(rho A, clip(rho, 1-e, 1+e) A) - beta KL_k3 ].
    Difference: RLOO takes no standard deviation, clips the whole sequence's ratio and sums over
    tokens; GRPO weighs each row by its mean over tokens.
    Assumption: rewards of a group differ for a reason. In nearly tied groups the division by the
    standard deviation blows noise up; those groups are counted in the metrics.
    Source: Shao et al. 2024 (arXiv 2402.03300), equation 3; `advantage_BT` may differ by token
    (credit assignment), which the paper calls process supervision.
    """

    clip: float = 0.2
    kl: float = 0.02
    name: str = "grpo"

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        log_ratio = (batch.logp_BT - batch.old_logp_BT) * batch.keep_BT
        ratio = log_ratio.clamp(-20.0, 20.0).exp()
        clipped = ratio.clamp(1.0 - self.clip, 1.0 + self.clip)
        gain = torch.minimum(ratio * batch.advantage_BT, clipped * batch.advantage_BT)
        divergence = kl_k3(batch.logp_BT, batch.ref_logp_BT)
        length_B1 = batch.keep_BT.sum(-1, keepdim=True).clamp_min(1.0)
        per_token = (gain - self.kl * divergence) * batch.keep_BT / length_B1
        value = -per_token.sum() / batch.rows_in_step
        return Loss(value, _sums(batch, ratio.detach(), divergence.detach(), self.clip))


@dataclasses.dataclass(frozen=True)
class Rloo:
    """REINFORCE with a leave-one-out baseline, the reply as one action.

    Objective: L = - 1/B sum_b sum_t min(rho_b G_bt, clip(rho_b, 1-e, 1+e) G_bt) + beta/B sum_bt KL_k3,
    where rho_b is the ratio of the whole reply and token t's score carries its own reward-to-go. With
    equal advantages the gradient is that of rho_b G_b; the value counts it once a token.
    Difference: GRPO averages over tokens and clips each token's ratio alone.
    Assumption: few steps per batch, so that the ratio of a sequence stays near one; far off policy
    its variance explodes and the clip silences most rows (watch `clip_fraction`).
    Source: Ahmadian et al. 2024 (arXiv 2402.14740), section 3; clipping as in TRL's trainer.
    """

    clip: float = 0.2
    kl: float = 0.02
    name: str = "rloo"

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        log_ratio = (batch.logp_BT - batch.old_logp_BT) * batch.keep_BT
        # The whole reply's ratio at every token, with the gradient of the token's own factor: summed
        # over tokens with equal advantages that is the gradient of the sequence ratio.
        others = (log_ratio.sum(-1, keepdim=True) - log_ratio).detach()
        ratio = (others + log_ratio).clamp(-20.0, 20.0).exp()
        clipped = ratio.clamp(1.0 - self.clip, 1.0 + self.clip)
        gain = torch.minimum(ratio * batch.advantage_BT, clipped * batch.advantage_BT)
        divergence = kl_k3(batch.logp_BT, batch.ref_logp_BT)
        value = -((gain - self.kl * divergence) * batch.keep_BT).sum() / batch.rows_in_step
        return Loss(value, _sums(batch, ratio.detach(), divergence.detach(), self.clip))
