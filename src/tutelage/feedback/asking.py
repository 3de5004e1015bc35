"""How judges ask and how answers are read, whatever the judge and whatever the engine."""

from __future__ import annotations

import dataclasses
import json
import math
import string
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeVar

from tutelage.records import Answer, Cost, Engine, Question

__all__ = ["Opinion", "Steps", "chance", "read_labels", "settle"]

_FREE = Cost()

Told = TypeVar("Told")
Steps = Generator[list[Question], list[Answer], Told]

# A verdict in words carries no probability; nine in ten is what small judges' certain words are worth at best.
_WORD = math.log(0.9 / 0.1)


@dataclasses.dataclass(frozen=True, slots=True)
class Opinion:
    """What a judge holds of one subject, or why it holds nothing (value None).

    `value` is, by kind: for a pair the log-odds in nats that the first is better; for a rating the
    expected rating on a scale from 0 to 1; for a member of a list its log-probability of being best.
    """

    value: float | None
    reason: str
    evidence: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    raw: str = ""
    cost: Cost = _FREE
    order: tuple[str, ...] = ()

    @property
    def abstained(self) -> bool:
        """Whether there is no opinion."""
        return self.value is None


def settle(engine: Engine, judging: Sequence[Steps[Told]]) -> list[Told]:
    """Run generators of questions to their ends, all questions of a turn in one call of the engine."""
    told: dict[int, Told] = {}
    waiting: dict[int, list[Question]] = {}
    for i, steps in enumerate(judging):
        _advance(i, steps, None, waiting, told)
    while waiting:
        asked, waiting = waiting, {}
        answers = iter(engine.ask([q for questions in asked.values() for q in questions]))
        for i, questions in asked.items():
            _advance(i, judging[i], [next(answers) for _ in questions], waiting, told)
    return [told[i] for i in range(len(judging))]


def _advance(
    i: int,
    steps: Steps[Told],
    answers: list[Answer] | None,
    waiting: dict[int, list[Question]],
    told: dict[int, Told],
) -> None:
    try:
        waiting[i] = next(steps) if answers is None else steps.send(answers)
    except StopIteration as end:
        told[i] = end.value


def chance(log_odds: float) -> float:
    """The probability behind log-odds; cut at 30 nats, beyond which nothing changes."""
    return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, log_odds))))


def read_labels(
    answer: Answer, labels: Sequence[str], *, output: str = "labels", least_mass: float = 0.0
) -> tuple[list[float] | None, str]:
    """Log-probabilities of the labels, normalised over them; or None and why they cannot be read.

    Labels' own log-probabilities are taken where the engine gives them, else the label that the text
    names (with nine tenths of the probability, the others sharing the rest).
    """
    if answer.failure:
        return None, answer.failure
    found = answer.label_logps
    if found is not None and output == "labels":
        logps = [found.get(label, -math.inf) for label in labels]
        mass = math.fsum(math.exp(x) for x in logps)
        if mass < max(least_mass, 1e-12):
            return None, f"only {mass:.1%} of the probability went to the labels {', '.join(labels)}"
        # A label that an engine did not list has less than the least one listed; it is not impossible.
        floor = min(x for x in logps if math.isfinite(x)) - 1.0
        logps = [max(x, floor) for x in logps]
        total = _logsumexp(logps)
        return [x - total for x in logps], ""
    named = _from_json(answer.text, labels) if output == "json" else _from_words(answer.text, labels)
    if named is None:
        return None, f"no label ({', '.join(labels)}) could be read in '{answer.text[:80]}'"
    return _worded(named, len(labels)), ""


def _worded(named: int, count: int) -> list[float]:
    certain = chance(_WORD)
    return [math.log(certain if i == named else (1.0 - certain) / (count - 1)) for i in range(count)]


def _from_words(text: str, labels: Sequence[str]) -> int | None:
    """The one label among the first words, or the one that stands first and is set apart ("A: because B ...").

    A label of one letter must have its case: an "a" may be an article.
    """
    words = text.split()[:6]
    bare = [w.strip(string.punctuation) for w in words]
    named = [next((i for i, x in enumerate(labels) if _same(w, x)), None) for w in bare]
    found = {i for i in named if i is not None}
    if words and named[0] is not None and words[0][-1] in ".:,;)":
        return named[0]
    return found.pop() if len(found) == 1 else None


def _same(word: str, label: str) -> bool:
    return word == label or (len(label) > 1 and word.casefold() == label.casefold())


def _from_json(text: str, labels: Sequence[str]) -> int | None:
    """The "verdict" of the one flat JSON object in a text."""
    start, end = text.find("{"), text.rfind("}")
    try:
        found = json.loads(text[start : end + 1]) if start >= 0 else None
    except (ValueError, RecursionError):
        return None
    verdict = found.get("verdict") if isinstance(found, dict) else None
    if isinstance(verdict, bool) or not isinstance(verdict, str | int):
        return None
    shown = str(verdict).strip().casefold()
    return next((i for i, label in enumerate(labels) if label.casefold() == shown), None)


def _logsumexp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))
