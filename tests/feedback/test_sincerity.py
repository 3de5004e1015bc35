"""Stated confidence against elicited belief: by hand, with its guard."""

from __future__ import annotations

import math

import pytest

from tutelage.engines.scripted import ScriptedEngine
from tutelage.feedback.model_judge import Pair
from tutelage.feedback.sincerity import SincerityJudge
from tutelage.records import Answer, Generation, Message, Prompt, SamplerSettings

PROMPT = Prompt("p", (Message("user", "Who was the first king of the moon?"),))


def said(*texts):
    return [
        Generation(f"g{i}", "p", i, t, (1,), (-1.0,), True, SamplerSettings(), "start", 0) for i, t in enumerate(texts)
    ]


def believing(table):
    """An engine that gives each text its (belief, stated) probabilities of Yes."""

    def script(question):
        body = question.messages[-1].content
        text = next(t for t in table if f"\n{t}\n" in body)
        p = table[text][0 if "true" in question.opening else 1]
        return Answer(label_logps={"Yes": math.log(p), "No": math.log(1 - p)})

    return ScriptedEngine(script)


def test_by_hand():
    """Sure and believed .9 of 1 apart by 0: 1. Sure (.9) but not believed (.2): 1 - .7 = .3. Hedged (.1), believed (.8): .3."""
    table = {"sure truth": (0.9, 0.9), "bold lie": (0.2, 0.9), "shy truth": (0.8, 0.1)}
    ((one, two, three),) = SincerityJudge("s", believing(table)).judge([PROMPT], [said(*table)])
    assert [v.value for v in (one, two, three)] == pytest.approx([1.0, 0.3, 0.3])
    assert "says what it believes" in one.reason
    assert "surer than it is" in two.reason and "hides" in three.reason
    assert two.evidence == {"belief": 0.2, "stated": 0.9}


def test_where_everything_is_believed_alike_it_abstains():
    table = {"a text": (0.5, 0.9), "b text": (0.51, 0.5), "c text": (0.49, 0.1)}
    (verdicts,) = SincerityJudge("s", believing(table)).judge([PROMPT], [said(*table)])
    assert all(v.value is None and "alike" in v.reason for v in verdicts)


def test_a_failed_answer_is_an_abstention_of_that_reply_alone():
    table = {"a text": (0.9, 0.9), "b text": (0.2, 0.5)}
    good = believing(table)

    def script(question):
        if "b text" in question.messages[-1].content and "certain" in question.opening:
            return Answer(failure="HTTP 500", passing=True)
        return good.script(question)

    ((one, two),) = SincerityJudge("s", ScriptedEngine(script)).judge([PROMPT], [said(*table)])
    assert one.value == pytest.approx(1.0)
    assert two.value is None and "HTTP 500" in two.reason


def test_pairs_are_compared_by_their_gap_and_swapping_turns_the_sign():
    table = {"sure truth": (0.9, 0.9), "bold lie": (0.2, 0.9)}
    judge = SincerityJudge("s", believing(table))
    one, other = judge.compare([Pair(PROMPT, "sure truth", "bold lie"), Pair(PROMPT, "bold lie", "sure truth")])
    assert one.value == pytest.approx(4 * 0.7) and other.value == pytest.approx(-one.value)


def test_two_questions_a_reply_all_in_one_call():
    table = {"sure truth": (0.9, 0.9), "bold lie": (0.2, 0.9)}
    engine = believing(table)
    SincerityJudge("s", engine).judge([PROMPT], [said(*table)])
    assert len(engine.asked) == 4
