"""Models that say the next token: one of them, or several side by side whose logits become one distribution."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch

from tutelage.engines.attention import AttentionPlan, KeyValueMemory, attention_plan
from tutelage.engines.features import layer_at, overheard
from tutelage.engines.llama import LlamaStep
from tutelage.engines.load import LanguageModel
from tutelage.engines.mixing import contrast_logp, mix_logp
from tutelage.engines.packing import Pack
from tutelage.errors import ModelError

__all__ = ["Blend", "Layers", "Voice", "against_anti_expert", "product"]

Layers = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values by layer, each (kv_heads, length, head_dim)."""


@dataclasses.dataclass(frozen=True)
class Blend:
    """Companions of a model, and how all their logits become one distribution.

    Args:
        others: K - 1 models over the first one's vocabulary.
        combine: K tables of logits (rows, vocabulary), the first model's first, to log-probabilities.
    """

    others: tuple[LanguageModel, ...]
    combine: Callable[[Sequence[torch.Tensor]], torch.Tensor]

    def check(self, first: LanguageModel) -> None:
        """Refuse companions that number their tokens otherwise.

        Raises:
            ModelError: The vocabularies differ.
        """
        words = first.tokenizer.get_vocab()
        for other in self.others:
            if other.head_VD.shape[0] != first.head_VD.shape[0] or other.tokenizer.get_vocab() != words:
                raise ModelError(
                    f"{other.name} and {first.name} do not share a vocabulary",
                    expected="models with one tokenizer",
                    fix="take models of one family",
                )


def product(others: Sequence[LanguageModel], weights: Sequence[float]) -> Blend:
    """The weighted product of the first model and these; `weights` has the first model's own at its front."""
    return Blend(tuple(others), functools.partial(mix_logp, weights_K=tuple(weights)))


def against_anti_expert(
    anti: LanguageModel, expert: LanguageModel | None = None, *, alpha: float, top_p: float = 0.9
) -> Blend:
    """The first model, pushed towards the expert and away from the anti-expert; see `contrast_logp`."""

    def combine(logits_KBV: Sequence[torch.Tensor]) -> torch.Tensor:
        base, against, *toward = logits_KBV
        return contrast_logp(base, toward[0] if toward else None, against, alpha=alpha, top_p=top_p)

    return Blend((anti,) if expert is None else (anti, expert), combine)


class Voice:
    """One model while it decodes: its key-value memory and its fastest forward pass.

    Args:
        lm: The model.
        rows: Replies that decode together.
        capacity: Tokens a row can hold.
        int8: Weights rounded to 8 bits, where the family allows it.
        depth: At what share of the layers the states are read that are given beside the logits; 1 is the last
            hidden state, which the logits are made of.
    """

    def __init__(self, lm: LanguageModel, *, rows: int, capacity: int, int8: bool = False, depth: float = 1.0) -> None:
        self.lm = lm
        self._tap = layer_at(lm, depth) if depth < 1.0 else -1
        self.memory = KeyValueMemory(rows, capacity)
        self._fast = LlamaStep(lm, rows=self.memory.rows, int8=int8) if LlamaStep.serves(lm) else None

    def prefill(self, fresh: Pack) -> tuple[list[Layers], torch.Tensor, torch.Tensor]:
        """Compute prompts: keys and values a prompt, states at their ends (P, D) and next logits (P, V)."""
        plan = AttentionPlan(tree=fresh.tree.to(self.lm.device), capture=True)
        with attention_plan(plan):
            hidden_TD, states_TD = self._pass(fresh.tokens_T[None], fresh.position_T[None])
        ends = list(fresh.prompt_end)
        layers = [
            {
                index: (
                    torch.cat([k[:, : fresh.root], k[:, start:end]], 1),
                    torch.cat([v[:, : fresh.root], v[:, start:end]], 1),
                )
                for index, (k, v) in plan.captured.items()
            }
            for start, end in fresh.prompt_spans
        ]
        return layers, states_TD[ends], hidden_TD[ends] @ self.lm.head_VD.T

    def admit(self, row: int, layers: Layers) -> None:
        """A free row goes on from a prompt's keys and values."""
        for index, (k, v) in layers.items():
            self.memory.fill(index, row, k, v)

    def forward(self, last_B: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, D) and logits (B, V) of the first B rows after one more token each.

        Args:
            last_B: That token.
            lengths_B: Tokens each row held before it.
        """
        reach = int(lengths_B.max()) + 1
        if self._fast is not None:
            heard = {} if self._tap < 0 else {self._tap: last_B}
            hidden_BD = self._fast.hidden(last_B, lengths_B, self.memory, reach, heard)
            return heard.get(self._tap, hidden_BD), self._fast.head(hidden_BD)
        with attention_plan(AttentionPlan(memory=self.memory, slots_B=lengths_B, reach=reach)):
            hidden_BD, states_BD = self._pass(last_B[:, None], lengths_B[:, None])
        return states_BD, hidden_BD @ self.lm.head_VD.T

    def _pass(self, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states of all tokens, and those at the depth, (tokens, D) each."""
        with overheard(self.lm, () if self._tap < 0 else (self._tap,)) as heard:
            hidden = self.lm.hidden(tokens, positions).flatten(0, 1)
        return hidden, heard.get(self._tap, hidden)
