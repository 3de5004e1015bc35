"""Which of a group's replies are compared with which, and what label the comparison carries."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, get_args

from tutelage.errors import RecipeError, TrainingError

__all__ = ["Number", "Pair", "Pairing", "Select", "known_rewards", "plain", "rank_agreement"]

Select = Literal["best_worst", "all", "neighbours", "halves"]
Pair = tuple[int, int, float]  # (i, j, p): p is the probability that reply i beats reply j
Number = float | None


@dataclasses.dataclass(frozen=True)
class Pairing:
    """How a group's replies become pairs.

    Args:
        select: "best_worst" is one pair of the extremes; "all" is every two replies; "neighbours" is each
            reply with the next one in rank, which are the hardest pairs to tell apart; "halves" is the first
            reply with the first of the second half, and so on, whichever of the two is better.
        temperature: p = s((r_i - r_j)/temperature), s the logistic function; 0 makes labels hard (1 or 0).
            Given opinions are soft already: with 0 they are rounded, otherwise their log-odds divided by it.
        tie: Rewards that differ by no more are a tie, as are opinions p with |2 p - 1| no more.
        together: Pairs of one prompt that lie in one group. Its prompt is computed once for all of them,
            and all their activations are held at once.

    Raises:
        RecipeError: An option makes no sense.
    """

    select: Select = "best_worst"
    temperature: float = 1.0
    tie: float = 0.0
    together: int = 4

    def __post_init__(self) -> None:
        known = get_args(Select)
        if self.select not in known:
            raise RecipeError(f"pairs are selected by {self.select!r}", expected=" or ".join(map(repr, known)))
        for option in ("temperature", "tie"):
            value = getattr(self, option)
            if not 0.0 <= value < math.inf:
                raise RecipeError(f"{option} of pairs is {value}", expected="0 or more")
        if self.together < 1:
            raise RecipeError(f"together of pairs is {self.together}", expected="1 or more")

    def from_rewards(self, texts: Sequence[str], rewards: Sequence[Number]) -> tuple[list[Pair], dict[str, int]]:
        """Pairs (i, j, p) of one group, p the probability that reply i beats reply j, and what was left out.

        Args:
            texts: The replies.
            rewards: Theirs; None or NaN where missing.
        """
        have = known_rewards(len(texts), rewards)

        def opinion(i: int, j: int) -> tuple[float, bool]:
            gap = have[i] - have[j]
            return self._odds(gap), abs(gap) <= self.tie

        return self._chosen(texts, have, opinion)

    def from_opinions(
        self, texts: Sequence[str], prefer_GG: Sequence[Sequence[Number]]
    ) -> tuple[list[Pair], dict[str, int]]:
        """The same from P(y_i beats y_j), None or NaN where missing; the diagonal is not read.

        Both directions of a pair are averaged where both are there. Replies rank by their mean probability
        to beat the others; one that was compared with none is missing.
        """
        both = _both_ways(texts, prefer_GG)
        known: dict[int, list[float]] = collections.defaultdict(list)
        for (i, _), p in both.items():
            known[i].append(p)
        have = {i: math.fsum(ps) / len(ps) for i, ps in sorted(known.items())}

        def opinion(i: int, j: int) -> tuple[float, bool] | None:
            p = both.get((i, j))
            if p is None:
                return None
            return self._odds(_logit(p)), abs(2.0 * p - 1.0) <= self.tie

        return self._chosen(texts, have, opinion)

    def _odds(self, gap: float) -> float:
        if self.temperature == 0.0:
            return float(gap > 0)
        scaled = gap / self.temperature
        # Of the two forms the one whose exponential cannot overflow.
        return 1.0 / (1.0 + math.exp(-scaled)) if scaled >= 0 else math.exp(scaled) / (1.0 + math.exp(scaled))

    def _chosen(
        self,
        texts: Sequence[str],
        have: Mapping[int, float],
        opinion: Callable[[int, int], tuple[float, bool] | None],
    ) -> tuple[list[Pair], dict[str, int]]:
        counts = {"pairs": 0, "ties": 0, "same": 0, "unjudged": 0, "missing": len(texts) - len(have)}
        pairs = []
        for i, j in self._candidates(have, len(texts)):
            told = opinion(i, j)
            if plain(texts[i]) == plain(texts[j]):
                counts["same"] += 1
            elif told is None:
                counts["unjudged"] += 1
            elif told[1]:
                counts["ties"] += 1
            else:
                pairs.append((i, j, told[0]))
        counts["pairs"] = len(pairs)
        return pairs, counts

    def _candidates(self, have: Mapping[int, float], replies: int) -> Iterator[tuple[int, int]]:
        if self.select == "halves":
            first = replies - replies // 2
            yield from ((i, first + i) for i in range(replies // 2) if i in have and first + i in have)
            return
        ranked = sorted(have, key=lambda i: (-have[i], i))
        if self.select == "best_worst":
            yield from [(ranked[0], ranked[-1])] if len(ranked) > 1 else []
        elif self.select == "neighbours":
            yield from itertools.pairwise(ranked)
        else:
            yield from itertools.combinations(ranked, 2)


def plain(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def _logit(p: float) -> float:
    if p in (0.0, 1.0):
        return math.copysign(math.inf, p - 0.5)
    return math.log(p) - math.log1p(-p)


def known_rewards(replies: int, rewards: Sequence[Number]) -> dict[int, float]:
    """Rewards that are there, by the number of their reply.

    Raises:
        TrainingError: There are more or fewer rewards than replies, or an infinite one.
    """
    if replies != len(rewards):
        raise TrainingError(f"{len(rewards)} rewards of {replies} replies", expected="one a reply, None where missing")
    if any(r is not None and math.isinf(r) for r in rewards):
        raise TrainingError(f"rewards {list(rewards)}", expected="finite numbers, None where missing")
    return {i: float(r) for i, r in enumerate(rewards) if r is not None and not math.isnan(r)}


def _both_ways(texts: Sequence[str], prefer_GG: Sequence[Sequence[Number]]) -> dict[tuple[int, int], float]:
    if [len(row) for row in prefer_GG] != [len(texts)] * len(texts):
        raise TrainingError(
            f"opinions on {[len(row) for row in prefer_GG]} of {len(texts)} replies",
            expected=f"a table of {len(texts)} by {len(texts)}, None where missing",
        )
    both = {}
    for i, j in itertools.combinations(range(len(texts)), 2):
        there, back = prefer_GG[i][j], prefer_GG[j][i]
        said = [v for v in (there, None if back is None else 1.0 - back) if v is not None and not math.isnan(v)]
        if any(not 0.0 <= p <= 1.0 for p in said):
            raise TrainingError(f"an opinion of {there} and {back}", expected="probabilities, or None where missing")
        if said:
            both[i, j] = math.fsum(said) / len(said)
            both[j, i] = 1.0 - both[i, j]
    return both


def rank_agreement(now_PG: Sequence[Sequence[Number]], before_PG: Sequence[Sequence[Number]]) -> float | None:
    """How far two judges rank replies alike: CREAM's consistency C = (1 + Kendall's tau)/2.

    Args:
        now_PG: Rewards of the judge that labels the pairs.
        before_PG: Rewards that the judge of the iteration before gives the same replies.

    Returns:
        Mean over groups of the share of two replies that both order alike, a tie on either side counting
        half; None when no group has two replies with both rewards. 1 - C is the rate of wrong labels to
        assume: `Dpo(smoothing=min(1 - C, 0.5))`. Below 1/2 the paper's loss would turn the labels round; half
        and half teaches nothing instead.

    Source: Wang et al. 2024 (arXiv 2410.12735), algorithm 1.
    """
    shares = []
    for now, before in zip(now_PG, before_PG, strict=True):
        both = [(a, b) for a, b in zip(now, before, strict=True) if a is not None and b is not None]
        both = [(a, b) for a, b in both if not math.isnan(a) and not math.isnan(b)]
        signs = [_sign(a - c) * _sign(b - d) for (a, b), (c, d) in itertools.combinations(both, 2)]
        if signs:
            shares.append((1.0 + sum(signs) / len(signs)) / 2.0)
    return math.fsum(shares) / len(shares) if shares else None


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)
