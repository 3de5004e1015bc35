"""Unlikelihood worked by hand: value, gradient, the ends of the scale, and which tokens are marked."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.engines.batch import Batch
from tutelage.errors import InputError, RecipeError
from tutelage.objectives.unlikelihood import (
    Unlikelihood,
    context_unlikelihood,
    log1mexp,
    mark_repeats,
    mark_spans,
    sequence_repetition,
)

F64 = torch.float64
TOKENS = st.lists(st.integers(0, 3), max_size=24)


def batch(p: list[list[float]], weight: list[list[float]], rows: int | None = None) -> Batch:
    """Probabilities of realised tokens, NaN beyond the end."""
    table = torch.tensor(p, dtype=F64)
    keep = (~table.isnan()).to(F64)
    logp = table.nan_to_num(1.0).log().requires_grad_(True)
    zeros = torch.zeros_like(keep)
    return Batch(logp, keep, zeros, zeros, torch.tensor(weight, dtype=F64), rows or len(p), int(keep.sum()))


def test_value_and_gradient_by_hand() -> None:
    """p = 1/2 wanted twice over, 3/4 unwanted, 1/5 unmarked; alpha 3, two rows in the step.

    L = [2 log 2 + 3 log 4] / 2 = 4 log 2. dL/dlogp: -2 / 2 = -1; 3 (3/4 / 1/4) / 2 = 4.5; 0; and 0 beyond the end.
    """
    b = batch([[0.5, 0.75], [0.2, math.nan]], [[2.0, -1.0], [0.0, -1.0]])
    loss = Unlikelihood(alpha=3.0)(b)
    assert float(loss.value.detach()) == pytest.approx(4 * math.log(2))
    (grad,) = torch.autograd.grad(loss.value, b.logp_BT)
    assert torch.allclose(grad, torch.tensor([[-1.0, 4.5], [0.0, 0.0]], dtype=F64))
    expected = {"nll_wanted": 2 * math.log(2), "unlikelihood": math.log(4), "share_unwanted": 1.0}
    assert loss.sums == pytest.approx(expected | {"mass_unwanted": 0.75, "tokens": 3.0})


def test_alpha_weighs_the_unwanted_only() -> None:
    b = batch([[0.5, 0.75]], [[1.0, -1.0]])
    values = [float(Unlikelihood(alpha=a)(b).value.detach()) for a in (0.0, 1.0, 2.0)]
    assert values == pytest.approx([math.log(2), 3 * math.log(2), 5 * math.log(2)])
    for alpha in (-1.0, math.nan):
        with pytest.raises(RecipeError, match="alpha"):
            Unlikelihood(alpha=alpha)


def test_parts_of_a_step_add_up() -> None:
    p, weight = [[0.5, 0.75], [0.2, 0.9]], [[1.0, -1.0], [-0.5, 0.0]]
    whole = float(Unlikelihood()(batch(p, weight)).value.detach())
    parts = [float(Unlikelihood()(batch([p[i]], [weight[i]], rows=2)).value.detach()) for i in range(2)]
    assert whole == pytest.approx(sum(parts))


@given(logp=st.floats(-60.0, -2e-6))
def test_log1mexp_agrees_with_ample_precision(logp: float) -> None:
    """Against the standard library's own, in double precision; in float32 to that type's rounding."""
    expected = math.log(-math.expm1(logp)) if logp > -1 else math.log1p(-math.exp(logp))
    assert float(log1mexp(torch.tensor(logp, dtype=F64))) == pytest.approx(expected, rel=1e-12, abs=1e-26)
    assert float(log1mexp(torch.tensor(logp))) == pytest.approx(expected, rel=2e-6, abs=1e-26)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_certain_token_is_still_pushed_down_and_nothing_overflows(dtype: torch.dtype) -> None:
    logp = torch.tensor([0.0, -1e-9, -200.0], dtype=dtype, requires_grad=True)
    value = -log1mexp(logp)
    assert value.tolist() == pytest.approx([-math.log(1e-6)] * 2 + [0.0], rel=1e-4)
    (grad,) = torch.autograd.grad(value.sum(), logp)
    assert grad[:2].tolist() == pytest.approx([1e6, 1e6], rel=1e-2)
    assert 0.0 <= float(grad[2]) < 1e-80 or float(grad[2]) == 0.0


def test_gradient_descent_drives_the_unwanted_token_out_and_fades() -> None:
    """From p = 0.99 over 3 tokens; the push on the logit, p itself, is gone once the token is."""
    logits = torch.tensor([6.0, 0.7, 0.7], dtype=F64, requires_grad=True)
    pushes = []
    for _ in range(60):
        logp = logits.log_softmax(-1)[0].reshape(1, 1)
        one = torch.ones(1, 1, dtype=F64)
        loss = Unlikelihood()(Batch(logp, one, 0 * one, 0 * one, -one, 1, 1))
        (grad,) = torch.autograd.grad(loss.value, logits)
        pushes.append((float(logp.detach().exp()), float(grad[0])))
        logits = (logits - grad).detach().requires_grad_(True)
    assert all(push == pytest.approx(p) for p, push in pushes)  # p/(1-p) times the softmax's (1-p)
    assert pushes[0][0] > 0.98 and pushes[-1][0] < 0.02


def test_context_unlikelihood_by_hand() -> None:
    """Reply a b b over (a, b, c), each step (1/2, 1/3, 1/6).

    Step 1: nothing before. Step 2: a, so log 2. Step 3: a again counts, b is what is due: log 2.
    A fourth step beyond the end counts nothing.
    """
    logits = torch.tensor([1 / 2, 1 / 3, 1 / 6]).log().expand(1, 4, 3)
    tokens, keep = torch.tensor([[0, 1, 1, 2]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert context_unlikelihood(logits, tokens, keep)[0].tolist() == pytest.approx([0.0, *[math.log(2)] * 2, 0.0])
    tokens = torch.tensor([[0, 1, 2, 0]])
    got = context_unlikelihood(logits, tokens, torch.ones(1, 4))[0]
    assert got.tolist() == pytest.approx([0.0, math.log(2), math.log(3), math.log(3 / 2) + math.log(6 / 5)])


def test_repetition_by_hand() -> None:
    """a b a b a: 2-grams ab ba ab ba, two of four distinct; the second ab and ba cover tokens 3 to 5."""
    assert sequence_repetition("ababa", 2) == 0.5
    assert mark_repeats("ababa", 2) == [0.0, 0.0, -1.0, -1.0, -1.0]
    assert mark_repeats("ababa", 2, weight=-0.5, rest=0.1) == [0.1, 0.1, -0.5, -0.5, -0.5]
    assert mark_repeats("abcab", 2) == [0.0, 0.0, 0.0, -1.0, -1.0]
    assert mark_repeats("abcab", 3) == [0.0] * 5
    assert sequence_repetition("aaaa", 1) == 0.75
    assert sequence_repetition("abc", 4) is None and mark_repeats("abc", 4) == [0.0] * 3
    with pytest.raises(RecipeError, match="length 0"):
        mark_repeats("abc", 0)


@given(tokens=TOKENS, n=st.integers(1, 4))
def test_marks_and_metric_agree(tokens: list[int], n: int) -> None:
    """Something is marked exactly where seq-rep-n > 0; what is left unmarked repeats nothing.

    Independent of the running set: a token is marked iff an n-gram over it occurs at an earlier place.
    """
    marks = [w < 0 for w in mark_repeats(tokens, n)]
    assert any(marks) == ((sequence_repetition(tokens, n) or 0.0) > 0.0)
    starts = range(len(tokens) - n + 1)
    again = {i for i in starts if any(tokens[j : j + n] == tokens[i : i + n] for j in range(i))}
    assert marks == [any(t - n < i <= t for i in again) for t in range(len(tokens))]


def test_spans_by_hand() -> None:
    """'He was born in 1912', tokens of 2, 4, 5, 3, 5 characters and an end of turn; 1912 is false, 'born in' well said."""
    offsets = [(0, 2), (2, 6), (6, 11), (11, 14), (14, 19), (19, 19)]
    assert mark_spans(offsets, [(15, 19, -1.0), (7, 14, 0.5)]) == [0.0, 0.0, 0.5, 0.5, -1.0, 0.0]
    assert mark_spans(offsets, [(10, 16, 0.5), (15, 19, -1.0)], rest=0.1) == [0.1, 0.1, 0.5, 0.5, -1.0, 0.1]
    assert mark_spans(offsets, []) == [0.0] * 6
    assert mark_spans([(0, 2), (1, 1), (2, 3)], [(0, 2, -1.0)]) == [-1.0, -1.0, 0.0]  # a byte of a longer character
    for bad in ((3, 3, 1.0), (4, 2, 1.0), (-1, 2, 1.0), (0, 20, 1.0), (0, 2, math.nan)):
        with pytest.raises(InputError, match="span"):
            mark_spans(offsets, [bad])


@settings(max_examples=60)
@given(cuts=st.lists(st.integers(1, 4), min_size=1, max_size=8), data=st.data())
def test_a_token_is_marked_iff_it_shares_a_character(cuts: list[int], data: st.DataObject) -> None:
    ends = [sum(cuts[: i + 1]) for i in range(len(cuts))]
    offsets = list(zip([0, *ends[:-1]], ends, strict=True))
    start = data.draw(st.integers(0, ends[-1] - 1))
    end = data.draw(st.integers(start + 1, ends[-1]))
    expected = [-1.0 if set(range(a, b)) & set(range(start, end)) else 0.0 for a, b in offsets]
    assert mark_spans(offsets, [(start, end, -1.0)]) == expected
