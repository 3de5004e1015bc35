"""Proximal policy optimisation: a clipped ratio, and a value head that learns what to expect."""

from __future__ import annotations

import dataclasses

import torch

from tutelage.engines.batch import Batch, Loss
from tutelage.objectives.divergence import Estimator
from tutelage.objectives.surrogate import clipped_gain, ratios, with_divergence

__all__ = ["Ppo"]


@dataclasses.dataclass(frozen=True)
class Ppo:
    """Advantages from a learned value at every token, and a clipped step on both.

    Objective: L = - 1/N sum_bt [ min(rho A, clip(rho, 1-e, 1+e) A) - beta KL ] + c/(2N) sum_bt
    max( (V - R)^2, (clip(V, V_old-e_v, V_old+e_v) - R)^2 ), N the step's tokens; A and R by `gae`, A
    whitened over the round, and KL by default in the reward of each token.
    Difference: GRPO takes the group's mean for what to expect, one number for all tokens of all
    replies; the value head says it at each token, from one reply, and must be learned first.
    Assumption: the head is right enough. It begins with zero everywhere, so that the first round is
    REINFORCE with rewards that fade by gamma lambda a token, less their mean; it never teaches the
    model's states, only reads them.
    Source: Schulman et al. 2017 (arXiv 1707.06347), equations 7 and 9; the clipped value loss is
    Engstrom et al. 2020 (arXiv 2005.12729), section 3.
    """

    clip: float = 0.2
    kl: float = 0.02
    value_clip: float = 0.2
    value_weight: float = 0.5
    value_learning_rate: float = 1e-3
    discount: float = 1.0
    lam: float = 0.95
    kl_estimator: Estimator = "k1-reward"
    name: str = "ppo"

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step; the batch must hold values."""
        if batch.value_BT is None or batch.old_value_BT is None or batch.return_BT is None:
            raise ValueError("PPO needs a batch with values and returns")
        ratio = ratios(batch)
        gain = clipped_gain(ratio, batch.advantage_BT, self.clip, self.clip)
        per_token, sums = with_divergence(
            batch, gain, ratio, kl=self.kl, estimator=self.kl_estimator, clip=(self.clip, self.clip)
        )
        near = batch.old_value_BT + (batch.value_BT - batch.old_value_BT).clamp(-self.value_clip, self.value_clip)
        error = torch.maximum((batch.value_BT - batch.return_BT) ** 2, (near - batch.return_BT) ** 2)
        total = (per_token - 0.5 * self.value_weight * error) * batch.keep_BT
        with torch.no_grad():
            sums["value_error"] = float(((batch.value_BT - batch.return_BT) ** 2 * batch.keep_BT).sum())
            beyond = ((batch.value_BT - batch.old_value_BT).abs() > self.value_clip).to(batch.keep_BT.dtype)
            sums["value_clip_fraction"] = float((beyond * batch.keep_BT).sum())
        return Loss(-total.sum() / max(batch.tokens_in_step, 1), sums)
