"""Dawid-Skene: what is true and how far each judge can be trusted, from votes alone.

Every judge has a confusion matrix; every item has a hidden class; expectation-maximisation finds both.
The method takes judges to err independently given the class. Judges of one family do not: two copies of
one opinion would count as two, and the posterior would be far too sure. So the correlation of errors that
the class does not explain is measured, and judges above a threshold share their say: a judge whose errors
correlate by r with those of the others in its cluster counts 1 / (1 + sum r), the design effect of
clustered samples. Copies (r = 1) get one vote together, strangers (r = 0) one each. A flat 1 / cluster size
would throw away what half-correlated judges know beyond each other.

Source: Dawid and Skene 1979, Applied Statistics 28(1); design effect: Kish 1965, Survey Sampling, 8.2.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse.csgraph import connected_components
from scipy.special import logsumexp

from tutelage.errors import InputError

__all__ = ["Consensus", "Grouping", "dawid_skene", "group_judges", "grouped_dawid_skene"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer[Any]]

_KNOWN_ENOUGH = 50  # known classes from which errors are seen rather than inferred


@dataclasses.dataclass(frozen=True)
class Consensus:
    """What the votes say together.

    Args:
        posterior_NK: Probability of each class. The prior where nobody voted.
        confusion_JKK: Probability that judge j votes l (last axis) when class k (middle axis) is true.
        prior_K: Share of each class.
        iterations: Rounds of expectation-maximisation that were needed.
        log_likelihood: Of all votes and known classes, in nats; with weights, the composite likelihood.
        abstained_N: Judges that gave no vote on each item.
    """

    posterior_NK: Floats
    confusion_JKK: Floats
    prior_K: Floats
    iterations: int
    log_likelihood: float
    abstained_N: Ints


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Which judges say the same thing twice.

    Args:
        clusters: Judges by cluster, each in one; most clusters are of one judge.
        weight_J: What each judge counts, in (0, 1].
        correlation_JJ: Correlation of errors within the true class; nan where it could not be measured.
    """

    clusters: tuple[tuple[int, ...], ...]
    weight_J: Floats
    correlation_JJ: Floats


@dataclasses.dataclass(frozen=True)
class _Ballots:
    """Votes as indicator columns, one block of columns a voter; a row of zeros in a block is an abstention."""

    vote_NM: Floats
    starts: Ints
    widths: Ints

    @classmethod
    def of(cls, blocks: Sequence[Floats]) -> _Ballots:
        widths = np.array([b.shape[1] for b in blocks])
        return cls(np.concatenate(blocks, axis=1), np.cumsum(widths) - widths, widths)


def _checked(votes_NJ: Ints, classes: int | None, known_N: Ints | None) -> tuple[Ints, Ints, int]:
    votes = np.asarray(votes_NJ)
    if votes.ndim != 2 or 0 in votes.shape or not np.issubdtype(votes.dtype, np.integer):
        raise InputError(
            f"votes of shape {votes.shape} and type {votes.dtype}",
            expected="whole numbers, one row an item and one column a judge, at least one of each",
            fix="give class numbers from 0, and -1 where a judge abstained",
        )
    known = np.full(len(votes), -1) if known_N is None else np.asarray(known_N)
    if known.shape != votes.shape[:1]:
        raise InputError(f"{known.shape} known classes for {len(votes)} items", expected="one an item, -1 = unknown")
    top = int(max(votes.max(), known.max()))
    count = max(2, top + 1) if classes is None else classes
    if count <= top or min(votes.min(), known.min()) < -1:
        raise InputError(
            f"class numbers from {min(votes.min(), known.min())} to {top}",
            expected=f"0 to {count - 1}, or -1 for an abstention",
        )
    return votes, known, count


def _indicators(votes_NJ: Ints, classes: int) -> list[Floats]:
    return [(votes_NJ[:, [j]] == np.arange(classes)).astype(float) for j in range(votes_NJ.shape[1])]


def _maximise(
    ballots: _Ballots,
    start_NK: Floats,
    known_N: Ints,
    weight_M: Floats,
    smoothing: float,
    tolerance: float,
    limit: int,
) -> tuple[Floats, Floats, Floats, int, float]:
    """Expectation-maximisation from a first posterior: posterior_NK, answer_KM, prior_K, iterations, likelihood.

    Items without a vote or known class take no part in the prior: they say nothing about anything.
    """
    spoke_N = (ballots.vote_NM.any(axis=1) | (known_N >= 0)).astype(float)
    clamp_NK = np.where((known_N[:, None] >= 0) & (known_N[:, None] != np.arange(start_NK.shape[1])), -np.inf, 0.0)
    weighted_NM = ballots.vote_NM * weight_M
    posterior, before = start_NK, -np.inf
    answer, prior, likelihood, iteration = np.empty(0), np.empty(0), -np.inf, 0
    while iteration < limit:
        iteration += 1
        counts = posterior.T @ ballots.vote_NM + smoothing
        totals = np.add.reduceat(counts, ballots.starts, axis=1)
        with np.errstate(invalid="ignore"):  # without smoothing a class that nobody has leaves 0 / 0
            answer = np.nan_to_num(counts / np.repeat(totals, ballots.widths, axis=1))
        mass = spoke_N @ posterior + smoothing
        prior = mass / mass.sum()
        floor = np.finfo(float).tiny  # 0 * log 0 = 0 in the products below
        joint = np.log(np.maximum(prior, floor)) + weighted_NM @ np.log(np.maximum(answer, floor)).T + clamp_NK
        evidence = logsumexp(joint, axis=1, keepdims=True)
        posterior = np.exp(joint - evidence)
        likelihood = float((spoke_N * evidence[:, 0]).sum())
        if likelihood - before < tolerance * max(spoke_N.sum(), 1.0):
            break
        before = likelihood
    return posterior, answer, prior, iteration, likelihood


def _first_guess(votes_NJ: Ints, known_N: Ints, classes: int) -> Floats:
    """Share of votes each class got; all alike where nobody voted; the truth where it is known."""
    counts = np.sum(_indicators(votes_NJ, classes), axis=0)
    totals = counts.sum(axis=1, keepdims=True)
    guess = np.where(totals > 0, counts / np.maximum(totals, 1.0), 1.0 / classes)
    rows = known_N >= 0
    guess[rows] = np.eye(classes)[known_N[rows]]
    return guess


def dawid_skene(
    votes_NJ: Ints,
    *,
    classes: int | None = None,
    known_N: Ints | None = None,
    weight_J: Floats | None = None,
    smoothing: float = 0.5,
    tolerance: float = 1e-9,
    limit: int = 1000,
) -> Consensus:
    """Posterior of each item's class and confusion of each judge, by expectation-maximisation in log space.

    It starts from the share of votes, so most judges must be better than chance, or some classes known.

    Args:
        votes_NJ: Class that each judge voted for, -1 where it abstained. Abstaining says nothing of the class.
        classes: Number of classes; None takes the largest number seen.
        known_N: True class where a person gave it, -1 elsewhere; held fixed.
        weight_J: What each judge's log-likelihood counts; None counts each once. See `group_judges`.
        smoothing: Votes added to each cell of a confusion matrix, and items to each class (a Dirichlet
            prior of smoothing + 1), so that no vote is ever taken for proof. 0 is maximum likelihood.
        tolerance: Stop when the log-likelihood of an item grows by less, in nats.
        limit: Stop after as many rounds in any case.

    Raises:
        InputError: The votes are not class numbers.

    Source: Dawid and Skene 1979, Applied Statistics 28(1), equations 2.3 to 2.5.
    """
    votes, known, count = _checked(votes_NJ, classes, known_N)
    judges = votes.shape[1]
    weight = np.ones(judges) if weight_J is None else np.asarray(weight_J, dtype=float)
    posterior, answer, prior, iterations, likelihood = _maximise(
        _Ballots.of(_indicators(votes, count)),
        _first_guess(votes, known, count),
        known,
        np.repeat(weight, count),
        smoothing,
        tolerance,
        limit,
    )
    confusion = answer.reshape(count, judges, count).transpose(1, 0, 2)
    return Consensus(posterior, confusion, prior, iterations, likelihood, (votes < 0).sum(axis=1))


def _pair_correlation(
    blocks: Sequence[Floats], pair: tuple[int, int], start_NK: Floats, known_N: Ints, weight_J: Floats, smoothing: float
) -> float:
    """Correlation of two judges' errors in the model that has the pair as one voter with K x K answers."""
    a, b = pair
    classes = start_NK.shape[1]
    both = (blocks[a][:, :, None] * blocks[b][:, None, :]).reshape(len(known_N), -1)
    if both.sum() < 2:
        return float("nan")
    others = [j for j in range(len(blocks)) if j not in pair]
    ballots = _Ballots.of([both, *(blocks[j] for j in others)])
    weight = np.repeat([1.0, *weight_J[others]], ballots.widths)
    posterior, answer, *_ = _maximise(ballots, start_NK, known_N, weight, smoothing / classes, 1e-6, 200)
    share_K = (posterior * both.any(axis=1, keepdims=True)).mean(axis=0)
    return _pooled(answer[:, : classes**2].reshape(classes, classes, classes), share_K)


def _pooled(table_KKK: Floats, share_K: Floats) -> float:
    """Correlation of "is wrong" within the true class (first axis), from two judges' joint answers."""
    right = np.einsum("kkk->k", table_KKK)
    right_a, right_b = np.einsum("kkl->k", table_KKK), np.einsum("klk->k", table_KKK)
    covariance = share_K @ (right - right_a * right_b)
    scale = np.sqrt((share_K @ (right_a * (1 - right_a))) * (share_K @ (right_b * (1 - right_b))))
    return float(covariance / scale) if scale > 0 else 0.0


def group_judges(
    votes_NJ: Ints,
    *,
    classes: int | None = None,
    known_N: Ints | None = None,
    smoothing: float = 0.5,
    threshold: float = 0.3,
) -> Grouping:
    """Find judges whose errors correlate beyond what the true class explains, and what each then counts.

    The plain fit cannot show it: two that agree too much look like two that are right. So for each pair
    the model is fitted again with the pair as one voter with K x K answers, whose dependence is then part
    of the model and is read from its table: covariance of "is wrong", pooled over the true classes. Links are
    made one at a time, the strongest first, and the rest is measured anew with the weights that follow from
    it: while a false majority still stands, those who are right against it look correlated too.

    Where the others have to pin down the class it takes four judges, and a family of three that errs as one
    passes for the truth. Known classes settle it: with 50 of them only those items are looked at.

    Args:
        votes_NJ: As for `dawid_skene`.
        classes: Likewise.
        known_N: Likewise.
        smoothing: Likewise.
        threshold: Correlation from which two judges are linked, raised to 3 / sqrt(items) where there are so
            few items that less may be noise. A cluster is all that hang together by links.
    """
    votes, known, count = _checked(votes_NJ, classes, known_N)
    judges = votes.shape[1]
    linked = np.zeros((judges, judges), dtype=bool)
    grouping = _weigh(np.where(np.eye(judges), 1.0, np.nan), linked)
    if (known >= 0).sum() >= _KNOWN_ENOUGH:
        votes, known = votes[known >= 0], known[known >= 0]
    elif (votes >= 0).any(axis=0).sum() < 4:  # one that never votes pins nothing down
        return grouping
    blocks = _indicators(votes, count)
    enough = max(threshold, 3 / np.sqrt(len(votes)))
    while True:
        weight = grouping.weight_J
        start = dawid_skene(votes, classes=count, known_N=known, weight_J=weight, smoothing=smoothing).posterior_NK
        found = np.eye(judges)
        for a, b in itertools.combinations(range(judges), 2):
            found[a, b] = found[b, a] = _pair_correlation(blocks, (a, b), start, known, weight, smoothing)
        grouping = _weigh(found, linked)
        unlinked = np.where(linked | np.eye(judges, dtype=bool), -1.0, np.nan_to_num(found))
        a, b = map(int, np.unravel_index(unlinked.argmax(), unlinked.shape))
        if unlinked[a, b] < enough:
            return grouping
        linked[a, b] = linked[b, a] = True
        grouping = _weigh(found, linked)


def _weigh(correlation_JJ: Floats, linked_JJ: npt.NDArray[np.bool_]) -> Grouping:
    judges = len(correlation_JJ)
    count, label_J = connected_components(linked_JJ, directed=False)
    same = (label_J[:, None] == label_J) & ~np.eye(judges, dtype=bool)
    shared = np.where(same, np.clip(np.nan_to_num(correlation_JJ), 0.0, 1.0), 0.0)
    clusters = tuple(tuple(np.flatnonzero(label_J == c).tolist()) for c in range(count))
    return Grouping(clusters, 1 / (1 + shared.sum(axis=1)), correlation_JJ)


def grouped_dawid_skene(
    votes_NJ: Ints,
    *,
    classes: int | None = None,
    known_N: Ints | None = None,
    smoothing: float = 0.5,
    threshold: float = 0.3,
) -> tuple[Consensus, Grouping]:
    """`dawid_skene` in which judges that err together share their say; arguments as for `group_judges`."""
    grouping = group_judges(votes_NJ, classes=classes, known_N=known_N, smoothing=smoothing, threshold=threshold)
    weight = grouping.weight_J
    consensus = dawid_skene(votes_NJ, classes=classes, known_N=known_N, weight_J=weight, smoothing=smoothing)
    return consensus, grouping
