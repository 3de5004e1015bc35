"""The workbench of a run: everything a round works with, built once."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tutelage.config import Recipe
from tutelage.credit.decomposition import Decomposition
from tutelage.engines.load import LanguageModel
from tutelage.engines.local import LocalCompleter
from tutelage.engines.packing import Group
from tutelage.engines.vllm import VllmCompleter
from tutelage.errors import StoreError
from tutelage.feedback.drift import Anchored
from tutelage.feedback.model_judge import ComparingJudge
from tutelage.feedback.panel import Panel
from tutelage.loop.choice import Choice, choose
from tutelage.loop.constraining import constraints_of
from tutelage.loop.evaluate import Completer
from tutelage.loop.imitating import ImitationJudge
from tutelage.objectives.constrained import Constraints, PidMultiplier
from tutelage.policy.full import FullWeights
from tutelage.policy.learner import Learner, Scores, score
from tutelage.policy.lora import Adapter
from tutelage.policy.moments import moments_of, take_moments
from tutelage.policy.values import ValueHead
from tutelage.records import Demonstration, Generation, PreferencePair, Progress, Prompt, content_hash
from tutelage.store.runs import Run

__all__ = ["Silent", "Workbench", "derive_seed"]


class Silent:
    """A progress that says nothing."""

    def stage(self, name: str, total: int, unit: str) -> None:
        """Nothing."""

    def advance(self, steps: int = 1) -> None:
        """Nothing."""

    def figures(self, **values: float | str) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


def derive_seed(*parts: object) -> int:
    """A 31-bit seed that depends on nothing but `parts`; so a repeated unit repeats itself."""
    return int(content_hash([str(p) for p in parts]), 16) % (2**31)


@dataclasses.dataclass
class Workbench:
    """Model, adapter, panel and learner of one run, with what a checkpoint must keep."""

    run: Run
    lm: LanguageModel
    adapter: Adapter | FullWeights
    panel: Panel
    progress: Progress
    judges: Sequence[ComparingJudge] = ()
    watched: Sequence[Prompt] = ()
    anchors: Sequence[PreferencePair] = ()
    demonstrations: Sequence[Demonstration] = ()
    anchored: dict[str, Anchored] = dataclasses.field(default_factory=dict)
    trust: dict[str, float] = dataclasses.field(default_factory=dict)
    baselines: dict[str, float] = dataclasses.field(default_factory=dict)
    version: str = "start"
    multiplier: PidMultiplier = dataclasses.field(init=False)
    constraints: Constraints = dataclasses.field(init=False)
    completer: LocalCompleter = dataclasses.field(init=False)
    roller: Completer = dataclasses.field(init=False)
    choice: Choice = dataclasses.field(init=False)
    values: ValueHead | None = dataclasses.field(init=False, default=None)
    decomposition: Decomposition | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        c = self.recipe.constraint
        self.multiplier = PidMultiplier(c.limit, c.kp, c.ki, c.kd, c.maximum)
        self.constraints = constraints_of(self.recipe)
        s = self.recipe.sampling
        self.completer = LocalCompleter(self.lm, rows=s.rows)
        # Only rollouts are drawn in int8 or by a server: what is measured, and what critics see, is the model itself.
        self.roller = self.completer
        if s.int8:
            self.roller = LocalCompleter(self.lm, rows=s.rows, int8=True)
        if s.server:
            self.roller = VllmCompleter(self.lm, s.server, adapter=self._adapter_of, parallel=s.rows)
        self.choice = choose(self.recipe)
        if self.choice.values is not None:
            self.values = ValueHead(self.lm.head_VD.shape[1], self.lm.device)
        if self.recipe.credit.method == "decomposed":
            self.decomposition = Decomposition(self.lm.head_VD.shape[1])
        self.learner = self._new_learner(self.recipe.update.learning_rate)
        self._encoded: dict[str, tuple[int, ...]] = {}

    @property
    def recipe(self) -> Recipe:
        """The run's resolved recipe."""
        return self.run.recipe

    def _new_learner(self, learning_rate: float) -> Learner:
        u = self.recipe.update
        return Learner(
            self.lm,
            self.adapter,
            learning_rate=learning_rate,
            budget=u.token_budget,
            max_grad_norm=u.max_grad_norm,
            values=self.values,
            value_learning_rate=self.choice.values.value_learning_rate if self.choice.values else 0.0,
        )

    def restart_learner(self, learning_rate: float) -> None:
        """Fresh optimiser: the supervised stage's moments do not fit the policy gradient's scale."""
        self.learner = self._new_learner(learning_rate)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Tokens of a prompt, kept."""
        if prompt.hash not in self._encoded:
            self._encoded[prompt.hash] = self.lm.encode(prompt, room=self.recipe.sampling.max_new_tokens)
        return self._encoded[prompt.hash]

    def frozen_scores(
        self, prompts: Sequence[Prompt], replies_PG: Sequence[Sequence[Generation]], *, attention: bool
    ) -> Scores:
        """One pass of the start model over the replies: reference log-probs and attention together."""
        with self.adapter.off():
            return self.scores(prompts, replies_PG, attention=attention)

    def scores(
        self, prompts: Sequence[Prompt], replies_PG: Sequence[Sequence[Generation]], *, attention: bool = False
    ) -> Scores:
        """One pass of the policy as it stands over the replies, and of the value head where there is one."""
        return score(
            self.lm,
            self.grouped(prompts, replies_PG),
            budget=self.recipe.update.token_budget,
            attention=attention,
            temperature=self.recipe.sampling.temperature,
            values=self.values,
        )

    def grouped(self, prompts: Sequence[Prompt], replies_PG: Sequence[Sequence[Generation]]) -> list[Group]:
        """Prompts with the tokens of their replies, whose rows are numbered through."""
        groups, row = [], 0
        for prompt, replies in zip(prompts, replies_PG, strict=True):
            rows = tuple(range(row, row + len(replies)))
            groups.append(Group(self.encode(prompt), tuple(r.tokens for r in replies), rows))
            row += len(replies)
        return groups

    def pick(self, prompts: Sequence[Prompt], count: int, number: int) -> list[Prompt]:
        """A round's prompts: a walk through shuffled passes over all, the same for the same seed.

        None comes twice in a round: where a pass ends, those of the next that were had already wait.
        """
        waiting: list[int] = []
        chosen: list[int] = []
        turn = 0
        for _ in range(number):
            chosen = []
            while len(chosen) < min(count, len(prompts)):
                fresh = next((i for i in waiting if i not in chosen), None)
                if fresh is None:
                    one = list(range(len(prompts)))
                    random.Random(derive_seed(self.recipe.seed, "order", turn)).shuffle(one)  # noqa: S311
                    waiting += one
                    turn += 1
                    continue
                waiting.remove(fresh)
                chosen.append(fresh)
        return [prompts[i] for i in chosen]

    def _adapter_of(self, version: str) -> Path | None:
        return None if version == "start" else self.run.verify_checkpoint(version)

    @property
    def _learning(self) -> list[ImitationJudge | Decomposition | ValueHead]:
        """What learns beside the policy, and is kept with it."""
        judges = [one for one in self.judges if isinstance(one, ImitationJudge)]
        return [*judges, *(one for one in (self.decomposition, self.values) if one is not None)]

    def save(self, version: str) -> None:
        """Write a checkpoint: adapter in PEFT's format, value head, optimiser, multiplier, what the panel heard."""

        def write(folder: Path) -> None:
            self.adapter.save(folder)
            for one in self._learning:
                one.save(folder)
            save_file(moments_of(self.learner.optimizer), str(folder / "optimizer.safetensors"))
            state = {"version": version, "multiplier": self.multiplier.state(), "panel": self.panel.state()}
            state["constraints"] = self.constraints.state()
            state["anchored"] = {name: a.state() for name, a in self.anchored.items()}
            state["trust"] = dict(self.trust)
            state["baselines"] = dict(self.baselines)
            (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")

        self.run.save_checkpoint(version, write)
        self.version = version

    def take_back(self) -> None:
        """Forget what a unit that broke off has changed: what is measured next is the last version."""
        if self.version == "start":
            self.adapter.clear()
            self.baselines.clear()
            for one in self._learning:
                one.clear()
        else:
            self.load(self.version)

    def load(self, version: str) -> None:
        """Take a checkpoint over, after checking its hashes.

        Raises:
            StoreError: It is missing or damaged.
        """
        folder = self.run.verify_checkpoint(version)
        self.adapter.load(folder)
        for one in self._learning:
            one.load(folder)
        self.restart_learner(self.recipe.update.learning_rate)
        take_moments(self.learner.optimizer, load_file(str(folder / "optimizer.safetensors")))
        try:
            state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"{folder / 'state.json'} is not JSON", expected="a checkpoint of tutelage") from error
        self.multiplier.load(state["multiplier"])
        self.constraints.load(state.get("constraints", {}))
        self.panel.load(state["panel"])
        self.anchored = {name: Anchored.load(kept) for name, kept in state.get("anchored", {}).items()}
        self.trust = {name: float(factor) for name, factor in state.get("trust", {}).items()}
        self.baselines = {name: float(mean) for name, mean in state.get("baselines", {}).items()}
        self.version = version
