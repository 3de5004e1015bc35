"""Answers kept by content, and labels found among listed tokens."""

from __future__ import annotations

import math

import pytest

from tutelage.engines.answers import CachedEngine
from tutelage.engines.labels import label_logps, openings
from tutelage.engines.scripted import ScriptedEngine
from tutelage.errors import BudgetSpent, StoreError
from tutelage.records import Answer, Message, Question


def question(text, **more):
    return Question((Message("user", text),), **more)


def test_the_same_question_is_asked_once(tmp_path):
    said = Answer("yes", (-0.5,), {"A": -0.25, "B": -math.inf})
    engine = ScriptedEngine(lambda _: said)
    cached = CachedEngine(engine, tmp_path / "deep" / "answers.db")
    first = cached.ask([question("a"), question("b"), question("a")])
    again = CachedEngine(engine, tmp_path / "deep" / "answers.db").ask([question("b"), question("a")])
    assert len(engine.asked) == 2
    assert [a.text for a in first] == ["yes"] * 3
    assert again[0].label_logps == {"A": -0.25, "B": -math.inf}
    assert again[0].logps == (-0.5,)
    assert (cached.hits, cached.misses) == (1, 2)


def test_another_engine_opening_or_draw_is_another_question(tmp_path):
    engine = ScriptedEngine(lambda q: Answer(q.opening + str(q.draw)))
    cached = CachedEngine(engine, tmp_path / "a.db")
    answers = cached.ask([question("a"), question("a", opening="x"), question("a", draw=1)])
    assert [a.text for a in answers] == ["0", "x0", "1"]
    CachedEngine(ScriptedEngine(engine.script, version="2"), tmp_path / "a.db").ask([question("a")])
    assert len(engine.asked) == 3


def test_failures_are_not_kept(tmp_path):
    answers = iter([Answer(failure="away", passing=True), Answer("back")])
    cached = CachedEngine(ScriptedEngine(lambda _: next(answers)), tmp_path / "a.db")
    assert cached.ask([question("a")])[0].failure == "away"
    assert cached.ask([question("a")])[0].text == "back"


def test_what_was_answered_before_a_hard_stop_is_kept(tmp_path):
    asked = []

    def script(q):
        asked.append(q)
        if len(asked) > 300:
            raise BudgetSpent("no more money")
        return Answer("ok")

    cached = CachedEngine(ScriptedEngine(script), tmp_path / "a.db")
    questions = [question(str(i)) for i in range(400)]
    with pytest.raises(BudgetSpent):
        cached.ask(questions)
    again = CachedEngine(ScriptedEngine(lambda _: Answer("new")), tmp_path / "a.db").ask(questions)
    assert [a.text for a in again[:256]] == ["ok"] * 256


def test_a_file_that_is_no_database_is_an_error(tmp_path):
    (tmp_path / "a.db").write_text("no database at all, but long enough to be read as one" * 50)
    with pytest.raises(StoreError, match="remove the file"):
        CachedEngine(ScriptedEngine(lambda _: Answer()), tmp_path / "a.db")


def test_what_the_engine_had_when_its_budget_ended_is_kept(tmp_path):
    class Ended(BudgetSpent):
        answers = (Answer("paid for"), None)

    def script(_):
        raise Ended("no more money")

    questions = [question("a"), question("b")]
    with pytest.raises(BudgetSpent):
        CachedEngine(ScriptedEngine(script), tmp_path / "a.db").ask(questions)
    again = CachedEngine(ScriptedEngine(lambda _: Answer("new")), tmp_path / "a.db").ask(questions)
    assert [a.text for a in again] == ["paid for", "new"]


def test_listed_tokens_are_summed_by_label():
    half, quarter, eighth = math.log(0.5), math.log(0.25), math.log(0.125)
    listed = [(" A", half), ("A", quarter), ("**B", eighth), (" the", math.log(0.1))]
    found = label_logps(listed, ("A", "B"))
    assert math.exp(found["A"]) == pytest.approx(0.75)
    assert math.exp(found["B"]) == pytest.approx(0.125)


def test_an_article_is_no_label():
    found = label_logps([(" a", math.log(0.6)), (" B", math.log(0.3))], ("A", "B"))
    assert math.exp(found["B"]) == pytest.approx(0.3)
    assert math.exp(found["A"]) == pytest.approx(0.1)  # what is left over, at most


def test_an_unlisted_label_gets_the_most_it_can_have_had():
    listed = [("A", math.log(0.95)), ("so", math.log(0.001))]
    assert math.exp(label_logps(listed, ("A", "B"))["B"]) == pytest.approx(0.001)
    assert label_logps([("so", -0.1)], ("A", "B")) == {"A": -math.inf, "B": -math.inf}
    assert math.isfinite(label_logps([("A", 0.0)], ("A", "B"))["B"])


def test_a_beginning_counts_only_where_it_tells():
    listed = [("un", math.log(0.5)), ("unh", math.log(0.25)), ("help", math.log(0.125))]
    found = label_logps(listed, ("helpful", "unhelpful", "unclear"))
    assert math.exp(found["helpful"]) == pytest.approx(0.125)
    assert math.exp(found["unhelpful"]) == pytest.approx(0.25)


def test_a_space_before_the_word_is_a_step_on_the_way():
    """By hand: a space with 0.8, then A with 0.5: 0.4; and A at once with 0.1."""
    half = [("A", math.log(0.5)), ("B", math.log(0.25))]
    places = [(" ", math.log(0.8), [(" ", math.log(0.8)), ("A", math.log(0.1))]), ("A", math.log(0.5), half)]
    found = label_logps(openings(places), ("A", "B"))
    assert math.exp(found["A"]) == pytest.approx(0.5)
    assert math.exp(found["B"]) == pytest.approx(0.2)
