"""Prediction-powered estimates: many AI labels corrected by a few human ones.

The mean of a judge's labels over everything is precise and biased; the mean of people's labels over a
few items is unbiased and coarse. Their difference on the few measures the bias, and taking it off keeps
the interval honest however wrong the judge is.

Source: Angelopoulos et al. 2023 (arXiv 2311.01453), PPI++; the power-tuned weight is its equation for means.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
from scipy import stats

from tutelage.errors import InputError

__all__ = ["PredictionPowered", "ppi_mean"]

Floats = npt.NDArray[np.float64]
_NORMAL = 100  # labels from which the interval is the normal's; below it is Student's


@dataclasses.dataclass(frozen=True)
class PredictionPowered:
    """An estimate of a mean with its interval.

    Args:
        estimate, low, high: The mean and its two-sided interval.
        lam: What the judge's labels count, 0 (not at all) to 1.
        effective: How many human labels alone would be as precise.
    """

    estimate: float
    low: float
    high: float
    lam: float
    effective: float


def ppi_mean(
    human_n: Floats, judge_n: Floats, judge_N: Floats, *, level: float = 0.95, lam: float | None = None
) -> PredictionPowered:
    """Mean of what people would say of everything.

    theta = mean_N(lam f) + mean_n(y - lam f), se^2 = lam^2 var(f) / N + var(y - lam f) / n, with
    lam = cov(y, f) / ((1 + n / N) var(f)), clipped to [0, 1].

    Args:
        human_n: People's labels y on n items.
        judge_n: The judge's labels f on the same items.
        judge_N: The judge's labels on N other items; what it abstained on is left out by the caller.
        level: Of the interval.
        lam: Weight of the judge; None tunes it on the data. 0 is the mean of people's labels alone.

    Raises:
        InputError: Shapes differ, fewer than two labelled items, or a value that is not finite.

    A judge that was calibrated on these very labels looks better than it is: fit it on others.
    """
    y, f, g = (np.asarray(x, dtype=float) for x in (human_n, judge_n, judge_N))
    if y.ndim != 1 or y.shape != f.shape or g.ndim != 1 or len(y) < 2:
        raise InputError(
            f"{len(y)} human labels, {len(f)} verdicts on the same items, {len(g)} on others",
            expected="at least two labelled items, and a verdict on each of them",
        )
    if not all(np.isfinite(x).all() for x in (y, f, g)):
        raise InputError("a label is not finite", expected="numbers", fix="leave out what a judge abstained on")
    n, total = len(y), len(g)
    spread = float(np.concatenate([f, g]).var(ddof=1))
    if lam is None:
        tuned = float(np.cov(y, f)[0, 1]) / ((1 + n / total) * spread) if total and spread > 0 else 0.0
        lam = min(max(tuned, 0.0), 1.0)
    elif not total and lam:
        raise InputError("no items beyond the labelled ones", expected="verdicts on others", fix="set lam to 0")
    estimate = float((y - lam * f).mean()) + (lam * float(g.mean()) if total else 0.0)
    variance = float((y - lam * f).var(ddof=1)) / n + (lam**2 * float(g.var(ddof=1)) / total if total > 1 else 0.0)
    tail = (1 + level) / 2
    reach = float(stats.norm.ppf(tail) if n >= _NORMAL else stats.t.ppf(tail, n - 1)) * math.sqrt(variance)
    effective = float(y.var(ddof=1)) / variance if variance > 0 else math.inf
    return PredictionPowered(estimate, estimate - reach, estimate + reach, lam, effective)
