"""Learning which settings to draw by: losses on the log-probabilities of choices, not of tokens."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional as F

from tutelage.engines.batch import Loss

__all__ = ["ActionGradient", "LatentPreference"]


@dataclasses.dataclass(frozen=True)
class ActionGradient:
    """Policy gradient on choices, with a bonus for their entropy.

    Objective: L = - 1/B sum_b sum_t [ min(rho A_b, clip(rho, 1-e, 1+e) A_b) + eta H_bt ], where rho is the
    ratio of choice t's probability to that when it was made, A_b the reward minus the mean of the
    other replies to the prompt, and H_bt the entropy of what could have been chosen.
    Difference: RLOO on the language model has tokens as actions; here the tokens belong to a frozen
    model's distribution, and what is learned is which distribution. A greedy choice is an action like
    any other, though its tokens have no probability to learn from.
    Assumption: replies to one prompt differ in reward because of their settings. Draws differ under
    the same settings too, so the gradient is noisy: take at least eight replies a prompt.
    Source: Williams 1992 (Machine Learning 8:229), theorem 1; baseline as in Ahmadian et al. 2024
    (arXiv 2402.14740), section 3; the clip as in Schulman et al. 2017 (arXiv 1707.06347), equation 7.
    """

    entropy: float = 0.01
    clip: float = 0.2
    name: str = "policy-gradient"

    def __call__(
        self,
        logp_BT: torch.Tensor,
        old_logp_BT: torch.Tensor,
        entropy_BT: torch.Tensor,
        advantage_B: torch.Tensor,
        keep_BT: torch.Tensor,
    ) -> Loss:
        """Loss of a step.

        Args:
            logp_BT: Log-probabilities of the choices that were made; carries the gradient.
            old_logp_BT: The same when they were made.
            entropy_BT: Entropy of all that could have been chosen; carries a gradient.
            advantage_B: What each reply is worth, zero where that is not known.
            keep_BT: 1.0 where there is a choice.
        """
        ratio = ((logp_BT - old_logp_BT) * keep_BT).clamp(-20.0, 20.0).exp()
        clipped = ratio.clamp(1.0 - self.clip, 1.0 + self.clip)
        gain = torch.minimum(ratio * advantage_B[:, None], clipped * advantage_B[:, None])
        value = -((gain + self.entropy * entropy_BT) * keep_BT).sum() / len(logp_BT)
        outside = ((ratio.detach() - 1.0).abs() > self.clip).to(keep_BT.dtype)
        sums = {
            "entropy": float((entropy_BT.detach() * keep_BT).sum()),
            "clip_fraction": float((outside * keep_BT).sum()),
            "choices": float(keep_BT.sum()),
        }
        return Loss(value, sums)


@dataclasses.dataclass(frozen=True)
class LatentPreference:
    """Latent preference optimisation: the choices behind the better reply become likelier than the others.

    Objective: L = - 1/N sum_n log s( b sum_t [ log P(w_t|h_t) - log P(l_t|h'_t) ] ), with s the logistic
    function, w_t and l_t the choices behind the best and the worst reply to a prompt, and the sum over the
    positions of both at which these differ. With a frozen head Q, log P is log P - log Q throughout.
    Difference: DPO compares the tokens of two replies; this compares only the settings they were drawn
    by, so two replies drawn alike say nothing.
    Assumption: the better of two replies is better because of its settings. Ties carry no preference
    and must be left out; with few replies a prompt, luck in the draw decides most pairs.
    Source: Dhuliawala et al. 2024 (arXiv 2411.09661), the section on latent preference optimisation.
    """

    beta: float = 1.0
    name: str = "lpo"

    def __call__(
        self,
        better_NT: torch.Tensor,
        worse_NT: torch.Tensor,
        differ_NT: torch.Tensor,
        frozen_better_NT: torch.Tensor | None = None,
        frozen_worse_NT: torch.Tensor | None = None,
    ) -> Loss:
        """Loss of a step.

        Args:
            better_NT: Log-probabilities of the choices behind the better replies; carries the gradient.
            worse_NT: The same of the worse replies.
            differ_NT: 1.0 where both have a choice and the two are not the same.
            frozen_better_NT: Those of the better under the frozen head; None without one.
            frozen_worse_NT: Those of the worse.
        """
        gap_NT = better_NT - worse_NT
        if frozen_better_NT is not None and frozen_worse_NT is not None:
            gap_NT = gap_NT - (frozen_better_NT - frozen_worse_NT)
        margin_N = self.beta * (gap_NT * differ_NT).sum(-1)
        value = -F.logsigmoid(margin_N).sum() / len(margin_N)
        sums = {
            "accuracy": float((margin_N.detach() > 0).sum()),
            "margin": float(margin_N.detach().sum()),
            "differ": float(differ_NT.sum()),
            "pairs": float(len(margin_N)),
        }
        return Loss(value, sums)
