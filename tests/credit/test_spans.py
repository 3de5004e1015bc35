"""Places of tokens, sinks, and credit that moves between tokenisations without loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.credit.spans import Sink, align, by_character, sinks, token_spans
from tutelage.errors import InputError

# Bytes as tokens: the hardest tokeniser there is.
BYTES = "Grüße, 世界! 👩‍🚀 สวัสดี".encode()


def of_bytes(tokens: Sequence[int]) -> str:
    return bytes(t for t in tokens if t < 256).decode("utf-8", errors="replace")


# -- sinks ------------------------------------------------------------------------------------------


def test_sinks_by_hand() -> None:
    drop, found = sinks([["The", " cat", ",", "\n", "+", ""], ["。", "猫"]])
    assert drop.tolist() == [[True, False, True, True, False, True], [True, False, False, False, False, False]]
    assert found[0] == Sink(0, 0, "The", "first token")
    assert [(s.row, s.column, s.reason) for s in found[1:]] == [
        (0, 2, "punctuation"), (0, 3, "punctuation"), (0, 5, "punctuation"), (1, 0, "first token"),
    ]  # fmt: skip


def test_each_kind_of_sink_can_be_kept() -> None:
    pieces = [["A", ".", "b"]]
    assert sinks(pieces, first=False)[0].tolist() == [[False, True, False]]
    assert sinks(pieces, punctuation=False)[0].tolist() == [[True, False, False]]
    assert sinks(pieces, first=False, punctuation=False)[1] == ()
    assert sinks(pieces, width=5)[0].shape == (1, 5)


# -- where tokens lie -------------------------------------------------------------------------------


def test_bytes_of_one_character_share_its_place() -> None:
    """ü is two bytes, 界 three; a token without text has no width."""
    text, spans = token_spans([*"aü界".encode(), 999], of_bytes)
    assert text == "aü界"
    assert spans == ((0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (2, 3), (3, 3))


def test_a_control_token_within_the_text_has_no_width() -> None:
    assert token_spans([97, 999, 98], of_bytes)[1] == ((0, 1), (1, 1), (1, 2))


def test_every_character_is_covered_in_any_script() -> None:
    text, spans = token_spans(list(BYTES), of_bytes)
    assert text == BYTES.decode()
    assert sorted({c for start, end in spans for c in range(start, end)}) == list(range(len(text)))
    for n, byte in enumerate(BYTES):
        start, end = spans[n]
        assert end == start + 1 and byte in text[start].encode()


def test_a_real_tokenizers_places_are_those_it_gives_itself(tiny_lm: Any) -> None:
    text = "What is the capital of Ünïcode, 世界?"
    encoded = tiny_lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found, spans = token_spans(encoded["input_ids"], tiny_lm.tokenizer.decode)
    assert found == text
    assert list(spans) == [tuple(x) for x in encoded["offset_mapping"]]


# -- credit between tokenisations -------------------------------------------------------------------


def test_align_by_hand() -> None:
    """ "abcd efg": "abcd" (4), " efg" (-2) to "ab" "cd e" "fg": 2, 2 - 1, -1."""
    assert align([4.0, -2.0], [(0, 4), (4, 8)], [(0, 2), (2, 6), (6, 8)]) == [2.0, 1.0, -1.0]


def test_characters_that_nobody_covers_are_passed_over() -> None:
    """The space is no token's: " efg" gives 3 to "efg" alone; the end of turn (1) goes to the last."""
    assert align([2.0, 3.0, 1.0], [(0, 2), (2, 6), (6, 6)], [(0, 2), (3, 6)]) == [2.0, 4.0]
    assert align([5.0], [(2, 3)], [(0, 2), (3, 6)]) == [0.0, 5.0]  # none of it covered: to the next


def test_bytes_of_one_character_share_its_credit() -> None:
    assert align([6.0], [(0, 1)], [(0, 1), (0, 1), (0, 1)]) == [2.0, 2.0, 2.0]


def test_by_character_by_hand() -> None:
    assert by_character([1.0, -3.0, 2.0], [(0, 2), (2, 3), (3, 3)], 3) == [0.5, 0.5, -1.0]


@pytest.mark.parametrize(
    ("credit", "spans", "others", "words"),
    [
        ([1.0], [], [(0, 1)], "1 tokens and places of 0"),
        ([1.0], [(2, 1)], [(0, 3)], "characters 2 to 1"),
        ([math.nan], [(0, 1)], [(0, 1)], "credit nan"),
        ([1.0], [(0, 1)], [], "no token"),
    ],
)
def test_what_does_not_fit_is_refused(credit: Any, spans: Any, others: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        align(credit, spans, others)


@st.composite
def cut(draw: st.DrawFn, text: str) -> list[tuple[int, int]]:
    """A tokenisation of a text: pieces, some of them empty, one perhaps missing."""
    ends = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    bounds = [0, *ends, len(text)]
    found = [(a, b) for a, b in itertools.pairwise(bounds)]
    if len(found) > 1 and draw(st.booleans()):
        found.pop(draw(st.integers(0, len(found) - 1)))
    return found


@settings(max_examples=50)
@given(data=st.data())
def test_the_total_is_preserved_to_the_last_digit(data: st.DataObject) -> None:
    text = data.draw(st.text(min_size=1, max_size=12))
    spans, others = data.draw(cut(text)), data.draw(cut(text))
    credit = data.draw(st.lists(st.floats(-100, 100, width=32), min_size=len(spans), max_size=len(spans)))
    moved = align(credit, spans, others)
    assert math.fsum(moved) == pytest.approx(math.fsum(credit), rel=1e-15, abs=1e-300)
    assert len(moved) == len(others)
    assert math.fsum(by_character(credit, spans, len(text))) == pytest.approx(math.fsum(credit), abs=1e-9)
    if all(start < end for start, end in spans):
        assert align(credit, spans, spans) == pytest.approx(credit, abs=1e-12)
