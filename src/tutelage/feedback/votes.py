"""What several people's votes are worth: soft labels under a fitted prior, and how far the people agree.

Nothing here knows texts or files; `human.py` brings the votes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import betaincinv, betaln

__all__ = ["Agreement", "SoftLabel", "VotePrior", "agreement", "fit_prior", "krippendorff_alpha"]

_LEAST, _MOST = 0.05, 50.0  # of a: one vote then counts 95.5% and 50.5%


@dataclasses.dataclass(frozen=True, slots=True)
class SoftLabel:
    """The share of people who would prefer the first of two, after the votes.

    Args:
        mean: Posterior mean, strictly between 0 and 1.
        low: Lower end of the equal-tailed interval.
        high: Its upper end.
        votes: How many votes it rests on; a tie is one vote.
    """

    mean: float
    low: float
    high: float
    votes: float

    @property
    def logit(self) -> float:
        """Log-odds of the mean, in nats."""
        return math.log(self.mean) - math.log1p(-self.mean)


@dataclasses.dataclass(frozen=True, slots=True)
class VotePrior:
    """Beta(a, a): how the share of people who prefer the first is spread over pairs.

    Args:
        a: Small where pairs have a clear winner, large where they split people evenly.
        pairs: Pairs with two votes or more besides ties, which `a` was fitted to; 0 means the uniform prior.
        bound: "least" or "most" when the fit ran into that end of what is allowed, otherwise empty.
    """

    a: float = 1.0
    pairs: int = 0
    bound: Literal["", "least", "most"] = ""

    def posterior(self, first: float, votes: float, *, level: float = 0.95) -> SoftLabel:
        """Soft label of a pair of which `first` of `votes` prefer the first (a tie: half a vote for each).

        Raises:
            ValueError: More or fewer wins than votes allow.
        """
        if not 0 <= first <= votes:
            raise ValueError(f"{first} of {votes} votes")
        won, lost = self.a + first, self.a + votes - first
        tail = (1 - level) / 2
        low, high = (float(betaincinv(won, lost, q)) for q in (tail, 1 - tail))
        return SoftLabel(won / (won + lost), low, high, votes)

    def log_pick(self, among: int) -> tuple[float, float]:
        """Log-probability of being best of `among`, after one vote: of the one picked, and of each other.

        The symmetric Dirichlet with the same `a`, under which any two of the list compare as Beta(a, a).
        """
        total = math.log(1 + among * self.a)
        return math.log1p(self.a) - total, math.log(self.a) - total


def fit_prior(counts: Iterable[tuple[int, int]]) -> VotePrior:
    """Fit Beta(a, a) to pairs by maximum marginal likelihood.

    L(a) = sum over pairs of ln B(k + a, n - k + a) - ln B(a, a), the beta-binomial likelihood without
    its constant. A single vote has probability 1/2 whatever a is, so only pairs with two votes or more
    count, and without any the prior is uniform (a = 1, Laplace's rule of succession). Votes that are
    all unanimous push a to 0 and all even ones to infinity; a stays within [0.05, 50], so that no soft
    label becomes 0 or 1, and `bound` says that the end was reached.

    Args:
        counts: (votes for the first, votes for either) of each pair, without ties. A tie taken as a coin
            that might have fallen either way drops out of the likelihood. Taken as two half votes it is
            less scattered than any binomial allows: on the 1,150 labels of Tulu's human evaluation, a
            third of them ties, that fit runs to the upper end, where no vote counts for anything.

    Source: Skellam 1948, beta-binomial by maximum likelihood; unimodal in a: Levin and Reeds 1977.
    """
    # Which one is the first is a matter of writing, so a pair and its mirror image are the same.
    seen = Counter((min(k, n - k), n) for k, n in counts if n >= 2)
    if not seen:
        return VotePrior()
    k_U, n_U = np.array(list(seen), dtype=np.float64).T
    times_U = np.array(list(seen.values()), dtype=np.float64)

    def loss(log_a: float) -> float:
        a = math.exp(log_a)
        return -float(times_U @ (betaln(k_U + a, n_U - k_U + a) - betaln(a, a)))

    ends = math.log(_LEAST), math.log(_MOST)
    found = minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-9})
    pairs = int(times_U.sum())
    if loss(ends[0]) <= found.fun:
        return VotePrior(_LEAST, pairs, "least")
    if loss(ends[1]) <= found.fun:
        return VotePrior(_MOST, pairs, "most")
    return VotePrior(math.exp(found.x), pairs)


Scale = Literal["nominal", "ordinal", "interval"]


def krippendorff_alpha(units: Iterable[Sequence[float]], *, scale: Scale = "nominal") -> float | None:
    """Krippendorff's alpha, 1 - D_observed / D_expected: 1 is full agreement, 0 is chance.

    Args:
        units: The values that a unit was given, by however many people; missing ones are left out.
        scale: How far two values are apart: 0 or 1; squared distance of their mid-ranks; squared distance.

    Returns:
        None where it is not defined: no unit has two values, or all values are equal.

    Source: Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section C to E.
    """
    pairable = [list(unit) for unit in units if len(unit) >= 2]
    values = sorted(set(itertools.chain.from_iterable(pairable)))
    if len(values) < 2:
        return None
    place = {value: i for i, value in enumerate(values)}
    together_VV = np.zeros((len(values), len(values)))
    for unit in pairable:
        counts_V = np.bincount([place[v] for v in unit], minlength=len(values)).astype(np.float64)
        together_VV += (np.outer(counts_V, counts_V) - np.diag(counts_V)) / (len(unit) - 1)
    total_V = together_VV.sum(axis=0)
    if scale == "nominal":
        apart_VV = 1.0 - np.eye(len(values))
    else:
        at_V = np.cumsum(total_V) - total_V / 2 if scale == "ordinal" else np.array(values, dtype=np.float64)
        apart_VV = (at_V[:, None] - at_V[None, :]) ** 2
    observed = float((together_VV * apart_VV).sum())
    expected = float((np.outer(total_V, total_V) * apart_VV).sum()) / (float(total_V.sum()) - 1)
    return 1.0 - observed / expected


@dataclasses.dataclass(frozen=True, slots=True)
class Agreement:
    """How far people agree on the items that two or more of them answered.

    Args:
        alpha: Krippendorff's alpha over all people, or None where it is not defined.
        same: Share of pairs of answers to one item that are equal, or None.
        items: Items with two answers or more.
        kappas: Cohen's kappa of each two people and the items both answered; None where not defined.
    """

    alpha: float | None
    same: float | None
    items: int
    kappas: Mapping[tuple[str, str], tuple[float | None, int]]


def agreement(answers: Mapping[str, Mapping[str, int]], *, choices: int = 0) -> Agreement:
    """Agreement of people, from person -> item -> answer (a skipped item is left out).

    Args:
        answers: Ratings; or numbers of candidates, with what is no candidate below 0.
        choices: Candidates an item has; 0 for ratings, which are ordinal (in kappa: squared distance).
            Which candidate is number 0 is a matter of writing, and in files of preferences it is the
            better one, which would make chance agreement high and kappa low for no reason. So every
            item counts once under each turn of the numbers, and all numbers are equally frequent.
    """
    items: dict[str, list[int]] = {}
    for given in answers.values():
        for item, value in given.items():
            items.setdefault(item, []).append(value)
    units = [values for values in items.values() if len(values) >= 2]
    pairs = [a == b for values in units for a, b in itertools.combinations(values, 2)]
    scale: Scale = "nominal" if choices else "ordinal"
    turns = range(choices or 1)
    turned = [[_turn(v, by, choices) for v in values] for values in units for by in turns]
    kappas = {}
    for one, other in itertools.combinations(sorted(answers), 2):
        both = [i for i in answers[one] if i in answers[other]]
        first, second = ([_turn(answers[who][i], by, choices) for i in both for by in turns] for who in (one, other))
        kappas[one, other] = (_cohen(first, second, scale), len(both))
    same = sum(pairs) / len(pairs) if pairs else None
    return Agreement(krippendorff_alpha(turned, scale=scale), same, len(units), kappas)


def _turn(value: int, by: int, choices: int) -> int:
    return (value + by) % choices if choices and value >= 0 else value


def _cohen(one: Sequence[int], other: Sequence[int], scale: Scale) -> float | None:
    """None where both always said the same single thing: nothing is left for chance to explain."""
    if len({*one, *other}) < 2:
        return None
    from sklearn.metrics import cohen_kappa_score  # here, because a labelling session should not wait for it

    every = list(range(min(*one, *other), max(*one, *other) + 1))  # its weights go by place in this list
    return float(cohen_kappa_score(one, other, labels=every, weights=None if scale == "nominal" else "quadratic"))
