"""Policy gradient: the losses that weigh each token by its advantage, from plain REINFORCE on."""

from __future__ import annotations

import dataclasses

from tutelage.engines.batch import Batch, Loss
from tutelage.objectives.advantages import advantages_grpo, advantages_rloo
from tutelage.objectives.divergence import Estimator, importance, kl_k3
from tutelage.objectives.surrogate import clipped_gain, mean_over_replies, ratios, with_divergence

__all__ = [
    "Dapo", "DrGrpo", "Grpo", "Reinforce", "ReinforcePlusPlus", "Rloo",
    "advantages_grpo", "advantages_rloo", "importance", "kl_k3",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reinforce:
    """The plain estimator: log-probabilities weighed by advantages.

    Objective: L = - 1/B sum_b sum_t [ A_bt log pi(y_bt) - beta KL_bt ].
    Difference: no ratio and no clip, where RLOO has the ratio of the whole reply; the baseline is one
    number for all replies, or the length-weighted mean of the group (OPO).
    Assumption: the replies are the policy's own. From the second step of a round on they are those of
    a policy a step behind, which nothing here corrects; take few steps a round (large update.batch).
    Source: Williams 1992 (Machine Learning 8), theorem 1.
    """

    kl: float = 0.02
    kl_estimator: Estimator = "k3"
    name: str = "reinforce"

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        gain = batch.advantage_BT * batch.logp_BT
        per_token, sums = with_divergence(batch, gain, ratios(batch), kl=self.kl, estimator=self.kl_estimator)
        return Loss(-(per_token * batch.keep_BT).sum() / batch.rows_in_step, sums)


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
    kl_estimator: Estimator = "k3"
    name: str = "grpo"

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        ratio = ratios(batch)
        gain = clipped_gain(ratio, batch.advantage_BT, self.clip, self.clip)
        per_token, sums = with_divergence(
            batch, gain, ratio, kl=self.kl, estimator=self.kl_estimator, clip=(self.clip, self.clip)
        )
        return Loss(-mean_over_replies(batch, per_token), sums)


@dataclasses.dataclass(frozen=True)
class DrGrpo:
    """GRPO done right: no standard deviation, and one divisor for all replies.

    Objective: L = - 1/(B L_max) sum_b sum_t [ min(rho A, clip(rho, 1-e, 1+e) A) - beta KL ], with A the
    reward minus the group's mean, and L_max the longest that a reply can be.
    Difference: GRPO divides by each reply's own length, so that a long wrong reply is blamed less a
    token than a short one, and by the deviation, which gives questions that are nearly always right,
    or wrong, more weight than others.
    Assumption: rewards of all questions are on one scale, as no deviation evens them out. The constant
    divisor makes the step small where replies are much shorter than L_max; Adam takes that back.
    Source: Liu et al. 2025 (arXiv 2503.20783), section 3.2 and appendix A.
    """

    clip: float = 0.2
    kl: float = 0.02
    longest: int = 24
    kl_estimator: Estimator = "k3"
    name: str = "dr-grpo"

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        ratio = ratios(batch)
        gain = clipped_gain(ratio, batch.advantage_BT, self.clip, self.clip)
        per_token, sums = with_divergence(
            batch, gain, ratio, kl=self.kl, estimator=self.kl_estimator, clip=(self.clip, self.clip)
        )
        return Loss(-(per_token * batch.keep_BT).sum() / (batch.rows_in_step * self.longest), sums)


@dataclasses.dataclass(frozen=True)
class Dapo:
    """GRPO with a wider clip upwards, every token weighed alike, and no lesson from cut-off replies.

    Objective: L = - 1/N sum_b sum_t [ min(rho A, clip(rho, 1-e_low, 1+e_high) A) - beta KL ], N the
    tokens of the step; cut-off replies have no tokens in it, and no group without a difference has.
    Difference: GRPO clips alike on both sides, which holds rare tokens down harder than likely ones,
    and takes each reply's mean. Here replies near the limit also lose reward (`overlong_penalty`).
    Assumption: enough groups differ. The paper draws more prompts until the batch is full; here a
    round has the prompts it has, and says how many taught nothing (`tied_groups`).
    Source: Yu et al. 2025 (arXiv 2503.14476), equation 8; penalty equation 13.
    """

    clip: float = 0.2
    kl: float = 0.0
    clip_high: float = 0.28
    mask_truncated: bool = True
    overlong: float = 0.2
    kl_estimator: Estimator = "k3"
    name: str = "dapo"

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        ratio = ratios(batch)
        gain = clipped_gain(ratio, batch.advantage_BT, self.clip, self.clip_high)
        per_token, sums = with_divergence(
            batch, gain, ratio, kl=self.kl, estimator=self.kl_estimator, clip=(self.clip, self.clip_high)
        )
        return Loss(-(per_token * batch.keep_BT).sum() / max(batch.tokens_in_step, 1), sums)


@dataclasses.dataclass(frozen=True)
class ReinforcePlusPlus:
    """PPO's clip without a value head: advantages whitened over the whole batch.

    Objective: L = - 1/N sum_b sum_t [ min(rho A, clip(rho, 1-e, 1+e) A) - beta KL ], N the tokens of the
    step, A = (r - mean) / deviation over all replies of the round, and KL by default in r.
    Difference: GRPO normalises within each group, so that a group with hardly any difference counts as
    much as others; here only the batch decides. `baseline = "group"` subtracts each group's mean first.
    Assumption: rewards of different questions can be compared. Where they cannot (a reward that is
    normalised within its group says only who was better), the batch mean is no baseline.
    Source: Hu et al. 2025 (arXiv 2501.03262), section 3; whitened here by reply and not by token.
    """

    clip: float = 0.2
    kl: float = 0.02
    kl_estimator: Estimator = "k1-reward"
    name: str = "reinforce-plus-plus"

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        ratio = ratios(batch)
        gain = clipped_gain(ratio, batch.advantage_BT, self.clip, self.clip)
        per_token, sums = with_divergence(
            batch, gain, ratio, kl=self.kl, estimator=self.kl_estimator, clip=(self.clip, self.clip)
        )
        return Loss(-(per_token * batch.keep_BT).sum() / max(batch.tokens_in_step, 1), sums)


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
    kl_estimator: Estimator = "k3"
    name: str = "rloo"

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        log_ratio = (batch.logp_BT - batch.old_logp_BT) * batch.keep_BT
        # The whole reply's ratio at every token, with the gradient of the token's own factor: summed
        # over tokens with equal advantages that is the gradient of the sequence ratio.
        others = (log_ratio.sum(-1, keepdim=True) - log_ratio).detach()
        ratio = (others + log_ratio).clamp(-20.0, 20.0).exp()
        gain = clipped_gain(ratio, batch.advantage_BT, self.clip, self.clip)
        per_token, sums = with_divergence(
            batch, gain, ratio, kl=self.kl, estimator=self.kl_estimator, clip=(self.clip, self.clip)
        )
        return Loss(-(per_token * batch.keep_BT).sum() / batch.rows_in_step, sums)
