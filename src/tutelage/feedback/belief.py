"""What a question calls for, as a belief fused from the judges that have something to say on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from tutelage.feedback.critic import KINDS

__all__ = ["Belief", "consistency_odds", "fuse"]


@dataclasses.dataclass(frozen=True)
class Belief:
    """Probability of each kind of question; `sources` say who contributed, `spread` how sure."""

    answerable: float
    unanswerable: float
    ambiguous: float
    spread: float
    sources: tuple[str, ...]

    def of(self, kind: str) -> float:
        """Probability of one kind; `any` is certain."""
        return 1.0 if kind == "any" else float(getattr(self, kind))

    @property
    def kind(self) -> str:
        """The most likely kind."""
        return max(KINDS, key=self.of)

    @property
    def answer_due(self) -> float:
        """How surely an answer may not be withheld: nothing unless answerable is the most likely kind.

        Were every small chance counted, the many questions that hardly have an answer would push
        together against abstaining on them.
        """
        return self.answerable if self.kind == "answerable" else 0.0

    def as_dict(self) -> dict[str, float]:
        """For evidence."""
        return {k: round(self.of(k), 4) for k in KINDS}


def consistency_odds(cohesion_P: Sequence[float | None]) -> list[float]:
    """Log-odds that an answer is known, from how alike the samples are, judged against the batch.

    (cohesion - median) / median absolute deviation, clipped to [-2, 2]; 0 where nothing was measured.
    A relative scale needs no calibration set, and cannot call everything unknown.
    """
    known = sorted(c for c in cohesion_P if c is not None)
    if len(known) < 8:
        return [0.0] * len(cohesion_P)
    middle = known[len(known) // 2]
    deviation = sorted(abs(c - middle) for c in known)[len(known) // 2] + 1e-6
    return [0.0 if c is None else max(-2.0, min(2.0, (c - middle) / deviation)) for c in cohesion_P]


def fuse(needs: Sequence[float] | None, spread: float, odds: float | None, *, weight: float) -> Belief | None:
    """Combine the critic's probabilities with consistency's log-odds.

    Args:
        needs: The critic's probability a kind, in the order of KINDS, or None without a critic.
        spread: The critic's ensemble spread.
        odds: Consistency's log-odds for answerable against unanswerable, or None without it.
        weight: What one unit of `odds` counts.

    Returns:
        The belief, or None when nobody has an opinion. Consistency moves probability between
        answerable and unanswerable only: of ambiguity it knows nothing.
    """
    if needs is None and odds is None:
        return None
    prior = list(needs) if needs is not None else [0.5, 0.5, 0.0]
    sources = (("critic",) if needs is not None else ()) + (("consistency",) if odds is not None else ())
    shift = (odds or 0.0) * weight / 2.0
    scores = [prior[0] * math.exp(shift), prior[1] * math.exp(-shift), prior[2]]
    total = sum(scores)
    a, u, q = (s / total for s in scores)
    return Belief(a, u, q, spread, sources)
