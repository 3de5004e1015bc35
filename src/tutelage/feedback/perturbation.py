"""Labelled data for a critic of coherence, made from dialogues that nobody labelled.

A reply as it stands in its dialogue counts as coherent; the same dialogue with its reply spoilt does not. Replies
are exchanged between two dialogues, so that such a text stands on either side once and says nothing by
itself: only how it fits tells. What a critic learns of one kind need not hold for another, so the kind is kept
beside the label, to measure on kinds that were not learned from (`benchmarks/critics.py`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from tutelage.errors import InputError
from tutelage.feedback.critic_data import Passage
from tutelage.records import content_hash

__all__ = ["KINDS", "Kind", "Row", "perturb", "perturb_file"]

Kind = Literal["exchanged", "earlier", "echo", "torn"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LABELS = ("incoherent", "coherent")

# An end of a sentence: a stop with what closes behind it; scripts without spaces need none after it.
_STOP = re.compile(r"(?<=[.!?…])[\"'”’)]*\s+|(?<=[。！？])[」』”’）]*\s*|\n+")
_LEAST = 3  # sentences, below which their order says little


@dataclasses.dataclass(frozen=True)
class Row:
    """A passage, whether it is coherent, and how it was spoilt."""

    passage: Passage
    coherent: bool
    kind: Kind | Literal["kept"]


def perturb(dialogues: Sequence[Passage], kinds: Sequence[Kind] = KINDS) -> list[Row]:
    """Every dialogue as it is, and once for each way in which it can be spoilt.

    Args:
        dialogues: Replies with the conversations before them; equal ones count once, those without a
            conversation not at all.
        kinds: `exchanged`: the reply of another dialogue; `earlier`: what the same side said before; `echo`: the
            last turn said again; `torn`: its sentences in reverse, where it has three.

    Returns:
        In an order that depends on the texts alone, not on their order.

    Raises:
        InputError: A kind is unknown or missing, or there are not two different dialogues.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise InputError(f"kind {', '.join(unknown) or 'none'}", expected=", ".join(KINDS), fix="choose from these")
    known = {_hash(p): p for p in dialogues if p.context and p.text.strip()}
    found = [known[name] for name in sorted(known)]
    if len({p.context for p in found}) < 2:
        raise InputError(
            f"{len(found)} dialogues with a turn before the reply",
            expected="at least two different ones",
            fix="give dialogues, as a prompt of several turns or of one",
        )
    partner = _couples(found)
    rows = []
    for one, other in zip(found, partner, strict=True):
        rows.append(Row(one, coherent=True, kind="kept"))
        for kind in kinds:
            text = _SPOIL[kind](one, other)
            if text is not None and text.strip() and text.strip() != one.text.strip():
                rows.append(Row(Passage(text, one.context), coherent=False, kind=kind))
    return rows


def perturb_file(dialogues: Sequence[Passage], out: Path, kinds: Sequence[Kind] = KINDS) -> dict[str, Any]:
    """Write what `perturb` gives as rows that `tutelage critic train --kind coherence` reads.

    Raises:
        InputError: As `perturb`; or the file cannot be written.
    """
    rows = perturb(dialogues, kinds)
    lines = []
    for row in rows:
        turns = [{"role": m.role, "content": m.content} for m in row.passage.context]
        body = {"prompt": turns, "response": row.passage.text, "label": LABELS[row.coherent], "kind": row.kind}
        lines.append(json.dumps(body, ensure_ascii=False) + "\n")
    try:
        out.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error})", fix="choose another place") from error
    counted = {kind: sum(row.kind == kind for row in rows) for kind in ("kept", *kinds)}
    return {"file": str(out), "dialogues": counted["kept"], "rows": len(rows), "kinds": counted}


def _hash(passage: Passage) -> str:
    return content_hash([[[m.role, m.content] for m in passage.context], passage.text])


def _couples(found: Sequence[Passage]) -> list[Passage | None]:
    """Who exchanges replies with whom: two and two, so that no chain of relatives spans the whole file."""
    partner: list[Passage | None] = [None] * len(found)
    waiting: list[int] = []
    for row, passage in enumerate(found):
        match = next((w for w in waiting if _strangers(found[w], passage)), None)
        if match is None:
            waiting.append(row)
        else:
            waiting.remove(match)
            partner[row], partner[match] = found[match], passage
    return partner


def _strangers(one: Passage, other: Passage) -> bool:
    """Neither the same question, nor the same conversation further on, nor the same reply."""
    return (
        one.context[0].content != other.context[0].content
        and one.context[-1].content != other.context[-1].content
        and one.text.strip() != other.text.strip()
    )


def _earlier(one: Passage, _: Passage | None) -> str | None:
    said = [m.content for m in one.context if m.role == "assistant"]
    return said[-1] if said else None


def _torn(one: Passage, _: Passage | None) -> str | None:
    parts = [part.strip() for part in _STOP.split(one.text) if part.strip()]
    return " ".join(reversed(parts)) if len(parts) >= _LEAST else None


_SPOIL: dict[str, Callable[[Passage, Passage | None], str | None]] = {
    "exchanged": lambda _, other: None if other is None else other.text,
    "earlier": _earlier,
    "echo": lambda one, _: one.context[-1].content,
    "torn": _torn,
}
