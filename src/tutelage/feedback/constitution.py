"""A constitution: written principles as data, with the words in which they criticise and revise."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.errors import InputError
from tutelage.records import content_hash

__all__ = ["Constitution", "Principle", "load_constitution"]

_KINDS = ("answerable", "unanswerable", "ambiguous", "any")
_ACTS = ("answers", "abstains", "asks_back")


@dataclasses.dataclass(frozen=True)
class Principle:
    """One written value.

    Args:
        id: Short name, unique in the file.
        text: The principle in words.
        weight: How much it counts, > 0.
        scope: Kind of question it is about: answerable, unanswerable, ambiguous or any.
        wants: What a reply in scope should do: answers, abstains or asks_back.
        critique: What is said of a reply that breaks it; `{question}` and `{reply}` are filled in.
        openings: How a revision may begin; the model itself goes on from there.
        fallback: The revision when the model's own continuation is no good.
        examples: (prompt, bad, good) texts.
    """

    id: str
    text: str
    weight: float
    scope: str
    wants: str
    critique: str
    openings: tuple[str, ...]
    fallback: str
    examples: tuple[tuple[str, str, str], ...]


@dataclasses.dataclass(frozen=True)
class Constitution:
    """Principles with a version hash that every verdict carries."""

    name: str
    principles: tuple[Principle, ...]

    @property
    def hash(self) -> str:
        """Content hash of all principles."""
        return content_hash([dataclasses.astuple(p) for p in self.principles])

    def about(self, kind: str) -> list[Principle]:
        """Principles in whose scope a question of this kind is."""
        return [p for p in self.principles if p.scope in (kind, "any")]


def load_constitution(path: Path) -> Constitution:
    """Read a constitution.

    Raises:
        InputError: Missing or broken file, no principles, unknown or missing keys, repeated ids.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"the constitution {path} cannot be read: {error.strerror}",
            expected="a TOML file",
            fix="check the path",
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text", expected="UTF-8", fix="save the file as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}", expected="TOML", fix="mend that line") from error
    entries = data.get("principles")
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f"{path} has no principles",
            expected="at least one [[principles]] table with id, text, scope and wants",
            fix="see docs/constitution.md for an example",
        )
    principles = tuple(_principle(path, n, entry) for n, entry in enumerate(entries, 1))
    ids = [p.id for p in principles]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise InputError(f"{path} has two principles with the id '{twice[0]}'", expected="unique ids")
    return Constitution(str(data.get("name", path.stem)), principles)


def _principle(path: Path, number: int, entry: Mapping[str, Any]) -> Principle:
    place = f"principle {number} of {path}"
    known = {f.name for f in dataclasses.fields(Principle)}
    if not isinstance(entry, dict):
        raise InputError(f"{place} is {entry!r}", expected="a [[principles]] table", fix="mend the entry")
    strange = sorted(set(entry) - known)
    missing = sorted({"id", "text", "scope", "wants"} - set(entry))
    if strange or missing:
        what = f"has the unknown key '{strange[0]}'" if strange else f"lacks '{missing[0]}'"
        raise InputError(f"{place} {what}", expected=", ".join(sorted(known)), fix="mend the table")
    for key, allowed in (("scope", _KINDS), ("wants", _ACTS)):
        if entry[key] not in allowed:
            raise InputError(f"{place}: {key} is '{entry[key]}'", expected=" | ".join(allowed))
    weight = entry.get("weight", 1.0)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < float("inf"):
        raise InputError(f"{place}: weight is {weight!r}", expected="a number above 0")
    examples = entry.get("examples", [])
    try:
        shown = tuple((str(e["prompt"]), str(e["bad"]), str(e["good"])) for e in examples)
    except (TypeError, KeyError) as error:
        raise InputError(f"{place}: an example is incomplete", expected="{prompt, bad, good}") from error
    fallback = str(entry.get("fallback") or (shown[0][2] if shown else ""))
    if not isinstance(entry.get("openings", []), list):
        raise InputError(f"{place}: openings is no list", expected='for example openings = ["I don\'t know"]')
    openings = tuple(str(o) for o in entry.get("openings", ()))
    if entry["wants"] != "answers" and not (openings or fallback):
        raise InputError(
            f"{place} wants '{entry['wants']}' but says not how",
            expected="openings, fallback or an example",
            fix='for example openings = ["I don\'t know"]',
        )
    return Principle(
        str(entry["id"]), str(entry["text"]), float(weight), entry["scope"], entry["wants"],
        str(entry.get("critique", entry["text"])), openings, fallback, shown,
    )  # fmt: skip
