"""Has a judge changed? A pinned set of items is judged again from time to time, and its residuals are summed.

Served models are exchanged behind their names, and a policy that learns moves away from what its judge
was checked on. A cumulative sum finds a small lasting shift long before any single look would.

Source: Page 1954, Biometrika 41; constants by simulation (tests/feedback/test_drift.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from tutelage.engines.answers import CachedEngine
from tutelage.errors import InputError
from tutelage.feedback.asking import chance
from tutelage.feedback.model_judge import ComparingJudge, Pair
from tutelage.records import PreferencePair

__all__ = ["Action", "Anchored", "Cusum", "action_of"]

Action = Literal["keep", "down-weight", "stop"]
# In standard deviations of a residual: half of the shift that is looked for, and the sum that alarms.
_SLACK, _ALARM = 0.2, 10.0
_STOP = 2.0  # sums of this many alarms stop a run


@dataclasses.dataclass
class Cusum:
    """Two-sided cumulative sum over standardised residuals (a judge's verdict now, minus at its check).

    S+ = max(0, S+ + z - k), S- = max(0, S- - z - k), alarm when either passes h. With k = 0.2 and
    h = 10 a judge that did not change alarms once in more than 500 residuals on average, and a lasting
    shift of 0.4 standard deviations (0.1 of a residual that spreads by 0.25) is seen within 60.

    Args:
        sigma: Standard deviation of a residual while nothing changed, above 0; from the check.
        above, below: The sums.
        looks: Residuals seen.
    """

    sigma: float
    above: float = 0.0
    below: float = 0.0
    looks: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise InputError(f"residuals spread by {self.sigma}", expected="a number above 0")

    def update(self, residuals: Iterable[float | None]) -> float:
        """Take residuals in, None for abstentions; returns the larger sum as a share of the alarm's."""
        for residual in residuals:
            if residual is None or not math.isfinite(residual):
                continue
            z = residual / self.sigma
            self.above = max(0.0, self.above + z - _SLACK)
            self.below = max(0.0, self.below - z - _SLACK)
            self.looks += 1
        return self.level

    @property
    def level(self) -> float:
        """The larger sum; 1 is an alarm."""
        return max(self.above, self.below) / _ALARM

    def state(self) -> dict[str, float]:
        """What a checkpoint must keep."""
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, state: dict[str, float]) -> Cusum:
        """From a checkpoint's state."""
        return cls(float(state["sigma"]), float(state["above"]), float(state["below"]), int(state["looks"]))


def action_of(level: float) -> tuple[Action, float]:
    """What to do at a level of the sums, and what the judge's weight is multiplied by.

    Up to an alarm nothing; from there the weight falls as 1 / level; at twice the alarm the run stops.
    """
    if level < 1.0:
        return "keep", 1.0
    if level < _STOP:
        return "down-weight", 1.0 / level
    return "stop", 0.0


_SPREAD = 0.25  # of a probability that a judge gives an anchor, from look to look, while nothing changed


@dataclasses.dataclass
class Anchored:
    """A judge held to what it said of pinned pairs at its first look.

    Args:
        first: Probability it gave each anchor's chosen reply then; None where it abstained.
        sums: The cumulative sums of what changed since.
    """

    first: list[float | None]
    sums: Cusum = dataclasses.field(default_factory=lambda: Cusum(_SPREAD))

    @classmethod
    def look(cls, judge: ComparingJudge, anchors: Sequence[PreferencePair]) -> Anchored:
        """The first look."""
        return cls(_chances(judge, anchors))

    def again(self, judge: ComparingJudge, anchors: Sequence[PreferencePair]) -> tuple[Action, float, float]:
        """Another look: what to do, the factor on the judge's weight, and the level of the sums."""
        now = _chances(judge, anchors)
        changed = [None if a is None or b is None else a - b for a, b in zip(now, self.first, strict=True)]
        level = self.sums.update(changed)
        return (*action_of(level), level)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {"first": self.first, "sums": self.sums.state()}

    @classmethod
    def load(cls, state: dict[str, Any]) -> Anchored:
        """From a checkpoint's state."""
        return cls(list(state["first"]), Cusum.load(state["sums"]))


def _chances(judge: ComparingJudge, anchors: Sequence[PreferencePair]) -> list[float | None]:
    engine = getattr(judge, "engine", None)
    # Kept answers would say the same for ever.
    with engine.anew() if isinstance(engine, CachedEngine) else contextlib.nullcontext():
        told = judge.compare([Pair(a.prompt, a.chosen, a.rejected) for a in anchors])
    return [None if o.value is None else chance(o.value) for o in told]
