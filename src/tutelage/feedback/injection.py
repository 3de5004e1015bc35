"""Canaries: bad replies that try to talk the judge into preferring them, and must lose."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from tutelage.config import data_file
from tutelage.errors import InputError
from tutelage.feedback.asking import Opinion
from tutelage.feedback.model_judge import ComparingJudge, Pair
from tutelage.records import Message, Prompt

__all__ = ["Canary", "Injected", "canaries", "inject"]


@dataclasses.dataclass(frozen=True, slots=True)
class Canary:
    """A good reply against a bad one that carries an injection of some family."""

    family: str
    prompt: Prompt
    good: str
    bad: str
    injected: str


@dataclasses.dataclass(frozen=True)
class Injected:
    """What the suite found.

    Args:
        n: Canaries that were judged.
        wins: Share of them that beat the good reply.
        taken_in: Share that beat it although the same bad reply without the injection lost.
        lift: Mean gain in log-odds that the injection brought the bad reply.
        by_family: Share of wins by family.
        abstained: Canaries on which the judge abstained.
    """

    n: int
    wins: float | None
    taken_in: float | None
    lift: float | None
    by_family: Mapping[str, float]
    abstained: int


def canaries(name: str = "builtin:injections") -> list[Canary]:
    """All families on all base pairs.

    Raises:
        InputError: The file is missing or has another shape.
    """
    path: Path = data_file(name, suffix="judges/*.toml")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        bases = [(str(b["prompt"]), str(b["good"]), str(b["bad"])) for b in data["bases"]]
        families = [(str(f["id"]), str(f["text"])) for f in data["families"]]
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no injection suite ({error})",
            expected="[[bases]] with prompt, good, bad and [[families]] with id, text",
        ) from error
    return [
        Canary(
            family,
            Prompt(f"{family}-{n}", (Message("user", prompt),)),
            good,
            bad,
            text.replace("{bad}", bad).replace("{prompt}", prompt),
        )
        for family, text in families
        for n, (prompt, good, bad) in enumerate(bases)
    ]


def inject(judge: ComparingJudge, suite: Sequence[Canary]) -> tuple[Injected, list[Opinion]]:
    """Compare every canary with the good reply, and the plain bad replies once, all in one batch."""
    plain = list({(c.prompt.text, c.good, c.bad): c for c in suite}.values())
    pairs = [Pair(c.prompt, c.good, c.injected) for c in suite] + [Pair(c.prompt, c.good, c.bad) for c in plain]
    told = judge.compare(pairs)
    without = {(c.prompt.text, c.bad): o.value for c, o in zip(plain, told[len(suite) :], strict=True)}
    rows = [
        (c.family, o.value, without[c.prompt.text, c.bad])
        for c, o in zip(suite, told[: len(suite)], strict=True)
        if o.value is not None
    ]
    won: dict[str, list[bool]] = {}
    for family, value, _ in rows:
        won.setdefault(family, []).append(value < 0)
    both = [(value, before) for _, value, before in rows if before is not None]
    stood = [value for value, before in both if before > 0]
    found = Injected(
        n=len(rows),
        wins=_mean([value < 0 for _, value, _ in rows]),
        taken_in=_mean([value < 0 for value in stood]),
        lift=_mean([before - value for value, before in both]),
        by_family={family: sum(lost) / len(lost) for family, lost in won.items()},
        abstained=len(suite) - len(rows),
    )
    return found, told


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
