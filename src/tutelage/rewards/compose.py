"""One reward from many terms: each normalised within its group first, then weighed.

Summing first would let the loudest term win. A missing term is missing: its weight is shared by
the others of that reply, and a reply without any term has no reward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tutelage.records import Reward

__all__ = ["compose", "normalise"]


def normalise(values_G: Sequence[float | None]) -> list[float | None]:
    """(v - mean) / standard deviation over what is there; all zero when it does not vary.

    A single value cannot be compared with anything and becomes missing.
    """
    known = [v for v in values_G if v is not None]
    if len(known) < 2:
        return [None for _ in values_G]
    mean = math.fsum(known) / len(known)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1))
    if spread < 1e-6:
        return [None if v is None else 0.0 for v in values_G]
    return [None if v is None else (v - mean) / spread for v in values_G]


def compose(
    ids_G: Sequence[str],
    raw_KG: Mapping[str, Sequence[float | None]],
    weights: Mapping[str, float],
    costs_G: Sequence[Mapping[str, float]],
    *,
    essential: Sequence[str] = (),
) -> list[Reward]:
    """Rewards of one group.

    Args:
        ids_G: Ids of the group's generations.
        raw_KG: Each term's raw value a generation, None where a judge abstained.
        weights: Weight a term; a term without weight takes no part.
        costs_G: Constrained quantities a generation; kept beside the reward, not in it.
        essential: Terms that carry opinion on content. A reply for which all of these are missing
            has no reward: text terms alone must not train.

    Returns:
        One reward a generation: total = sum_k w_k z_k / sum_k w_k over the terms that are there.
    """
    active = {k: w for k, w in weights.items() if w > 0 and k in raw_KG}
    scaled = {k: normalise(raw_KG[k]) for k in active}
    rewards = []
    for g, name in enumerate(ids_G):
        terms = {k: scaled[k][g] for k in active}
        known = {k: v for k, v in terms.items() if v is not None}
        heard = not essential or any(k in known for k in essential if k in active)
        mass = math.fsum(active[k] for k in known)
        total = math.fsum(active[k] * v for k, v in known.items()) / mass if known and heard else None
        raw = {k: raw_KG[k][g] for k in raw_KG}
        rewards.append(Reward(name, total, terms, raw, dict(costs_G[g])))
    return rewards
