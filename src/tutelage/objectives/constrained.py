"""Constraints: a cost is kept below a limit by a multiplier that a PID controller steers."""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["PidMultiplier", "mix_advantages"]


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
    return (reward_PG - multiplier * cost_PG) / (1.0 + multiplier)
