"""Demonstrations from files: every form, and every complaint at its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tutelage.errors import InputError
from tutelage.store.demonstrations import read_demonstrations

SAID = {"role": "assistant", "content": "Because."}


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "shown.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "response": "Because."},
        {"prompt": "Why?", "completion": "Because."},
        {"prompt": [{"role": "user", "content": "Why?"}], "completion": [SAID]},
        {"messages": [{"role": "user", "content": "Why?"}, SAID]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
    ],
)
def test_every_form_says_the_same(row: dict[str, Any], tmp_path: Path) -> None:
    (one,) = read_demonstrations(written(tmp_path, row))
    assert ([(m.role, m.content) for m in one.prompt.messages], one.reply) == ([("user", "Why?")], "Because.")
    assert one.prompt.id == "demo-1"


def test_a_prompt_may_have_several_replies_and_turns(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A?"}, SAID,
             {"role": "user", "content": "B?"}]  # fmt: skip
    rows = [{"prompt": "Why?", "response": text} for text in ("Because.", "だから。")]
    found = read_demonstrations(written(tmp_path, *rows, {"messages": [*turns, SAID]}))
    assert [one.reply for one in found] == ["Because.", "だから。", "Because."]
    assert [m.role for m in found[2].prompt.messages] == ["system", "user", "assistant", "user"]
    assert len({one.prompt.id for one in found}) == 3


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Why?"}, "shows no reply"),
        ({"prompt": "Why?", "response": "  "}, "the reply is"),
        ({"prompt": "Why?", "response": 3}, "the reply is 3"),
        ({"prompt": "Why?", "completion": [SAID, SAID]}, "the reply is"),
        ({"response": "Because."}, "no prompt"),
        ({"messages": [{"role": "user", "content": "Why?"}]}, "shows no reply"),
        ({"messages": [SAID]}, "empty list"),
    ],
)
def test_what_is_no_demonstration_is_named_by_its_line(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    good = {"prompt": "What?", "response": "That."}
    with pytest.raises(InputError, match=said) as told:
        read_demonstrations(written(tmp_path, good, row))
    assert "line 2" in str(told.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "gone.jsonl", "does not exist"), (written(tmp_path), "holds no demonstrations")):
        with pytest.raises(InputError, match=said):
            read_demonstrations(path)
