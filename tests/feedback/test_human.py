"""Labels in their file, and what becomes of them: verdicts, soft labels, agreement."""

from __future__ import annotations

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tutelage.errors import InputError, StoreError
from tutelage.feedback.human import (
    Label,
    Task,
    agreements,
    append_label,
    append_undo,
    fit_votes,
    now,
    read_labels,
    soft_labels,
    verdicts,
)
from tutelage.feedback.votes import VotePrior
from tutelage.records import Message, Prompt

ASKED = (Message("user", "Warum ist der Himmel blau?"),)
PAIR = Task("pair-1", "pair", ASKED, ("Wegen der Streuung.", "Er ist es nicht."), ("g1", "g2"))
RATING = Task("rating-1", "rating", ASKED, ("Wegen der Streuung.",), ("g1",), 5)
BEST = Task("best-1", "best", ASKED, ("a", "b", "c"), ("g1", "g2", "g3"))


def pair(answer: Any, annotator: str = "ann", **more: Any) -> Label:
    return Label("pair-1", "pair", annotator, answer, more.pop("order", (0, 1)), **more)


def test_labels_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    assert read_labels(path) == []
    given = [
        pair(1, order=(1, 0), seconds=2.5, at=now(), note="答えが違う\nwirklich"),
        Label("rating-1", "rating", "ann", 4, (0,)),
        Label("best-1", "best", "bob", "skip", (2, 0, 1), 0.75, "2026-01-02T03:04:05+00:00"),
    ]
    for label in given:
        append_label(path, label)
    assert read_labels(path) == given
    assert len(path.read_bytes().splitlines()) == 3
    assert given[0].at.endswith("+00:00")


def test_a_later_line_stands_and_undo_takes_back(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    append_label(path, pair(0))
    append_label(path, pair(1, "bob"))
    append_label(path, pair("tie"))
    assert read_labels(path) == [pair(1, "bob"), pair("tie")]  # the newest comes last
    append_undo(path, pair("tie"))
    assert read_labels(path) == [pair(1, "bob")]
    append_label(path, pair(0))
    assert read_labels(path) == [pair(1, "bob"), pair(0)]
    assert len(path.read_bytes().splitlines()) == 5  # nothing was taken out


answers = st.sampled_from([0, 1, "tie", "both_bad", "skip", "undo"])
steps = st.lists(st.tuples(st.sampled_from("tuv"), st.sampled_from(["ann", "Ünal"]), answers), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(steps=steps)
def test_the_file_remembers_like_a_dictionary(tmp_path: Path, steps: list[tuple[str, str, Any]]) -> None:
    path = tmp_path / "labels.jsonl"
    path.unlink(missing_ok=True)
    expected: dict[tuple[str, str], Label] = {}
    for task, annotator, answer in steps:
        label = Label(task, "pair", annotator, "skip" if answer == "undo" else answer, (1, 0))
        expected.pop((task, annotator), None)
        if answer == "undo":
            append_undo(path, label)
        else:
            append_label(path, label)
            expected[task, annotator] = label
    assert read_labels(path) == list(expected.values())


@pytest.mark.parametrize("kept", range(1, 40, 6))
def test_a_line_that_broke_off_is_no_label_and_does_no_harm(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "labels.jsonl"
    append_label(path, pair(0, note="ü"))
    whole = path.read_bytes()
    append_label(path, pair(1, "bob", note="ü"))
    path.write_bytes(whole + path.read_bytes()[len(whole) :][:kept])
    assert read_labels(path) == [pair(0, note="ü")]
    append_label(path, pair("tie", "cy"))
    assert read_labels(path) == [pair(0, note="ü"), pair("tie", "cy")]
    assert path.read_bytes().startswith(whole)


def test_a_whole_last_line_without_its_end_is_a_label(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    append_label(path, pair(0))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    append_label(path, pair(1, "bob"))
    assert read_labels(path) == [pair(0), pair(1, "bob")]


def test_several_people_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    given = [pair(n % 2, f"person {n}") for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda label: append_label(path, label), given))
    assert sorted(read_labels(path), key=lambda label: int(label.annotator[7:])) == given


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": ""}, "task"),
        ({"annotator": 7}, "annotator"),
        ({"kind": "pairs"}, "kind"),
        ({"answer": True}, "answer"),
        ({"answer": "left"}, "answer"),
        ({"answer": [0]}, "answer"),
        ({"order": "01"}, "order"),
        ({"order": [0, None]}, "order"),
        ({"seconds": -1}, "seconds"),
        ({"seconds": math.nan}, "seconds"),
        ({"at": 5}, "at"),
    ],
)
def test_a_line_that_is_no_label_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "labels.jsonl"
    append_label(path, pair(0))
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(pair(0)) | change) + "\n")
    with pytest.raises(InputError, match=rf"labels\.jsonl, line 2 is no label: {said} missing"):
        read_labels(path)


@pytest.mark.parametrize("line", ['{"task": ', "[1]", '"text"', '{"task": "\\ud800"}', "[" * 100_000])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(line + "\n\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"labels\.jsonl, line 1"):
        read_labels(path)


def test_a_file_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        append_label(tmp_path / "nowhere" / "labels.jsonl", pair(0))
    with pytest.raises(InputError, match="cannot be read"):
        read_labels(tmp_path)


# Verdicts


def test_a_pair_is_worth_what_one_vote_is_worth() -> None:
    """Uniform prior (nobody shares a pair with anybody): ln((1 + 1) / 1) = ln 2."""
    (found,) = verdicts([PAIR], [pair(1, order=(1, 0), seconds=3.5, at="2026-01-01T00:00:00+00:00", note="falsch")])
    assert found.value == pytest.approx(-math.log(2))
    assert (found.judge, found.subject, found.order) == ("human:ann", "pair-1", ("g2", "g1"))
    assert found.prompt_hash == Prompt("any", ASKED).hash
    assert found.cost.seconds == 3.5
    assert found.reason == "prefers the second: falsch"
    assert found.evidence["candidates"] == ["g1", "g2"] and found.evidence["answer"] == 1
    json.dumps(found.evidence)


def test_ties_are_zero_and_skips_are_missing() -> None:
    given = [pair("tie"), pair("both_bad", "bob"), pair("skip", "cy")]
    tie, bad, skipped = verdicts([PAIR], given, prior=VotePrior(0.3))
    assert (tie.value, tie.reason, bad.value, bad.reason) == (0.0, "tie", 0.0, "both bad")
    assert skipped.abstained and skipped.reason == "abstains: skipped by the annotator"


def test_ratings_go_from_zero_to_one() -> None:
    given = [
        Label("rating-1", "rating", name, answer, (0,)) for name, answer in zip("abcd", (1, 4, 5, "skip"), strict=True)
    ]
    found = verdicts([RATING], given)
    assert [v.value for v in found] == [0.0, 0.75, 1.0, None]
    assert {v.subject for v in found} == {"g1"}


def test_the_best_of_three_by_hand() -> None:
    """Uniform prior: (1 + 1) / (1 + 3) for the one picked, 1/4 for each other; the time is shared."""
    found = verdicts([BEST], [Label("best-1", "best", "ann", 2, (2, 0, 1), 6.0)])
    assert [v.subject for v in found] == ["g1", "g2", "g3"]
    assert [v.value for v in found] == [pytest.approx(math.log(p)) for p in (0.25, 0.25, 0.5)]
    assert [v.cost.seconds for v in found] == [2.0] * 3
    assert found[0].order == ("g3", "g1", "g2")
    assert [v.value for v in verdicts([BEST], [Label("best-1", "best", "ann", "skip", (0, 1, 2))])] == [None] * 3


def test_the_prior_is_fitted_to_all_pairs() -> None:
    """Two votes each on four pairs, three of them agreeing: a = (1 - 3/4) / (2 * 3/4 - 1) = 1/2, one vote ln 3."""
    tasks = [dataclasses.replace(PAIR, id=f"t{n}") for n in range(4)]
    given = [Label(f"t{n}", "pair", "ann", 0, (0, 1)) for n in range(4)]
    given += [Label(f"t{n}", "pair", "bob", int(n == 3), (1, 0)) for n in range(4)]
    assert fit_votes(tasks, given).a == pytest.approx(0.5, rel=1e-4)
    assert verdicts(tasks, given)[-1].value == pytest.approx(-math.log(3), rel=1e-4)
    soft = soft_labels(tasks, given)
    assert soft["t0"].mean == pytest.approx(2.5 / 3, rel=1e-4) and soft["t3"].mean == pytest.approx(0.5)
    # The version tells a vote under one prior from the same vote under another.
    assert verdicts(tasks, given)[0].judge_version != verdicts(tasks, given, prior=VotePrior())[0].judge_version


def test_skips_are_no_votes() -> None:
    given = [pair(0), pair("skip", "bob"), pair("tie", "cy"), pair("both_bad", "di")]
    assert soft_labels([PAIR], given, prior=VotePrior())["pair-1"].votes == 3
    assert soft_labels([PAIR], given, prior=VotePrior())["pair-1"].mean == pytest.approx((2 + 1) / (3 + 2))
    assert soft_labels([PAIR], [pair("skip")]) == {}


@given(answer=st.sampled_from([0, 1, "tie", "both_bad", "skip"]), a=st.floats(0.05, 50))
def test_swapping_the_pair_flips_the_sign(answer: Any, a: float) -> None:
    swapped = dataclasses.replace(PAIR, candidates=PAIR.candidates[::-1], subjects=PAIR.subjects[::-1])
    other = 1 - answer if isinstance(answer, int) else answer
    (one,), (two,) = (verdicts([t], [pair(x)], prior=VotePrior(a)) for t, x in ((PAIR, answer), (swapped, other)))
    assert (one.value is None) == (two.value is None) == (answer == "skip")
    assert one.value is None or one.value == pytest.approx(-two.value)


def test_labels_of_other_tasks_are_left_out_and_impossible_ones_refused() -> None:
    assert verdicts([RATING], [pair(0)]) == []
    for label in (pair(2), pair(0, order=(0,)), pair(0, order=(0, 0)), Label("rating-1", "rating", "ann", 6, (0,)),
                  Label("rating-1", "rating", "ann", "tie", (0,)), Label("best-1", "best", "ann", 3, (0, 1, 2))):  # fmt: skip
        with pytest.raises(InputError, match="label of ann on"):
            verdicts([PAIR, RATING, BEST], [label])


def test_agreement_is_by_kind_of_task() -> None:
    given = [pair(0), pair(0, "bob"), pair("skip", "cy")]
    given += [Label("rating-1", "rating", name, answer, (0,)) for name, answer in (("ann", 2), ("bob", 4))]
    given += [Label("best-1", "best", name, 1, (0, 1, 2)) for name in ("ann", "bob")]
    found = agreements([PAIR, RATING, BEST], given)
    assert set(found) == {"pair", "rating-of-5", "best-of-3"}
    assert found["pair"].kappas == {("ann", "bob"): (pytest.approx(1.0), 1)}
    assert (found["rating-of-5"].same, found["best-of-3"].alpha) == (0.0, 1.0)
