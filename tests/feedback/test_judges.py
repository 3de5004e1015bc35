"""Judges of pairs, ratings and lists: arithmetic by hand, planted biases, and what cannot be read."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.engines.scripted import ScriptedEngine
from tutelage.errors import RecipeError
from tutelage.feedback.asking import read_labels, settle
from tutelage.feedback.constitution import Constitution, Principle
from tutelage.feedback.judge_prompt import fence, load_judge_prompt
from tutelage.feedback.judges import Listwise, Pairwise, Pointwise
from tutelage.records import Answer, Message, Prompt

PAIR = load_judge_prompt("builtin:pairwise")
POINT = load_judge_prompt("builtin:pointwise")
LIST = load_judge_prompt("builtin:listwise")
PROMPT = Prompt("p", (Message("user", "Which is the capital?"),))
REAL = st.floats(-6, 6)


def odds_answer(first, mass=0.9):
    """Label log-probs with log-odds `first` for A."""
    p = 1 / (1 + math.exp(-first))
    return Answer(label_logps={"A": math.log(mass * p), "B": math.log(mass * (1 - p))})


def place(question, text):
    """Where a fenced text stands in the question."""
    return question.messages[-1].content.index(fence(text))


def biased(strengths, bias):
    """A judge of pairs with known preferences and a constant liking for the first place."""

    def script(question):
        first, second = sorted(strengths, key=lambda text: place(question, text))
        return odds_answer(strengths[first] - strengths[second] + bias)

    return ScriptedEngine(script)


@given(REAL, REAL, REAL)
def test_logit_averaging_gives_back_the_true_preference_under_any_position_bias(a, b, bias):
    engine = biased({"good one": a, "other one": b}, bias)
    (opinion,) = settle(engine, [Pairwise(PAIR).compare(PROMPT, "good one", "other one")])
    assert opinion.value == pytest.approx(a - b, abs=1e-6)
    assert opinion.evidence["position"] == pytest.approx(bias, abs=1e-4)


def test_averaging_probabilities_would_not():
    """By hand: s = 1, b = 2 gives (sig(3) + sig(-1)) / 2 = 0.611, not sig(1) = 0.731."""
    (opinion,) = settle(biased({"x": 1.0, "y": 0.0}, 2.0), [Pairwise(PAIR).compare(PROMPT, "x", "y")])
    sig = lambda v: 1 / (1 + math.exp(-v))  # noqa: E731
    assert (sig(3) + sig(-1)) / 2 == pytest.approx(0.611, abs=1e-3)
    assert sig(opinion.value) == pytest.approx(0.731, abs=1e-3)
    assert opinion.evidence["flipped"]  # the bias is larger than the preference


@given(REAL, REAL, REAL)
def test_swapping_the_pair_flips_the_sign(a, b, bias):
    engine = biased({"x": a, "y": b}, bias)
    one, other = settle(engine, [Pairwise(PAIR).compare(PROMPT, "x", "y"), Pairwise(PAIR).compare(PROMPT, "y", "x")])
    assert one.value == pytest.approx(-other.value)


def test_one_unreadable_order_is_an_abstention_that_keeps_the_raw_text():
    answers = iter([odds_answer(2.0), Answer(text="I would rather not say.")])
    (opinion,) = settle(ScriptedEngine(lambda _: next(answers)), [Pairwise(PAIR).compare(PROMPT, "x", "y")])
    assert opinion.abstained
    assert "rather not say" in opinion.raw
    assert "no label" in opinion.reason


@pytest.mark.parametrize(
    "answer",
    [
        Answer(failure="the server is away", passing=True),
        Answer(text=""),
        Answer(text="A or B"),
        Answer(text="Both are fine"),
        Answer(text="This is a tie"),
        Answer(label_logps={"A": math.log(0.01), "B": math.log(0.01)}),
        Answer(label_logps={"A": -math.inf, "B": -math.inf}),
    ],
)
def test_what_cannot_be_read_is_no_number(answer):
    (opinion,) = settle(ScriptedEngine(lambda _: answer), [Pairwise(PAIR).compare(PROMPT, "x", "y")])
    assert opinion.value is None
    assert opinion.reason.startswith("abstains: ")


@pytest.mark.parametrize(
    "text", ["A", " A.", "A: since B is wrong", "**A**", "A: because", "The better reply is A", '"A"']
)
def test_a_label_in_words_counts_nine_to_one(text):
    logps, _ = read_labels(Answer(text=text), ("A", "B"))
    assert logps[0] - logps[1] == pytest.approx(math.log(9))


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ('{"reason": "x", "verdict": "B"}', True),
        ('Sure! {"verdict": "b"} done', True),
        ('{"verdict": true}', False),
        ('{"verdict": "C"}', False),
        ('{"verdict": ["A"]}', False),
        ('{"verdict": "A"', False),
        ("[" * 100_000, False),
        ("{" * 100_000 + "}", False),
        ('{"verdict": null}', False),
    ],
)
def test_json_is_read_strictly(text, read):
    logps, why = read_labels(Answer(text=text), ("A", "B"), output="json")
    assert (logps is not None) == read
    assert read or "could be read" in why


def test_a_label_that_the_engine_did_not_list_is_unlikely_not_impossible():
    logps, _ = read_labels(Answer(label_logps={"A": -0.1, "B": -math.inf}), ("A", "B"))
    assert all(math.isfinite(x) for x in logps)
    assert logps[0] > logps[1]


def test_the_expected_rating_by_hand():
    """Ratings 1..5 with chances .1 .2 .4 .2 .1 have the mean 3, half way: 0.5; all on 5 is 1."""
    even = {str(i + 1): math.log(p) for i, p in enumerate((0.1, 0.2, 0.4, 0.2, 0.1))}
    best = {str(i): math.log(1e-9) for i in range(1, 5)} | {"5": math.log(0.99)}
    answers = iter([Answer(label_logps=even), Answer(label_logps=best)])
    judge = Pointwise(POINT)
    one, two = settle(ScriptedEngine(lambda _: next(answers)), [judge.rate(PROMPT, "x"), judge.rate(PROMPT, "y")])
    assert one.value == pytest.approx(0.5)
    assert two.value == pytest.approx(1.0, abs=1e-6)
    assert one.evidence["ratings"] == pytest.approx([0.1, 0.2, 0.4, 0.2, 0.1])


def test_a_list_in_every_rotation_loses_its_liking_for_places():
    """Score of a reply = its strength + what the place is worth; over all rotations places cancel."""
    strengths = {"first text": 0.0, "second text": 1.0, "third text": 2.0}
    worth = (3.0, 0.5, 0.0)

    def script(question):
        order = sorted(strengths, key=lambda text: place(question, text))
        scores = [strengths[text] + worth[i] for i, text in enumerate(order)]
        total = math.log(sum(map(math.exp, scores)))
        return Answer(label_logps={x: s - total for x, s in zip("ABC", scores, strict=True)})

    (opinions,) = settle(ScriptedEngine(script), [Listwise(LIST, rotations=3).rank(PROMPT, list(strengths))])
    values = [o.value for o in opinions]
    assert values[1] - values[0] == pytest.approx(1.0)
    assert values[2] - values[1] == pytest.approx(1.0)


def test_a_list_of_one_or_of_too_many_is_an_abstention():
    engine = ScriptedEngine(lambda _: pytest.fail("asked"))
    for count in (1, 27):
        (opinions,) = settle(engine, [Listwise(LIST).rank(PROMPT, [str(i) for i in range(count)])])
        assert len(opinions) == count
        assert all(o.abstained for o in opinions)


def principle(name, weight):
    return Principle(name, f"Be {name}.", weight, "any", "answers", "", (), "", ())


def test_principles_apart_are_weighed():
    """By hand: kind (weight 3) says +1, brief (weight 1) says -2: (3 - 2) / 4 = 0.25."""
    values = Constitution("two", (principle("kind", 3.0), principle("brief", 1.0)))

    def script(question):
        sign = 1 if place(question, "x") < place(question, "y") else -1
        return odds_answer(sign * (1.0 if "Be kind." in question.messages[-1].content else -2.0))

    engine = ScriptedEngine(script)
    (opinion,) = settle(engine, [Pairwise(PAIR, values, each=True).compare(PROMPT, "x", "y")])
    assert opinion.value == pytest.approx(0.25)
    assert opinion.evidence["kind"] == pytest.approx(1.0)
    assert opinion.evidence["brief"] == pytest.approx(-2.0)
    assert len(engine.asked) == 4
    (whole,) = settle(engine, [Pairwise(PAIR, values).compare(PROMPT, "x", "y")])
    assert "Be kind." in engine.asked[-1].messages[-1].content and "Be brief." in engine.asked[-1].messages[-1].content
    assert whole.value is not None


def test_a_reason_is_asked_first_and_stands_before_the_verdict():
    def script(question):
        if not question.labels:
            return Answer(text=f"thought {question.draw}")
        return odds_answer(1.0 if "thought 0" in question.opening else 3.0)

    engine = ScriptedEngine(script)
    (opinion,) = settle(engine, [Pairwise(PAIR, thoughts=2).compare(PROMPT, "x", "y")])
    texts = [q for q in engine.asked if not q.labels]
    verdicts = [q for q in engine.asked if q.labels]
    assert len(texts) == 4 and len(verdicts) == 4
    assert texts[0].messages[-1].content.endswith("Do not say yet which one is better.")
    assert "Answer with A or B" not in texts[0].messages[-1].content
    assert all(q.opening.endswith(PAIR.opening) and q.opening != PAIR.opening for q in verdicts)
    # Each order has the log-odds (1 + 3) / 2 for its first place: all bias, no preference.
    assert opinion.value == pytest.approx(0.0)
    assert opinion.evidence["position"] == pytest.approx(2.0)


def test_a_failed_reason_is_an_abstention():
    engine = ScriptedEngine(lambda q: odds_answer(1.0) if q.labels else Answer(failure="away"))
    (opinion,) = settle(engine, [Pairwise(PAIR, thoughts=1).compare(PROMPT, "x", "y")])
    assert opinion.abstained


def test_all_open_questions_go_out_in_one_call():
    sizes = []

    class Counting(ScriptedEngine):
        def ask(self, questions):
            sizes.append(len(questions))
            return super().ask(questions)

    engine = Counting(lambda q: odds_answer(0.0) if q.labels else Answer(text="so"))
    settle(engine, [Pairwise(PAIR, thoughts=1).compare(PROMPT, str(i), "z") for i in range(5)])
    assert sizes == [10, 10]


def test_words_of_another_kind_are_refused():
    with pytest.raises(RecipeError, match="words of a pointwise"):
        Pairwise(POINT)


def test_the_version_names_all_that_decides_a_verdict():
    values = Constitution("one", (principle("kind", 1.0),))
    versions = {
        Pairwise(PAIR).version,
        Pairwise(PAIR, values).version,
        Pairwise(PAIR, values, each=True).version,
        Pairwise(PAIR, thoughts=1).version,
        Pointwise(POINT).version,
        Listwise(LIST, rotations=2).version,
        Listwise(LIST, rotations=3).version,
    }
    assert len(versions) == 7


def test_json_judges_ask_for_a_schema():
    words = load_judge_prompt("builtin:pairwise-json")
    engine = ScriptedEngine(lambda _: Answer(text=json.dumps({"reason": "r", "verdict": "A"})))
    (opinion,) = settle(engine, [Pairwise(words).compare(PROMPT, "x", "y")])
    assert engine.asked[0].schema["properties"]["verdict"]["enum"] == ["A", "B"]
    assert opinion.value == pytest.approx(0.0)  # it always says A: nothing but position
    assert opinion.evidence["position"] == pytest.approx(math.log(9), abs=1e-3)
