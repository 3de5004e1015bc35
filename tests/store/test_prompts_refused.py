"""Tests of what is refused in prompt files and suites: each complaint, its place and its cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tutelage.errors import InputError
from tutelage.records import Message, Prompt, SuiteItem
from tutelage.store.prompts import read_prompts, read_suite

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "ラーメンは好き?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Which one, then?"},
]


def lines(folder: Path, *values: Any, name: str = "prompts.jsonl") -> Path:
    """A JSONL file; a value that is bytes goes in as it is."""
    path = folder / name
    path.write_bytes(b"".join((v if isinstance(v, bytes) else json.dumps(v).encode()) + b"\n" for v in values))
    return path


def refused(path: Path, got: str, fix: str, *, whole: bool = True, reader: Any = read_prompts) -> InputError:
    """The error, whose `got` is the path followed by `got` (or starts so), and `fix` likewise."""
    with pytest.raises(InputError) as caught:
        reader(path)
    error = caught.value
    assert error.got == f"{path}{got}" if whole else error.got.startswith(f"{path}{got}")
    assert error.fix.startswith(fix)
    assert error.expected, "an error says what was expected"
    return error


# -- files that cannot be read ----------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "no.jsonl", " does not exist", "check the path")
    refused(lines(tmp_path, "one") / "no.jsonl", " does not exist", "check the path")
    refused(tmp_path / "nul\0.jsonl", " does not exist", "check the path")


@pytest.mark.parametrize("name", ["folder", "folder.jsonl", "folder.parquet"])
def test_directory(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    refused(tmp_path / name, " is a directory", "give the path of one file in it")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.txt", " ends in '.txt', which is not read here"),
        ("a.jsonl.gz", " ends in '.gz', which is not read here"),
        ("a", " has no ending"),
    ],
)
def test_unknown_format(name: str, said: str, tmp_path: Path) -> None:
    fix = "convert the file, or rename it if only its ending is wrong"
    error = refused(lines(tmp_path, "one", name=name), said, fix)
    assert error.expected == "a file that ends in .jsonl, .ndjson, .json, .csv, .parquet"


UNREADABLE = "check its permissions and those of its folders"


def test_a_name_that_the_file_system_refuses(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 5000 + ".jsonl"), " cannot be read: File name too long", UNREADABLE)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_file_that_fails_while_it_is_read(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"memory.{form}"
    path.symlink_to("/proc/self/mem")  # opens, but its first byte cannot be read
    if path.exists():
        refused(path, " cannot be read: Input/output error", UNREADABLE)
    else:  # a system without /proc
        refused(path, " does not exist", "check the path")


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_not_utf8(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"latin.{form}"
    before = b'"prompt"\n"\xc3\xa9"\n"caf'
    path.write_bytes(before + b'\xe9"\n')
    refused(path, f", line 3: not UTF-8 (byte {len(before)} of the file)", "save the file as UTF-8")
    path.write_bytes('"prompt"\n"one"\n'.encode("utf-16"))
    refused(path, ", line 1: not UTF-8 (byte 0 of the file)", "save the file as UTF-8")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \n"),
        ("a.jsonl", b"\xef\xbb\xbf"),
        ("a.csv", b""),
        ("a.csv", b"\nid,prompt\n\n"),
    ],
)
def test_empty(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, " holds no prompts", "add prompts to the file")


# -- rows that are no prompts -----------------------------------------------------------------------

A_LINE = "write one whole JSON value a line; `jq -c '.[]' FILE` makes such lines from a JSON array"
WRITE = "write text there, or remove it"
A_LIST = 'write a question as text under `prompt`, or as [{"role": "user", "content": "..."}]'
ROLE = "write one of these as its role"
HALF = "(a \\ud... escape without its other half)"
DEEP, LONG = b"[" * 100_000, b"1" * 5000


@pytest.mark.parametrize(
    "line", [b'{"prompt": "a"', b"a", b'{"prompt": "a"}{"prompt": "b"}', DEEP, LONG, b"{'a': 'b'}"]
)
def test_broken_json(line: bytes, tmp_path: Path) -> None:
    error = refused(lines(tmp_path, "one", b"", line), ", line 3: broken JSON: ", A_LINE, whole=False)
    assert len(str(error)) < 1000


@pytest.mark.parametrize(
    ("value", "said", "fix"),
    [
        ([{"prompt": "a"}], " is a list", A_LINE),
        (5, " is 5", A_LINE),
        (None, " is nothing (null)", A_LINE),
        ({}, " has no prompt, only: nothing", "add a `prompt`"),
        ({"query": "a", "kind": "x"}, " has no prompt, only: 'query', 'kind'", "add a `prompt`"),
        ({"prompt": None}, " has no prompt, only: 'prompt'", "add a `prompt`"),
        ({"prompt": 5}, ", `prompt` is 5", A_LIST),
        ({"prompt": True}, ", `prompt` is True", A_LIST),
        ({"prompt": {"text": "a"}}, ", `prompt` is an object", A_LIST),
        ({"prompt": []}, ", `prompt` is an empty list", A_LIST),
        ({"messages": '"Why?"'}, ", `messages` is text", A_LIST),
        ({"messages": "{}"}, ", `messages` is an object", A_LIST),
        ({"prompt": ["Why?"]}, ", `prompt`, message 1 is text", "give both"),
        ({"messages": [{"content": "a"}]}, ", `messages`, message 1 has no `role`", ROLE),
        ({"messages": [{"role": ["user"], "content": "a"}]}, ", `messages`, message 1 has the role ['user']",
         "did you mean 'user'?"),
        ({"messages": [{"role": "User", "content": "a"}]}, ", `messages`, message 1 has the role 'User'",
         "did you mean 'user'?"),
        ({"text": [{"role": "tool", "content": "a"}]}, ", `text`, message 1 has the role 'tool'", ROLE),
        ({"prompt": [{"role": "user"}]}, ", `prompt`, message 1 (its content) is nothing (null)", WRITE),
        ({"text": [{"role": "user", "content": []}]}, ", `text`, message 1 (its content) is a list", WRITE),
        ({"text": [{"role": "user", "content": " "}]}, ", `text`, message 1 (its content) is empty", WRITE),
        ({"prompt": "a", "id": 1.5}, ", `id` is 1.5", WRITE),
        ({"prompt": "a", "id": True}, ", `id` is True", WRITE),
        ({"prompt": "a", "id": " "}, ", `id` is empty", WRITE),
        ({"prompt": "a", "episode": ["x"]}, ", `episode` is a list", WRITE),
        (b'"a \\ud83d b"', f", `prompt` is not writable as UTF-8 {HALF}", WRITE),
    ],
)  # fmt: skip
def test_rows_that_are_no_prompts(value: Any, said: str, fix: str, tmp_path: Path) -> None:
    refused(lines(tmp_path, "one", value), f", line 2{said}", fix)


def test_a_huge_value_is_not_printed_whole(tmp_path: Path) -> None:
    error = refused(lines(tmp_path, {"prompt": 10**4000}), ", line 1, `prompt` is 1000", A_LIST, whole=False)
    assert len(str(error)) < 1000


def test_text_where_messages_belong(tmp_path: Path) -> None:
    path = lines(tmp_path, "one", {"messages": "Why?"})
    refused(path, ", line 2, `messages`: broken JSON: ", A_LINE, whole=False)
    path = tmp_path / "a.csv"
    path.write_text("messages\n\"[{'role': 'user'}]\"\n", encoding="utf-8")
    refused(path, ", line 2, `messages`: broken JSON: ", A_LINE, whole=False)


def test_what_is_a_double_and_what_is_not(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        {"messages": TALK},
        {"messages": TALK[1:]},
        TALK[-1]["content"],
        "which one, then?",
    )
    assert len(read_prompts(path)) == 4, "the same question after another talk, or in other letters, is another prompt"
    path = lines(tmp_path, {"id": 1, "prompt": "Why?"}, {"id": "1", "prompt": "How?"})
    refused(path, ", line 2: the same id '1' as line 1", "remove one", whole=False)


# -- tables -----------------------------------------------------------------------------------------

COLUMN = "call the column that holds the prompts `prompt`, and part columns with commas"


@pytest.mark.parametrize(("header", "shown"), [("id;prompt", "'id;prompt'"), ("prompt,prompt", "'prompt', 'prompt'")])
def test_odd_headers(header: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\na,b\n", encoding="utf-8")
    refused(tmp_path / "a.csv", f" has the columns {shown}", COLUMN)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('a,"two\nlines"\nb,Why, oh why?\n', ", line 4: broken CSV: 3 cells under 2 column names"),
        ("a,Why?\nb\n", ", line 3: broken CSV: 1 cells under 2 column names"),
        ('a,"two\nlines"\nb,"never closed\nc,d\n', ", line 4: broken CSV: unexpected end of data"),
        ('a,"quoted" and not\n', ", line 2: broken CSV: ',' expected after '\"'"),
    ],
)
def test_broken_csv(rows: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,prompt\n" + rows, encoding="utf-8")
    fix = 'put text with commas, quotes or line breaks in double quotes, with " written twice inside'
    refused(tmp_path / "a.csv", said, fix)


# -- suites -----------------------------------------------------------------------------------------

CAIRO = "Which river runs through Cairo?"
ITEM = {"prompt": CAIRO, "kind": "answerable", "references": ["Nile", "the Nile"]}


def test_a_suite(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        {**ITEM, "id": "a", "form": "malformed", "group": "rivers", "difficulty": 3},
        {"prompt": TALK, "kind": "ambiguous", "id": "b"},
        {"prompt": "Who rules Vellatoria?", "kind": "unanswerable", "references": None, "id": "c"},
    )
    items = read_suite(path)
    assert items == [
        SuiteItem(Prompt("a", (Message("user", CAIRO),)), "answerable", ("Nile", "the Nile"), "malformed", "rivers"),
        SuiteItem(Prompt("b", tuple(Message(**turn) for turn in TALK)), "ambiguous", (), "plain", ""),
        SuiteItem(Prompt("c", (Message("user", "Who rules Vellatoria?"),)), "unanswerable", (), "plain", ""),
    ]
    assert [i.prompt for i in items] == read_prompts(path), "both readers see the same prompts"
    assert read_suite(path, limit=1) == items[:1]


LACKS = "add `references`, or change the kind"
SINGLE = 'write a single one as ["Paris"]'


@pytest.mark.parametrize(
    ("change", "said", "fix"),
    [
        ({"kind": None}, " has no `kind`", "write one of these as its kind"),
        ({"kind": "answerabel"}, " has the kind 'answerabel'", "did you mean 'answerable'?"),
        ({"kind": "AMBIGUOUS"}, " has the kind 'AMBIGUOUS'", "did you mean 'ambiguous'?"),
        ({"kind": "xyz"}, " has the kind 'xyz'", "write one of these as its kind"),
        ({"kind": 5}, " has the kind 5", "write one of these as its kind"),
        ({"references": []}, " is answerable, but has no references", LACKS),
        ({"references": None}, " is answerable, but has no references", LACKS),
        ({"references": "Nile"}, ", `references` is text", SINGLE),
        ({"references": {"a": 1}}, ", `references` is an object", SINGLE),
        ({"references": ["Nile", 5]}, ", reference 2 is 5", WRITE),
        ({"references": [" "]}, ", reference 1 is empty", WRITE),
        ({"form": 5.5}, ", `form` is 5.5", WRITE),
        ({"group": []}, ", `group` is a list", WRITE),
        ({"prompt": ""}, ", `prompt` is empty", WRITE),
        ({"prompt": "one"}, ": the same prompt as line 1", "remove one of the two lines or change it"),
        ({"id": "a"}, ": the same id 'a' as line 1", "remove one of the two lines or change it"),
    ],
)
def test_lines_that_are_no_suite_items(change: dict[str, Any], said: str, fix: str, tmp_path: Path) -> None:
    path = lines(tmp_path, {**ITEM, "prompt": "one", "id": "a"}, {**ITEM, **change})
    error = refused(path, f", line 2{said}", fix, reader=read_suite)
    if "kind" in change:
        assert error.expected == "answerable, unanswerable, ambiguous"


def test_a_bare_string_is_no_suite_item(tmp_path: Path) -> None:
    refused(lines(tmp_path, "Why?"), ", line 1 has no `kind`", "write one of these as its kind", reader=read_suite)


@pytest.mark.parametrize("name", ["suite.csv", "suite.parquet"])
def test_a_suite_is_jsonl(name: str, tmp_path: Path) -> None:
    said = f" ends in '{name[5:]}', which is not read here"
    error = refused(lines(tmp_path, ITEM, name=name), said, "convert the file", reader=read_suite)
    assert error.expected == "a file that ends in .jsonl, .ndjson, .json"
