"""Replies with a score for each value: what can be asked about somebody's values, and what they chose already."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.errors import InputError
from tutelage.feedback.human import Task
from tutelage.loop.bench import derive_seed
from tutelage.records import Message, content_hash
from tutelage.store.prompts import check_path, conversation_of, json_rows

__all__ = ["Bank", "read_bank"]

_MOST = 2000  # questions that are weighed against each other; more are drawn from


@dataclasses.dataclass(frozen=True)
class Bank:
    """Questions that can be asked, and what a difference in each value is measured in.

    Args:
        names: Of the values.
        scale_K: Deviation of each value's scores among replies to one prompt; 1 where they never differ.
        tasks: The questions.
        first_NK: Scores of each question's first reply, divided by the scale.
        second_NK: Those of its second.
        left_out: Pairs that are no question: a score is missing, or no score differs.
        choices: Demonstrations: scores of the candidates, divided by the scale, and which of them was chosen.
        choiceless: Choices that are none: what was chosen lacks a score, or had nothing beside it.
        options: Scores of what could be picked, divided by the scale, a table a prompt with two replies or more.
    """

    names: tuple[str, ...]
    scale_K: np.ndarray
    tasks: tuple[Task, ...]
    first_NK: np.ndarray
    second_NK: np.ndarray
    left_out: int
    choices: tuple[tuple[np.ndarray, int], ...]
    choiceless: int
    options: tuple[np.ndarray, ...]


def read_bank(path: Path, *, seed: int = 0) -> Bank:
    """Read candidates with their scores; all pairs of replies to one prompt are questions, `chosen` is an answer.

    Args:
        path: JSONL of {"prompt", "candidates": [texts], "features": [{value: score}, ...]}, or one reply a line:
            {"prompt", "response", "features": {value: score}}. A score that is null or left out is missing. A line
            of candidates may name the one that somebody chose: "chosen", its place from 0.
        seed: Of the choice among more than 2,000 pairs.

    Raises:
        InputError: The file cannot be read, a line has another form, or there is no question in it.
    """
    check_path(path, (".jsonl", ".ndjson", ".json"))
    lists: dict[tuple[Message, ...], dict[str, Mapping[str, float]]] = {}
    chose: list[tuple[list[dict[str, float]], int]] = []
    for number, fields in json_rows(path):
        place = f"{path}, line {number}"
        texts, scores = _scored(place, fields)
        if fields.get("chosen") is not None:
            chose.append((scores, _place(place, fields["chosen"], len(texts))))
        lists.setdefault(conversation_of(place, fields), {}).update(zip(texts, scores, strict=True))
    names = tuple(dict.fromkeys(name for group in lists.values() for one in group.values() for name in one))
    if not names:
        raise InputError(f"{path} scores no value", expected='"features": {"honesty": 0.8, ...}', fix="add scores")
    phi = {turns: _table(list(group.values()), names) for turns, group in lists.items()}
    scale_K = _deviations(list(phi.values()), len(names))
    pairs = [(t, i, j) for t, group in lists.items() for i, j in itertools.combinations(range(len(group)), 2)]
    good = [
        (t, i, j) for t, i, j in pairs if np.isfinite(phi[t][i] - phi[t][j]).all() and (phi[t][i] != phi[t][j]).any()
    ]
    if not good:
        raise InputError(
            f"{path} holds no question: none of its {len(pairs)} pairs has all scores and a difference",
            expected="two replies to one prompt, with every value scored, at least one differently",
            fix="score more replies, or leave a value out that is seldom scored",
        )
    if len(good) > _MOST:
        good = random.Random(derive_seed(seed, "questions")).sample(good, _MOST)  # noqa: S311 - a sample, not a secret
    text_of = {turns: list(group) for turns, group in lists.items()}
    tasks = tuple(_task(t, text_of[t][i], text_of[t][j]) for t, i, j in good)
    first_NK = np.stack([phi[t][i] for t, i, _ in good]) / scale_K
    second_NK = np.stack([phi[t][j] for t, _, j in good]) / scale_K
    choices = [c for scores, chosen in chose if (c := _choice(_table(scores, names) / scale_K, chosen))]
    whole = [table[np.isfinite(table).all(1)] / scale_K for table in phi.values()]
    return Bank(
        names, scale_K, tasks, first_NK, second_NK, len(pairs) - len(good),
        tuple(choices), len(chose) - len(choices), tuple(table for table in whole if len(table) > 1),
    )  # fmt: skip


def _place(place: str, chosen: Any, count: int) -> int:
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 <= chosen < count:
        raise InputError(
            f"{place}: `chosen` is {chosen!r}", expected=f"the place of one of {count} candidates, from 0 on",
            fix="leave it out, or write null, where nobody chose",
        )  # fmt: skip
    return chosen


def _choice(phi_CK: np.ndarray, chosen: int) -> tuple[np.ndarray, int] | None:
    """A choice among the candidates that have all scores."""
    there_C = np.isfinite(phi_CK).all(1)
    if not there_C[chosen] or there_C.sum() < 2:
        return None
    return phi_CK[there_C], int(there_C[:chosen].sum())


def _scored(place: str, fields: Mapping[str, Any]) -> tuple[list[str], list[dict[str, float]]]:
    texts, scores = fields.get("candidates"), fields.get("features")
    if "candidates" not in fields:
        texts, scores = [fields.get("response")], [scores]
    good = isinstance(texts, list) and all(isinstance(t, str) and t.strip() for t in texts)
    if not good or not isinstance(texts, list) or not texts or len(set(texts)) < len(texts):
        raise InputError(
            f"{place} names no replies that differ", expected="`candidates`, or a `response`", fix="give texts"
        )
    if not isinstance(scores, list) or len(scores) != len(texts) or not all(isinstance(s, dict) for s in scores):
        raise InputError(
            f"{place}: `features` does not score each of {len(texts)} replies",
            expected='{"honesty": 0.8, ...} for each reply, in their order',
            fix="write null for a score that is missing",
        )
    for name, value in (item for one in scores for item in one.items()):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not number:
            raise InputError(f"{place}: the score of {name!r} is {value!r}", expected="a finite number, or null")
    return texts, [{name: value for name, value in one.items() if value is not None} for one in scores]


def _table(scores: Sequence[Mapping[str, float]], names: Sequence[str]) -> np.ndarray:
    return np.array([[float(one.get(name, math.nan)) for name in names] for one in scores])


def _deviations(tables: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Root mean square deviation from the mean of each prompt's replies, by value."""
    squares, degrees = np.zeros(count), np.zeros(count)
    for table in tables:
        for k in range(count):
            known = table[np.isfinite(table[:, k]), k]
            if len(known) > 1:
                squares[k] += float(((known - known.mean()) ** 2).sum())
                degrees[k] += len(known) - 1
    found: np.ndarray = np.sqrt(squares / np.maximum(degrees, 1.0))
    return np.where(found > 1e-12, found, 1.0)


def _task(messages: tuple[Message, ...], first: str, second: str) -> Task:
    turns = [[m.role, m.content] for m in messages]
    name = f"value-{content_hash([turns, first, second], length=12)}"
    return Task(name, "pair", messages, (first, second), (f"{name}/0", f"{name}/1"))
