"""One distribution over the next token out of several models' logits: pure functions, exact log-probs.

What comes back is normalised, so it is both what a sampler may take for logits and the log-probability
that belongs beside each token drawn from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tutelage.engines.sampling import shape_logits
from tutelage.errors import ModelError, RecipeError
from tutelage.records import SamplerSettings

__all__ = ["contrast_logp", "mix_logp"]


def contrast_logp(
    base_BV: torch.Tensor,
    expert_BV: torch.Tensor | None,
    anti_BV: torch.Tensor,
    *,
    alpha: float,
    top_p: float = 0.9,
) -> torch.Tensor:
    """Steer a base model towards an expert and away from an anti-expert, token by token.

    Objective: log softmax of z_base + alpha (z_expert - z_anti) over the tokens that top-p keeps of the base.
    Difference: `mix_logp` weighs whole models and keeps no base; here only what expert and anti-expert
    disagree on moves the base, and a token that the base holds unlikely cannot be raised.
    Assumption: both were tuned from one start on opposite data, so that their difference is the attribute.
    If they differ in more (length, format), alpha scales that too.
    Source: Liu et al. 2021, DExperts (arXiv 2105.03023), section 2; the filter comes first, as in the authors' code.

    Args:
        base_BV: Raw logits, (rows, vocabulary).
        expert_BV: The expert's; None takes the base for it (anti-expert only).
        anti_BV: The anti-expert's.
        alpha: Strength, at least 0; 0 is the filtered base itself.
        top_p: Mass of the base that stays, above 0 and at most 1; 1 keeps every token.

    Returns:
        float32 log-probabilities logp_BV; -inf where a token cannot be drawn.

    Raises:
        RecipeError: alpha or top_p makes no sense.
        ModelError: The vocabularies differ, or a logit of a kept token is not finite.
    """
    if not (math.isfinite(alpha) and alpha >= 0.0):
        raise RecipeError(f"alpha is {alpha}", expected="a finite number of at least 0", fix="swap the two models")
    if not 0.0 < top_p <= 1.0:
        raise RecipeError(f"top_p is {top_p}", expected="above 0, at most 1", fix="take 1 to keep every token")
    expert_BV = base_BV if expert_BV is None else expert_BV
    _same_shape([base_BV, expert_BV, anti_BV])
    kept_BV = shape_logits(base_BV, SamplerSettings(temperature=1.0, top_k=0, top_p=top_p))
    inside_BV = torch.isfinite(kept_BV)
    # Outside, both may be -inf, whose difference is not a number.
    push_BV = torch.where(inside_BV, expert_BV.float() - anti_BV.float(), 0.0)
    if not bool(torch.isfinite(push_BV).all() & inside_BV.any(-1).all()):
        raise ModelError(
            "a logit of the base, the expert or the anti-expert is not finite where the base allows the token",
            expected="finite logits there",
            fix="check that the models' weights and vocabularies belong together",
        )
    return (kept_BV + alpha * push_BV).log_softmax(-1)


def mix_logp(logits_KBV: Sequence[torch.Tensor], weights_K: Sequence[float]) -> torch.Tensor:
    """Weighted product of K models: log softmax of sum_k w_k log pi_k.

    Objective: argmax over pi of sum_k w_k (value of model k - KL(pi || start)), for models that were each
    aligned to one value with the same KL weight.
    Difference: a mean of probabilities keeps a token that a single model likes; the product wants all.
    Merging weights costs one forward instead of K, but holds only near the start.
    Assumption: weights on the simplex. Were their sum not 1, the mixture would be tempered as well.
    Source: Shi et al. 2024, multi-objective decoding (arXiv 2406.18853), the case of reverse KL.

    Args:
        logits_KBV: Raw logits of each model, all (rows, vocabulary) and over one vocabulary.
        weights_K: Not negative, summing to 1. A model of weight 0 has no say, not even a veto.

    Returns:
        float32 log-probabilities logp_BV; -inf where a model with a say allows no token.

    Raises:
        RecipeError: The weights are not on the simplex, or not one for each model.
        ModelError: The vocabularies differ, a logit is not a number, or no token is left.
    """
    if len(weights_K) != len(logits_KBV) or not logits_KBV:
        raise RecipeError(
            f"{len(weights_K)} weights for {len(logits_KBV)} models",
            expected="one weight for each of at least one model",
            fix="give as many weights as models",
        )
    if not (all(w >= 0.0 for w in weights_K) and abs(sum(weights_K) - 1.0) < 1e-6):
        raise RecipeError(
            f"the weights are {', '.join(f'{w:g}' for w in weights_K)}",
            expected="none negative, and a sum of 1",
            fix="divide them by their sum",
        )
    _same_shape(logits_KBV)
    total_BV = torch.zeros_like(logits_KBV[0], dtype=torch.float32)
    for logits_BV, weight in zip(logits_KBV, weights_K, strict=True):
        if weight > 0.0:
            total_BV = total_BV + weight * logits_BV.float().log_softmax(-1)
    if bool(total_BV.isnan().any()) or not bool((total_BV.amax(-1) > float("-inf")).all()):
        raise ModelError(
            "the mixture leaves no token, or a logit is not a number",
            expected="a token that every model with a weight allows",
            fix="check that the models share a vocabulary, and loosen their masks",
        )
    return total_BV.log_softmax(-1)


def _same_shape(logits_KBV: Sequence[torch.Tensor]) -> None:
    shapes = [tuple(x.shape) for x in logits_KBV]
    if len(set(shapes)) > 1:
        raise ModelError(
            f"logits of shapes {', '.join(map(str, shapes))}",
            expected="one shape: the same rows and the same vocabulary",
            fix="mix models with one tokenizer only",
        )
