"""Temperature, top-k, top-p and the draw itself: pure functions on logits_BV with exact log-probs.

A token is drawn by inverting the cumulative distribution at one uniform number per row: no noise over
the vocabulary is needed, and a row's text depends on its own numbers only, not on which other rows
share the batch.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tutelage.errors import ModelError
from tutelage.records import SamplerSettings

__all__ = ["draw", "shape_logits"]


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
    chosen_B1 = logits_BV.gather(-1, tokens_B[:, None])
    return tokens_B, (chosen_B1 - top_B1 - mass_BV.sum(-1, keepdim=True).log())[:, 0]


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
