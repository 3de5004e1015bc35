"""Which samples the report shows: balanced, deterministic, regressions and disagreement first.

Within a group the order follows a hash of the id, so that nobody picks the nice ones by hand. All
counts are over everything the ledger holds, whatever is shown.
"""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from tutelage.studio.wording import outcome_label, standing

__all__ = [
    "Card",
    "HeatReply",
    "Pair",
    "Part",
    "Side",
    "TargetView",
    "Text",
    "VerdictView",
    "balanced",
    "cards",
    "clip",
    "figures_of",
    "heat_replies",
    "order_key",
    "pairs",
    "tally",
    "targets",
]

Rows = Sequence[Mapping[str, Any]]
Row = Mapping[str, Any]
Figures = tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
T = TypeVar("T")

_RANK = {"wanted": 2, "cautious": 1, "false": 0}
_DISAGREE = 0.5  # from this distance between two judges a card counts as a disagreement
_HEAT_LEVELS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """A text of a person or a model, cut for display; `length` is what it had, in characters."""

    shown: str
    length: int

    @property
    def cut(self) -> bool:
        """Whether a part is left out."""
        return len(self.shown) < self.length


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """One version's reply to a held-out question."""

    text: Text
    outcome: str
    label: str
    standing: str


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """One question before and after; `change` is better, worse or same."""

    item: str
    kind: str
    form: str
    prompt: Text
    reference: str
    before: Side
    after: Side
    change: str


@dataclasses.dataclass(frozen=True, slots=True)
class VerdictView:
    """One verdict; value None is an abstention."""

    judge: str
    value: float | None
    reason: Text
    figures: Figures


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One term of a reward: raw value, value within its group, weight in the recipe (None: unknown)."""

    name: str
    raw: float | None
    scaled: float | None
    weight: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Card:
    """One judged reply. `rewarded` says whether a reward row exists; its total may still be missing."""

    id: str
    unit: str
    version: str
    prompt: Text
    reply: Text
    finished: bool
    verdicts: tuple[VerdictView, ...]
    rewarded: bool
    total: float | None
    parts: tuple[Part, ...]
    costs: tuple[tuple[str, float], ...]
    spread: float | None

    @property
    def abstained(self) -> int:
        """Judges without an opinion."""
        return sum(v.value is None for v in self.verdicts)

    @property
    def group(self) -> str:
        """For the balance: judges disagree, or these abstained, or all agree."""
        if self.spread is not None and self.spread >= _DISAGREE:
            return "disagree"
        silent = [v.judge for v in self.verdicts if v.value is None]
        return "abstained: " + ", ".join(silent) if silent else "agree"

    @property
    def recomputes(self) -> bool | None:
        """Whether total = sum(weight x scaled) / sum(weight) over terms that are there; None: unknown."""
        there = [p for p in self.parts if p.scaled is not None]
        if self.total is None or not there or any(p.weight is None for p in there):
            return None
        mass = sum(p.weight or 0.0 for p in there)
        value = sum((p.weight or 0.0) * (p.scaled or 0.0) for p in there) / mass if mass else 0.0
        return abs(value - self.total) < 1e-6


@dataclasses.dataclass(frozen=True, slots=True)
class HeatReply:
    """One reply with credit a token: (piece, credit, level), level -5..5 relative to the largest shown."""

    id: str
    unit: str
    prompt: Text
    method: str
    advantage: float
    tokens: tuple[tuple[str, float, int], ...]
    left_out: int


@dataclasses.dataclass(frozen=True, slots=True)
class TargetView:
    """One text that the supervised stage imitated, and what the model had said itself."""

    prompt: Text
    text: Text
    origin: str
    principle: str
    reason: Text
    weight: float
    had_said: Text | None


def clip(text: Any, most: int) -> Text:
    """At most `most` characters; cuts neither before a combining mark nor inside an emoji sequence."""
    whole = str(text)
    end = min(most, len(whole))
    while 0 < end < len(whole) and (unicodedata.combining(whole[end]) or "\u200d" in whole[end - 1 : end + 1]):
        end -= 1
    return Text(whole[:end], len(whole))


def order_key(name: str) -> str:
    """A fixed order that has nothing to do with content."""
    return hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()


def balanced(items: Iterable[T], group: Callable[[T], Hashable], rank: Callable[[T], Any], most: int) -> list[T]:
    """Up to `most` items, one from each group in turn, each group in the order of `rank`."""
    queues: dict[Hashable, list[T]] = {}
    for item in items:
        queues.setdefault(group(item), []).append(item)
    for queue in queues.values():
        queue.sort(key=rank)
    chosen: list[T] = []
    depth = 0
    while len(chosen) < most and any(len(q) > depth for q in queues.values()):
        chosen += [q[depth] for q in queues.values() if len(q) > depth][: most - len(chosen)]
        depth += 1
    return chosen


def pairs(outcomes: Rows, before: str, after: str, length: int) -> list[Pair]:
    """Questions that both versions answered, in the suite's order."""
    later = {o["item"]: o for o in outcomes if o["version"] == after}
    found = []
    for first in (o for o in outcomes if o["version"] == before and o["item"] in later):
        last = later[first["item"]]
        sides = [_side(first, length), _side(last, length)]
        step = _RANK[sides[1].standing] - _RANK[sides[0].standing]
        change = "better" if step > 0 else "worse" if step < 0 else "same"
        found.append(
            Pair(
                first["item"],
                first["kind"],
                first["form"],
                clip(first["prompt"], length),
                first["reference"][:200],
                sides[0],
                sides[1],
                change,
            )
        )
    return found


def _side(row: Row, length: int) -> Side:
    kind, outcome = row["kind"], row["outcome"]
    return Side(clip(row["reply"], length), outcome, outcome_label(kind, outcome), standing(kind, outcome))


def figures_of(evidence: Any, most: int = 12) -> Figures:
    """The numbers behind a verdict, as (group, ((name, value), ...)) in order; deeper names are joined."""
    found: list[tuple[str, str, str]] = []

    def walk(path: tuple[str, ...], value: Any) -> None:
        group, name = (path[0] if len(path) > 1 else ""), " ".join(path[1:] if len(path) > 1 else path)
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk((*path, str(key)[:60]), inner)
        elif isinstance(value, list | tuple):
            found.append((group, name, f"{len(value)} values"))
        elif isinstance(value, float):
            found.append((group, name, f"{value:.2f}".replace("-", "\u2212")))
        elif value is not None:
            found.append((group, name, str(value)[:80]))

    walk((), evidence)
    groups: dict[str, list[tuple[str, str]]] = {}
    for group, name, shown in found[:most]:
        groups.setdefault(group, []).append((name, shown))
    return tuple((group, tuple(entries)) for group, entries in groups.items())


def cards(
    generations: Rows,
    prompts: Mapping[str, str],
    verdicts: Rows,
    rewards: Rows,
    weights: Mapping[str, float],
    length: int,
) -> list[Card]:
    """Every judged reply of one unit, in the ledger's order."""
    heard: dict[str, list[Row]] = {}
    for verdict in verdicts:
        heard.setdefault(verdict["subject"], []).append(verdict)
    paid = {r["generation_id"]: r for r in rewards}
    return [
        _card(g, prompts.get(g["prompt_id"], ""), heard[g["id"]], paid.get(g["id"]), weights, length)
        for g in generations
        if g["id"] in heard
    ]


def _card(row: Row, prompt: str, verdicts: Rows, reward: Row | None, weights: Mapping[str, float], length: int) -> Card:
    # The text judge looks at form alone: it would "disagree" with every well-formed untruth.
    opinions = [v["value"] for v in verdicts if v["value"] is not None and v["judge"] != "text"]
    terms = reward["terms"] if reward else {}
    raw = reward["raw"] if reward else {}
    return Card(
        id=row["id"], unit=row["unit"], version=row["policy_version"], prompt=clip(prompt, length),
        reply=clip(row["text"], length), finished=bool(row["finished"]),
        verdicts=tuple(
            VerdictView(
                v["judge"], v["value"], clip(str(v["reason"]).removeprefix("abstains: "), length),
                figures_of(v["evidence"]),
            )
            for v in verdicts
        ),
        rewarded=reward is not None, total=reward["total"] if reward else None,
        parts=tuple(Part(k, raw.get(k), value, weights.get(k)) for k, value in terms.items()),
        costs=tuple((str(k), float(v)) for k, v in reward["costs"].items()) if reward else (),
        spread=max(opinions) - min(opinions) if len(opinions) > 1 else None,
    )  # fmt: skip


def heat_replies(
    credits: Rows,
    generations: Mapping[str, Row],
    prompts: Mapping[str, str],
    pieces: Mapping[str, Any],
    most: int,
    length: int,
) -> list[HeatReply]:
    """Replies with credit and readable tokens: praised and blamed in turn, largest advantage first."""
    usable = [
        c
        for c in credits
        if c["generation_id"] in generations
        and isinstance(pieces.get(c["generation_id"]), list)
        and len(pieces[c["generation_id"]]) == len(c["credit"]) > 0
    ]
    best: dict[tuple[str, str, bool], Row] = {}
    for c in sorted(usable, key=lambda c: (-abs(c["advantage"]), order_key(c["generation_id"]))):
        best.setdefault((c["unit"], generations[c["generation_id"]]["prompt_id"], c["advantage"] > 0), c)
    chosen = balanced(
        best.values(),
        lambda c: (c["unit"], c["advantage"] > 0),
        lambda c: (-abs(c["advantage"]), order_key(c["generation_id"])),
        most,
    )
    largest = max((abs(x) for c in chosen for x in c["credit"]), default=0.0) or 1.0
    found = []
    for c in chosen:
        row = generations[c["generation_id"]]
        named = list(zip((str(p)[:60] for p in pieces[row["id"]]), c["credit"], strict=True))
        tokens = tuple((p, x, _level(x, largest)) for p, x in named[:96])
        found.append(
            HeatReply(row["id"], c["unit"], clip(prompts.get(row["prompt_id"], ""), length), c["method"],
                      c["advantage"], tokens, len(named) - len(tokens))
        )  # fmt: skip
    return found


def _level(credit: float, largest: float) -> int:
    """-5..5; 0 only for credit too small to show."""
    size = abs(credit) / largest
    step = 0 if size < 0.02 else max(1, round(size * _HEAT_LEVELS))
    return step if credit > 0 else -step


def targets(rows: Rows, prompts: Mapping[str, str], own: Mapping[str, str], most: int, length: int) -> list[TargetView]:
    """A balanced sample of what was imitated, revisions beside what the model had said itself."""
    chosen = balanced(
        rows, lambda t: (t["origin"], t["principle"]), lambda t: order_key(t["prompt_id"] + t["text"]), most
    )
    chosen.sort(key=lambda t: (t["origin"] != "revised", t["principle"]))
    found = []
    for t in chosen:
        prompt, revised = t["prompt_id"], t["origin"] == "revised"
        found.append(
            TargetView(
                prompt=clip(prompts.get(prompt, ""), length),
                text=clip(t["text"], length),
                origin=t["origin"],
                principle=t["principle"],
                reason=clip(t["reason"], length),
                weight=t["weight"],
                had_said=clip(own[prompt], length) if revised and prompt in own else None,
            )
        )
    return found


def tally(rows: Iterable[Row], *keys: str) -> list[tuple[tuple[str, ...], int]]:
    """How many rows have each combination of values, most frequent first."""
    return Counter(tuple(str(r[k]) for k in keys) for r in rows).most_common()
