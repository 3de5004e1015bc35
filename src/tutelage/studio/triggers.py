"""Replies with the words that turned a critic against them, for the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.studio.samples import Text, clip

__all__ = ["Blamed", "blamed"]


@dataclasses.dataclass(frozen=True)
class Blamed:
    """One reply: its text in parts, each marked one with the score of its trigger, the others with None."""

    unit: str
    judge: str
    reward: float
    prompt: Text
    parts: tuple[tuple[str, float | None], ...]


def blamed(notes: Sequence[Any], most: int, characters: int) -> list[Blamed]:
    """What the notes of a run's rounds hold, the last rounds first; notes that cannot be read are passed over.

    Args:
        notes: Bodies of the topic `triggers`, in order.
        most: Replies.
        characters: Of a text; what is longer is cut.
    """
    found = []
    for body in reversed(notes):
        if not isinstance(body, Mapping):
            continue
        for row in body.get("replies", []):
            text = str(row["text"])[:characters]
            places = sorted((p for p in row["places"] if p["end"] <= len(text)), key=lambda p: int(p["start"]))
            parts: list[tuple[str, float | None]] = []
            at = 0
            for place in places:
                parts.append((text[at : place["start"]], None))
                parts.append((text[place["start"] : place["end"]], float(place["score"])))
                at = place["end"]
            parts.append((text[at:] + ("…" if len(str(row["text"])) > characters else ""), None))
            prompt = clip(str(row["prompt"]), characters)
            kept = tuple(part for part in parts if part[0])
            where = ", ".join(str(body[key]) for key in ("unit", "suite") if body.get(key))
            found.append(Blamed(where, str(body["judge"]), float(row["reward"]), prompt, kept))
    return found[:most]
