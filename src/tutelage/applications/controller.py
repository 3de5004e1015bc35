"""The controller recipe: the model stays frozen, and a small network learns how to draw from it.

The bar is the best single setting, found on the same training prompts under the same rewards. A
controller that does not surely beat it on unseen prompts is rejected.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from tutelage.applications.truthfulness import begin, principles_note
from tutelage.config import Gate
from tutelage.engines.load import load_model
from tutelage.engines.local import LocalCompleter
from tutelage.errors import NothingToLearn, StoreError, TrainingError
from tutelage.feedback.constitution import Constitution
from tutelage.loop.bench import Workbench, derive_seed
from tutelage.loop.contest import duel, extra_time
from tutelage.loop.controlling import Control, play_round, search
from tutelage.loop.improve import Result
from tutelage.loop.units import timed
from tutelage.loop.versions import open_run
from tutelage.policy.controller import Controller, ControllerLearner, Grid, Steered, menu_of
from tutelage.records import Decision, Evidence, Generation, Progress, Prompt, SamplerSettings, SuiteItem
from tutelage.store.ledger import Unit
from tutelage.store.runs import Run

__all__ = ["Controlled", "beats_the_best_single", "load_controlled", "play"]

_TIMED = 24  # prompts on which the time of choosing is measured


def play(run: Run, progress: Progress) -> Result:
    """Play a new run, or go on with an interrupted one."""
    train, gate, heldout, constitution, bench, known = begin(run, progress)
    session = _Session(_control(bench), train, gate, heldout)
    done = session.resume()
    stopped = ""
    try:
        if any(u["stage"] == "stopped" for u in run.ledger.units()):
            raise NothingToLearn("the run had stopped: no judge gave anything to learn from (see its ledger)")
        if "grid" not in done:
            with session.unit("grid", "search") as unit:
                _introduce(unit, constitution, train, known)
                search(session.control, train, unit)
                session.control.save("c0")
        session.learn(done)
    except (NothingToLearn, TrainingError) as error:
        stopped = str(error)
        session.take_back()
        progress.say(f"stopped: {error.got}")
    return session.finish(stopped)


def _introduce(unit: Unit, constitution: Constitution, train: Sequence[Prompt], judges: object) -> None:
    unit.note("constitution", principles_note(constitution))
    if judges:
        unit.note("judges", judges)
    unit.prompts(train, "train")


def _control(bench: Workbench) -> Control:
    rules, lm = bench.recipe.controller, bench.lm
    grid = Grid(rules.temperatures, rules.top_k, rules.patterns, rules.openings)
    network = Controller(
        grid,
        lm.head_VD.shape[1],
        width=rules.width,
        per_token=rules.scope == "token",
        depth=rules.depth,
        seed=derive_seed(bench.recipe.seed, "controller"),
    ).to(lm.device)
    return Control(bench, ControllerLearner(network, learning_rate=rules.learning_rate), menu_of(grid, lm))


def beats_the_best_single(evidence: Sequence[Evidence], rules: Gate, candidate: str) -> Decision:
    """Controller against the best single setting, paired, on the gate suite.

    It is promoted only if its reward is surely higher and correct answers surely did not fall by
    `max_correct_loss`. "Surely" is the bound of the interval. No evidence, or a gate that is off, rejects.
    """
    named = {e.metric: e for e in evidence}
    reward, correct = named.get("reward"), named.get("correct_answerable")
    against = []
    if not rules.enabled:
        against.append("the gate is off, and without a gate nothing is promoted")
    if reward is None or reward.low is None or reward.high is None:
        against.append("no prompt of the gate suite has rewards for both")
    elif reward.low <= 0:
        against.append(
            "the controller does not surely beat the best single setting "
            f"(difference between {reward.low:+.3f} and {reward.high:+.3f}, n = {reward.n})"
        )
    if correct is not None and correct.low is not None and correct.low < -rules.max_correct_loss:
        against.append(f"correct answers may have fallen by more than {rules.max_correct_loss:.0%}")
    if against:
        reason = "rejected: " + "; ".join(against)
    else:
        reason = "promoted: the controller beats the best single setting on prompts that neither has seen"
    return Decision("controller", candidate, "best-single", not against, reason, tuple(evidence))


@dataclasses.dataclass
class _Session:
    """One process's work on a run."""

    control: Control
    train: Sequence[Prompt]
    gate: Sequence[SuiteItem]
    heldout: Sequence[SuiteItem]
    started: float = dataclasses.field(default_factory=time.perf_counter)
    earlier: float = 0.0

    @property
    def bench(self) -> Workbench:
        """The run's workbench."""
        return self.control.bench

    def resume(self) -> set[str]:
        """Names of the units that are done; the last version is loaded."""
        units = self.bench.run.ledger.units()
        self.earlier = sum(float(u["seconds"]) for u in units)
        if any(u["version"] != "start" for u in units):
            self.control.load(units[-1]["version"])
            self.bench.progress.say(f"resumed after unit '{units[-1]['name']}'")
        return {u["name"] for u in units}

    def unit(self, name: str, stage: str) -> AbstractContextManager[Unit]:
        """A unit of work, as `loop.units.timed`."""
        return timed(self.bench.run, name, stage, version=lambda: self.control.version)

    def learn(self, done: set[str]) -> None:
        """The rounds that are left."""
        rules = self.bench.recipe.controller
        for number in range(1, rules.rounds + 1):
            if f"round-{number}" not in done:
                with self.unit(f"round-{number}", rules.objective) as unit:
                    play_round(self.control, self.bench.pick(self.train, rules.prompts, number), unit, number)
                    self.control.save(f"c{number}")

    def take_back(self) -> None:
        """Forget what a unit that broke off has changed."""
        if self.control.version != "start":
            self.control.load(self.control.version)

    def finish(self, stopped: str) -> Result:
        """Gate, held-out suite, time of choosing, summary."""
        run, recipe, control = self.bench.run, self.bench.recipe, self.control
        finished = next((u for u in run.ledger.units() if u["name"] == "final"), None)
        if finished is not None:
            summary = run.summary()
            if summary is None:  # a kill came between the unit's commit and the file
                summary = dict(finished["state"])
                run.write_summary(summary)
            evidence = tuple(Evidence(**e) for e in summary["evaluation"])
            return Result(str(summary["decision"]), evidence, summary)
        learned = control.version not in ("start", "c0")
        with self.unit("final", "evaluate") as unit:
            found: list[Evidence] = []
            told: dict[str, object] = {}
            if learned:
                gate, heldout = (
                    Path(n.removeprefix("builtin:")).stem for n in (recipe.prompts.gate, recipe.prompts.heldout)
                )
                gate = f"{gate}-gate" if gate == heldout else gate
                seen, _ = duel(control, self.gate, gate, unit)
                decision = beats_the_best_single(seen, recipe.gate, control.version)
                found, chosen = duel(control, self.heldout, heldout, unit)
                cost = extra_time(control, self.train[:_TIMED])
                low = found[0].low
                told = {"beats_best_single": low is not None and low > 0, "chosen": chosen, "extra_time": cost}
            else:
                decision = Decision(
                    "controller", control.version, "best-single", False, f"rejected: {stopped or 'no round was played'}"
                )
            unit.decision(decision)
            self.bench.progress.say(decision.reason)
            unit.note("failures", [stopped] if stopped else [])
            verdict = "promoted" if decision.accepted else "rejected" if learned else "stopped"
            summary = self._summary(unit, verdict, found, told)
            unit.note("controller", summary["controller"])
            unit.state = summary
        run.write_summary(summary)
        return Result(verdict, tuple(found), summary)

    def _summary(
        self, unit: Unit, verdict: str, evidence: Sequence[Evidence], told: dict[str, object]
    ) -> dict[str, object]:
        control, recipe, run = self.control, self.bench.recipe, self.bench.run
        ledger = run.ledger
        settings = [str(s) for s in control.controller.grid.settings]
        best = settings[control.best] if control.best >= 0 else None
        table = [{"setting": s, "reward": r, "replies": n} for s, (r, n) in zip(settings, control.table, strict=False)]
        told = {"scope": recipe.controller.scope, "objective": recipe.controller.objective} | told
        generations = [len(g["tokens"]) for g in ledger.rows("generations")]
        # This unit's own replies are not in the ledger yet.
        generations += [row[5].count(",") + 1 for row in unit.rows.get("generations", [])]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "run": run.name,
            "recipe": recipe.name,
            "recipe_hash": recipe.hash,
            "model": self.bench.lm.name,
            "seed": recipe.seed,
            "rounds": sum(u["name"].startswith("round-") for u in ledger.units()),
            "version": control.version if verdict == "promoted" else "start",
            "candidate": "start",  # of the model's weights, which nothing has changed
            "seconds": round(self.earlier + time.perf_counter() - self.started, 1),
            "completions": len(generations),
            "tokens_generated": sum(generations),
            "peak_memory_bytes": int(peak) if sys.platform == "darwin" else int(peak) * 1024,
            "decision": verdict,
            "evaluation": [dataclasses.asdict(e) for e in evidence],
            "controller": {"version": control.version, "best_single": best} | told | {"grid": table},
        }


@dataclasses.dataclass(frozen=True)
class Controlled:
    """A model that is drawn from as a run's controller chooses."""

    completer: LocalCompleter
    steering: Steered
    version: str

    def reply(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 64, seed: int = 0) -> list[Generation]:
        """One reply a prompt, by the controller's likeliest choices."""
        settings = SamplerSettings(max_new_tokens=max_new_tokens)
        table = self.completer.generate(
            prompts, samples=1, settings=settings, seed=seed, version=self.version, steering=self.steering
        )
        return [group[0] for group in table]


def load_controlled(name: str | None = None, *, runs: str | Path = "runs", version: str | None = None) -> Controlled:
    """The frozen model of a run with its controller; the newest run and its last controller unless named.

    Raises:
        StoreError: The run has no controller, or its checkpoint is damaged.
    """
    opened = Run.open(open_run(name, Path(runs)), write=False)
    try:
        units, model = opened.ledger.units(), opened.recipe.model
        # A unit that judged old replies again leaves no version.
        chosen = version or next((str(u["version"]) for u in reversed(units) if u["version"]), "start")
        if not opened.recipe.controller.enabled or chosen == "start":
            raise StoreError(
                f"{opened.name} has no controller",
                expected="a run of the controller recipe with at least its search done",
                fix="start one: tutelage run controller",
            )
        network = Controller.load(opened.verify_checkpoint(chosen) / "controller.safetensors")
        lm = load_model(model.name, device=model.device, dtype=model.dtype, hub=model.hub)
        steering = Steered(network.to(lm.device), menu_of(network.grid, lm), likeliest=True)
        told = opened.summary() or {}
        refused = told.get("decision") == "rejected" and told["controller"]["version"] == chosen
        doubt = " (rejected by the gate)" if refused else ""
        named = f"{opened.name}@{chosen}{doubt}"
        return Controlled(LocalCompleter(lm, rows=opened.recipe.sampling.rows), steering, named)
    finally:
        opened.close()
