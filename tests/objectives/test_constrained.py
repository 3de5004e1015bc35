"""The multiplier by hand, and a constrained problem whose answer linear programming knows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from tutelage.config import Constraint
from tutelage.errors import InputError, RecipeError, StoreError
from tutelage.objectives.constrained import (
    Constraints,
    CostLimit,
    PidMultiplier,
    cvar,
    lexicographic,
    mix_advantages,
    rectify,
    unit_scale,
    violation_rate,
)


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


# ---- several costs, each with its own limit ----

NAN = float("nan")


def pid(limit: float, ki: float = 0.2, kp: float = 4.0, kd: float = 1.0, maximum: float = 20.0) -> PidMultiplier:
    return PidMultiplier(limit, kp, ki, kd, maximum)


@settings(max_examples=40)
@given(value=st.floats(0.0, 20.0), seed=st.integers(0, 99))
def test_one_cost_is_mixed_to_the_bit_as_before(value: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    reward, cost = torch.randn(3, 4, generator=random), torch.randn(3, 4, generator=random)
    several = Constraints({"harm": CostLimit(dataclasses.replace(pid(0.1), value=value))})
    assert torch.equal(several.mix(reward, {"harm": cost}), mix_advantages(reward, cost, value))


def test_two_costs_by_hand() -> None:
    """Lambdas 2 and 1: (1 - 2 * 3 - 1 * -1) / (1 + 3) = -1."""
    both = Constraints({"a": CostLimit(pid(0.0)), "b": CostLimit(pid(0.0))})
    both.limits["a"].multiplier.value, both.limits["b"].multiplier.value = 2.0, 1.0
    assert both.mix(torch.tensor([[1.0]]), {"a": torch.tensor([[3.0]]), "b": torch.tensor([[-1.0]])}).item() == -1.0
    assert both.multipliers == {"a": 2.0, "b": 1.0}
    assert torch.equal(Constraints({}).mix(torch.tensor([[1.5]]), {}), torch.tensor([[1.5]]))


def test_missing_costs_are_left_out_and_prompts_weigh_alike() -> None:
    """Prompt means 0.2 (of one reply) and 0.6 give 0.4, not the 1.4/3 of the replies; all missing: no update."""
    one = Constraints({"a": CostLimit(pid(0.1, ki=1.0, kp=0.0, kd=0.0)), "b": CostLimit(pid(0.1))})
    nothing = torch.full((2, 2), NAN)
    seen = one.update({"a": torch.tensor([[0.2, NAN], [0.5, 0.7]]), "b": nothing})
    assert seen == {"a": pytest.approx(0.4), "b": None}
    assert one.multipliers == {"a": pytest.approx(0.3), "b": 0.0} and one.limits["b"].multiplier.previous is None
    for wrong in ({"a": nothing}, {"a": nothing, "b": nothing, "c": nothing}):
        with pytest.raises(InputError, match="costs"):
            one.update(wrong)
        with pytest.raises(InputError, match="costs"):
            one.mix(nothing, wrong)


def test_all_multipliers_survive_a_checkpoint() -> None:
    def make() -> Constraints:
        return Constraints({"a": CostLimit(pid(0.1)), "b": CostLimit(pid(0.02), 0.0, "prompt")})

    random = torch.Generator().manual_seed(0)
    rounds = [{k: torch.rand(3, 4, generator=random) - 0.2 for k in "ab"} for _ in range(6)]
    whole, first, second = make(), make(), make()
    for costs in rounds:
        whole.update(costs)
    for costs in rounds[:3]:
        first.update(costs)
    second.load(json.loads(json.dumps(first.state())))
    for costs in rounds[3:]:
        second.update(costs)
    assert second.state() == whole.state() and min(whole.multipliers.values()) > 0.0
    with pytest.raises(StoreError, match="checkpoint"):
        Constraints({"a": CostLimit(pid(0.1))}).load(first.state())


@pytest.mark.parametrize("seed", [0, 2, 5])
def test_two_limits_meet_the_linear_programme(seed: int) -> None:
    """Four prompts, five arms, two costs that pull apart; both limits bind, both duals are found."""
    random = np.random.default_rng(seed)
    first, second, spice = (random.random((4, 5)) for _ in range(3))
    reward = 0.5 * first + 0.5 * second + 0.3 * spice
    limits = {"first": 0.35, "second": 0.4}
    found = linprog(
        -reward.ravel() / 4, [first.ravel() / 4, second.ravel() / 4], list(limits.values()),
        np.kron(np.eye(4), np.ones(5)), np.ones(4),
    )  # fmt: skip
    duals = dict(zip(limits, -found.ineqlin.marginals, strict=True))
    assert min(duals.values()) > 0.1  # both bind, otherwise this proves nothing
    costs = {"first": torch.tensor(first), "second": torch.tensor(second)}
    several = Constraints({k: CostLimit(pid(v)) for k, v in limits.items()})
    logits, paid, history = torch.zeros(4, 5, dtype=torch.float64), torch.tensor(reward), []
    for _ in range(1500):
        policy = logits.softmax(-1)
        means = {k: (policy * c).sum(-1, keepdim=True) for k, c in {"reward": paid, **costs}.items()}
        several.update({k: means[k] for k in costs})
        history.append([float(means[k].mean()) for k in ("reward", *costs)])
        logits = logits + several.mix(paid - means["reward"], {k: costs[k] - means[k] for k in costs})
    got = np.array(history[-100:])
    assert np.abs(got[:, 1:] - list(limits.values())).max() < 0.02
    assert (-found.fun - got[:, 0]).max() < 0.02 * -found.fun
    assert several.multipliers == pytest.approx(duals, rel=0.05)


# ---- compensation between prompts ----


def test_rectified_costs_by_hand() -> None:
    """Prompt means over what is there: (3 - 1)/2 = 1 fails at 0, (-4 + 2)/2 = -1 holds."""
    cost = torch.tensor([[3.0, -1.0, NAN], [-4.0, 2.0, NAN]])
    got = {per: rectify(cost, per=per).nan_to_num(9.0).tolist() for per in ("mean", "prompt", "reply")}
    assert got["mean"] == [[3.0, -1.0, 9.0], [-4.0, 2.0, 9.0]]
    assert got["prompt"] == [[3.0, -1.0, 9.0], [0.0, 0.0, 9.0]]
    assert got["reply"] == [[3.0, 0.0, 9.0], [0.0, 2.0, 9.0]]
    assert rectify(cost, threshold=1.0, per="prompt").nan_to_num(9.0).tolist()[0] == [0.0, 0.0, 9.0]
    assert rectify(cost, threshold=1.0, per="reply").nan_to_num(9.0).tolist()[0] == [2.0, 0.0, 9.0]
    with pytest.raises(RecipeError, match="per"):
        rectify(cost, per="token")


@given(seed=st.integers(0, 999), threshold=st.floats(-0.5, 0.5))
def test_each_kind_is_stricter_than_the_one_before(seed: int, threshold: float) -> None:
    """max(0, mean) <= mean over prompts of max(0, mean of prompt) <= mean over replies of max(0, C)."""
    cost = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean, prompt, reply = (float(rectify(cost, threshold=threshold, per=p).mean()) for p in ("mean", "prompt", "reply"))
    assert max(0.0, mean) <= prompt + 1e-12 and prompt <= reply + 1e-12


def compensate(limit: CostLimit, steps: int = 600) -> tuple[torch.Tensor, list[float]]:
    """Prompt 1 costs -10 or 0, prompt 2 costs 5 or -1, and the first arm pays more: (costs_P at the end, lambdas)."""
    cost, reward = (torch.tensor(x, dtype=torch.float64) for x in ([[-10.0, 0.0], [5.0, -1.0]], [[1.0, 0.0]] * 2))
    several, logits, values = Constraints({"harm": limit}), torch.zeros(2, 2, dtype=torch.float64), []
    for _ in range(steps):
        policy = logits.softmax(-1)
        arms = (policy * 200).round().long()
        drawn = torch.stack(
            [torch.repeat_interleave(torch.tensor([0, 1]), torch.stack([a, 200 - a])) for a in arms[:, 0]]
        )
        costs_PG, rewards_PG = cost.gather(1, drawn), reward.gather(1, drawn)
        several.update({"harm": costs_PG})
        values.append(several.multipliers["harm"])
        read = several.costs({"harm": costs_PG})["harm"]
        centred = [x - x.mean(-1, keepdim=True) for x in (rewards_PG, read)]
        mixed = several.mix(centred[0], {"harm": centred[1]})
        logits = (logits + torch.zeros_like(logits).scatter_add(1, drawn, mixed) / 200).clamp(-4.0, 4.0)
    return (logits.softmax(-1) * cost).sum(-1), values


def test_a_mean_limit_lets_one_prompt_pay_for_another_and_a_rectified_one_does_not() -> None:
    mean, lambdas = compensate(CostLimit(pid(0.0, kp=0.5, ki=0.02, kd=0.0)))
    assert lambdas[-1] == 0.0 and float(mean[1]) > 4.5 and float(mean.mean()) < -2.0
    prompt, lambdas = compensate(CostLimit(pid(0.1, kp=0.5, ki=0.02, kd=0.0), -0.4, "prompt"))
    assert float(prompt[1]) <= 0.0 and float(prompt[0]) < -9.0
    # The multiplier came down again from where the violation had driven it: the slack at work.
    assert lambdas[-1] < 0.8 * max(lambdas)


def test_without_slack_the_multiplier_could_only_rise() -> None:
    """Rectified costs after learning are 0: with a slack of 0.1 the integral falls by 0.1 a round; with 1e-9 it stays."""
    series = [1.0] * 10 + [0.0] * 15
    slack, none = (CostLimit(pid(k, kp=0.0, ki=1.0, kd=0.0), 0.0, "reply") for k in (0.1, 1e-9))
    ends = []
    for limit in (slack, none):
        several = Constraints({"harm": limit})
        values = [several.update({"harm": torch.tensor([[c]])}) and several.multipliers["harm"] for c in series]
        ends.append((values[9], values[-1]))
    assert ends[0] == (pytest.approx(9.0), pytest.approx(7.5))
    assert ends[1] == (pytest.approx(10.0), pytest.approx(10.0))
    with pytest.raises(RecipeError, match="rectified cost with limit"):
        CostLimit(pid(0.0), 0.0, "prompt")
    with pytest.raises(RecipeError, match="threshold"):
        CostLimit(pid(0.0), 0.1)
    with pytest.raises(RecipeError, match="per"):
        CostLimit(pid(0.1), 0.0, "token")


# ---- tiers, scale and tails ----


def test_tiers_by_hand() -> None:
    """Target 1, tolerance 0.25: values 0.8 and 0.75 hold, 0.7 and a missing one do not; tier 3 needs both."""
    safe = torch.tensor([[0.8, 0.75, 0.7, NAN]])
    useful = torch.tensor([[0.1, 0.5, 0.9, 0.9]])
    tiers = [torch.full((1, 4), a) for a in (1.0, 10.0, 100.0)]
    got = lexicographic(tiers, [safe, useful], [1.0, 0.5], [0.25, 0.0])
    assert got.tolist() == [[11.0, 111.0, 1.0, 1.0]]
    assert lexicographic(tiers[:2], [safe, useful], [1.0], [0.0]).tolist() == [[1.0] * 4]
    assert torch.equal(lexicographic(tiers[:1], [], [], []), tiers[0])
    for values, targets, tolerances in (([safe], [1.0, 1.0], [0.0]), ([], [1.0], [0.0]), ([safe], [1.0], [-0.1])):
        with pytest.raises(InputError):
            lexicographic(tiers[:2], values, targets, tolerances)


def test_unit_scale_by_hand() -> None:
    """Root mean square of 3 and -4 where not zero: sqrt(12.5); zeros stay."""
    got = unit_scale(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
    assert got.tolist() == [pytest.approx([3 / 12.5**0.5, -4 / 12.5**0.5]), [0.0, 0.0]]
    assert torch.equal(unit_scale(torch.zeros(2, 2)), torch.zeros(2, 2))
    assert torch.allclose(unit_scale(7.0 * got), got)


def test_tails_by_hand() -> None:
    """Ten costs 1..10. The worst fifth is 10 and 9; the worst quarter takes half of 8: (10 + 9 + 4) / 2.5."""
    cost = torch.tensor([*range(1, 11), NAN])
    assert cvar(cost, level=0.8) == pytest.approx(9.5)
    assert cvar(cost, level=0.75) == pytest.approx(9.2)
    assert cvar(cost, level=0.99) == pytest.approx(10.0) and cvar(cost, level=0.0) == pytest.approx(5.5)
    assert violation_rate(cost, threshold=7.0) == pytest.approx(0.3) and violation_rate(-cost) == 0.0
    assert cvar(torch.tensor([NAN])) is None and violation_rate(torch.tensor([NAN])) is None
    with pytest.raises(RecipeError, match="level"):
        cvar(cost, level=1.0)


@settings(max_examples=40)
@given(costs=st.lists(st.floats(-5, 5), min_size=1, max_size=15), level=st.floats(0.0, 0.98))
def test_cvar_is_the_minimum_it_is_defined_by(costs: list[float], level: float) -> None:
    """Against min over t of t + E max(0, C - t) / (1 - level), tried at every cost."""
    c = np.array(costs)
    best = min(t + np.maximum(0.0, c - t).mean() / (1 - level) for t in costs)
    assert cvar(torch.tensor(costs, dtype=torch.float64), level=level) == pytest.approx(best, abs=1e-9)
