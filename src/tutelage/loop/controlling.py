"""Stages of a controller's run: search the best single setting, play a round, learn from it.

The big model is frozen. What learns is a small network that reads the model's hidden state and
chooses how its next tokens are drawn.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tutelage.config import Controller as Rules
from tutelage.engines.sampling import Menu, Steering
from tutelage.errors import NothingToLearn, StoreError
from tutelage.feedback.drift import Anchored
from tutelage.loop.bench import Workbench, derive_seed
from tutelage.loop.stages import figures, hold_to_anchors, judge, reward
from tutelage.objectives.controlling import ActionGradient, LatentPreference
from tutelage.objectives.policy_gradient import advantages_rloo
from tutelage.policy.controller import Assigned, Controller, ControllerLearner, Steered, Trace
from tutelage.records import Generation, Prompt, Reward, SamplerSettings
from tutelage.store.ledger import Unit

__all__ = ["Control", "choices_of", "learn", "play_round", "search"]

_FITTED = 20_000  # states that the scale of the controller's input is measured on


@dataclasses.dataclass
class Control:
    """The workbench with its controller, and what a checkpoint must keep of both.

    `table` holds, a setting, its mean reward and the replies it rests on; `best` is the setting with the highest.
    """

    bench: Workbench
    learner: ControllerLearner
    menu: Menu
    version: str = "start"
    best: int = -1
    table: list[tuple[float | None, int]] = dataclasses.field(default_factory=list)

    @property
    def controller(self) -> Controller:
        """What is trained."""
        return self.learner.controller

    @property
    def rules(self) -> Rules:
        """The recipe's section."""
        return self.bench.recipe.controller

    def draw(
        self, prompts: Sequence[Prompt], steering: Steering, *, samples: int, seed: int, version: str
    ) -> list[list[Generation]]:
        """Replies as the steering chooses."""
        bench = self.bench
        return bench.completer.generate(
            prompts,
            samples=samples,
            settings=SamplerSettings(max_new_tokens=bench.recipe.sampling.max_new_tokens),
            seed=seed,
            version=version,
            steering=steering,
            progress=bench.progress.advance,
        )

    def judged(
        self, prompts: Sequence[Prompt], replies_PG: Sequence[Sequence[Generation]], unit: Unit, number: int
    ) -> tuple[list[list[Reward]], dict[str, float]]:
        """Rewards from the run's own panel, kept in the ledger, and the round's figures."""
        unit.generations(reply for group in replies_PG for reply in group)
        findings = judge(self.bench, prompts, replies_PG, unit)
        rewards_PG = reward(self.bench, findings, replies_PG)
        unit.rewards(r for group in rewards_PG for r in group)
        return rewards_PG, figures(findings, rewards_PG)

    def save(self, version: str) -> None:
        """Write a checkpoint: network, optimiser, the search's result, what the panel heard."""
        bench = self.bench

        def write(folder: Path) -> None:
            self.controller.save(folder / "controller.safetensors")
            self.learner.save(folder / "optimizer.safetensors")
            state = {"version": version, "best": self.best, "table": self.table, "panel": bench.panel.state()}
            state |= {"anchored": {name: a.state() for name, a in bench.anchored.items()}, "trust": dict(bench.trust)}
            (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")

        bench.run.save_checkpoint(version, write)
        self.version = version

    def load(self, version: str) -> None:
        """Take a checkpoint over, after checking its hashes.

        Raises:
            StoreError: It is missing or damaged.
        """
        folder = self.bench.run.verify_checkpoint(version)
        found = Controller.load(folder / "controller.safetensors").to(self.bench.lm.device)
        self.learner = ControllerLearner(found, learning_rate=self.rules.learning_rate)
        self.learner.load(folder / "optimizer.safetensors")
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"{folder / 'state.json'} is not JSON", expected="a checkpoint of tutelage") from error
        self.best, self.table = int(state["best"]), [(value, int(n)) for value, n in state["table"]]
        self.bench.panel.load(state["panel"])
        self.bench.anchored = {name: Anchored.load(kept) for name, kept in state["anchored"].items()}
        self.bench.trust = {name: float(factor) for name, factor in state["trust"].items()}
        self.version = version


def search(control: Control, train: Sequence[Prompt], unit: Unit) -> None:
    """Every setting on the same training prompts, judged side by side: the best single one is the bar.

    Replies under all settings to one prompt form one group, so their rewards can be compared. The
    states seen on the way give the scale of the controller's input.

    Raises:
        NothingToLearn: No reply has a reward.
    """
    rules, bench = control.rules, control.bench
    prompts = train[: rules.grid_prompts or None]
    count = len(control.menu)
    network = control.controller
    steering = Assigned(control.menu, range(count), per_token=network.per_token, depth=network.depth)
    samples = count * rules.grid_samples
    bench.progress.stage(f"{unit.name}: {count} settings", len(prompts) * samples, "replies")
    seed = derive_seed(bench.recipe.seed, "grid")
    replies_PG = control.draw(prompts, steering, samples=samples, seed=seed, version="start")
    rewards_PG, seen = control.judged(prompts, replies_PG, unit, 0)
    totals: list[list[float]] = [[] for _ in range(count)]
    for group in rewards_PG:
        for g, one in enumerate(group):
            if one.total is not None:
                totals[g % count].append(one.total)
    control.table = [(math.fsum(t) / len(t) if t else None, len(t)) for t in totals]
    known = [a for a, (mean, _) in enumerate(control.table) if mean is not None]
    if not known:
        raise NothingToLearn(
            "no reply under any setting has a reward",
            expected="at least one judge with an opinion",
            fix="look at the abstentions in the ledger; lower feedback.min_confidence",
        )
    control.best = max(known, key=lambda a: (control.table[a][0] or 0.0, -a))
    states_ND = torch.cat([trace.states_TD for trace in steering.traces.values()])
    control.controller.fit(states_ND[:: -(-len(states_ND) // _FITTED)])
    settings = [str(s) for s in control.controller.grid.settings]
    rows = zip(settings, control.table, strict=True)
    unit.note("settings", settings)
    unit.note("grid", [{"setting": s, "reward": mean, "replies": n} for s, (mean, n) in rows])
    unit.note("choices", choices_of(steering.traces))
    unit.metrics(0, "rollout", seen)
    bench.progress.say(f"best single setting on {len(prompts)} training prompts: {settings[control.best]}")


def play_round(control: Control, prompts: Sequence[Prompt], unit: Unit, number: int) -> None:
    """Draw replies under drawn settings, judge them, and move the controller to what did better.

    Raises:
        NothingToLearn: No two replies to a prompt differ in reward and in how they were drawn.
        TrainingError: A loss or gradient is not finite; the last version is kept.
    """
    rules, bench = control.rules, control.bench
    steering = Steered(control.controller, control.menu)
    bench.progress.stage(f"round {number}: generate", len(prompts) * rules.samples, "replies")
    seed = derive_seed(bench.recipe.seed, "round", number)
    replies_PG = control.draw(prompts, steering, samples=rules.samples, seed=seed, version=control.version)
    hold_to_anchors(bench, unit, number)
    rewards_PG, seen = control.judged(prompts, replies_PG, unit, number)
    unit.note("choices", choices_of(steering.traces))
    traces_PG = [[steering.traces[r.id] for r in group] for group in replies_PG]
    drawn = torch.cat([t.actions_T for t in steering.traces.values()]).to(control.menu.temperature_A.device)
    unit.metrics(number, "rollout", seen | {"temperature": float(control.menu.temperature_A[drawn].mean())})
    table_PG = torch.tensor([[math.nan if r.total is None else r.total for r in g] for g in rewards_PG])
    bench.progress.stage(f"round {number}: update", rules.epochs, "passes")
    steps = learn(control.learner, rules, traces_PG, table_PG, seed=derive_seed(bench.recipe.seed, "shuffle", number))
    for step, numbers in enumerate(steps):
        unit.metrics(number * 1000 + step, "controller", numbers)
    bench.progress.advance(rules.epochs)
    bench.progress.figures(loss=steps[-1]["loss"], temperature=float(control.menu.temperature_A[drawn].mean()))


def choices_of(traces: Mapping[str, Trace]) -> dict[str, list[int]]:
    """Numbers of the settings behind each reply, for the ledger."""
    return {name: trace.actions_T.tolist() for name, trace in traces.items()}


# ---------------------------------------------------------------- learning


@dataclasses.dataclass(frozen=True)
class _Choices:
    """The choices of B replies, laid out so that the network reads all states at once."""

    states_ND: torch.Tensor
    actions_N: torch.Tensor
    keep_BT: torch.Tensor

    @classmethod
    def of(cls, traces: Sequence[Trace], device: torch.device) -> _Choices:
        lengths = torch.tensor([len(t.actions_T) for t in traces])
        keep_BT = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        states_ND = torch.cat([t.states_TD for t in traces]).float().to(device)
        actions_N = torch.cat([t.actions_T for t in traces]).to(device)
        return cls(states_ND, actions_N, keep_BT.to(device))

    def laid_out(self, values_N: torch.Tensor) -> torch.Tensor:
        """(B, T), zero where there is no choice."""
        return torch.zeros(self.keep_BT.shape, device=values_N.device, dtype=values_N.dtype).masked_scatter(
            self.keep_BT, values_N
        )

    def logps(self, controller: Controller) -> tuple[torch.Tensor, torch.Tensor]:
        """(logp_BT, entropy_BT) of the choices."""
        logp_NA = controller(self.states_ND)
        taken_N = logp_NA.gather(1, self.actions_N[:, None])[:, 0]
        return self.laid_out(taken_N), self.laid_out(-(logp_NA.exp() * logp_NA).sum(-1))


def learn(
    learner: ControllerLearner,
    rules: Rules,
    traces_PG: Sequence[Sequence[Trace]],
    rewards_PG: torch.Tensor,
    *,
    seed: int,
) -> list[dict[str, float]]:
    """Optimiser steps on a round's choices; the metrics of each.

    Args:
        learner: Holds the controller.
        rules: Objective and its numbers.
        traces_PG: Choices and states behind each reply.
        rewards_PG: Rewards, NaN where missing.
        seed: Of the order of prompts.

    Raises:
        NothingToLearn: No two replies to a prompt differ in reward and in how they were drawn.
        TrainingError: A loss or gradient is not finite; the last weights are kept.
    """
    frozen = copy.deepcopy(learner.controller)
    step = _step_pairs if rules.objective == "lpo" else _step_gradient
    usable = [p for p, traces in enumerate(traces_PG) if _teaches(traces, rewards_PG[p], rules.objective)]
    if not usable:
        raise NothingToLearn(
            "no two replies to a prompt differ both in reward and in how they were drawn",
            expected="at least one such prompt",
            fix="look at the abstentions in the ledger; raise controller.samples",
        )
    dice = random.Random(seed)  # noqa: S311
    found = []
    for _ in range(rules.epochs):
        dice.shuffle(usable)
        for start in range(0, len(usable), rules.batch):
            part = usable[start : start + rules.batch]
            found.append(step(learner, frozen, rules, [traces_PG[p] for p in part], rewards_PG[part]))
    return found


def _pair(rewards_G: torch.Tensor) -> tuple[int, int]:
    """Replies with the highest and the lowest reward."""
    return int(rewards_G.nan_to_num(-math.inf).argmax()), int(rewards_G.nan_to_num(math.inf).argmin())


def _differ(better: Trace, worse: Trace) -> torch.Tensor:
    both = min(len(better.actions_T), len(worse.actions_T))
    return better.actions_T[:both] != worse.actions_T[:both]


def _teaches(traces_G: Sequence[Trace], rewards_G: torch.Tensor, objective: str) -> bool:
    known = rewards_G[~rewards_G.isnan()]
    if len(known) < 2 or float(known.max() - known.min()) < 1e-9:
        return False
    if objective != "lpo":
        return True
    better, worse = _pair(rewards_G)
    return bool(_differ(traces_G[better], traces_G[worse]).any())


def _step_gradient(
    learner: ControllerLearner,
    frozen: Controller,
    rules: Rules,
    traces_PG: Sequence[Sequence[Trace]],
    rewards_PG: torch.Tensor,
) -> dict[str, float]:
    device = learner.controller.mean_D.device
    choices = _Choices.of([t for group in traces_PG for t in group], device)
    with torch.no_grad():
        old_BT, _ = choices.logps(frozen)
    logp_BT, entropy_BT = choices.logps(learner.controller)
    advantage_B = advantages_rloo(rewards_PG).flatten().float().to(device)
    objective = ActionGradient(rules.entropy, rules.clip)
    loss = objective(logp_BT, old_BT, entropy_BT, advantage_B, choices.keep_BT.float())
    norm = learner.step(loss.value)
    count = loss.sums["choices"]
    shown = {k: loss.sums[k] / count for k in ("entropy", "clip_fraction")}
    return shown | {"loss": float(loss.value.detach()), "grad_norm": norm}


def _step_pairs(
    learner: ControllerLearner,
    frozen: Controller,
    rules: Rules,
    traces_PG: Sequence[Sequence[Trace]],
    rewards_PG: torch.Tensor,
) -> dict[str, float]:
    device = learner.controller.mean_D.device
    pairs = [_pair(row) for row in rewards_PG]
    better = [traces[b] for traces, (b, _) in zip(traces_PG, pairs, strict=True)]
    worse = [traces[w] for traces, (_, w) in zip(traces_PG, pairs, strict=True)]
    choices = _Choices.of([*better, *worse], device)
    n = len(pairs)
    differ_NT = torch.zeros(n, choices.keep_BT.shape[1], device=device)
    for row, (b, w) in enumerate(zip(better, worse, strict=True)):
        apart = _differ(b, w)
        differ_NT[row, : len(apart)] = apart.to(device=device, dtype=torch.float32)
    logp_BT, entropy_BT = choices.logps(learner.controller)
    held_BT = None
    if rules.anchored:
        with torch.no_grad():
            held_BT, _ = choices.logps(frozen)
    loss = LatentPreference(rules.beta)(
        logp_BT[:n],
        logp_BT[n:],
        differ_NT,
        None if held_BT is None else held_BT[:n],
        None if held_BT is None else held_BT[n:],
    )
    norm = learner.step(loss.value)
    shown = {k: loss.sums[k] / n for k in ("accuracy", "margin")}
    shown["entropy"] = float(entropy_BT.detach().sum() / choices.keep_BT.sum())
    return shown | {"loss": float(loss.value.detach()), "grad_norm": norm}
