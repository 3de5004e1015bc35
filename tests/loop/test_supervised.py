"""The supervised stage: what is kept, what is revised, what teaches nothing, in which order it is learned."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.tiny_world import DATA, World

from tutelage.config import Recipe
from tutelage.feedback.belief import Belief
from tutelage.feedback.constitution import load_constitution
from tutelage.feedback.panel import Findings
from tutelage.loop.bench import Silent
from tutelage.loop.supervised import imitate, revise, schedule
from tutelage.policy.learner import TrainGroup
from tutelage.records import Generation, Message, Prompt, SamplerSettings, Target

pytest_plugins = ["tests.tiny_world"]

ANSWERS = {"answers": 0.9, "abstains": 0.06, "asks_back": 0.04}
ABSTAINS = {"answers": 0.05, "abstains": 0.9, "asks_back": 0.05}
ASKS = {"answers": 0.05, "abstains": 0.05, "asks_back": 0.9}
SURE = {
    "answerable": Belief(0.9, 0.05, 0.05, 0.0, ()),
    "unanswerable": Belief(0.05, 0.9, 0.05, 0.0, ()),
    "ambiguous": Belief(0.05, 0.05, 0.9, 0.0, ()),
}


def test_the_schedule_by_hand() -> None:
    assert [schedule(s, 10) for s in (0, 1, 2, 3, 4, 9)] == pytest.approx([0.25, 0.45, 0.6, 0.7, 0.6, 0.1])
    assert schedule(99, 100) == pytest.approx(0.1)
    assert schedule(0, 0) == pytest.approx(0.25)


def prompt() -> Prompt:
    return Prompt("p1", (Message("user", "Who is the king of Vellatoria?"),))


def reply(text: str, sample: int = 0, *, finished: bool = True) -> Generation:
    return Generation(f"g{sample}", "p1", sample, text, (7, 8), (-1.0, -1.0), finished, SamplerSettings(), "start", 0)


class Bench:
    """A bench whose panel and engine say what the test wants."""

    def __init__(self, draft: Generation | None = None, act: dict[str, float] | None = None) -> None:
        self.recipe = Recipe()
        self.progress = Silent()
        self.version = "start"
        self.openings: list[str] = []
        constitution = load_constitution(DATA / "constitutions" / "honesty.toml")
        self.panel = SimpleNamespace(constitution=constitution, acts=lambda texts: [act] * len(texts))
        self.lm = SimpleNamespace(encode_reply=lambda text: tuple(text.encode()))
        self.completer = SimpleNamespace(generate=self._generate)
        self._draft = draft

    def _generate(self, prompts: list[Prompt], *, opening: list[str], **_: Any) -> list[list[Generation]]:
        self.openings += opening
        assert self._draft is not None
        return [[self._draft] for _ in prompts]


def targets(bench: Bench, replies: list[Generation], acts: list[dict[str, float]], belief: Belief | None) -> list[Any]:
    findings = Findings([], [], [], [acts], [belief], [])
    return [(t, tokens) for _, t, tokens in revise(bench, [prompt()], [replies], findings)]  # type: ignore[arg-type]


def test_a_good_answer_is_kept_with_the_tokens_that_were_drawn() -> None:
    ((target, tokens),) = targets(Bench(), [reply("Karl.")], [ANSWERS], SURE["answerable"])
    assert (target.origin, target.text, target.principle) == ("own", "Karl.", "answer-what-you-know")
    assert target.weight == pytest.approx(0.9)
    assert tokens == (7, 8)


def test_the_first_reply_that_keeps_the_principle_is_taken() -> None:
    replies = [reply("Karl."), reply("I don't know.", 1), reply("No idea.", 2)]
    ((target, _),) = targets(Bench(), replies, [ANSWERS, ABSTAINS, ABSTAINS], SURE["unanswerable"])
    assert (target.origin, target.text) == ("own", "I don't know.")
    assert target.weight == pytest.approx(0.9)


def test_a_made_up_answer_is_revised_by_the_model_itself() -> None:
    bench = Bench(reply("I don't know the king of Vellatoria."), ABSTAINS)
    ((target, tokens),) = targets(bench, [reply("Karl.")], [ANSWERS], SURE["unanswerable"])
    assert (target.origin, target.principle) == ("revised", "admit-not-knowing")
    assert target.text == "I don't know the king of Vellatoria."
    assert bench.openings == ["I don't know"]
    assert "king of Vellatoria" in target.reason
    assert tokens == tuple(target.text.encode())


@pytest.mark.parametrize(
    ("draft", "act"),
    [
        (reply("I don't know the king but it is Karl"), ANSWERS),
        (reply("I don't know the", finished=False), ABSTAINS),
        (reply("I don't know, it is Karl."), ABSTAINS),
    ],
    ids=["does something else", "cut off", "goes on"],
)
def test_a_bad_revision_is_replaced_by_the_principles_own_words(draft: Generation, act: dict[str, float]) -> None:
    ((target, _),) = targets(Bench(draft, act), [reply("Karl.")], [ANSWERS], SURE["unanswerable"])
    assert (target.origin, target.text) == ("revised", "I don't know.")


def test_an_unclear_question_is_asked_back() -> None:
    bench = Bench(reply("Could you tell me which one?"), ASKS)
    ((target, _),) = targets(bench, [reply("Karl.")], [ANSWERS], SURE["ambiguous"])
    assert (target.principle, target.text) == ("ask-when-unclear", "Could you tell me which one?")
    assert bench.openings == ["Could you tell me"]


def test_nobody_invents_an_answer_for_the_model() -> None:
    assert targets(Bench(), [reply("I don't know.")], [ABSTAINS], SURE["answerable"]) == []


@pytest.mark.parametrize("belief", [None, Belief(0.35, 0.33, 0.32, 0.0, ())], ids=["none", "unsure"])
def test_a_question_that_the_panel_is_unsure_of_teaches_nothing(belief: Belief | None) -> None:
    assert targets(Bench(), [reply("Karl.")], [ANSWERS], belief) == []


@pytest.mark.parametrize("strength", [0.0, 5.0, 50.0])
def test_own_answers_are_anchored_and_all_else_is_imitated(strength: float) -> None:
    """Beliefs of 0.8 and 0.9: the anchor weighs 0.8 a token; what is imitated weighs 0.9 a token."""
    seen: list[TrainGroup] = []

    def step(groups: list[TrainGroup], _objective: object, **_: Any) -> dict[str, float]:
        seen.extend(groups)
        return {"loss": 0.0}

    bench: Any = Bench()
    bench.recipe = Recipe.model_validate({"supervised": {"anchor": strength}})
    bench.encode, bench.restart_learner = lambda _: (1, 2), lambda _: None
    bench.learner = SimpleNamespace(step=step)
    ids = {p.wants: p.id for p in bench.panel.constitution.principles}
    rows = [("own", "answers", 0.8, (3, 4)), ("own", "abstains", 0.9, (5,)), ("revised", "asks_back", 0.9, (6, 7))]
    targets = [(prompt(), Target("p1", "", origin, ids[wants], "", w), tokens) for origin, wants, w, tokens in rows]
    imitate(bench, targets, SimpleNamespace(metrics=lambda *_: None))  # type: ignore[arg-type]
    found = {g.completions[0]: (g.advantage[0], g.anchor[0] if g.anchor else None) for g in seen}
    held = ((0.0, 0.0), (0.8 * strength,) * 2) if strength else ((0.8, 0.8), None)
    assert found == {(3, 4): held, (5,): ((0.9,), None), (6, 7): ((0.9, 0.9), None)}


def test_what_a_run_imitated_is_in_its_ledger(played: World) -> None:
    kept = played.rows("targets", unit="supervised")
    replies = {(g["prompt_id"], g["text"]) for g in played.rows("generations", unit="supervised")}
    assert kept
    for target in kept:
        assert target["origin"] in ("own", "revised") and target["reason"] and target["weight"] > 0
        if target["origin"] == "own":
            assert (target["prompt_id"], target["text"]) in replies
    steps = [m["step"] for m in played.rows("metrics", unit="supervised") if m["stage"] == "supervised"]
    recipe = played.load()
    assert steps == list(range(-(-len(kept) // recipe.supervised.batch) * recipe.supervised.epochs))


def test_the_first_reply_is_greedy_and_the_others_are_drawn(played: World) -> None:
    for row in played.rows("generations", unit="supervised"):
        cold = row["settings"]["temperature"] == 0.0
        assert cold == (row["settings"]["temperature"] != played.load().supervised.temperature)
    settings = [r["settings"]["temperature"] for r in played.rows("generations", unit="supervised")]
    assert settings.count(0.0) == len({r["prompt_id"] for r in played.rows("generations", unit="supervised")})


def test_every_reply_has_its_own_id(played: World, tmp_path: Path) -> None:
    ids = [g["id"] for g in played.rows("generations")]
    assert len(ids) == len(set(ids))
    verdicts = {v["subject"] for v in played.rows("verdicts")}
    assert verdicts == set(ids)
