"""A controller learns: the tabular problem with a known answer, both objectives, both scopes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from tutelage.config import Controller as Rules
from tutelage.engines import sampling
from tutelage.engines.sampling import Menu, draw_rows
from tutelage.errors import NothingToLearn
from tutelage.loop.contest import paired_mean
from tutelage.loop.controlling import learn
from tutelage.policy.controller import Controller, ControllerLearner, Grid, Steered, Trace

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
VOCABULARY, LENGTH, SIZE, SAMPLES = 8, 10, 12, 8
MENU = Menu(
    torch.tensor(TEMPERATURES),
    torch.zeros(6, dtype=torch.long),
    torch.zeros(6, dtype=torch.long),
    torch.zeros(1, VOCABULARY, dtype=torch.bool),
)


@pytest.fixture(autouse=True)
def _large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler cuts its rows for vocabularies of real models; here a row has eight numbers."""
    monkeypatch.setattr(sampling, "_ROWS", 1 << 20)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """P prompts of two families. A is rewarded for the likeliest token alone, B for distinct pairs of tokens.

    A hidden state says the family through noise; the next token's distribution does not depend on what was drawn.
    """

    second_P: torch.Tensor
    state_PD: torch.Tensor
    logits_PV: torch.Tensor

    @classmethod
    def make(cls, count: int, seed: int) -> Prompts:
        dice = torch.Generator().manual_seed(seed)
        second = torch.arange(count) % 2 == 1
        states = torch.randn(count, SIZE, generator=dice) * 5.0 + 2.0  # scaled and shifted, as real ones are
        states[:, 0] = torch.where(second, 8.0, -8.0) + 2.0 * torch.randn(count, generator=dice)
        return cls(second, states, torch.randn(count, VOCABULARY, generator=dice))

    def rewards(self, actions_PGT: torch.Tensor, dice: torch.Generator) -> torch.Tensor:
        """rewards_PG of replies drawn by these settings, with the very sampler of the engine."""
        count, samples, _ = actions_PGT.shape
        rows = self.logits_PV[:, None, None].expand(count, samples, LENGTH, -1).reshape(-1, VOCABULARY)
        actions = actions_PGT.expand(count, samples, LENGTH).reshape(-1)
        drawn, _ = draw_rows(rows, torch.rand(len(rows), generator=dice), MENU, actions)
        tokens = drawn.view(count, samples, LENGTH)
        likeliest = (tokens == self.logits_PV.argmax(-1)[:, None, None]).float().mean(-1)
        pairs = tokens[..., :-1] * VOCABULARY + tokens[..., 1:]
        ordered = pairs.sort(-1).values
        distinct = (1 + (ordered[..., 1:] != ordered[..., :-1]).sum(-1)) / (LENGTH - 1)
        return torch.where(self.second_P[:, None], distinct, likeliest)

    def steered(self, controller: Controller, samples: int, dice: torch.Generator, **how: Any) -> tuple[Any, Any]:
        """(actions_PGT, traces_PG) of replies; at every token the state is seen through fresh noise."""
        count, steps = len(self.second_P), LENGTH if controller.per_token else 1
        states = self.state_PD[:, None, None].expand(count, samples, steps, SIZE)
        if steps > 1:
            states = states + 0.5 * torch.randn(states.shape, generator=dice)
        flat = states.reshape(-1, SIZE)
        chosen = Steered(controller, MENU, **how).choose(flat, torch.rand(len(flat), generator=dice), range(len(flat)))
        actions = chosen.view(count, samples, steps)
        return actions, [[Trace(actions[p, g], states[p, g]) for g in range(samples)] for p in range(count)]


def trained(rules: Rules, *, rounds: int, seed: int = 0) -> Controller:
    """A controller after some rounds on training prompts."""
    train, dice = Prompts.make(200, 100 + seed), torch.Generator().manual_seed(seed)
    controller = Controller(Grid(TEMPERATURES), SIZE, per_token=rules.scope == "token", seed=seed)
    controller.fit(train.state_PD)
    learner = ControllerLearner(controller, learning_rate=rules.learning_rate)
    for number in range(rounds):
        part = torch.randperm(200, generator=dice)[: rules.prompts]
        prompts = Prompts(train.second_P[part], train.state_PD[part], train.logits_PV[part])
        actions, traces = prompts.steered(controller, rules.samples, dice)
        learn(learner, rules, traces, prompts.rewards(actions, dice), seed=number)
    return controller


def best_single(prompts: Prompts, dice: torch.Generator) -> int:
    """Grid search: every temperature on every training prompt."""
    count = len(prompts.second_P)
    means = [float(prompts.rewards(torch.full((count, SAMPLES, 1), a), dice).mean()) for a in range(len(TEMPERATURES))]
    return max(range(len(means)), key=means.__getitem__)


CASES = {
    "gradient": (Rules(), 14),
    "gradient, a token": (Rules(scope="token"), 16),
    "lpo": (Rules(objective="lpo"), 14),
    # A margin that is summed over ten positions: the slope is a fraction of what it is once a reply.
    "lpo, a token": (Rules(objective="lpo", scope="token", beta=0.3), 36),
    "lpo, anchored": (Rules(objective="lpo", anchored=True), 20),
}


@pytest.mark.parametrize(("rules", "rounds"), CASES.values(), ids=CASES)
def test_two_families_are_told_apart_and_the_best_single_temperature_is_beaten(rules: Rules, rounds: int) -> None:
    controller = trained(rules, rounds=rounds)
    fresh, dice = Prompts.make(200, 7), torch.Generator().manual_seed(11)
    actions, _ = fresh.steered(controller, SAMPLES, dice, likeliest=True)
    chosen = MENU.temperature_A[actions].flatten(1)
    cold, hot = chosen[~fresh.second_P] <= 0.2, chosen[fresh.second_P] >= 0.8
    assert cold.float().mean() >= 0.95
    assert hot.float().mean() >= 0.95
    single = best_single(Prompts.make(100, 100), dice)
    mine = fresh.rewards(actions, dice).mean(1)
    theirs = fresh.rewards(torch.full_like(actions, single), dice).mean(1)
    low, _ = paired_mean(theirs.tolist(), mine.tolist())
    assert low is not None and low > 0.02


def test_a_controller_that_reads_nothing_of_use_does_not_beat_the_best_single_temperature() -> None:
    """The same numbers with states that say nothing: the bar is no formality."""
    rules, dice = Rules(), torch.Generator().manual_seed(3)
    controller = Controller(Grid(TEMPERATURES), SIZE)
    learner = ControllerLearner(controller, learning_rate=rules.learning_rate)
    for number in range(5):
        prompts = Prompts.make(rules.prompts, number)
        blind = dataclasses.replace(prompts, state_PD=torch.randn(prompts.state_PD.shape, generator=dice))
        actions, traces = blind.steered(controller, rules.samples, dice)
        learn(learner, rules, traces, blind.rewards(actions, dice), seed=number)
    fresh = Prompts.make(200, 77)
    blind = dataclasses.replace(fresh, state_PD=torch.randn(fresh.state_PD.shape, generator=dice))
    actions, _ = blind.steered(controller, SAMPLES, dice, likeliest=True)
    single = best_single(Prompts.make(100, 100), dice)
    low, _ = paired_mean(
        fresh.rewards(torch.full_like(actions, single), dice).mean(1).tolist(),
        fresh.rewards(actions, dice).mean(1).tolist(),
    )
    assert low is not None and low <= 0.0


# -- what a round learns from -----------------------------------------------------------------------


def one_round(rules: Rules, rewards: torch.Tensor | None = None, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Weights after a round on eight prompts, and the steps' metrics."""
    prompts, dice = Prompts.make(8, 1), torch.Generator().manual_seed(1)
    controller = Controller(Grid(TEMPERATURES), SIZE, per_token=rules.scope == "token")
    controller.outer.bias.data.copy_(torch.linspace(-0.5, 0.5, 6))  # it has learned something before
    learner = ControllerLearner(controller, learning_rate=rules.learning_rate)
    actions, traces = prompts.steered(controller, 4, dice)
    drawn = prompts.rewards(actions, dice)
    steps = learn(learner, rules, traces, drawn if rewards is None else rewards, seed=seed)
    return [p.detach().flatten().tolist() for p in controller.parameters()], steps


GRADIENT, PAIRS = Rules(batch=4), Rules(batch=4, objective="lpo", epochs=3)
CHANGES: dict[str, tuple[Rules, dict[str, Any]]] = {
    "objective": (GRADIENT, {"objective": "lpo"}),
    "scope": (GRADIENT, {"scope": "token"}),
    "batch": (GRADIENT, {"batch": 2}),
    "epochs": (GRADIENT, {"epochs": 1}),
    "learning_rate": (GRADIENT, {"learning_rate": 1e-3}),
    "entropy": (GRADIENT, {"entropy": 0.5}),
    "clip": (GRADIENT.model_copy(update={"epochs": 30, "learning_rate": 0.05}), {"clip": 0.01}),
    "beta": (PAIRS, {"beta": 3.0}),
    "anchored": (PAIRS, {"anchored": True}),
}


@pytest.mark.parametrize(("rules", "change"), CHANGES.values(), ids=CHANGES)
def test_every_number_of_the_objectives_changes_what_is_learned(rules: Rules, change: dict[str, Any]) -> None:
    before, _ = one_round(rules)
    again, _ = one_round(rules)
    after, _ = one_round(rules.model_copy(update=change))
    assert before == again
    assert before != after


def test_the_order_of_prompts_follows_the_seed() -> None:
    assert one_round(GRADIENT, seed=0) != one_round(GRADIENT, seed=1)


@pytest.mark.parametrize("rules", [GRADIENT, PAIRS], ids=["gradient", "lpo"])
def test_ties_and_missing_rewards_teach_nothing(rules: Rules) -> None:
    with pytest.raises(NothingToLearn, match="no two replies"):
        one_round(rules, torch.full((8, 4), 0.3))
    with pytest.raises(NothingToLearn):
        one_round(rules, torch.full((8, 4), math.nan))
    lonely = torch.full((8, 4), math.nan)
    lonely[:, 1] = 1.0
    with pytest.raises(NothingToLearn):
        one_round(rules, lonely)


@pytest.mark.parametrize("rules", [GRADIENT, PAIRS], ids=["gradient", "lpo"])
def test_a_missing_reward_is_missing_and_not_zero(rules: Rules) -> None:
    dice = torch.Generator().manual_seed(2)
    full = torch.rand(8, 4, generator=dice) - 2.0  # all below zero: a zero would be the best
    holes = full.clone()
    holes[:, 0] = math.nan
    missing, steps = one_round(rules, holes)
    zero, _ = one_round(rules, holes.nan_to_num(0.0))
    assert missing != zero
    assert all(math.isfinite(v) for step in steps for v in step.values())


def test_two_replies_drawn_alike_are_no_pair() -> None:
    states = torch.zeros(1, SIZE)
    trace = Trace(torch.tensor([2]), states)
    learner = ControllerLearner(Controller(Grid(TEMPERATURES), SIZE), learning_rate=0.1)
    with pytest.raises(NothingToLearn):
        learn(learner, PAIRS, [[trace, trace]], torch.tensor([[0.0, 1.0]]), seed=0)
    other = Trace(torch.tensor([4]), states)
    learn(learner, PAIRS, [[trace, other]], torch.tensor([[0.0, 1.0]]), seed=0)
    logp = learner.controller(states)[0]
    assert logp[4] > logp[2]


def test_the_paired_interval_holds_what_it_should() -> None:
    assert paired_mean([], []) == (None, None)
    assert paired_mean([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0)
    low, high = paired_mean([0.0] * 50, [1.0, -0.5] * 25)
    # Mean 0.25, standard deviation 0.75 of 50: 0.25 -+ 1.96 * 0.106.
    assert low == pytest.approx(0.25 - 0.208, abs=0.03)
    assert high == pytest.approx(0.25 + 0.208, abs=0.03)
    wide = paired_mean([0.0] * 50, [1.0, -0.5] * 25, confidence=0.99)
    assert wide[0] is not None and low is not None and wide[0] < low
