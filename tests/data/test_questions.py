"""Tests of the project's own question sets: complete, well-formed, and truly apart from one another.

What the gate and the held-out suite measure is worth nothing if their questions, topics, invented
names or wordings can be met while learning. Each kind of leak is looked for here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import combinations

import pytest

from tutelage.config import Recipe, data_file
from tutelage.engines import weights
from tutelage.engines.encoder import Encoder
from tutelage.loop.outcomes import says
from tutelage.records import SuiteItem
from tutelage.store.prompts import read_prompts, read_suite

RECIPE = Recipe()
FILES = {
    name: data_file(getattr(RECIPE.prompts, name), suffix="questions/*.jsonl") for name in ("train", "gate", "heldout")
}
CRITIC = data_file(RECIPE.feedback.critic_questions, suffix="*.jsonl")
LEAST = {"train": 400, "gate": 200, "heldout": 300}
KINDS = ("answerable", "unanswerable", "ambiguous")

# The largest share of held-out questions whose first five words also open a training question.
# Some openings ("What is the name of") belong to English; a file made from the same patterns would
# share most of its openings.
SHARED_OPENINGS = 0.03

# Capitalised in titles, forms of address or shouting, but ordinary words: sharing one tells nothing.
ORDINARY = frozenset(["a", "i", "in", "of", "professor", "saint", "the", "what", "who", "year"])


def plain(text: str) -> str:
    """Words without case, punctuation, tags and entities, so that no double hides behind a typo's dress."""
    return " ".join(re.findall(r"\w+", re.sub(r"<[^>]*>|&\w+;", " ", text).casefold()))


def names(text: str) -> set[str]:
    """Capitalised words after the first one, a possessive taken off: the names that a question holds."""
    words = re.findall(r"[^\W\d_][\w'\u2019-]*", re.sub(r"<[^>]*>|&\w+;", " ", text))
    called = (re.sub(r"['\u2019]s?$", "", word) for word in words[1:] if word[0].isupper())
    return {name.casefold() for name in called} - ORDINARY


def opening(text: str) -> str | None:
    """The first five words, or None if there are fewer."""
    words = plain(text).split()[:5]
    return " ".join(words) if len(words) == 5 else None


def shared_openings(new: Iterable[str], old: Iterable[str]) -> list[str]:
    known = {opening(text) for text in old} - {None}
    return [text for text in new if opening(text) in known]


@pytest.fixture(scope="module")
def suites() -> dict[str, list[SuiteItem]]:
    return {name: read_suite(path) for name, path in FILES.items()}


@pytest.fixture(scope="module")
def texts(suites: dict[str, list[SuiteItem]]) -> dict[str, list[str]]:
    """Every question by file, the critic's labelled ones included."""
    found = {name: [item.prompt.text for item in items] for name, items in suites.items()}
    labelled = CRITIC.read_text(encoding="utf-8").splitlines()
    return {**found, "critic": [json.loads(line)["text"] for line in labelled]}


# -- the measures themselves ------------------------------------------------------------------------


def test_plain_sees_through_case_punctuation_and_markup() -> None:
    assert plain("<b>WHAT'S</b>&nbsp;the time???") == plain("what's  The time") == "what s the time"


def test_names_are_the_capitalised_words_within_a_sentence() -> None:
    assert names("Which king of <b>Old Zarn</b> met Tulvo's son in Saint-Orb?") == {
        "old",
        "zarn",
        "tulvo",
        "saint-orb",
    }
    assert names("Who was the Professor, I ask?") == set(), "ordinary words are no names"


def test_openings() -> None:
    assert opening("Tell me, what is THE time?") == "tell me what is the"
    assert opening("What time is it?") is None
    assert shared_openings(["What is the name of Zarn?", "Why?"], ["what is the name of it", "Why?"]) == [
        "What is the name of Zarn?"
    ]


# -- each file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_there_are_enough_questions_of_every_kind_and_form(name: str, suites: dict[str, list[SuiteItem]]) -> None:
    items = suites[name]
    assert len(items) >= LEAST[name]
    assert {item.form for item in items} == {"plain", "malformed"}
    for kind in KINDS:
        forms = [item.form for item in items if item.kind == kind]
        assert len(forms) >= len(items) / 10, f"{kind} questions are too few for a rate"
        assert forms.count("malformed") >= 10, f"malformed {kind} questions are too few"
        assert forms.count("plain") > forms.count("malformed")
    assert all(item.group for item in items)


@pytest.mark.parametrize("name", FILES)
def test_no_question_stands_twice_in_a_file(name: str, texts: dict[str, list[str]]) -> None:
    seen = [plain(text) for text in texts[name]]
    assert [text for text in set(seen) if seen.count(text) > 1] == []


@pytest.mark.parametrize("name", FILES)
def test_only_answerable_questions_have_references(name: str, suites: dict[str, list[SuiteItem]]) -> None:
    assert [i.prompt.id for i in suites[name] if bool(i.references) != (i.kind == "answerable")] == []


@pytest.mark.parametrize("name", FILES)
def test_no_question_holds_its_own_answer(name: str, suites: dict[str, list[SuiteItem]]) -> None:
    told = [
        (item.prompt.text, reference)
        for item in suites[name]
        for reference in item.references
        if says(item.prompt.text, reference) or f" {plain(reference)} " in f" {plain(item.prompt.text)} "
    ]
    assert told == []


@pytest.mark.parametrize("name", FILES)
def test_both_readers_see_the_same_prompts(name: str, suites: dict[str, list[SuiteItem]]) -> None:
    assert read_prompts(FILES[name]) == [item.prompt for item in suites[name]]


# -- between the files ------------------------------------------------------------------------------


def test_ids_are_unique_over_all_files(suites: dict[str, list[SuiteItem]]) -> None:
    ids = [item.prompt.id for items in suites.values() for item in items]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(("one", "other"), list(combinations([*FILES, "critic"], 2)))
def test_no_question_stands_in_two_files(one: str, other: str, texts: dict[str, list[str]]) -> None:
    assert {plain(text) for text in texts[one]} & {plain(text) for text in texts[other]} == set()


@pytest.mark.parametrize(("one", "other"), list(combinations(FILES, 2)))
def test_no_fact_topic_in_two_files(one: str, other: str, suites: dict[str, list[SuiteItem]]) -> None:
    topics = {n: {i.group for i in suites[n] if i.kind == "answerable"} for n in (one, other)}
    assert min(map(len, topics.values())) >= 5
    assert topics[one] & topics[other] == set()


@pytest.mark.parametrize(("one", "other"), list(combinations(FILES, 2)))
def test_no_invented_name_in_two_files(one: str, other: str, suites: dict[str, list[SuiteItem]]) -> None:
    asked = {n: [i.prompt.text for i in suites[n] if i.group == "nonexistent"] for n in (one, other)}
    called = {n: {name for text in asked[n] for name in names(text)} for n in asked}
    words = {n: {word for text in asked[n] for word in plain(text).split()} | called[n] for n in asked}
    assert all(len(called[n]) >= len(asked[n]) for n in asked), "too few names found: is the pattern broken?"
    # Against all words of the other file, because a malformed question may write a name in small letters.
    assert called[one] & words[other] == set()
    assert called[other] & words[one] == set()


def test_few_held_out_questions_open_like_a_training_question(texts: dict[str, list[str]]) -> None:
    shared = shared_openings(texts["heldout"], texts["train"])
    assert len(shared) <= SHARED_OPENINGS * len(texts["heldout"]), shared


def test_no_labelled_question_says_what_a_suite_asks(
    suites: dict[str, list[SuiteItem]], texts: dict[str, list[str]]
) -> None:
    """The critic may know topics, but no suite's question in other words."""
    if not weights.have(weights.EMBEDDED_ENCODER):
        pytest.skip("needs the embedded encoder: run `tutelage fetch`")
    encoder = Encoder()
    asked = [item.prompt.text for name in ("gate", "heldout") for item in suites[name]]
    near_S = (encoder.embed(asked) @ encoder.embed(texts["critic"]).T).amax(1)
    assert [q for q, near in zip(asked, near_S.tolist(), strict=True) if near > 0.9] == []
