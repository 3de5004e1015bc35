"""Many judges, one verdict: log-odds of several sources fused by a few human labels, with its uncertainty.

Each source's log-odds are scaled to unit size and weighed by a logistic regression without intercept (in
a pair neither side is first by nature), so the fused log-odds are sum_j w_j x_j over the sources that
spoke; an abstention adds nothing, to the number and to its certainty. With fifty labels the weights
rest on little, so they have a prior: what the sources' agreement among themselves says of their
reliability (Dawid-Skene on the signs, correlated sources sharing their say), before any label. A source that is
against people ends with a weight below zero and helps all the same; a useless one ends near none.

Source: Laplace's approximation of Bayesian logistic regression, MacKay 1992, Neural Computation 4(5).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.special import expit

from tutelage.errors import InputError
from tutelage.feedback.dawid_skene import grouped_dawid_skene

__all__ = ["Fused", "Fusion", "fit_fusion", "reliability"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer]
_SPREAD = 0.7  # standard deviation of a weight's prior, per unit-sized source
_TRUSTED = 0.7  # of the log-odds that agreement gives a source: sources also err together
_LARGEST = 3.0  # unit-sized log-odds beyond this say no more


@dataclasses.dataclass(frozen=True)
class Fused:
    """Verdicts on N items.

    Args:
        log_odds_N: That the answer is yes (the first is better); nan where no source spoke.
        deviation_N: Standard deviation of the log-odds, from what is not known of the weights.
        sources_N: How many sources spoke.
    """

    log_odds_N: Floats
    deviation_N: Floats
    sources_N: Ints

    @property
    def probability_N(self) -> Floats:
        """Averaged over what is not known of the weights: nearer to one half than the log-odds alone say."""
        shrunk: Floats = self.log_odds_N / np.sqrt(1 + np.pi / 8 * self.deviation_N**2)
        result: Floats = 1 / (1 + np.exp(-shrunk))
        return result


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Fitted weights.

    Args:
        weight_J: Of each source at unit size; below zero where it is against people.
        covariance_JJ: Of the weights, given the labels.
        scale_J: Root mean square of each source's log-odds, by which they are divided.
        labels: Human labels it was fitted on.
    """

    weight_J: Floats
    covariance_JJ: Floats
    scale_J: Floats
    labels: int

    def fuse(self, odds_NJ: Floats) -> Fused:
        """Fuse the sources' log-odds, nan where one abstained."""
        odds = _checked(odds_NJ, len(self.scale_J))
        unit = _unit(odds, self.scale_J)
        sources = np.isfinite(odds).sum(1)
        log_odds = np.where(sources > 0, unit @ self.weight_J, np.nan)
        deviation = np.sqrt(np.einsum("nj,jk,nk->n", unit, self.covariance_JJ, unit))
        return Fused(log_odds, np.where(sources > 0, deviation, np.nan), sources)


def fit_fusion(odds_NJ: Floats, label_N: Ints) -> Fusion:
    """Fit the weights of J sources.

    Args:
        odds_NJ: Log-odds each source gives each item, nan where it abstained. Items without a label count
            for the prior.
        label_N: What people said: 1 yes, 0 no, -1 nobody asked.

    Raises:
        InputError: Shapes differ, or a label is none of these.
    """
    label = np.asarray(label_N)
    odds = _checked(odds_NJ, None)
    if label.shape != odds.shape[:1] or not np.isin(label, (-1, 0, 1)).all():
        raise InputError(
            f"{len(label)} labels {sorted(set(label.tolist()))[:5]} for {len(odds)} items",
            expected="one an item: 1 yes, 0 no, -1 nobody asked",
        )
    with np.errstate(invalid="ignore"):
        scale = np.sqrt(np.nanmean(np.where(np.isfinite(odds), odds, np.nan) ** 2, axis=0))
    scale = np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)
    unit = _unit(odds, scale)
    prior = _from_agreement(odds, label)
    weight: Floats = prior.copy()
    precision: Floats = np.eye(len(prior)) / _SPREAD**2
    rows = label >= 0
    x, y = unit[rows], label[rows].astype(float)
    for _ in range(200):
        p = expit(x @ weight)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + precision
        slope = x.T @ (p - y) + precision @ (weight - prior)
        step = np.linalg.solve(hessian, slope)
        size = 1.0
        # Convex, but a full step from a prior that is against the labels can overshoot for ever.
        while size > 1e-9 and _loss(weight - size * step, x, y, prior) > _loss(weight, x, y, prior):
            size /= 2
        weight = weight - size * step
        if np.abs(slope).max() < 1e-8 or size <= 1e-9:
            break
    p = expit(x @ weight)
    hessian = (x * (p * (1 - p))[:, None]).T @ x + precision
    covariance: Floats = np.linalg.inv(hessian).astype(np.float64)
    return Fusion(weight, covariance, np.asarray(scale, dtype=np.float64), int(rows.sum()))


def _loss(weight_J: Floats, x_NJ: Floats, y_N: Floats, prior_J: Floats) -> float:
    """Minus the log posterior of the weights, up to a constant."""
    odds = x_NJ @ weight_J
    return float((np.logaddexp(0.0, odds) - y_N * odds).sum() + ((weight_J - prior_J) ** 2).sum() / (2 * _SPREAD**2))


def reliability(odds_NJ: Floats, label_N: Ints, *, level: float = 0.95) -> list[tuple[float, float, float, int]]:
    """How often each source is right: mean and interval under a uniform Beta prior, and on how many labels.

    Args:
        odds_NJ: As for `fit_fusion`; abstentions and ties do not count.
        label_N: Likewise.
        level: Of the interval.
    """
    found = []
    label = np.asarray(label_N)
    for odds in _checked(odds_NJ, None).T:
        rows = (label >= 0) & np.isfinite(odds) & (odds != 0)
        right = int(((odds[rows] > 0) == (label[rows] == 1)).sum())
        known = stats.beta(1 + right, 1 + int(rows.sum()) - right)
        low, high = known.interval(level)
        found.append((float(known.mean()), float(low), float(high), int(rows.sum())))
    return found


def _from_agreement(odds_NJ: Floats, label_N: Ints) -> Floats:
    """Weights that the sources' agreement alone suggests; none where fewer than three spoke."""
    judges = odds_NJ.shape[1]
    votes = np.where(np.isfinite(odds_NJ) & (odds_NJ != 0), (odds_NJ > 0).astype(int), -1)
    if judges < 3 or (votes >= 0).sum() < 30:
        return np.zeros(judges)
    consensus, grouping = grouped_dawid_skene(votes, classes=2, known_N=label_N)
    right = np.clip(np.einsum("jkk->jk", consensus.confusion_JKK).mean(1), 0.05, 0.95)
    suggested: Floats = _TRUSTED * grouping.weight_J * np.log(right / (1 - right))
    return suggested


def _unit(odds_NJ: Floats, scale_J: Floats) -> Floats:
    """Unit-sized log-odds, 0 where a source abstained."""
    known: Floats = np.where(np.isfinite(odds_NJ), np.clip(odds_NJ / scale_J, -_LARGEST, _LARGEST), 0.0)
    return known


def _checked(odds_NJ: Floats, sources: int | None) -> Floats:
    odds = np.asarray(odds_NJ, dtype=float)
    if odds.ndim != 2 or odds.shape[1] == 0 or (sources is not None and odds.shape[1] != sources):
        raise InputError(f"log-odds of shape {odds.shape}", expected=f"(items, {sources or 'sources'})")
    return odds
