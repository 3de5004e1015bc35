"""Pairs that people compared, from JSONL files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.errors import InputError
from tutelage.records import PreferencePair, Prompt
from tutelage.store.prompts import check_path, conversation_of, json_rows

__all__ = ["read_pairs"]


def read_pairs(path: Path, *, limit: int | None = None) -> list[PreferencePair]:
    """Read lines `{"prompt", "chosen", "rejected"}`.

    Args:
        path: A .jsonl file. `prompt` is a text or a list of turns; optional are `votes` (people for the
            chosen and the rejected reply), `category`, and `authors` (who wrote them).
        limit: Only the first N pairs.

    Raises:
        InputError: The file cannot be read or a line is no pair; the message names the line.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}", expected="1 or more", fix="leave the limit out to read all")
    check_path(path, (".jsonl", ".ndjson", ".json"))
    pairs = []
    for number, fields in itertools.islice(json_rows(path), limit):
        place = f"{path}, line {number}"
        prompt = Prompt(f"pair-{number}", conversation_of(place, fields))
        chosen, rejected = (_reply(place, fields, key) for key in ("chosen", "rejected"))
        votes, authors = _votes(place, fields), _authors(place, fields)
        pairs.append(PreferencePair(prompt, chosen, rejected, votes, str(fields.get("category") or ""), authors))
    if not pairs:
        raise InputError(f"{path} holds no pairs", expected='lines {"prompt", "chosen", "rejected"}')
    return pairs


def _reply(place: str, fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{place}: {key} is {value!r:.80}", expected="a text", fix=f"give every line a {key}")
    return value


def _votes(place: str, fields: Mapping[str, Any]) -> tuple[float, float]:
    value = fields.get("votes")
    if value is None:
        return (1.0, 0.0)
    good = (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < math.inf for v in value)
        and sum(value) > 0
    )
    if not good:
        raise InputError(f"{place}: votes is {value!r:.80}", expected="[for the chosen, for the rejected], e.g. [3, 1]")
    return float(value[0]), float(value[1])


def _authors(place: str, fields: Mapping[str, Any]) -> tuple[str, str]:
    value = fields.get("authors")
    if value is None:
        return ("", "")
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(v, str) for v in value):
        raise InputError(f"{place}: authors is {value!r:.80}", expected="[who wrote chosen, who wrote rejected]")
    return value[0], value[1]
