"""Fusion: what labelled, self-supervised, AI and human sources say of a yes-or-no question becomes one verdict.

Each source gives log-odds, or abstains. Log-odds of sources that err independently add, once each is set
right by a weight (its temperature) and a bias (a judge that favours the first answer). Both are fitted to a
few human labels, for all sources at once, so that two which say the same do not count twice: a Bayesian
logistic regression by Laplace approximation, in which an abstention adds nothing: no weight, and no bias.

With few labels the prior decides, and there are two to choose from: every source deserves some trust, or
what Dawid-Skene finds in the sources' signs over all items, labelled or not. How strictly a prior holds is
open too. The labels choose, by their marginal likelihood; that is what keeps a false majority from being
believed: among three sources that lie and one that does not, Dawid-Skene takes the lies for the truth.
One regression with one such choice was the simplest method that won: it is never worse than the fixed prior
in simulations with 20 to 200 labels, and with 50 labels better by 1 point where a source is adversarial.

Sources: MacKay 1992, Neural Computation 4(5) (evidence; moderated probability); Dawid and Skene 1979.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from scipy.stats import beta, norm

from tutelage.errors import InputError
from tutelage.feedback.dawid_skene import grouped_dawid_skene

__all__ = ["Fused", "Fusion", "Reliability", "reliability"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer[Any]]

_TRUST = 0.5  # log-odds that a typical verdict of an unknown source is worth: it is right in 62 of 100
_SPREADS = (0.5, 0.2, 1.0)  # standard deviations of the priors on weights; the first where there is no label
_BIAS_SPREAD = 0.5  # at most, on biases
_CLIP = 3.0  # verdicts are cut at so many times the typical size: a judge that reasons is often sure and wrong


@dataclasses.dataclass(frozen=True)
class Reliability:
    """How often a source agrees with people, where both spoke.

    Args:
        agreed: Items on which both said the same.
        total: Items on which both said something.
        mean: Mean of the Beta posterior from a uniform prior: (agreed + 1) / (total + 2).
        low: Lower bound of its 95% interval.
        high: Upper bound.
    """

    agreed: int
    total: int
    mean: float
    low: float
    high: float


def reliability(log_odds_N: Floats, labels_N: Ints) -> Reliability:
    """Agreement of a source's sign with people's labels.

    Args:
        log_odds_N: Of "yes"; nan where the source abstained. Exactly 0 is no opinion and is left out too.
        labels_N: 1 for yes, 0 for no, -1 where no person said.
    """
    both = np.isfinite(np.sign(log_odds_N)) & (log_odds_N != 0) & (labels_N >= 0)
    total = int(both.sum())
    agreed = int(((log_odds_N[both] > 0) == (labels_N[both] == 1)).sum())
    a, b = agreed + 1, total - agreed + 1
    low, high = beta.ppf([0.025, 0.975], a, b)
    return Reliability(agreed, total, a / (a + b), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Fused:
    """One verdict an item; nan throughout where every source abstained.

    Args:
        log_odds_N: Of "yes".
        stderr_N: Standard error of the log-odds: what the labels leave open about weights and biases, and
            what the sources that abstained would have added, had they spoken.
        low_N: Lower bound of the interval on the log-odds.
        high_N: Upper bound.
        probability_N: Of "yes", moderated by what is not known of weights and biases.
        abstained_N: How many sources abstained.
    """

    log_odds_N: Floats
    stderr_N: Floats
    low_N: Floats
    high_N: Floats
    probability_N: Floats
    abstained_N: Ints


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Sources, calibrated together. Coefficients are in the order prevalence, weights, biases: C = 1 + 2 S.

    Args:
        scale_S: Median size of each source's log-odds, which is the unit of its weight.
        mean_C: Posterior mode of the coefficients.
        covariance_CC: Their posterior covariance (Laplace).
        moment_S22: Mean over a source's verdicts of (verdict, 1)(verdict, 1)^T, in its unit.
        labels: Human labels that were used.
        prior: Which prior the labels chose: "trust" or "consensus".
    """

    scale_S: Floats
    mean_C: Floats
    covariance_CC: Floats
    moment_S22: Floats
    labels: int
    prior: str

    @property
    def weight_S(self) -> Floats:
        """What a typical verdict of each source adds to the log-odds: about 0 if useless, below if adversarial."""
        return self.mean_C[1 : 1 + len(self.scale_S)]

    @property
    def bias_S(self) -> Floats:
        """What each source adds to the log-odds whenever it speaks, whatever it says."""
        return self.mean_C[1 + len(self.scale_S) :]

    @classmethod
    def fit(cls, log_odds_NS: Floats, labels_N: Ints) -> Fusion:
        """Calibrate sources by human labels, and by each other.

        Args:
            log_odds_NS: Of "yes", by source; nan where it abstained. Infinite is allowed, and is cut.
                Items without a label help when three sources or more speak.
            labels_N: 1 for yes, 0 for no, -1 where no person said.

        Raises:
            InputError: Shapes do not agree, or labels are something else.
        """
        log_odds, labels = _checked(log_odds_NS), np.asarray(labels_N)
        if labels.shape != log_odds.shape[:1] or not np.isin(labels, (-1, 0, 1)).all():
            raise InputError(
                f"labels of shape {labels.shape} for {len(log_odds)} items, from {labels.min(initial=0)} to "
                f"{labels.max(initial=0)}",
                expected="one an item: 1 for yes, 0 for no, -1 where no person said",
            )
        scale = _typical(log_odds)
        design, seen = _design(log_odds, scale), ~np.isnan(log_odds)
        sources = len(scale)
        columns = [design[:, 1 : 1 + sources], design[:, 1 + sources :]]
        products = np.array([[(a * b).sum(axis=0) for b in columns] for a in columns])
        moment = (products / np.maximum(seen.sum(axis=0), 1)).transpose(2, 0, 1)
        rows = (labels >= 0) & seen.any(axis=1)
        priors = {"trust": np.concatenate([[0.0], np.full(sources, _TRUST), np.zeros(sources)])}
        if seen.any(axis=0).sum() >= 3:
            priors = {"consensus": _consensus(log_odds, design, priors["trust"]), **priors}
        best: tuple[float, str, Floats, Floats] | None = None
        for name, centre in priors.items():
            for spread in _SPREADS:
                width = np.concatenate([[1.0], np.full(sources, spread), np.full(sources, min(spread, _BIAS_SPREAD))])
                mode, covariance, evidence = _laplace(design[rows], labels[rows], centre, width**-2)
                if best is None or (evidence > best[0] and rows.any()):
                    best = evidence, name, mode, covariance
        assert best is not None  # noqa: S101 -- there is always the prior of trust
        return cls(scale, best[2], best[3], moment, int(rows.sum()), best[1])

    def fuse(self, log_odds_NS: Floats, *, confidence: float = 0.95) -> Fused:
        """One verdict an item, from sources in the order of the fit.

        Args:
            log_odds_NS: As for `fit`.
            confidence: Of the interval.

        Raises:
            InputError: The number of sources is another one.
        """
        log_odds = _checked(log_odds_NS)
        sources = len(self.scale_S)
        if log_odds.shape[1] != sources:
            raise InputError(f"{log_odds.shape[1]} sources", expected=f"the {sources} of the fit, in its order")
        design, silent = _design(log_odds, self.scale_S), np.isnan(log_odds)
        variance = np.einsum("nc,cd,nd->n", design, self.covariance_CC, design)
        unspoken = np.empty(sources)
        for s in range(sources):
            at = [1 + s, 1 + sources + s]
            second = np.outer(self.mean_C[at], self.mean_C[at]) + self.covariance_CC[np.ix_(at, at)]
            unspoken[s] = (second * self.moment_S22[s]).sum()
        nothing = silent.all(axis=1)
        mean = np.where(nothing, np.nan, design @ self.mean_C)
        stderr = np.where(nothing, np.nan, np.sqrt(variance + silent @ unspoken))
        half = float(norm.ppf(0.5 + confidence / 2)) * stderr
        probability = expit(mean / np.sqrt(1 + math.pi * variance / 8))
        return Fused(mean, stderr, mean - half, mean + half, probability, silent.sum(axis=1))


def _checked(log_odds_NS: Floats) -> Floats:
    log_odds = np.asarray(log_odds_NS, dtype=float)
    if log_odds.ndim != 2 or log_odds.shape[1] == 0:
        raise InputError(f"log-odds of shape {log_odds.shape}", expected="one row an item and one column a source")
    return log_odds


def _typical(log_odds_NS: Floats) -> Floats:
    """Median size of each source's finite verdicts other than 0; 1 where there is none."""
    sizes = np.abs(log_odds_NS)
    kept = np.where(np.isfinite(sizes) & (sizes > 0), sizes, np.nan)
    return np.array([np.nanmedian(column) if (column > 0).any() else 1.0 for column in kept.T])


def _design(log_odds_NS: Floats, scale_S: Floats) -> Floats:
    """(N, 1 + 2 S): one, each verdict in its unit (0 where silent), and whether each spoke."""
    seen = ~np.isnan(log_odds_NS)
    size = np.clip(np.where(seen, log_odds_NS, 0.0) / scale_S, -_CLIP, _CLIP)
    return np.concatenate([np.ones((len(size), 1)), size, seen.astype(float)], axis=1)


def _consensus(log_odds_NS: Floats, design_NC: Floats, trust_C: Floats) -> Floats:
    """Coefficients that give a verdict of mean size the log-likelihood ratio Dawid-Skene finds for its sign."""
    active = np.flatnonzero((~np.isnan(log_odds_NS)).any(axis=0))
    sign = np.sign(log_odds_NS[:, active])
    votes = np.where(np.abs(sign) == 1, sign > 0, -1).astype(int)
    consensus, grouping = grouped_dawid_skene(votes, classes=2)
    ratio = np.log(consensus.confusion_JKK[:, 1] / consensus.confusion_JKK[:, 0])
    no, yes = (ratio * grouping.weight_J[:, None]).T
    sources = log_odds_NS.shape[1]
    size = np.abs(design_NC[:, 1 + active]).sum(axis=0) / design_NC[:, 1 + sources + active].sum(axis=0)
    centre = trust_C.copy()
    centre[0] = math.log(consensus.prior_K[1] / consensus.prior_K[0])
    centre[1 + active] = (yes - no) / 2 / np.maximum(size, 0.1)
    centre[1 + sources + active] = (yes + no) / 2
    return centre


def _laplace(design_NC: Floats, labels_N: Ints, centre_C: Floats, precision_C: Floats) -> tuple[Floats, Floats, float]:
    """Mode, covariance and log marginal likelihood of a logistic regression with a normal prior.

    Newton's method; the step is halved until it helps, which the concave posterior guarantees it will.
    """
    side = 2.0 * labels_N - 1

    def loss(at: Floats) -> float:
        misfit = np.logaddexp(0, -side * (design_NC @ at)).sum()
        return float(misfit + 0.5 * (precision_C * (at - centre_C) ** 2).sum())

    def curvature(at: Floats) -> Floats:
        p = expit(design_NC @ at)
        hessian: Floats = (design_NC * (p * (1 - p))[:, None]).T @ design_NC + np.diag(precision_C)
        return hessian

    mode, now = centre_C, loss(centre_C)
    for _ in range(100):
        gradient = design_NC.T @ (expit(design_NC @ mode) - labels_N) + precision_C * (mode - centre_C)
        step = np.linalg.solve(curvature(mode), gradient)
        while loss(mode - step) > now and np.abs(step).max() > 1e-9:
            step = step / 2
        before, mode = now, mode - step
        now = loss(mode)
        if before - now < 1e-10:
            break
    hessian = curvature(mode)
    evidence = -now + 0.5 * float(np.log(precision_C).sum() - np.linalg.slogdet(hessian)[1])
    return mode, np.linalg.inv(hessian), evidence
