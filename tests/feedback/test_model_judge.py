"""Judges as a run uses them: verdicts a generation, from models and from a user's code."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.engines.scripted import ScriptedEngine
from tutelage.errors import RecipeError
from tutelage.feedback.judge_prompt import fence, load_judge_prompt
from tutelage.feedback.judges import Listwise, Pairwise, Pointwise
from tutelage.feedback.model_judge import CodeJudge, ModelJudge, Pair
from tutelage.records import Answer, Generation, Message, Prompt, SamplerSettings
from tutelage.rewards.compose import compose

PROMPT = Prompt("p", (Message("user", "Say something."),))


def group(*texts):
    return [
        Generation(f"g{i}", "p", i, t, (1,), (-1.0,), True, SamplerSettings(), "start", 0) for i, t in enumerate(texts)
    ]


def strength(text):
    return float(text.split()[1])


def by_strength(fail=()):
    """Pairs are judged by the number in the text; texts in `fail` break every question they stand in."""

    def script(question):
        body = question.messages[-1].content
        shown = sorted((body.index(fence(t)), t) for t in TEXTS if fence(t) in body)
        if any(t in fail for _, t in shown):
            return Answer(failure="HTTP 500", passing=True)
        odds = strength(shown[0][1]) - strength(shown[1][1])
        p = 1 / (1 + math.exp(-odds))
        return Answer(label_logps={"A": math.log(p), "B": math.log(1 - p)})

    return ScriptedEngine(script)


TEXTS = [f"text {i}" for i in range(6)]


def pairs_judge(engine, opponents=2):
    return ModelJudge("pairs", Pairwise(load_judge_prompt("builtin:pairwise")), engine, opponents=opponents)


@pytest.mark.parametrize("count", range(2, 7))
@pytest.mark.parametrize("opponents", [1, 2, 5])
def test_every_reply_meets_as_many_others_and_nobody_twice(count, opponents):
    (verdicts,) = pairs_judge(by_strength(), opponents).judge([PROMPT], [group(*TEXTS[:count])])
    met = [v.evidence["against"] for v in verdicts]
    assert all(len(set(m)) == len(m) and i not in m for i, m in enumerate(met))
    assert len({len(m) for m in met}) == 1
    assert all(i in met[j] for i, m in enumerate(met) for j in m)


def test_with_all_opponents_better_texts_win_more():
    (verdicts,) = pairs_judge(by_strength(), 5).judge([PROMPT], [group(*TEXTS[:5])])
    values = [v.value for v in verdicts]
    assert values == sorted(values)
    expected = sum(1 / (1 + math.exp(-(0 - j))) for j in range(1, 5)) / 4
    assert values[0] == pytest.approx(expected, abs=1e-6)
    assert sum(values) == pytest.approx(2.5)  # each game hands out one point


def test_a_lone_reply_has_nobody_to_be_compared_with():
    ((verdict,),) = pairs_judge(by_strength()).judge([PROMPT], [group("text 0")])
    assert verdict.value is None and "no other reply" in verdict.reason


@given(st.sets(st.sampled_from(TEXTS[:5]), max_size=5))
def test_a_failed_verdict_never_changes_a_reward(broken):
    """Replies that no failure touched are compared as before; the others have fewer games or no verdict."""
    whole = pairs_judge(by_strength(), 5).judge([PROMPT], [group(*TEXTS[:5])])[0]
    some = pairs_judge(by_strength(fail=broken), 5).judge([PROMPT], [group(*TEXTS[:5])])[0]
    for i, (before, after) in enumerate(zip(whole, some, strict=True)):
        if TEXTS[i] in broken or len(broken) >= 4:
            assert after.value is None
            assert "HTTP 500" in after.reason
            continue
        odds = [
            o
            for j, o in zip(before.evidence["against"], before.evidence["log_odds"], strict=True)
            if TEXTS[j] not in broken
        ]
        assert after.evidence["log_odds"] == odds
        assert after.evidence["unread"] == len(broken)
    ids = [f"g{i}" for i in range(5)]
    rewards = compose(ids, {"pairs": [v.value for v in some]}, {"pairs": 1.0}, [{}] * 5, essential=("pairs",))
    assert all((r.total is None) for r, v in zip(rewards, some, strict=True) if v.value is None)


def test_ratings_and_lists_give_one_verdict_a_reply():
    point = Answer(label_logps={str(i): math.log(0.2) for i in range(1, 6)})
    judge = ModelJudge("rated", Pointwise(load_judge_prompt("builtin:pointwise")), ScriptedEngine(lambda _: point))
    ((first, second),) = judge.judge([PROMPT], [group("a", "b")])
    assert (first.value, second.value) == pytest.approx((0.5, 0.5))
    assert (first.judge, first.subject, second.subject) == ("rated", "g0", "g1")
    (opinion,) = judge.compare([Pair(PROMPT, "a", "b")])
    assert opinion.value == pytest.approx(0.0)

    best = Answer(label_logps={"A": math.log(0.7), "B": math.log(0.2), "C": math.log(0.1)})
    ranked = ModelJudge(
        "listed", Listwise(load_judge_prompt("builtin:listwise"), rotations=3), ScriptedEngine(lambda _: best)
    )
    ((one, two, three),) = ranked.judge([PROMPT], [group("a", "b", "c")])
    assert one.value == pytest.approx(two.value) == pytest.approx(three.value)  # only places were preferred


def test_the_version_changes_with_model_and_words():
    engine = by_strength()
    other = ScriptedEngine(engine.script, version="2")
    words = load_judge_prompt("builtin:pairwise")
    versions = {
        pairs_judge(engine).version,
        pairs_judge(other).version,
        ModelJudge("x", Pairwise(words, thoughts=1), engine).version,
    }
    assert len(versions) == 3


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text(
        "def short(prompt, reply):\n    return -len(reply)\n"
        "def both(prompt, first, second):\n    return 1.0 if first < second else -1.0\n"
        "def first_place(prompt, first, second):\n    return 3.0\n"
        "class Picky:\n"
        "    def __call__(self, prompt, reply):\n"
        "        if reply == 'bad':\n            raise ValueError('too bad')\n"
        "        return {'none': None, 'nan': float('nan'), 'yes': True, 'word': 'x'}.get(reply, 1)\n"
        "def strange(one):\n    return 1\n"
        "number = 3\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_judges", None)


def test_a_function_judges(code):
    ((one, two),) = CodeJudge("short", "my_judges:short").judge([PROMPT], [group("aaa", "a")])
    assert (one.value, two.value) == (-3.0, -1.0)
    (opinion,) = CodeJudge("short", "my_judges:short").compare([Pair(PROMPT, "aaa", "a")])
    assert opinion.value == -2.0


def test_a_function_of_pairs_judges_in_both_orders(code):
    ((one, two),) = CodeJudge("both", "my_judges:both").judge([PROMPT], [group("a", "b")])
    assert one.value > 0.5 > two.value
    (opinion,) = CodeJudge("place", "my_judges:first_place").compare([Pair(PROMPT, "a", "b")])
    assert opinion.value == 0.0 and opinion.evidence == {"position": 3.0, "flipped": True}


def test_what_a_users_code_fails_at_is_an_abstention(code):
    judge = CodeJudge("picky", "my_judges:Picky")
    (verdicts,) = judge.judge([PROMPT], [group("bad", "none", "nan", "yes", "word", "fine")])
    assert [v.value for v in verdicts] == [None] * 5 + [1.0]
    assert "too bad" in verdicts[0].reason
    assert "no finite number" in verdicts[2].reason


@pytest.mark.parametrize("where", ["my_judges:nothing", "nowhere:x", "my_judges:number", "my_judges:strange"])
def test_code_that_cannot_judge_is_refused(code, where):
    with pytest.raises(RecipeError):
        CodeJudge("x", where)
