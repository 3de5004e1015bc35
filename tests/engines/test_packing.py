"""A packed tree says and teaches exactly what separate passes over whole texts do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from tutelage.engines.attention import AttentionPlan, attention_plan
from tutelage.engines.packing import Group, Pack, common_prefix, pack

TOKEN = st.integers(3, 40)


@st.composite
def group_lists(draw: st.DrawFn) -> list[Group]:
    """Prompts with or without a shared beginning, each with zero to three completions."""
    shared = tuple(draw(st.lists(TOKEN, max_size=5)))
    groups, row = [], 0
    for _ in range(draw(st.integers(1, 5))):
        prompt = shared + tuple(draw(st.lists(TOKEN, min_size=0 if shared else 1, max_size=6)))
        completions = tuple(
            tuple(c) for c in draw(st.lists(st.lists(TOKEN, min_size=1, max_size=5), min_size=0, max_size=3))
        )
        groups.append(Group(prompt, completions, tuple(range(row, row + len(completions)))))
        row += len(completions)
    return groups


def text_seen(part: Pack, index: int) -> tuple[int, ...]:
    """The tokens that a packed token sees, by position; it must see every position once."""
    seen = part.mask_TT[index].nonzero()[:, 0]
    positions = part.position_T[seen]
    assert sorted(positions.tolist()) == list(range(int(part.position_T[index]) + 1))
    return tuple(part.tokens_T[seen[positions.argsort()]].tolist())


@given(groups=group_lists(), budget=st.integers(1, 60))
def test_every_token_sees_its_own_text_and_nothing_else(groups: list[Group], budget: int) -> None:
    packs = pack(groups, budget=budget)
    assert [g for part in packs for g in part.groups] == groups
    for part in packs:
        predictions: dict[int, list[tuple[tuple[int, ...], int, int]]] = {}
        for source, target, row, column in zip(
            part.source_N.tolist(),
            part.target_N.tolist(),
            part.row_N.tolist(),
            part.column_N.tolist(),
            strict=True,
        ):
            predictions.setdefault(row, []).append((text_seen(part, source), target, column))
        spans = iter(part.spans)
        for group, end, (start, stop) in zip(part.groups, part.prompt_end, part.prompt_spans, strict=True):
            assert text_seen(part, end) == group.prompt
            assert stop - 1 == end and stop - start == len(group.prompt) - part.root
            for row, completion in zip(group.rows, group.completions, strict=True):
                whole = group.prompt + completion
                assert predictions[row] == [
                    (whole[: len(group.prompt) + t], token, t) for t, token in enumerate(completion)
                ]
                first, last = next(spans)
                assert last - first + 1 == len(completion)
                assert text_seen(part, last) == whole
        assert part.rows == tuple(row for group in part.groups for row in group.rows)


@given(groups=group_lists(), budget=st.integers(1, 60))
def test_packs_keep_to_the_budget_and_hold_nothing_twice(groups: list[Group], budget: int) -> None:
    root = common_prefix([g.prompt for g in groups])
    for part in pack(groups, budget=budget):
        own = sum(len(g.prompt) - root + sum(map(len, g.completions)) for g in part.groups)
        assert len(part.tokens_T) == root + own
        assert len(part.tokens_T) <= budget or len(part.groups) == 1
    again = [part.tokens_T.tolist() for part in pack(groups, budget=budget)]
    assert again == [part.tokens_T.tolist() for part in pack(groups, budget=budget)]


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([(1, 2, 3)], 0),
        ([(1, 2, 3), (1, 2, 4)], 2),
        ([(1, 2), (1, 2, 4)], 1),  # one short of the shortest, so that every prompt keeps a last token
        ([(5,), (5, 6)], 0),
        ([(1, 2), (3, 4)], 0),
    ],
)
def test_common_prefix(prompts: list[tuple[int, ...]], length: int) -> None:
    assert common_prefix(prompts) == length


GROUPS = (
    Group((5, 6, 7, 8, 9), ((10, 11, 12), (13, 14), (15,)), (0, 1, 2)),
    Group((5, 6, 7, 20), ((21, 22, 23, 24, 25), (26, 27)), (3, 4)),
    Group((5, 6, 7, 30, 31, 32), ((33, 34),), (5,)),
)


def packed_loss(lm: Any, budget: int, weight_BT: torch.Tensor, *, by: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(table of log-probabilities, weighted sum) from packed trees."""
    logp_BT = torch.zeros(6, 5)
    for part in pack(GROUPS, budget=budget):
        plan = AttentionPlan(tree=part.tree) if by == "tree" else AttentionPlan(mask_TT=part.mask_TT)
        with attention_plan(plan):
            hidden = lm.hidden(part.tokens_T[None], part.position_T[None])[0]
        table = (hidden[part.source_N] @ lm.head_VD.T).log_softmax(-1)
        chosen = table.gather(1, part.target_N[:, None])[:, 0]
        logp_BT = logp_BT.index_put((part.row_N, part.column_N), chosen)
    return logp_BT, (logp_BT * weight_BT).sum()


def separate_loss(model: Any, weight_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from one unpadded pass of plain transformers a completion."""
    logp_BT = torch.zeros(6, 5)
    for group in GROUPS:
        for row, completion in zip(group.rows, group.completions, strict=True):
            logits = model(torch.tensor([group.prompt + completion])).logits[0, len(group.prompt) - 1 : -1]
            logp = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
            logp_BT = logp_BT.index_put((torch.full_like(logp, row).long(), torch.arange(len(logp))), logp)
    return logp_BT, (logp_BT * weight_BT).sum()


@pytest.mark.parametrize("by", ["tree", "mask"])
@pytest.mark.parametrize("budget", [12, 4096])
def test_log_probs_and_gradients_equal_separate_passes(
    architecture: str, budget: int, by: str, load_tiny: Callable[[str], Any], plain_models: dict[str, Any]
) -> None:
    lm, plain = load_tiny(architecture), plain_models[architecture]
    lm.model.requires_grad_(True)
    weight_BT = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    ours, our_loss = packed_loss(lm, budget, weight_BT, by=by)
    theirs, their_loss = separate_loss(plain, weight_BT)
    assert (ours - theirs).abs().max() < 1e-4
    names = [name for name, _ in plain.named_parameters()]
    assert names == [name for name, _ in lm.model.named_parameters()]
    our_grads = torch.autograd.grad(our_loss, list(lm.model.parameters()))
    their_grads = torch.autograd.grad(their_loss, list(plain.parameters()))
    for name, got, wanted in zip(names, our_grads, their_grads, strict=True):
        scale = float(wanted.abs().max())
        if scale < 1e-5:  # a key's bias shifts all scores alike: its gradient is zero but for rounding
            assert got.abs().max() < 1e-4, name
            continue
        assert (got - wanted).abs().max() < 1e-4 * max(1.0, scale), name
        assert cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.9999, name
