"""Tasks and labels in other people's files: read, written, read back."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tutelage.errors import InputError, StoreError
from tutelage.feedback.human import Label, Task, agreements, fit_votes, soft_labels, verdicts
from tutelage.feedback.human_data import Imported, export_labels, import_labels, read_tasks
from tutelage.records import Message

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
HH = SHARED / "hh-rlhf" / "harmless-base-test-even.jsonl.gz"
TULU = SHARED / "openinstruct-human" / "annotations.jsonl.gz"
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")

USER, REPLY = {"role": "user", "content": "为什么？"}, {"role": "assistant", "content": "因为。"}
OTHER = {"role": "assistant", "content": "我不知道。"}


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Tasks


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "为什么？", "candidates": ["因为。", "我不知道。"]},
        {"prompt": "为什么？", "chosen": "因为。", "rejected": "我不知道。"},
        {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]},
        {"prompt": "为什么？", "chosen": [USER, REPLY], "rejected": [USER, OTHER]},
        {"chosen": [USER, REPLY], "rejected": [USER, OTHER], "score_chosen": 9.5},
        {
            "chosen": "\n\nHuman: 为什么？\n\nAssistant: 因为。",
            "rejected": "\n\nHuman: 为什么？\n\nAssistant: 我不知道。",
        },
    ],
)
def test_one_pair_in_all_its_forms(tmp_path: Path, row: dict[str, Any]) -> None:
    (task,) = read_tasks(written(tmp_path, row))
    assert (task.kind, task.messages, task.candidates) == (
        "pair",
        (Message("user", "为什么？"),),
        ("因为。", "我不知道。"),
    )
    (same,) = read_tasks(written(tmp_path, {"prompt": "为什么？", "candidates": ["因为。", "我不知道。"]}))
    assert task == same


def test_ratings_and_lists(tmp_path: Path) -> None:
    rows = ({"id": 7, "prompt": "Q", "response": "A"}, {"prompt": "Q", "candidates": ["A"], "scale": 7},
            {"prompt": "Q", "candidates": ["A", "B", "C"], "ids": ["g1", "g2", "g3"]})  # fmt: skip
    short, long, best = read_tasks(written(tmp_path, *rows), scale=3)
    assert (short.kind, short.scale, short.answers) == ("rating", 3, (1, 2, 3, "skip"))
    assert (long.scale, best.kind, best.scale, best.subjects) == (7, "best", 0, ("g1", "g2", "g3"))
    assert short.id.startswith("7-") and short.subjects == (f"{short.id}/0",)
    assert len({short.id, long.id, best.id}) == 3


def test_a_label_does_not_fit_an_edited_task(tmp_path: Path) -> None:
    (one,) = read_tasks(written(tmp_path, {"id": "x", "prompt": "Q", "candidates": ["A", "B"]}))
    (two,) = read_tasks(written(tmp_path, {"id": "x", "prompt": "Q", "candidates": ["A", "b"]}))
    assert one.id != two.id and {one.id[:2], two.id[:2]} == {"x-"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Q"}, "has no candidates, only: 'prompt'"),
        ({"prompt": "Q", "chosen": "A"}, "has no candidates"),
        ({"candidates": ["A", "B"]}, "`prompt` is missing"),
        ({"prompt": "  ", "candidates": ["A", "B"]}, "`prompt` does not end"),
        ({"prompt": [USER, REPLY], "candidates": ["A", "B"]}, "`prompt` does not end"),
        ({"prompt": [{"role": "robot", "content": "x"}], "candidates": ["A", "B"]}, "message 1 is no message"),
        ({"prompt": "Q", "candidates": []}, "`candidates` is not a list of 1 to 9"),
        ({"prompt": "Q", "candidates": list("ABCDEFGHIJ")}, "`candidates` is not a list of 1 to 9"),
        ({"prompt": "Q", "candidates": ["A", 2]}, "`candidates` is not a list of 1 to 9"),
        ({"prompt": "Q", "candidates": ["A", "A"]}, "the same text"),
        ({"prompt": "Q", "candidates": ["A", "B"], "ids": ["g", "g"]}, "`ids`"),
        ({"prompt": "Q", "candidates": ["A", "B"], "id": ["x"]}, "the id is"),
        ({"prompt": "Q", "response": "A", "scale": 10}, "a scale to 10"),
        ({"prompt": "Q", "response": "A", "scale": True}, "a scale to True"),
        ({"prompt": [USER], "chosen": [REPLY, OTHER], "rejected": [OTHER]}, "`chosen` does not end in"),
        ({"chosen": "Because.", "rejected": "No."}, "`chosen` has no prompt before it"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: b"},
            "part before the last",
        ),
        ({"prompt": "\ud800", "candidates": ["A", "B"]}, "broken JSON"),
    ],
)
def test_what_is_no_task_is_named_with_its_line(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "fine", "candidates": ["A", "B"]}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2") as caught:
        read_tasks(path)
    assert said in caught.value.got and caught.value.expected and caught.value.fix


def test_doubles_and_empty_files(tmp_path: Path) -> None:
    row = {"prompt": "Q", "candidates": ["A", "B"]}
    with pytest.raises(InputError, match="line 2: a task that stands above"):
        read_tasks(written(tmp_path, row, row))
    assert len(read_tasks(written(tmp_path, row, {**row, "id": "again"}))) == 2
    with pytest.raises(InputError, match="holds no tasks"):
        read_tasks(written(tmp_path))
    with pytest.raises(InputError, match="cannot be read"):
        read_tasks(tmp_path / "nowhere.jsonl")


# Labels of others


def test_votes_in_all_their_forms(tmp_path: Path) -> None:
    votes: list[Any] = [1, 0, 0.5, "chosen", "rejected", "tie", "both_bad", "skip", True]
    votes.append({"vote": "rejected", "annotator": "Ana", "seconds": 2, "note": "lügt", "order": [1, 0]})
    found = import_labels(written(tmp_path, {"prompt": "Q", "chosen": "A", "rejected": "B", "votes": votes}))
    assert [v.answer for v in found.labels] == [0, 1, "tie", 0, 1, "tie", "both_bad", "skip", 0, 1]
    assert [v.annotator for v in found.labels[:2]] == ["import-1", "import-2"]
    last = found.labels[-1]
    assert (last.annotator, last.seconds, last.note, last.order) == ("Ana", 2, "lügt", (1, 0))
    # 3 for, 3 against and 3 even ones.
    assert soft_labels(found.tasks, found.labels)[found.tasks[0].id].mean == pytest.approx(0.5)


def test_people_who_see_a_pair_the_other_way_round_vote_on_the_same_pair(tmp_path: Path) -> None:
    one = {"prompt": "Q", "chosen": "A", "rejected": "B", "annotator": "ann"}
    two = {"prompt": "Q", "chosen": "B", "rejected": "A", "annotator": "bob"}
    three = {"prompt": "Q", "candidates": ["B", "A"], "votes": [{"vote": 1, "annotator": "cy", "order": [0, 1]}]}
    found = import_labels(written(tmp_path, one, two, three))
    assert len(found.tasks) == 1 and found.tasks[0].candidates == ("A", "B")
    assert [(v.annotator, v.answer, v.order) for v in found.labels] == [
        ("ann", 0, (0, 1)),
        ("bob", 1, (1, 0)),
        ("cy", 0, (1, 0)),
    ]


def test_ratings_of_others(tmp_path: Path) -> None:
    rows = ({"prompt": [USER], "completion": [REPLY], "label": False}, {"prompt": "Q", "response": "A", "rating": 4},
            {"prompt": "Q", "candidates": ["B"], "scale": 9, "votes": [9, {"vote": 1, "annotator": "x"}]})  # fmt: skip
    found = import_labels(written(tmp_path, *rows), annotator="them")
    assert [(v.annotator, v.answer) for v in found.labels] == [("them-1", 1), ("them-1", 4), ("them-1", 9), ("x", 1)]
    assert [v.value for v in verdicts(found.tasks, found.labels)] == [0.0, 0.75, 1.0, 0.0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Q", "candidates": ["A", "B"]}, "says nobody's opinion"),
        ({"prompt": "Q", "response": "A"}, "says nobody's opinion"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "votes": 3}, "says nobody's opinion"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "votes": ["A"]}, "has the vote 'A'"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "votes": [[1]]}, "has the vote [1]"),
        ({"prompt": "Q", "candidates": ["A", "B"], "votes": [2]}, "has the vote 2"),
        ({"prompt": "Q", "candidates": ["A", "B"], "votes": [1.0]}, "answer missing or wrong"),
        ({"prompt": "Q", "response": "A", "rating": 6}, "has the vote 6"),
        ({"prompt": "Q", "response": "A", "votes": ["tie"]}, "has the vote 'tie'"),
        ({"prompt": "Q", "response": "A", "votes": [{"vote": 2, "order": [1]}]}, "has the order [1]"),
        ({"prompt": "Q", "response": "A", "votes": [{"vote": 2, "annotator": 5}]}, "annotator missing or wrong"),
    ],
)
def test_what_is_no_label_is_named_with_its_line(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1") as caught:
        import_labels(written(tmp_path, row))
    assert said in caught.value.got


def test_rows_with_nothing_to_judge_are_left_out_and_told(tmp_path: Path) -> None:
    rows = (
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        },
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
    )
    found = import_labels(written(tmp_path, *rows))
    assert len(found.tasks) == len(found.labels) == 1
    assert [re.sub(".*, line", "line", why) for why in found.left_out] == [
        "line 1: two candidates are the same text",
        "line 2: the two dialogues part before the last turn",
    ]


def test_hh_dialogues_by_hand(tmp_path: Path) -> None:
    """Spaces around turns go, blank lines within a turn stay, a speaker who goes on keeps the floor."""
    start = "\n\nHuman: Hi\n\nyou\n\nAssistant: Yes?\n\nHuman: One.\n\nHuman: Two."
    row = {"chosen": start + "\n\nAssistant: Fine.\n\nThanks", "rejected": start + "\n\nAssistant:"}
    (task,) = import_labels(written(tmp_path, row)).tasks
    assert task.messages == (
        Message("user", "Hi\n\nyou"),
        Message("assistant", "Yes?"),
        Message("user", "One.\n\nTwo."),
    )
    assert task.candidates == ("Fine.\n\nThanks", "")


@pytest.mark.skipif(not HH.exists(), reason="the shared data is not here")
def test_hh_rlhf_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "hh.jsonl"
    path.write_bytes(gzip.decompress(HH.read_bytes()))
    found = import_labels(path)
    rows = read_rows(path)
    assert len(found.labels) + len(found.left_out) == len(rows) == 1156
    assert {v.answer for v in found.labels} <= {0, 1}  # 1 where the same pair stands there the other way round
    names = {"user": "Human", "assistant": "Assistant"}
    exact = 0
    for task, row in zip(found.tasks, rows, strict=False):
        turns = [*task.messages, Message("assistant", task.candidates[0])]
        text = "".join(f"\n\n{names[m.role]}: {m.content}" for m in turns)
        exact += text == row["chosen"].rstrip()
    assert exact > 1100


@pytest.mark.skipif(not TULU.exists(), reason="the shared data is not here")
def test_real_votes_of_several_people(tmp_path: Path) -> None:
    """Two models' replies to the Self-Instruct tasks, labelled by several people with ties."""
    side = {"a": "chosen", "b": "rejected", "t": "tie"}
    rows = [
        {"prompt": r["prompt"], "chosen": r["completion_a"], "rejected": r["completion_b"],
         "votes": [{"vote": side[r["preference"][0]], "annotator": r["evaluator"]}]}
        for r in map(json.loads, gzip.decompress(TULU.read_bytes()).decode().splitlines())
    ]  # fmt: skip
    found = import_labels(written(tmp_path, *rows))
    prior = fit_votes(found.tasks, found.labels)
    # A third of the votes are ties; as half votes in the fit they would push it to its upper end.
    assert prior.pairs > 50 and not prior.bound and 0.3 < prior.a < 1.5
    people = agreements(found.tasks, found.labels)["pair"]
    assert people.alpha is not None and 0.1 < people.alpha < 0.6
    assert people.same is not None and 0.4 < people.same < 0.8
    assert {v.value == 0.0 for v in verdicts(found.tasks, found.labels)} == {True, False}


# Out again

TASKS = (
    Task("q1-aaaaaaaaaaaa", "pair", (Message("user", "Q1"),), ("A", "B"), ("g1", "g2")),
    Task(
        "q2-aaaaaaaaaaaa", "best", (Message("system", "S"), Message("user", "Q2")), ("A", "B", "C"), ("h1", "h2", "h3")
    ),
    Task("q3-aaaaaaaaaaaa", "rating", (Message("user", "Q3"),), ("A",), ("k1",), 5),
)


def labels_of(task: Task, *answers: Any) -> list[Label]:
    order = tuple(range(len(task.candidates)))[::-1]
    people = ("ann", "bob", "cy", "di")
    return [
        Label(task.id, task.kind, who, a, order, 1.5, "2026-01-01T00:00:00+00:00", "ü")
        for who, a in zip(people, answers, strict=False)
    ]


def test_preferences_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    given = labels_of(TASKS[0], 1, 1, "tie", "skip") + labels_of(TASKS[1], 2, 2, 0) + labels_of(TASKS[2], 5)
    # B over A by 2.5 of 3; then A over B (1 : 0), C over A (2 : 1), C over B (2 : 0).
    assert export_labels(path, TASKS, given, form="preference") == 4
    rows = read_rows(path)
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in rows] == [
        *map(tuple, ("BA", "AB", "CA", "CB"))
    ]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Q1"}]
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "B"}]
    a = fit_votes(TASKS, given).a
    assert rows[0]["probability"] == pytest.approx((a + 2.5) / (2 * a + 3))
    assert [v["vote"] for v in rows[0]["votes"]] == ["chosen", "chosen", "tie"]
    # An even pair has no chosen one.
    assert export_labels(path, TASKS, labels_of(TASKS[0], 0, 1), form="preference") == 0
    assert read_rows(path) == []


def test_unpaired_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    told = {}
    for name, labels in {
        "winner": labels_of(TASKS[0], 0, "tie"),
        "bad": labels_of(TASKS[0], "both_bad"),
        "good": labels_of(TASKS[2], 4, 3),
        "middle": labels_of(TASKS[2], 4, 2),
        "best": labels_of(TASKS[1], 1),
    }.items():
        export_labels(path, TASKS, labels, form="unpaired")
        told[name] = [(r["completion"][0]["content"], r["label"]) for r in read_rows(path)]
    assert told == {
        "winner": [("A", True), ("B", False)],
        "bad": [("A", False), ("B", False)],
        "good": [("A", True)],
        "middle": [],
        "best": [("A", False), ("B", True), ("C", False)],
    }


texts = st.text(st.characters(codec="utf-8"), max_size=8)
pairs = st.lists(
    st.tuples(texts.filter(str.strip), texts, texts, st.lists(st.sampled_from([0, 1, "tie", "both_bad", "skip"]), min_size=1, max_size=4)),
    min_size=1, max_size=4, unique_by=lambda row: row[0],
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(pairs=pairs)
def test_what_was_exported_comes_back(tmp_path: Path, pairs: list[tuple[str, str, str, list[Any]]]) -> None:
    path = written(
        tmp_path, *({"prompt": q, "candidates": [a, b], "id": n, "votes": v} for n, (q, a, b, v) in enumerate(pairs))
    )
    once = import_labels(path)
    out = tmp_path / "out.jsonl"
    export_labels(out, once.tasks, once.labels, form="votes")
    again = import_labels(out)
    assert (again.tasks, again.labels) == (once.tasks, once.labels)
    # As preferences the pairs with a winner come back, perhaps turned round, with the same votes.
    count = export_labels(out, once.tasks, once.labels, form="preference")
    turned = import_labels(out)
    assert len(turned.tasks) == count
    means = {(t.messages, *sorted(t.candidates)): abs(s - 0.5) for t, s in counted(once)}
    for task, share in counted(turned):
        assert means[task.messages, *sorted(task.candidates)] == pytest.approx(abs(share - 0.5))


def counted(found: Imported) -> list[tuple[Task, float]]:
    """Share of the first in the votes of each pair."""
    worth = {0: 1.0, 1: 0.0, "tie": 0.5, "both_bad": 0.5}
    votes: dict[str, list[float]] = {}
    for label in found.labels:
        if label.answer != "skip":
            votes.setdefault(label.task, []).append(worth[label.answer])
    return [(t, sum(votes[t.id]) / len(votes[t.id])) for t in found.tasks if t.id in votes]


def test_lists_and_ratings_come_back(tmp_path: Path) -> None:
    rows = ({"id": "a", "prompt": "Q", "candidates": ["A", "B", "C"], "ids": ["x", "y", "z"], "votes": [2, "skip"]},
            {"prompt": [USER], "candidates": ["A"], "scale": 7, "votes": [7]})  # fmt: skip
    once = import_labels(written(tmp_path, *rows))
    export_labels(tmp_path / "out.jsonl", once.tasks, once.labels, form="votes")
    assert import_labels(tmp_path / "out.jsonl") == once
    assert read_tasks(tmp_path / "out.jsonl") == list(once.tasks)


def test_an_export_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        export_labels(tmp_path / "nowhere" / "out.jsonl", TASKS, labels_of(TASKS[0], 0), form="votes")


@needs_trl
@pytest.mark.filterwarnings("ignore")
def test_trl_reads_what_was_exported(tmp_path: Path) -> None:
    """TRL's own unpairing of our preferences gives our unpaired rows; its own reading of implicit prompts is ours."""
    from datasets import Dataset
    from trl import extract_prompt, unpair_preference_dataset
    from trl.data_utils import is_conversational

    given = labels_of(TASKS[0], 1, 1)
    export_labels(tmp_path / "p.jsonl", TASKS, given, form="preference")
    export_labels(tmp_path / "u.jsonl", TASKS, given, form="unpaired")
    rows = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in read_rows(tmp_path / "p.jsonl")]
    assert all(is_conversational(row) for row in rows)
    theirs = unpair_preference_dataset(Dataset.from_list(rows)).to_list()
    ours = read_rows(tmp_path / "u.jsonl")
    assert sorted(theirs, key=str) == sorted(ours, key=str)
    implicit = {"chosen": [USER, REPLY, USER, REPLY], "rejected": [USER, REPLY, USER, OTHER]}
    split = extract_prompt(implicit)
    (task,) = read_tasks(written(tmp_path, implicit))
    assert [{"role": m.role, "content": m.content} for m in task.messages] == split["prompt"]
    assert task.candidates == (split["chosen"][0]["content"], split["rejected"][0]["content"])
