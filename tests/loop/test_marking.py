"""Trigger words: a critic that knows rude words blames them, whatever it reads."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_world import World, tutelage_cli, write_lines

from tutelage.feedback.critic_data import Passage, Reader, families
from tutelage.feedback.text_critic import TextCritic
from tutelage.loop.marking import Candidate, blame, mark, note_triggers, reading, words_of
from tutelage.records import Message, Prompt

pytest_plugins = ["tests.tiny_world"]

NOUNS = ("train", "garden", "letter", "river", "window", "song", "market", "bridge", "lamp", "story")


def rows() -> list[dict[str, str]]:
    rude = [f"The {n} is stupid and so are you, number {i}." for i in range(4) for n in NOUNS]
    kind = [f"The {n} is old and I thank you, number {i}." for i in range(4) for n in NOUNS]
    return [{"text": t, "label": "toxic"} for t in rude] + [{"text": t, "label": "fine"} for t in kind]


@pytest.fixture(scope="module")
def critic() -> TextCritic:
    passages = [Passage(row["text"]) for row in rows()]
    labels = np.array([int(row["label"] == "toxic") for row in rows()])
    features = Reader("words").read(passages, contextual=False)
    return TextCritic.fit(
        features, labels, families(passages), kind="toxicity", labels=("fine", "toxic"), positive=1, source="words",
        contextual=False,
    )  # fmt: skip


def test_words_by_hand() -> None:
    def said(text: str) -> list[str]:
        return [text[a:b] for a, b in words_of(text)]

    assert said("You don't — well-known_fact, 3 times!") == ["You", "don't", "well-known", "fact", "3", "times"]
    assert said("你好 OK吗") == ["你", "好", "OK", "吗"]
    assert said(" … ") == []
    assert len(words_of("a " * 500)) == 160


@given(st.text(max_size=80))
def test_words_lie_apart_in_order_and_hold_every_letter(text: str) -> None:
    spans = words_of(text)
    assert all(a < b for a, b in spans) and all(b <= c for (_, b), (c, _) in itertools.pairwise(spans))
    rest = "".join(c for n, c in enumerate(text) if not any(a <= n < b for a, b in spans))
    assert not any(c.isalnum() and c.isascii() for c in rest)


def test_blame_is_what_the_reward_loses_by_a_word(critic: TextCritic) -> None:
    reader = Reader("words")
    text = "The lamp is stupid, I thank you."
    ((reward, credit),) = blame(reading(critic, reader), [Passage(text)])
    assert reward == pytest.approx(float(critic.reward([Passage(text)], reader)[0]), abs=1e-6)
    for (start, end), value in zip(words_of(text), credit, strict=True):
        without = float(critic.reward([Passage(text[:start] + text[end:])], reader)[0])
        assert value == pytest.approx(reward - without, abs=1e-6)


def test_the_rude_word_is_marked_and_nothing_where_nothing_is(critic: TextCritic) -> None:
    texts = ["The story of the song is stupid, I thank you.", "…", "The lamp is old and I thank you."]
    rude, silent, kind = mark(reading(critic, Reader("words")), [Passage(t) for t in texts], share=0.5)
    assert rude.places[0].text == "stupid" and rude.places[0].score < 0
    assert silent.places == ()
    assert rude.reward < kind.reward
    assert all(rude.passage.text[p.start : p.end] == p.text for p in rude.places)


def test_the_worst_are_marked_and_what_has_no_verdict_is_left_out() -> None:
    """The score is minus the count of "bad": by hand, two of them are two words that cost 1 each."""
    texts = {"a": "bad and bad", "b": "fine", "c": "bad", "d": "so so", "e": "bad bad bad", "f": "bad, unheard"}
    score = lambda passages: [-float(p.text.count("bad")) for p in passages]  # noqa: E731 - a scorer of one line
    prompt = Prompt("p", (Message("user", "How?"),))
    values = dict(zip(texts, [-2.0, 0.0, -1.0, 0.0, -3.0, math.nan], strict=True))
    notes: list[Any] = []
    unit: Any = SimpleNamespace(name="round-1", note=lambda topic, body: notes.append((topic, body)))
    rows = [Candidate(key, prompt, text, values[key]) for key, text in texts.items()]
    found = note_triggers("harm", score, rows, unit, suite="gate")
    assert found == {"e": [(0, 11)], "a": [(0, 3), (8, 11)], "c": [(0, 3)]} or found["e"] == [(0, 7)]
    ((topic, body),) = notes
    assert (topic, body["judge"], body["suite"]) == ("triggers", "harm", "gate")
    assert [row["id"] for row in body["replies"]] == ["e", "a", "c", "b"]
    assert [row["reward"] for row in body["replies"]] == [-3.0, -2.0, -1.0, 0.0]
    assert note_triggers("harm", score, [rows[-1]], unit) == {} and len(notes) == 1


def test_the_built_in_critic_says_which_words_of_an_answer_are_against_it(world: World) -> None:
    """Log-odds of fit: what the panel's verdict on the same reply is, and nothing where the panel abstains."""
    done = world.play("--set", "update.rounds=1")
    assert done.code == 3, done.err
    notes = [n["body"] for n in world.rows("notes", topic="triggers") if n["body"]["judge"] == "fit"]
    values = {v["subject"]: v["value"] for v in world.rows("verdicts", judge="critic")}
    known = [(row, values[row["id"]]) for n in notes if not n["suite"] for row in n["replies"]]
    assert known
    for row, value in known:
        assert row["reward"] == pytest.approx(math.log(value / (1 - value)), abs=0.02)
    answered = [row for n in notes if n["suite"] for row in n["replies"]]
    assert answered and all(math.isfinite(row["reward"]) for row in answered)


def test_from_the_command_line(tmp_path: Path) -> None:
    data, file = write_lines(tmp_path / "rows.jsonl", rows()), tmp_path / "rude.safetensors"
    done = tutelage_cli("critic", "train", data, "--kind", "toxicity", "--features", "words", "--out", file)
    assert done.code == 0, done.err
    texts = write_lines(tmp_path / "texts.jsonl", [{"prompt": "How is it?", "response": "The letter is stupid."}])
    done = tutelage_cli("critic", "mark", file, texts, "--text", "The river is stupid, too.", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [row["text"] for row in found] == ["The letter is stupid.", "The river is stupid, too."]
    assert all("stupid" in [p["text"] for p in row["places"]] for row in found)
    shown = tutelage_cli("critic", "mark", file, "--text", "The river is stupid, too.")
    assert "[stupid]" in shown.out
    for words, says in (((), "no text to mark"), (("--text", "a", "--share", "0"), "share")):
        refused = tutelage_cli("critic", "mark", file, *words)
        assert refused.code == 2 and says in refused.err
    refused = tutelage_cli("critic", "mark", data, "--text", "a")
    assert refused.code == 2 and "rows.jsonl" in refused.err
