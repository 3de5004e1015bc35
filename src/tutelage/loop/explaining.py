"""Which tokens of a text made a critic's reward, and where the critic looked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy.special import softmax

from tutelage.credit.attribution import gradient_input, integrated_gradients, mean_embedding
from tutelage.credit.spans import Span, align, token_spans
from tutelage.engines.load import LanguageModel
from tutelage.errors import ModelError
from tutelage.feedback.attentive import Attentive
from tutelage.feedback.critic_data import Passage, laid_out, log_lengths
from tutelage.feedback.critic_heads import centred
from tutelage.feedback.critic_reward import Reward, prefixes, spelled, value_of_embeddings
from tutelage.feedback.text_critic import TextCritic, log_odds
from tutelage.feedback.token_states import read_states

__all__ = ["Explained", "SignedMethod", "attended", "explain", "onto"]

SignedMethod = Literal["prefix", "integrated-gradients", "gradient-input"]


@dataclasses.dataclass(frozen=True)
class Explained:
    """What made a text's reward.

    Args:
        tokens: The text's own, as the trunk reads it.
        scores: In the reward's unit, one a token.
        reward: Of the whole text.
        change: What the scores explain: the reward of the text less that of an empty or blanked one.
        shares: Where the critic looked, one a token; they sum to one. Empty where it has no attention of its own.
    """

    tokens: tuple[int, ...]
    scores: tuple[float, ...]
    reward: float
    change: float
    shares: tuple[float, ...] = ()

    @property
    def defect(self) -> float:
        """How far the scores are from summing to the change."""
        return abs(self.change - math.fsum(self.scores))


def explain(
    method: SignedMethod,
    lm: LanguageModel,
    passages: Sequence[Passage],
    reward: Reward,
    *,
    contextual: bool = True,
    steps: int = 16,
    budget: int = 512,
) -> list[Explained]:
    """Scores of each text's tokens by the reward of a head on the trunk.

    Args:
        method: `prefix` reads the reward after every token; `integrated-gradients` and `gradient-input` follow its
            gradient from the text with every token's embedding replaced by the vocabulary's mean.
        lm: The trunk; whatever it wears is off.
        passages: Texts in their contexts.
        reward: Of features and length.
        contextual: Whether contexts are read.
        steps: Points of the path.
        budget: Tokens of a pass.
    """
    if method == "prefix":
        found = prefixes(lm, passages, reward, contextual=contextual, budget=budget)
        return [
            Explained(
                p.tokens, tuple(p.rewards.diff().tolist()), float(p.rewards[-1]), float(p.rewards[-1] - p.rewards[0])
            )
            for p in found
        ]
    blank = mean_embedding(lm)
    rows: dict[int, Explained] = {}
    for texts in spelled(lm, passages, contextual=contextual, budget=budget):
        size = max(1, budget // (1 + max(len(t.context) + len(t.tokens) for t in texts)))
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            value, embeds_BTD, keep_BT = value_of_embeddings(lm, part, reward)
            if method == "gradient-input":
                told = gradient_input(value, embeds_BTD, keep_BT, baseline=blank)
            else:
                told = integrated_gradients(value, embeds_BTD, keep_BT, baseline=blank, steps=steps)
            with torch.no_grad():
                whole_B = value(embeds_BTD)
            for b, text in enumerate(part):
                own = told.score_BT[b].float()[keep_BT[b] > 0].tolist()
                rows[text.row] = Explained(text.tokens, tuple(own), float(whole_B[b]), float(told.change_B[b]))
    return [rows[row] for row in range(len(passages))]


def attended(
    lm: LanguageModel, passages: Sequence[Passage], critic: TextCritic, *, budget: int = 512
) -> list[Explained]:
    """Where a critic with attention looked in each text, and what each token brought to its reward.

    With two labels the scores sum to the change, but for rounding: the head is a sum over tokens. With more the
    log-odds bend, and scores follow their slope at the text.

    Args:
        lm: The trunk; whatever it wears is off.
        passages: Texts in their contexts.
        critic: On `tokens`.
        budget: Tokens of a pass.

    Raises:
        ModelError: The critic has no attention.
    """
    head = critic.heads.get("tokens.attention")
    if not isinstance(head, Attentive):
        raise ModelError(
            f"a critic that reads '{critic.source}' has no attention to follow",
            expected="a critic on tokens",
            fix="train it with --features tokens",
        )
    groups = laid_out(lm, passages if critic.contextual else [Passage(p.text) for p in passages], budget=budget)
    own = {row: tokens[:-1] for group in groups for row, tokens in zip(group.rows, group.completions, strict=True)}
    states = read_states(lm, groups, len(passages), budget=budget)
    logits_NL = critic.logits({"tokens": states, "length": log_lengths(passages)}).mean(0)
    weight = float(critic.pool.weight_H[list(critic.heads).index("tokens.attention")])
    found = []
    for row, (share_MT, brought_MTL) in enumerate(head.looked(states)):
        part_TL = weight * centred(brought_MTL.mean(0))
        said_L, else_L = logits_NL[row], logits_NL[row] - part_TL.sum(0)
        slope_L = -softmax(np.where(np.arange(len(said_L)) == critic.positive, -np.inf, said_L))
        slope_L[critic.positive] = 1.0
        reward, before = (critic.sign * float(log_odds(x[None], critic.positive)[0]) for x in (said_L, else_L))
        n = len(own[row])  # none of an empty text, whose only state is the end token's
        scores, shares = critic.sign * (part_TL @ slope_L)[:n], share_MT.mean(0)[:n]
        found.append(Explained(own[row], tuple(scores.tolist()), reward, reward - before, tuple(shares.tolist())))
    return found


def onto(lm: LanguageModel, one: Explained, tokens: Sequence[int]) -> tuple[list[float], bool]:
    """The scores on the tokens that were drawn, and whether they had to be moved.

    A critic reads the reply's text, which the tokenizer may cut otherwise than the policy drew it; then each score
    goes where its characters went. The token that ends a turn explains nothing.
    """
    own = list(tokens)
    while own and own[-1] in lm.stop_tokens:
        own.pop()
    rest = [0.0] * (len(tokens) - len(own))
    if tuple(own) == one.tokens:
        return [*one.scores, *rest], False
    if not own or not one.tokens:
        return [0.0] * len(tokens), bool(one.tokens)
    raw, spans = token_spans(own, lm.whole_text)
    lead = len(raw) - len(raw.lstrip())
    _, read = token_spans(one.tokens, lm.whole_text)
    moved: list[Span] = [(a + lead, b + lead) for a, b in read]
    return [*align(one.scores, moved, spans), *rest], True
