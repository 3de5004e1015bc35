"""Trigger words: the places of a text that made it bad."""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Sequence

from tutelage.credit.spans import Span, by_character
from tutelage.errors import InputError

__all__ = ["Trigger", "triggers"]

# Scripts written without spaces between words: their characters are not extended to anything longer.
_NO_SPACES = (
    "CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN",
    "YI SYLLABLE", "TAI LE", "NEW TAI LUE", "TAI THAM", "JAVANESE", "BALINESE",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Trigger:
    """A place that made the text bad.

    Args:
        start: First character.
        end: One behind the last.
        text: What stands there.
        score: All credit that lies on it; below zero.
    """

    start: int
    end: int
    text: str
    score: float


def triggers(
    text: str,
    spans: Sequence[Span],
    credit: Sequence[float],
    *,
    share: float = 0.5,
    gap: int = 1,
    whole_words: bool = True,
) -> list[Trigger]:
    """The fewest tokens that carry `share` of the negative credit, as places in the text, worst first.

    Neighbours become one place, and places grow to whole words in scripts that have spaces, so a place may hold
    tokens that were not chosen; its score counts them too, and a place that they outweigh is left out.

    Args:
        text: The whole text.
        spans: Where its tokens lie.
        credit: Signed credit of each.
        share: Part of the sum of negative credit that the chosen tokens must reach, in (0, 1].
        gap: Characters without a letter or digit that may lie between two places that become one.
        whole_words: Grow places to whole words.

    Raises:
        InputError: `share` or `gap` makes no sense, or spans, credit and text do not fit together.
    """
    if not 0.0 < share <= 1.0 or gap < 0:
        raise InputError(
            f"share {share} and gap {gap}", expected="share in (0, 1] and gap from 0", fix="take share = 0.5, gap = 1"
        )
    if not text:
        return []
    worth = by_character(credit, spans, len(text))
    places = [
        _grown(text, *span) if whole_words else span for span in _chosen(spans, credit, share) if span[0] < span[1]
    ]
    found = []
    for start, end in _merged(text, sorted(places), gap):
        score = math.fsum(worth[start:end])
        if score < 0.0:
            found.append(Trigger(start, end, text[start:end], score))
    return sorted(found, key=lambda t: (t.score, t.start))


def _chosen(spans: Sequence[Span], credit: Sequence[float], share: float) -> list[Span]:
    worst = sorted((n for n, value in enumerate(credit) if value < 0.0), key=lambda n: (credit[n], n))
    wanted = share * math.fsum(credit[n] for n in worst)
    found, reached = [], 0.0
    for n in worst:
        if reached <= wanted * (1.0 - 1e-12):  # a tenth three times over is three tenths here
            break
        reached += credit[n]
        found.append(spans[n])
    return found


def _grown(text: str, start: int, end: int) -> Span:
    """To whole words; the spaces that a token brings with it are left out."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    while 0 < start < end and _joined(text, start):
        start -= 1
    while start < end < len(text) and _joined(text, end):
        end += 1
    return start, end


def _joined(text: str, at: int) -> bool:
    """Whether the characters before and at a place belong to one word."""
    before, after = text[at - 1], text[at]
    if unicodedata.category(after)[0] == "M":  # an accent is never cut from its letter
        return True
    if after in "'’" and at + 1 < len(text):
        after = text[at + 1]
    elif before in "'’" and at > 1:
        before = text[at - 2]
    return _of_word(before) and _of_word(after)


def _of_word(char: str) -> bool:
    return unicodedata.category(char)[0] in "LMN" and not unicodedata.name(char, "").startswith(_NO_SPACES)


def _merged(text: str, places: Sequence[Span], gap: int) -> list[Span]:
    found: list[Span] = []
    for start, end in places:
        if found and start <= found[-1][1] + gap and not any(c.isalnum() for c in text[found[-1][1] : start]):
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif start < end:
            found.append((start, end))
    return found
