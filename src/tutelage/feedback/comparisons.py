"""Files of compared replies as pairs with one soft label each, from whoever compared them.

A line is what `human_data.import_labels` reads ({"prompt", "chosen", "rejected"} with texts or messages, hh-rlhf
dialogues, two `candidates`; `votes` by annotator), or counts votes, "votes": [for the chosen, for the rejected], or
states a "probability" that the chosen reply is the better one, without votes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tutelage.errors import InputError
from tutelage.feedback.human import Task, json_lines
from tutelage.feedback.human_data import import_rows
from tutelage.feedback.votes import VotePrior, fit_prior
from tutelage.records import Prompt

__all__ = ["Compared", "Comparisons", "read_comparisons"]

_WORDS = ("tie", "both_bad")


@dataclasses.dataclass(frozen=True, slots=True)
class Compared:
    """Two replies to one prompt, and what was said of them.

    Args:
        prompt: What they answer.
        first: One reply.
        second: The other.
        votes: For the first and for the second.
        ties: Votes for neither; each is half a vote for both.
        stated: P(first is better) as the file says it, where it counts no votes.
    """

    prompt: Prompt
    first: str
    second: str
    votes: tuple[float, float] = (0.0, 0.0)
    ties: float = 0.0
    stated: float | None = None

    def label(self, prior: VotePrior, how: Literal["votes", "hard"]) -> float:
        """P(first is better): what the file states, or (k + a)/(n + 2a) of k of n votes under the prior.

        Where no pair of the file has two votes nothing is known of how people split, and the label is that of
        "hard": 1, 0, or 1/2 of an even vote.
        """
        first, second = self.votes
        lead = self.stated - 0.5 if self.stated is not None else first - second
        if how == "hard" or (self.stated is None and not prior.pairs):
            return 0.5 + math.copysign(0.5, lead) if lead else 0.5
        if self.stated is not None:
            return self.stated
        return prior.posterior(first + self.ties / 2, first + second + self.ties).mean


@dataclasses.dataclass(frozen=True, slots=True)
class Comparisons:
    """What a file held.

    Args:
        pairs: Each once, however many people compared it.
        prior: Fitted to the pairs with two votes or more besides ties.
        left_out: Place and reason of what says nothing: equal texts, and pairs on which everyone abstained.
    """

    pairs: tuple[Compared, ...]
    prior: VotePrior
    left_out: tuple[str, ...]

    def labels(self, how: Literal["votes", "hard"]) -> list[float]:
        """One a pair."""
        return [pair.label(self.prior, how) for pair in self.pairs]


def read_comparisons(path: Path, *, limit: int | None = None) -> Comparisons:
    """Read a file of compared replies.

    Args:
        path: A JSONL file in one or several of the forms above.
        limit: Only its first N lines.

    Raises:
        InputError: The file cannot be read, a line is no pair, or none says anything; the message names the line.
    """
    rows = list(itertools.islice(json_lines(path), limit))
    counted = [(place, row) for place, row in rows if _is_told(row)]
    found = import_rows([(place, row) for place, row in rows if not _is_told(row)])
    left_out = list(found.left_out)
    answers: dict[str, list[int | str]] = {}
    for label in found.labels:
        answers.setdefault(label.task, []).append(label.answer)
    pairs = []
    for task in found.tasks:
        given = [a for a in answers.get(task.id, []) if a != "skip"]
        if not given:
            left_out.append(f"{task.id}: everyone abstained")
            continue
        votes = float(given.count(0)), float(given.count(1))
        pairs.append(_pair(task, votes, ties=float(sum(given.count(word) for word in _WORDS))))
    for place, row in counted:
        bare = import_rows([(place, {k: v for k, v in row.items() if k != "votes"})])
        left_out += bare.left_out
        pairs += [_told(place, row, task) for task in bare.tasks]
    if not pairs:
        raise InputError(
            f"{path} holds no pair that says which reply is better"
            + (f" ({len(left_out)} left out, the first: {left_out[0]})" if left_out else ""),
            expected='lines {"prompt", "chosen", "rejected"}',
            fix="check the file, or leave pairs.file out",
        )
    return Comparisons(tuple(pairs), fit_prior(_counts(pairs)), tuple(left_out))


def _is_told(row: Mapping[str, Any]) -> bool:
    """Whether a row counts votes, or states a probability, and names no votes."""
    votes = row.get("votes")
    if votes is None:
        return "probability" in row
    return isinstance(votes, list) and len(votes) == 2 and "chosen" in row and all(map(_is_number, votes))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _told(place: str, row: Mapping[str, Any], task: Task) -> Compared:
    stated = row.get("probability") if row.get("votes") is None else None
    if "votes" in row and stated is None:
        first, second = (float(v) for v in row["votes"])
        if not (0 <= first < math.inf and 0 <= second < math.inf and first + second > 0):
            raise InputError(f"{place}: votes is {row['votes']}", expected="[for the chosen, for the rejected], [3, 1]")
        return _pair(task, (first, second))
    if not _is_number(stated) or not 0 <= float(stated or 0) <= 1:
        raise InputError(
            f"{place}: probability is {stated!r:.80}",
            expected="a number from 0 to 1: that the chosen reply is the better one",
            fix="correct it, or leave it out",
        )
    return _pair(task, (0.0, 0.0), stated=float(stated or 0))


def _pair(task: Task, votes: tuple[float, float], *, ties: float = 0.0, stated: float | None = None) -> Compared:
    if task.kind != "pair":
        raise InputError(
            f"task {task.id} has {len(task.candidates)} candidates",
            expected="two replies to compare",
            fix="bring it in with `tutelage people import`, and hand it on with `--form preference`",
        )
    first, second = (text.strip() for text in task.candidates)
    return Compared(Prompt(task.id, task.messages), first, second, votes, ties, stated)


def _counts(pairs: Sequence[Compared]) -> Iterable[tuple[int, int]]:
    """Votes for the first and for either, of pairs whose votes are whole: halves are no votes of a person."""
    for pair in pairs:
        first, second = pair.votes
        if first.is_integer() and second.is_integer():
            yield int(first), int(first + second)
