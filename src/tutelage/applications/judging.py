"""Judges outside of a run: their check, and a second look at an old run's replies."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tutelage.config import JUDGE_KINDS, Judge, data_file
from tutelage.engines.weights import cache_dir
from tutelage.errors import InputError, JudgeRefused, RecipeError
from tutelage.feedback.audit import Audit, audit
from tutelage.feedback.constitution import load_constitution
from tutelage.feedback.injection import canaries
from tutelage.feedback.model_judge import ComparingJudge
from tutelage.feedback.roster import judge_of, open_judge
from tutelage.records import Generation, Message, Progress, Prompt, SamplerSettings, Verdict
from tutelage.store.pairs import read_pairs
from tutelage.store.runs import Run, check_folder, write_atomic

if TYPE_CHECKING:
    from tutelage.feedback.asking import Opinion

__all__ = [
    "answers_file",
    "check_judges",
    "checked",
    "free_name",
    "fuse_judges",
    "marked",
    "parse_judge",
    "refuse_untrusted",
    "rejudge",
    "rollouts",
]


def answers_file() -> Path:
    """Where answers of judge models are kept, for all runs."""
    return cache_dir() / "answers.db"


def parse_judge(spec: str) -> Judge:
    """A judge from the command line: [KIND=]MODEL, or package.module:name.

    Raises:
        RecipeError: It makes no sense.
    """
    try:
        return judge_of(spec)
    except ValidationError as error:
        said = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise RecipeError(
            f"'{spec}' is no judge: {said}",
            expected="[KIND=]MODEL with KIND one of " + ", ".join(JUDGE_KINDS) + "; or package.module:name",
        ) from error


def check_judges(
    judges: Sequence[str | Judge],
    pairs: str | Path,
    *,
    limit: int | None = None,
    constitution: str | None = None,
    injections: bool = True,
    fresh: bool = False,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Audit]:
    """Measure judges on pairs that people compared, side by side.

    The outcome of each is kept, and a run asks for it before it trains.

    Args:
        judges: Specs as on the command line, or judges of a recipe.
        pairs: JSONL lines {"prompt", "chosen", "rejected"}, or `builtin:pairs`.
        limit: Only the first N pairs.
        constitution: Principles to judge by.
        injections: Also try the canaries.
        fresh: Ask everything anew, whatever answers are kept; seconds are then those of a first time.
        out: File for rows and single verdicts as JSON.
        progress: Told what happens.

    Raises:
        TutelageError: A judge or file cannot be used.
    """
    if not judges:
        raise RecipeError("no judge was named", expected="one or more of --judge SPEC")
    check_folder(out)
    items = read_pairs(data_file(str(pairs), suffix="judges/*.jsonl"), limit=limit)
    rules = load_constitution(data_file(constitution, suffix="constitutions/*.toml")) if constitution else None
    suite = canaries() if injections else []
    rows, told = [], {}
    for spec in judges:
        chosen = parse_judge(spec) if isinstance(spec, str) else spec
        if progress is not None:
            progress.stage(f"check {chosen.name}", len(items), "pairs")
        say = progress.say if progress is not None else lambda _: None
        judge = open_judge(chosen, rules, answers=None if fresh else answers_file(), say=say)
        row, opinions = audit(judge, items, suite)
        _remember(row)
        rows.append(row)
        told[row.judge] = opinions
        if progress is not None:
            progress.advance(len(items))
    if out is not None:
        _write(Path(out), rows, told)
    return rows


def _write(path: Path, rows: Sequence[Audit], told: dict[str, list[Opinion]]) -> None:
    opinions = {
        name: [{"value": o.value, "reason": o.reason, "evidence": dict(o.evidence), "raw": o.raw} for o in found]
        for name, found in told.items()
    }
    body = {"judges": [dataclasses.asdict(r) for r in rows], "opinions": opinions}
    write_atomic(path, json.dumps(body, indent=2, ensure_ascii=False) + "\n")


def _remember(row: Audit) -> None:
    folder = cache_dir() / "audits"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{row.version}.json", json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n")


def fuse_judges(
    judges: Sequence[str | Judge],
    pairs: str | Path,
    out: str | Path,
    *,
    labels: int = 50,
    limit: int | None = None,
    constitution: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make one judge of several, by some human labels, and write it as a file that serves as a judge.

    Args:
        judges: Specs as on the command line, or judges of a recipe; at least two.
        pairs: JSONL lines {"prompt", "chosen", "rejected"}, or `builtin:pairs`.
        out: File to write.
        labels: Pairs whose labels the weights are fitted on; the others are measured on.
        limit: Only the first N pairs.
        constitution: Principles to judge by; a run must have the same.
        progress: Told what happens.

    Returns:
        file, labels, weights by judge, and what was measured (`fused_judge.fit_panel`).

    Raises:
        TutelageError: A judge or file cannot be used.
    """
    from tutelage.feedback.fused_judge import fit_panel, fusion_file

    check_folder(out)
    items = read_pairs(data_file(str(pairs), suffix="judges/*.jsonl"), limit=limit)
    rules = load_constitution(data_file(constitution, suffix="constitutions/*.toml")) if constitution else None
    chosen = [parse_judge(spec) if isinstance(spec, str) else spec for spec in judges]
    say = progress.say if progress is not None else lambda _: None
    members = [open_judge(judge, rules, answers=answers_file(), say=say) for judge in chosen]
    if progress is not None:
        progress.stage("ask the judges", 1, "time")
    fusion, measured = fit_panel(members, items, labels=labels)
    write_atomic(Path(out), fusion_file(chosen, members, fusion, measured))
    weights = {m.name: round(float(w), 4) for m, w in zip(members, fusion.weight_J, strict=True)}
    return {"file": str(out), "labels": fusion.labels, "weights": weights, **measured}


def checked(judge: ComparingJudge) -> dict[str, Any] | None:
    """The last check of exactly this judge (words, principles, model), or None if it never was checked."""
    path = cache_dir() / "audits" / f"{judge.version}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def refuse_untrusted(judges: Sequence[ComparingJudge], *, others: bool, allowed: bool) -> list[dict[str, Any]]:
    """What is known of a run's judges, for its ledger.

    Args:
        judges: The run's own judges.
        others: Whether built-in judges of content give verdicts, too.
        allowed: The recipe wants to train whatever the check said.

    Raises:
        JudgeRefused: All judges of content failed their check, and the recipe does not insist.
    """
    known: list[dict[str, Any]] = []
    for judge in judges:
        found = checked(judge)
        outcome = str(found["outcome"]) if found else "unchecked"
        why = list(found["why"]) if found else [getattr(judge, "unchecked", "never checked: tutelage judge check")]
        known.append({"name": judge.name, "version": judge.version, "outcome": outcome, "why": why})
    refused = [k for k in known if k["outcome"] == "refuse"]
    if known and not others and len(refused) == len(known):
        if not allowed:
            raise JudgeRefused(
                f"the only judge, '{refused[0]['name']}', failed its check: {refused[0]['why'][0]}",
                expected="a judge that passed `tutelage judge check`, or one more source of verdicts",
                fix="choose another judge; feedback.allow_refused=true trains all the same, and the report says so",
            )
        for one in refused:
            one["why"] = [*one["why"], "trained all the same: feedback.allow_refused is true"]
    return known


def marked(file: Path, texts: Path | None, said: Sequence[str], *, share: float, model: str) -> list[dict[str, Any]]:
    """Texts of a file and of the command line, each with a critic's reward and its trigger words.

    Raises:
        InputError: There is no text, or the file is broken.
        ModelError: The first file is no critic, or `model` is not the one it learned on.
    """
    from tutelage.feedback.critic_data import Passage, Reader, read_texts
    from tutelage.feedback.text_critic import TextCritic
    from tutelage.loop.marking import mark, reading

    passages = [*(read_texts(texts) if texts else ()), *(Passage(text) for text in said if text.strip())]
    if not passages:
        raise InputError("there is no text to mark", expected="a file of texts, or --text", fix="name one of the two")
    critic = TextCritic.load(file)
    found = mark(reading(critic, Reader.open(critic.source, model=model)), passages, share=share)
    return [
        {"text": m.passage.text, "reward": m.reward, "places": [dataclasses.asdict(place) for place in m.places]}
        for m in found
    ]


def rejudge(
    run_folder: Path, *, judges: Sequence[str] = (), constitution: str | None = None, progress: Progress
) -> dict[str, Any]:
    """Judge the replies of an old run again, with other judges or another constitution; nothing is generated.

    The new verdicts go into the run's ledger as a unit of their own; no old row changes.

    Args:
        run_folder: The run.
        judges: Specs; none takes the run's own judges.
        constitution: Principles; None takes the run's own.
        progress: Told what happens.

    Returns:
        Counts by judge: verdicts, abstentions, mean, and against the run's earlier verdicts of the
        same judge how many there are, and how many replies changed sides of their group's mean.

    Raises:
        TutelageError: The run cannot be read, or a judge cannot be used.
    """
    from tutelage.applications.truthfulness import set_up

    opened = Run.open(run_folder, write=True)
    try:
        prompts, replies_PG = rollouts(opened)
        source = constitution or opened.recipe.feedback.constitution
        rules = load_constitution(data_file(source, suffix="constitutions/*.toml"))
        with opened.ledger.unit(free_name(opened, "rejudge"), "rejudge") as unit:
            if judges:
                chosen = [open_judge(parse_judge(s), rules, answers=answers_file(), say=progress.say) for s in judges]
                verdicts = _verdicts(chosen, prompts, replies_PG, progress)
            else:
                bench = set_up(opened, rules, progress)
                verdicts = _verdicts(bench.judges, prompts, replies_PG, progress)
                with bench.adapter.off():
                    bench.panel.prepare(bench.lm, prompts)
                verdicts += bench.panel.examine(prompts, replies_PG, first_look=False).verdicts
            unit.verdicts(verdicts)
            before = opened.ledger.rows("verdicts")
            found = _compared(verdicts, before, replies_PG)
            unit.note("rejudged", {"constitution": rules.hash, "judges": found})
            name = unit.name
    finally:
        opened.close()
    return {"run": run_folder.name, "unit": name, "replies": sum(map(len, replies_PG)), "judges": found}


def free_name(run: Run, stem: str) -> str:
    """The first of `stem`-1, `stem`-2, ... that no unit of the run has."""
    taken = {u["name"] for u in run.ledger.units()}
    return next(name for i in range(1, len(taken) + 2) if (name := f"{stem}-{i}") not in taken)


def rollouts(run: Run) -> tuple[list[Prompt], list[list[Generation]]]:
    """Prompts with the replies of the rounds, as the ledger keeps them.

    Raises:
        InputError: There are none.
    """
    known = {
        row["id"]: Prompt(row["id"], tuple(Message(m["role"], m["content"]) for m in row["messages"]))
        for row in run.ledger.rows("prompts")
    }
    groups: dict[tuple[str, str], list[Generation]] = {}
    for row in run.ledger.rows("generations"):
        if row["prompt_id"] not in known or not row["unit"].startswith("round"):
            continue
        groups.setdefault((row["unit"], row["prompt_id"]), []).append(
            Generation(
                row["id"], row["prompt_id"], row["sample"], row["text"], tuple(row["tokens"]), tuple(row["logps"]),
                bool(row["finished"]), SamplerSettings(**row["settings"]), row["policy_version"], row["seed"],
            )
        )  # fmt: skip
    if not groups:
        raise InputError(
            f"run '{run.name}' holds no replies of rounds",
            expected="a run that played at least one round",
            fix="choose another run: tutelage runs",
        )
    return [known[prompt] for _, prompt in groups], list(groups.values())


def _verdicts(
    judges: Sequence[ComparingJudge],
    prompts: Sequence[Prompt],
    replies_PG: Sequence[Sequence[Generation]],
    progress: Progress,
) -> list[Verdict]:
    found = []
    for judge in judges:
        progress.stage(f"judge {judge.name}", len(prompts), "prompts")
        found += [v for group in judge.judge(prompts, replies_PG) for v in group]
        progress.advance(len(prompts))
    return found


def _compared(
    verdicts: Sequence[Verdict], before: Sequence[dict[str, Any]], replies_PG: Sequence[Sequence[Generation]]
) -> dict[str, dict[str, Any]]:
    group_of = {g.id: n for n, group in enumerate(replies_PG) for g in group}
    table = {}
    for name in dict.fromkeys(v.judge for v in verdicts):
        new = {v.subject: v.value for v in verdicts if v.judge == name and v.value is not None}
        old = {r["subject"]: r["value"] for r in before if r["judge"] == name and r["value"] is not None}
        both = sorted(set(new) & set(old))
        sides = [_above(values, group_of) for values in (new, old)]
        table[name] = {
            "verdicts": sum(v.judge == name for v in verdicts),
            "abstained": sum(v.judge == name and v.abstained for v in verdicts),
            "mean": sum(new.values()) / len(new) if new else None,
            "compared": len(both),
            "changed_sides": sum(sides[0][s] != sides[1][s] for s in both),
        }
    return table


def _above(values: dict[str, float], group_of: dict[str, int]) -> dict[str, bool]:
    """Whether each reply is above its group's mean: what a reward normalised in its group looks at."""
    groups: dict[int, list[float]] = {}
    for subject, value in values.items():
        groups.setdefault(group_of.get(subject, -1), []).append(value)
    means = {n: sum(v) / len(v) for n, v in groups.items()}
    return {s: v > means[group_of.get(s, -1)] for s, v in values.items()}
