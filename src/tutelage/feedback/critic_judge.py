"""A critic from labelled data as a judge of a recipe: verdicts on replies, log-odds on pairs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from tutelage.engines.weights import EMBEDDED_POLICY
from tutelage.feedback.asking import Opinion
from tutelage.feedback.critic_data import Passage, Reader
from tutelage.feedback.model_judge import Pair
from tutelage.feedback.text_critic import CriticJudge, TextCritic
from tutelage.records import Cost, Generation, Prompt, Verdict

__all__ = ["ComparingCritic", "open_critic"]


def open_critic(name: str, file: Path, *, model: str = EMBEDDED_POLICY) -> ComparingCritic:
    """Load a critic and what reads its features.

    Args:
        name: Name of the judge.
        file: What `tutelage critic train` wrote.
        model: The language model on whose trunk it learned, if it reads one. It is loaded for itself:
            the policy's own trunk is busy learning.

    Raises:
        ModelError: The file is no critic, or the model is another than the one it learned on.
    """
    critic = TextCritic.load(file)
    return ComparingCritic(name, CriticJudge(critic, Reader.open(critic.source, model=model)))


class ComparingCritic:
    """A critic's judge under a name of the recipe, which also compares pairs.

    The value on a pair is the difference of the two texts' rewards: for a critic of preference that is
    the Bradley-Terry log-odds.
    """

    def __init__(self, name: str, judging: CriticJudge) -> None:
        self.name, self.judging = name, judging
        self.version = judging.critic.version

    def judge(self, prompts: Sequence[Prompt], generations_PG: Sequence[Sequence[Generation]]) -> list[list[Verdict]]:
        """One verdict a generation."""
        return [
            [dataclasses.replace(v, judge=self.name) for v in group]
            for group in self.judging.judge(prompts, generations_PG)
        ]

    def compare(self, pairs: Sequence[Pair]) -> list[Opinion]:
        """One opinion a pair; no position is shown, so none is preferred."""
        if not pairs:
            return []
        started = time.perf_counter()
        passages = [Passage(text, p.prompt.messages) for p in pairs for text in (p.first, p.second)]
        critic = self.judging.critic
        rewards = [round(float(x), 4) for x in critic.reward(passages, self.judging.reader)]
        cost = Cost((time.perf_counter() - started) / len(pairs))
        return [
            Opinion(a - b, f"{critic.kind}: {a:+.2f} against {b:+.2f} nats", {"first": a, "second": b}, cost=cost)
            for a, b in zip(rewards[::2], rewards[1::2], strict=True)
        ]
