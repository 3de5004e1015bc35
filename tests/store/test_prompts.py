"""Tests of reading prompts: three formats, ids and limits, and that reference answers are never read."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.errors import InputError
from tutelage.records import Message, Prompt
from tutelage.store.prompts import read_prompts

FORMATS = ("jsonl", "csv", "parquet")
PLACES = {  # of the first three rows
    "jsonl": ("line 1", "line 2", "line 3"),
    "csv": ("line 2", "line 3", "line 4"),
    "parquet": ("row 1", "row 2", "row 3"),
}

TEXTS = (
    "Why is the sky blue?",
    "पृथ्वी का सबसे ऊँचा पर्वत कौन सा है?",
    "世界で一番高い山は何ですか",
    "ما هي عاصمة مصر؟",
    "Wie heißt der höchste Berg Österreichs? 🏔️👩‍👩‍👧",
    'First line\nsecond line\r\n\tthird, "quoted" and; parted\n',
    "a line separator \u2028 and a paragraph separator \u2029 are no line breaks",
    '["looks", "like", "JSON"]',
    "  spaces around it stay  ",
    "x" * 200_000,  # longer than the 131,072 characters that the csv module takes by default
)
TALK = (
    Message("system", "Be brief.\nBe kind. 🙂"),
    Message("user", "ラーメンは好き?"),
    Message("assistant", 'I do, "yes".'),
    Message("user", "Which one, then?"),
)


def turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def write(folder: Path, form: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows in one format; lists become JSON text in CSV, as a spreadsheet would hold them."""
    path = folder / f"prompts.{form}"
    if form == "jsonl":
        path.write_bytes(b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in rows))
    elif form == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(
                {k: json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for k, v in row.items()}
                for row in rows
            )
    else:
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def lines(folder: Path, *values: Any, name: str = "prompts.jsonl") -> Path:
    """A JSONL file; a value that is bytes goes in as it is."""
    path = folder / name
    path.write_bytes(b"".join((v if isinstance(v, bytes) else json.dumps(v).encode()) + b"\n" for v in values))
    return path


def refused(path: Path, got: str, fix: str, *, whole: bool = True, limit: int | None = None) -> InputError:
    """The error, whose `got` is the path followed by `got` (or starts so), and `fix` likewise."""
    with pytest.raises(InputError) as caught:
        read_prompts(path, limit=limit)
    error = caught.value
    assert error.got == f"{path}{got}" if whole else error.got.startswith(f"{path}{got}")
    assert error.fix.startswith(fix)
    assert error.expected, "an error says what was expected"
    return error


# -- what goes in comes out -------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_texts_come_back_unchanged(form: str, tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path, form, [{"prompt": t} for t in TEXTS]))
    assert [p.messages for p in prompts] == [(Message("user", t),) for t in TEXTS]
    assert [p.text for p in prompts] == list(TEXTS)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_conversations_come_back_unchanged(form: str, key: str, tmp_path: Path) -> None:
    rows = [{key: turns(TALK), "id": "a"}, {key: turns(TALK[1:2]), "id": "b"}]
    prompts = read_prompts(write(tmp_path, form, rows))
    assert prompts == [Prompt("a", TALK), Prompt("b", TALK[1:2])]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_the_prompt_itself_may_be_a_list_of_messages(form: str, tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, form, [{"prompt": turns(TALK)}]))[0].messages == TALK


@pytest.mark.parametrize("form", FORMATS)
def test_sharegpt_words_are_understood(form: str, tmp_path: Path) -> None:
    theirs = {"system": "system", "user": "human", "assistant": "gpt"}
    row = {"conversations": [{"from": theirs[m.role], "value": m.content} for m in TALK]}
    assert read_prompts(write(tmp_path, form, [row]))[0].messages == TALK


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("key", ["prompt", "question", "instruction", "text"])
def test_other_names_of_the_prompt(form: str, key: str, tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, form, [{"other": "no", key: "Why?"}]))[0].text == "Why?"


@pytest.mark.parametrize("form", FORMATS)
def test_the_first_known_name_wins(form: str, tmp_path: Path) -> None:
    order = ("prompt", "messages", "question", "instruction", "text", "conversations")
    values = {key: [{"role": "user", "content": key}] if key[0] in "mc" else key for key in order}
    for first in range(len(order)):
        rest = {key: values[key] for key in reversed(order[first:])}
        assert read_prompts(write(tmp_path, form, [rest]))[0].text == order[first]


def test_null_counts_as_absent(tmp_path: Path) -> None:
    rows = [{"prompt": None, "question": "one?", "id": None}, {"prompt": "two?", "question": None, "id": ""}]
    for form in ("jsonl", "parquet"):
        prompts = read_prompts(write(tmp_path, form, rows))
        assert [p.text for p in prompts] == ["one?", "two?"]
        assert all(p.id.startswith("p-") for p in prompts)


def test_a_line_may_be_a_bare_string_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = lines(tmp_path, "Why?", b"", b"  \r", {"prompt": "How?"}, name="prompts.ndjson")
    assert [p.text for p in read_prompts(path)] == ["Why?", "How?"]
    path.rename(tmp_path / "PROMPTS.JSON")
    assert len(read_prompts(tmp_path / "PROMPTS.JSON")) == 2


def test_escaped_halves_make_a_whole_character(tmp_path: Path) -> None:
    assert read_prompts(lines(tmp_path, b'"\\ud83d\\ude42"'))[0].text == "🙂"


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_byte_order_mark_and_windows_line_ends_are_accepted(form: str, tmp_path: Path) -> None:
    path = write(tmp_path, form, [{"prompt": "Why?"}, {"prompt": "\ufeffHow?"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert [p.text for p in read_prompts(path)] == ["Why?", "\ufeffHow?"], "only the mark of the file is dropped"


def test_spaces_after_the_commas_of_a_csv_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id, prompt\n7,Why?\n\n8,How?\n", encoding="utf-8")
    assert read_prompts(path) == [
        Prompt("7", (Message("user", "Why?"),)),
        Prompt("8", (Message("user", "How?"),)),
    ]


def test_parquet_in_many_row_groups_and_encodings(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"number {i}" for i in range(3000)]
    column = pa.array(texts, pa.large_string()).dictionary_encode()
    pq.write_table(pa.table({"x": list(range(3000)), "text": column}), path, row_group_size=700)
    assert [p.text for p in read_prompts(path)] == texts
    assert [p.text for p in read_prompts(path, limit=1500)] == texts[:1500]


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(text, min_size=1, max_size=8, unique_by=str.strip))
def test_any_texts_survive_any_format(texts: list[str]) -> None:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMATS:
            found.append(read_prompts(write(Path(folder), form, [{"prompt": t} for t in texts])))
    assert [p.text for p in found[0]] == texts
    assert found[0] == found[1] == found[2], "the ids too: they come from the content, not from the file"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), text), max_size=4), text)
def test_any_conversation_survives_any_format(before: list[tuple[str, str]], last: str) -> None:
    messages = (*(Message(role, content) for role, content in before), Message("user", last))
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMATS:
            path = write(Path(folder), form, [{"messages": turns(messages), "id": "x"}])
            assert read_prompts(path) == [Prompt("x", messages)]


# -- ids, episodes, limits --------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_ids_and_episodes(form: str, tmp_path: Path) -> None:
    rows = [
        {"id": 12, "prompt": "Why?", "episode": "talk-1"},
        {"id": 13, "prompt": "How?", "episode": "talk-1"},
    ]
    assert [(p.id, p.episode) for p in read_prompts(write(tmp_path, form, rows))] == [
        ("12", "talk-1"),
        ("13", "talk-1"),
    ]


def test_a_missing_id_is_made_from_the_content(tmp_path: Path) -> None:
    (prompt,) = read_prompts(lines(tmp_path, "Why?"))
    assert prompt.id == f"p-{prompt.hash[:10]}" and prompt.episode == ""
    assert read_prompts(lines(tmp_path, "How?", "Why?"))[1].id == prompt.id, "wherever it stands in the file"


def test_ids_made_from_the_content_never_collide(tmp_path: Path) -> None:
    # Found by search: the first ten digits of these two hashes are the same (1a621f0697).
    pair = read_prompts(lines(tmp_path, "question 51622", "question 77658"))
    assert pair[0].hash[:10] == pair[1].hash[:10]
    assert [p.id for p in pair] == [f"p-{pair[0].hash[:10]}", f"p-{pair[1].hash}"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("limit", "count"), [(1, 1), (3, 3), (9, 5), (None, 5)])
def test_limit_takes_the_first(form: str, limit: int | None, count: int, tmp_path: Path) -> None:
    path = write(tmp_path, form, [{"prompt": f"number {i}"} for i in range(5)])
    assert [p.text for p in read_prompts(path, limit=limit)] == [f"number {i}" for i in range(count)]


def test_limit_stops_before_what_follows(tmp_path: Path) -> None:
    path = lines(tmp_path, "one", "two", b"{broken", b"\xff")
    assert len(read_prompts(path, limit=2)) == 2
    refused(path, ", line 3: broken JSON: ", "write one whole JSON value a line", whole=False, limit=3)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_takes_nothing_is_refused(limit: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"limit is {limit}") as caught:
        read_prompts(lines(tmp_path, "one"), limit=limit)
    assert caught.value.fix == "leave the limit out to read all"


# -- what the reward must not see -------------------------------------------------------------------


SECRETS = {
    "references": ["Nile"], "kind": "answerable", "answer": "Nile", "answers": ["Nile"],
    "form": "plain", "group": "rivers", "chosen": "Nile",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_references_and_kinds_change_nothing(form: str, tmp_path: Path) -> None:
    texts = [f"question {i}" for i in range(20)]
    rows = [{"prompt": t, **SECRETS, "references": [f"answer {i}"]} for i, t in enumerate(texts)]
    scrambled = [dict(row) for row in rows]
    mixed = random.Random(0)
    for key in SECRETS:
        values = [f"{key} {mixed.random()}" if isinstance(r[key], str) else [str(mixed.random())] for r in rows]
        for row, value in zip(scrambled, values, strict=True):
            row[key] = value
    bare = [{"prompt": t} for t in texts]
    one, other, none = (read_prompts(write(tmp_path, form, r)) for r in (rows, scrambled, bare))
    assert one == other == none
    assert "answer" not in repr(one) and "Nile" not in repr(one)


def test_a_prompt_has_no_field_for_an_answer() -> None:
    assert {f.name for f in dataclasses.fields(Prompt)} == {"id", "messages", "episode"}


def test_references_of_the_wrong_type_do_not_disturb_reading_prompts(tmp_path: Path) -> None:
    path = lines(tmp_path, {"prompt": "Why?", "references": 5, "kind": {"no": "such"}})
    assert len(read_prompts(path)) == 1


def test_a_damaged_column_of_references_is_not_even_opened(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", [{"prompt": f"number {i}", "references": f"answer {i}"} for i in range(99)])
    column = pq.read_metadata(path).row_group(0).column(1)
    assert column.path_in_schema == "references"
    raw = bytearray(path.read_bytes())
    start = column.dictionary_page_offset
    raw[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(raw)
    with pytest.raises(OSError, match=r"deserialize|thrift|page"):
        pq.read_table(path, columns=["references"])
    assert len(read_prompts(path)) == 99


def test_neither_torch_nor_pyarrow_is_imported(child_env: dict[str, str]) -> None:
    code = "import sys, tutelage.store.prompts; sys.exit(bool({'torch', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=child_env, check=False).returncode == 0


# -- what is refused in every format; test_prompts_refused.py has the rest --------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_no_permission(form: str) -> None:
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, into which only its owner can look
        Path(folder).chmod(0o755)
        path = write(Path(folder), form, [{"prompt": "one"}])
        path.chmod(0)
        try:
            if root:  # root may read everything: look as somebody else
                os.seteuid(65534)
            refused(path, " cannot be read: Permission denied", "check its permissions and those of its folders")
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("empty", ["", " \t\n ", "\u3000"])
def test_empty_text(form: str, empty: str, tmp_path: Path) -> None:
    path = write(tmp_path, form, [{"prompt": "one"}, {"prompt": empty}])
    refused(path, f", {PLACES[form][1]}, `prompt` is empty", "write text there, or remove it")


@pytest.mark.parametrize("form", FORMATS)
def test_a_conversation_must_end_with_the_user(form: str, tmp_path: Path) -> None:
    path = write(tmp_path, form, [{"messages": turns(TALK)}, {"messages": turns(TALK[:3])}])
    said = f", {PLACES[form][1]}, `messages` ends with a message of the assistant"
    refused(path, said, "remove what follows the user's last message")


@pytest.mark.parametrize("form", FORMATS)
def test_doubles(form: str, tmp_path: Path) -> None:
    first, second, third = PLACES[form]
    fix = f"remove one of the two {first[:-2]}s or change it; an `id` may be left out"
    path = write(tmp_path, form, [{"prompt": t} for t in ("Why?", "How?", " Why?\n")])
    refused(path, f", {third}: the same prompt as {first}", fix)
    path = write(tmp_path, form, [{"id": "a", "prompt": "Why?"}, {"id": "a", "prompt": "How?"}])
    refused(path, f", {second}: the same id 'a' as {first}", fix)


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_no_usable_column(form: str, tmp_path: Path) -> None:
    error = refused(
        write(tmp_path, form, [{"id": "a", "Frage": "Warum?"}]),
        " has the columns 'id', 'Frage'",
        "call the column that holds the prompts `prompt`",
    )
    assert error.expected.startswith("each name once, one of them prompt, messages, question")


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "scrambled", "not UTF-8"])
def test_corrupt_parquet(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", [{"prompt": f"number {i}"} for i in range(2000)])
    whole = path.read_bytes()
    scrambled = whole[:4] + bytes(b ^ 0x55 for b in whole[4:1000]) + whole[1000:]
    if damage == "not UTF-8":
        bad = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
        pq.write_table(pa.table({"prompt": bad}), path)
    else:
        path.write_bytes({"text": b"no", "cut": whole[:999], "empty": b"", "scrambled": scrambled}[damage])
    refused(path, " is not a whole Parquet file: ", "write or download the file again", whole=False)


def test_parquet_column_of_bytes(tmp_path: Path) -> None:
    refused(
        write(tmp_path, "parquet", [{"prompt": b"Why?"}]),
        ", row 1, `prompt` is b'Why?'",
        "write a question as text under `prompt`",
    )


def test_parquet_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    refused(path, " holds no prompts", "add prompts to the file")
