"""Which listed token stands for which label, for engines that give the likeliest next tokens as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["label_logps"]

_AROUND = " \t\n\"'`*_([{<#.:,;)]}>▁Ġ"


def label_logps(listed: Sequence[tuple[str, float]], labels: Sequence[str]) -> dict[str, float]:
    """Log-probability of each label, summed over the tokens that begin it.

    A token counts for a label when, without spaces, quotes and emphasis and whatever its case, it is
    the label or the beginning of that one label alone. A label without a listed token gets -inf.

    Args:
        listed: Tokens as text with their log-probabilities.
        labels: The labels.
    """
    heard: dict[str, list[float]] = {label: [] for label in labels}
    for token, logp in listed:
        bare = token.strip(_AROUND).casefold()
        whole = [x for x in labels if x.casefold() == bare]
        begun = whole or [x for x in labels if bare and x.casefold().startswith(bare)]
        if len(begun) == 1:
            heard[begun[0]].append(logp)
    return {label: _logsumexp(found) for label, found in heard.items()}


def _logsumexp(values: Sequence[float]) -> float:
    top = max(values, default=-math.inf)
    if top == -math.inf:
        return -math.inf
    return min(0.0, top + math.log(math.fsum(math.exp(v - top) for v in values)))
