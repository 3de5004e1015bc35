"""Credit by place in the text: where tokens lie, which draw attention for nothing, and credit between tokenisers.

Places are (start, end) in characters as Python counts them, so they hold in any script. A token that has no text
(the end of a turn) has start = end; tokens that share one character (bytes of it) all have that character's place.
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch

from tutelage.errors import InputError

__all__ = ["Sink", "align", "by_character", "sinks", "token_spans"]

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Sink:
    """A column that is left out of attention credit, and why."""

    row: int
    column: int
    text: str
    reason: str


def sinks(
    pieces: Sequence[Sequence[str]], *, first: bool = True, punctuation: bool = True, width: int | None = None
) -> tuple[torch.Tensor, tuple[Sink, ...]]:
    """Columns that draw attention whatever they say, as `drop_BT` for `tokens.weights`, and a list to show.

    Args:
        pieces: Text of each token, by row.
        first: Leave out the first token of each row.
        punctuation: Leave out tokens without a letter, digit or symbol: punctuation, spaces, nothing at all.
        width: Columns of the mask; default: the longest row.
    """
    wide = max([len(row) for row in pieces] + [0]) if width is None else width
    drop_BT = torch.zeros(len(pieces), wide, dtype=torch.bool)
    found = []
    for b, row in enumerate(pieces):
        for t, text in enumerate(row):
            reason = "first token" if first and t == 0 else "punctuation" if punctuation and _says_nothing(text) else ""
            if reason:
                drop_BT[b, t] = True
                found.append(Sink(b, t, text, reason))
    return drop_BT, tuple(found)


def _says_nothing(text: str) -> bool:
    return all(unicodedata.category(c)[0] in "PZC" for c in text)


def token_spans(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[str, tuple[Span, ...]]:
    """The whole text of some tokens, and where each of them lies in it.

    Decodes every prefix, since a tokenizer without offsets has no other way to say where a token ends: of several
    bytes of one character none has a text of its own.

    Args:
        tokens: Their ids.
        decode: Ids to text, neither stripped nor tidied.
    """
    text = decode(tokens)
    spans = []
    sure = 0
    for n in range(1, len(tokens) + 1):
        here = decode(tokens[:n])
        end = sure
        while end < min(len(here), len(text)) and here[end] == text[end]:
            end += 1
        # No new sure character, but something behind the sure ones: bytes of the next.
        part = end == sure and sure < min(len(here), len(text))
        spans.append((sure, end + part))
        sure = end
    return text, tuple(spans)


def by_character(credit: Sequence[float], spans: Sequence[Span], length: int) -> list[float]:
    """Credit of each character: a token's, in equal parts over its own; without text it goes to the next one.

    Raises:
        InputError: Spans and credit are not equally many, a span is not within the text, or there is no text.
    """
    if length < 1:
        raise InputError("a text without characters", expected="at least one", fix="leave out empty replies")
    found = [Fraction(0)] * length
    for value, (start, end) in _checked(credit, spans, length):
        for c in range(start, end) if end > start else [min(start, length - 1)]:
            found[c] += value / max(1, end - start)
    return [float(value) for value in found]


def align(credit: Sequence[float], spans: Sequence[Span], others: Sequence[Span]) -> list[float]:
    """Credit of one tokenisation, moved to the tokens of another by the characters that they share.

    A token's credit lies in equal parts on its characters; a character's goes in equal parts to the other tokens
    that cover it. Characters that no other token covers are passed over, and a token none of whose characters are
    covered (or that has none) gives all to the next token, or to the last. The total stays what it was: it is
    computed in fractions, and what rounding leaves goes to the token with the finest digits.

    Args:
        credit: Of the tokens at `spans`.
        spans: Where they lie.
        others: Where the other tokenisation's tokens lie in the same text, in order.

    Raises:
        InputError: Spans and credit are not equally many, there is no other token, or a span runs backwards.
    """
    if not others:
        raise InputError("there is no token to move credit to", expected="at least one", fix="leave out empty replies")
    length = max(max(span) for span in (*spans, *others))
    covering: list[list[int]] = [[] for _ in range(length)]
    for k, (start, end) in enumerate(others):
        for c in range(start, end):
            covering[c].append(k)
    found = [Fraction(0)] * len(others)
    for value, (start, end) in _checked(credit, spans, length):
        covered = [c for c in range(start, end) if covering[c]]
        for c in covered:
            for k in covering[c]:
                found[k] += value / (len(covered) * len(covering[c]))
        if not covered:
            later = (k for k, (_, far) in enumerate(others) if far > start)
            found[next(later, len(others) - 1)] += value
    return _closed([float(value) for value in found], math.fsum(credit))


def _checked(credit: Sequence[float], spans: Sequence[Span], length: int) -> list[tuple[Fraction, Span]]:
    if len(credit) != len(spans):
        raise InputError(
            f"credit for {len(credit)} tokens and places of {len(spans)}",
            expected="one of each a token",
            fix="take both from the same tokenisation",
        )
    for value, (start, end) in zip(credit, spans, strict=True):
        if not (0 <= start <= end <= length and math.isfinite(value)):
            raise InputError(
                f"credit {value} at characters {start} to {end} of {length}",
                expected="a finite number, and a place within the text",
                fix="take credit and places from the same reply",
            )
    return [(Fraction(value), span) for value, span in zip(credit, spans, strict=True)]


def _closed(values: list[float], total: float) -> list[float]:
    """The same numbers, changed by rounding's worth so that their sum is `total`."""
    for k in sorted((k for k, v in enumerate(values) if v), key=lambda k: abs(values[k])):
        missing = math.fsum([total, *(-v for v in values)])
        if not missing:
            break
        values[k] += missing
    return values
