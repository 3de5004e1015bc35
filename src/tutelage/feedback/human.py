"""People's labels: pairs, ratings and best-of-n, by several annotators, with ties and time.

A task is what is shown, a label is what one person answered. Labels live in a JSONL file that only
grows: a later line of the same person on the same task stands instead of an earlier one, and an undo
line takes it back. `verdicts` turns them into what the ledger keeps. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from tutelage.errors import InputError, StoreError
from tutelage.feedback.votes import Agreement, SoftLabel, VotePrior, agreement, fit_prior
from tutelage.records import Cost, Message, Prompt, Verdict, content_hash

__all__ = [
    "Label",
    "Task",
    "agreements",
    "append_label",
    "append_undo",
    "fit_votes",
    "json_lines",
    "match",
    "now",
    "parse_label",
    "read_labels",
    "soft_labels",
    "verdicts",
]

TaskKind = Literal["pair", "rating", "best"]
Word = Literal["tie", "both_bad", "skip"]
_WORDS: tuple[Word, ...] = get_args(Word)
_FIRST_WINS: dict[int | Word, float] = {0: 1.0, 1: 0.0, "tie": 0.5, "both_bad": 0.5}
_CODES = {"tie": -1, "both_bad": -2}  # below every candidate, for agreement


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """What a person is asked about.

    Args:
        id: Ends in a hash of everything that is shown, so that a label never fits an edited task.
        kind: Compare two, rate one, or pick the best of several.
        messages: The conversation that the candidates answer.
        candidates: The texts, in the order of the file: two, one, or three to nine.
        subjects: What each candidate is called in verdicts (a generation's id where the file gives one).
        scale: Highest rating; the lowest is 1. 0 for tasks that are no ratings.
    """

    id: str
    kind: TaskKind
    messages: tuple[Message, ...]
    candidates: tuple[str, ...]
    subjects: tuple[str, ...]
    scale: int = 0

    @property
    def prompt_hash(self) -> str:
        """Hash of the conversation, as in `Prompt.hash`."""
        return Prompt(self.id, self.messages).hash

    @property
    def answers(self) -> tuple[int | Word, ...]:
        """Every answer that makes sense."""
        if self.kind == "pair":
            return (0, 1, *_WORDS)
        numbers = range(1, self.scale + 1) if self.kind == "rating" else range(len(self.candidates))
        return (*numbers, "skip")


@dataclasses.dataclass(frozen=True, slots=True)
class Label:
    """What one person answered.

    Args:
        task: Id of the task.
        kind: Its kind.
        annotator: Who answered.
        answer: A rating from 1, or the number of the preferred candidate, counted from 0 in the order of
            the file and not of the screen; or a word.
        order: Numbers of the candidates in the order in which they were shown.
        seconds: From showing the task to the answer; None where nobody measured it.
        at: When, as UTC in ISO 8601; empty where unknown.
        note: What the person wrote beside it.
        log_odds: How sure, in nats, that the first candidate of the file is better; None for people, who
            do not say.
    """

    task: str
    kind: TaskKind
    annotator: str
    answer: int | Word
    order: tuple[int, ...]
    seconds: float | None = None
    at: str = ""
    note: str = ""
    log_odds: float | None = None


def now() -> str:
    """This second, as UTC in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def json_lines(path: Path, *, may_break_off: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place ("file, line n") and object of each line that is not empty.

    Args:
        path: A JSONL file.
        may_break_off: Pass over a last line without its end that is no whole object.

    Raises:
        InputError: The file cannot be read, or a line holds no JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        problem = f"{path} cannot be read: {os.strerror(error.errno) if error.errno else error}"
        raise InputError(problem, expected="a JSONL file", fix="check the path and its permissions") from error
    if may_break_off and not _is_object(lines[-1]):
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _object(place, line)


def _object(place: str, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails on half a character (\\ud800)
    except (ValueError, RecursionError) as error:
        fix = "write one whole JSON object a line, as UTF-8"
        raise InputError(f"{place}: broken JSON: {error}", expected="JSON", fix=fix) from error
    if not isinstance(value, dict):
        raise InputError(f"{place} is no object", expected="an object", fix="write one JSON object a line")
    return value


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_labels(path: Path) -> list[Label]:
    """The labels that stand, oldest first; none where there is no file yet.

    A last line that breaks off (the machine stopped in the middle of a write) is no label; anything
    else that cannot be read is an error.

    Raises:
        InputError: The file cannot be read, or a line is no label; the message names the line.
    """
    standing: dict[tuple[str, str], Label] = {}
    for place, line in json_lines(path, may_break_off=True) if path.exists() else ():
        label = parse_label(place, line)
        standing.pop((label.task, label.annotator), None)  # so that the newest comes last
        if line.get("undo") is not True:
            standing[label.task, label.annotator] = label
    return list(standing.values())


def parse_label(place: str, line: Mapping[str, Any]) -> Label:
    """The label of a line of the label file; that of an undo line says what is taken back.

    Raises:
        InputError: Something is missing or has the wrong type.
    """
    line = {"answer": "skip", "order": [], **line} if line.get("undo") is True else line
    answer, order, seconds = line.get("answer"), line.get("order"), line.get("seconds")
    whole = isinstance(order, list) and all(type(i) is int for i in order)
    wrong = [key for key in ("task", "annotator") if not isinstance(line.get(key), str) or not line[key]]
    wrong += [key for key in ("at", "note") if not isinstance(line.get(key, ""), str)]
    wrong += [] if line.get("kind") in get_args(TaskKind) else ["kind"]
    wrong += [] if type(answer) is int or answer in _WORDS else ["answer"]
    wrong += [] if whole else ["order"]
    timed = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < math.inf
    wrong += [] if timed or seconds is None else ["seconds"]
    sure = line.get("log_odds")
    odds = isinstance(sure, int | float) and not isinstance(sure, bool) and math.isfinite(sure)
    wrong += [] if odds or sure is None else ["log_odds"]
    if wrong:
        raise InputError(
            f"{place} is no label: {', '.join(wrong)} missing or wrong",
            expected="task, annotator, kind, answer and order, as `tutelage label` writes them",
            fix="mend the line or take it out; a task file is given apart from the label file",
        )
    given = {f.name: line[f.name] for f in dataclasses.fields(Label) if f.name in line}
    return Label(**{**given, "order": tuple(line["order"])})


def append_label(path: Path, label: Label) -> None:
    """Add a label to the file; it is on disk when this returns.

    Raises:
        StoreError: The file system refused.
    """
    _append(path, dataclasses.asdict(label))


def append_undo(path: Path, label: Label) -> None:
    """Take a label back by a further line.

    Raises:
        StoreError: The file system refused.
    """
    _append(path, {"undo": True, "task": label.task, "kind": label.kind, "annotator": label.annotator, "at": now()})


def _append(path: Path, line: Mapping[str, Any]) -> None:
    raw = json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    try:
        fresh = not path.exists()
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another annotator may write to the same file
            _mend_end(file)
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        problem = f"{path} cannot be written: {os.strerror(error.errno) if error.errno else error}"
        raise StoreError(
            problem, expected="a file that can grow", fix="check the folder, its rights and space"
        ) from error


def _mend_end(file: BinaryIO) -> None:
    """End a last line that has no end, or take away what a crash left of it: it never was a label."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(end - 1, 0))
    if file.read() in (b"", b"\n"):
        return
    file.seek(0)
    last = file.read().rpartition(b"\n")[2]
    if _is_object(last):
        file.write(b"\n")
    else:
        file.truncate(end - len(last))


def match(tasks: Iterable[Task], labels: Iterable[Label]) -> list[tuple[Task, Label]]:
    """Each label with its task; labels of tasks that are not given are left out.

    Raises:
        InputError: An answer makes no sense for its task.
    """
    known = {task.id: task for task in tasks}
    found = [(known[label.task], label) for label in labels if label.task in known]
    for task, label in found:
        if label.answer not in task.answers or sorted(label.order) != list(range(len(task.candidates))):
            raise InputError(
                f"the label of {label.annotator} on {task.id} is {label.answer!r} in the order {list(label.order)}",
                expected=f"one of {', '.join(map(str, task.answers))}, and an order of {len(task.candidates)}",
                fix="mend or remove its line in the label file",
            )
    return found


def _votes(matched: Iterable[tuple[Task, Label]]) -> dict[str, list[float]]:
    """The votes on each pair: 1 for the first, 0 for the second, 1/2 for neither."""
    votes: dict[str, list[float]] = {}
    for task, label in matched:
        if task.kind == "pair" and label.answer != "skip":
            votes.setdefault(task.id, []).append(_FIRST_WINS[label.answer])
    return votes


def _fit(votes: Mapping[str, Sequence[float]]) -> VotePrior:
    return fit_prior((given.count(1.0), len(given) - given.count(0.5)) for given in votes.values())


def fit_votes(tasks: Iterable[Task], labels: Iterable[Label]) -> VotePrior:
    """The prior of soft labels, fitted to all pairs (`votes.fit_prior`)."""
    return _fit(_votes(match(tasks, labels)))


def soft_labels(
    tasks: Iterable[Task], labels: Iterable[Label], *, prior: VotePrior | None = None
) -> dict[str, SoftLabel]:
    """What all votes on a pair say together, by task id; "tie" and "both bad" are half a vote for each side.

    Args:
        tasks: Those of the labels.
        labels: Standing labels.
        prior: Fitted to these labels when left out.
    """
    votes = _votes(match(tasks, labels))
    prior = prior or _fit(votes)
    return {task: prior.posterior(sum(given), len(given)) for task, given in votes.items()}


def agreements(tasks: Iterable[Task], labels: Iterable[Label]) -> dict[str, Agreement]:
    """How far annotators agree, for "pair", "rating-of-n" and "best-of-n" each; skipped tasks are left out.

    Pairs and best-of-n are nominal ("tie" and "both bad" are answers of their own), ratings ordinal.
    """
    answers: dict[tuple[str, int], dict[str, dict[str, int]]] = {}
    for task, label in match(tasks, labels):
        if label.answer != "skip":
            choices = 0 if task.kind == "rating" else len(task.candidates)
            kind = "pair" if task.kind == "pair" else f"{task.kind}-of-{choices or task.scale}"
            given = answers.setdefault((kind, choices), {}).setdefault(label.annotator, {})
            given[task.id] = _CODES[label.answer] if isinstance(label.answer, str) else label.answer
    return {kind: agreement(given, choices=choices) for (kind, choices), given in answers.items()}


def verdicts(tasks: Iterable[Task], labels: Iterable[Label], *, prior: VotePrior | None = None) -> list[Verdict]:
    """Labels as verdicts for the ledger, by the judge "human:<annotator>". One a label; best-of-n: one a candidate.

    A pair's subject is the task and its value the log-odds, in nats, that the first candidate is better:
    what one vote is worth under the prior, ln((1 + a) / a) in its direction, and 0 for a tie, which here
    is an answer and not a failure. A rating's value goes from 0 to 1. In best-of-n it is the
    log-probability of being best. A skipped task is an abstention.

    Args:
        tasks: Those of the labels.
        labels: Standing labels.
        prior: Fitted to these labels when left out.
    """
    tasks, labels = list(tasks), list(labels)
    prior = prior or fit_votes(tasks, labels)
    return [verdict for task, label in match(tasks, labels) for verdict in _verdicts(task, label, prior)]


def _verdicts(task: Task, label: Label, prior: VotePrior) -> Iterator[Verdict]:
    values, reason = _values(task, label, prior)
    reason = f"{reason}: {label.note}" if label.note else reason
    evidence: dict[str, Any] = {"kind": task.kind, "answer": label.answer, "task": task.id, "at": label.at}
    if task.kind == "pair":
        evidence["candidates"] = list(task.subjects)
    if task.kind != "rating":
        evidence["prior"] = round(prior.a, 6)
    version = content_hash(["human", label.annotator, task.kind, evidence.get("prior"), task.scale])
    cost = Cost(seconds=(label.seconds or 0.0) / len(values))
    shown = tuple(task.subjects[i] for i in label.order)
    for subject, value in values.items():
        judge = f"human:{label.annotator}"
        yield Verdict(judge, version, subject, task.prompt_hash, value, reason, evidence, cost, order=shown)


def _values(task: Task, label: Label, prior: VotePrior) -> tuple[dict[str, float | None], str]:
    """Value by subject, and why."""
    answer = label.answer
    subjects = (task.id,) if task.kind == "pair" else task.subjects
    if answer == "skip":
        return dict.fromkeys(subjects), "abstains: skipped by the annotator"
    if isinstance(answer, str):
        return {task.id: 0.0}, answer.replace("_", " ")
    if task.kind == "rating":
        return {subjects[0]: (answer - 1) / (task.scale - 1)}, f"rated {answer} of {task.scale}"
    best, other = prior.log_pick(len(task.candidates))
    if task.kind == "pair":
        return {task.id: best - other if answer == 0 else other - best}, f"prefers the {('first', 'second')[answer]}"
    return {s: best if i == answer else other for i, s in enumerate(subjects)}, f"number {answer + 1} is best"
