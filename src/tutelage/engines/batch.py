"""What learner and objective hand each other. An objective knows no model, device or step."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

__all__ = ["Batch", "Loss", "Objective"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """A part of one optimiser step.

    Args:
        logp_BT: Log-probabilities under the model being trained; carries the gradient.
        keep_BT: 1.0 where a token trains.
        old_logp_BT: Log-probabilities under the policy that sampled (zeros for supervised rows).
        ref_logp_BT: Log-probabilities under the frozen start model.
        advantage_BT: What each token is worth: the reward-to-go of its credit, or a row's weight.
        rows_in_step: Rows that train in the whole step, over all its parts.
        tokens_in_step: Tokens that train in the whole step.
        anchor_BT: What each token's drift weighs; None when nothing is anchored.
        drift_BT: KL(start || policy) of the next-token distribution, exact, where `anchor_BT` is above
            zero (zero elsewhere); carries a gradient.
        value_BT: What the value head expects from before each token on; carries a gradient. None without one.
        old_value_BT: The same when the replies were judged.
        return_BT: What came of it, which the value head learns.
        total_BT: Logsumexp of the logits that each token was chosen from; carries a gradient. None unless the
            objective has a `wants_totals` that is true.
    """

    logp_BT: torch.Tensor
    keep_BT: torch.Tensor
    old_logp_BT: torch.Tensor
    ref_logp_BT: torch.Tensor
    advantage_BT: torch.Tensor
    rows_in_step: int
    tokens_in_step: int
    anchor_BT: torch.Tensor | None = None
    drift_BT: torch.Tensor | None = None
    value_BT: torch.Tensor | None = None
    old_value_BT: torch.Tensor | None = None
    return_BT: torch.Tensor | None = None
    total_BT: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Loss:
    """A part's share of the step's loss, and sums (over tokens or rows) for the step's metrics."""

    value: torch.Tensor
    sums: dict[str, float]


class Objective(Protocol):
    """A pure function of a batch."""

    @property
    def name(self) -> str:
        """Shown in messages and metrics."""

    def __call__(self, batch: Batch) -> Loss:
        """The part's share of the loss."""
