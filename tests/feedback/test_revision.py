"""Critique and revision: chains by hand, failures that end them, and text that cannot become an order."""

from __future__ import annotations

from collections import Counter

import pytest

from tutelage.engines.scripted import ScriptedEngine
from tutelage.errors import InputError, RecipeError
from tutelage.feedback.asking import settle
from tutelage.feedback.constitution import Constitution, Principle
from tutelage.feedback.judge_prompt import fence
from tutelage.feedback.revision import Revised, RevisionStep, choose_principles, revise, revision_words
from tutelage.records import Answer, Message, Prompt, Question

WORDS = revision_words()
PROMPT = Prompt("p", (Message("user", "Wer war das?"),))


def principle(name: str, weight: float = 1.0) -> Principle:
    return Principle(name, f"Be {name}.", weight, "any", "", "", (), "", ())


KIND, BRIEF = principle("kind", 3.0), principle("brief")
VALUES = Constitution("two", (KIND, BRIEF))


def asked_of(question: Question) -> str:
    """What a question is for: first, critique, revise or direct."""
    text = question.messages[-1].content
    if question.messages == PROMPT.messages:
        return "first"
    if "Do not write a new reply yet" in text:
        return "critique"
    return "revise" if "Critique:" in text else "direct"


def writer(question: Question) -> Answer:
    """Each text names what it was made for, and how many were before it."""
    return Answer(f"{asked_of(question)} {len(engine.asked)} – naïve 本")


engine = ScriptedEngine(writer)


@pytest.fixture(autouse=True)
def fresh():
    engine.asked.clear()


def run(*principles: Principle, **options) -> Revised:
    (found,) = settle(engine, [revise(WORDS, PROMPT, principles, **options)])
    return found


def test_two_rounds_by_hand():
    found = run(KIND, BRIEF)
    assert [asked_of(q) for q in engine.asked] == ["first", "critique", "revise", "critique", "revise"]
    texts = [
        f"{kind} {n} – naïve 本" for n, kind in enumerate(("first", "critique", "revise", "critique", "revise"), 1)
    ]
    assert found.steps == (
        RevisionStep("kind", texts[0], texts[1], texts[2]),
        RevisionStep("brief", texts[2], texts[3], texts[4]),
    )
    assert (found.first, found.final, found.failure) == (texts[0], texts[4], "")
    assert fence(texts[0]) in engine.asked[1].messages[-1].content
    assert fence(texts[1]) in engine.asked[2].messages[-1].content
    assert "Be kind." in engine.asked[2].messages[-1].content
    assert "Be kind." not in engine.asked[4].messages[-1].content


def test_without_a_critique_the_reply_is_revised_at_once():
    found = run(KIND, reply="Ich.", critique=False)
    assert [asked_of(q) for q in engine.asked] == ["direct"]
    assert found.first == "Ich."
    assert found.steps[0].critique == ""


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (Answer(failure="away", passing=True), "away"),
        (Answer(" \n"), "empty"),
        (Answer("cut", (-0.1,) * 256), "cut off after 256 tokens"),
        (Answer("<<<0123456789ab\n\n0123456789ab>>>"), "empty"),
    ],
)
@pytest.mark.parametrize(("turn", "steps"), [(1, 0), (3, 0), (5, 1)])
def test_what_fails_ends_the_chain_and_nothing_is_invented(bad, why, turn, steps):
    flawed = ScriptedEngine(lambda q: bad if len(flawed.asked) == turn else writer(q))
    (found,) = settle(flawed, [revise(WORDS, PROMPT, (KIND, BRIEF))])
    assert why in found.failure
    assert len(found.steps) == steps
    assert len(flawed.asked) == turn
    assert (found.final is None) == (steps == 0)
    assert (found.first == "") == (turn == 1)


def test_a_critique_that_is_cut_off_is_still_a_critique():
    script = ScriptedEngine(lambda q: Answer("x", (-0.1,) * q.max_new_tokens if asked_of(q) == "critique" else ()))
    (found,) = settle(script, [revise(WORDS, PROMPT, (KIND,))])
    assert found.failure == "" and found.steps[0].critique == "x"


def test_a_repeated_fence_is_taken_off():
    script = ScriptedEngine(lambda q: Answer(fence("Better.") if asked_of(q) == "direct" else "x"))
    (found,) = settle(script, [revise(WORDS, PROMPT, (KIND,), critique=False)])
    assert found.final == "Better."


def test_a_hole_or_a_mark_in_a_reply_stays_text():
    reply = "{principle} {critique} " + fence("x")
    run(KIND, reply=reply)
    for question in engine.asked:
        assert fence(reply) in question.messages[-1].content


def test_failed_chains_do_not_hold_up_the_others():
    script = ScriptedEngine(lambda q: Answer(failure="no") if "bad" in q.messages[-1].content else Answer("fine"))
    found = settle(script, [revise(WORDS, PROMPT, (KIND, BRIEF), reply=text) for text in ("good", "bad", "good too")])
    assert [len(r.steps) for r in found] == [2, 0, 2]


def test_all_principles_stand_in_turn_in_every_round():
    found = choose_principles(VALUES, PROMPT, rounds=2, order="all", seed=0)
    assert found == [KIND, BRIEF, KIND, BRIEF]


def test_random_principles_follow_their_weights_and_the_seed():
    """Weights 3 and 1 over 400 prompts of 3 draws: three quarters, within 4 standard errors (0.0125 each)."""
    prompts = [Prompt(str(n), (Message("user", f"{n}?"),)) for n in range(400)]
    draws = [choose_principles(VALUES, p, rounds=3, order="random", seed=5) for p in prompts]
    counts = Counter(p.id for chosen in draws for p in chosen)
    assert counts["kind"] / 1200 == pytest.approx(0.75, abs=0.05)
    assert draws == [choose_principles(VALUES, p, rounds=3, order="random", seed=5) for p in prompts]
    assert draws != [choose_principles(VALUES, p, rounds=3, order="random", seed=6) for p in prompts]
    assert draws[7] == choose_principles(VALUES, prompts[7], rounds=3, order="random", seed=5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('critique = "{prompt} {reply}"', "lacks {principle}"),
        ('direct = "{prompt} {reply} {principle}"', "lacks"),
        ("reviser = 1", "'reviser'"),
        ("critique = 3", "'critique'"),
        ("critique = ", "cannot be read"),
    ],
)
def test_words_that_lack_something_are_refused(tmp_path, text, says):
    path = tmp_path / "w.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        revision_words(str(path))
    assert says in str(caught.value) and "w.toml" in str(caught.value)
    with pytest.raises(RecipeError):
        revision_words("builtin:nothing")
