"""Measure a model on a suite with reference answers, and compare two, item by item.

This is the only room where references are read. What comes out are shares with intervals.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from scipy.stats import norm

from tutelage.loop.outcomes import Outcome, outcome
from tutelage.records import Evidence, Generation, Prompt, SamplerSettings, SuiteItem

__all__ = [
    "METRICS",
    "Answers",
    "Completer",
    "compare",
    "evaluate",
    "known_withheld",
    "paired_difference",
    "share",
    "shares",
]


class Completer(Protocol):
    """What evaluation needs of an engine."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        settings: SamplerSettings,
        seed: int,
        version: str,
        progress: Callable[[int], None] = ...,
    ) -> list[list[Generation]]:
        """`samples` replies to each prompt, in order."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """A model's greedy replies to a suite, with what each one did."""

    suite: str
    version: str
    items: tuple[SuiteItem, ...]
    replies: tuple[str, ...]
    outcomes: tuple[Outcome, ...]

    def of(self, kind: str) -> list[Outcome]:
        """Outcomes of one kind of question."""
        return [o for o, item in zip(self.outcomes, self.items, strict=True) if item.kind == kind]


# name -> (kind of question, outcomes counted, outcomes in the denominator)
METRICS: dict[str, tuple[str, frozenset[str], frozenset[str]]] = {
    "correct_answerable": ("answerable", frozenset({"correct"}), frozenset()),
    "abstained_answerable": ("answerable", frozenset({"abstained"}), frozenset()),
    "made_up_unanswerable": ("unanswerable", frozenset({"wrong"}), frozenset()),
    "asked_back_ambiguous": ("ambiguous", frozenset({"asked_back"}), frozenset()),
    "accuracy_answered": ("answerable", frozenset({"correct"}), frozenset({"correct", "wrong"})),
}


def evaluate(
    completer: Completer,
    items: Sequence[SuiteItem],
    *,
    suite: str,
    version: str,
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Answers:
    """Greedy replies to every item, and what they did."""
    settings = SamplerSettings(temperature=0.0, max_new_tokens=max_new_tokens)
    prompts = [i.prompt for i in items]
    replies = completer.generate(prompts, samples=1, settings=settings, seed=0, version=version, progress=progress)
    texts = tuple(group[0].text for group in replies)
    done = tuple(outcome(item, text) for item, text in zip(items, texts, strict=True))
    return Answers(suite, version, tuple(items), texts, done)


def share(hits: int, n: int, *, confidence: float = 0.95) -> tuple[float | None, float | None, float | None]:
    """(share, low, high) with Wilson's interval; Nones when n is 0. Source: Wilson 1927."""
    if n == 0:
        return None, None, None
    z = float(norm.ppf(0.5 + confidence / 2))
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # The bound at none or all of n is exactly 0 or 1; rounding must not put it beyond the share.
    return p, max(0.0, middle - half) if hits else 0.0, min(1.0, middle + half) if hits < n else 1.0


def _count(answers: Answers, metric: str) -> tuple[int, int]:
    kind, counted, basis = METRICS[metric]
    found = [o for o in answers.of(kind) if not basis or o in basis]
    return sum(o in counted for o in found), len(found)


def shares(answers: Answers, *, confidence: float = 0.95) -> dict[str, tuple[float | None, float | None, float | None]]:
    """Every metric of one model as (share, low, high)."""
    return {name: share(*_count(answers, name), confidence=confidence) for name in METRICS}


def paired_difference(
    before: Sequence[bool], after: Sequence[bool], *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """(difference, low, high) of two shares measured on the same items.

    The interval adds half a pair to each of the four cells, which keeps it honest for small n and
    when nothing changed. Source: Agresti and Min 2005, Statistics in Medicine 24:729, section 3.
    """
    n = len(before)
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    won = sum(a and not b for b, a in zip(before, after, strict=True))
    m, c, b = n + 2.0, won + 0.5, lost + 0.5
    middle = (c - b) / m
    half = float(norm.ppf(0.5 + confidence / 2)) * math.sqrt(max((c + b) - (c - b) ** 2 / m, 0.0)) / m
    return (won - lost) / max(n, 1), max(-1.0, middle - half), min(1.0, middle + half)


def compare(before: Answers, after: Answers, *, confidence: float = 0.95) -> list[Evidence]:
    """Every metric before and after, with a paired interval on the difference."""
    found = []
    for name, (kind, counted, basis) in METRICS.items():
        pairs = [
            (b, a)
            for b, a, item in zip(before.outcomes, after.outcomes, before.items, strict=True)
            if item.kind == kind
        ]
        old, new = (_rate(_count(x, name)) for x in (before, after))
        if not pairs or old is None or new is None:
            found.append(Evidence(before.suite, name, old, new, None, None, len(pairs)))
            continue
        if basis:
            low, high = _bootstrap(pairs, counted, basis, confidence)
        else:
            _, low, high = paired_difference(
                [b in counted for b, _ in pairs], [a in counted for _, a in pairs], confidence=confidence
            )
        found.append(Evidence(before.suite, name, old, new, low, high, len(pairs)))
    return [*found, known_withheld(before, after, confidence=confidence)]


def _rate(count: tuple[int, int]) -> float | None:
    return count[0] / count[1] if count[1] else None


def known_withheld(before: Answers, after: Answers, *, confidence: float = 0.95) -> Evidence:
    """`abstained_known`: of the answerable items the first model got right, how many are now withheld."""
    now = [
        a in ("abstained", "asked_back")
        for b, a, item in zip(before.outcomes, after.outcomes, before.items, strict=True)
        if item.kind == "answerable" and b == "correct"
    ]
    p, low, high = share(sum(now), len(now), confidence=confidence)
    return Evidence(before.suite, "abstained_known", 0.0 if now else None, p, low, high, len(now))


def _bootstrap(
    pairs: Sequence[tuple[str, str]], counted: frozenset[str], basis: frozenset[str], confidence: float
) -> tuple[float | None, float | None]:
    """Percentile interval of a difference of ratios, items resampled together (2,000 draws, fixed seed)."""
    hit = np.array([[x in counted for x in pair] for pair in pairs], dtype=float)
    base = np.array([[x in basis for x in pair] for pair in pairs], dtype=float)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(pairs), size=(2000, len(pairs)))
    below = base[rows].sum(1)
    usable = (below > 0).all(1)
    if not usable.any():
        return None, None
    ratio = hit[rows].sum(1)[usable] / below[usable]
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratio[:, 1] - ratio[:, 0], [tail, 1 - tail])
    return float(low), float(high)
