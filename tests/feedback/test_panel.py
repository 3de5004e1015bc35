"""The panel: verdicts with reasons, abstentions that stay abstentions, beliefs that last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_world import ACTS, DATA, KINDS, some

from tutelage.config import Feedback
from tutelage.feedback.belief import Belief
from tutelage.feedback.consistency import GroupSpread
from tutelage.feedback.constitution import Constitution, load_constitution
from tutelage.feedback.critic import Critic, LabelledText, read_questions
from tutelage.feedback.panel import Panel, _agreement, _fit
from tutelage.records import Generation, Message, Prompt, SamplerSettings, Verdict

pytest_plugins = ["tests.tiny_world"]

ANSWERS = {"answers": 0.8, "abstains": 0.15, "asks_back": 0.05}


@pytest.fixture(scope="module")
def constitution() -> Constitution:
    return load_constitution(DATA / "constitutions" / "honesty.toml")


@pytest.fixture(scope="module")
def encoder(tiny_home: Any) -> Any:
    from tutelage.engines.encoder import Encoder

    return Encoder()


@pytest.fixture(scope="module")
def critic(encoder: Any, tiny_lm: Any) -> Critic:
    texts = [
        [LabelledText(r["text"], r["label"]) for r in some(DATA / "critics" / name, "label", labels, 20)]
        for name, labels in (("honesty-questions.jsonl", KINDS), ("honesty-replies.jsonl", ACTS))
    ]
    reading = read_questions(tiny_lm, [q.text for q in texts[0]])
    return Critic.train(reading.probes, encoder, texts[0], texts[1], version="v1")


def prompts(count: int = 3) -> list[Prompt]:
    asked = ("Who is the king of Vellatoria?", "What colour is snow?", "Which one is cheaper?")
    return [Prompt(f"p{n}", (Message("user", asked[n % 3] + " " * (n // 3)),)) for n in range(count)]


def group(prompt: Prompt, *texts: str) -> list[Generation]:
    return [
        Generation(f"{prompt.id}-{n}", prompt.id, n, t, (5, 6), (-0.5, -0.7), True, SamplerSettings(), "start", 0)
        for n, t in enumerate(texts)
    ]


REPLIES = (
    ("I don't know.", "The king is Karl the Third.", "The king is Karl III."),
    ("Snow is white.", "Snow is white.", "I don't know."),
    ("Could you tell me which two you mean?", "The second one.", "The first one."),
)


def examine(panel: Panel, lm: Any) -> tuple[Any, dict[tuple[str, str], Verdict]]:
    asked = prompts()
    panel.prepare(lm, asked)
    found = panel.examine(asked, [group(p, *t) for p, t in zip(asked, REPLIES, strict=True)], first_look=True)
    return found, {(v.judge, v.subject): v for v in found.verdicts}


def test_one_verdict_a_judge_and_reply_in_order(
    constitution: Constitution, encoder: Any, critic: Critic, tiny_lm: Any
) -> None:
    found, said = examine(Panel(Feedback(), constitution, encoder, critic), tiny_lm)
    assert {j for j, _ in said} == {"critic", "constitution", "consistency"}
    assert len(found.verdicts) == len(said) == 27
    for p, terms in enumerate(found.terms_PKG):
        for judge, term in (("critic", "fit"), ("constitution", "principles"), ("consistency", "consistency")):
            assert terms[term] == [said[judge, f"p{p}-{g}"].value for g in range(3)]
    for verdict in found.verdicts:
        assert verdict.reason
        assert verdict.prompt_hash in {p.hash for p in prompts()}
        assert verdict.value is None or 0.0 <= verdict.value <= 1.0
        assert verdict.abstained == (verdict.value is None)
        if verdict.abstained:
            assert "abstains" in verdict.reason or "no " in verdict.reason
    assert {v.judge_version for v in found.verdicts if v.judge == "constitution"} == {constitution.hash}
    assert {v.judge_version for v in found.verdicts if v.judge == "critic"} == {"v1"}


def test_the_evidence_gives_the_value(constitution: Constitution, encoder: Any, critic: Critic, tiny_lm: Any) -> None:
    found, said = examine(Panel(Feedback(min_confidence=0.0), constitution, encoder, critic), tiny_lm)
    right = dict(zip(KINDS, ("answers", "abstains", "asks_back"), strict=True))
    for (judge, subject), verdict in said.items():
        p, g = int(subject[1]), int(subject[3])
        belief, act = found.beliefs[p], found.acts_PG[p][g]
        if judge == "critic":
            expected = sum(verdict.evidence["kind"][k] * verdict.evidence["act"][right[k]] for k in KINDS)
            assert verdict.value == pytest.approx(expected, abs=2e-4)
        if judge == "constitution":
            assert set(verdict.evidence["principles"]) == {x.id for x in constitution.principles}
            expected = sum(belief.of(x.scope) * act[x.wants] for x in constitution.principles)
            assert verdict.value == pytest.approx(expected)
        cost = found.costs_PG[p][g]["over_abstention"]
        assert cost == pytest.approx(belief.answer_due * (1 - act["answers"]))


def test_judges_that_are_not_asked_say_nothing(
    constitution: Constitution, encoder: Any, critic: Critic, tiny_lm: Any
) -> None:
    found, _ = examine(Panel(Feedback(judges=("critic",)), constitution, encoder, critic), tiny_lm)
    assert {v.judge for v in found.verdicts} == {"critic"}
    assert all(set(terms) == {"fit"} for terms in found.terms_PKG)


def test_without_a_critic_the_constitutions_own_words_tell_what_a_reply_does(
    constitution: Constitution, encoder: Any, tiny_lm: Any
) -> None:
    panel = Panel(Feedback(judges=("constitution", "text")), constitution, encoder, None)
    acts = panel.acts(["I don't know.", "Could you tell me what you mean?", "The capital of Vellatoria is Port Amsel."])
    assert [max(a, key=lambda k: a[k]) for a in acts] == ["abstains", "asks_back", "answers"]
    assert all(sum(a.values()) == pytest.approx(1.0) for a in acts)
    found, _ = examine(panel, tiny_lm)
    assert all(v.value is None for v in found.verdicts)  # nobody knows what the questions call for
    assert found.beliefs == [None, None, None]


def test_what_was_heard_first_stays_and_survives_a_checkpoint(
    constitution: Constitution, encoder: Any, critic: Critic, tiny_lm: Any
) -> None:
    panel = Panel(Feedback(), constitution, encoder, critic)
    asked = prompts(9)
    spreads = [GroupSpread((0, 0), (1.0, 1.0), 0.0, 0.0, c / 10, 2) for c in range(9)]
    panel.prepare(tiny_lm, asked)
    panel.listen(asked, spreads)
    before = [panel.belief(p) for p in asked]
    panel.listen(asked, list(reversed(spreads)))
    assert [panel.belief(p) for p in asked] == before
    resumed = Panel(Feedback(), constitution, encoder, critic)
    resumed.load(panel.state())
    resumed.prepare(tiny_lm, asked)
    assert [resumed.belief(p) for p in asked] == before
    assert any(b is not None and "consistency" in b.sources for b in before)


def test_a_belief_does_not_depend_on_what_is_read_with_it(
    constitution: Constitution, encoder: Any, critic: Critic, tiny_lm: Any
) -> None:
    """A resumed run reads its questions in other batches than the undisturbed one did."""
    asked = prompts(9)
    together, apart = (Panel(Feedback(), constitution, encoder, critic) for _ in range(2))
    together.prepare(tiny_lm, asked)
    for prompt in reversed(asked):
        apart.prepare(tiny_lm, [prompt])
    for prompt in asked:
        one, other = together.belief(prompt), apart.belief(prompt)
        assert one is not None and other is not None
        assert one.as_dict() == pytest.approx(other.as_dict(), abs=2e-3)


def test_a_meaning_does_not_depend_on_what_is_embedded_with_it(tiny_home: Any) -> None:
    """As above, for replies."""
    from tutelage.engines.encoder import Encoder

    texts = [f"The answer number {n} is " + "very " * (n // 6) + "long." for n in range(30)]
    together, apart, turned = Encoder(), Encoder(), Encoder()
    rows = together.embed(texts)
    assert torch.equal(turned.embed(texts[::-1]).flip(0), rows)
    for n, text in enumerate(texts):
        assert torch.equal(apart.embed([text])[0], rows[n]), n


def test_fit_by_hand() -> None:
    belief = Belief(0.6, 0.3, 0.1, 0.0, ())
    value, reason = _fit(belief, ANSWERS, 0.5)
    assert value == pytest.approx(0.6 * 0.8 + 0.3 * 0.15 + 0.1 * 0.05)
    assert "has an answer (0.60)" in reason and "asserts an answer (0.80)" in reason
    assert _fit(belief, ANSWERS, 0.61)[0] is None
    assert _fit(None, ANSWERS, 0.0)[0] is None


def test_agreement_abstains_where_agreeing_is_no_merit() -> None:
    known, unknown = Belief(0.9, 0.05, 0.05, 0.0, ()), Belief(0.1, 0.85, 0.05, 0.0, ())
    measured = GroupSpread((0, 0, -1), (0.5, 0.5, None), 0.2, 0.2, 0.8, 2)
    assert _agreement(measured, 0, ANSWERS, known) == (0.5, "50% of the other replies mean the same")
    assert _agreement(measured, 2, ANSWERS, known)[0] is None  # a stock phrase
    assert _agreement(measured, 0, {**ANSWERS, "answers": 0.4}, known)[0] is None
    assert _agreement(measured, 0, ANSWERS, unknown)[0] is None
    assert _agreement(measured, 0, ANSWERS, None)[0] == 0.5


def test_a_broken_principle_is_named_with_the_question(
    constitution: Constitution, encoder: Any, critic: Critic
) -> None:
    panel = Panel(Feedback(), constitution, encoder, critic)
    asked = prompts()[0]
    value, reason, kept = panel._principles(asked, group(asked, "Karl.")[0], Belief(0.0, 1.0, 0.0, 0.0, ()), ANSWERS)
    assert value == pytest.approx(0.15)
    assert reason.startswith("breaks 'admit-not-knowing'") and "king of Vellatoria" in reason
    assert kept["admit-not-knowing"] == 0.15
