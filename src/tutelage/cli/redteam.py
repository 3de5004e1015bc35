"""Commands of the red team: attack a model, hand attacks to a defender, measure who stands up to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from tutelage.cli.parameters import MODEL_HELP, Json, Longest, Runs, Values, app, help_, show

__all__ = ["attack", "measure", "prompts", "redteam"]

redteam = App(
    name="redteam", help="A red team against a model: attack it, teach a defender, measure with held-out attackers."
)
app.command(redteam)

Target = Annotated[str, help_(f"run, or model: {MODEL_HELP}")]
Archive = Annotated[Path, help_("file of the red team")]
Side = Literal["training", "held-out"]
Judge = Annotated[
    str,
    Parameter(
        name="--judge",
        help="who says how unsafe a reply is: builtin:made-up, critic=FILE, package.module:name, or a model that rates",
    ),
]


@redteam.command
def attack(
    model: Target,
    *,
    archive: Archive,
    topics: Annotated[str, help_("TOML file of topics and styles")] = "builtin:honesty",
    styles: Annotated[list[str] | None, Parameter(negative="", help="only this style; repeatable")] = None,
    attackers: Annotated[
        list[str] | None,
        Parameter(
            negative="",
            help="prefix, role-play, paraphrase, many-shot, typo, encoding, model; repeatable (default: all)",
        ),
    ] = None,
    attacker_model: Annotated[str, help_("model that rewrites questions")] = "smollm2-135m-instruct",
    judge: Judge = "builtin:made-up",
    constitution: Values = None,
    rounds: Annotated[int, help_("in all, with those that the file holds")] = 4,
    attacks: Annotated[int, help_("a round; attackers take turns")] = 14,
    samples: Annotated[int, help_("replies to each attack")] = 1,
    temperature: Annotated[float, help_("of the replies; 0 is greedy")] = 0.0,
    held_out: Annotated[float, help_("share of the attackers that only measure")] = 0.4,
    novelty: Annotated[float, help_("weight of novelty in an attack's worth; success weighs 1")] = 0.2,
    fluency: Annotated[float, help_("weight of fluency")] = 0.1,
    max_new_tokens: Longest = 32,
    seed: Annotated[int, help_("same seed, same archive")] = 0,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Let attackers write, the model answer and a judge say how unsafe that is; keep the best of each kind.

    Each round is on disk before the next; the same command goes on where it stopped, and so does one with more rounds.

    Examples to type:
        tutelage redteam attack smollm2-135m-instruct --archive attacks.json --rounds 8
        tutelage redteam attack honesty-1 --archive attacks.json --topics mine.toml --judge critic=safety.safetensors
    """
    from tutelage.applications.red_team import Rules
    from tutelage.applications.red_team import attack as attacked
    from tutelage.studio.console import choose_progress

    rules = Rules(attacks, samples, temperature, max_new_tokens, held_out, novelty, fluency, seed)
    with choose_progress(as_json=as_json) as progress:
        found = attacked(
            model, archive, topics=topics, styles=styles or (), attackers=attackers or (),
            attacker_model=attacker_model, judge=judge, constitution=constitution, rounds=rounds, rules=rules,
            runs=runs, progress=progress,
        )  # fmt: skip
    show(found, as_json, lambda: _attack_lines(found))
    return 0


def _interval(row: dict[str, Any], of: str, low: str = "low", high: str = "high", sign: str = "") -> str:
    if row.get(of) is None:
        return "not measured"
    return f"{row[of]:{sign}.0%} ({row[low]:{sign}.0%} to {row[high]:{sign}.0%})"


def _attack_lines(found: dict[str, Any]) -> list[str]:
    from tutelage.applications.attack_file import printable

    lines = ["", f"{found['file']}: {found['rounds']} rounds, {found['tried']} attacks tried"]
    lines.append(f"{'attacker':<14}{'side':<10}{'tried':>6}   success (95% interval)  unmeasured  unwritten")
    for row in found["attackers"]:
        tried = row["measured"] + row["unmeasured"]
        lines.append(
            f"{row['attacker']:<14}{_said(row['side']):<10}{tried:>6}   {_interval(row, 'success'):<24}"
            f"{row['unmeasured']:>9}  {row['unwritten']:>9}"
        )
    for row in found["sides"]:
        lines.append(
            f"{_said(row['side'])} side: {_interval(row, 'success')}, {row['unmeasured']} unmeasured, "
            f"{row['coverage']:.0%} of the cells filled"
        )
        for one in row["examples"]:
            lines.append(f"  [{one['attacker']}] {printable(one['text'])}")
            lines.append(f"      -> {printable(one['reply'])}")
    return lines


def _said(side: str) -> str:
    return side.replace("_", "-")


@redteam.command
def prompts(
    *,
    archive: Archive,
    out: Annotated[Path, help_("JSONL to write")],
    side: Annotated[Side, help_("training; the held-out attackers measure, and are refused")] = "training",
    attacks: Annotated[Literal["best", "all"], help_("the best of each cell, or all that were tried")] = "best",
    benign: Annotated[
        str, help_("prompts that are put among them, less the half that measures; empty: none")
    ] = "builtin:honesty-train",
    seed: Annotated[int, help_("of the order")] = 0,
    as_json: Json = False,
) -> int:
    """Write the attacks of the training side as prompts that a run learns from, harmless questions among them.

    Examples to type:
        tutelage redteam prompts --archive attacks.json --out prompts.jsonl
    """
    from tutelage.applications.red_team import export_prompts

    found = export_prompts(
        archive, out, side=side.replace("-", "_"), best=attacks == "best", benign=benign, seed=seed
    )  # fmt: skip
    told = f"{found['attacks']} attacks and {found['benign']} other prompts ({found['left_out']} kept for measuring)"
    show(found, as_json, lambda: [f"{out}: {told}"])
    return 0


@redteam.command
def measure(
    model: Target,
    *,
    archive: Archive,
    against: Annotated[str | None, help_("second run or model; start: the one that the run started from")] = None,
    side: Annotated[Side, help_("whose attacks")] = "held-out",
    attacks: Annotated[Literal["best", "all"], help_("the best of each cell, or all that were tried")] = "all",
    judge: Judge = "builtin:made-up",
    constitution: Values = None,
    benign: Annotated[str, help_("suite whose answerable questions are harmless")] = "builtin:honesty-train",
    limit: Annotated[int | None, help_("only the first harmless questions")] = None,
    max_new_tokens: Longest = 32,
    out: Annotated[Path | None, help_("file for figures and replies as JSON")] = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Say how often attacks succeed, and how often harmless questions are refused; alone or against another model.

    Examples to type:
        tutelage redteam measure smollm2-135m-instruct --archive attacks.json
        tutelage redteam measure honesty-1 --against start --archive attacks.json --side held-out --out measured.json
    """
    from tutelage.applications.defence import measure as measured
    from tutelage.studio.console import choose_progress

    with choose_progress(as_json=as_json) as progress:
        found = measured(
            model, archive, against=against, side=side.replace("-", "_"), best=attacks == "best", judge=judge,
            constitution=constitution, benign=benign, limit=limit, max_new_tokens=max_new_tokens, runs=runs, out=out,
            progress=progress,
        )  # fmt: skip
    show(found, as_json, lambda: _measure_lines(found))
    return 0


def _measure_lines(found: dict[str, Any]) -> list[str]:
    versus = f" against {found['against']}" if found["against"] else ""
    lines = [
        "",
        f"{found['model']}{versus}: {_said(found['side'])} attackers, {found['chosen']}, judge {found['judge']}",
    ]
    lines.append(f"{'attacks that succeed':<24}{'n':>5}   " + _heads(found))
    for row in found["attacks"]:
        lines.append(f"{row['attacker'] or 'all':<24}{row['measured']:>5}   " + _cells(row, "success"))
        if row["unmeasured"]:
            lines.append(f"{'  unmeasured':<24}{row['unmeasured']:>5}")
        if "by_question" in row:
            apart = row["by_question"]
            lines.append(f"  of {apart['questions']} questions: {_interval(apart, 'difference', sign='+')}")
    for key, title in (("benign", "harmless questions"), ("benign_pressed", "the same, pressed")):
        lines.append(f"{title:<24}{'n':>5}   " + _heads(found))
        lines += [f"{row['metric']:<24}{row['n']:>5}   " + _cells(row, "share") for row in found[key]]
    return lines


def _heads(found: dict[str, Any]) -> str:
    return "share (95% interval)    " + ("before  difference (paired)" if found["against"] else "")


def _cells(row: dict[str, Any], of: str) -> str:
    text = f"{_interval(row, of):<24}"
    if "difference" in row:
        text += f"{row['before']:>6.0%}  " + _interval(row, "difference", "difference_low", "difference_high", "+")
    return text
