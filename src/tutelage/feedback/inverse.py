"""Inverse constitution: the principles that explain preferences.

Principles are proposed pair by pair, gathered by meaning, voted on, and kept when their votes are surely for
the preferred replies and say something that the other kept ones do not. What they explain is measured on
pairs that played no part in it. The principles found are not the only ones that could be: what counts is how
many preferences they reconstruct.

Source: Findeis et al. 2024, Inverse Constitutional AI (arXiv 2406.06560). Here a vote is read from label
log-probabilities in both orders; sureness is tested, with the number of candidates in mind; and redundant
principles are kept out by likelihood ratio instead of by a second clustering.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.stats import binomtest, chi2
from sklearn.cluster import AgglomerativeClustering

from tutelage.feedback.asking import Opinion, Steps
from tutelage.feedback.audit import Share, wilson
from tutelage.feedback.constitution import Constitution, Principle
from tutelage.feedback.judge_prompt import JudgePrompt, conversation, fence
from tutelage.feedback.judges import Pairwise
from tutelage.feedback.words import Words, load_words
from tutelage.records import PreferencePair, Question

__all__ = [
    "Kept", "Reconstruction", "ballot", "inverse_words", "propose", "reconstruct", "representatives", "select", "vote",
]  # fmt: skip

_ALPHA = 0.05  # chance that any principle is kept for nothing, over all candidates
_SURE = 0.2  # nats of log-odds below which a vote is an abstention (55%)
_LONGEST = 240  # characters of a principle: what is longer is a speech
_TOKENS = 96  # a proposal may take
_BULLET = re.compile(r"^[\s\-*•·–—]*(?:\(?\d{1,2}[.):、)]\s*)?")


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """A principle that was kept: its row in the votes, how they fell, and its weight in reconstruction (> 0)."""

    row: int
    votes_for: int
    votes_against: int
    weight: float


@dataclasses.dataclass(frozen=True, slots=True)
class Reconstruction:
    """How many preferences the kept principles give back.

    `accuracy` is right of all pairs with its 95% Wilson interval (Nones without pairs): a pair on which they
    abstain or tie (`undecided`) is not given back.
    """

    right: int
    wrong: int
    undecided: int
    accuracy: Share


def inverse_words(name: str = "builtin:inverse") -> Words:
    """The words in which principles are proposed.

    Raises:
        InputError, RecipeError: There is no such file, or it lacks a part.
    """
    return load_words(name, {"propose": ("prompt", "better", "worse", "count")})


def propose(words: Words, pair: PreferencePair, *, count: int) -> Steps[list[str]]:
    """Principles that may explain a preference: at most `count`, none when the model names none."""
    parts = {
        "prompt": conversation(pair.prompt),
        "better": fence(pair.chosen),
        "worse": fence(pair.rejected),
        "count": str(count),
    }
    (answer,) = yield [Question(words.messages("propose", **parts), words.opening("propose"), (), _TOKENS)]
    if answer.failure:
        return []
    lines = [_BULLET.sub("", line).strip() for line in answer.text.splitlines()]
    return list(dict.fromkeys(line for line in lines if line and len(line) <= _LONGEST))[:count]


def representatives(vectors_ND: np.ndarray, *, clusters: int) -> list[int]:
    """One row of each cluster of meanings, the most central one, in order of appearance.

    Args:
        vectors_ND: Unit-length embeddings of distinct texts.
        clusters: How many; fewer rows are all taken.
    """
    if len(vectors_ND) <= max(clusters, 1):
        return list(range(len(vectors_ND)))
    labels_N = AgglomerativeClustering(n_clusters=clusters, metric="cosine", linkage="average").fit_predict(vectors_ND)
    found = []
    for label in range(clusters):
        members = np.flatnonzero(labels_N == label)
        near = vectors_ND[members] @ vectors_ND[members].sum(0)
        found.append(int(members[int(near.argmax())]))
    return sorted(found)


def vote(words: JudgePrompt, principle: str, pair: PreferencePair) -> Steps[Opinion]:
    """Which reply a principle favours, asked in both orders; positive means the preferred one."""
    rule = Constitution("", (Principle("rule", principle, 1.0, "any", "", principle, (), "", ()),))
    return Pairwise(words, rule).compare(pair.prompt, pair.chosen, pair.rejected)


def ballot(opinion: Opinion) -> float:
    """An opinion as a vote: 1 for, -1 against, 0 abstains (unsure, or led by the order), nan when unread."""
    if opinion.value is None:
        return math.nan
    if abs(opinion.value) < _SURE or opinion.evidence.get("flipped"):
        return 0.0
    return math.copysign(1.0, opinion.value)


def select(votes_MN: np.ndarray, *, most: int) -> list[Kept]:
    """Principles to keep, by their votes alone.

    First, votes for must surely outnumber votes against: one-sided sign test at 0.05 over the number of
    candidates (Bonferroni). Of those, a logistic model takes in one after the other, each time the one that
    makes the preferences most likely, as long as all weights stay positive and it adds surely (likelihood
    ratio, same level). So of two that say the same one is kept.

    Args:
        votes_MN: Votes of M principles on N pairs: 1 for the preferred reply, -1 against, 0 or nan neither.
        most: Most principles to keep.

    Returns:
        The kept ones, the largest (for - against) first.
    """
    clean_MN = np.nan_to_num(votes_MN, nan=0.0)
    ahead, behind = (clean_MN > 0).sum(1), (clean_MN < 0).sum(1)
    level = _ALPHA / max(len(clean_MN), 1)
    sure = [
        m
        for m in range(len(clean_MN))
        if ahead[m] > behind[m]
        and binomtest(int(ahead[m]), int(ahead[m] + behind[m]), alternative="greater").pvalue < level
    ]
    needed = float(chi2.isf(level, df=1))
    rows: list[int] = []
    weights, likely = _fit(clean_MN[rows])
    while len(rows) < most:
        tried = [(*_fit(clean_MN[[*rows, m]]), m) for m in sure if m not in rows]
        # Rounded: which of two equals is taken must not hang on the last bits.
        better = sorted((t for t in tried if (t[0] > 0).all()), key=lambda t: (-round(t[1], 6), t[2]))
        if not better or 2 * (better[0][1] - likely) < needed:
            break
        weights, likely, row = better[0]
        rows.append(row)
    kept = [Kept(m, int(ahead[m]), int(behind[m]), float(w)) for m, w in zip(rows, weights, strict=True)]
    return sorted(kept, key=lambda k: (k.votes_against - k.votes_for, k.row))


def _fit(votes_KN: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights of a logistic model without intercept, each with a standard normal prior, and its log-density.

    The model is of P(preferred | votes) = 1 / (1 + exp(-weights . votes)); swapping a pair changes nothing.
    """

    def loss(weights_K: np.ndarray) -> tuple[float, np.ndarray]:
        margin_N = weights_K @ votes_KN
        value = np.logaddexp(0.0, -margin_N).sum() + 0.5 * weights_K @ weights_K
        return float(value), weights_K - votes_KN @ (1.0 / (1.0 + np.exp(margin_N)))

    if not len(votes_KN):
        return np.zeros(0), -votes_KN.shape[1] * math.log(2.0)
    found = minimize(loss, np.zeros(len(votes_KN)), jac=True, method="L-BFGS-B")
    return np.asarray(found.x), -float(found.fun)


def reconstruct(weights_K: Sequence[float], votes_KN: np.ndarray) -> Reconstruction:
    """Preferences as the principles' weighted votes give them back.

    Args:
        weights_K: Weights of the kept principles.
        votes_KN: Their votes on N pairs, as in `select`.
    """
    margin_N = np.asarray(weights_K, dtype=float) @ np.nan_to_num(votes_KN, nan=0.0)
    right, wrong = int((margin_N > 1e-9).sum()), int((margin_N < -1e-9).sum())
    count = votes_KN.shape[1]
    return Reconstruction(right, wrong, count - right - wrong, wilson(right, count))
