"""Supervised learning on revised or kept replies."""

from __future__ import annotations

import dataclasses

from tutelage.engines.batch import Batch, Loss

__all__ = ["Supervised"]


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Weighted negative log-likelihood of revisions, and an anchor on the replies that are kept.

    Objective: L = 1/B sum_b sum_t [ - w_b log pi(y_bt | x_b, y_b<t) + a_b KL(start || pi)_bt ], where
    a revised reply has a_b = 0, and a kept one w_b = 0.
    Difference: imitating one's own greedy replies sharpens and shifts what was already right; the
    anchor asks only that the whole distribution at each of their tokens stays. With a mean over each
    row's tokens the first token of a long answer, where answering or abstaining is decided, would
    weigh a fraction of that of a short abstention, and the model would learn to abstain. The sum
    weighs every decision alike.
    Assumption: the targets are worth imitating. When they are not (wrong labels), the model learns
    the labeller's mistakes; the weight w is the labeller's confidence for that reason.
    Source: Bai et al. 2022 (arXiv 2212.08073), section 3, the supervised stage.
    """

    name: str = "supervised"

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step; `advantage_BT` holds the row's weight at every token."""
        total = (-batch.logp_BT * batch.keep_BT * batch.advantage_BT).sum()
        sums = {"nll": float((-batch.logp_BT.detach() * batch.keep_BT).sum()), "tokens": float(batch.keep_BT.sum())}
        if batch.anchor_BT is not None and batch.drift_BT is not None:
            total = total + (batch.drift_BT * batch.anchor_BT).sum()
            sums["drift"] = float(batch.drift_BT.detach().sum())
        return Loss(total / batch.rows_in_step, sums)
