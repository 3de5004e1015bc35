"""Trigger words: a critic that knows rude words blames them, whatever it reads."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_world import tutelage_cli, write_lines

from tutelage.feedback.critic_data import Passage, Reader, families
from tutelage.feedback.text_critic import TextCritic
from tutelage.loop.marking import blame, mark, words_of

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
    ((reward, credit),) = blame(critic, reader, [Passage(text)])
    assert reward == pytest.approx(float(critic.reward([Passage(text)], reader)[0]), abs=1e-6)
    for (start, end), value in zip(words_of(text), credit, strict=True):
        without = float(critic.reward([Passage(text[:start] + text[end:])], reader)[0])
        assert value == pytest.approx(reward - without, abs=1e-6)


def test_the_rude_word_is_marked_and_nothing_where_nothing_is(critic: TextCritic) -> None:
    texts = ["The story of the song is stupid, I thank you.", "…", "The lamp is old and I thank you."]
    rude, silent, kind = mark(critic, Reader("words"), [Passage(t) for t in texts], share=0.5)
    assert rude.places[0].text == "stupid" and rude.places[0].score < 0
    assert silent.places == ()
    assert rude.reward < kind.reward
    assert all(rude.passage.text[p.start : p.end] == p.text for p in rude.places)


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
