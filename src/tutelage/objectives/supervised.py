"""Supervised learning on revised or kept replies."""

from __future__ import annotations

import dataclasses

from tutelage.engines.batch import Batch, Loss

__all__ = ["Supervised"]


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Weighted negative log-likelihood, each row the sum over its tokens.

    Objective: L = - 1/B sum_b w_b sum_t log pi(y_bt | x_b, y_b<t).
    Difference: with a mean over each row's tokens the first token of a long answer, where answering
    or abstaining is decided, would weigh a fraction of that of a short abstention, and the model
    would learn to abstain. The sum weighs every decision alike.
    Assumption: the targets are worth imitating. When they are not (wrong labels), the model learns
    the labeller's mistakes; the weight w is the labeller's confidence for that reason.
    Source: Bai et al. 2022 (arXiv 2212.08073), section 3, the supervised stage.
    """

    name: str = "supervised"

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step; `advantage_BT` holds the row's weight at every token."""
        per_token = -batch.logp_BT * batch.keep_BT * batch.advantage_BT
        value = per_token.sum() / batch.rows_in_step
        nll = float((-batch.logp_BT.detach() * batch.keep_BT).sum())
        return Loss(value, {"nll": nll, "tokens": float(batch.keep_BT.sum())})
