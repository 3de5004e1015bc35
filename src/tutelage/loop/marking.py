"""Trigger words: the places of a text that made a critic judge it as it did.

Each word is left out in turn and the text is judged again; what the score gains by that is its blame. It holds for
every critic, whatever it reads, and asks nothing of its inner workings; words that stand in for each other hide each
other, and a phrase that only works as a whole is blamed word by word.
Source: Li, Monroe and Jurafsky 2016 (arXiv 1612.08220), erasure of words.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence

from tutelage.credit.spans import Span
from tutelage.credit.triggers import Trigger, triggers
from tutelage.feedback.critic_data import Passage, Reader
from tutelage.feedback.critic_judge import ComparingCritic
from tutelage.feedback.text_critic import TextCritic
from tutelage.loop.bench import Workbench
from tutelage.loop.evaluate import Answers
from tutelage.records import Generation, Prompt
from tutelage.store.ledger import Unit

__all__ = [
    "Candidate", "Marked", "Scorer", "blame", "candidates", "mark", "note_answers", "note_triggers", "reading",
    "scorer_of", "words_of",
]  # fmt: skip

Scorer = Callable[[Sequence[Passage]], Sequence[float]]
"""Log-odds of what is wanted of each text, NaN where there is no verdict."""

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


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A reply that may be marked. `value`: the critic's; the lower, the worse."""

    id: str
    prompt: Prompt
    text: str
    value: float

    @property
    def passage(self) -> Passage:
        """What a critic reads of it."""
        return Passage(self.text, self.prompt.messages)


def reading(critic: TextCritic, reader: Reader) -> Scorer:
    """The rewards of a critic from a file."""
    return lambda passages: [float(value) for value in critic.reward(passages, reader)]


def scorer_of(judge: object) -> Scorer | None:
    """The rewards of a judge that is a critic; other judges say nothing of words."""
    return reading(judge.judging.critic, judge.judging.reader) if isinstance(judge, ComparingCritic) else None


def words_of(text: str) -> list[Span]:
    """Where the words of a text lie; of scripts without spaces, its characters."""
    return [match.span() for match in _WORD.finditer(text)][:_MOST_WORDS]


def blame(score: Scorer, passages: Sequence[Passage]) -> list[tuple[float, list[float]]]:
    """Each text's reward, and for every word of it the reward with the word minus the reward without."""
    asked: list[Passage] = []
    for passage in passages:
        asked.append(passage)
        for start, end in words_of(passage.text):
            asked.append(Passage(passage.text[:start] + passage.text[end:], passage.context))
    said: list[float] = []
    for start in range(0, len(asked), _AT_ONCE):
        said.extend(score(asked[start : start + _AT_ONCE]))
    found, at = [], 0
    for passage in passages:
        count = len(words_of(passage.text))
        whole, without = said[at], said[at + 1 : at + 1 + count]
        found.append((whole, [whole - other for other in without]))
        at += 1 + count
    return found


def mark(score: Scorer, passages: Sequence[Passage], *, share: float = 0.5) -> list[Marked]:
    """The fewest words of each text that carry `share` of the blame.

    Args:
        score: A word is to blame if the text would be better without it.
        passages: Texts in their contexts, of which the critic has a verdict.
        share: Of the blame that the marked words carry, in (0, 1].

    Raises:
        InputError: The share makes no sense.
    """
    found = []
    for passage, (reward, credit) in zip(passages, blame(score, passages), strict=True):
        places = triggers(passage.text, words_of(passage.text), credit, share=share)
        found.append(Marked(passage, reward, tuple(places)))
    return found


def note_triggers(
    name: str, score: Scorer, replies: Iterable[Candidate], unit: Unit, *, suite: str = ""
) -> dict[str, list[Span]]:
    """Keep the trigger words of the replies that a critic likes least.

    Args:
        name: Of the critic.
        score: Its rewards.
        replies: Those of which it has a verdict; without a value (NaN) there is none.
        unit: Which keeps them.
        suite: That they are answers to.

    Returns:
        Their places in the text, by reply, of the replies that the critic is against.
    """
    known = (one for one in replies if not math.isnan(one.value))
    worst = sorted(known, key=lambda one: (one.value, one.id))[:_SHOWN]
    found = mark(score, [one.passage for one in worst])
    shown = [
        {
            "id": one.id,
            "prompt": one.prompt.text,
            "text": one.text,
            "reward": marked.reward,
            "places": [dataclasses.asdict(place) for place in marked.places],
        }
        for one, marked in zip(worst, found, strict=True)
    ]
    if shown:
        unit.note("triggers", {"unit": unit.name, "suite": suite, "judge": name, "replies": shown})
    return {
        one.id: [(place.start, place.end) for place in marked.places]
        for one, marked in zip(worst, found, strict=True)
        if marked.reward < 0 and marked.places
    }


def candidates(
    prompts: Sequence[Prompt], replies_PG: Sequence[Sequence[Generation]], value_PG: Sequence[Sequence[float | None]]
) -> list[Candidate]:
    """The replies of which a critic has a verdict."""
    return [
        Candidate(reply.id, prompt, reply.text, value)
        for prompt, replies, values in zip(prompts, replies_PG, value_PG, strict=True)
        for reply, value in zip(replies, values, strict=True)
        if value is not None
    ]


def note_answers(bench: Workbench, answers: Answers, unit: Unit) -> None:
    """Keep the trigger words of a suite's worst answers by every critic, as of a round's replies."""
    prompts = [item.prompt for item in answers.items]
    critics = {one.name: score for one in bench.judges if (score := scorer_of(one))}
    if "critic" in bench.recipe.feedback.judges:
        critics["fit"] = bench.panel.liking
        with bench.adapter.off():
            bench.panel.prepare(bench.lm, prompts)
    rows = [Passage(text, prompt.messages) for prompt, text in zip(prompts, answers.replies, strict=True)]
    for name, score in critics.items():
        found = zip(prompts, answers.replies, score(rows), strict=True)
        said = [Candidate(prompt.id, prompt, text, value) for prompt, text, value in found]
        note_triggers(name, score, said, unit, suite=answers.suite)
