"""Policy gradient whose ratio is not the token's own: a reply's mean ratio, or a clipped weight beside log pi."""

from __future__ import annotations

import dataclasses

from tutelage.engines.batch import Batch, Loss
from tutelage.objectives.divergence import Estimator
from tutelage.objectives.surrogate import clipped_gain, mean_over_replies, ratios, with_divergence

__all__ = ["CispoCap", "CispoClamp", "Gspo"]


@dataclasses.dataclass(frozen=True)
class Gspo:
    """Group sequence policy optimisation: one ratio a reply, the geometric mean of its tokens'.

    Objective: L = - 1/B sum_b 1/|y_b| sum_t [ min(s_bt A, clip(s_bt, 1-e_low, 1+e_high) A) - beta KL ],
    s_bt = sg[s_b / rho_bt] rho_bt, s_b = exp(mean_t log rho_bt). With equal advantages value and
    gradient are those of min(s_b A_b, clip(s_b) A_b).
    Difference: GRPO weighs each token by a ratio estimated from that one token; RLOO's is the product,
    whose spread grows with the length. A mean of logs moves little: hence the tiny clip.
    Assumption: one reward for a reply. On policy s is 1 and this is GRPO; it matters off policy only.
    Source: Zheng et al. 2025 (arXiv 2507.18071), equations 5 and 7; by token equation 13.
    """

    kl: float = 0.02
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    kl_estimator: Estimator = "k3"
    name: str = "gspo"

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        log_ratio = (batch.logp_BT - batch.old_logp_BT) * batch.keep_BT
        length_B1 = batch.keep_BT.sum(-1, keepdim=True).clamp_min(1.0)
        mean_B1 = (log_ratio.sum(-1, keepdim=True) / length_B1).detach()
        ratio = (mean_B1 + log_ratio - log_ratio.detach()).clamp(-20.0, 20.0).exp()
        gain = clipped_gain(ratio, batch.advantage_BT, self.clip_low, self.clip_high)
        per_token, sums = with_divergence(
            batch, gain, ratio, kl=self.kl, estimator=self.kl_estimator, clip=(self.clip_low, self.clip_high)
        )
        return Loss(-mean_over_replies(batch, per_token), sums)


@dataclasses.dataclass(frozen=True)
class CispoCap:
    """Clipped importance weights beside log pi, with an absolute cap on the weight.

    Objective: L = - 1/N sum_b sum_t [ sg[min(rho, cap)] A log pi(y_bt) - beta KL ], N the step's tokens.
    Difference: GRPO's clip takes a token's gradient away, and rare decisive tokens first; here every
    token keeps one, of bounded weight. `CispoClamp` bounds the weight near one from both sides.
    Assumption: the cap bounds the variance well enough. Nothing holds the policy near the sampler:
    with many steps on one batch it can run away (watch `ratio`).
    Source: Khatri et al. 2025 (arXiv 2510.13786), section 3.2, as TRL's trainer has it; the idea is
    MiniMax 2025 (arXiv 2506.13585), equation 4.
    """

    kl: float = 0.02
    cap: float = 5.0
    kl_estimator: Estimator = "k3"
    name: str = "cispo-cap"

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        ratio = ratios(batch).detach()
        gain = ratio.clamp(max=self.cap) * batch.advantage_BT * batch.logp_BT
        per_token, sums = with_divergence(
            batch, gain, ratio, kl=self.kl, estimator=self.kl_estimator, clip=(1.0, self.cap - 1.0)
        )
        return Loss(-(per_token * batch.keep_BT).sum() / max(batch.tokens_in_step, 1), sums)


@dataclasses.dataclass(frozen=True)
class CispoClamp:
    """Clipped importance weights beside log pi, with the weight clamped around one.

    Objective: L = - 1/N sum_b sum_t [ sg[clip(rho, 1-e_low, 1+e_high)] A log pi(y_bt) - beta KL ], N the
    step's tokens.
    Difference: `CispoCap` bounds the weight at an absolute number, several times one; both go by the
    name of CISPO, and 0.2 in one is not 0.2 in the other.
    Assumption: as for `CispoCap`. The paper sets no lower bound, which is e_low = 1.
    Source: MiniMax 2025 (arXiv 2506.13585), equation 5; as verl's trainer has it.
    """

    kl: float = 0.02
    clip_low: float = 1.0
    clip_high: float = 0.2
    kl_estimator: Estimator = "k3"
    name: str = "cispo-clamp"

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        ratio = ratios(batch).detach()
        weight = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        gain = weight * batch.advantage_BT * batch.logp_BT
        per_token, sums = with_divergence(
            batch, gain, ratio, kl=self.kl, estimator=self.kl_estimator, clip=(self.clip_low, self.clip_high)
        )
        return Loss(-(per_token * batch.keep_BT).sum() / max(batch.tokens_in_step, 1), sums)
