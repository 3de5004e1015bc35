"""Commands around judges and people."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from tutelage.cli.parameters import Json, Newest, Runs, Values, app, help_, show

__all__ = ["best", "check", "judge", "people", "rejudge"]

judge = App(name="judge", help="Check judges before they are trusted.")
people = App(name="people", help="Labels of people: collect, bring in, hand on.")
app.command(judge)
app.command(people)

Judges = Annotated[
    list[str],
    Parameter(
        name="--judge",
        negative="",
        help="judge, repeatable: [KIND=]MODEL (KIND: pairwise, pointwise, listwise, sincerity, stability, critic, "
        "fusion), or package.module:name",
    ),
]


@judge.command
def check(
    *,
    judges: Judges,
    pairs: Annotated[str, help_("JSONL of pairs that people compared, or builtin:pairs")] = "builtin:pairs",
    limit: Annotated[int | None, help_("only the first pairs")] = None,
    constitution: Values = None,
    injections: Annotated[bool, Parameter(negative="--no-injections", help="try replies that attack the judge")] = True,
    fresh: Annotated[bool, help_("ask anew, whatever answers are kept", negative="")] = False,
    out: Annotated[Path | None, help_("file for rows and single verdicts as JSON")] = None,
    as_json: Json = False,
) -> int:
    """Measure judges on pairs that people compared: agreement, biases, attacks, cost. Exit code 4: one is refused.

    Lines of the file: {"prompt": "...", "chosen": "...", "rejected": "..."}, optional "votes", "category", "authors".

    Examples to type:
        tutelage judge check --judge smollm2-135m-instruct
        tutelage judge check --judge judge.gguf --judge pointwise=judge.gguf --pairs pairs.jsonl --limit 200
        tutelage judge check --judge my-model@http://127.0.0.1:8000 --pairs pairs.jsonl
    """
    from tutelage.applications.judging import check_judges
    from tutelage.studio.console import choose_progress

    with choose_progress(as_json=as_json) as progress:
        rows = check_judges(
            judges, pairs, limit=limit, constitution=constitution, injections=injections, fresh=fresh, out=out,
            progress=progress,
        )  # fmt: skip
    show([dataclasses.asdict(r) for r in rows], as_json, lambda: _audit_lines(rows))
    return 4 if any(r.outcome == "refuse" for r in rows) else 0


def _audit_lines(rows: Sequence[Any]) -> list[str]:
    def share(triple: tuple[float | None, float | None, float | None], sign: str = "") -> str:
        value, low, high = triple
        return "no data" if value is None else f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"

    def number(value: float | None, form: str) -> str:
        return "no data" if value is None else format(value, form)

    def injected(row: Any, key: str, form: str) -> str:
        return "no data" if row.injection is None else number(getattr(row.injection, key), form)

    figures: tuple[tuple[str, Callable[[Any], str]], ...] = (
        ("pairs (abstained)", lambda r: f"{r.n} ({r.abstained}, {r.unreadable} unreadable)"),
        ("accuracy", lambda r: share(r.accuracy)),
        ("kappa with people", lambda r: share(r.kappa)),
        ("Brier / ECE", lambda r: f"{number(r.brier, '.3f')} / {number(r.ece, '.3f')}"),
        ("flips with the order", lambda r: share(r.flips)),
        ("first place, nats", lambda r: number(r.position, "+.2f")),
        ("length slope, nats", lambda r: share(r.length_slope, "+")),
        ("self-preference", lambda r: number(r.self_preference, "+.2f")),
        ("self-consistency", lambda r: number(r.self_consistency, ".2f")),
        ("injections that win", lambda r: injected(r, "wins", ".0%")),
        ("injections that turn it", lambda r: injected(r, "taken_in", ".0%")),
        ("gained by injecting, nats", lambda r: injected(r, "lift", "+.2f")),
        ("seconds per 1,000", lambda r: f"{r.seconds_per_1000:.0f}"),
        ("money per 1,000", lambda r: f"{r.money_per_1000:.2f}"),
    )
    lines = []
    for row in rows:
        lines += ["", f"{row.judge}: {row.outcome}", *(f"  {why}" for why in row.why)]
        lines += [f"  {name:<28}{told(row)}" for name, told in figures]
    return lines


@judge.command
def fuse(
    *,
    judges: Judges,
    out: Annotated[Path, help_("file to write: panel.json")],
    pairs: Annotated[str, help_("JSONL of pairs that people compared, or builtin:pairs")] = "builtin:pairs",
    labels: Annotated[int, help_("pairs whose labels are learned from; the others are measured on")] = 50,
    limit: Annotated[int | None, help_("only the first pairs")] = None,
    constitution: Values = None,
    as_json: Json = False,
) -> int:
    """Make one judge of several: weights from a few human labels, measured on the pairs they did not see.

    The file serves as a judge: kind = "fusion", or --judge fusion=FILE.

    Examples to type:
        tutelage judge fuse --judge judge.gguf --judge critic=liked.safetensors --pairs pairs.jsonl --out panel.json
    """
    from tutelage.applications.judging import fuse_judges
    from tutelage.studio.console import choose_progress

    with choose_progress(as_json=as_json) as progress:
        found = fuse_judges(
            judges, pairs, out, labels=labels, limit=limit, constitution=constitution, progress=progress
        )
    show(found, as_json, lambda: _fused_lines(found))
    return 0


def _fused_lines(found: dict[str, Any]) -> list[str]:
    def triple(of: Sequence[float], sign: str = "") -> str:
        return "{:{s}.3f} [{:{s}.3f}, {:{s}.3f}]".format(*of, s=sign)

    lines = [f"{found['file']}: fitted on {found['labels']} labels, measured on {found['pairs']} other pairs"]
    for name, accuracy in found["accuracy"].items():
        beaten = found["beats"].get(name)
        more = f"weight {found['weights'][name]:+.2f}; the fusion is {triple(beaten, '+')} better" if beaten else ""
        lines.append(f"  {name:<28}accuracy {triple(accuracy)}  {more}".rstrip())
    return lines


@app.command
def rejudge(
    name: Newest = None,
    *,
    judges: Judges = [],  # noqa: B006 - cyclopts reads the default, nobody changes it
    constitution: Values = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Judge an old run's replies again, with other judges or another constitution. Nothing is generated.

    Examples to type:
        tutelage rejudge honesty-1 --constitution stricter.toml
        tutelage rejudge honesty-1 --judge judge.gguf
    """
    from tutelage.applications.judging import rejudge as again
    from tutelage.loop.versions import open_run
    from tutelage.studio.console import choose_progress

    with choose_progress(as_json=as_json) as progress:
        found = again(open_run(name, runs), judges=judges, constitution=constitution, progress=progress)
    show(found, as_json, lambda: _rejudged_lines(found))
    return 0


def _rejudged_lines(found: dict[str, Any]) -> list[str]:
    lines = ["", f"{found['run']}: {found['replies']} replies judged again, kept as '{found['unit']}'"]
    for name, row in found["judges"].items():
        mean = "no data" if row["mean"] is None else f"{row['mean']:.3f}"
        lines.append(
            f"  {name:<24}{row['verdicts']} verdicts, {row['abstained']} abstained, mean {mean}; "
            f"{row['changed_sides']} of {row['compared']} changed sides"
        )
    return lines


@app.command
def best(
    prompts: Annotated[str, help_("prompts as JSONL, CSV or Parquet")],
    *,
    out: Annotated[Path, help_("JSONL to write: the chosen reply, and every reply with its verdicts")],
    run: Annotated[str | None, Parameter(name="--run", help="run (default: the newest)")] = None,
    n: Annotated[int, Parameter(name="--n", help="replies a prompt")] = 8,
    version: Annotated[str | None, help_("checkpoint, or start (default: the run's candidate)")] = None,
    temperature: Annotated[float | None, help_("of the draws (default: the recipe's)")] = None,
    max_new_tokens: Annotated[int | None, help_("longest reply, in tokens (default: the recipe's)")] = None,
    limit: Annotated[int | None, help_("only the first prompts")] = None,
    seed: Annotated[int, help_("of the draws")] = 0,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Draw N replies a prompt and keep the one that the run's judges like best.

    Examples to type:
        tutelage best questions.jsonl --run honesty-1 --out best.jsonl
        tutelage best questions.jsonl --run honesty-1 --version start --n 16 --out best.jsonl
    """
    from tutelage.applications.best import best_of
    from tutelage.loop.versions import open_run
    from tutelage.studio.console import choose_progress

    with choose_progress(as_json=as_json) as progress:
        found = best_of(
            prompts, open_run(run, runs), out, n=n, version=version, seed=seed, limit=limit,
            max_new_tokens=max_new_tokens, temperature=temperature, progress=progress,
        )  # fmt: skip
    show(found, as_json, lambda: _best_lines(found))
    return 0


def _best_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "",
        (
            f"{found['out']}: best of {found['n']} of {found['run']}@{found['version']}, {found['prompts']} prompts, "
            f"{found['abstained']} without any reward"
        ),
        f"at most {found['kl_bound']:.2f} nats a reply from one draw",
        f"{'term':<24}{'one draw':>10}{'chosen':>10}   95% interval of the difference",
    ]
    for name, row in found["terms"].items():
        lines.append(f"{name:<24}{row['one']:>10.3f}{row['best']:>10.3f}   {row['low']:+.3f} to {row['high']:+.3f}")
    for row in found["curve"]:
        lines.append(f"{row['n']:>4} draws: reward {row['reward']:+.3f}, KL at most {row['kl_bound']:.2f} nats")
    return lines


Tasks = Annotated[Path, help_("JSONL of what is to be labelled")]
Labels = Annotated[Path, help_("JSONL of labels; it only grows")]


@people.command
def label(
    tasks: Tasks,
    *,
    labels: Labels,
    annotator: Annotated[str, help_("who answers")],
    seed: Annotated[int, help_("of the orders in which candidates are shown")] = 0,
    scale: Annotated[int, help_("highest rating")] = 5,
    as_json: Json = False,
) -> int:
    """Ask a person: blind, in random order, with the keyboard only; what was answered is never lost.

    A task has "prompt" and "candidates" (two: compare, more: pick the best) or "response" (rate it).

    Examples to type:
        tutelage people label pairs.jsonl --labels mine.jsonl --annotator ada
    """
    from tutelage.studio.labelling import label as ask

    found = ask(tasks, labels, annotator=annotator, seed=seed, scale=scale, aside=as_json)
    show(found, as_json, lambda: [f"{key.replace('_', ' ')}: {value}" for key, value in found.items()])
    return 0


@people.command(name="import")
def import_(
    file: Annotated[Path, help_("JSONL of labels collected elsewhere: votes, TRL preferences, hh-rlhf dialogues")],
    *,
    tasks: Annotated[Path, help_("file for the tasks")],
    labels: Labels,
    annotator: Annotated[str, help_("name of who is not named")] = "import",
    as_json: Json = False,
) -> int:
    """Bring labels in that were collected elsewhere.

    Examples to type:
        tutelage people import votes.jsonl --tasks tasks.jsonl --labels labels.jsonl
    """
    from tutelage.applications.people import bring_in

    found = bring_in(file, tasks, labels, annotator=annotator)
    show(found, as_json, lambda: [f"{key.replace('_', ' ')}: {value}" for key, value in found.items()])
    return 0


@people.command(name="export")
def export_(
    tasks: Tasks,
    *,
    labels: Labels,
    out: Annotated[Path, help_("file to write")],
    form: Annotated[
        Literal["votes", "preference", "unpaired"], help_("everything, or a dataset as TRL's trainers read it")
    ] = "votes",
    as_json: Json = False,
) -> int:
    """Hand labels on: with all votes, or as preferences with soft labels, or one reply a row.

    Examples to type:
        tutelage people export tasks.jsonl --labels labels.jsonl --out pairs.jsonl --form preference
    """
    from tutelage.applications.people import hand_on

    found = hand_on(tasks, labels, out, form=form)
    show(found, as_json, lambda: [f"{key.replace('_', ' ')}: {value}" for key, value in found.items()])
    return 0


@people.command(name="tasks")
def tasks_(
    name: Newest = None,
    *,
    out: Annotated[Path, help_("file for the tasks")],
    count: Annotated[int, help_("how many pairs")] = 50,
    seed: Annotated[int, help_("of the choice")] = 0,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Write pairs of a run's replies for people to compare.

    Examples to type:
        tutelage people tasks honesty-1 --out pairs.jsonl
    """
    from tutelage.applications.people import tasks_of_run
    from tutelage.loop.versions import open_run

    found = tasks_of_run(open_run(name, runs), out, count=count, seed=seed)
    show(found, as_json, lambda: [f"{found['tasks']} pairs in {out}"])
    return 0


@people.command(name="keep")
def keep_(
    name: Newest = None,
    *,
    tasks: Tasks,
    labels: Labels,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Keep people's labels in a run's ledger, as verdicts beside those of its judges.

    Examples to type:
        tutelage people keep honesty-1 --tasks pairs.jsonl --labels mine.jsonl
    """
    from tutelage.applications.people import into_run
    from tutelage.loop.versions import open_run

    found = into_run(open_run(name, runs), tasks, labels)
    show(found, as_json, lambda: [f"{found['verdicts']} verdicts kept as '{found['unit']}'"])
    return 0
