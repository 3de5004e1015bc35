"""Prediction-powered inference: many AI labels, corrected by a few human ones.

The judge's mean over all items is cheap and biased; the people's labels measure the bias. The estimate is
unbiased however bad the judge is, and the better the judge, the narrower the interval: with N >> n items the
variance falls by rho^2, the squared correlation of judge and people.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from tutelage.errors import InputError

__all__ = ["Corrected", "corrected_mean"]

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Corrected:
    """A mean over items as people would label them.

    Args:
        estimate: The mean.
        low: Lower bound of the interval; nan where the labels show no spread to tell it from.
        high: Upper bound, likewise.
        stderr: Standard error.
        lam: How far the judge was listened to: 0 not at all (the people's mean), 1 fully.
        effective_labels: Human labels that would give the same standard error without a judge.
        labelled: Items that people labelled.
        unlabelled: Items that they did not.
        abstained: Items on which the judge gave no verdict.
    """

    estimate: float
    low: float
    high: float
    stderr: float
    lam: float
    effective_labels: float
    labelled: int
    unlabelled: int
    abstained: int


def corrected_mean(
    human_N: Floats, judge_N: Floats, *, confidence: float = 0.95, lam: float | None = None
) -> Corrected:
    """PPI++ estimate of the mean human label, with its interval.

    theta = mean over unlabelled of lam J + mean over labelled of (H - lam J)
    se^2 = lam^2 var(J) / N + var(H - lam J) / n
    lam = cov(H, J) / ((1 + n / N) var(J)), clipped to [0, 1], with var(J) over all items.

    The interval is Student's, with Welch and Satterthwaite's degrees of freedom, so that it holds for 30 labels.
    Where the judge abstained, the mean of its verdicts stands in: the estimate is unbiased for whatever the
    judge says as long as it says it without looking at the label, so abstaining on hard items costs width only.

    People must have labelled a random sample of the items. A judge that was tuned on these same labels is
    better on them than elsewhere, which the formula cannot see: give its verdicts cross-fitted, each from a
    judge tuned on the other labels.

    Args:
        human_N: Human labels, as numbers; nan where nobody labelled.
        judge_N: The judge's verdicts on the same scale; nan where it abstained.
        confidence: Of the two-sided interval.
        lam: Set by hand instead of from the data.

    Raises:
        InputError: Fewer than two human labels, or not one verdict an item.

    Source: Angelopoulos, Duchi and Zrnic 2023, arXiv 2311.01453, with lam in closed form for the mean.
    """
    human, judge = np.asarray(human_N, dtype=float), np.asarray(judge_N, dtype=float)
    if human.ndim != 1 or human.shape != judge.shape:
        raise InputError(f"human labels of shape {human.shape} and verdicts of shape {judge.shape}", expected="equal")
    has_label, silent = ~np.isnan(human), np.isnan(judge)
    n, rest = int(has_label.sum()), int((~has_label).sum())
    if n < 2:
        raise InputError(f"{n} human labels", expected="at least 2, better 30", fix="label more items")
    judge = np.where(silent, 0.0 if silent.all() else judge[~silent].mean(), judge)
    y, seen, unseen = human[has_label], judge[has_label], judge[~has_label]
    spread = float(judge.var(ddof=1))
    if rest < 2 or spread == 0:
        lam = 0.0
    elif lam is None:
        lam = min(1.0, max(0.0, float(np.cov(y, seen)[0, 1]) / ((1 + n / rest) * spread)))
    rectified = y - lam * seen
    estimate = float(rectified.mean()) + (lam * float(unseen.mean()) if rest else 0.0)
    of_rest = lam**2 * float(unseen.var(ddof=1)) / rest if rest > 1 else 0.0
    of_labels = float(rectified.var(ddof=1)) / n
    variance = of_rest + of_labels
    low = high = effective = math.nan
    if variance > 0:
        freedom = variance**2 / (of_labels**2 / (n - 1) + (of_rest**2 / (rest - 1) if rest > 1 else 0.0))
        half = float(student.ppf(0.5 + confidence / 2, freedom)) * math.sqrt(variance)
        low, high, effective = estimate - half, estimate + half, float(y.var(ddof=1)) / variance
    return Corrected(estimate, low, high, math.sqrt(variance), lam, effective, n, rest, int(silent.sum()))
