"""Has a judge changed? A pinned set of items is judged again from time to time, and its residuals are summed.

Served models are exchanged behind their names, and a policy that learns moves away from what its judge
was checked on. A cumulative sum finds a small lasting shift long before any single look would.

Source: Page 1954, Biometrika 41; constants by simulation (tests/feedback/test_drift.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

from tutelage.errors import InputError

__all__ = ["Action", "Cusum", "action_of"]

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
