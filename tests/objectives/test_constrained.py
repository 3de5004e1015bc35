"""The multiplier by hand, and a constrained problem whose answer linear programming knows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from tutelage.config import Constraint
from tutelage.objectives.constrained import PidMultiplier, mix_advantages


def test_three_updates_by_hand() -> None:
    """Limit 0.1, Kp 2, Ki 1, Kd 3.

    J = 0.3: e = 0.2,  I = 0.2,  no rise yet       -> 0.4 + 0.2 + 0   = 0.6
    J = 0.4: e = 0.3,  I = 0.5,  rise 0.1          -> 0.6 + 0.5 + 0.3 = 1.4
    J = 0.2: e = 0.1,  I = 0.6,  fall counts as 0  -> 0.2 + 0.6 + 0   = 0.8
    J = 0.0: e = -0.1, I = 0.5                     -> -0.2 + 0.5      = 0.3
    """
    pid = PidMultiplier(limit=0.1, kp=2.0, ki=1.0, kd=3.0, maximum=5.0)
    assert [pid.update(cost) for cost in (0.3, 0.4, 0.2, 0.0)] == pytest.approx([0.6, 1.4, 0.8, 0.3])


def test_the_integral_never_goes_below_zero() -> None:
    """J = 0 ten times: without the floor I would be -1 and the next violation would go unpunished."""
    pid = PidMultiplier(limit=0.1, kp=0.0, ki=1.0, kd=0.0, maximum=5.0)
    assert [pid.update(0.0) for _ in range(10)] == [0.0] * 10
    assert pid.update(0.4) == pytest.approx(0.3)


def test_the_cap_holds_and_the_integral_does_not_wind_up_behind_it() -> None:
    pid = PidMultiplier(limit=0.0, kp=0.0, ki=2.0, kd=0.0, maximum=3.0)
    assert max(pid.update(1.0) for _ in range(100)) == 3.0
    # I was held at 3 / 2 = 1.5, so one step of -0.5 (I = 1.0) is felt at once: 2 * 1.0.
    pid.limit = 0.5
    assert pid.update(0.0) == pytest.approx(2.0)


@given(costs=st.lists(st.floats(0, 1), min_size=1, max_size=30), ki=st.sampled_from([0.0, 0.5, 2.0]))
def test_state_survives_a_checkpoint(costs: list[float], ki: float) -> None:
    whole, first, second = (PidMultiplier(0.1, 4.0, ki, 1.0, 5.0) for _ in range(3))
    expected = [whole.update(c) for c in costs]
    assert all(0.0 <= value <= 5.0 for value in expected)
    half = len(costs) // 2
    got = [first.update(c) for c in costs[:half]]
    second.load(json.loads(json.dumps(first.state())))
    assert second == first
    assert got + [second.update(c) for c in costs[half:]] == expected


def test_mixing_by_hand() -> None:
    """(1 - 3 * 2) / (1 + 3) = -1.25 and (-1 - 3 * -1) / 4 = 0.5; without a multiplier the reward alone."""
    reward, cost = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, -1.0]])
    assert mix_advantages(reward, cost, 3.0).tolist() == [[-1.25, 0.5]]
    assert torch.equal(mix_advantages(reward, cost, 0.0), reward)


@given(multiplier=st.floats(0, 100), size=st.floats(0.1, 10))
def test_mixing_keeps_the_steps_size(multiplier: float, size: float) -> None:
    """Two advantages within +-size give one within +-size, and zero-sum groups stay zero-sum."""
    random = torch.Generator().manual_seed(int(size * 1000))
    reward, cost = (size * (2 * torch.rand(3, 4, generator=random, dtype=torch.float64) - 1) for _ in range(2))
    reward, cost = reward - reward.mean(-1, keepdim=True), cost - cost.mean(-1, keepdim=True)
    mixed = mix_advantages(reward, cost, multiplier)
    assert float(mixed.abs().max()) <= max(float(reward.abs().max()), float(cost.abs().max())) + 1e-9
    assert float(mixed.sum(-1).abs().max()) < 1e-9


# ---- four prompts, five arms, costly arms pay more: what linear programming says is the yardstick ----

LIMIT = 0.3


@dataclasses.dataclass
class Bandit:
    """Rewards and costs, and the linear programme's optimum and multiplier."""

    reward_PA: np.ndarray
    cost_PA: np.ndarray
    best: float
    dual: float

    @classmethod
    def draw(cls, seed: int) -> Bandit:
        random = np.random.default_rng(seed)
        spice, cost = random.random((4, 5)), random.random((4, 5))
        reward = 0.6 * cost + 0.4 * spice
        one_policy = np.kron(np.eye(4), np.ones(5))
        found = linprog(-reward.ravel() / 4, [cost.ravel() / 4], [LIMIT], one_policy, np.ones(4))
        return cls(reward, cost, -float(found.fun), -float(found.ineqlin.marginals[0]))

    def learn(self, pid: PidMultiplier, steps: int = 600) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(costs, rewards, multipliers) of natural policy-gradient ascent from a cautious start."""
        reward, cost = torch.tensor(self.reward_PA), torch.tensor(self.cost_PA)
        logits = -6.0 * cost
        history = []
        for _ in range(steps):
            policy = logits.softmax(-1)
            mean_r, mean_c = ((policy * x).sum(-1, keepdim=True) for x in (reward, cost))
            multiplier = pid.update(float(mean_c.mean()))
            history.append((float(mean_c.mean()), float(mean_r.mean()), multiplier))
            logits = logits + mix_advantages(reward - mean_r, cost - mean_c, multiplier)
        costs, rewards, multipliers = np.array(history).T
        return costs, rewards, multipliers


def recipe_gains(maximum: float = 20.0) -> PidMultiplier:
    c = Constraint()
    return PidMultiplier(LIMIT, c.kp, c.ki, c.kd, maximum)


@pytest.mark.parametrize("seed", range(6))
def test_the_multiplier_loop_finds_the_constrained_optimum(seed: int) -> None:
    bandit = Bandit.draw(seed)
    costs, rewards, multipliers = bandit.learn(recipe_gains())
    assert bandit.dual > 0.1  # the constraint binds, otherwise this proves nothing
    assert np.abs(costs[-100:] - LIMIT).max() < 0.02
    assert (bandit.best - rewards[-100:]).max() < 0.02 * bandit.best
    assert multipliers[-1] == pytest.approx(bandit.dual, rel=0.05)


def test_pid_halves_the_overshoot_of_the_integral_alone() -> None:
    def overshoot(make: Callable[[], PidMultiplier]) -> np.ndarray:
        return np.array([(Bandit.draw(s).learn(make())[0] - LIMIT).max() for s in range(6)])

    alone = overshoot(lambda: PidMultiplier(LIMIT, 0.0, 0.2, 0.0, 20.0))
    pid = overshoot(lambda: PidMultiplier(LIMIT, 4.0, 0.2, 1.0, 20.0))
    assert alone.min() > 0.1
    assert np.median(pid / alone) <= 0.5
    assert (pid < alone).all()
