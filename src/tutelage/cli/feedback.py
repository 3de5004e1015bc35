"""Commands around judges, constitutions, critics and people."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from tutelage.cli.common import Json, Newest, Runs, Values, app, help_, show

judge = App(name="judge", help="Check judges before they are trusted.")
app.command(judge)

Judges = Annotated[
    list[str],
    Parameter(
        name="--judge",
        negative="",
        help="judge, repeatable: [pairwise=|pointwise=|listwise=|critic=]MODEL, or package.module:name",
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
