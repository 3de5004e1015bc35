"""The same in Python as on the command line.

import tutelage

result = tutelage.run("honesty", model="DIR", overrides=["update.rounds=2"])
report = tutelage.evaluate("runs/honesty-1", suite="my-suite.jsonl")
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tutelage.config import Recipe, data_file, load_recipe
from tutelage.engines.weights import EMBEDDED_POLICY
from tutelage.errors import InputError, JudgeRefused, ModelError, RecipeError
from tutelage.loop.versions import load_for_use, open_run
from tutelage.records import Progress
from tutelage.store.runs import Run, check_folder, write_atomic

if TYPE_CHECKING:
    from tutelage.engines.load import LanguageModel
    from tutelage.loop.evaluate import Answers
    from tutelage.loop.improve import Result

__all__ = [
    "Measured", "attack", "evaluate", "export", "load_for_use", "measure_attacks", "measured", "open_run", "run",
]  # fmt: skip


def run(
    recipe: str | Path | Recipe = "honesty",
    *,
    model: str | None = None,
    prompts: str | None = None,
    constitution: str | None = None,
    overrides: Sequence[str] = (),
    name: str | None = None,
    runs: str | Path = "runs",
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Play a recipe to its end and write the report.

    Args:
        recipe: Built-in name, TOML file or `Recipe`.
        model: Embedded name, directory, GGUF file or hub name; overrides the recipe.
        prompts: Training prompts (JSONL, CSV, Parquet); overrides the recipe.
        constitution: TOML file of principles; overrides the recipe.
        overrides: Dotted assignments, for example ``["update.rounds=2"]``; with `resume` only limits.
        name: Name of the run's folder; with `resume`, the run to continue (default: the newest).
        runs: Folder that holds runs.
        resume: Continue an interrupted run instead of starting one; the recipe is the run's own.
        progress: Told what happens; silent by default.

    Returns:
        Decision, evaluation with paired 95% intervals, and the summary.

    Raises:
        TutelageError: With a message that says what was got, expected, and what to do.
    """
    from tutelage.applications import controller, truthfulness
    from tutelage.loop.bench import Silent
    from tutelage.studio.report import write_report

    told = progress or Silent()
    root = Path(runs)
    if resume:
        opened = Run.open(open_run(name, root), write=True)
        opened.recipe = _relimited(opened, overrides)
    else:
        chosen = recipe if isinstance(recipe, Recipe) else load_recipe(
            recipe, overrides, model=model, prompts=prompts, constitution=constitution
        )  # fmt: skip
        truthfulness.inputs(chosen)  # every file is read before a folder is made or a model loaded
        opened = Run.create(root, chosen, name)
    told.say(f"run {opened.folder}")
    try:
        play = controller.play if opened.recipe.controller.enabled else truthfulness.play
        result = play(opened, told)
        write_report(opened)
    except (InputError, JudgeRefused, ModelError, RecipeError):
        if not resume and not opened.ledger.units():
            opened.discard()  # wrong use leaves nothing behind, not even the name
        raise
    else:
        return result
    finally:
        opened.close()


def _relimited(opened: Run, overrides: Sequence[str]) -> Recipe:
    """The run's own recipe; only its limits may be changed when it goes on.

    Raises:
        RecipeError: Another key was to be changed.
    """
    other = [o for o in overrides if not o.strip().startswith("limits.")]
    if other:
        opened.close()
        raise RecipeError(
            f"'{other[0]}' cannot be changed while a run goes on",
            expected="--set limits.KEY=VALUE, or nothing",
            fix="start a new run with the changed recipe",
        )
    return load_recipe(opened.folder / "recipe.toml", overrides)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What `evaluate` found.

    `metrics` maps a name to (share, low, high); `against` holds paired differences when two models
    were compared.
    """

    model: str
    suite: str
    n: int
    outcomes: dict[str, dict[str, int]]
    metrics: dict[str, tuple[float | None, float | None, float | None]]
    against: tuple[dict[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        shown = {k: dict(zip(("share", "low", "high"), v, strict=True)) for k, v in self.metrics.items()}
        return dataclasses.asdict(self) | {"metrics": shown, "against": list(self.against)}


def evaluate(
    model: str,
    *,
    suite: str | Path,
    against: str | None = None,
    runs: str | Path = "runs",
    system: str | None = None,
    max_new_tokens: int = 32,
    limit: int | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Measure a model or run on a suite, alone or against another, item by item.

    Args:
        model: A model or a run.
        suite: JSONL lines ``{"prompt", "references", "kind"}``, or ``builtin:honesty-gate``.
        against: A second model or run; differences are (model - against).
        runs: Folder that holds runs.
        system: System prompt put before every question.
        max_new_tokens: Longest reply.
        limit: Only the first items.
        out: File for the answers and figures as JSON.
        progress: Told what happens.

    Raises:
        TutelageError: A model or suite cannot be read, `out` not written, or a number makes no sense.
    """
    from tutelage.loop.evaluate import compare
    from tutelage.store.prompts import read_suite

    check_folder(out)
    path = data_file(str(suite), suffix="questions/*.jsonl")
    items = read_suite(path, limit=limit)
    lm = load_for_use(model, runs=runs)
    answers = _answers(lm, items, path.stem, system, max_new_tokens, progress)
    differences: tuple[dict[str, Any], ...] = ()
    if against is not None:
        # In the same precision, or rounding would be measured as well.
        second = load_for_use(against, runs=runs, dtype=str(lm.dtype).removeprefix("torch."))
        other = _answers(second, items, path.stem, system, max_new_tokens, progress)
        differences = tuple(dataclasses.asdict(e) for e in compare(other, answers))
    found = measured(answers, differences)
    if out is not None:
        rows = [
            {"prompt": i.prompt.text, "kind": i.kind, "reply": r, "outcome": o}
            for i, r, o in zip(items, answers.replies, answers.outcomes, strict=True)
        ]
        text = json.dumps(found.as_dict() | {"answers": rows}, indent=2, ensure_ascii=False)
        write_atomic(Path(out), text + "\n")
    return found


def measured(answers: Answers, against: Sequence[dict[str, Any]] = ()) -> Measured:
    """Counts and shares of a model's replies to a suite.

    Args:
        answers: The replies, with what each did.
        against: Paired differences to another model's, if there is one.
    """
    from tutelage.loop.evaluate import shares

    counts = {
        kind: {o: answers.of(kind).count(o) for o in ("correct", "wrong", "abstained", "asked_back")}
        for kind in ("answerable", "unanswerable", "ambiguous")
    }
    return Measured(answers.version, answers.suite, len(answers.items), counts, shares(answers), tuple(against))


def _answers(
    lm: LanguageModel,
    items: Sequence[Any],
    suite: str,
    system: str | None,
    max_new_tokens: int,
    progress: Progress | None,
) -> Answers:
    from tutelage.engines.local import LocalCompleter
    from tutelage.loop.evaluate import evaluate as measure
    from tutelage.records import Message

    if system is not None:
        lead = Message("system", system)
        items = [
            dataclasses.replace(i, prompt=dataclasses.replace(i.prompt, messages=(lead, *i.prompt.messages)))
            for i in items
        ]
    if progress is not None:
        progress.stage(f"{suite}: {lm.name}", len(items), "answers")
    return measure(
        LocalCompleter(lm),
        items,
        suite=suite,
        version=lm.name,
        max_new_tokens=max_new_tokens,
        progress=progress.advance if progress is not None else lambda _: None,
    )


def export(run_name: str, *, merged: str | Path, runs: str | Path = "runs") -> Path:
    """Write a run's model with the adapter merged in, as a directory that transformers loads.

    Raises:
        InputError: The target exists and is not empty, or the run trained a controller and no weights.
    """
    from tutelage.policy.model import save_merged

    target = Path(merged)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "not empty" if target.is_dir() else "a file"
        raise InputError(f"{target} is {what}", expected="a new or empty folder", fix="choose another folder")
    folder = open_run(run_name, Path(runs))
    opened = Run.open(folder, write=False)
    opened.close()
    if opened.recipe.controller.enabled:
        raise InputError(
            f"{opened.name} trained a controller: its model's weights are the start's, and no such folder can hold it",
            expected="a run that trained weights",
            fix=f"talk to it with `tutelage chat {opened.name}`; in Python: applications.controller.load_controlled",
        )
    lm = load_for_use(str(folder), runs=runs)
    save_merged(lm, target)
    return target


def attack(
    model: str,
    *,
    archive: str | Path,
    topics: str = "builtin:honesty",
    styles: Sequence[str] = (),
    attackers: Sequence[str] = (),
    attacker_model: str = EMBEDDED_POLICY,
    judge: str = "builtin:made-up",
    constitution: str | None = None,
    rounds: int = 4,
    runs: str | Path = "runs",
    progress: Progress | None = None,
    **rules: Any,
) -> dict[str, Any]:
    """Let a red team attack a model, and keep the best attack of each kind in a file.

    Args:
        model: A model or a run.
        archive: The file; one that is there is gone on with.
        topics: TOML file of topics and styles.
        styles: Only these styles.
        attackers: Who writes; none takes all.
        attacker_model: The model that rewrites questions.
        judge: `builtin:made-up`, `critic=FILE`, `package.module:name`, or a model that rates.
        constitution: Principles, for a model that judges.
        rounds: In all, with those that the file holds.
        runs: Folder that holds runs.
        progress: Told what happens.
        rules: Fields of `applications.red_team.Rules`, for example ``temperature=0.7, samples=4``.

    Returns:
        Attack success by attacker and side with 95% intervals, what is missing, coverage, examples.

    Raises:
        TutelageError: A file, model or judge cannot be used, or a number makes no sense.
    """
    from tutelage.applications import red_team
    from tutelage.loop.bench import Silent

    known = [f.name for f in dataclasses.fields(red_team.Rules)]
    strange = [name for name in rules if name not in known]
    if strange:
        raise InputError(f"'{strange[0]}' is no rule of a red team", expected=", ".join(known))
    return red_team.attack(
        model, Path(archive), topics=topics, styles=styles, attackers=attackers, attacker_model=attacker_model,
        judge=judge, constitution=constitution, rounds=rounds, rules=red_team.Rules(**rules), runs=Path(runs),
        progress=progress or Silent(),
    )  # fmt: skip


def measure_attacks(
    model: str,
    *,
    archive: str | Path,
    against: str | None = None,
    side: Literal["held_out", "training"] = "held_out",
    judge: str = "builtin:made-up",
    benign: str = "builtin:honesty-train",
    limit: int | None = None,
    max_new_tokens: int = 32,
    runs: str | Path = "runs",
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Put the attacks of a side and harmless questions to a model, alone or against another.

    Args:
        model: A model or a run.
        archive: What `attack` wrote.
        against: A second one; "start" is the model that the run started from.
        side: Whose attacks; a defender is measured with the held-out ones.
        judge: As for `attack`.
        benign: Suite whose answerable questions are harmless.
        limit: Only the first of those.
        max_new_tokens: Longest reply.
        runs: Folder that holds runs.
        out: File for figures and replies as JSON.
        progress: Told what happens.

    Returns:
        `attacks` by attacker, the first row all together, and `benign`, with paired intervals.

    Raises:
        TutelageError: A file, model or judge cannot be used.
    """
    from tutelage.applications.defence import measure
    from tutelage.loop.bench import Silent

    return measure(
        model, Path(archive), against=against, side=side, judge=judge, benign=benign, limit=limit,
        max_new_tokens=max_new_tokens, runs=Path(runs), out=None if out is None else Path(out),
        progress=progress or Silent(),
    )  # fmt: skip
