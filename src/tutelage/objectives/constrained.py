"""Constraints: a cost is kept below a limit by a multiplier that a PID controller steers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from tutelage.errors import InputError, RecipeError, StoreError

__all__ = [
    "Constraints",
    "CostLimit",
    "PidMultiplier",
    "cvar",
    "lexicographic",
    "mix_advantages",
    "mix_costs",
    "rectify",
    "unit_scale",
    "violation_rate",
]

_KINDS = ("mean", "prompt", "reply")


@dataclasses.dataclass
class PidMultiplier:
    """lambda = max(0, Kp e + Ki I + Kd max(0, J - J_before)) with e = J - limit, I = max(0, I + e).

    Objective: the saddle point of max_pi min_lambda R - lambda (J - limit).
    Difference: plain gradient ascent on lambda is the integral part alone, and oscillates.
    Assumption: the measured cost is calibrated. A cost that drifts from what it should measure
    drives lambda to its cap, and the policy with it; hence the cap.
    Source: Stooke et al. 2020 (arXiv 2007.03964), algorithm 2.
    """

    limit: float
    kp: float
    ki: float
    kd: float
    maximum: float
    integral: float = 0.0
    previous: float | None = None
    value: float = 0.0

    def update(self, cost: float) -> float:
        """Take a round's mean cost in; returns the multiplier."""
        error = cost - self.limit
        self.integral = min(max(0.0, self.integral + error), self.maximum / max(self.ki, 1e-9))
        rise = max(0.0, cost - self.previous) if self.previous is not None else 0.0
        self.previous = cost
        wanted = self.kp * error + self.ki * self.integral + self.kd * rise
        self.value = min(max(0.0, wanted), self.maximum)
        return self.value

    def state(self) -> dict[str, float | None]:
        """What a checkpoint must keep."""
        return {"integral": self.integral, "previous": self.previous, "value": self.value}

    def load(self, state: dict[str, float | None]) -> None:
        """Take a checkpoint's state over."""
        self.integral = float(state["integral"] or 0.0)
        self.previous = None if state["previous"] is None else float(state["previous"])
        self.value = float(state["value"] or 0.0)


def mix_advantages(reward_PG: torch.Tensor, cost_PG: torch.Tensor, multiplier: float) -> torch.Tensor:
    """(A_R - lambda A_C) / (1 + lambda): the step keeps its size whatever lambda is.

    Both advantages are expected on the same scale (the same normalisation).
    Source: Dai et al. 2023 (arXiv 2310.12773), the PPO-Lag update of Safe RLHF.
    """
    return mix_costs(reward_PG, [(cost_PG, multiplier)])


def mix_costs(reward_PG: torch.Tensor, costs: Iterable[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """(A_R - sum_k lambda_k A_k) / (1 + sum_k lambda_k) over costs' advantages and their multipliers."""
    total_PG, weight = reward_PG, 0.0
    for cost_PG, multiplier in costs:
        total_PG, weight = total_PG - multiplier * cost_PG, weight + multiplier
    return total_PG / (1.0 + weight)


def unit_scale(advantage_PG: torch.Tensor) -> torch.Tensor:
    """Advantages divided by their root mean square where they are not zero; all zeros stay zeros.

    The multiplier then weighs reward against cost on one scale. It is no longer the price of the cost in
    the reward's units, which is what the dual of the problem would be.
    """
    used = advantage_PG[advantage_PG != 0.0]
    return advantage_PG / used.square().mean().sqrt() if used.numel() else advantage_PG


def rectify(cost_PG: torch.Tensor, *, threshold: float = 0.0, per: str = "prompt") -> torch.Tensor:
    """The part of a cost that no other prompt's savings can pay for.

    Args:
        cost_PG: Costs, NaN where missing.
        threshold: What is allowed.
        per: `reply`: max(0, C - threshold) of each reply. `prompt`: C - threshold where the prompt's mean
            exceeds the threshold, else 0; its mean over a prompt is {mean C - threshold}+, and its gradient
            that of the cost where the prompt fails and none where it holds. `mean`: C - threshold.

    Returns:
        cost_PG, NaN where it was.

    Raises:
        RecipeError: There is no such `per`.

    Source: Peng et al. 2024, RePO (arXiv 2410.19933), whose penalty is the one per reply.
    """
    if per not in _KINDS:
        raise RecipeError(f"cost per {per!r}", expected=" or ".join(_KINDS), fix="take prompt")
    over_PG = cost_PG - threshold
    if per == "reply":
        return over_PG.clamp_min(0.0)
    if per == "prompt":
        fails_P1 = over_PG.nanmean(-1, keepdim=True) > 0.0
        return torch.where(fails_P1 | over_PG.isnan(), over_PG, 0.0)
    return over_PG


@dataclasses.dataclass
class CostLimit:
    """One cost, its limit and the multiplier that enforces it.

    Args:
        multiplier: Its `limit` is what the measured cost may be: of the cost itself with per = mean, and of
            what is rectified otherwise. That never falls below zero, so that without this slack the
            multiplier could only rise, until nothing but the cost counts.
        threshold: Cost allowed to a prompt or reply; 0 with per = mean, whose limit says it.
        per: See `rectify`.
    """

    multiplier: PidMultiplier
    threshold: float = 0.0
    per: str = "mean"

    def __post_init__(self) -> None:
        """Refuse a multiplier that could never fall.

        Raises:
            RecipeError: per is unknown, the slack is missing, or the threshold is given twice.
        """
        if self.per not in _KINDS:
            raise RecipeError(f"cost per {self.per!r}", expected=" or ".join(_KINDS), fix="take prompt")
        if self.per == "mean" and self.threshold != 0.0:
            raise RecipeError(
                f"threshold {self.threshold} with a limit on the mean",
                expected="threshold 0",
                fix="put it into the multiplier's limit",
            )
        if self.per != "mean" and not self.multiplier.limit > 0.0:
            raise RecipeError(
                f"a rectified cost with limit {self.multiplier.limit}",
                expected="above 0, the slack",
                fix="take a small one, such as 0.02: otherwise the multiplier never falls",
            )


class Constraints:
    """Several costs, each kept below its own limit by its own multiplier.

    Objective: the saddle point of R - sum_k lambda_k (J_k - limit_k), the step scaled by 1 / (1 + sum lambda).
    Difference: one weighted sum of costs lets the policy buy one harm with another; here each limit binds.
    Assumption: all limits can be met at once, and reward and costs come on one scale (`unit_scale`). If the
    limits contradict each other, their multipliers rise to the caps and the reward is drowned: watch them.
    Source: Dai et al. 2023 (arXiv 2310.12773), PPO-Lag; Stooke et al. 2020 (arXiv 2007.03964), algorithm 2.
    """

    def __init__(self, limits: Mapping[str, CostLimit]) -> None:
        self.limits = dict(limits)

    @property
    def multipliers(self) -> dict[str, float]:
        """Current values by cost."""
        return {name: limit.multiplier.value for name, limit in self.limits.items()}

    def costs(self, raw: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Costs as the limits read them, whose advantages steer the policy; the mean is left as it is.

        Raises:
            InputError: A cost is missing or unknown.
        """
        self._check(raw)
        return {
            name: raw[name] if limit.per == "mean" else rectify(raw[name], threshold=limit.threshold, per=limit.per)
            for name, limit in self.limits.items()
        }

    def update(self, raw: Mapping[str, torch.Tensor]) -> dict[str, float | None]:
        """Take a round's costs in, once a round; a cost without a valid entry leaves its multiplier alone.

        Args:
            raw: cost_PG by name, NaN where missing. Each prompt weighs the same, however many of its
                replies have a cost.

        Returns:
            The measured cost by name, None where nothing was measured.

        Raises:
            InputError: A cost is missing or unknown.
        """
        seen: dict[str, float | None] = {}
        for name, cost_PG in self.costs(raw).items():
            mean_P = cost_PG.nanmean(-1)
            valid_P = mean_P[~mean_P.isnan()]
            seen[name] = measured = float(valid_P.mean()) if valid_P.numel() else None
            if measured is not None:
                self.limits[name].multiplier.update(measured)
        return seen

    def mix(self, reward_PG: torch.Tensor, cost_advantages: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(A_R - sum_k lambda_k A_k) / (1 + sum_k lambda_k); with one cost this is `mix_advantages`.

        Raises:
            InputError: A cost is missing or unknown.
        """
        self._check(cost_advantages)
        return mix_costs(reward_PG, [(cost_advantages[name], value) for name, value in self.multipliers.items()])

    def _check(self, given: Mapping[str, torch.Tensor]) -> None:
        if set(given) != set(self.limits):
            raise InputError(
                f"costs {', '.join(sorted(given)) or 'none'}",
                expected=", ".join(sorted(self.limits)) or "none",
                fix="measure every cost that has a limit; NaN where a reply has none",
            )

    def state(self) -> dict[str, dict[str, float | None]]:
        """What a checkpoint must keep, by cost."""
        return {name: limit.multiplier.state() for name, limit in self.limits.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a checkpoint's state over.

        Raises:
            StoreError: It is of other costs.
        """
        if set(state) != set(self.limits):
            raise StoreError(
                f"a checkpoint with the costs {', '.join(sorted(state)) or 'none'}",
                expected=", ".join(sorted(self.limits)) or "none",
                fix="resume with the recipe that the run began with",
            )
        for name, limit in self.limits.items():
            limit.multiplier.load(state[name])


def lexicographic(
    advantages: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    targets: Sequence[float],
    tolerances: Sequence[float],
) -> torch.Tensor:
    """Advantages in tiers: a tier counts only on replies where every tier above it holds within tolerance.

    A_1 + sum_(k>1) A_k * prod_(j<k) 1[value_j >= target_j - tolerance_j]. A missing value does not hold.

    Args:
        advantages: advantage_PG of each tier, the most important first.
        values: value_PG of each tier (higher is better), NaN where missing; the last one is never asked.
        targets: What each tier but the last must reach.
        tolerances: How far below it may stay, at least 0.

    Raises:
        InputError: The tiers do not match in number, or a tolerance is negative.

    Source: Skalse et al. 2022 (arXiv 2212.13769); the indicator is a simple form of it.
    """
    tiers = len(advantages)
    if not tiers or len(values) not in (tiers - 1, tiers) or not len(targets) == len(tolerances) == tiers - 1:
        raise InputError(
            f"{tiers} tiers with {len(values)} values, {len(targets)} targets and {len(tolerances)} tolerances",
            expected="at least one tier; a value, a target and a tolerance for each but the last",
            fix="give one of each a tier",
        )
    if any(not tolerance >= 0.0 for tolerance in tolerances):
        raise InputError(f"tolerances {list(tolerances)}", expected="at least 0", fix="lower the target instead")
    total, holds = advantages[0], torch.ones_like(advantages[0], dtype=torch.bool)
    for advantage, value, target, tolerance in zip(
        advantages[1:], values[: tiers - 1], targets, tolerances, strict=True
    ):
        holds = holds & (value >= target - tolerance)
        total = total + torch.where(holds, advantage, 0.0)
    return total


def cvar(cost: torch.Tensor, *, level: float = 0.95) -> float | None:
    """Mean of the worst (1 - level) share of costs, the last one in part; None where all are missing.

    min over t of t + E[max(0, C - t)] / (1 - level), which is exact for any number of costs.

    Raises:
        RecipeError: The level is not from 0 to below 1. 0 is the plain mean.

    Source: Rockafellar & Uryasev 2000, theorem 1.
    """
    if not 0.0 <= level < 1.0:
        raise RecipeError(f"level {level}", expected="at least 0, below 1", fix="take 0.95")
    valid = cost[~cost.isnan()].double()
    if not valid.numel():
        return None
    # The minimum is at a quantile, and every quantile of a sample is one of its entries.
    share = (1.0 - level) * valid.numel()
    ordered = valid.sort(descending=True).values
    whole = min(math.floor(share), valid.numel() - 1)
    return float((ordered[:whole].sum() + (share - whole) * ordered[whole]) / share)


def violation_rate(cost: torch.Tensor, *, threshold: float = 0.0) -> float | None:
    """Share of costs above the threshold, of those that are there; None where all are missing."""
    valid = cost[~cost.isnan()]
    return float((valid > threshold).double().mean()) if valid.numel() else None
