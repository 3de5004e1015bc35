"""The page as data: what each section of the report shows. Filled by `gather`, drawn by the templates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tutelage.studio.figures import Curve, Measure, ShareBar
from tutelage.studio.samples import Card, HeatReply, Pair, TargetView, Text
from tutelage.studio.triggers import Blamed

__all__ = ["Caps", "Comparison", "DecisionView", "JudgeRow", "Principle", "ReportData"]


@dataclasses.dataclass(frozen=True, slots=True)
class Caps:
    """How much the page shows at most; every sum still counts everything."""

    pairs: int = 36
    cards: int = 24
    targets: int = 18
    heat: int = 12
    lines: int = 40
    points: int = 100
    characters: int = 800

    def smaller(self) -> Caps:
        """Half of everything (texts and lines too), for a page that came out too big."""
        return Caps(**{f.name: max(2, getattr(self, f.name) // 2) for f in dataclasses.fields(self)})


@dataclasses.dataclass(frozen=True, slots=True)
class Principle:
    """One principle of the constitution."""

    id: str
    text: Text
    scope: str
    wants: str
    weight: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """Two versions on one suite. `stand_in`: it is the gate's, for want of held-out replies."""

    suite: str
    before: str
    after: str
    stand_in: bool
    bars: tuple[ShareBar, ...]
    changes: tuple[tuple[str, Mapping[str, int]], ...]
    shown: tuple[Pair, ...]
    total: int


@dataclasses.dataclass(frozen=True, slots=True)
class JudgeRow:
    """One judge's verdicts over the whole run, and why it abstained most often."""

    name: str
    given: int
    abstained: int
    versions: tuple[str, ...]
    reasons: tuple[tuple[Text, int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class DecisionView:
    """One decision of a gate with the numbers it saw."""

    unit: str
    gate: str
    candidate: str
    baseline: str
    accepted: bool
    reason: Text
    evidence: tuple[Measure, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ReportData:
    """Everything the page shows, in the order in which it shows it."""

    run: str
    title: str
    model: str
    state: str
    principles: tuple[Principle, ...]
    constitution: tuple[str, str]
    measures: tuple[Measure, ...]
    measured_by: str
    comparison: Comparison | None
    curves: tuple[Curve, ...]
    judges: tuple[JudgeRow, ...]
    cards: tuple[Card, ...]
    cards_total: int
    heat: tuple[HeatReply, ...]
    heat_total: int
    blamed: tuple[Blamed, ...]
    decisions: tuple[DecisionView, ...]
    decisions_total: int
    targets: tuple[TargetView, ...]
    target_counts: tuple[tuple[tuple[str, ...], int], ...]
    self_view: tuple[tuple[Text, Text, Text], ...]
    failures: tuple[Text, ...]
    losses: tuple[tuple[str, int], ...]
    units: tuple[Mapping[str, Any], ...]
    facts: tuple[tuple[str, str | float | int | None, str], ...]
    hashes: tuple[tuple[str, str], ...]
    critic: tuple[tuple[str, float], ...]
    checks: tuple[tuple[str, str, Text], ...]
    notes: tuple[tuple[str, Text], ...]
    recipe: str
    caps: Caps
    gaps: Mapping[str, str]
