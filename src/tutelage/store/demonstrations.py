"""Demonstrations: conversations with the reply that somebody wants, from JSONL files.

{"prompt": "Why?", "response": "Because."}       prompt as in `read_prompts`: text or a list of turns
{"prompt": "Why?", "completion": "Because."}     as TRL writes them, texts or messages
{"messages": [..., {"role": "assistant", "content": "Because."}]}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.errors import InputError
from tutelage.records import Demonstration, Prompt
from tutelage.store.prompts import check_path, conversation_of, json_rows

__all__ = ["read_demonstrations"]

_REPLIES = ("response", "completion", "reply")
_SPEAKERS = ("assistant", "gpt")


def read_demonstrations(path: Path) -> list[Demonstration]:
    """Read demonstrations; one prompt may have several.

    Args:
        path: A .jsonl, .ndjson or .json file, one object a line, in one of the forms above.

    Returns:
        One or more, in file order; their prompts are called `demo-` and the number of the line.

    Raises:
        InputError: The file cannot be read, or a line is no demonstration; the message names the line.
    """
    check_path(path, (".jsonl", ".ndjson", ".json"))
    found = []
    for number, fields in json_rows(path):
        place = f"{path}, line {number}"
        key = next((k for k in _REPLIES if fields.get(k) is not None), None)
        fields, said = (dict(fields), fields[key]) if key else _taken_off(place, fields)
        text = _reply(said)
        if text is None:
            raise InputError(
                f"{place}: the reply is {said!r:.80}",
                expected='text, or one message {"role": "assistant", "content": "..."}',
                fix="write what the model should have said as text",
            )
        found.append(Demonstration(Prompt(f"demo-{number}", conversation_of(place, fields)), text))
    if not found:
        raise InputError(f"{path} holds no demonstrations", expected='lines {"prompt", "response"}', fix="add some")
    return found


def _taken_off(place: str, fields: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """A conversation that ends with the assistant: what comes before, and what it said."""
    for key in ("messages", "conversations"):
        turns = fields.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping) and _speaker(turns[-1]) in _SPEAKERS:
            return {**fields, key: turns[:-1]}, [turns[-1]]
    raise InputError(
        f"{place} shows no reply, only: " + (", ".join(map(repr, fields)) or "nothing"),
        expected="a `response` beside the `prompt`, or `messages` that end with the assistant",
        fix="give each line the reply that the model should learn",
    )


def _speaker(turn: Mapping[str, Any]) -> Any:
    return turn.get("role", turn.get("from"))


def _reply(said: Any) -> str | None:
    if isinstance(said, list) and len(said) == 1 and isinstance(said[0], Mapping) and _speaker(said[0]) in _SPEAKERS:
        said = said[0].get("content", said[0].get("value"))
    return said if isinstance(said, str) and said.strip() else None
