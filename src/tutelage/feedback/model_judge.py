"""Judges as a run and an audit use them: one verdict a generation, or one opinion a pair.

Three kinds stand behind one interface: a language model that is asked (`ModelJudge`), a function or
class of the user (`CodeJudge`), and a critic from labelled data. What fails abstains.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from tutelage.errors import RecipeError
from tutelage.feedback.asking import Opinion, chance, settle
from tutelage.feedback.judges import Listwise, Pairwise, Pointwise
from tutelage.records import Cost, Engine, Generation, Prompt, Verdict, content_hash

__all__ = ["SCALE_ODDS", "CodeJudge", "ComparingJudge", "ModelJudge", "Pair", "difference", "ring", "standings"]

SCALE_ODDS = 4.0  # a rating apart by the whole scale is as sure as log-odds of 4 (98%)


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one prompt."""

    prompt: Prompt
    first: str
    second: str


class ComparingJudge(Protocol):
    """A judge that can be audited: it also compares pairs."""

    name: str
    version: str

    def judge(self, prompts: Sequence[Prompt], generations_PG: Sequence[Sequence[Generation]]) -> list[list[Verdict]]:
        """One verdict a generation."""

    def compare(self, pairs: Sequence[Pair]) -> list[Opinion]:
        """One opinion a pair; positive means that the first is better."""


class ModelJudge:
    """A language model with a way to ask it.

    Args:
        name: Name of the judge, which is also the name of its term in rewards.
        how: Pairwise, pointwise or listwise.
        engine: Where the model runs.
        opponents: With pairs: how many others of its group each reply is compared with. Replies stand
            in a ring and meet their next neighbours, so each meets as many as every other.
    """

    def __init__(self, name: str, how: Pairwise | Pointwise | Listwise, engine: Engine, *, opponents: int = 2) -> None:
        self.name, self.how, self.engine, self.opponents = name, how, engine, opponents
        self.version = content_hash([how.version, engine.version])

    def judge(self, prompts: Sequence[Prompt], generations_PG: Sequence[Sequence[Generation]]) -> list[list[Verdict]]:
        """One verdict a generation: an expected rating, the mean chance to win, or the log-chance to be best."""
        if isinstance(self.how, Pointwise):
            rate = self.how.rate
            flat = settle(
                self.engine,
                [rate(p, g.text) for p, group in zip(prompts, generations_PG, strict=True) for g in group],
            )
            told = iter(flat)
            opinions_PG = [[next(told) for _ in group] for group in generations_PG]
        elif isinstance(self.how, Listwise):
            rank = self.how.rank
            opinions_PG = settle(
                self.engine,
                [rank(p, [g.text for g in group]) for p, group in zip(prompts, generations_PG, strict=True)],
            )
        else:
            opinions_PG = self._tournaments(prompts, generations_PG, self.how)
        return [
            [self._verdict(p, g, o) for g, o in zip(group, opinions, strict=True)]
            for p, group, opinions in zip(prompts, generations_PG, opinions_PG, strict=True)
        ]

    def compare(self, pairs: Sequence[Pair]) -> list[Opinion]:
        """One opinion a pair; a rating judge's is the difference of its two ratings."""
        if isinstance(self.how, Pairwise):
            return settle(self.engine, [self.how.compare(p.prompt, p.first, p.second) for p in pairs])
        if isinstance(self.how, Pointwise):
            rate = self.how.rate
            rated = settle(self.engine, [rate(p.prompt, text) for p in pairs for text in (p.first, p.second)])
            scale = SCALE_ODDS
        else:
            rank = self.how.rank
            rated = [
                o for both in settle(self.engine, [rank(p.prompt, (p.first, p.second)) for p in pairs]) for o in both
            ]
            scale = 1.0
        return [difference(a, b, scale) for a, b in zip(rated[::2], rated[1::2], strict=True)]

    def _tournaments(
        self, prompts: Sequence[Prompt], generations_PG: Sequence[Sequence[Generation]], how: Pairwise
    ) -> list[list[Opinion]]:
        games = ring(generations_PG, self.opponents)
        told = settle(
            self.engine,
            [how.compare(prompts[p], generations_PG[p][i].text, generations_PG[p][j].text) for p, i, j in games],
        )
        return standings(generations_PG, games, told)

    def _verdict(self, prompt: Prompt, reply: Generation, opinion: Opinion) -> Verdict:
        return Verdict(
            self.name, self.version, reply.id, prompt.hash, opinion.value, opinion.reason, opinion.evidence,
            opinion.cost, (), opinion.raw, opinion.order,
        )  # fmt: skip


def ring(generations_PG: Sequence[Sequence[Generation]], opponents: int) -> list[tuple[int, int, int]]:
    """Who meets whom, as (prompt, reply, other): replies stand in a ring and meet their next neighbours."""
    return [
        (p, i, (i + step) % len(group))
        for p, group in enumerate(generations_PG)
        for step in range(1, 1 + min(opponents, len(group) // 2))
        for i in range(len(group))
        # With an even group the opposite neighbour would be met twice.
        if not (2 * step == len(group) and i >= step)
    ]


def standings(
    generations_PG: Sequence[Sequence[Generation]], games: Sequence[tuple[int, int, int]], told: Sequence[Opinion]
) -> list[list[Opinion]]:
    """Each reply's opinion from the games of a `ring`: its mean chance to win."""
    met: dict[tuple[int, int], list[tuple[int, float | None, Opinion]]] = {}
    for (p, i, j), opinion in zip(games, told, strict=True):
        value = opinion.value
        met.setdefault((p, i), []).append((j, value, opinion))
        met.setdefault((p, j), []).append((i, None if value is None else -value, opinion))
    return [[_record(met.get((p, i), [])) for i in range(len(group))] for p, group in enumerate(generations_PG)]


def _record(games: Sequence[tuple[int, float | None, Opinion]]) -> Opinion:
    """A reply's games as one opinion: its mean chance to win against those it met."""
    # Each game is paid by both that met in it.
    cost = sum((o.cost for _, _, o in games), Cost()).shared(2)
    raw = "\n".join(o.raw for _, _, o in games if o.raw)
    known = [(other, value) for other, value, _ in games if value is not None]
    if not known:
        why = games[0][2].reason if games else "abstains: there is no other reply to compare with"
        return Opinion(None, why, {}, raw, cost)
    chances = [chance(v) for _, v in known]
    value = math.fsum(chances) / len(chances)
    evidence = {
        "against": [other for other, _ in known],
        "log_odds": [round(v, 4) for _, v in known],
        "unread": len(games) - len(known),
        "flipped": sum(bool(o.evidence.get("flipped")) for _, v, o in games if v is not None),
    }
    return Opinion(value, f"wins {value:.0%} against {len(known)} other replies", evidence, raw, cost)


def difference(a: Opinion, b: Opinion, scale: float) -> Opinion:
    """Two opinions on single replies as one on the pair; missing when either is."""
    cost = a.cost + b.cost
    raw = "\n".join(x.raw for x in (a, b) if x.raw)
    if a.value is None or b.value is None:
        return Opinion(None, a.reason if a.value is None else b.reason, {}, raw, cost)
    evidence = {"first": round(a.value, 4), "second": round(b.value, 4)}
    return Opinion(scale * (a.value - b.value), f"first: {a.reason}; second: {b.reason}", evidence, raw, cost)


class CodeJudge:
    """A user's own judge: `package.module:name`, a function or a class that is called without arguments.

    It takes (prompt, reply) and gives a number, or (prompt, first, second) and gives the log-odds
    that the first is better; texts are strings. None is an abstention, and so is what is not a finite
    number. An exception is one as well, with its message as the reason: it must not end a run that
    took hours.

    Raises:
        RecipeError: There is no such name, or it takes other arguments.
    """

    def __init__(self, name: str, where: str) -> None:
        self.name = name
        self._call = _import(where)
        self._pairs = _arity(self._call, where) == 3
        try:
            source = inspect.getsource(inspect.getmodule(self._call) or self._call)
        except (OSError, TypeError):
            source = where
        self.version = content_hash(["code", where, source])

    def judge(self, prompts: Sequence[Prompt], generations_PG: Sequence[Sequence[Generation]]) -> list[list[Verdict]]:
        """One verdict a generation."""
        table = []
        for prompt, group in zip(prompts, generations_PG, strict=True):
            opinions = [self._opinion(prompt, group, i) for i in range(len(group))]
            table.append(
                [
                    Verdict(self.name, self.version, g.id, prompt.hash, o.value, o.reason, o.evidence, o.cost)
                    for g, o in zip(group, opinions, strict=True)
                ]
            )
        return table

    def compare(self, pairs: Sequence[Pair]) -> list[Opinion]:
        """One opinion a pair."""
        if self._pairs:
            told = [
                (self._ask(p.prompt.text, p.first, p.second), self._ask(p.prompt.text, p.second, p.first))
                for p in pairs
            ]
            return [_both_orders(ab, ba) for ab, ba in told]
        return [difference(self._ask(p.prompt.text, p.first), self._ask(p.prompt.text, p.second), 1.0) for p in pairs]

    def _opinion(self, prompt: Prompt, group: Sequence[Generation], i: int) -> Opinion:
        if not self._pairs:
            return self._ask(prompt.text, group[i].text)
        others = [j for j in range(len(group)) if j != i]
        told = self.compare([Pair(prompt, group[i].text, group[j].text) for j in others])
        return _record([(j, o.value, o) for j, o in zip(others, told, strict=True)])

    def _ask(self, *texts: str) -> Opinion:
        started = time.perf_counter()
        try:
            found = self._call(*texts)
        except Exception as error:  # noqa: BLE001 - a user's code may fail in any way, and becomes an abstention
            return Opinion(None, f"abstains: {type(error).__name__}: {error}")
        cost = Cost(time.perf_counter() - started)
        if found is None:
            return Opinion(None, "abstains", cost=cost)
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            return Opinion(None, f"abstains: {self.name} gave {found!r}, which is no finite number", cost=cost)
        return Opinion(float(found), f"{self.name} says {found:.3g}", cost=cost)


def _both_orders(ab: Opinion, ba: Opinion) -> Opinion:
    if ab.value is None or ba.value is None:
        return ab if ab.value is None else ba
    value, position = (ab.value - ba.value) / 2, (ab.value + ba.value) / 2
    evidence = {"position": round(position, 4), "flipped": abs(position) > abs(value)}
    return Opinion(value, ab.reason, evidence, cost=ab.cost + ba.cost)


def _import(where: str) -> Callable[..., Any]:
    module, colon, name = where.partition(":")
    try:
        found = getattr(importlib.import_module(module), name) if colon else None
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"the judge '{where}' cannot be imported ({error})",
            expected="package.module:name of something that can be imported here",
            fix="check the name, and that its folder is on PYTHONPATH",
        ) from error
    made = found() if inspect.isclass(found) else found
    if not callable(made):
        raise RecipeError(f"the judge '{where}' cannot be called", expected="a function, or a class with __call__")
    return cast("Callable[..., Any]", made)


def _arity(call: Callable[..., Any], where: str) -> int:
    required = [
        p
        for p in inspect.signature(call).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) not in (2, 3):
        raise RecipeError(
            f"the judge '{where}' takes {len(required)} arguments",
            expected="(prompt, reply) for a rating, or (prompt, first, second) for log-odds",
        )
    return len(required)
