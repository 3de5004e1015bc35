"""Attention over a packed tree, computed branch by branch instead of under one mask over everything.

In a pack of T tokens a completion sees its prompt and itself, a small part of T. So the tokens are
taken apart: the *trunk* (what has branches below it) attends to itself under a mask; the *leaves*
(completions, or prompts that have none) become rows of a padded batch, whose keys are the pack's root,
their prompt and their own tokens. The cost grows with the lengths of the texts, not with the pack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

__all__ = ["Tree", "plant", "tree_attention"]

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]

_SHORT = 256  # keys up to which plain products are faster in float32 too


@dataclasses.dataclass(frozen=True)
class Tree:
    """Where the parts of a pack lie. Its tokens are in the order root, prompts, completions.

    Args:
        root: Tokens that all texts begin with.
        trunk: Tokens with branches below them; the rest are leaves.
        width: Leaf rows a group, G; groups with fewer are filled up with empty rows.
        prompt_PK: Each group's own prompt tokens, counted from the end of the root, padded; K is 0
            when prompts are the leaves.
        prompt_back: Where each prompt token stands in `prompt_PK`, flat.
        leaf_NS: Each leaf row's tokens, counted from the end of the trunk, padded; N = P * G.
        leaf_back: Where each leaf token stands in `leaf_NS`, flat.
        trunk_seen: (trunk, trunk), True where a token sees another.
        leaf_seen: (N, S, root + K + S), the same for leaf rows.
    """

    root: int
    trunk: int
    width: int
    prompt_PK: torch.Tensor
    prompt_back: torch.Tensor
    leaf_NS: torch.Tensor
    leaf_back: torch.Tensor
    trunk_seen: torch.Tensor
    leaf_seen: torch.Tensor
    _biases: dict[tuple[torch.dtype, int], tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(
        default_factory=dict, repr=False
    )

    def to(self, device: torch.device) -> Tree:
        """The same on another device."""
        fields = ("prompt_PK", "prompt_back", "leaf_NS", "leaf_back", "trunk_seen", "leaf_seen")
        return dataclasses.replace(self, **{f: getattr(self, f).to(device) for f in fields}, _biases={})

    def bias(self, dtype: torch.dtype, repeats: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What is added to the scores, 0 or -inf, for trunk and leaves; made once for all layers."""
        if (dtype, repeats) not in self._biases:
            trunk = torch.zeros(self.trunk_seen.shape, dtype=dtype, device=self.trunk_seen.device)
            leaf = torch.zeros(self.leaf_seen.shape, dtype=dtype, device=self.leaf_seen.device)
            trunk.masked_fill_(~self.trunk_seen, float("-inf"))
            leaf.masked_fill_(~self.leaf_seen, float("-inf"))
            self._biases[dtype, repeats] = trunk.repeat(repeats, 1), leaf.repeat(1, repeats, 1)[:, None]
        return self._biases[dtype, repeats]


def plant(root: int, prompts: Sequence[int], completions: Sequence[Sequence[int]]) -> Tree:
    """Describe a pack by lengths: of the root, of each group's own prompt, and of its completions."""
    branched = any(n for group in completions for n in group)
    leaves = [list(c) for c in completions] if branched else [[n] for n in prompts]
    between = list(prompts) if branched else [0] * len(prompts)
    width = max(len(rows) for rows in leaves)
    lengths = [n for rows in leaves for n in [*rows, *[0] * (width - len(rows))]]
    prompt_PK, prompt_back = _table(between)
    leaf_NS, leaf_back = _table(lengths)
    trunk = root + sum(between)
    seen = torch.zeros(trunk, trunk, dtype=torch.bool)
    seen[:, :root] = True
    start = root
    for n in between:
        seen[start : start + n, start : start + n] = True
        start += n
    own = leaf_NS.shape[1]
    size_N = torch.tensor(lengths)
    place_S = torch.arange(own)
    # A padded place sees its row's tokens too: it must see something, and nobody looks at it.
    own_seen = (place_S[None, :, None] >= place_S[None, None, :]) & (place_S[None, None, :] < size_N[:, None, None])
    ahead_N = torch.tensor(between).repeat_interleave(width)
    ahead_seen = torch.arange(root + prompt_PK.shape[1])[None] < root + ahead_N[:, None]
    leaf_seen = torch.cat([ahead_seen[:, None].expand(-1, own, -1), own_seen], -1)
    return Tree(root, trunk, width, prompt_PK, prompt_back, leaf_NS, leaf_back, seen.tril(), leaf_seen)


def _table(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of consecutive numbers, padded with 0, and where each number stands in the flat table."""
    longest = max(lengths, default=0)
    table = torch.zeros(len(lengths), longest, dtype=torch.long)
    back, start = [], 0
    for row, n in enumerate(lengths):
        table[row, :n] = torch.arange(start, start + n)
        back.append(torch.arange(row * longest, row * longest + n))
        start += n
    return table, torch.cat(back) if back else torch.zeros(0, dtype=torch.long)


class _Lay(torch.autograd.Function):
    """Rows laid into a padded table, x[there]; `back` says which place each row of x went to.

    The gradient is a look-up as well, where that of plain indexing adds up row by row. Padded places
    hold some row, masked from all that counts, and what comes back to them is dropped.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, there.flatten())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return grads[0].index_select(0, back), None, None


class _Collect(torch.autograd.Function):
    """The way back: the table's places that hold something, in order. Padded places get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(there, back)
        return x.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        there, back = ctx.saved_tensors
        padded = torch.ones(there.numel(), dtype=torch.bool, device=there.device)
        padded[back] = False
        found = grads[0].index_select(0, there.flatten())
        return found.masked_fill_(padded.view(-1, *[1] * (found.dim() - 1)), 0.0), None, None


def _lay(x: torch.Tensor, there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """(rows, ...) -> (*there.shape, ...)."""
    if there.numel() != len(back):  # else nothing is padded, and the order is the same
        x = _Lay.apply(x, there, back)  # type: ignore[no-untyped-call]
    return x.reshape(*there.shape, *x.shape[1:])


def _collect(x: torch.Tensor, there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """(places, ...) -> (rows, ...)."""
    if there.numel() == len(back):
        return x
    found: torch.Tensor = _Collect.apply(x, there, back)  # type: ignore[no-untyped-call]
    return found


def tree_attention(
    tree: Tree, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scaling: float | None = None
) -> torch.Tensor:
    """Attention of a pack's tokens, each over its own text.

    Args:
        tree: The pack.
        query: (T, heads, width) in the pack's order.
        key: (T, kv_heads, width); each serves heads / kv_heads queries.
        value: As `key`.
        scaling: Factor on the scores; None: 1 / sqrt(width).

    Returns:
        (T, heads, width).
    """
    scale = query.shape[2] ** -0.5 if scaling is None else scaling
    longest = max(tree.trunk, tree.leaf_seen.shape[2])
    if query.device.type == "cpu" and (query.dtype == torch.bfloat16 or longest <= _SHORT):
        if torch.is_grad_enabled() and query.requires_grad:
            found: torch.Tensor = _Recomputed.apply(tree, query, key, value, scale)  # type: ignore[no-untyped-call]
            return found
        return _by_branches(tree, query, key, value, scale, _plainly)
    return _by_branches(tree, query, key, value, scale, _fused)


def _by_branches(
    tree: Tree, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, attend: Attend
) -> torch.Tensor:
    cut, heads, shared = tree.trunk, query.shape[1], key.shape[1]
    trunk_bias, leaf_bias = tree.bias(query.dtype, heads // shared)
    # Splits rather than slices: the gradient of a slice is a whole table of zeros around it.
    (trunk_q, leaf_q), *others = (torch.split(x, [cut, len(x) - cut]) for x in (query, key, value))
    parts = []
    if cut:
        q, k, v = (_by_head(x[None], shared) for x in (trunk_q, *(trunk for trunk, _ in others)))
        mixed = attend(q, k, v, trunk_bias, scale)
        parts.append(_by_token(mixed, cut, heads))
    q = _by_head(_lay(leaf_q, tree.leaf_NS, tree.leaf_back), shared)
    k, v = (_by_head(_seen_by_leaves(tree, *x), shared) for x in others)
    mixed = attend(q, k, v, leaf_bias, scale)
    flat = _by_token(mixed, tree.leaf_NS.shape[1], heads)
    parts.append(_collect(flat, tree.leaf_NS, tree.leaf_back))
    return torch.cat(parts) if cut else parts[0]


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """(N, H, S, D) queries over (N, H, L, D) keys and values by torch's own attention."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def _plainly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """The same by two products: with bfloat16 on a processor twice as fast forward, thrice as fast back."""
    rows, heads, length, width = query.shape
    q, k, v = (x.reshape(rows * heads, -1, width) for x in (query, key, value))
    if bias.dim() == 4:  # one mask a row, the same for its heads
        bias = bias.expand(-1, heads, -1, -1).reshape(rows * heads, length, -1)
    share = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale).softmax(-1)
    return torch.bmm(share, v).view(rows, heads, length, width)


class _Recomputed(torch.autograd.Function):
    """Attention that keeps its inputs as they came, and lays them out once more on the way back.

    Laid out, the keys and values of a prompt stand once for each of its completions, and a table of
    scores is larger still: none of that stays in memory between the passes.
    """

    @staticmethod
    def forward(
        ctx: Any, tree: Tree, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.tree, ctx.scale = tree, scale
        return _by_branches(tree, query, key, value, scale, _plainly)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        query, key, value = inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = _by_branches(ctx.tree, query, key, value, ctx.scale, _plainly)
        return None, *torch.autograd.grad(out, inputs, grads[0]), None


def _seen_by_leaves(tree: Tree, trunk: torch.Tensor, leaves: torch.Tensor) -> torch.Tensor:
    """(trunk, heads, width), (leaves, heads, width) -> (N, root + K + S, heads, width): what leaf rows may look at."""
    rows, groups = len(tree.leaf_NS), len(tree.prompt_PK)
    root, own = torch.split(trunk, [tree.root, tree.trunk - tree.root])
    prompt = _lay(own, tree.prompt_PK, tree.prompt_back)
    prompt = prompt[:, None].expand(groups, tree.width, *prompt.shape[1:]).flatten(0, 1)
    return torch.cat([root.expand(rows, *root.shape), prompt, _lay(leaves, tree.leaf_NS, tree.leaf_back)], 1)


def _by_head(x: torch.Tensor, shared: int) -> torch.Tensor:
    """(N, S, heads, width) -> (N, kv_heads, heads / kv_heads * S, width): queries that share a key become rows."""
    rows, length, heads, width = x.shape
    if heads == shared:
        return x.transpose(1, 2)
    apart = x.view(rows, length, shared, heads // shared, width).permute(0, 2, 3, 1, 4)
    return apart.reshape(rows, shared, -1, width)


def _by_token(x: torch.Tensor, length: int, heads: int) -> torch.Tensor:
    """(N, kv_heads, heads / kv_heads * S, width) -> (N * S, heads, width)."""
    rows, shared, _, width = x.shape
    return x.view(rows, shared, -1, length, width).permute(0, 3, 1, 2, 4).reshape(rows * length, heads, width)
