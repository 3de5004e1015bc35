"""Learning against preferences that no reward explains: the policy plays itself, and stays near its start."""

from __future__ import annotations

import dataclasses
import math

import torch

from tutelage.engines.batch import Batch, Loss
from tutelage.objectives.pairs import check_option

__all__ = ["Nash", "against_opponents", "mixture_logits", "self_play"]


def self_play(prefer_PGG: torch.Tensor) -> torch.Tensor:
    """Mean of P(y_i beats y_j) over the other replies of the group, minus 1/2.

    Args:
        prefer_PGG: P(y_i beats y_j), NaN where no judge said; the diagonal is not read.

    Returns:
        advantages_PG, zero where a reply was compared with no other. Nothing more is to be subtracted: 1/2
        is the exact value of playing oneself. The mean of the others' rewards would be no baseline, for
        they were won or lost against y_i itself: with P_ij + P_ji = 1 it is -r_i/(G - 1), a mere rescaling.

    Source: Munos et al. 2023 (arXiv 2312.00886), section 7, with the group as sample of the opponent.
    """
    own = torch.eye(prefer_PGG.shape[-1], dtype=torch.bool, device=prefer_PGG.device)
    reward_PG, _ = _means(prefer_PGG.masked_fill(own, math.nan))
    return reward_PG


def against_opponents(prefer_PGO: torch.Tensor) -> torch.Tensor:
    """Mean of P(y_i beats y'_o) over opponents, minus the mean that the other replies of the group have.

    Args:
        prefer_PGO: P(y_i beats y'_o) of opponents that were drawn apart from the group, say from the
            geometric mixture (`mixture_logits`); NaN where no judge said.

    Returns:
        advantages_PG, zero where a reply met no opponent, or no other reply did.

    Source: Munos et al. 2023 (arXiv 2312.00886), section 7; the leave-one-out baseline is Ahmadian et
    al.'s (arXiv 2402.14740), and unbiased here, since no opponent depends on y_i.
    """
    reward_PG, valid_PG = _means(prefer_PGO)
    others_PG = valid_PG.sum(-1, keepdim=True) - valid_PG.to(reward_PG.dtype)
    rest_PG = (reward_PG.sum(-1, keepdim=True) - reward_PG) / others_PG.clamp_min(1.0)
    return torch.where(valid_PG & (others_PG > 0), reward_PG - rest_PG, 0.0)


def _means(prefer_PGO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    said = ~prefer_PGO.isnan()
    count_PG = said.sum(-1)
    mean_PG = (prefer_PGO.nan_to_num(0.5) - 0.5).mul(said).sum(-1) / count_PG.clamp_min(1)
    return mean_PG, count_PG > 0


def mixture_logits(logits_BV: torch.Tensor, ref_logits_BV: torch.Tensor, *, share: float) -> torch.Tensor:
    """Log-probabilities of the next token under pi^(1 - m) pi_ref^m, normalised, with m = `share`.

    The opponent is drawn from it token by token, which is not the mixture of whole replies (that one's
    normaliser depends on all that may follow), but what the paper's experiments use.
    Source: Munos et al. 2023 (arXiv 2312.00886), section 7.
    """
    mixed = (1.0 - share) * torch.log_softmax(logits_BV, -1) + share * torch.log_softmax(ref_logits_BV, -1)
    return torch.log_softmax(mixed, -1)


@dataclasses.dataclass(frozen=True)
class Nash:
    """Policy gradient towards the Nash equilibrium of a preference, held to the start.

    Objective: maximise E_y[ A(y) ] - t KL(pi || pi_ref), with A from `self_play` or `against_opponents`. The
    loss is - 1/B sum_b w_b sum_s c_bs log pi(y_bs | y_b<s), with c_bs = A_b - t sum_{u >= s} log (pi/pi_ref)
    (y_bu | y_b<u) and w_b = min(pi(y_b)/pi_old(y_b), cap), both without gradient.
    Difference: RLOO needs a reward of each reply alone, and adds its divergence as the estimator k3, whose
    gradient is not that of the divergence. Here the log-ratios from each token on weigh its score: what a
    token leads to is part of the divergence. A token's own log-ratio alone leaves the tree of
    continuations out, and biases the gradient.
    Assumption: replies are the policy's own, or nearly so (`cap` bounds the variance of what is not, and
    biases). Without KL, play against oneself may circle for ever; t makes the equilibrium unique.
    Source: Munos et al. 2023 (arXiv 2312.00886), section 7, the policy gradient of Nash-MD.
    """

    kl: float = 0.05
    cap: float = 2.0
    name: str = "nash"

    def __post_init__(self) -> None:
        check_option(self.name, "kl", self.kl, least=0.0, most=math.inf)
        check_option(self.name, "cap", self.cap, least=0.0, most=math.inf, open_=True)

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step; `advantage_BT` holds A at every token of a row (or its credit to go)."""
        keep = batch.keep_BT
        with torch.no_grad():
            ratio_BT = (batch.logp_BT - batch.ref_logp_BT) * keep
            ahead_BT = ratio_BT.flip(-1).cumsum(-1).flip(-1)
            drawn_B = ((batch.logp_BT - batch.old_logp_BT) * keep).sum(-1).clamp(-20.0, 20.0).exp()
            worth_BT = drawn_B.clamp_max(self.cap)[:, None] * (batch.advantage_BT - self.kl * ahead_BT)
            sums = {
                "kl_to_start": float(ratio_BT.sum()),
                "truncated": float(((drawn_B > self.cap)[:, None] * keep).sum()),
                "tokens": float(keep.sum()),
            }
        value = -(worth_BT * batch.logp_BT * keep).sum() / batch.rows_in_step
        return Loss(value, sums)
