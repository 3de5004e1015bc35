"""What the losses of policy gradient share: ratios, the pessimistic clip, the divergence, the step's sums."""

from __future__ import annotations

import torch

from tutelage.engines.batch import Batch
from tutelage.objectives.divergence import Estimator, kl_k3, kl_term

__all__ = ["clipped_gain", "mean_over_replies", "ratios", "with_divergence"]


def ratios(batch: Batch) -> torch.Tensor:
    """Ratio pi / pi_old of each token, with gradient; one where there is no token."""
    log_ratio = (batch.logp_BT - batch.old_logp_BT) * batch.keep_BT
    return log_ratio.clamp(-20.0, 20.0).exp()


def clipped_gain(ratio_BT: torch.Tensor, advantage_BT: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """min(rho A, clip(rho, 1 - low, 1 + high) A): no reward for going further than the clip.

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7.
    """
    clipped = ratio_BT.clamp(1.0 - low, 1.0 + high)
    return torch.minimum(ratio_BT * advantage_BT, clipped * advantage_BT)


def with_divergence(
    batch: Batch,
    gain_BT: torch.Tensor,
    ratio_BT: torch.Tensor,
    *,
    kl: float,
    estimator: Estimator,
    clip: tuple[float, float] | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The value gain - kl * divergence of each token, and what the step's metrics are made of.

    `kl_to_start` is k3 whatever the estimator, so that runs can be compared. `clip` says how far below
    and above one a ratio may lie before it counts as clipped; None: nothing is clipped, or counted.
    """
    keep = batch.keep_BT
    term = kl_term(estimator, batch.logp_BT, batch.old_logp_BT, batch.ref_logp_BT)
    with torch.no_grad():
        shown = term if estimator == "k3" else kl_k3(batch.logp_BT, batch.ref_logp_BT)
        ratio = ratio_BT.detach()
        sums = {
            "kl_to_start": float((shown * keep).sum()),
            "ratio": float((ratio * keep).sum()),
            "tokens": float(keep.sum()),
        }
        if clip is not None:
            gap = ratio - 1.0
            outside = ((gap > clip[1]) | (gap < -clip[0])).to(keep.dtype)
            sums["clip_fraction"] = float((outside * keep).sum())
    return gain_BT - kl * term, sums


def mean_over_replies(batch: Batch, per_token_BT: torch.Tensor) -> torch.Tensor:
    """1/B sum_b 1/|y_b| sum_t: each reply counts once."""
    length_B1 = batch.keep_BT.sum(-1, keepdim=True).clamp_min(1.0)
    return (per_token_BT * batch.keep_BT / length_B1).sum() / batch.rows_in_step
