"""Temperature, top-k, top-p and the draw itself: pure functions on logits_BV with exact log-probs.

A token is drawn by inverting the cumulative distribution at one uniform number per row, so a
draw costs one softmax and one running sum, and a row's text depends on its own numbers only,
not on which other rows share the batch.
"""

from __future__ import annotations

import torch

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
    if settings.temperature == 0.0:
        logits = logits_BV.float()
        tokens_B = logits.argmax(-1)
    else:
        logits = shape_logits(logits_BV, settings)
        mass = (logits - logits.amax(-1, keepdim=True)).exp_().cumsum_(-1)
        # Slightly below the total: rounding must never point past the last drawable token.
        aim = uniform_B.to(mass.dtype)[:, None] * mass[:, -1:] * (1.0 - 1e-6)
        tokens_B = torch.searchsorted(mass, aim, right=True)[:, 0].clamp_(max=mass.shape[-1] - 1)
    logp_B = logits.gather(-1, tokens_B[:, None])[:, 0] - logits.logsumexp(-1)
    if not bool(torch.isfinite(logp_B).all()):
        raise ModelError(
            "the model's probabilities are not finite",
            expected="finite logits",
            fix="check its weights; with model.dtype=bfloat16, try float32",
        )
    return tokens_B, logp_B
