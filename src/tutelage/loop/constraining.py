"""Costs under limits, and rewards in tiers: what the update makes of verdicts beyond one weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from tutelage.config import Recipe
from tutelage.errors import InputError
from tutelage.objectives.constrained import Constraints, CostLimit, PidMultiplier, lexicographic, mix_costs
from tutelage.records import Reward

__all__ = ["constraints_of", "cost_terms", "hold", "mixed", "tiered"]

Estimate = Callable[[str, torch.Tensor], torch.Tensor]
"""Advantages of a named table of rewards or costs, by the objective's own formula."""


def constraints_of(recipe: Recipe) -> Constraints:
    """The limits of [[constraints]], each with its multiplier at rest."""
    return Constraints(
        {
            c.name: CostLimit(PidMultiplier(c.limit, c.kp, c.ki, c.kd, c.maximum), c.threshold, c.per)
            for c in recipe.constraints
        }
    )


def cost_terms(recipe: Recipe, terms_KG: Mapping[str, Sequence[float | None]], count: int) -> list[dict[str, float]]:
    """Costs of one group's replies: the judge's value, or one minus it; none where the judge abstained.

    Raises:
        InputError: A value is not from 0 to 1. A cost below 0 would turn its advantage round.
    """
    found: list[dict[str, float]] = [{} for _ in range(count)]
    for c in recipe.constraints:
        for costs, value in zip(found, terms_KG.get(c.judge, [None] * count), strict=True):
            if value is None:
                continue
            if not -1e-6 <= value <= 1.0 + 1e-6:
                raise InputError(
                    f"the judge '{c.judge}' says {value:g}, and '{c.name}' makes a cost of it",
                    expected="values from 0 to 1",
                    fix="scale what the judge says, or take another judge",
                )
            costs[c.name] = min(max(value if c.high else 1.0 - value, 0.0), 1.0)
    return found


def _tables(constraints: Constraints, rewards_PG: Sequence[Sequence[Reward]]) -> dict[str, torch.Tensor]:
    """cost_PG by name, NaN where a reply has none."""
    return {
        name: torch.tensor([[r.costs.get(name, math.nan) for r in group] for group in rewards_PG])
        for name in constraints.limits
    }


def hold(constraints: Constraints, rewards_PG: Sequence[Sequence[Reward]]) -> dict[str, float]:
    """Take a round's costs in and move the multipliers, once a round.

    Returns:
        `cost_NAME` and `multiplier_NAME`, and `costless_NAME`, how many replies have no such cost. A cost that nobody
        measured is left out, and its multiplier stays.
    """
    raw = _tables(constraints, rewards_PG)
    found: dict[str, float] = {}
    for name, cost in constraints.update(raw).items():
        if cost is not None:
            found[f"cost_{name}"] = cost
        found[f"multiplier_{name}"] = constraints.multipliers[name]
        found[f"costless_{name}"] = float(raw[name].isnan().sum())
    return found


def mixed(
    advantage_PG: torch.Tensor,
    constraints: Constraints,
    rewards_PG: Sequence[Sequence[Reward]],
    estimate: Estimate,
    *,
    held: Mapping[str, tuple[torch.Tensor, float]],
) -> torch.Tensor:
    """(A - sum_k lambda_k A_k) / (1 + sum_k lambda_k) over the built-in constraint and those of the recipe.

    A cost's advantage is by the objective's formula, times the group's largest cost: normalised within a group of
    harmless replies, a hair's breadth would weigh as much as harm.

    Args:
        advantage_PG: Of the rewards.
        constraints: Limits and multipliers.
        rewards_PG: With their costs. A reply without a reward or without a cost has no cost advantage.
        estimate: The objective's.
        held: Cost advantages and multipliers that are known already, by name.
    """
    missing_PG = torch.tensor([[r.total is None for r in group] for group in rewards_PG])
    found = dict(held)
    raw = _tables(constraints, rewards_PG)
    for name, cost_PG in constraints.costs(raw).items():
        found[name] = (
            estimate(name, torch.where(missing_PG, math.nan, cost_PG)) * raw[name].nan_to_num(0.0).amax(-1, True),
            constraints.multipliers[name],
        )
    return mix_costs(advantage_PG, found.values())


def tiered(
    recipe: Recipe,
    weights: Mapping[str, float],
    rewards_PG: Sequence[Sequence[Reward]],
    estimate: Estimate,
    *,
    extra_PG: torch.Tensor,
) -> torch.Tensor:
    """Advantages in tiers: a later tier counts on replies for which every earlier one has reached its target.

    Where a tier sets no target, later ones compare with each other only the replies that reach the best of their group
    in it, up to its tolerance, among those that hold in the tiers before.

    Args:
        recipe: Its [[tiers]].
        weights: Of the terms, as they make up the reward.
        rewards_PG: With normalised terms (which are compared) and raw ones (which are held against the targets).
        estimate: The objective's.
        extra_PG: What the objective charges beside the verdicts (length, divergence); it goes with the first tier.
    """
    advantages, values, targets = [], [], []
    # A reply whose reward is missing as a whole trains nothing, whatever single terms say.
    holds_PG = torch.tensor([[r.total is not None for r in group] for group in rewards_PG])
    compared_PG = holds_PG
    for number, tier in enumerate(recipe.tiers, 1):
        earned_PG, value_PG = (
            torch.tensor([[_weighed(told, tier.terms, weights) for told in group] for group in table])
            for table in ([[r.terms for r in g] for g in rewards_PG], [[r.raw for r in g] for g in rewards_PG])
        )
        if number == 1:
            earned_PG = earned_PG + extra_PG
        advantages.append(estimate(f"tier {number}", torch.where(compared_PG, earned_PG, math.nan)))
        target = tier.target
        if target is None:
            there_PG = holds_PG & ~value_PG.isnan()
            value_PG, target = value_PG - torch.where(there_PG, value_PG, -math.inf).amax(-1, keepdim=True), 0.0
        holds_PG = holds_PG & (value_PG >= target - tier.tolerance)
        if tier.target is None:
            compared_PG = holds_PG
        values.append(value_PG)
        targets.append(target)
    return lexicographic(advantages, values, targets[:-1], [t.tolerance for t in recipe.tiers[:-1]])


def _weighed(values: Mapping[str, float | None], names: Sequence[str], weights: Mapping[str, float]) -> float:
    """Weighted mean of the terms that are there, NaN where none is."""
    known = [(weights[name], value) for name in names if (value := values.get(name)) is not None]
    mass = math.fsum(w for w, _ in known)
    return math.fsum(w * v for w, v in known) / mass if mass else math.nan
