"""Attention by branches equals attention under one mask over the whole pack: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tutelage.engines import tree
from tutelage.engines.packing import Group, pack
from tutelage.engines.tree import plant, tree_attention

SIZES = st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 6), max_size=4)), min_size=1, max_size=4)


def by_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask_TT: torch.Tensor) -> torch.Tensor:
    """The textbook: every token against every other, under the mask, keys repeated for their queries."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / q.shape[2] ** 0.5
    return torch.einsum("hts,shd->thd", scores.masked_fill(~mask_TT, float("-inf")).softmax(-1), v)


@given(
    root=st.integers(0, 4),
    sizes=SIZES,
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    longest=st.sampled_from([256, 0]),
)
def test_values_and_gradients_equal_attention_under_a_mask(
    root: int, sizes: list[tuple[int, list[int]]], heads: tuple[int, int], longest: int
) -> None:
    """Ragged prompts, ragged and empty completions, groups with more or fewer of them; both ways to attend."""
    shared = tuple(range(100, 100 + root))
    groups, row = [], 0
    for number, (own, lengths) in enumerate(sizes):
        rows = tuple(range(row, row + len(lengths)))
        row += len(lengths)
        groups.append(Group((*shared, *[number] * own), tuple((7,) * n for n in lengths), rows))
    (part,) = pack(groups, budget=10_000)
    count = len(part.tokens_T)
    random = torch.Generator().manual_seed(count)
    q, k, v = (torch.randn(count, h, 8, generator=random, requires_grad=True) for h in (heads[0], heads[1], heads[1]))
    weight = torch.randn(count, heads[0], 8, generator=random)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "_SHORT", longest)
        ours = tree_attention(part.tree, q, k, v)
    theirs = by_mask(q, k, v, part.mask_TT)
    assert torch.allclose(ours, theirs, atol=1e-5)
    got = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((theirs * weight).sum(), (q, k, v))
    for a, b in zip(got, wanted, strict=True):
        assert torch.isfinite(a).all()
        assert torch.allclose(a, b, atol=1e-4)


def test_a_tree_by_hand() -> None:
    """Root of 1, prompts of 2 and 1 tokens; the first has completions of 2 and 1, the second one of 1."""
    planted = plant(1, [2, 1], [[2, 1], [1]])
    assert (planted.trunk, planted.width) == (4, 2)
    assert planted.prompt_PK.tolist() == [[0, 1], [2, 0]] and planted.prompt_back.tolist() == [0, 1, 2]
    assert planted.leaf_NS.tolist() == [[0, 1], [2, 0], [3, 0], [0, 0]] and planted.leaf_back.tolist() == [0, 1, 2, 4]
    assert planted.trunk_seen.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    # Keys of a leaf row: root, two places for the prompt, two for its own tokens.
    assert planted.leaf_seen[0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert planted.leaf_seen[2].int().tolist() == [[1, 1, 0, 1, 0], [1, 1, 0, 1, 0]]
    assert planted.leaf_seen[3].int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]  # an empty row


def test_prompts_without_completions_are_leaves() -> None:
    planted = plant(3, [2, 4], [[], [0]])
    assert planted.trunk == 3 and planted.leaf_NS.shape == (2, 4) and planted.prompt_PK.shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_mask_is_made_once_for_all_layers(dtype: torch.dtype) -> None:
    planted = plant(2, [3], [[2, 2]])
    first = planted.bias(dtype, 3)
    assert planted.bias(dtype, 3) is first and first[0].dtype == dtype
    x = torch.randn(9, 3, 8, dtype=dtype)
    y = torch.randn(9, 1, 8, dtype=dtype)
    assert tree_attention(planted, x, y, y).shape == F.relu(x).shape
