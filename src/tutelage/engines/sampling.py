"""Temperature, top-k, top-p and the draw itself: pure functions on logits_BV with exact log-probs.

A token is drawn by inverting the cumulative distribution at one uniform number per row: no noise over
the vocabulary is needed, and a row's text depends on its own numbers only, not on which other rows
share the batch.

Rows may also be drawn each by its own line of a `Menu`: that is what a controller chooses from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn import functional as F

from tutelage.errors import ModelError
from tutelage.records import Generation, SamplerSettings

__all__ = ["Menu", "Steering", "draw", "draw_rows", "shape_logits", "shape_rows"]


@dataclasses.dataclass(frozen=True)
class Menu:
    """A settings that a row may be drawn by.

    Args:
        temperature_A: 0 is greedy, and then `top_k_A` says nothing.
        top_k_A: 0 is off.
        mask_A: Row of `barred_MV`.
        barred_MV: True where a mask bars a token; the first row bars none.
        openings: Tokens that a reply must begin with, a line; none at all means that no line has any.
    """

    temperature_A: torch.Tensor
    top_k_A: torch.Tensor
    mask_A: torch.Tensor
    barred_MV: torch.Tensor
    openings: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.temperature_A)

    def settings(self, action: int, max_new_tokens: int) -> SamplerSettings:
        """One line as the record that a reply keeps; the mask is not in it."""
        temperature, top_k = float(self.temperature_A[action]), int(self.top_k_A[action])
        return SamplerSettings(round(temperature, 6), top_k, max_new_tokens=max_new_tokens)

    def due(self, actions: Sequence[int], places: Sequence[int]) -> torch.Tensor | None:
        """The only token that an opening allows at these places of these rows' replies, -1 where any may come.

        None where that is so in every row.
        """
        if not self.openings:
            return None
        left = [self.openings[a][n : n + 1] for a, n in zip(actions, places, strict=True)]
        tokens = [only[0] if only else -1 for only in left]
        return torch.tensor(tokens, device=self.mask_A.device) if any(left) else None


class Steering(Protocol):
    """Chooses from a menu how rows are drawn, by what the model's hidden states say."""

    @property
    def menu(self) -> Menu:
        """What is chosen from."""

    @property
    def per_token(self) -> bool:
        """Choose at every token; else once, before a reply's first token."""

    @property
    def depth(self) -> float:
        """At what share of the layers the states are read; 1 is the last hidden state."""

    def choose(self, states_BD: torch.Tensor, uniform_B: torch.Tensor, sample_B: Sequence[int]) -> torch.Tensor:
        """One line of the menu a row, int64.

        Args:
            states_BD: The model's states at `depth`, at the last token so far.
            uniform_B: A number in [0, 1) a row, that row's own whatever shares its batch.
            sample_B: Which of its prompt's replies each row is.
        """

    def record(self, reply: Generation, actions_T: torch.Tensor, states_TD: torch.Tensor) -> None:
        """Called once a reply, in order, with each choice and the state it was made on; T is 1 once a reply."""


def shape_logits(logits_BV: torch.Tensor, settings: SamplerSettings) -> torch.Tensor:
    """Logits of the distribution that is really sampled: tempered, then truncated.

    Args:
        logits_BV: Raw logits, (rows, vocabulary).
        settings: `temperature` > 0; `top_k` keeps the k largest; `top_p` keeps the smallest set of
            most likely tokens whose mass reaches p (at least one token).

    Returns:
        float32 logits, -inf where a token cannot be drawn.
    """
    logits = logits_BV.float()
    if settings.temperature != 1.0:
        logits = logits / settings.temperature
    if settings.top_k:
        k = min(settings.top_k, logits.shape[-1])
        least = logits.topk(k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if settings.top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, index, mass_before >= settings.top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


def draw(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, settings: SamplerSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row.

    Args:
        logits_BV: Raw logits, (rows, vocabulary).
        uniform_B: One number in [0, 1) a row.
        settings: See `shape_logits`. With temperature 0 the most likely token is taken and its
            log-probability under the untempered model is recorded.

    Returns:
        (tokens_B, logp_B): int64 tokens and their natural-log probabilities under the
        distribution they were drawn from.

    Raises:
        ModelError: A logit is not a number.
    """
    # A few rows at a time: the tables over the vocabulary then stay in the processor's cache.
    parts = [
        _draw(*rows, settings)
        for rows in zip(torch.split(logits_BV, _ROWS), torch.split(uniform_B, _ROWS), strict=True)
    ]
    return _checked(parts)


def _checked(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens_B, logp_B = (torch.cat(x) for x in zip(*parts, strict=True))
    if not bool(torch.isfinite(logp_B).all()):
        raise ModelError(
            "the model's probabilities are not finite",
            expected="finite logits",
            fix="check its weights; with model.dtype=bfloat16, try float32",
        )
    return tokens_B, logp_B


_ROWS = 16


def _draw(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, settings: SamplerSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    greedy = settings.temperature == 0.0
    logits_BV = logits_BV.float() if greedy else shape_logits(logits_BV, settings)
    top_B1 = logits_BV.amax(-1, keepdim=True)
    mass_BV = (logits_BV - top_B1).exp_()
    tokens_B = logits_BV.argmax(-1) if greedy else _invert(mass_BV, uniform_B)
    return tokens_B, _logp(logits_BV, tokens_B, top_B1, mass_BV)


def _logp(logits_BV: torch.Tensor, tokens_B: torch.Tensor, top_B1: torch.Tensor, mass_BV: torch.Tensor) -> torch.Tensor:
    chosen_B1 = logits_BV.gather(-1, tokens_B[:, None])
    return (chosen_B1 - top_B1 - mass_BV.sum(-1, keepdim=True).log())[:, 0]


_BLOCK = 256


def _invert(mass_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """The token at which each row's running mass passes uniform * total; one without mass is never taken.

    In two steps, first the block of 256 tokens, then the token in it: a running sum over the whole
    vocabulary would be written and read once more, and add up its rounding errors.
    """
    rows, size = mass_BV.shape
    blocks_BNK = F.pad(mass_BV, (0, -size % _BLOCK)).view(rows, -1, _BLOCK)
    each_BN = blocks_BNK.sum(-1)
    run_BN = each_BN.cumsum(-1)
    # Slightly below the total: rounding must never point past the last drawable token.
    aim_B1 = uniform_B.to(run_BN.dtype)[:, None] * run_BN[:, -1:] * (1.0 - 1e-6)
    block_B1 = torch.searchsorted(run_BN, aim_B1, right=True).clamp_(max=run_BN.shape[1] - 1)
    inside_BK = blocks_BNK[torch.arange(rows, device=mass_BV.device), block_B1[:, 0]].cumsum(-1)
    rest_B1 = aim_B1 - (run_BN - each_BN).gather(1, block_B1)
    rest_B1 = rest_B1.clamp_(min=0.0).minimum(inside_BK[:, -1:] * (1.0 - 1e-6))
    # The bound matters only where a mass is not a number; the caller then refuses the draw.
    return (block_B1 * _BLOCK + torch.searchsorted(inside_BK, rest_B1, right=True))[:, 0].clamp_(max=size - 1)


def shape_rows(
    logits_BV: torch.Tensor, menu: Menu, action_B: torch.Tensor, due_B: torch.Tensor | None = None
) -> torch.Tensor:
    """What `shape_logits` does, each row by its own line of the menu; masks come first.

    Where a token is due (`Menu.due`) everything else is barred: it is drawn with probability one.

    A greedy row is masked and otherwise left as it is: its token is the most likely one, and the
    log-probability that is recorded is the untempered one. The choice is the action there, not the token.

    Returns:
        float32 logits, -inf where a token cannot be drawn; softmax gives what is drawn from.
    """
    logits = logits_BV.float()
    mask_B, tau_B, k_B = menu.mask_A[action_B], menu.temperature_A[action_B], menu.top_k_A[action_B]
    greedy_B = tau_B == 0.0
    masked = mask_B.nonzero()[:, 0]
    if len(masked):
        logits = logits.clone() if logits is logits_BV else logits
        logits[masked] = logits[masked].masked_fill(menu.barred_MV[mask_B[masked]], float("-inf"))
    tau_B = torch.where(greedy_B, 1.0, tau_B)
    if bool((tau_B != 1.0).any()):
        logits = logits / tau_B[:, None]
    cut = ((k_B > 0) & ~greedy_B).nonzero()[:, 0]
    if len(cut):
        logits = logits.clone() if logits is logits_BV else logits
        k_N1 = k_B[cut, None].clamp(max=logits.shape[-1])
        rows = logits[cut]
        least_N1 = rows.topk(int(k_N1.max()), dim=-1).values.gather(1, k_N1 - 1)
        logits[cut] = rows.masked_fill(rows < least_N1, float("-inf"))
    if due_B is not None:
        only_N1 = due_B[due_B >= 0, None]
        logits = logits.clone() if logits is logits_BV else logits
        alone = torch.full((len(only_N1), logits.shape[-1]), float("-inf"), device=logits.device)
        logits[due_B >= 0] = alone.scatter_(1, only_N1, 0.0)
    return logits


def draw_rows(
    logits_BV: torch.Tensor,
    uniform_B: torch.Tensor,
    menu: Menu,
    action_B: torch.Tensor,
    due_B: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`draw`, each row by its own line of the menu.

    Raises:
        ModelError: A logit is not a number.
    """
    logits, uniform, action = (torch.split(x, _ROWS) for x in (logits_BV, uniform_B, action_B))
    due = [None] * len(logits) if due_B is None else torch.split(due_B, _ROWS)
    return _checked([_draw_rows(*rows, menu) for rows in zip(logits, uniform, action, due, strict=True)])


def _draw_rows(
    logits_BV: torch.Tensor,
    uniform_B: torch.Tensor,
    action_B: torch.Tensor,
    due_B: torch.Tensor | None,
    menu: Menu,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_BV = shape_rows(logits_BV, menu, action_B, due_B)
    greedy_B = menu.temperature_A[action_B] == 0.0
    top_B1 = logits_BV.amax(-1, keepdim=True)
    mass_BV = (logits_BV - top_B1).exp_()
    if bool(greedy_B.all()):
        tokens_B = logits_BV.argmax(-1)
    else:
        tokens_B = _invert(mass_BV, uniform_B)
        if bool(greedy_B.any()):
            tokens_B[greedy_B] = logits_BV[greedy_B].argmax(-1)
    return tokens_B, _logp(logits_BV, tokens_B, top_B1, mass_BV)
