"""Learning from single replies that are called good or bad."""

from __future__ import annotations

import dataclasses
import math

import torch

from tutelage.engines.batch import Batch, Loss
from tutelage.objectives.pairs import check_option

__all__ = ["Kto", "mismatched_kl"]


def mismatched_kl(logp_BT: torch.Tensor, ref_logp_BT: torch.Tensor, keep_BT: torch.Tensor) -> float:
    """max(0, mean over rows of log pi(y'|x) - log pi_ref(y'|x)) in nats: what `Kto` calls z0.

    Args:
        logp_BT: Log-probabilities under the policy of replies y' that were given to *other* prompts (see
            `tutelage.loop.pairing.mismatched`).
        ref_logp_BT: Those under the reference.
        keep_BT: 1.0 where there is a token.

    On a reply's own prompt the mean would be the very reward that z0 is to be compared with.
    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), section 4.
    """
    gain_B = ((logp_BT - ref_logp_BT) * keep_BT).sum(-1)
    return max(0.0, float(gain_B.mean())) if len(gain_B) else 0.0


@dataclasses.dataclass(frozen=True)
class Kto:
    """Kahneman-Tversky optimisation: single replies, good or bad, against a reference point.

    Objective: L = 1/B sum_b |w_b| [ desirable (1 - s(b (g_b - z0))) if w_b > 0, undesirable
    (1 - s(b (z0 - g_b))) if w_b < 0 ], with g = log pi(y|x) - log pi_ref(y|x) summed over tokens, s the
    logistic function, and w the row's label: its sign says good or bad, its size how surely.
    Difference: DPO compares two replies to one prompt; this asks whether one reply is better than what
    the policy says on average, z0, so labels need no partner. It saturates on both sides: a hopeless
    reply and a settled one both stop to teach.
    Assumption: z0 tracks KL(pi || pi_ref). It is a field because a pure function of a part of a step
    cannot know it: set it each step, `dataclasses.replace(kto, z0=mismatched_kl(...))`; it carries no
    gradient. Left at 0 it is the start's, and good replies saturate early. The numbers of good and bad
    rows times their weights should be within 1 and 4/3 of each other.
    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), section 4; |w| is ours.
    """

    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0
    z0: float = 0.0
    name: str = "kto"

    def __post_init__(self) -> None:
        check_option(self.name, "beta", self.beta, least=0.0, most=math.inf, open_=True)
        for option in ("desirable", "undesirable", "z0"):
            check_option(self.name, option, getattr(self, option), least=0.0, most=math.inf)

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step; `advantage_BT` holds w at every token of a row."""
        keep = batch.keep_BT
        gain_B = ((batch.logp_BT - batch.ref_logp_BT) * keep).sum(-1)
        label_B = (batch.advantage_BT * keep).sum(-1) / keep.sum(-1).clamp_min(1.0)
        good_B, bad_B = label_B.clamp_min(0.0), (-label_B).clamp_min(0.0)
        lead_B = self.beta * (gain_B - self.z0)
        # s(-x) is 1 - s(x) without the loss of digits where s(x) is near 1.
        loss_B = self.desirable * good_B * torch.sigmoid(-lead_B) + self.undesirable * bad_B * torch.sigmoid(lead_B)
        with torch.no_grad():
            good, bad = (label_B > 0).to(gain_B.dtype), (label_B < 0).to(gain_B.dtype)
            sums = {
                "accuracy": float((good * (lead_B > 0) + bad * (lead_B < 0)).sum()),
                "desirable": float(good.sum()),
                "desirable_gain": float((good * gain_B).sum()),
                "undesirable_gain": float((bad * gain_B).sum()),
                "tokens": float((good + bad).sum()),
            }
        return Loss(loss_B.sum() / batch.rows_in_step, sums)
