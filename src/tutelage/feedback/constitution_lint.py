"""What is likely wrong with a constitution, although it can be read. In any language: characters are compared."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

from tutelage.feedback.constitution import Constitution, Principle

__all__ = ["likeness", "lint"]

# UTF-8 bytes; three to four of them are a token of a judge model in most languages.
_LONG_TEXT = 800
_LONG_WHOLE = 6000
_ALIKE = 0.85
_HEAVY = 0.8
_HOLE = re.compile(r"\{(\w+)\}")


def lint(constitution: Constitution) -> list[str]:
    """Warnings, in the order of the principles; none for a sound constitution."""
    principles = constitution.principles
    found = [w for p in principles for w in (*_of_text(p), *_of_wording(p))]
    found += [
        f"'{a.id}' and '{b.id}' say nearly the same ({likeness(a.text, b.text):.0%} of their pieces): merge them, "
        "or word the difference"
        for a, b in itertools.combinations(principles, 2)
        if likeness(a.text, b.text) >= _ALIKE
    ]
    total = sum(p.weight for p in principles)
    found += [
        f"'{p.id}' holds {p.weight / total:.0%} of the weight: the others hardly count"
        for p in principles
        if len(principles) > 1 and p.weight / total > _HEAVY
    ]
    size = sum(_bytes(p.text) for p in principles)
    if size > _LONG_WHOLE:
        found.append(
            f"all texts together take {size} bytes (about {size // 4} tokens) of every judge's prompt: shorten them, "
            'or judge by each apart (principles = "each")'
        )
    return found + list(_contradictions(principles))


def likeness(a: str, b: str) -> float:
    """Dice coefficient of the two texts' character trigrams, from 0 to 1; case and spacing do not count."""
    left, right = _pieces(a), _pieces(b)
    return 2 * (left & right).total() / (left.total() + right.total())


def _pieces(text: str) -> Counter[str]:
    plain = f"  {_plain(text)}  "  # so that a text of one character has trigrams, too
    return Counter(plain[i : i + 3] for i in range(len(plain) - 2))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _bytes(text: str) -> int:
    return len(text.encode("utf-8"))


def _of_text(p: Principle) -> Iterator[str]:
    if _bytes(p.text) > _LONG_TEXT:
        yield (
            f"'{p.id}' takes {_bytes(p.text)} bytes (about {_bytes(p.text) // 4} tokens) of every judge's prompt: "
            "shorten it or split it"
        )
    if _plain(p.critique) in ("", _plain(p.text)):
        yield f"'{p.id}' has no critique: verdicts against it will only repeat its text"
    strange = sorted(set(_HOLE.findall(p.critique)) - {"question", "reply"})
    if strange:
        yield f"the critique of '{p.id}' has {{{strange[0]}}}, which nothing fills in: use {{question}} or {{reply}}"


def _of_wording(p: Principle) -> Iterator[str]:
    """Openings and fallback against the principle's own examples."""
    for _, bad, good in p.examples:
        if _plain(bad) == _plain(good):
            yield f"'{p.id}' calls one reply both bad and good: '{good}'"
            continue
        for opening in p.openings:
            if _plain(opening) and _plain(bad).startswith(_plain(opening)):
                yield f"'{p.id}' opens revisions with '{opening}', as its bad example begins: '{bad}'"
        if p.fallback and _plain(p.fallback) == _plain(bad):
            yield f"'{p.id}' falls back on what its example calls bad: '{bad}'"


def _contradictions(principles: tuple[Principle, ...]) -> Iterator[str]:
    """A reply to a prompt that one principle calls good and another one bad."""
    good = {(_plain(prompt), _plain(text)): p.id for p in principles for prompt, _, text in p.examples}
    for p in principles:
        for prompt, text, _ in p.examples:
            other = good.get((_plain(prompt), _plain(text)))
            if other not in (None, p.id):
                yield f"'{other}' calls good what '{p.id}' calls bad: '{text}' as the reply to '{prompt}'"
