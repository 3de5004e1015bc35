"""Many texts in one row, each shared prefix only once.

A batch of prompts with completions is a tree: what all prompts begin with (the system turn), then
each prompt's own tokens, then its completions. `pack` lays such trees into rows of a token budget;
every token sees its ancestors and nothing else, and keeps the position it would have alone, so the
result equals separate, padded forward passes while no shared or padding token is computed twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

__all__ = ["Group", "Pack", "common_prefix", "pack"]


@dataclasses.dataclass(frozen=True)
class Group:
    """One prompt's tokens and its completions' tokens; `rows` name the completions to the caller."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]


@dataclasses.dataclass
class Pack:
    """One row of packed trees.

    `source_N` is the position whose hidden state predicts `target_N`; `row_N` and `column_N` say
    where that prediction belongs in a (completions, tokens) table. `prompt_end` and `span` give, in
    the order of `groups`, the packed index of each prompt's last token, and of each completion's
    first and last token.
    """

    groups: tuple[Group, ...]
    tokens_T: torch.Tensor
    position_T: torch.Tensor
    mask_TT: torch.Tensor
    source_N: torch.Tensor
    target_N: torch.Tensor
    row_N: torch.Tensor
    column_N: torch.Tensor
    prompt_end: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    prompt_spans: tuple[tuple[int, int], ...]
    root: int

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of the table that this pack fills."""
        return tuple(row for group in self.groups for row in group.rows)


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of what all prompts begin with, at most one token short of the shortest prompt."""
    if len(prompts) < 2:
        return 0
    shortest = min(len(p) for p in prompts)
    ordered = sorted(tuple(p) for p in prompts)
    first, last = ordered[0], ordered[-1]  # in lexical order everything else lies between these two
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), shortest)
    return min(shared, shortest - 1)


def pack(groups: Sequence[Group], *, budget: int) -> list[Pack]:
    """Lay groups into packs of at most `budget` tokens (a larger group gets a pack of its own).

    Groups keep their order, so that the same input always gives the same packs.
    """
    root = common_prefix([g.prompt for g in groups])
    packs: list[Pack] = []
    waiting: list[Group] = []
    used = root
    for group in groups:
        size = len(group.prompt) - root + sum(len(c) for c in group.completions)
        if waiting and used + size > budget:
            packs.append(_lay(waiting, root))
            waiting, used = [], root
        waiting.append(group)
        used += size
    if waiting:
        packs.append(_lay(waiting, root))
    return packs


def _lay(groups: Sequence[Group], root: int) -> Pack:
    tokens: list[int] = list(groups[0].prompt[:root])
    positions: list[int] = list(range(root))
    # (start, end, starts of the ancestors' segments) of every segment, to fill the mask.
    segments: list[tuple[int, int, tuple[tuple[int, int], ...]]] = [(0, root, ())]
    source: list[int] = []
    target: list[int] = []
    row: list[int] = []
    column: list[int] = []
    ends: list[int] = []
    spans: list[tuple[int, int]] = []
    prompt_spans: list[tuple[int, int]] = []
    for group in groups:
        own = group.prompt[root:]
        start, end = len(tokens), len(tokens) + len(own)
        tokens += own
        positions += range(root, root + len(own))
        segments.append((start, end, ((0, root),)))
        ends.append(end - 1)
        prompt_spans.append((start, end))
        for name, completion in zip(group.rows, group.completions, strict=True):
            first, last = len(tokens), len(tokens) + len(completion)
            tokens += completion
            positions += range(len(group.prompt), len(group.prompt) + len(completion))
            segments.append((first, last, ((0, root), (start, end))))
            spans.append((first, last - 1))
            source += [end - 1, *range(first, last - 1)]
            target += completion
            row += [name] * len(completion)
            column += range(len(completion))
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for first, last, ancestors in segments:
        n = last - first
        mask[first:last, first:last] = torch.ones(n, n, dtype=torch.bool).tril()
        for begin, stop in ancestors:
            mask[first:last, begin:stop] = True
    return Pack(
        groups=tuple(groups),
        tokens_T=torch.tensor(tokens),
        position_T=torch.tensor(positions),
        mask_TT=mask,
        source_N=torch.tensor(source, dtype=torch.long),
        target_N=torch.tensor(target, dtype=torch.long),
        row_N=torch.tensor(row, dtype=torch.long),
        column_N=torch.tensor(column, dtype=torch.long),
        prompt_end=tuple(ends),
        spans=tuple(spans),
        prompt_spans=tuple(prompt_spans),
        root=root,
    )
