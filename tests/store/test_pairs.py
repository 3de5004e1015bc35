"""Pairs of replies from files, and what is refused."""

from __future__ import annotations

import json

import pytest

from tutelage.errors import InputError
from tutelage.store.pairs import read_pairs

GOOD = {"prompt": "Why?", "chosen": "because", "rejected": "no"}


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def test_pairs_are_read_with_all_that_they_may_hold(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path = write(
        tmp_path / "p.jsonl",
        GOOD,
        {"prompt": turns, "chosen": "x", "rejected": "y", "votes": [3, 1], "category": "fact", "authors": ["m", ""]},
    )
    one, two = read_pairs(path)
    assert (one.prompt.text, one.chosen, one.rejected, one.votes) == ("Why?", "because", "no", (1.0, 0.0))
    assert len(two.prompt.messages) == 3
    assert (two.votes, two.category, two.authors) == ((3.0, 1.0), "fact", ("m", ""))
    assert len(read_pairs(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "chosen": "a"}, "rejected"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "chosen"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "chosen"),
        ({"chosen": "a", "rejected": "b"}, "prompt"),
        (GOOD | {"votes": [0, 0]}, "votes"),
        (GOOD | {"votes": [1]}, "votes"),
        (GOOD | {"votes": [True, False]}, "votes"),
        (GOOD | {"votes": [-1, 2]}, "votes"),
        (GOOD | {"votes": "3:1"}, "votes"),
        (GOOD | {"authors": ["m"]}, "authors"),
        ('{"prompt": ', "broken JSON"),
        ("[1, 2]", "line 2"),
    ],
)
def test_a_broken_line_is_named(row, said, tmp_path):
    with pytest.raises(InputError) as error:
        read_pairs(write(tmp_path / "p.jsonl", GOOD, row))
    assert "line 2" in str(error.value) and said in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path, write(tmp_path / "p.txt", GOOD), write(tmp_path / "e.jsonl")):
        with pytest.raises(InputError):
            read_pairs(path)
    with pytest.raises(InputError, match="limit is 0"):
        read_pairs(write(tmp_path / "p.jsonl", GOOD), limit=0)
