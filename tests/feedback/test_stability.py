"""Consistency over other ways of asking: by hand, with its guards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutelage.engines.scripted import ScriptedEngine
from tutelage.feedback.model_judge import Pair
from tutelage.feedback.stability import StabilityJudge, perturbed
from tutelage.records import Answer, Generation, Message, Prompt, SamplerSettings


def asked(text):
    return Prompt(text, (Message("system", "Be brief."), Message("user", text)))


def said(*texts):
    return [
        Generation(f"g{i}", "p", i, t, (1,), (-1.0,), True, SamplerSettings(), "start", 0) for i, t in enumerate(texts)
    ]


def embed(texts):
    """Each first word is a meaning of its own."""
    rows = torch.zeros(len(texts), 64)
    for i, text in enumerate(texts):
        rows[i, sum(text.split()[0].lower().encode()) % 64] = 1.0
    return rows


def answering(script):
    return ScriptedEngine(lambda question: script(question.messages[-1].content))


CAPITAL = asked("What is the capital of France?")


def test_by_hand():
    """Four other ways of asking; three are answered with Paris, one (the greeting) with Rome: 3/4, 1/4 and 0."""
    seen = []

    def script(text):
        seen.append(text)
        return Answer("Rome then" if text.startswith("Hello") else "Paris it is")

    judge = StabilityJudge("s", answering(script), embed)
    ((one, two, three),) = judge.judge([CAPITAL], [said("Paris", "Rome", "Oslo")])
    assert [v.value for v in (one, two, three)] == [0.75, 0.25, 0.0]
    assert "3 of 4" in one.reason and len(one.evidence["ways"]) == 4
    assert len(seen) == 4 and CAPITAL.text not in seen
    (opinion,) = judge.compare([Pair(CAPITAL, "Paris", "Rome")])
    assert opinion.value == pytest.approx(4.0 * 0.5)


def test_what_the_model_says_to_everything_is_no_evidence():
    """The guard: 'Sorry' is stable on all three prompts, so it is left out; what differs by prompt stays."""
    prompts = [asked("Who wrote the letter?"), asked("Where is the boat?"), asked("When did it rain?")]
    judge = StabilityJudge("s", answering(lambda text: Answer("Sorry no")), embed)
    told = judge.judge(prompts, [said("Sorry", "Ada")] * 3)
    assert all(group[0].value is None and "other questions" in group[0].reason for group in told)
    assert all(group[1].value == 0.0 for group in told)

    words = {"wrote": "Ada", "boat": "Lisbon", "rain": "Monday"}  # in no longest word, so they are left as they are
    own = answering(lambda text: Answer(next(w for k, w in words.items() if k in text)))
    told = StabilityJudge("s", own, embed).judge(prompts, [said("Ada"), said("Lisbon"), said("Monday")])
    assert [group[0].value for group in told] == [1.0, 1.0, 1.0]


def test_failures_are_missing_never_disagreement():
    """One way fails: the share is over the other three. All but one fail: no opinion, with the reason."""

    def one_fails(text):
        return Answer(failure="HTTP 500") if text.startswith("Hello") else Answer("Paris")

    ((verdict,),) = StabilityJudge("s", answering(one_fails), embed).judge([CAPITAL], [said("Paris")])
    assert verdict.value == 1.0 and "3 of 3" in verdict.reason

    def most_fail(text):
        return Answer("Paris") if text.startswith("Hello") else Answer(failure="HTTP 500")

    ((verdict,),) = StabilityJudge("s", answering(most_fail), embed).judge([CAPITAL], [said("Paris")])
    assert verdict.value is None and "HTTP 500" in verdict.reason


def test_only_paraphrases_that_mean_the_same_are_asked():
    """The first paraphrase keeps the meaning, the second strays, the third is the prompt again."""
    drawn = iter(["What city rules France?", "How tall is it?", CAPITAL.text])
    seen = []

    def script(text):
        if "other words" in text:
            return Answer(next(drawn))
        seen.append(text)
        return Answer("Paris")

    StabilityJudge("s", answering(script), embed, paraphrases=3).judge([CAPITAL], [said("Paris")])
    assert "What city rules France?" in seen and "How tall is it?" not in seen and CAPITAL.text not in seen


def test_a_prompt_that_comes_twice_is_asked_once():
    seen = []

    def script(text):
        seen.append(text)
        return Answer("Paris")

    StabilityJudge("s", answering(script), embed).judge([CAPITAL, CAPITAL], [said("Paris"), said("Rome")])
    assert len(seen) == len(set(seen)) == 4


def test_options_are_in_the_version():
    engine = answering(lambda _: Answer("x"))
    versions = {
        StabilityJudge("s", engine, embed).version,
        StabilityJudge("s", engine, embed, paraphrases=1).version,
        StabilityJudge("s", engine, embed, same=0.9).version,
    }
    assert len(versions) == 3


def test_perturbations_by_hand():
    """The longest word's inner letters change places; the question mark goes."""
    slip, bare = perturbed("Why do bananas bend?")
    assert sorted(slip) == sorted("Why do bananas bend?") and slip != "Why do bananas bend?"
    assert slip.startswith("Why do b") and slip.endswith("s bend?")
    assert bare == "Why do bananas bend"
    assert perturbed("何ですか？")[-1] == "何ですか"
    assert perturbed("") == []


@given(st.text(max_size=60))
def test_perturbations_of_any_text(text):
    found = perturbed(text, [f"Hello! {text}"])
    assert found == perturbed(text, [f"Hello! {text}"])
    assert len(set(found)) == len(found) and text not in found and all(t.strip() for t in found)
