"""What `credit.py` trains for: rewards of which it is known what each word brings."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from grpo_vs_trl import TOPICS, questions, short_words

from tutelage.credit.spans import Span
from tutelage.engines.local import LocalCompleter
from tutelage.feedback.critic_data import Passage, Reader
from tutelage.feedback.text_critic import TextCritic
from tutelage.records import Message, Prompt, SamplerSettings

HEARD = 512  # replies of the start model that a critic learns from


@dataclasses.dataclass(frozen=True)
class Task:
    """What is measured, and what is rewarded.

    Args:
        worth: Of a text: what is measured on unseen prompts.
        words: Of a text and the mean worth of its group: what each word brings above a mean one, and where it stands.
        level: To be reached.
        judged: Whether the reward is a critic's that learned the worth from labels; otherwise it is the worth.
    """

    worth: Callable[[str], float]
    words: Callable[[str, float], list[tuple[float, Span]]]
    level: float
    judged: bool


@functools.cache
def _analyser() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        sys.exit("the task 'sentiment' needs VADER: pip install vaderSentiment==3.3.2, or take --task short")
    return SentimentIntensityAnalyzer()


def sentiment(text: str) -> float:
    """VADER's compound score, from -1 to 1."""
    return float(_analyser().polarity_scores(text)["compound"])


def _valences(text: str, _mean: float) -> list[tuple[float, Span]]:
    """By VADER's lexicon, four being the most."""
    words = re.finditer(r"[\w'-]+", text)
    return [(_analyser().lexicon.get(m.group().lower(), 0.0) / 4.0, m.span()) for m in words]


def _short(text: str, mean: float) -> list[tuple[float, Span]]:
    words = [m.span() for m in re.finditer(r"\S+", text)]
    return [(((end - start <= 4) - mean) / len(words), (start, end)) for start, end in words]


TASKS = {
    "sentiment": Task(sentiment, _valences, 0.85, judged=False),
    "critic": Task(sentiment, _valences, 0.85, judged=True),
    "short": Task(short_words, _short, 0.85, judged=False),
}


def asked(texts: list[str]) -> list[Prompt]:
    """Prompts of these texts."""
    return [Prompt(text, (Message("user", text),)) for text in texts]


def heard(completer: LocalCompleter, seed: int, tokens: int, count: int = HEARD) -> list[Passage]:
    """Replies of the start model, which count as no step."""
    prompts = asked(questions(len(TOPICS)))
    settings = SamplerSettings(1.0, max_new_tokens=tokens)
    drawn = completer.generate(
        prompts, samples=count // len(prompts), settings=settings, seed=1000 * seed, version="start"
    )
    return [Passage(reply.text) for group in drawn for reply in group]


def critic_of(task: Task, lm: Any, completer: LocalCompleter, seed: int, tokens: int) -> TextCritic:
    """A critic on tokens that learned from labels, good or bad, of whole replies of the start model."""
    told = [(shown, task.worth(shown.text)) for shown in heard(completer, seed, tokens)]
    clear = [(shown, worth > 0) for shown, worth in told if abs(worth) >= 0.05]  # as VADER's authors draw the lines
    return fit_critic(lm, [shown for shown, _ in clear], [good for _, good in clear], seed=seed)


def fit_critic(lm: Any, passages: Sequence[Passage], good: Sequence[bool], *, seed: int = 0) -> TextCritic:
    """A critic on tokens of texts that are good or not."""
    features = Reader("tokens", lm).read(passages, contextual=False)
    return TextCritic.fit(
        features, np.array(good, np.int64), np.arange(len(good)), kind="sincerity", labels=("bad", "good"),
        positive=1, source="tokens", contextual=False, seed=seed,
    )  # fmt: skip
