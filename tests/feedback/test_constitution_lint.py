"""Warnings of the lint: each on a constitution that deserves it, none on one that does not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.config import data_file
from tutelage.feedback.constitution import Constitution, Principle, load_constitution
from tutelage.feedback.constitution_lint import likeness, lint

TEXTS = ("Name the source of every number.", "Be kind to the person who asks.", "Use short sentences.")


def principle(number: int = 0, **changes: Any) -> Principle:
    plain: dict[str, Any] = {
        "id": f"p{number}", "text": TEXTS[number % 3], "weight": 1.0, "scope": "any", "wants": "",
        "critique": 'To "{question}" the reply "{reply}" is wrong.', "openings": (), "fallback": "", "examples": (),
    }  # fmt: skip
    return Principle(**{**plain, **changes})


def warnings(*principles: Principle) -> list[str]:
    return lint(Constitution("c", principles))


def test_sound_constitutions_are_not_complained_of() -> None:
    assert warnings(principle(0), principle(1), principle(2)) == []
    assert lint(load_constitution(data_file("builtin:honesty", suffix="constitutions/*.toml"))) == []
    assert warnings(principle(0, weight=9.0)) == []  # the only one may have all the weight


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text": "x" * 801}, "takes 801 bytes"),
        ({"text": "言" * 300}, "takes 900 bytes"),
        ({"critique": ""}, "no critique"),
        ({"critique": TEXTS[0]}, "no critique"),
        ({"critique": "{answer} is wrong"}, "{answer}"),
        ({"weight": 9.0}, "holds 82% of the weight"),
        ({"examples": (("p", "Yes.", "yes. "),)}, "both bad and good"),
        ({"openings": ("Sorry,",), "examples": (("p", "sorry, no", "No."),)}, "opens revisions with 'Sorry,'"),
        ({"fallback": "No.", "examples": (("p", "no.", "Maybe."),)}, "falls back on"),
    ],
)
def test_each_fault_has_its_one_warning(changes: dict[str, Any], says: str) -> None:
    (found,) = warnings(principle(0, **changes), principle(1), principle(2))
    assert says in found
    assert "'p0'" in found


def test_the_heaviest_share_is_eighty_percent() -> None:
    assert warnings(principle(0, weight=8.0), principle(1), principle(2)) == []  # exactly 8 of 10


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Never reveal the private data of users.", "Never reveal  private data of the users."),
        ("答えを知らないときは、知らないと正直に言うこと。", "答えを知らないときは、知らないと正直に言うことです。"),
        ("Скажи прямо, если ответа никто не знает.", "Скажи, если ответа прямо никто не знает."),
    ],
)
def test_near_duplicates_are_seen_in_any_language(a: str, b: str) -> None:
    (found,) = warnings(principle(0, text=a), principle(1, text=b))
    assert "nearly the same" in found


def test_one_word_in_a_common_frame_makes_a_principle_of_its_own() -> None:
    a, b = "The better reply is more concise than the other.", "The better reply is more polite than the other."
    assert warnings(principle(0, text=a), principle(1, text=b)) == []


def test_one_trigram_count_by_hand() -> None:
    """ "ab" and "ac" between two spaces on each side: 4 trigrams each, one ("  a") in common: 2 * 1 / 8."""
    assert likeness("ab", "ac") == pytest.approx(0.25)


@given(st.text(max_size=30), st.text(max_size=30))
def test_likeness_is_symmetric_and_between_nothing_and_one(a: str, b: str) -> None:
    assert 0.0 <= likeness(a, b) == likeness(b, a) <= 1.0
    assert likeness(a, a) == 1.0


def test_what_one_principle_calls_good_another_must_not_call_bad() -> None:
    one = principle(0, examples=(("Who?", "Me.", "I cannot say."),))
    other = principle(1, examples=(("who?", "i cannot say.", "You."),))
    (found,) = warnings(one, other)
    assert "'p0' calls good what 'p1' calls bad" in found
    elsewhere = principle(1, examples=(("Where?", "I cannot say.", "There."),))
    assert warnings(one, elsewhere) == []


def test_a_long_whole_is_seen() -> None:
    many = [principle(n, text=f"{n} " + chr(97 + n) * 700, id=f"q{n}") for n in range(9)]
    (found,) = warnings(*many)
    assert "all texts together" in found
