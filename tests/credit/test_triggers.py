"""Places that made a text bad: chosen by share, merged, grown to words where the script has spaces."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.credit.triggers import Trigger, triggers
from tutelage.errors import InputError


def cut(text: str, *pieces: str) -> list[tuple[int, int]]:
    """Places of pieces that make up the text."""
    assert "".join(pieces) == text
    spans, at = [], 0
    for piece in pieces:
        spans.append((at, at + len(piece)))
        at += len(piece)
    return spans


TEXT = "You utter fool, go away please"
SPANS = cut(TEXT, "You", " utter", " fo", "ol", ",", " go", " away", " please")
CREDIT = [0.5, -1.0, -3.0, -1.0, 0.0, -0.5, -0.5, 1.0]  # negative mass: 6


def found(**options: Any) -> list[tuple[str, float]]:
    return [(t.text, t.score) for t in triggers(TEXT, SPANS, CREDIT, **options)]


def test_by_hand() -> None:
    """Half of 6 is " fo", which grows to "fool" with -4 less what the space took (a third of -3)."""
    (worst,) = triggers(TEXT, SPANS, CREDIT, share=0.5)
    assert worst == Trigger(10, 14, "fool", pytest.approx(-2.0 - 1.0))
    assert TEXT[worst.start : worst.end] == worst.text


def test_a_higher_share_names_more_and_neighbours_become_one() -> None:
    assert [t for t, _ in found(share=0.75)] == ["utter fool"]
    assert [t for t, _ in found(share=1.0)] == ["utter fool", "go away"]
    assert [t for t, _ in found(share=1.0, gap=0)] == ["fool", "utter", "away", "go"]
    assert [t for t, _ in found(share=1.0, gap=2)] == ["utter fool, go away"]


def test_without_growing_a_place_is_what_its_token_covers() -> None:
    assert found(share=0.5, whole_words=False) == [(" fo", pytest.approx(-3.0))]


def test_a_word_whose_rest_outweighs_is_no_trigger() -> None:
    spans = cut("unkind word", "un", "kind", " word")
    assert triggers("unkind word", spans, [-1.0, 2.0, 0.0]) == []
    assert [t.text for t in triggers("unkind word", spans, [-1.0, 0.5, 0.0])] == ["unkind"]


def test_nothing_negative_nothing_found() -> None:
    assert triggers("all good", cut("all good", "all", " good"), [0.0, 1.0]) == []
    assert triggers("", [], []) == []


@pytest.mark.parametrize(
    ("text", "pieces", "worst", "wanted"),
    [
        ("你是笨蛋吗", ("你", "是", "笨", "蛋", "吗"), 2, "笨"),  # no spaces: no growing
        ("คนโง่มาก", ("คน", "โง", "่", "มาก"), 1, "โง่"),  # ... but a tone mark stays on its letter
        ("Ты дурак!", ("Ты", " дур", "ак", "!"), 1, "дурак"),
        ("you're don’t", ("you", "'re", " don", "’t"), 3, "don’t"),
        ("مرحبا غبي", ("مرحبا", " غ", "بي"), 1, "غبي"),
        ("naïve fool", ("nai", "\u0308", "ve", " fool"), 0, "nai\u0308ve"),
    ],
)
def test_words_in_many_scripts(text: str, pieces: tuple[str, ...], worst: int, wanted: str) -> None:
    text = "".join(pieces)
    credit = [-1.0 if n == worst else 0.0 for n in range(len(pieces))]
    assert [t.text for t in triggers(text, cut(text, *pieces), credit)] == [wanted]


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.1}, {"gap": -1}])
def test_options_without_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="share"):
        found(**options)


@given(
    text=st.text(alphabet="ab c,世界é", min_size=1, max_size=20),
    data=st.data(),
    share=st.floats(0.1, 1.0),
    gap=st.integers(0, 3),
)
def test_places_are_apart_negative_and_carry_their_credit(text: str, data: Any, share: float, gap: int) -> None:
    spans = [(c, c + 1) for c in range(len(text))]
    credit = data.draw(st.lists(st.floats(-1, 1, width=32), min_size=len(text), max_size=len(text)))
    got = triggers(text, spans, credit, share=share, gap=gap)
    assert all(t.text == text[t.start : t.end] and t.score < 0 for t in got)
    assert all(t.score == pytest.approx(math.fsum(credit[t.start : t.end])) for t in got)
    assert [t.score for t in got] == sorted(t.score for t in got)
    in_order = sorted(got, key=lambda t: t.start)
    assert all(a.end <= b.start for a, b in itertools.pairwise(in_order))
    alone = triggers(text, spans, credit, share=share, gap=0, whole_words=False)
    mass = math.fsum(v for v in credit if v < 0)
    assert math.fsum(t.score for t in alone) <= share * mass + 1e-9
