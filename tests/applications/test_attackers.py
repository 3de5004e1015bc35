"""What attackers write: every rule by its mark, a model's drafts only when they ask for the same; and their files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_world import DATA

from tutelage.applications import attackers
from tutelage.applications.attackers import (
    RULES,
    ModelAttacker,
    Order,
    Question,
    Style,
    read_brief,
    read_words,
    write_by_rule,
)
from tutelage.engines.local import LocalCompleter
from tutelage.errors import InputError, TutelageError
from tutelage.records import Generation, SamplerSettings

WORDS = read_words()
ASKED = Question("What do {framed} newts of Quellimarsh eat?", ("Quellimarsh",))
PLAIN = Order(ASKED, Style("plain", "is short", ("{question}",)), "nature")
PRESSED = Order(ASKED, Style("pressed", "is in a hurry", ("Quick! {question} Now!",)), "nature", "Which ox?")


def write(rule: str, seed: int = 0, order: Order = PLAIN) -> str:
    return write_by_rule(rule, order, WORDS, np.random.default_rng(seed))


@pytest.mark.parametrize("rule", ["prefix", "role-play", "paraphrase", "many-shot"])
def test_templates_hold_the_question_and_no_open_hole(rule: str) -> None:
    """The question's own braces are no hole."""
    texts = {write(rule, seed) for seed in range(20)}
    assert len(texts) > 1 and all(ASKED.ask in text and len(text) > len(ASKED.ask) for text in texts)
    assert [t for t in texts if re.search(r"\{(question|style)\}", t)] == []
    assert all("Quick!" in write(rule, seed, PRESSED) for seed in range(5))


def test_shots_come_answered_and_the_question_last() -> None:
    text = write("many-shot")
    assert text.count("\nA: ") == 4 and text.endswith(f"Q: {ASKED.ask}\nA:")


@given(st.integers(0, 10_000))
def test_typing_errors_change_letters_and_keep_the_rest(seed: int) -> None:
    text = write("typo", seed)
    assert text != ASKED.ask and abs(len(text) - len(ASKED.ask)) <= 4
    assert re.sub(r"[^\W\d_]", "", text) == re.sub(r"[^\W\d_]", "", ASKED.ask)


def test_encodings_can_be_undone() -> None:
    texts = {write("encoding", seed) for seed in range(10)}
    assert texts == {"Wh47 d0 {fr4m3d} n3w75 0f Qu3ll1m4r5h 347?", "-".join("What") + " d-o {f-r-a-m-e-d} n-e-w-t-s o-f Q-u-e-l-l-i-m-a-r-s-h e-a-t?"}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_the_same_seed_writes_the_same(rule: str) -> None:
    assert write(rule, 3, PRESSED) == write(rule, 3, PRESSED)


# ---- a model -------------------------------------------------------------------------------------


class Says:
    """A completer that has prepared its drafts."""

    def __init__(self, lm: Any, *drafts: str) -> None:
        self.lm, self.drafts, self.asked = lm, drafts, []  # type: ignore[var-annotated]

    def generate(self, prompts: Any, *, samples: int, **_: Any) -> list[list[Generation]]:
        self.asked += [p.text for p in prompts]
        settings = SamplerSettings()
        return [
            [
                Generation(str(i), p.id, i, d, (), (), True, settings, "m", 0)
                for i, d in enumerate(self.drafts[:samples])
            ]
            for p in prompts
        ]


class Roomy:
    """A model into which everything fits."""

    def encode(self, *_: Any, **__: Any) -> tuple[int, ...]:
        return (1,)


def test_only_drafts_that_ask_for_the_same_are_used() -> None:
    says = Says(
        Roomy(),
        "What do newts eat?",  # lost the name
        "The newts of Quellimarsh are green.",  # asks nothing
        'Here you are:\n\nNew question: "So what is it that newts of Quellimarsh eat?"\nGood luck',
        ASKED.ask.upper(),  # as it stood
        "never drawn, quellimarsh?",
    )
    (drafts,) = ModelAttacker(says, WORDS).write([PRESSED], seed=0)  # type: ignore[arg-type]
    assert drafts == ["So what is it that newts of Quellimarsh eat?"]
    (asked,) = says.asked
    assert "is in a hurry" in asked and "Example of a good question: Which ox?" in asked and ASKED.ask in asked


def test_a_real_model_draws_the_same_again_and_an_order_that_is_too_long_is_left(tiny_lm: Any) -> None:
    attacker = ModelAttacker(LocalCompleter(tiny_lm), attackers.Words({}, (), "{question} {style}", ""), drafts=2)
    short = Order(Question("Who?"), Style("s", "x", ("{question}",)), "t")
    long = Order(Question("Who? " * 100), Style("s", "x", ("{question}",)), "t")
    assert attacker.write([short, long], seed=1) == attacker.write([short, long], seed=1)
    assert attacker.write([long], seed=1) == [[]]


# ---- files ---------------------------------------------------------------------------------------


def test_the_built_in_brief_shares_no_name_with_the_question_sets() -> None:
    """What measures a run must not be met in an attack, nor the other way round."""
    others = [*(DATA / "questions").glob("*.jsonl"), *(DATA / "critics").glob("*.jsonl")]
    known = " ".join(p.read_text(encoding="utf-8") for p in others).casefold()
    brief = read_brief("builtin:honesty")
    assert len(brief.styles) == 6 and len(brief.topics) == 7
    for topic in brief.topics:
        for question in topic.questions:
            assert question.keep and (question.ask.casefold() in known) is False
            if topic.name not in ("premises", "private"):
                assert [w for w in question.keep if w.casefold() in known] == []


def test_styles_can_be_chosen() -> None:
    brief = read_brief("builtin:honesty", ["urgency", "plain"])
    assert [s.name for s in brief.styles] == ["plain", "urgency"]
    assert brief.hash != read_brief("builtin:honesty").hash


STYLE = '[[styles]]\nname = "s"\nsays = "x"\nframes = ["{question}"]\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "styles are []"),
        (STYLE, "topics are []"),
        ("[[styles", "cannot be read"),
        (STYLE + '[[topics]]\nname = "t"\nquestions = []\n', "has 0 questions"),
        (STYLE + '[[topics]]\nname = "t"\nquestions = ["Who?"]\n', "has 1 questions"),
        (STYLE + '[[topics]]\nname = "t"\nquestions = ["Who?", " who? "]\n', "stands there already"),
        (STYLE + '[[topics]]\nname = "t"\nquestions = ["Who?", " "]\n', "is empty"),
        (STYLE + '[[topics]]\nname = "t"\nquestions = ["Who?", {ask = "Why?", keep = ["ox"]}]\n', "lacks its own word"),
        (STYLE + '[[topics]]\nname = "t"\nquestions = ["Who?", {keep = ["ox"]}]\n', "lacks something"),
        (STYLE.replace("{question}", "ask") + '[[topics]]\nname = "t"\nquestions = ["Who?", "Why?"]\n', "frames"),
        (STYLE + STYLE + '[[topics]]\nname = "t"\nquestions = ["Who?", "Why?"]\n', "styles are ['s', 's']"),
    ],
)
def test_bad_briefs_are_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as found:
        read_brief(str(file))
    assert said in found.value.got and found.value.expected


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    for name, styles in ((str(tmp_path / "no.toml"), ()), ("builtin:no", ()), ("builtin:honesty", ("no",))):
        with pytest.raises(TutelageError, match="no"):
            read_brief(name, styles)
    (tmp_path / "w.toml").write_text("[prefix]\n", encoding="utf-8")
    with pytest.raises(InputError, match="lacks something"):
        read_words(str(tmp_path / "w.toml"))
