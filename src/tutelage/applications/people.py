"""Labels of people between files and runs: collected from a run's replies, kept in its ledger."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from tutelage.applications.judging import free_name, rollouts
from tutelage.errors import InputError
from tutelage.feedback.human import Task, agreements, append_label, read_labels, verdicts
from tutelage.feedback.human_data import Form, export_labels, import_labels, read_tasks
from tutelage.store.runs import Run, write_atomic

__all__ = ["bring_in", "hand_on", "into_run", "tasks_of_run"]


def bring_in(file: Path, tasks: Path, labels: Path, *, annotator: str = "import") -> dict[str, Any]:
    """Read labels collected elsewhere, write their tasks, and append the labels.

    Raises:
        InputError: A file cannot be read, or `tasks` is there already.
    """
    if tasks.exists():
        raise InputError(f"{tasks} is there already", expected="a new file for the tasks", fix="choose another name")
    found = import_labels(file, annotator=annotator)
    _write_tasks(tasks, found.tasks)
    for label in found.labels:
        append_label(labels, label)
    return {"tasks": len(found.tasks), "labels": len(found.labels), "left_out": list(found.left_out)}


def hand_on(tasks: Path, labels: Path, out: Path, *, form: Form) -> dict[str, Any]:
    """Write labels for use elsewhere; returns how many lines, and how far people agree.

    Raises:
        InputError, StoreError: A file cannot be read or written.
    """
    asked, given = read_tasks(tasks), read_labels(labels)
    lines = export_labels(out, asked, given, form=form)
    agreed = {
        kind: {"alpha": a.alpha, "same": a.same, "items": a.items} for kind, a in agreements(asked, given).items()
    }
    return {"lines": lines, "agreement": agreed}


def tasks_of_run(run_folder: Path, out: Path, *, count: int, seed: int = 0) -> dict[str, Any]:
    """Write pairs of a run's replies for people to compare: of each prompt two that differ, at random.

    Raises:
        InputError: The run holds no replies of rounds, or no prompt has two that differ.
    """
    opened = Run.open(run_folder, write=False)
    try:
        prompts, replies_PG = rollouts(opened)
    finally:
        opened.close()
    draw = random.Random(seed)  # noqa: S311 - a sample, not a secret
    tasks = []
    for prompt, group in zip(prompts, replies_PG, strict=True):
        texts = {g.text: g for g in group}
        if len(texts) >= 2:
            pair = draw.sample(sorted(texts), 2)
            ids = tuple(texts[t].id for t in pair)
            tasks.append(Task(f"{prompt.id}-{prompt.hash}", "pair", prompt.messages, tuple(pair), ids))
    if not tasks:
        raise InputError("no prompt of the run has two replies that differ", expected="replies to compare")
    chosen = draw.sample(tasks, min(count, len(tasks)))
    _write_tasks(out, chosen)
    return {"tasks": len(chosen), "of": len(tasks)}


def into_run(run_folder: Path, tasks: Path, labels: Path) -> dict[str, Any]:
    """Keep people's labels as verdicts in a run's ledger, as a unit of their own.

    Raises:
        InputError: A file cannot be read, or none of the labels is about this run's replies.
    """
    asked, given = read_tasks(tasks), read_labels(labels)
    found = verdicts(asked, given)
    opened = Run.open(run_folder, write=True)
    try:
        known = {row["hash"] for row in opened.ledger.rows("prompts")}
        own = [v for v in found if v.prompt_hash in known]
        if not own:
            raise InputError(
                f"none of the {len(found)} labels is about a prompt of run '{run_folder.name}'",
                expected="labels of tasks that `tutelage people tasks` wrote for this run",
            )
        with opened.ledger.unit(free_name(opened, "people"), "people") as unit:
            unit.verdicts(own)
            name = unit.name
    finally:
        opened.close()
    return {"unit": name, "verdicts": len(own), "of_other_prompts": len(found) - len(own)}


def _write_tasks(path: Path, tasks: list[Task] | tuple[Task, ...]) -> None:
    lines = [
        json.dumps(
            {
                "id": _bare(t.id),
                "prompt": [dataclasses.asdict(m) for m in t.messages],
                "candidates": list(t.candidates),
                "ids": list(t.subjects),
                **({"scale": t.scale} if t.scale else {}),
            },
            ensure_ascii=False,
        )
        for t in tasks
    ]
    write_atomic(path, "\n".join(lines) + "\n")


def _bare(name: str) -> str:
    """A task's own name: reading it back adds the hash of what is shown again."""
    return name.rpartition("-")[0] or name
