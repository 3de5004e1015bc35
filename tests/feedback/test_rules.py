"""Judges by rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.feedback.rules import figures_given


@pytest.mark.parametrize(
    ("prompt", "reply", "share"),
    [
        ("Who?", "I don't know.", 1.0),
        ("How many?", "There are 12.", 0.0),
        ("What happened in 1969?", "In 1969, 12 people met.", 0.5),
        ("Is 1,200 more than 3.5?", "Yes, 1,200 is more than 3.5.", 1.0),
        ("Is 1,200 more?", "Yes, 200 more.", 0.0),  # part of a figure is another figure
        ("On 1969-07-20?", "On 1969-07-20 at 20:17.", 0.5),
        ("Who?", "", 1.0),
        ("٣?", "It is ٣, or ٤.", 0.5),  # digits of any script
    ],
)
def test_by_hand(prompt: str, reply: str, share: float) -> None:
    assert figures_given(prompt, reply) == share


@given(prompt=st.text(max_size=60), reply=st.text(max_size=60))
def test_it_is_a_share_and_a_reply_that_repeats_the_question_is_without_fault(prompt: str, reply: str) -> None:
    assert 0.0 <= figures_given(prompt, reply) <= 1.0
    assert figures_given(prompt, prompt) == 1.0
