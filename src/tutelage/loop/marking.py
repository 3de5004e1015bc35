"""Trigger words: the places of a text that made a critic judge it as it did.

Each word is left out in turn and the text is judged again; what the score gains by that is its blame. It holds for
every critic, whatever it reads, and asks nothing of its inner workings; words that stand in for each other hide each
other, and a phrase that only works as a whole is blamed word by word.
Source: Li, Monroe and Jurafsky 2016 (arXiv 1612.08220), erasure of words.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from tutelage.credit.spans import Span
from tutelage.credit.triggers import Trigger, triggers
from tutelage.feedback.critic_data import Passage, Reader
from tutelage.feedback.critic_judge import ComparingCritic
from tutelage.feedback.text_critic import TextCritic
from tutelage.records import Generation, Prompt, Verdict
from tutelage.store.ledger import Unit

__all__ = ["Marked", "blame", "mark", "note_triggers", "words_of"]

_MOST_WORDS = 160  # of a text, its first: critics read no further than about as many
_SHOWN = 4  # replies a judge and batch, its worst: marking asks about each of their words
_AT_ONCE = 512  # texts read together: bounds the features held
# Scripts written without spaces (Thai to Lao, Burmese, Khmer, kana, Han): each character is a word.
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_LETTERS = rf"(?:(?![{_ALONE}])[^\W_])+"
_WORD = re.compile(rf"[{_ALONE}]|{_LETTERS}(?:['’\-]{_LETTERS})*")


@dataclasses.dataclass(frozen=True)
class Marked:
    """A text, what a critic thinks of it, and what in it is to blame.

    Args:
        passage: The text in its context.
        reward: Log-odds of what is wanted; below zero where the critic is against the text.
        places: Its trigger words, worst first; `score` is what the reward gains without them, below zero.
    """

    passage: Passage
    reward: float
    places: tuple[Trigger, ...]


def words_of(text: str) -> list[Span]:
    """Where the words of a text lie; of scripts without spaces, its characters."""
    return [match.span() for match in _WORD.finditer(text)][:_MOST_WORDS]


def blame(critic: TextCritic, reader: Reader, passages: Sequence[Passage]) -> list[tuple[float, list[float]]]:
    """Each text's reward, and for every word of it the reward with the word minus the reward without.

    Raises:
        ModelError: `reader` reads with other models than the critic learned on.
    """
    asked: list[Passage] = []
    for passage in passages:
        asked.append(passage)
        for start, end in words_of(passage.text):
            asked.append(Passage(passage.text[:start] + passage.text[end:], passage.context))
    said: list[float] = []
    for start in range(0, len(asked), _AT_ONCE):
        said.extend(critic.reward(asked[start : start + _AT_ONCE], reader).tolist())
    found, at = [], 0
    for passage in passages:
        count = len(words_of(passage.text))
        whole, without = said[at], said[at + 1 : at + 1 + count]
        found.append((whole, [whole - other for other in without]))
        at += 1 + count
    return found


def mark(critic: TextCritic, reader: Reader, passages: Sequence[Passage], *, share: float = 0.5) -> list[Marked]:
    """The fewest words of each text that carry `share` of the blame.

    Args:
        critic: Costs and rewards alike: a word is to blame if the text would be better without it.
        reader: What reads its features.
        passages: Texts in their contexts.
        share: Of the blame that the marked words carry, in (0, 1].

    Raises:
        InputError: The share makes no sense.
        ModelError: `reader` reads with other models than the critic learned on.
    """
    found = []
    for passage, (reward, credit) in zip(passages, blame(critic, reader, passages), strict=True):
        places = triggers(passage.text, words_of(passage.text), credit, share=share)
        found.append(Marked(passage, reward, tuple(places)))
    return found


def note_triggers(
    judge: object,
    prompts: Sequence[Prompt],
    replies_PG: Sequence[Sequence[Generation]],
    given_PG: Sequence[Sequence[Verdict]],
    unit: Unit,
) -> dict[str, list[Span]]:
    """Keep the trigger words of the replies that a critic likes least; other judges say nothing of words.

    Returns:
        Their places in the text, by reply, of the replies that the critic is against.
    """
    if not isinstance(judge, ComparingCritic):
        return {}
    rows = [
        (verdict.value, reply.id, prompt, reply)
        for prompt, replies, given in zip(prompts, replies_PG, given_PG, strict=True)
        for reply, verdict in zip(replies, given, strict=True)
        if verdict.value is not None
    ]
    worst = sorted(rows, key=lambda row: row[:2])[:_SHOWN]
    critic, reader = judge.judging.critic, judge.judging.reader
    found = mark(critic, reader, [Passage(reply.text, prompt.messages) for *_, prompt, reply in worst])
    shown = [
        {
            "id": reply.id,
            "prompt": prompt.text,
            "text": reply.text,
            "reward": one.reward,
            "places": [dataclasses.asdict(place) for place in one.places],
        }
        for one, (*_, prompt, reply) in zip(found, worst, strict=True)
    ]
    unit.note("triggers", {"unit": unit.name, "judge": judge.name, "replies": shown})
    return {
        reply.id: [(place.start, place.end) for place in one.places]
        for one, (*_, reply) in zip(found, worst, strict=True)
        if one.reward < 0 and one.places
    }
