"""Rows drawn each by its own setting: masked, tempered, truncated, and renormalised over what is left."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from tutelage.engines.sampling import Menu, draw, draw_rows, shape_logits, shape_rows
from tutelage.errors import ModelError
from tutelage.records import SamplerSettings


def menu(*lines: tuple[float, int, int], barred: list[list[int]] | None = None, size: int = 4) -> Menu:
    """Lines (temperature, top-k, mask); mask n > 0 bars the n-th list of tokens."""
    table = torch.zeros(1 + len(barred or []), size, dtype=torch.bool)
    for row, tokens in enumerate(barred or [], 1):
        table[row, tokens] = True
    t, k, m = zip(*lines, strict=True)
    return Menu(torch.tensor(t, dtype=torch.float32), torch.tensor(k), torch.tensor(m), table)


def test_a_row_by_hand() -> None:
    """Probabilities .5 .3 .15 .05; the first token barred, temperature 1/2, the two likeliest of the rest.

    .3 and .15 squared are .09 and .0225: shares .8 and .2.
    """
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    lines = menu((0.5, 2, 1), (0.0, 2, 1), (1.0, 0, 0), barred=[[0]])
    p = shape_rows(logits.repeat(3, 1), lines, torch.tensor([0, 1, 2])).softmax(-1)
    assert p[0].tolist() == pytest.approx([0.0, 0.8, 0.2, 0.0], abs=1e-6)
    # Greedy: masked, neither tempered nor cut; the likeliest is taken, with its share of what is allowed.
    assert p[1].tolist() == pytest.approx([0.0, 0.6, 0.3, 0.1], abs=1e-6)
    assert p[2].tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=1e-6)
    tokens, logp = draw_rows(logits.repeat(3, 1), torch.tensor([0.9, 0.99, 0.6]), lines, torch.tensor([0, 1, 2]))
    assert tokens.tolist() == [2, 1, 1]
    assert logp.exp().tolist() == pytest.approx([0.2, 0.6, 0.3], abs=1e-5)


LINES = [(0.0, 0), (0.3, 0), (1.0, 0), (1.0, 3), (0.7, 5), (2.5, 1), (1.0, 99)]


@settings(max_examples=30)
@given(rows=st.lists(st.integers(0, len(LINES) - 1), min_size=1, max_size=40), seed=st.integers(0, 10**6))
def test_each_row_is_drawn_as_if_its_setting_were_everybodys(rows: list[int], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), 23, generator=random) * 3
    uniform, before = torch.rand(len(rows), generator=random), logits.clone()
    lines = menu(*[(t, k, 0) for t, k in LINES], size=23)
    actions = torch.tensor(rows)
    tokens, logp = draw_rows(logits, uniform, lines, actions)
    shaped = shape_rows(logits, lines, actions)
    assert torch.equal(logits, before)  # nothing is changed in place
    for row, (t, k) in enumerate(LINES[a] for a in rows):
        one = SamplerSettings(t, k)
        alone, alone_logp = draw(logits[row : row + 1], uniform[row : row + 1], one)
        assert int(alone) == int(tokens[row])
        assert abs(float(alone_logp) - float(logp[row])) < 1e-5
        if t:
            assert torch.allclose(shaped[row], shape_logits(logits[row : row + 1], one)[0], atol=1e-5)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10**6),
    barred=st.lists(st.integers(0, 11), min_size=1, max_size=11, unique=True),
    temperature=st.sampled_from([0.0, 0.2, 1.0, 3.0]),
    top_k=st.integers(0, 14),
    uniform=st.floats(0, 0.75, width=32),
)
def test_a_mask_excludes_its_tokens_and_the_rest_sums_to_one(
    seed: int, barred: list[int], temperature: float, top_k: int, uniform: float
) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed)) * 4
    lines, action = menu((temperature, top_k, 1), barred=[barred], size=12), torch.tensor([0])
    p = shape_rows(logits, lines, action).softmax(-1)[0]
    assert float(p[barred].sum()) == 0.0
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-6)
    kept = torch.tensor([t not in barred for t in range(12)])
    truncated = top_k and temperature
    assert int((p > 0).sum()) <= (min(top_k, int(kept.sum())) if truncated else int(kept.sum()))
    # Among what is left, odds are the model's own, tempered.
    left = (p > 1e-30).nonzero()[:, 0]
    odds = p[left].log() - (logits[0, left] / (temperature or 1.0)).log_softmax(-1)
    assert torch.allclose(odds, odds[:1].expand_as(odds), atol=1e-3)
    tokens, logp = draw_rows(logits, torch.tensor([uniform]), lines, action)
    assert int(tokens) not in barred
    assert float(logp) == pytest.approx(float(p[tokens].log()), abs=1e-5)
    if temperature == 0.0:
        assert int(tokens) == int(logits[0].masked_fill(~kept, -1e9).argmax())


def test_draws_under_a_mask_follow_the_renormalised_distribution() -> None:
    n, random = 10_000, torch.Generator().manual_seed(5)
    logits = torch.randn(1, 9, generator=random)
    lines = menu((0.8, 4, 1), barred=[[1, 5]], size=9)
    actions = torch.zeros(n, dtype=torch.long)
    tokens, _ = draw_rows(logits.repeat(n, 1), torch.rand(n, generator=random), lines, actions)
    p = shape_rows(logits, lines, actions[:1]).double().softmax(-1)[0].numpy()
    counts = np.bincount(tokens.numpy(), minlength=9)
    assert counts[p == 0].sum() == 0 and (p > 0).sum() == 4
    assert chisquare(counts[p > 0], n * p[p > 0]).pvalue > 0.01


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ModelError, match="not finite"):
        draw_rows(
            torch.tensor([[0.0, float("nan")]]), torch.tensor([0.5]), menu((1.0, 0, 0), size=2), torch.tensor([0])
        )


def test_a_line_is_kept_as_the_record_of_a_reply() -> None:
    lines: Any = menu((0.2, 0, 0), (1.0, 7, 1), barred=[[0]])
    assert len(lines) == 2
    assert lines.settings(0, 9) == SamplerSettings(0.2, 0, max_new_tokens=9)
    assert lines.settings(1, 9) == SamplerSettings(1.0, 7, max_new_tokens=9)


def test_a_token_that_is_due_is_drawn_with_probability_one_and_the_rest_as_ever() -> None:
    """Openings (3, 1) and none: at place 0 of the first line only 3 may come, at place 1 only 1, then anything."""
    plain = menu((0.5, 2, 1), (0.0, 0, 0), (1.0, 0, 0), barred=[[3]])
    lines = dataclasses.replace(plain, openings=((3, 1), (2,), ()))
    assert plain.due([0, 1], [0, 0]) is None and lines.due([0, 2], [2, 0]) is None
    due = lines.due([0, 0, 0, 1, 2], [0, 1, 2, 0, 0])
    assert due is not None and due.tolist() == [3, 1, -1, 2, -1]
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    before, uniform, action = logits.clone(), torch.full((5,), 0.4), torch.tensor([0, 0, 0, 1, 2])
    tokens, logp = draw_rows(logits, uniform, lines, action, due)
    free, free_logp = draw_rows(logits, uniform, lines, action)
    assert tokens.tolist() == [3, 1, int(free[2]), 2, int(free[4])]
    assert logp.tolist() == [0.0, 0.0, float(free_logp[2]), 0.0, float(free_logp[4])]
    assert torch.equal(logits, before)
