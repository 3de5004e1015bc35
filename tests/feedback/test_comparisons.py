"""Files of compared replies: every form, every kind of vote, and the label that each becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tutelage.errors import InputError
from tutelage.feedback.comparisons import Compared, read_comparisons
from tutelage.feedback.votes import VotePrior
from tutelage.records import Message, Prompt

ASKED = {"prompt": "Why?", "chosen": "because", "rejected": "no"}


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_form_is_read(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Why?"}]
    found = read_comparisons(
        write(
            tmp_path,
            ASKED,
            {"prompt": turns, "chosen": [{"role": "assistant", "content": "a"}],
             "rejected": [{"role": "assistant", "content": " b\n"}], "votes": ["chosen", "tie", "rejected", "skip"]},
            {"chosen": "\n\nHuman: Hi\n\nAssistant: hello", "rejected": "\n\nHuman: Hi\n\nAssistant: go"},
            {**ASKED, "prompt": "Who?", "votes": [3, 1]},
            {**ASKED, "prompt": "When?", "probability": 0.8},
            {"prompt": "Where?", "candidates": ["x", "y"], "votes": [1, 1, 0]},
        )
    )  # fmt: skip
    told = {
        p.prompt.text: (p.first, p.second, p.votes, p.ties, p.stated) for p in found.pairs if p.prompt.text != "Why?"
    }
    assert told == {
        "Hi": ("hello", "go", (1.0, 0.0), 0.0, None),
        "Who?": ("because", "no", (3.0, 1.0), 0.0, None),
        "When?": ("because", "no", (0.0, 0.0), 0.0, 0.8),
        "Where?": ("x", "y", (1.0, 2.0), 0.0, None),
    }
    voted = next(p for p in found.pairs if p.first == "a")
    assert (voted.second, voted.votes, voted.ties) == ("b", (1.0, 1.0), 1.0)
    assert found.prior.pairs == 3  # with two votes or more besides ties


def test_the_same_pair_on_several_lines_is_one(tmp_path: Path) -> None:
    """Whoever wrote it the other way round voted for the other."""
    turned = {"prompt": "Why?", "chosen": "no", "rejected": "because"}
    found = read_comparisons(write(tmp_path, ASKED, ASKED, turned))
    assert [(p.first, p.votes) for p in found.pairs] == [("because", (2.0, 1.0))]
    assert len(read_comparisons(write(tmp_path, ASKED, ASKED, turned), limit=1).pairs) == 1


def test_labels_by_hand() -> None:
    def of(votes: tuple[float, float], how: Any = "votes", ties: float = 0.0, stated: float | None = None) -> float:
        asked = Prompt("p", (Message("user", "?"),))
        return Compared(asked, "a", "b", votes, ties, stated).label(VotePrior(0.5, 9), how)

    assert of((3, 1)) == pytest.approx(3.5 / 5)  # (k + a)/(n + 2a)
    assert of((1, 0)) == pytest.approx(1.5 / 2)
    assert of((2, 0), ties=1) == pytest.approx(3.0 / 4)  # a tie is half a vote for each
    assert of((1, 1)) == of((0, 0), ties=2) == 0.5
    assert [of(v, "hard") for v in ((3, 1), (1, 3), (1, 1))] == [1.0, 0.0, 0.5]
    assert of((0, 0), stated=0.8) == 0.8 and of((0, 0), "hard", stated=0.8) == 1.0
    assert of((0, 0), "hard", stated=0.5) == 0.5


def test_without_a_second_vote_labels_are_hard(tmp_path: Path) -> None:
    """One vote a pair says nothing of how people split."""
    rows = [{**ASKED, "prompt": str(n)} for n in range(4)]
    assert read_comparisons(write(tmp_path, *rows)).labels("votes") == [1.0] * 4
    split = [*rows, {**ASKED, "votes": ["chosen", "rejected", "chosen"]}]
    assert all(0.5 < p < 1.0 for p in read_comparisons(write(tmp_path, *split)).labels("votes"))


def test_what_says_nothing_is_left_out(tmp_path: Path) -> None:
    found = read_comparisons(
        write(tmp_path, ASKED, {**ASKED, "chosen": "no"}, {**ASKED, "prompt": "Who?", "votes": ["skip"]})
    )
    assert len(found.pairs) == 1 and len(found.left_out) == 2 and "abstained" in found.left_out[1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**ASKED, "votes": ["skip"]}, "no pair that says"),
        ({**ASKED, "votes": [0, 0]}, "votes is"),
        ({**ASKED, "votes": [-1, 2]}, "votes is"),
        ({**ASKED, "votes": ["maybe"]}, "maybe"),
        ({**ASKED, "probability": 1.5}, "probability is 1.5"),
        ({**ASKED, "probability": True}, "probability is True"),
        ({"prompt": "q", "response": "r", "rating": 3}, "candidates"),
        ({"prompt": "q", "candidates": ["a", "b", "c"], "votes": [0]}, "3 candidates"),
        ({"chosen": "a", "rejected": "b"}, "line 1"),
    ],
)
def test_what_is_no_pair_is_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=r"pair|vote|probability|candidates|line 1") as error:
        read_comparisons(write(tmp_path, row))
    assert said in str(error.value)


def test_what_a_command_wrote_can_be_read(tmp_path: Path) -> None:
    """`tutelage people export --form preference` states a probability beside the votes; the votes are taken."""
    row = {
        "prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}], "probability": 0.6,
        "votes": [{"annotator": "ada", "vote": "chosen"}, {"annotator": "bo", "vote": "rejected"}],
    }  # fmt: skip
    (pair,) = read_comparisons(write(tmp_path, row)).pairs
    assert (pair.votes, pair.stated) == ((1.0, 1.0), None)
