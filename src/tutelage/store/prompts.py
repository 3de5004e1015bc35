"""Prompts and suites from JSONL, CSV and Parquet files, with every complaint at its line.

    JSONL          one value a line: "Why?", {"prompt": "Why?"}, {"messages": [{"role": "user", ...}]}
    CSV, Parquet   a column of one of the same names; in CSV, messages are JSON text

Reference answers and kinds in a file are for `read_suite` alone: `read_prompts` does not look at them,
and a `Prompt` has no field for them. Rows are streamed. Imports no torch; pyarrow only for Parquet.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from tutelage.errors import InputError
from tutelage.records import Kind, Message, Prompt, SuiteItem, content_hash

__all__ = ["check_path", "conversation_of", "json_rows", "read_prompts", "read_suite"]

_T = TypeVar("_T")
_Rows = Iterator[tuple[int, Mapping[str, Any]]]
_Reader = Callable[[Path], _Rows]
_TURN_KEYS = ("prompt", "messages", "question", "instruction", "text", "conversations")
_LIST_KEYS = ("messages", "conversations")
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_KINDS: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
_WORDS = {dict: "an object", list: "a list", str: "text", type(None): "nothing (null)"}
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_ONE_A_LINE = "write one whole JSON value a line; `jq -c '.[]' FILE` makes such lines from a JSON array"


def read_prompts(path: Path, *, limit: int | None = None) -> list[Prompt]:
    """Read prompts to learn from; reference answers and kinds in the file stay unread.

    Args:
        path: A .jsonl, .ndjson or .json file (one value a line), .csv or .parquet.
        limit: Only the first N prompts; what follows them is neither read nor checked.

    Returns:
        One or more, in file order. A row without an `id` gets `p-` and the hash of its conversation.

    Raises:
        InputError: The file cannot be read, or a row is no prompt; the message names the row.
    """
    return [prompt for _, _, prompt in _read(path, limit, _READERS)]


def read_suite(path: Path, *, limit: int | None = None) -> list[SuiteItem]:
    """Read an evaluation suite: prompts with their kinds and reference answers.

    Args:
        path: A .jsonl, .ndjson or .json file of one object a line: a prompt as in `read_prompts`,
            `kind` (answerable, unanswerable, ambiguous), `references` (list of strings, needed when
            answerable), optional `id`, `form` and `group`. Other keys are ignored.
        limit: Only the first N items; what follows them is neither read nor checked.

    Raises:
        InputError: The file cannot be read, or a line is no suite item; the message names the line.
    """
    return [_suite_item(place, fields, prompt) for place, fields, prompt in _read(path, limit, _LINES)]


def _read(
    path: Path, limit: int | None, readers: Mapping[str, _Reader]
) -> Iterator[tuple[str, Mapping[str, Any], Prompt]]:
    """Place, fields and prompt of each row; refuses doubles and a file without any prompt."""
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}", expected="1 or more", fix="leave the limit out to read all")
    check_path(path, readers)
    unit = "row" if path.suffix.lower() == ".parquet" else "line"
    seen: dict[tuple[tuple[str, str], ...], int] = {}
    ids: dict[str, int] = {}
    for number, fields in itertools.islice(readers[path.suffix.lower()](path), limit):
        place = f"{path}, {unit} {number}"
        messages = conversation_of(place, fields)
        first = seen.setdefault(tuple((m.role, m.content.strip()) for m in messages), number)
        name = _name(place, fields, "id") or _fresh_id(messages, ids)
        holder = ids.setdefault(name, number)
        if first != number or holder != number:
            same = f"prompt as {unit} {first}" if first != number else f"id '{name}' as {unit} {holder}"
            expected = "each prompt and each id once (spaces around a prompt do not count)"
            fix = f"remove one of the two {unit}s or change it; an `id` may be left out"
            raise InputError(f"{place}: the same {same}", expected=expected, fix=fix)
        yield place, fields, Prompt(name, messages, _name(place, fields, "episode"))
    if not seen:
        raise InputError(f"{path} holds no prompts", expected="at least one", fix="add prompts to the file")


def check_path(path: Path, accepted: Iterable[str]) -> None:
    """Refuse a path that is no readable file with one of these endings."""
    try:
        if path.is_dir():
            problem, fix = "is a directory", "give the path of one file in it"
        elif not path.exists():
            problem, fix = "does not exist", "check the path"
        elif path.suffix.lower() not in accepted:
            problem = f"ends in '{path.suffix}', which is not read here" if path.suffix else "has no ending"
            fix = "convert the file, or rename it if only its ending is wrong"
        else:
            return
    except OSError as error:
        raise _unreadable(path, error) from error
    raise InputError(f"{path} {problem}", expected="a file that ends in " + ", ".join(accepted), fix=fix)


def _unreadable(path: Path, error: OSError) -> InputError:
    why = f"{path} cannot be read: {os.strerror(error.errno) if error.errno else error}"
    return InputError(why, expected="a readable file", fix="check its permissions and those of its folders")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends, cut at line feeds only; a byte order mark is dropped."""
    number = offset = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                yield number, raw.decode("utf-8").removeprefix("\ufeff" if number == 1 else "")
                offset += len(raw)
    except UnicodeDecodeError as error:
        where = f"{path}, line {number}: not UTF-8 (byte {offset + error.start} of the file)"
        raise InputError(where, expected="UTF-8 text", fix="save the file as UTF-8") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def json_rows(path: Path) -> _Rows:
    """Numbered objects of a JSONL file; a bare string is a prompt."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        value = _parse(place, line)
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, dict):
            problem = f"{place} is {_words(value)}"
            raise InputError(problem, expected="text, or an object with a `prompt`", fix=_ONE_A_LINE)
        yield number, value


def _parse(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # syntax, a number of 5000 digits, or 1000 brackets deep
        raise InputError(f"{place}: broken JSON: {error}", expected="JSON", fix=_ONE_A_LINE) from error


def _csv_rows(path: Path) -> _Rows:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    csv.field_size_limit(sys.maxsize)  # a setting of the whole process; without it, 131,072 characters a cell
    header: list[str] = []
    used: list[str] = []
    start = 1
    try:
        for cells in reader:
            if cells and not header:
                header = [name.strip() for name in cells]
                used = _columns(path, header)
            elif cells and len(cells) != len(header):
                raise csv.Error(f"{len(cells)} cells under {len(header)} column names")
            elif cells:
                row = dict(zip(header, cells, strict=True))
                yield start, {name: row[name] for name in used}
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}, line {start}: broken CSV: {error}",
            expected="as many cells as columns, parted by commas",
            fix='put text with commas, quotes or line breaks in double quotes, with " written twice inside',
        ) from error


def _parquet_rows(path: Path) -> _Rows:
    import pyarrow as pa  # here, because it takes longer to import than everything else in this room
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            used = _columns(path, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=1024, columns=used)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise _unreadable(path, error) from error
        problem = f"{path} is not a whole Parquet file: {error}"
        raise InputError(problem, expected="Parquet", fix="write or download the file again") from error


_LINES: dict[str, _Reader] = dict.fromkeys((".jsonl", ".ndjson", ".json"), json_rows)
_READERS: dict[str, _Reader] = {**_LINES, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _columns(path: Path, names: Sequence[str]) -> list[str]:
    """The columns to read: those of prompts, `id` and `episode`. No other one leaves the file."""
    used = [name for name in names if name in (*_TURN_KEYS, "id", "episode")]
    if not set(used) & set(_TURN_KEYS) or len(used) > len(set(used)):
        raise InputError(
            f"{path} has the columns " + (", ".join(map(repr, names)) or "(none)"),
            expected="each name once, one of them " + ", ".join(_TURN_KEYS),
            fix="call the column that holds the prompts `prompt`, and part columns with commas",
        )
    return used


def conversation_of(place: str, fields: Mapping[str, Any]) -> tuple[Message, ...]:
    """The row's messages, from the first key that holds any; the last one is the user's."""
    key = next((k for k in _TURN_KEYS if fields.get(k) is not None), None)
    if key is None:
        problem = f"{place} has no prompt, only: " + (", ".join(map(repr, fields)) or "nothing")
        raise InputError(problem, expected="one of " + ", ".join(_TURN_KEYS), fix="add a `prompt`")
    value, within = fields[key], f"{place}, `{key}`"
    if isinstance(value, str) and key not in _LIST_KEYS:
        return (Message("user", _text(within, value)),)
    turns = _parse(within, value) if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns:
        raise InputError(
            f"{within} is {_words(turns) if turns != [] else 'an empty list'}",
            expected="a list of messages" if key in _LIST_KEYS else "text, or a list of messages",
            fix='write a question as text under `prompt`, or as [{"role": "user", "content": "..."}]',
        )
    messages = tuple(_message(f"{within}, message {n}", turn) for n, turn in enumerate(turns, start=1))
    if messages[-1].role != "user":
        raise InputError(
            f"{within} ends with a message of the {messages[-1].role}",
            expected="a last message of the user, for the model to answer",
            fix="remove what follows the user's last message",
        )
    return messages


def _message(place: str, turn: Any) -> Message:
    """One turn, as {role, content} or in ShareGPT's words {from, value}."""
    if not isinstance(turn, dict):
        problem = f"{place} is {_words(turn)}"
        raise InputError(problem, expected="an object with `role` and `content`", fix="give both")
    role = _one_of(place, "role", turn.get("role", turn.get("from")), _ROLES)
    return Message(role, _text(f"{place} (its content)", turn.get("content", turn.get("value"))))


def _one_of(place: str, key: str, value: Any, known: Mapping[str, _T]) -> _T:
    if isinstance(value, str) and value in known:
        return known[value]
    problem = f"{place} has no `{key}`" if value is None else f"{place} has the {key} {value!r}"
    near = difflib.get_close_matches(str(value).casefold(), list(known), n=1)
    fix = f"did you mean '{near[0]}'?" if near else f"write one of these as its {key}"
    raise InputError(problem, expected=", ".join(known), fix=fix)


def _text(place: str, value: Any) -> str:
    if not isinstance(value, str):
        problem = _words(value)
    elif not value.strip():
        problem = "empty"
    elif _HALF_CHARACTER.search(value):
        problem = "not writable as UTF-8 (a \\ud... escape without its other half)"
    else:
        return value
    raise InputError(f"{place} is {problem}", expected="text", fix="write text there, or remove it")


def _name(place: str, fields: Mapping[str, Any], key: str) -> str:
    """An optional `id`, `episode`, `form` or `group`; a whole number counts as text."""
    value = fields.get(key)
    if value is None or value == "":
        return ""
    return _text(f"{place}, `{key}`", str(value) if type(value) is int else value)


def _fresh_id(messages: Sequence[Message], taken: Mapping[str, int]) -> str:
    """`p-` and ten digits of the content hash; more if taken: among a million, ten digits can collide."""
    digest = content_hash([[m.role, m.content] for m in messages], length=64)
    return next((name for n in (10, 16) if (name := f"p-{digest[:n]}") not in taken), f"p-{digest}")


def _suite_item(place: str, fields: Mapping[str, Any], prompt: Prompt) -> SuiteItem:
    kind = _one_of(place, "kind", fields.get("kind"), _KINDS)
    given = fields.get("references")
    if given is not None and not isinstance(given, list):
        problem = f"{place}, `references` is {_words(given)}"
        raise InputError(problem, expected="a list of strings", fix='write a single one as ["Paris"]')
    answers = tuple(_text(f"{place}, reference {n}", answer) for n, answer in enumerate(given or [], start=1))
    if kind == "answerable" and not answers:
        problem = f"{place} is answerable, but has no references"
        raise InputError(problem, expected="the right answers", fix="add `references`, or change the kind")
    form = _name(place, fields, "form") or "plain"
    return SuiteItem(prompt, kind, answers, form, _name(place, fields, "group"))


def _words(value: Any) -> str:
    return _WORDS.get(type(value)) or reprlib.repr(value)
