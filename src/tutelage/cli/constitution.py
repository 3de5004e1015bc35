"""Commands around constitutions: check, compare, revise by, infer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from tutelage.cli.parameters import Json, Longest, app, help_, show

__all__ = ["check", "constitution", "diff", "infer", "revise"]

constitution = App(name="constitution", help="Constitutions: check, compare, revise by, infer from preferences.")
app.command(constitution)

Asked = Annotated[str, help_("model: embedded name, directory, GGUF file or MODEL@URL")]
Pairs = Annotated[str, help_("JSONL of pairs that people compared, or builtin:pairs")]
Written = Annotated[str, help_("constitution: TOML or Markdown file, or builtin:honesty")]


@constitution.command
def check(path: Written, *, as_json: Json = False) -> int:
    """Read a constitution and print what is likely wrong with it. Exit code 2: it cannot be read.

    Examples to type:
        tutelage constitution check values.md
    """
    from tutelage.applications.constitutions import check as checked

    found = checked(path)
    show(found, as_json, lambda: _checked_lines(found))
    return 0


def _checked_lines(found: dict[str, Any]) -> list[str]:
    rows = [
        f"  {p['id']:<28}weight {p['weight']:g}, scope {p['scope']}, wants {p['wants'] or 'what its text says'}"
        for p in found["principles"]
    ]
    warnings = [f"warning: {w}" for w in found["warnings"]] or ["no warnings"]
    return [f"{found['name']} ({found['hash']}): {len(rows)} principles", *rows, *warnings]


@constitution.command
def diff(
    old: Written,
    new: Written,
    *,
    judge: Annotated[str, help_("judge: [pairwise=|pointwise=|listwise=]MODEL")],
    pairs: Pairs = "builtin:pairs",
    limit: Annotated[int | None, help_("only the first pairs")] = None,
    as_json: Json = False,
) -> int:
    """Which verdicts flip between two versions of a constitution: the same judge, the same pairs.

    Examples to type:
        tutelage constitution diff values.md stricter.md --judge judge.gguf --limit 100
    """
    from tutelage.applications.constitutions import diff as compared

    found = compared(old, new, judge, pairs, limit=limit)
    show(found, as_json, lambda: _diff_lines(found))
    return 0


def _diff_lines(found: dict[str, Any]) -> list[str]:
    def share(value: float | None) -> str:
        return "no data" if value is None else f"{value:.0%}"

    lines = [f"{found['old']['name']} {found['old']['hash']} -> {found['new']['name']} {found['new']['hash']}"]
    lines += [f"  {what}: {', '.join(ids)}" for what, ids in found["principles"].items() if ids]
    lines += [
        (
            f"{found['flipped']} of {found['judged_by_both']} verdicts flip ({found['pairs']} pairs; "
            f"{found['lost']} verdicts lost, {found['gained']} gained)"
        ),
        f"agreement with the people's choice: {share(found['agreement']['old'])} -> {share(found['agreement']['new'])}",
    ]
    for row in found["flips"]:
        lines += [
            "",
            f"{row['old']:+.2f} -> {row['new']:+.2f} nats for the chosen reply",
            f"  prompt:   {_short(row['prompt'])}",
            f"  chosen:   {_short(row['chosen'])}",
            f"  rejected: {_short(row['rejected'])}",
        ]
    return lines


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 100 else flat[:99] + "…"


@constitution.command
def revise(
    prompts: Annotated[str, help_("prompts as JSONL, CSV or Parquet; in JSONL a line may bring its `reply`")],
    *,
    model: Asked,
    out: Annotated[Path, help_("folder for sft.jsonl, preference.jsonl and steps.jsonl")],
    constitution: Written = "builtin:honesty",
    rounds: Annotated[int, help_("revisions of each reply; with --principles all, of each under every principle")] = 1,
    principles: Annotated[Literal["random", "all"], help_("one drawn for each round, or all in turn")] = "random",
    critique: Annotated[bool, Parameter(negative="--no-critique", help="ask for a critique first")] = True,
    max_new_tokens: Longest = 256,
    limit: Annotated[int | None, help_("only the first prompts")] = None,
    seed: Annotated[int, help_("of the draw of principles")] = 0,
    as_json: Json = False,
) -> int:
    """Let a model revise replies by a constitution, as supervised and preference pairs in TRL's formats.

    Examples to type:
        tutelage constitution revise prompts.jsonl --model judge.gguf --rounds 2 --out revised
        tutelage constitution revise prompts.jsonl --model smollm2-135m-instruct --no-critique --out revised
    """
    from tutelage.applications.constitutions import revise as revised

    found = revised(
        prompts, model, constitution, out, rounds=rounds, order=principles, critique=critique,
        longest=max_new_tokens, limit=limit, seed=seed,
    )  # fmt: skip
    show(found, as_json, lambda: _revised_lines(found, out))
    return 0


def _revised_lines(found: dict[str, Any], out: Path) -> list[str]:
    lines = [
        (
            f"{found['prompts']} prompts: {found['sft']} supervised and {found['preference']} preference pairs "
            f"in {out} ({found['unchanged']} replies left as they were)"
        ),
    ]
    lines += [f"  {count} revisions under '{name}'" for name, count in found["revisions"].items()]
    return lines + [f"  {count} ended early: {why}" for why, count in found["failed"].items()]


@constitution.command
def infer(
    pairs: Pairs,
    *,
    model: Asked,
    out: Annotated[Path, help_("constitution to write (TOML)")],
    clusters: Annotated[int, help_("principles that are voted on")] = 20,
    most: Annotated[int, help_("principles to keep")] = 5,
    limit: Annotated[int | None, help_("only the first pairs")] = None,
    seed: Annotated[int, help_("of the division into two halves")] = 0,
    as_json: Json = False,
) -> int:
    """Find the principles behind preferences, and how many preferences kept apart they give back.

    Examples to type:
        tutelage constitution infer pairs.jsonl --model judge.gguf --out found.toml
    """
    from tutelage.applications.constitutions import infer as inferred

    found = inferred(pairs, model, out, clusters=clusters, most=most, limit=limit, seed=seed)
    show(found, as_json, lambda: _inferred_lines(found))
    return 0


def _inferred_lines(found: dict[str, Any]) -> list[str]:
    held, kept = found["held_out"], found["principles"]
    lines = [
        (
            f"{found['proposed']} principles proposed on {found['seen']} pairs, {found['candidates']} voted on, "
            f"{len(kept)} kept"
        ),
    ]
    lines += [
        f"  {p['id']} (weight {p['weight']:g}, {p['votes_for']} for, {p['votes_against']} against): {p['text']}"
        for p in kept
    ]
    if not kept:
        return [*lines, "no principle is surely kept by the preferences: nothing was written"]
    return [
        *lines,
        (
            f"held out: {held['right']} of {found['held_out_pairs']} preferences given back, "
            f"{held['accuracy']:.2f} [{held['low']:.2f}, {held['high']:.2f}], {held['undecided']} undecided"
        ),
        f"written to {found['out']}",
    ]
