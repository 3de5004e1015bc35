"""Many texts in one row, each shared prefix only once.

A batch of prompts with completions is a tree: what all prompts begin with (the system turn), then
each prompt's own tokens, then its completions. `pack` lays such trees into rows of a token budget;
every token sees its ancestors and nothing else, and keeps the position it would have alone, so the
result equals separate, padded forward passes while no shared or padding token is computed twice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from tutelage.engines.tree import Tree, plant

__all__ = ["Group", "Pack", "common_prefix", "pack"]


@dataclasses.dataclass(frozen=True)
class Group:
    """One prompt's tokens and its completions' tokens; `rows` name the completions to the caller."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]


@dataclasses.dataclass
class Pack:
    """One row of packed trees, in the order root, prompts, completions.

    `tree` describes it for attention.
    `source_N` is the position whose hidden state predicts `target_N`; `row_N` and `column_N` say
    where that prediction belongs in a (completions, tokens) table. `prompt_end` and `span` give, in
    the order of `groups`, the packed index of each prompt's last token, and of each completion's
    first and last token.
    """

    groups: tuple[Group, ...]
    tokens_T: torch.Tensor
    position_T: torch.Tensor
    tree: Tree
    source_N: torch.Tensor
    target_N: torch.Tensor
    row_N: torch.Tensor
    column_N: torch.Tensor
    prompt_end: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    prompt_spans: tuple[tuple[int, int], ...]
    root: int

    @functools.cached_property
    def mask_TT(self) -> torch.Tensor:
        """What `tree` says as one mask, True where a token sees another; formed when it is first asked for."""
        mask = torch.zeros(len(self.tokens_T), len(self.tokens_T), dtype=torch.bool)
        mask[:, : self.root] = True
        spans = iter(self.spans)
        for group, (start, end) in zip(self.groups, self.prompt_spans, strict=True):
            mask[start:end, start:end] = True
            for _ in group.completions:
                first, last = next(spans)
                mask[first : last + 1, first : last + 1] = True
                mask[first : last + 1, start:end] = True
        return mask.tril_()

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
    prompt_spans: list[tuple[int, int]] = []
    for group in groups:
        start = len(tokens)
        tokens += group.prompt[root:]
        positions += range(root, len(group.prompt))
        prompt_spans.append((start, len(tokens)))
    spans: list[tuple[int, int]] = []
    source: list[int] = []
    target: list[int] = []
    row: list[int] = []
    column: list[int] = []
    for group, prompt in zip(groups, prompt_spans, strict=True):
        for name, completion in zip(group.rows, group.completions, strict=True):
            first, last = len(tokens), len(tokens) + len(completion)
            tokens += completion
            positions += range(len(group.prompt), len(group.prompt) + len(completion))
            spans.append((first, last - 1))
            source += [prompt[1] - 1, *range(first, last - 1)] if completion else []
            target += completion
            row += [name] * len(completion)
            column += range(len(completion))
    return Pack(
        groups=tuple(groups),
        tokens_T=torch.tensor(tokens),
        position_T=torch.tensor(positions),
        tree=plant(root, [b - a for a, b in prompt_spans], [[len(c) for c in g.completions] for g in groups]),
        source_N=torch.tensor(source, dtype=torch.long),
        target_N=torch.tensor(target, dtype=torch.long),
        row_N=torch.tensor(row, dtype=torch.long),
        column_N=torch.tensor(column, dtype=torch.long),
        prompt_end=tuple(end - 1 for _, end in prompt_spans),
        spans=tuple(spans),
        prompt_spans=tuple(prompt_spans),
        root=root,
    )
