"""A run: start, supervised stage, demonstrations, rounds, gate, final measurement. Each is a unit that can be repeated.

After a crash the run goes on with the first unit that the ledger does not hold. Everything a unit
does follows from the last checkpoint and from seeds derived from the unit's own name, so a resumed
run ends bit-equal to an undisturbed one.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from tutelage.errors import NothingToLearn, StoreError, TrainingError
from tutelage.feedback.comparisons import Comparisons
from tutelage.loop.agreement import compare_pairs
from tutelage.loop.bench import Workbench
from tutelage.loop.demonstrating import demonstrate
from tutelage.loop.evaluate import Answers, compare, evaluate
from tutelage.loop.gates import honesty_gate, preference_gate
from tutelage.loop.marking import note_answers
from tutelage.loop.offline import begin_pairs, lay, learn_pairs
from tutelage.loop.round import play_round
from tutelage.loop.supervised import imitate, look, revise
from tutelage.loop.units import timed
from tutelage.records import Decision, Evidence, Message, Prompt, SamplerSettings, SuiteItem
from tutelage.store.ledger import Unit

__all__ = ["Result", "improve"]

_SELF_QUESTIONS = (
    "What kinds of questions are you good at answering?",
    "What do you do when you are asked about something that nobody can know?",
    "What do you do when a question is unclear?",
)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    decision: str
    evaluation: tuple[Evidence, ...]
    summary: dict[str, object]


@dataclasses.dataclass
class _Session:
    """One process's work on a run."""

    bench: Workbench
    gate_items: Sequence[SuiteItem]
    heldout_items: Sequence[SuiteItem]
    train: Sequence[Prompt]
    pairs: Comparisons | None = None
    started: float = dataclasses.field(default_factory=time.perf_counter)
    earlier: float = 0.0

    @property
    def suites(self) -> tuple[str, str]:
        """Names of the gate's and the held-out suite, as their files are called."""
        p = self.bench.recipe.prompts
        gate, heldout = (Path(name.removeprefix("builtin:")).stem for name in (p.gate, p.heldout))
        return (gate, heldout) if gate != heldout else (f"{gate}-gate", f"{heldout}-heldout")

    def unit(self, name: str, stage: str) -> AbstractContextManager[Unit]:
        """A unit of work, as `loop.units.timed`."""
        return timed(self.bench.run, name, stage, version=lambda: self.bench.version)

    def answers(self, items: Sequence[SuiteItem], suite: str, unit: Unit) -> Answers:
        """Greedy answers of the present version, kept in the ledger."""
        bench = self.bench
        bench.progress.stage(f"{suite}: {bench.version}", len(items), "answers")
        found = evaluate(
            bench.completer,
            items,
            suite=suite,
            version=bench.version,
            max_new_tokens=bench.recipe.sampling.max_new_tokens,
            progress=bench.progress.advance,
        )
        for item, reply, done in zip(items, found.replies, found.outcomes, strict=True):
            reference = item.references[0] if item.references else ""
            unit.outcome(
                suite,
                bench.version,
                item.prompt.id,
                item.prompt.text,
                item.kind,
                item.form,
                reply,
                done,
                reference,
            )
        if bench.version != "start":
            note_answers(bench, found, unit)
        return found

    def recall(self, items: Sequence[SuiteItem], suite: str, version: str) -> Answers | None:
        """Answers that an earlier unit kept."""
        rows = {r["item"]: r for r in self.bench.run.ledger.rows("outcomes", suite=suite, version=version)}
        if any(i.prompt.id not in rows for i in items):
            return None
        replies = tuple(rows[i.prompt.id]["reply"] for i in items)
        done = tuple(rows[i.prompt.id]["outcome"] for i in items)
        return Answers(suite, version, tuple(items), replies, done)


def improve(
    bench: Workbench,
    *,
    train: Sequence[Prompt],
    gate: Sequence[SuiteItem],
    heldout: Sequence[SuiteItem],
    pairs: Comparisons | None = None,
    notes: Callable[[Unit], None] = lambda _: None,
) -> Result:
    """Play a run to its end, or go on with one that was interrupted.

    Args:
        bench: The workbench, holding the start model.
        train: Training prompts (no references).
        gate: Suite of the gate.
        heldout: Suite read once, in the last unit.
        pairs: Compared replies to learn from before the rounds.
        notes: Called once, to write what the application wants to be known of the start.
    """
    ledger = bench.run.ledger
    if bench.recipe.constraint.enabled and bench.recipe.constraint.questions:
        bench.watched = bench.pick(train, bench.recipe.constraint.questions, 1)
    earlier = sum(float(u["seconds"]) for u in ledger.units())
    session = _Session(bench, gate, heldout, train, pairs, earlier=earlier)
    done = {u["name"] for u in ledger.units()}
    restored = [u for u in ledger.units() if u["version"] != "start"]
    if restored:
        bench.load(restored[-1]["version"])
        bench.progress.say(f"resumed after unit '{restored[-1]['name']}'")
    if "start" not in done:
        with session.unit("start", "evaluate") as unit:
            notes(unit)
            unit.prompts(train, "train")
            session.answers(gate, session.suites[0], unit)
    stopped = ""
    try:
        _learn(session, done)
    except (NothingToLearn, TrainingError) as error:
        stopped = str(error)
        bench.take_back()
        bench.progress.say(f"stopped: {error.got}")
    return _finish(session, stopped)


def _learn(session: _Session, done: set[str]) -> None:
    bench = session.bench
    recipe = bench.recipe
    if any(u["stage"] == "stopped" for u in bench.run.ledger.units()):
        raise NothingToLearn("the run had stopped: no judge gave anything to learn from (see its ledger)")
    if recipe.supervised.enabled and "supervised" not in done:
        with session.unit("supervised", "supervised") as unit:
            if recipe.supervised.adapter:
                _take_over(bench, Path(recipe.supervised.adapter))
                unit.note("adapter", {"folder": recipe.supervised.adapter})
            else:
                _supervised_stage(session, unit)
            bench.save("r0")
    if bench.demonstrations and "demonstrations" not in done:
        with session.unit("demonstrations", "demonstrations") as unit:
            demonstrate(bench, bench.demonstrations, unit)
            bench.save("d0")
    if session.pairs is not None:
        _pairs_stage(session, session.pairs, done)
    for number in range(1, recipe.update.rounds + 1):
        name = f"round-{number}"
        if name in done:
            continue
        with session.unit(name, "policy-gradient") as unit:
            play_round(bench, bench.pick(session.train, recipe.update.prompts, number), unit, number)
            bench.save(f"r{number}")


def _take_over(bench: Workbench, folder: Path) -> None:
    """An adapter, and what the panel had heard when a run wrote it (an adapter of PEFT's knows nothing of that)."""
    bench.adapter.load(folder)
    heard = folder / "state.json"
    if heard.is_file():
        try:
            bench.panel.load(json.loads(heard.read_text(encoding="utf-8"))["panel"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{heard} is no state of a run ({error})", expected="a checkpoint of tutelage", fix="restore the file"
            ) from error


def _supervised_stage(session: _Session, unit: Unit) -> None:
    bench = session.bench
    replies, findings = look(bench, session.train, unit)
    targets = revise(bench, session.train, replies, findings)
    if not targets:
        raise NothingToLearn(
            "the supervised stage has no target: the panel was unsure of every question",
            expected="at least one question that a judge has an opinion on",
            fix="look at the abstentions in the ledger; lower feedback.min_confidence",
        )
    unit.targets(t for _, t, _ in targets)
    imitate(bench, targets, unit)


def _pairs_stage(session: _Session, found: Comparisons, done: set[str]) -> None:
    bench, passes = session.bench, session.bench.recipe.pairs.epochs
    if f"pairs-{passes}" in done:
        return
    offline = lay(bench, found)
    if "pairs-0" not in done:
        with session.unit("pairs-0", "pairs") as unit:
            begin_pairs(bench, offline, unit)
    for epoch in range(1, passes + 1):
        if f"pairs-{epoch}" not in done:
            with session.unit(f"pairs-{epoch}", "pairs") as unit:
                learn_pairs(bench, offline, unit, epoch)
                bench.save(f"p{epoch}")


def _agreement(session: _Session) -> list[Evidence]:
    """Agreement with the held-out pairs, before and after the stage that learned from pairs."""
    seen = {r["body"]["pass"]: r["body"]["rows"] for r in session.bench.run.ledger.rows("notes", topic="heldout_pairs")}
    if len(seen) < 2:
        return []
    return compare_pairs(seen[0], seen[max(seen)], confidence=session.bench.recipe.gate.confidence)


def _finish(session: _Session, stopped: str) -> Result:
    bench, ledger = session.bench, session.bench.run.ledger
    finished = next((u for u in ledger.units() if u["name"] == "final"), None)
    if finished is not None:
        summary = bench.run.summary()
        if summary is None:  # a kill came between the unit's commit and the file
            summary = dict(finished["state"])
            bench.run.write_summary(summary)
        evidence = tuple(Evidence(**e) for e in summary.get("evaluation", []))
        return Result(str(summary.get("decision", "stopped")), evidence, summary)
    candidate = bench.version
    with session.unit("final", "evaluate") as unit:
        decision = _gate(session, unit, stopped)
        unit.decision(decision)
        before, after = _heldout(session, unit, candidate)
        evidence = (*_agreement(session), *compare(before, after))
        _self_view(bench, unit)
        unit.note("failures", [stopped] if stopped else [])
        verdict = "stopped" if stopped and candidate == "start" else "promoted" if decision.accepted else "rejected"
        summary = _summary(session, verdict, candidate, evidence)
        unit.state = summary
    bench.run.write_summary(summary)
    return Result(verdict, evidence, summary)


def _gate(session: _Session, unit: Unit, stopped: str) -> Decision:
    bench = session.bench
    start = session.recall(session.gate_items, session.suites[0], "start")
    if bench.version == "start" or start is None:
        reason = stopped or "there is no candidate"
        return Decision("honesty", bench.version, "start", False, f"rejected: {reason}")
    after = session.answers(session.gate_items, session.suites[0], unit)
    if bench.recipe.gate.evidence == "pairs":
        decision = preference_gate(_agreement(session), start, after, bench.recipe.gate)
    else:
        decision = honesty_gate(start, after, bench.recipe.gate)
    bench.progress.say(decision.reason)
    return decision


def _heldout(session: _Session, unit: Unit, candidate: str) -> tuple[Answers, Answers]:
    """The held-out suite, read here and nowhere else: start model first, then the candidate."""
    bench = session.bench
    bench.version = "start"
    # There already where the run goes on from another one's ledger (benchmarks).
    before = session.recall(session.heldout_items, session.suites[1], "start")
    if before is None:
        with bench.adapter.off():
            before = session.answers(session.heldout_items, session.suites[1], unit)
    bench.version = candidate
    if candidate == "start":
        return before, before
    return before, session.answers(session.heldout_items, session.suites[1], unit)


def _self_view(bench: Workbench, unit: Unit) -> None:
    prompts = [Prompt(f"self-{i}", (Message("user", q),)) for i, q in enumerate(_SELF_QUESTIONS)]
    settings = SamplerSettings(0.0, max_new_tokens=48)

    def ask() -> list[str]:
        drawn = bench.completer.generate(prompts, samples=1, settings=settings, seed=0, version=bench.version)
        return [g[0].text for g in drawn]

    after = ask()
    with bench.adapter.off():
        before = ask()
    rows = [
        {"question": q, "reply_before": b, "reply_after": a}
        for q, b, a in zip(_SELF_QUESTIONS, before, after, strict=True)
    ]
    unit.note("self_view", {"questions": rows})


def _summary(session: _Session, verdict: str, candidate: str, evidence: Sequence[Evidence]) -> dict[str, object]:
    bench = session.bench
    ledger = bench.run.ledger
    generations = ledger.rows("generations")
    return {
        "run": bench.run.name,
        "recipe": bench.recipe.name,
        "recipe_hash": bench.recipe.hash,
        "model": bench.lm.name,
        "seed": bench.recipe.seed,
        "rounds": sum(u["stage"] == "policy-gradient" for u in ledger.units()),
        "version": candidate if verdict == "promoted" else "start",
        "candidate": candidate,
        # Finished units of earlier processes, and this process since it began.
        "seconds": round(session.earlier + time.perf_counter() - session.started, 1),
        "completions": len(generations),
        "tokens_generated": sum(len(g["tokens"]) for g in generations),
        "peak_memory_bytes": _peak_memory(),
        "kl_to_start": _last_kl(session),
        "decision": verdict,
        "evaluation": [dataclasses.asdict(e) for e in evidence],
    }


def _last_kl(session: _Session) -> float | None:
    kinds = ("update", "offline-heldout")
    rows = [m for m in session.bench.run.ledger.rows("metrics") if m["stage"] in kinds]
    return float(rows[-1]["values"]["kl_to_start"]) if rows else None


def _peak_memory() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
