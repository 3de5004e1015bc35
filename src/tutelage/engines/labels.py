"""Which listed token stands for which label, for engines that give the likeliest next tokens as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["Listed", "label_logps", "openings"]

_AROUND = " \t\n\"'`*_([{<#.:,;)]}>▁Ġ"
_ROUNDED = 1e-6  # servers round: what is left over is never nothing
# A token that was drawn, its log-probability, and the likeliest tokens of its place with theirs.
Listed = tuple[str, float, Sequence[tuple[str, float]]]


def label_logps(listed: Sequence[tuple[str, float]], labels: Sequence[str]) -> dict[str, float]:
    """Log-probability of each label, summed over the tokens that begin it.

    A token counts for a label when, without spaces, quotes and emphasis, it is the label or the
    beginning of that one label alone; case counts for labels of one letter (an "a" may be an article).
    A label without a listed token gets the most that it can have had: no more than the least likely
    token listed, nor than what the listed ones left over. If none is listed, all get -inf.

    Args:
        listed: Tokens as text with their log-probabilities.
        labels: The labels.
    """
    heard: dict[str, list[float]] = {label: [] for label in labels}
    for token, logp in listed:
        bare = token.strip(_AROUND)
        whole = [x for x in labels if _same(x, bare)]
        begun = whole or [x for x in labels if bare and len(x) > 1 and x.casefold().startswith(bare.casefold())]
        if len(begun) == 1:
            heard[begun[0]].append(logp)
    found = {label: _logsumexp(logps) for label, logps in heard.items()}
    if all(logp == -math.inf for logp in found.values()):
        return found
    left = 1.0 - math.fsum(math.exp(logp) for _, logp in listed)
    most = min(min(logp for _, logp in listed), math.log(max(left, _ROUNDED)))
    return {label: most if logp == -math.inf else logp for label, logp in found.items()}


def openings(places: Sequence[Listed]) -> list[tuple[str, float]]:
    """Candidates for the first word, with their log-probabilities as the next thing said.

    Where the model drew a token of nothing but space or emphasis first, the word comes at the place
    after it: those candidates count with the probability of the way there.
    """
    reached, found = 0.0, list[tuple[str, float]]()
    for token, logp, listed in places:
        found += [(candidate, reached + x) for candidate, x in listed]
        if any(c.isalnum() for c in token):
            break
        reached += logp
    return found


def _same(label: str, word: str) -> bool:
    return label == word or (len(label) > 1 and label.casefold() == word.casefold())


def _logsumexp(values: Sequence[float]) -> float:
    top = max(values, default=-math.inf)
    if top == -math.inf:
        return -math.inf
    return min(0.0, top + math.log(math.fsum(math.exp(v - top) for v in values)))
