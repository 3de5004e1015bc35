"""A critic's reward after every token and as a function of embeddings is the critic's own reward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tutelage.errors import ModelError
from tutelage.feedback.critic_data import Passage, Reader, families
from tutelage.feedback.critic_reward import prefixes, reward_of_critic, spelled, value_of_embeddings
from tutelage.feedback.text_critic import TextCritic
from tutelage.records import Message

NOUNS = ("train", "garden", "letter", "river", "window", "song")
ASKED = (Message("user", "How is it?"),)
SHOWN = [
    Passage("The lamp is stupid, so there.", ASKED),
    Passage("I don't know.", ASKED),
    Passage("", ASKED),
    Passage("The river is old.", (Message("user", "What of the river, then?"),)),
]


def passages(context: tuple[Message, ...] = ASKED) -> list[Passage]:
    said = [f"The {n} is {w} {i}." for w in ("stupid", "old") for i in range(4) for n in NOUNS]
    return [Passage(text, context) for text in said]


def critic_of(
    lm: Any, kind: str, *, contextual: bool = True, labels: tuple[str, ...] = ("fine", "toxic")
) -> TextCritic:
    reader, shown = Reader("trunk", lm), passages()
    features = reader.read(shown, contextual=contextual)
    if kind == "preference":
        half = len(shown) // 2
        rude, kind_ = ({k: v[rows] for k, v in features.items()} for rows in (slice(0, half), slice(half, None)))
        made = TextCritic.fit_pairs(kind_, rude, np.arange(half), source="trunk", contextual=contextual)
    else:
        marks = np.array([int("stupid" in p.text) if len(labels) == 2 else i % 3 for i, p in enumerate(shown)])
        made = TextCritic.fit(
            features, marks, families([Passage(p.text) for p in shown]), kind=kind, labels=labels, positive=1,
            source="trunk", contextual=contextual,
        )  # fmt: skip
    made.marks = reader.marks()
    return made


@pytest.mark.parametrize(
    ("kind", "contextual", "labels"),
    [
        ("toxicity", True, ("fine", "toxic")),
        ("sincerity", False, ("insincere", "sincere")),
        ("evidence", True, ("refutes", "supports", "neither")),
        ("preference", True, ()),
    ],
)
def test_each_prefix_has_the_reward_that_the_critic_gives_it(
    kind: str, contextual: bool, labels: tuple[str, ...], tiny_lm: Any
) -> None:
    """Against a pass of its own for every prefix."""
    critic, reader = critic_of(tiny_lm, kind, contextual=contextual, labels=labels), Reader("trunk", tiny_lm)
    found = prefixes(tiny_lm, SHOWN, reward_of_critic(critic), contextual=contextual, budget=60)
    assert [p.row for p in found] == [0, 1, 2, 3]
    for passage, one in zip(SHOWN, found, strict=True):
        assert one.tokens == tiny_lm.encode_reply(passage.text)[:-1]
        texts = [tiny_lm.decode(one.tokens[:n]) for n in range(len(one.tokens) + 1)]
        alone = critic.reward([Passage(text, passage.context) for text in texts], reader)
        same = [n for n, text in enumerate(texts) if tiny_lm.encode_reply(text)[:-1] == one.tokens[:n]]
        assert len(same) > len(texts) // 2 and same[-1] == len(one.tokens)
        assert one.rewards[same].tolist() == pytest.approx(alone[same].tolist(), abs=2e-4)


@pytest.mark.parametrize("kind", ["toxicity", "preference"])
def test_the_reward_of_the_embeddings_as_they_are(kind: str, tiny_lm: Any) -> None:
    critic = critic_of(tiny_lm, kind)
    wanted = critic.reward(SHOWN, Reader("trunk", tiny_lm))
    texts = sorted(
        (t for part in spelled(tiny_lm, SHOWN, contextual=True, budget=400) for t in part), key=lambda t: t.row
    )
    value, embeds_BTD, keep_BT = value_of_embeddings(tiny_lm, texts, reward_of_critic(critic))
    with torch.no_grad():
        assert value(embeds_BTD).tolist() == pytest.approx(wanted.tolist(), abs=2e-4)
    for b, text in enumerate(texts):
        at = keep_BT[b].nonzero().flatten().tolist()
        assert at == list(range(len(text.context), len(text.context) + len(text.tokens)))


def test_a_critic_of_more_than_the_trunk_is_refused() -> None:
    features = Reader("words").read(passages(), contextual=False)
    marks = np.array([int("stupid" in p.text) for p in passages()])
    critic = TextCritic.fit(
        features, marks, families(passages(())), kind="toxicity", labels=("fine", "toxic"), positive=1, source="words",
        contextual=False,
    )  # fmt: skip
    with pytest.raises(ModelError, match="'words' cannot say"):
        reward_of_critic(critic)
