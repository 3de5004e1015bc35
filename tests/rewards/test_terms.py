"""Text terms by hand; all within [0, 1], for any text in any script."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.rewards.terms import format_term, length_term, repetition_term


@pytest.mark.parametrize(
    ("tokens", "finished", "wanted"),
    [
        (1, True, 1.0),
        (12, True, 1.0),  # half the limit of 24
        (18, True, 0.5),  # half of the second half
        (24, True, 0.0),
        (24, False, 0.0),  # cut off
        (3, False, 0.0),
    ],
)
def test_length_by_hand(tokens: int, finished: bool, wanted: float) -> None:
    assert length_term(tokens, finished=finished, limit=24) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        ((), 1.0),
        ((1, 2), 1.0),  # too short for three in a row
        ((1, 2, 3, 4), 1.0),
        ((1, 1, 1, 1, 1), 1 / 3),  # three times the same of three
        ((1, 2, 3, 1, 2, 3), 3 / 4),  # 123 231 312 123
    ],
)
def test_repetition_by_hand(tokens: tuple[int, ...], wanted: float) -> None:
    assert repetition_term(tokens) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Paris.", 1.0),
        ("東京です。", 1.0),
        ("The answer is 3 < 5.", 1.0),
        ("I can't say, as the user did not tell me.", 1.0),
        ("", 0.0),
        (" \n\t", 0.0),
        ("```python", 0.5),
        ("<|im_start|>assistant", 0.5),
        ("<b>Paris</b>", 0.5),
        ("Assistant: Paris.", 0.5),
        ("def answer(x):", 0.5),
    ],
)
def test_format_by_hand(text: str, wanted: float) -> None:
    assert format_term(text) == wanted


@given(
    tokens=st.lists(st.integers(0, 5), max_size=30),
    finished=st.booleans(),
    limit=st.integers(1, 40),
    text=st.text(),
)
def test_terms_stay_within_their_range(tokens: list[int], finished: bool, limit: int, text: str) -> None:
    for value in (
        length_term(len(tokens), finished=finished, limit=limit), repetition_term(tuple(tokens)), format_term(text)
    ):  # fmt: skip
        assert 0.0 <= value <= 1.0


@given(tokens=st.integers(1, 50), more=st.integers(0, 20), limit=st.integers(1, 40))
def test_longer_is_never_better(tokens: int, more: int, limit: int) -> None:
    shorter, longer = (length_term(n, finished=True, limit=limit) for n in (tokens, tokens + more))
    assert longer <= shorter
