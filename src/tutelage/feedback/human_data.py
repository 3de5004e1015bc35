r"""Labelling tasks and people's labels in the files that others read and write (JSONL).

    tasks    {"prompt", "candidates": [...]}, {"prompt", "response"} or any row of preferences below
    labels   TRL preference   {"prompt", "chosen", "rejected"}, texts or messages; the prompt may be implicit
             hh-rlhf          {"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": ...}
             votes            one of the above with "votes": [...], as `export_labels` writes
             TRL unpaired     {"prompt", "completion", "label": true}; {"prompt", "response", "rating": 4}

A prompt is text or a list of {"role", "content"}. Optional: `id`, `ids` (of the candidates), `scale`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from tutelage.errors import InputError, StoreError
from tutelage.feedback.human import Label, Task, TaskKind, Word, fit_votes, json_lines, match, parse_label
from tutelage.feedback.votes import VotePrior
from tutelage.records import Message, content_hash

__all__ = ["Imported", "export_labels", "import_labels", "import_rows", "read_tasks"]

_MOST = 9  # what one digit can answer
_ROLES = ("system", "user", "assistant")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
# What a vote on (chosen, rejected) may be; a number is the share of the vote that the chosen one gets.
_VOTES: dict[Any, int | Word] = {
    "chosen": 0, "rejected": 1, 1: 0, 0: 1, 0.5: "tie", "tie": "tie", "both_bad": "both_bad", "skip": "skip",
}  # fmt: skip


class _NothingToJudge(InputError):
    """A row is well formed, but there is nothing in it to choose between."""


def read_tasks(path: Path, *, scale: int = 5) -> list[Task]:
    """Read what people are to label. Whatever answers the file holds are not looked at.

    Args:
        path: A JSONL file of tasks in one of the forms above; one candidate is rated, two are compared,
            of three to nine the best is picked.
        scale: Highest rating, from 2 to 9, where a row has no `scale`.

    Raises:
        InputError: The file cannot be read, or a line is no task; the message names the line.
    """
    tasks: dict[str, Task] = {}
    for place, row in json_lines(path):
        task = _task(place, row, scale)
        if tasks.setdefault(task.id, task) is not task:
            raise InputError(f"{place}: a task that stands above already", expected="each once", fix="remove one")
    if not tasks:
        raise InputError(f"{path} holds no tasks", expected="at least one line", fix="add tasks to the file")
    return list(tasks.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Imported:
    """What a file of labels held.

    Args:
        tasks: Each once, however many people labelled it, and in whatever order of its candidates.
        labels: What they answered, in the candidates' order of `tasks`.
        left_out: Place and reason of each row that holds nothing to choose between.
    """

    tasks: tuple[Task, ...]
    labels: tuple[Label, ...]
    left_out: tuple[str, ...]


def import_labels(path: Path, *, annotator: str = "import", scale: int = 5) -> Imported:
    """Read labels that were collected elsewhere.

    Args:
        path: A JSONL file of labels in one of the forms above. A vote is "chosen", "rejected", "tie",
            "both_bad", "skip", or a number (1, 0, 0.5) on a row of preferences, otherwise the rating or
            the number of the best candidate, counted from 0; or an object of it as `vote` with optional
            `annotator`, `order`, `seconds`, `at` and `note`. Without votes the chosen one was chosen once.
        annotator: Name of who is not named: the n-th unknown vote on a task is by "<annotator>-n".
        scale: Highest rating where a row has no `scale`.

    Raises:
        InputError: The file cannot be read, or a line is no label; the message names the line.
    """
    return import_rows(json_lines(path), annotator=annotator, scale=scale)


def import_rows(rows: Iterable[tuple[str, dict[str, Any]]], *, annotator: str = "import", scale: int = 5) -> Imported:
    """`import_labels` of rows that were read already, each with its place.

    Raises:
        InputError: A row is no label.
    """
    tasks: dict[tuple[Any, ...], Task] = {}
    labels: dict[tuple[str, str], Label] = {}
    unknown: dict[str, int] = {}
    left_out = []
    for place, row in rows:
        try:
            told = _task(place, row, scale)
        except _NothingToJudge as error:
            left_out.append(error.got)
            continue
        task = tasks.setdefault((told.messages, frozenset(told.candidates), told.scale), told)
        for vote in _votes(place, row):
            name = vote.get("annotator", row.get("annotator"))
            if name is None:
                unknown[task.id] = unknown.get(task.id, 0) + 1
                name = f"{annotator}-{unknown[task.id]}"
            label = _vote(place, {**vote, "annotator": name}, task, told, preference="candidates" not in row)
            labels[task.id, label.annotator] = label
    return Imported(tuple(tasks.values()), tuple(labels.values()), tuple(left_out))


def _votes(place: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    votes = row.get("votes")
    if isinstance(votes, list):
        return [v if isinstance(v, dict) else {"vote": v} for v in votes]
    if votes is None and "candidates" not in row:
        rating = 1 + row["label"] if isinstance(row.get("label"), bool) else row.get("rating")
        vote = "chosen" if "chosen" in row else rating
        if vote is not None:
            return [{**{k: row[k] for k in ("order", "seconds", "at", "note") if k in row}, "vote": vote}]
    fix = "give `votes`, a `rating`, a `label`, or a chosen and a rejected reply; to have tasks labelled, label them"
    raise InputError(f"{place} says nobody's opinion", expected="a label or a list of votes", fix=fix)


def _vote(place: str, vote: Mapping[str, Any], task: Task, told: Task, *, preference: bool) -> Label:
    """The label of a vote on `told`, which is `task`, perhaps with its candidates in another order."""
    given = vote.get("vote")
    answer = given
    if told.kind == "pair" and preference:
        answer = _VOTES.get(given) if isinstance(given, str | int | float) else None
    if isinstance(answer, bool) or answer not in told.answers:
        expected = ", ".join(map(str, _VOTES if told.kind == "pair" and preference else told.answers))
        raise InputError(f"{place} has the vote {given!r}", expected=f"one of {expected}", fix="correct the vote")
    everyone = list(range(len(told.candidates)))
    order = vote.get("order", everyone)
    line = {**vote, "task": task.id, "kind": task.kind, "answer": answer, "order": order}
    label = parse_label(place, line)
    if sorted(label.order) != everyone:
        raise InputError(f"{place} has the order {order}", expected=f"each of {everyone} once", fix="leave it out")
    place_of = [task.candidates.index(text) for text in told.candidates]
    picked = task.kind != "rating" and isinstance(label.answer, int)
    moved = place_of[int(label.answer)] if picked else label.answer
    return dataclasses.replace(label, answer=moved, order=tuple(place_of[i] for i in label.order))


def _task(place: str, row: Mapping[str, Any], scale: int) -> Task:
    messages, texts = _shown(place, row)
    kind: TaskKind = "rating" if len(texts) == 1 else "pair" if len(texts) == 2 else "best"
    if len(set(texts)) < len(texts):
        raise _NothingToJudge(f"{place}: two candidates are the same text", expected="texts that differ", fix="drop it")
    top = 2 if isinstance(row.get("label"), bool) else row.get("scale", scale)
    if type(top) is not int or not 2 <= top <= _MOST:
        raise InputError(f"{place}: a scale to {top!r}", expected=f"a whole number from 2 to {_MOST}", fix="change it")
    top = top if kind == "rating" else 0
    digest = content_hash([[[m.role, m.content] for m in messages], texts, top], length=12)
    own = row.get("id", "t")
    if type(own) not in (str, int) or own == "":
        raise InputError(f"{place}: the id is {own!r}", expected="text or a whole number", fix="leave it out")
    name = f"{own}-{digest}"
    subjects = row.get("ids", [f"{name}/{i}" for i in range(len(texts))])
    good = isinstance(subjects, list) and all(isinstance(s, str) and s for s in subjects)
    if not good or len(set(subjects)) != len(subjects) or len(subjects) != len(texts):
        raise InputError(
            f"{place}: `ids` is {subjects!r}", expected="a different text for each candidate", fix="mend it"
        )
    return Task(name, kind, messages, tuple(texts), tuple(subjects), top)


def _shown(place: str, row: Mapping[str, Any]) -> tuple[tuple[Message, ...], list[str]]:
    """The conversation and its candidates."""
    if "candidates" in row:
        texts = row["candidates"]
        if not isinstance(texts, list) or not 1 <= len(texts) <= _MOST or not all(isinstance(t, str) for t in texts):
            problem = f"{place}: `candidates` is not a list of 1 to {_MOST} texts"
            raise InputError(problem, expected="what is to be judged, as texts", fix="split long lists")
        return _prompt(place, row), texts
    forms = (("chosen", "rejected"), ("response",), ("completion",))
    keys = next((keys for keys in forms if all(key in row for key in keys)), None)
    if keys is None:
        problem = f"{place} has no candidates, only: {', '.join(map(repr, row)) or 'nothing'}"
        expected = "`candidates`, `chosen` and `rejected`, or `response`"
        raise InputError(problem, expected=expected, fix="add the texts that are to be judged")
    dialogues = [_dialogue(place, row, key) for key in keys]
    if any(d[:-1] != dialogues[0][:-1] for d in dialogues):
        problem = f"{place}: the two dialogues part before the last turn"
        raise _NothingToJudge(
            problem, expected="one prompt and two replies", fix="cut both after the turn that differs"
        )
    return dialogues[0][:-1], [d[-1].content for d in dialogues]


def _dialogue(place: str, row: Mapping[str, Any], key: str) -> tuple[Message, ...]:
    """Prompt and reply; a reply may bring its own prompt."""
    value, within = row[key], f"{place}, `{key}`"
    if isinstance(value, str):
        turns = _hh_turns(within, value) if "prompt" not in row else (*_prompt(place, row), Message("assistant", value))
    else:
        turns = _messages(within, value)
        turns = (*_prompt(place, row), *turns) if turns[0].role == "assistant" else turns
    if [m.role for m in turns[-2:]] != ["user", "assistant"]:
        problem = f"{within} does not end in a user's turn and one reply"
        raise InputError(problem, expected="one last message of the assistant", fix="cut what follows the reply")
    return turns


def _hh_turns(place: str, text: str) -> tuple[Message, ...]:
    r"""Turns of an hh-rlhf dialogue; a speaker who goes on keeps the floor."""
    head, *parts = _HH_TURN.split("\n\n" + text.lstrip())
    if head.strip() or not parts:
        fix = "give the prompt under `prompt`, or the whole dialogue with its speakers"
        raise InputError(f"{place} has no prompt before it", expected="'\\n\\nHuman: ...\\n\\nAssistant: ...'", fix=fix)
    turns: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        before = f"{turns.pop().content}\n\n" if turns and turns[-1].role == role else ""
        turns.append(Message(role, before + said.strip()))
    return tuple(turns)


def _prompt(place: str, row: Mapping[str, Any]) -> tuple[Message, ...]:
    value, within = row.get("prompt"), f"{place}, `prompt`"
    messages = (Message("user", value),) if isinstance(value, str) else _messages(within, value)
    if messages[-1].role != "user" or not messages[-1].content.strip():
        problem = f"{within} does not end with what a user said"
        raise InputError(
            problem, expected="text, or messages of which the last is the user's", fix="correct the prompt"
        )
    return messages


def _messages(place: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        expected = 'text, or a list of {"role": ..., "content": ...}'
        raise InputError(f"{place} is missing or has the wrong form", expected=expected, fix="write it as text")
    for n, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES or not isinstance(turn.get("content"), str):
            expected = f"`content` (text) and a `role`: {', '.join(_ROLES)}"
            raise InputError(f"{place}, message {n} is no message", expected=expected, fix="give it both")
    return tuple(Message(turn["role"], turn["content"]) for turn in value)


Form = Literal["votes", "preference", "unpaired"]


def export_labels(path: Path, tasks: Iterable[Task], labels: Iterable[Label], *, form: Form) -> int:
    """Write labels for use elsewhere; the file appears whole or not at all.

    Args:
        path: Where to.
        tasks: Those of the labels.
        labels: Standing labels.
        form: "votes": one line a task, with everything, which `import_labels` reads back.
            "preference": TRL's conversational preference rows (DPO, reward models): the side with more
            votes is chosen, even pairs are left out; best-of-n gives a row for each two candidates.
            Extra columns `probability` (soft label of the chosen one) and `votes`.
            "unpaired": TRL's unpaired preference rows (KTO): ratings above and below the middle of the
            scale, winners and losers, and both of what is "both bad"; even ones are left out.

    Returns:
        How many lines.

    Raises:
        StoreError: The file cannot be written.
    """
    tasks, labels = list(tasks), list(labels)
    votes: dict[str, list[Label]] = {}
    for task, label in match(tasks, labels):
        votes.setdefault(task.id, []).append(label)
    prior = fit_votes(tasks, labels)
    rows: list[dict[str, Any]] = []
    for task in tasks:
        given = votes.get(task.id, [])
        if form == "votes":
            rows += [_votes_row(task, given)] if given else []
        else:
            rows += _preferences(task, given, prior) if form == "preference" else _unpaired(task, given)
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        problem = f"{path} cannot be written: {os.strerror(error.errno) if error.errno else error}"
        raise StoreError(
            problem, expected="a folder with room", fix="check the folder, its rights and space"
        ) from error
    return len(rows)


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def _reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _votes_row(task: Task, labels: Sequence[Label]) -> dict[str, Any]:
    keys = ("annotator", "order", "seconds", "at", "note")
    votes = [{"vote": label.answer, **{k: getattr(label, k) for k in keys}} for label in labels]
    # The hash at the end of the id comes back by itself.
    row = {"id": task.id.rpartition("-")[0], "prompt": _turns(task.messages), "candidates": task.candidates}
    scale = {"scale": task.scale} if task.scale else {}
    return {**row, "ids": task.subjects, **scale, "votes": votes}


def _preferences(task: Task, labels: Sequence[Label], prior: VotePrior) -> Iterator[dict[str, Any]]:
    if task.kind == "rating":
        return
    for pair in combinations(range(len(task.candidates)), 2):
        heard = [label for label in labels if label.answer in (*pair, "tie", "both_bad")]
        wins = [sum(1.0 if v.answer == i else 0.5 * isinstance(v.answer, str) for v in heard) for i in pair]
        if wins[0] == wins[1]:
            continue
        best, other = pair if wins[0] > wins[1] else reversed(pair)
        words: dict[int | Word, str] = {best: "chosen", other: "rejected", "tie": "tie", "both_bad": "both_bad"}
        yield {
            "prompt": _turns(task.messages),
            "chosen": _reply(task.candidates[best]),
            "rejected": _reply(task.candidates[other]),
            "probability": prior.posterior(max(wins), len(heard)).mean,
            "votes": [{"annotator": v.annotator, "vote": words[v.answer]} for v in heard],
        }


def _unpaired(task: Task, labels: Sequence[Label]) -> Iterator[dict[str, Any]]:
    for i, text in enumerate(task.candidates):
        signs = [_sign(task, label.answer, i) for label in labels]
        if sum(signs) != 0:
            yield {"prompt": _turns(task.messages), "completion": _reply(text), "label": sum(signs) > 0}


def _sign(task: Task, answer: int | Word, candidate: int) -> float:
    """Above 0 where an answer speaks for a candidate, below where it speaks against."""
    if isinstance(answer, str):
        return -1.0 if answer == "both_bad" else 0.0
    if task.kind == "rating":
        return answer - (1 + task.scale) / 2
    return 1.0 if answer == candidate else -1.0
