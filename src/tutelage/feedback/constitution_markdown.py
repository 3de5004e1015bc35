"""A constitution written as Markdown, read into the same entries that the TOML form has.

    # Name                          of the constitution; text before the first principle is a preface
    ## id                           of a principle
    weight: 2                       directly below: weight, scope, wants, critique, opening, fallback
    Everything else is the text.
    ### example                     any number of them
    prompt: ...                     a value goes on until the next of these three
    bad: ...
    good: ...

Comments <!-- like this --> are not read. Headings inside a fenced block are text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tutelage.errors import InputError

__all__ = ["read_markdown"]

_KEYS = ("weight", "scope", "wants", "critique", "opening", "fallback")
_PARTS = ("prompt", "bad", "good")
_HEADING = re.compile(r"^ {0,3}(#{1,3})\s+(.*?)(?:\s+#+)?\s*$")
_FENCE = re.compile(r"^ {0,3}(```|~~~)")
_KEYED = re.compile(r"^([A-Za-z_]+)[ \t]*:(.*)$")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)

_Lines = list[tuple[int, str]]


def read_markdown(path: Path, text: str) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """Name (may be empty) and entries, each with its place in the file.

    Args:
        path: For messages.
        text: What the file holds.

    Raises:
        InputError: No principles, a heading out of place, a key twice or nearly a known one.
    """
    name = ""
    entries: list[tuple[str, dict[str, Any]]] = []
    for level, title, number, body in _sections(text):
        if level == 1:
            if name:
                raise InputError(
                    f"{path}, line {number}: a second title, '{title}'",
                    expected="one `# Name`, and `## id` for each principle",
                )
            name = title
        elif level == 2:
            place = f"principle {len(entries) + 1} of {path} (line {number})"
            entries.append((place, {"id": title, **_head(path, body)}))
        elif level == 3:
            if not entries or title.casefold() not in ("example", "examples"):
                raise InputError(
                    f"{path}, line {number}: '### {title}' is out of place",
                    expected="`### example` below a principle",
                    fix="use a heading of another level for your own notes",
                )
            entries[-1][1].setdefault("examples", []).append(_example(path, number, body))
    if not entries:
        raise InputError(
            f"{path} has no principles",
            expected="at least one `## id` with its text below",
            fix="see docs/constitution.md for an example",
        )
    return name, entries


def _sections(text: str) -> Iterator[tuple[int, str, int, _Lines]]:
    """(level, title, line number, numbered lines) of each heading."""
    # A comment keeps its line breaks, so that the numbers of what follows stay right.
    bare = _COMMENT.sub(lambda m: "\n" * m[0].count("\n"), text.removeprefix("\ufeff"))
    level, title, start = 0, "", 0
    body: _Lines = []
    fence = ""
    for number, line in enumerate(bare.split("\n"), 1):
        line = line.rstrip("\r")
        mark = _FENCE.match(line)
        if mark and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
        heading = None if fence else _HEADING.match(line)
        if heading:
            yield level, title, start, body
            level, title, start, body = len(heading[1]), heading[2], number, []
        else:
            body.append((number, line))
    yield level, title, start, body


def _head(path: Path, body: _Lines) -> dict[str, Any]:
    """Keys of a principle, and its text."""
    rows = list(body)
    while rows and not rows[0][1].strip():
        rows.pop(0)
    found: dict[str, Any] = {}
    while rows and (keyed := _keyed(path, *rows[0])):
        key, value = keyed
        if key == "opening":
            found.setdefault("openings", []).append(value)
        elif key in found:
            raise InputError(f"{path}, line {rows[0][0]}: a second {key}", expected="one", fix="remove one")
        else:
            found[key] = _number(value) if key == "weight" else value
        rows.pop(0)
    return {**found, "text": "\n".join(line for _, line in rows).strip()}


def _keyed(path: Path, number: int, line: str) -> tuple[str, str] | None:
    match = _KEYED.match(line)
    if match is None:
        return None
    key = match[1]
    if key in _KEYS:
        return key, match[2].strip()
    # "Note: ..." may begin a text, but a slip of the pen must not become a part of it.
    near = difflib.get_close_matches(key.casefold(), _KEYS, n=1, cutoff=0.75)
    if near:
        raise InputError(
            f"{path}, line {number}: the unknown key '{key}'",
            expected=", ".join(_KEYS),
            fix=f"did you mean '{near[0]}'?",
        )
    return None


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value  # refused with the principle's place


def _example(path: Path, number: int, body: _Lines) -> dict[str, str]:
    parts: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for at, line in body:
        match = _KEYED.match(line)
        if match and match[1].casefold() in _PARTS:
            key = match[1].casefold()
            if key in parts:
                raise InputError(f"{path}, line {at}: a second {key}", expected="one `### example` for each example")
            lines = parts[key] = [match[2]]
        elif lines is not None:
            lines.append(line)
        elif line.strip():
            raise InputError(f"{path}, line {at}: '{line}'", expected="prompt:, bad: and good: below `### example`")
    lacking = [key for key in _PARTS if not "\n".join(parts.get(key, [])).strip()]
    if lacking:
        raise InputError(f"{path}, line {number}: the example has no {lacking[0]}", expected="prompt:, bad:, good:")
    return {key: "\n".join(rows).strip() for key, rows in parts.items()}
