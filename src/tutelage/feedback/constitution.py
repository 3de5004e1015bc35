"""A constitution: written principles as data, with the words in which they criticise and revise."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.errors import InputError
from tutelage.feedback.constitution_markdown import read_markdown
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
        wants: What a reply in scope should do: answers, abstains or asks_back. Empty when no act can say it:
            then only models that read the text judge by it.
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

    @property
    def acting(self) -> tuple[Principle, ...]:
        """Principles that want an act; the others are for models that read them."""
        return tuple(p for p in self.principles if p.wants)

    def about(self, kind: str) -> list[Principle]:
        """Principles that want an act of replies to questions of this kind."""
        return [p for p in self.acting if p.scope in (kind, "any")]


def load_constitution(path: Path) -> Constitution:
    """Read a constitution: Markdown when the file's name ends in .md or .markdown, else TOML.

    The same principles have the same hash in either.

    Raises:
        InputError: Missing or broken file, no principles, unknown or missing keys, repeated ids.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"the constitution {path} cannot be read: {error.strerror}",
            expected="a TOML or Markdown file",
            fix="check the path",
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text", expected="UTF-8", fix="save the file as UTF-8") from error
    markdown = path.suffix.lower() in (".md", ".markdown")
    name, entries = read_markdown(path, text) if markdown else _read_toml(path, text)
    principles = tuple(_principle(place, entry) for place, entry in entries)
    ids = [p.id for p in principles]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise InputError(f"{path} has two principles with the id '{twice[0]}'", expected="unique ids")
    return Constitution(name or path.stem, principles)


def _read_toml(path: Path, text: str) -> tuple[str, list[tuple[str, Mapping[str, Any]]]]:
    """Name (may be empty) and entries, each with its place in the file."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}", expected="TOML", fix="mend that line") from error
    entries = data.get("principles")
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f"{path} has no principles",
            expected="at least one [[principles]] table with id and text",
            fix="see docs/constitution.md for an example",
        )
    return str(data.get("name", "")), [(f"principle {n} of {path}", entry) for n, entry in enumerate(entries, 1)]


def _principle(place: str, entry: Mapping[str, Any]) -> Principle:
    known = {f.name for f in dataclasses.fields(Principle)}
    if not isinstance(entry, dict):
        raise InputError(f"{place} is {entry!r}", expected="a [[principles]] table", fix="mend the entry")
    strange = sorted(set(entry) - known)
    missing = sorted(key for key in ("id", "text") if not str(entry.get(key, "")).strip())
    if strange or missing:
        what = f"has the unknown key '{strange[0]}'" if strange else f"lacks '{missing[0]}'"
        raise InputError(f"{place} {what}", expected=", ".join(sorted(known)), fix="mend the entry")
    scope, wants = entry.get("scope", "any"), entry.get("wants", "")
    if scope not in _KINDS:
        raise InputError(f"{place}: scope is '{scope}'", expected=" | ".join(_KINDS))
    if wants not in ("", *_ACTS):
        raise InputError(f"{place}: wants is '{wants}'", expected=" | ".join(_ACTS), fix="or leave it out")
    weight = entry.get("weight", 1.0)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < float("inf"):
        raise InputError(f"{place}: weight is {weight!r}", expected="a number above 0")
    try:
        shown = tuple((str(e["prompt"]), str(e["bad"]), str(e["good"])) for e in entry.get("examples", []))
    except (TypeError, KeyError) as error:
        raise InputError(f"{place}: an example is incomplete", expected="{prompt, bad, good}") from error
    fallback = str(entry.get("fallback") or (shown[0][2] if shown else ""))
    if not isinstance(entry.get("openings", []), list):
        raise InputError(f"{place}: openings is no list", expected='for example openings = ["I don\'t know"]')
    openings = tuple(str(o) for o in entry.get("openings", ()))
    if wants not in ("", "answers") and not (openings or fallback):
        raise InputError(
            f"{place} wants '{wants}' but says not how",
            expected="openings, fallback or an example",
            fix='for example openings = ["I don\'t know"]',
        )
    text = str(entry["text"]).strip()
    return Principle(
        str(entry["id"]).strip(), text, float(weight), scope, wants, str(entry.get("critique", text)), openings,
        fallback, shown,
    )  # fmt: skip
