"""Learning from pairs of replies without a reward model."""

from __future__ import annotations

import dataclasses

import torch
from torch.nn import functional as F

from tutelage.engines.batch import Batch, Loss

__all__ = ["Dpo"]


@dataclasses.dataclass(frozen=True)
class Dpo:
    """Direct preference optimisation on pairs, each with a label between 0 and 1.

    Objective: L = - 1/N sum_i [ p_i log s(b d_i) + (1 - p_i) log s(-b d_i) ], with s the logistic
    function, d = [log pi(y1|x) - log pi_ref(y1|x)] - [log pi(y2|x) - log pi_ref(y2|x)] summed over
    tokens, and p the probability that y1 is the better reply. p = 1 is the paper's loss.
    Difference: policy gradient needs rewards of the policy's own samples; this needs only pairs, from
    anywhere. Its margin grows as long as p is 0 or 1: there is no optimum at a finite distance.
    Assumption: preferences follow Bradley-Terry, and the reference has seen such replies.
    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; soft labels as in their appendix.

    A batch holds pairs as neighbouring rows, y1 then y2, and each group of a step holds whole pairs.
    `advantage_BT` carries p at every token of y1 and 1 - p at every token of y2.
    """

    beta: float = 0.1
    name: str = "dpo"

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        # A reply without tokens has no label of its own; its partner's says the same.
        label_B = (batch.advantage_BT * batch.keep_BT).sum(-1) / batch.keep_BT.sum(-1).clamp_min(1.0)
        gain_B = ((batch.logp_BT - batch.ref_logp_BT) * batch.keep_BT).sum(-1)
        margin_N = self.beta * (gain_B[0::2] - gain_B[1::2])
        first_N, second_N = label_B[0::2], label_B[1::2]
        total_N = (first_N + second_N).clamp_min(1e-12)
        first_N, second_N = first_N / total_N, second_N / total_N
        loss = -(first_N * F.logsigmoid(margin_N) + second_N * F.logsigmoid(-margin_N)).sum()
        pairs = batch.rows_in_step / 2
        with torch.no_grad():
            agrees = ((margin_N > 0) == (first_N > second_N)).float()
            sums = {
                "accuracy": float(agrees.sum()),
                "margin": float(margin_N.sum()),
                "chosen_gain": float(torch.where(first_N > second_N, gain_B[0::2], gain_B[1::2]).sum()),
                "rejected_gain": float(torch.where(first_N > second_N, gain_B[1::2], gain_B[0::2]).sum()),
                "tokens": float(len(margin_N)),
            }
        return Loss(loss / pairs, sums)
