"""Self-consistency: a model that knows says the same thing again; one that makes things up does not.

Replies to one prompt are clustered by meaning; the spread over clusters is the semantic entropy.
The guard against collapse: a stock phrase that the model gives to many different prompts is
consistent for the wrong reason, so it is left out, and the judge abstains where nothing is left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

__all__ = ["GroupSpread", "cluster", "semantic_entropy", "spread", "stock_phrases"]


def cluster(vectors_GD: torch.Tensor, *, same: float) -> list[int]:
    """Greedy clusters of unit vectors: each joins the first cluster whose first member is near enough.

    Args:
        vectors_GD: Unit-length embeddings.
        same: Cosine from which two texts mean the same.

    Returns:
        A cluster number a row, counted from 0 in order of appearance.
    """
    leaders: list[int] = []
    labels: list[int] = []
    for row in range(len(vectors_GD)):
        near = [c for c, leader in enumerate(leaders) if float(vectors_GD[row] @ vectors_GD[leader]) >= same]
        if near:
            labels.append(near[0])
        else:
            labels.append(len(leaders))
            leaders.append(row)
    return labels


def semantic_entropy(labels: Sequence[int], weights: Sequence[float] | None = None) -> float:
    """-sum_c p_c ln p_c over clusters, in nats.

    Args:
        labels: Cluster of each reply.
        weights: Probability of each reply (normalised here); None counts each once (discrete form).

    Source: Farquhar et al. 2024, Nature 630, semantic entropy and its discrete form.
    """
    mass: dict[int, float] = {}
    for label, weight in zip(labels, weights or [1.0] * len(labels), strict=True):
        mass[label] = mass.get(label, 0.0) + weight
    total = math.fsum(mass.values())
    return -math.fsum(m / total * math.log(m / total) for m in mass.values() if m > 0)


def stock_phrases(vectors_PGD: Sequence[torch.Tensor], *, near: float = 0.9, share: float = 0.1) -> list[list[bool]]:
    """Which replies the model also gives, nearly word for word, to many other prompts.

    Args:
        vectors_PGD: Unit embeddings of the replies, one (G, D) matrix a prompt.
        near: Cosine from which two replies are the same phrase.
        share: Share of the other prompts from which a phrase counts as stock (at least 2 prompts).
    """
    if len(vectors_PGD) < 3:
        return [[False] * len(v) for v in vectors_PGD]
    everything = torch.cat(list(vectors_PGD))
    owner = torch.cat([torch.full((len(v),), p) for p, v in enumerate(vectors_PGD)])
    needed = max(2.0, share * (len(vectors_PGD) - 1))
    flags = []
    for p, vectors in enumerate(vectors_PGD):
        hit = (vectors @ everything.T) >= near
        flags.append([len(set(owner[row].tolist()) - {p}) >= needed for row in hit])
    return flags


@dataclasses.dataclass(frozen=True)
class GroupSpread:
    """What self-consistency found in one group.

    Args:
        labels: Cluster of each reply, -1 for a stock phrase.
        agreement: Share of the group's other specific replies in the same cluster, or None.
        entropy: Discrete semantic entropy, in nats, over replies that are not stock phrases.
        weighted_entropy: The same, weighted by length-normalised probability.
        cohesion: Mean pairwise cosine of those replies.
        usable: Replies that are not stock phrases.
    """

    labels: tuple[int, ...]
    agreement: tuple[float | None, ...]
    entropy: float | None
    weighted_entropy: float | None
    cohesion: float | None
    usable: int


def spread(
    vectors_GD: torch.Tensor, stock_G: Sequence[bool], mean_logp_G: Sequence[float], *, same: float
) -> GroupSpread:
    """Cluster one group and measure its spread. Fewer than two specific replies measure nothing."""
    rows = [g for g, stock in enumerate(stock_G) if not stock]
    if len(rows) < 2:
        blank: tuple[float | None, ...] = (None,) * len(stock_G)
        return GroupSpread((-1,) * len(stock_G), blank, None, None, None, len(rows))
    chosen = vectors_GD[rows]
    inner = cluster(chosen, same=same)
    labels = [-1] * len(stock_G)
    agreement: list[float | None] = [None] * len(stock_G)
    for row, label in zip(rows, inner, strict=True):
        labels[row] = label
        agreement[row] = (inner.count(label) - 1) / (len(rows) - 1)
    gram = chosen @ chosen.T
    n = len(rows)
    cohesion = float((gram.sum() - gram.diagonal().sum()) / (n * (n - 1)))
    weights = [math.exp(mean_logp_G[r]) for r in rows]
    return GroupSpread(
        tuple(labels),
        tuple(agreement),
        semantic_entropy(inner),
        semantic_entropy(inner, weights),
        cohesion,
        n,
    )
