"""Unlikelihood: tokens that should not have been said, marked one by one and pushed down."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import torch

from tutelage.engines.batch import Batch, Loss
from tutelage.errors import InputError, RecipeError

__all__ = [
    "Unlikelihood",
    "context_unlikelihood",
    "log1mexp",
    "mark_repeats",
    "mark_spans",
    "sequence_repetition",
]

# Below one by this much a probability still has a finite log(1 - p), in float32 too.
_CLOSEST = 1e-6


def log1mexp(logp: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(logp)), exact to rounding from logp = -1e-6 down to where exp underflows.

    Above -1e-6 the value stays, and the gradient is the one at -1e-6: a token that is certain must still
    be pushed down, and a plain clamp would stop pushing exactly there.

    Source: Maechler 2012, "Accurately computing log(1 - exp(-|a|))".
    """
    held = logp + (logp.clamp_max(-_CLOSEST) - logp).detach()
    return torch.where(held > -math.log(2.0), (-torch.expm1(held)).log(), torch.log1p(-held.exp()))


@dataclasses.dataclass(frozen=True)
class Unlikelihood:
    """Raise the tokens marked as wanted, lower those marked as unwanted, leave the others alone.

    Objective: L = 1/B sum_bt [ max(w, 0) (-log pi) + alpha max(-w, 0) (-log(1 - pi)) ] of the realised
    token, with w = `advantage_BT`.
    Difference: policy gradient on a negative advantage is A log pi, whose push grows as the token becomes
    rarer and has no floor; -log(1 - pi) pushes by p and fades out once the token is unlikely.
    Assumption: the mark is on the token at fault. A mark on the whole reply also unlearns its ordinary
    words; keep some likelihood on unmarked text, or fluency goes with the fault.
    Source: Welleck et al. 2019 (arXiv 1908.04319), section "The unlikelihood training objective",
    its sequence-level form.
    """

    alpha: float = 1.0
    name: str = "unlikelihood"

    def __post_init__(self) -> None:
        """Refuse a weight that would turn the push around.

        Raises:
            RecipeError: alpha is negative or not finite.
        """
        if not (math.isfinite(self.alpha) and self.alpha >= 0.0):
            raise RecipeError(f"alpha is {self.alpha}", expected="at least 0", fix="take 1, or 0 for likelihood alone")

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        weight = batch.advantage_BT * batch.keep_BT
        wanted, unwanted = weight.clamp_min(0.0), (-weight).clamp_min(0.0)
        # Only marked places may reach log1mexp: padding says log p = 0, where its slope is a million.
        marked = unwanted > 0
        against = -log1mexp(torch.where(marked, batch.logp_BT, -1.0)) * unwanted
        value = (-batch.logp_BT * wanted + self.alpha * against).sum() / batch.rows_in_step
        with torch.no_grad():
            sums = {
                "nll_wanted": float((-batch.logp_BT * wanted).sum()),
                "unlikelihood": float(against.sum()),
                "share_unwanted": float(marked.sum()),
                "mass_unwanted": float((batch.logp_BT.exp() * marked).sum()),
                "tokens": float(batch.keep_BT.sum()),
            }
        return Loss(value, sums)


def context_unlikelihood(logits_BTV: torch.Tensor, tokens_BT: torch.Tensor, keep_BT: torch.Tensor) -> torch.Tensor:
    """Token-level unlikelihood: every token said before, except the one due now, should not come again.

    Args:
        logits_BTV: Logits that predict tokens_BT.
        tokens_BT: The realised tokens.
        keep_BT: 1.0 where there is a token.

    Returns:
        loss_BT: sum over c in {y_1 .. y_(t-1)} without y_t of -log(1 - p_t(c)); zero without a token.

    Source: Welleck et al. 2019 (arXiv 1908.04319), the token-level form.
    """
    logp_BTV = logits_BTV.float().log_softmax(-1)
    said_BTV = torch.zeros_like(logp_BTV).scatter_(-1, tokens_BT[..., None], keep_BT[..., None].to(logp_BTV.dtype))
    before_BTV = (said_BTV.cumsum(1) - said_BTV) > 0
    candidate_BTV = before_BTV.scatter(-1, tokens_BT[..., None], False)
    each_BTV = -log1mexp(torch.where(candidate_BTV, logp_BTV, -1.0))
    return torch.where(candidate_BTV, each_BTV, 0.0).sum(-1) * keep_BT


def sequence_repetition(tokens: Sequence[Hashable], n: int) -> float | None:
    """seq-rep-n: 1 - distinct n-grams / n-grams of one continuation; None when it has none.

    Source: Welleck et al. 2019 (arXiv 1908.04319), among the metrics of repetition.
    """
    grams = _grams(tokens, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else None


def mark_repeats(tokens: Sequence[Hashable], n: int, *, weight: float = -1.0, rest: float = 0.0) -> list[float]:
    """Weights of a reply's tokens: those of an n-gram that stood earlier in the same reply are marked.

    The first occurrence is not marked. Occurrences may overlap, so that something is marked exactly where
    seq-rep-n is above zero; the paper's definition wants the earlier one to have ended.

    Args:
        tokens: One reply, without its prompt: repeating the question is no fault.
        n: Length of the n-grams, at least 1.
        weight: Of marked tokens.
        rest: Of the others.

    Source: Welleck et al. 2019 (arXiv 1908.04319), the candidates of the sequence-level form.
    """
    found = [rest] * len(tokens)
    seen: set[tuple[Hashable, ...]] = set()
    for start, gram in enumerate(_grams(tokens, n)):
        if gram in seen:
            found[start : start + n] = [weight] * n
        seen.add(gram)
    return found


def _grams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    if n < 1:
        raise RecipeError(f"n-grams of length {n}", expected="at least 1", fix="the usual length is 4")
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def mark_spans(
    offsets_T: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int, float]], *, rest: float = 0.0
) -> list[float]:
    """Weights of tokens from judgements of passages of the text.

    Args:
        offsets_T: (start, end) of each token in characters of the reply's text, end exclusive.
        spans: (start, end, weight) of what was judged, in the same characters.
        rest: Weight of tokens that no span touches.

    Returns:
        weight_T. A token belongs to every span that it shares a character with; of several, the lowest
        weight holds: what one judge condemns, another's praise does not redeem. A token without characters
        (end of turn, or a part of one) belongs to the span that holds its place.

    Raises:
        InputError: A span is empty, turned around, beyond the text, or its weight is not finite.
    """
    length = max((end for _, end in offsets_T), default=0)
    for start, end, weight in spans:
        if not (0 <= start < end <= length and math.isfinite(weight)):
            raise InputError(
                f"span {start} to {end} with weight {weight} in a text of {length} characters",
                expected="0 <= start < end <= length, and a finite weight",
                fix="give offsets into the reply's own text, end exclusive",
            )
    found = []
    for first, last in offsets_T:
        touching = [w for start, end, w in spans if first < end and start < max(last, first + 1)]
        found.append(min(touching, default=rest))
    return found
