"""A critic's reward where it must be known of more than whole texts: at every prefix, and as a function of embeddings.

Only critics whose features are the trunk's alone: what an encoder or a bag of words says of half a sentence has no
token to be held to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from tutelage.engines.attention import AttentionPlan, attention_plan
from tutelage.engines.features import Probe, listened
from tutelage.engines.load import LanguageModel
from tutelage.errors import ModelError
from tutelage.feedback.attentive import Attentive
from tutelage.feedback.critic_data import PROBES, Passage, laid_out
from tutelage.feedback.critic_heads import Linear
from tutelage.feedback.heads import Committee
from tutelage.feedback.text_critic import TextCritic

__all__ = ["Prefixes", "Reward", "Text", "prefixes", "reward_of_critic", "spelled", "value_of_embeddings"]

Reward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (N, features), (N,) log lengths -> (N,) rewards
_LEAST = math.log(1e-9)  # as text_critic floors probabilities


@dataclasses.dataclass(frozen=True)
class Text:
    """A passage as the trunk reads it.

    Args:
        context: Tokens before it.
        tokens: Its own, without the end token that follows them.
        row: Which of the passages it is.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]
    row: int


@dataclasses.dataclass(frozen=True)
class Prefixes:
    """What a critic's reward is after 0, 1, ... n tokens of a text, each ended where it stands.

    Args:
        row: Which of the passages.
        tokens: Those of the text, n.
        rewards: n + 1 numbers.
    """

    row: int
    tokens: tuple[int, ...]
    rewards: torch.Tensor


def reward_of_critic(critic: TextCritic) -> Reward:
    """The critic's reward (`TextCritic.reward`) from features, differentiable: the log-odds of what is wanted.

    Raises:
        ModelError: It reads more than the trunk.
    """
    if critic.source != "trunk":
        raise ModelError(
            f"a critic that reads '{critic.source}' cannot say what each token brings",
            expected="a critic on the trunk alone",
            fix="train it with --features trunk",
        )
    weight_H = torch.tensor(critic.pool.weight_H, dtype=torch.float32)
    bias_L = torch.tensor(critic.pool.bias_L, dtype=torch.float32)
    heads = [
        (name.split(".")[0], _torch_head(head))
        for name, head in critic.heads.items()
        if not isinstance(head, Attentive)  # on a trunk's pooled states there is none
    ]
    others = [k for k in range(len(critic.labels)) if k != critic.positive]

    def reward(features_NF: torch.Tensor, length_N: torch.Tensor) -> torch.Tensor:
        blocks = {"trunk": features_NF.float(), "length": length_N.float()[:, None]}
        said_HMNL = torch.stack([head(blocks[block]) for block, head in heads])
        logits_NL = (torch.tensordot(weight_H, said_HMNL, 1) + bias_L).mean(0)
        odds_N: torch.Tensor = critic.sign * (logits_NL[:, critic.positive] - logits_NL[:, others].logsumexp(-1))
        return odds_N

    return reward


def _torch_head(head: Linear | Committee) -> Callable[[torch.Tensor], torch.Tensor]:
    """(N, F) -> (members, N, labels) logits, up to a constant a row, which log-odds do not see."""
    if isinstance(head, Linear):
        weight_MFL, bias_ML = (
            torch.tensor(np.asarray(t), dtype=torch.float32) for t in (head.weight_MFL, head.bias_ML)
        )

        def linear(x_NF: torch.Tensor) -> torch.Tensor:
            z_MNL = x_NF @ weight_MFL + bias_ML[:, None]
            return torch.cat([-z_MNL / 2, z_MNL / 2], -1) if z_MNL.shape[-1] == 1 else z_MNL - z_MNL.mean(-1, True)

        return linear
    t = {name: torch.tensor(np.asarray(value), dtype=torch.float32) for name, value in head.tensors().items()}

    def committee(x_NF: torch.Tensor) -> torch.Tensor:
        z_NF = (x_NF - t["mean_F"]) / t["scale_F"]
        inside_MNH = (z_NF @ t["inner_MFH"] + t["inner_bias_MH"][:, None]).clamp_min(0.0)
        return (inside_MNH @ t["outer_MHL"] + t["outer_bias_ML"][:, None]).log_softmax(-1).clamp_min(_LEAST)

    return committee


def spelled(lm: LanguageModel, passages: Sequence[Passage], *, contextual: bool, budget: int) -> list[list[Text]]:
    """Passages as token ids, in the trunk's own layout; each inner list shares a context and about `budget` tokens."""
    if not contextual:
        passages = [Passage(p.text) for p in passages]
    return [
        [Text(g.prompt, c[:-1], row) for row, c in zip(g.rows, g.completions, strict=True)]
        for g in laid_out(lm, passages, budget=budget)
    ]


@torch.no_grad()
def prefixes(
    lm: LanguageModel,
    passages: Sequence[Passage],
    reward: Reward,
    *,
    contextual: bool = True,
    probes: Sequence[Probe] = PROBES,
    budget: int = 512,
) -> list[Prefixes]:
    """What the critic would say of each text had it ended after any of its tokens; in the passages' order.

    Every token carries an end token of its own beside it, which sees what lies before and is seen by none, so one
    pass over twice the tokens gives what a pass for each prefix would: a critic's features are means that take the
    end token in, and states at it.

    Args:
        lm: The trunk.
        passages: Texts in their contexts.
        reward: Of features.
        contextual: Whether contexts are read.
        probes: Where.
        budget: Tokens of a pass.
    """
    found: dict[int, Prefixes] = {}
    with listened(lm, probes) as run:
        for texts in spelled(lm, passages, contextual=contextual, budget=max(1, budget // 2)):
            plan, tokens_T, position_T = _ended(lm, texts)
            with attention_plan(plan):
                states = [s.float() for s in run(lambda t=tokens_T, p=position_T: lm.hidden(t[None], p[None]))]  # type: ignore[misc]
            at = len(texts[0].context)
            for text in texts:
                n = len(text.tokens)
                own, ends = slice(at, at + n), slice(at + n, at + 2 * n + 1)
                at += 2 * n + 1
                features = torch.cat(
                    [_prefix_features(p, s[own], s[ends]) for p, s in zip(probes, states, strict=True)], 1
                )
                found[text.row] = Prefixes(text.row, text.tokens, reward(features.cpu(), _lengths(lm, text.tokens)))
    return [found[row] for row in range(len(passages))]


def _ended(lm: LanguageModel, texts: Sequence[Text]) -> tuple[AttentionPlan, torch.Tensor, torch.Tensor]:
    """One row: the context, then of each text its tokens, and an end token for each of its n + 1 prefixes."""
    context = texts[0].context
    tokens, position, blocks = list(context), list(range(len(context))), []
    for text in texts:
        n, start = len(text.tokens), len(tokens)
        tokens += [*text.tokens, *[lm.end_token] * (n + 1)]
        position += [*range(len(context), len(context) + n), *range(len(context), len(context) + n + 1)]
        blocks.append((start, n))
    seen_TT = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    seen_TT[:, : len(context)] = True
    seen_TT[: len(context)].tril_()
    for start, n in blocks:
        own, ends = slice(start, start + n), slice(start + n, start + 2 * n + 1)
        seen_TT[own, own] = torch.ones(n, n, dtype=torch.bool).tril()
        seen_TT[ends, own] = torch.ones(n + 1, n, dtype=torch.bool).tril(-1)
        seen_TT[ends, ends] = torch.eye(n + 1, dtype=torch.bool)
    plan = AttentionPlan(mask_TT=seen_TT.to(lm.device))
    return plan, torch.tensor(tokens), torch.tensor(position)


def _prefix_features(probe: Probe, own_TD: torch.Tensor, ends_TD: torch.Tensor) -> torch.Tensor:
    if probe.pool == "last":
        return ends_TD
    before_TD = torch.cat([torch.zeros_like(ends_TD[:1]), own_TD.cumsum(0)])
    return (before_TD + ends_TD) / torch.arange(1, len(ends_TD) + 1, device=ends_TD.device)[:, None]


def _lengths(lm: LanguageModel, tokens: Sequence[int]) -> torch.Tensor:
    """The critic's length feature after 0, 1, ... n tokens."""
    return torch.tensor([math.log1p(len(lm.decode(tokens[:n]))) for n in range(len(tokens) + 1)])


def value_of_embeddings(
    lm: LanguageModel, texts: Sequence[Text], reward: Reward, *, probes: Sequence[Probe] = PROBES
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor, torch.Tensor]:
    """The critic's reward as a function of the input embeddings of some texts.

    The length is no function of the embeddings and stays what it is, so a part of the reward that hangs on it alone
    has no gradient.

    Returns:
        (B, T, D) embeddings -> (B,) rewards; the embeddings as they are; and 1.0 for the columns of the texts' own
        tokens, so neither for contexts nor for the end tokens.
    """
    rows = [(*text.context, *text.tokens, lm.end_token) for text in texts]
    width = max(map(len, rows))
    tokens_BT = torch.tensor([[*row, *[lm.end_token] * (width - len(row))] for row in rows])
    keep_BT = torch.zeros(len(rows), width)
    for b, text in enumerate(texts):
        keep_BT[b, len(text.context) : len(text.context) + len(text.tokens)] = 1.0
    length_B = torch.tensor([math.log1p(len(lm.decode(text.tokens))) for text in texts])

    def value(embeds_BTD: torch.Tensor) -> torch.Tensor:
        with listened(lm, probes) as run:
            states = run(lambda: lm.body(inputs_embeds=embeds_BTD, use_cache=False))
        tables = [s.view(len(rows), width, -1).float() for s in states]
        features = [
            torch.cat(
                [
                    s[b, len(text.context) : len(row)].mean(0) if p.pool == "mean" else s[b, len(row) - 1]
                    for p, s in zip(probes, tables, strict=True)
                ]
            )
            for b, (text, row) in enumerate(zip(texts, rows, strict=True))
        ]
        return reward(torch.stack(features).cpu(), length_B)

    with torch.no_grad():
        embeds_BTD = lm.model.get_input_embeddings()(tokens_BT.to(lm.device))
    return value, embeds_BTD.detach(), keep_BT.to(lm.device)
