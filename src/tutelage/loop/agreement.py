"""How far a policy agrees with held-out pairs: from rows of log-probabilities, as the ledger keeps them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.loop.contest import paired_mean
from tutelage.records import Evidence

__all__ = ["agreement_of", "agreements", "compare_pairs"]

# A row: [prompt, P(first is better), tokens of both, log pi of both, log pi of both under the start model].
Row = Sequence[Any]


def agreement_of(row: Row) -> dict[str, float] | None:
    """Of one pair 1 where the policy sides with the label, 0 where not, 1/2 between; None of a pair without a side.

    `likelihood` compares the replies' log-probabilities, `per_token` their means over tokens, `reward` how much each
    has gained since the start model. `margin` is that gain's difference in nats, in the label's direction.
    """
    _, label, first_tokens, second_tokens, first, second, first_start, second_start = row
    side = math.copysign(1.0, label - 0.5) if label != 0.5 else 0.0
    if not side:
        return None
    margin = side * ((first - first_start) - (second - second_start))
    return {
        "likelihood": _step(side * (first - second)),
        "per_token": _step(side * (first / first_tokens - second / second_tokens)),
        "reward": _step(margin),
        "margin": margin,
    }


def _step(x: float) -> float:
    return 1.0 if x > 0 else 0.0 if x < 0 else 0.5


def agreements(rows: Sequence[Row]) -> dict[str, float]:
    """Means over the pairs that have a side, and `sided`, how many these are."""
    found = [a for row in rows if (a := agreement_of(row)) is not None]
    means = {key: math.fsum(a[key] for a in found) / len(found) for key in (found[0] if found else ())}
    return means | {"sided": float(len(found))}


def compare_pairs(before: Sequence[Row], after: Sequence[Row], *, confidence: float = 0.95) -> list[Evidence]:
    """Agreement with the held-out pairs before and after, with paired bootstrap intervals of the difference."""
    table: Mapping[str, list[tuple[float, float]]] = {key: [] for key in ("reward", "likelihood", "per_token")}
    for old, new in zip(before, after, strict=True):
        was, now = agreement_of(old), agreement_of(new)
        if was is not None and now is not None:
            for key, values in table.items():
                values.append((was[key], now[key]))
    found = []
    for key, values in table.items():
        old, new = [b for b, _ in values], [a for _, a in values]
        low, high = paired_mean(old, new, confidence=confidence)
        n = len(values)
        was_mean, now_mean = (math.fsum(v) / n if n else None for v in (old, new))
        found.append(Evidence("pairs", f"pairs_{key}", was_mean, now_mean, low, high, n))
    return found
