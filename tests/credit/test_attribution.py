"""Signed credit against rewards whose parts are known, exact Shapley values, and single forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.credit.attribution import (
    gradient_input,
    integrated_gradients,
    mean_embedding,
    prefix_difference,
    reward_of,
)
from tutelage.credit.faithfulness import additive_truth, completeness_error, correlation
from tutelage.credit.shapley import Game, shapley
from tutelage.credit.tokens import assign_signed, weights
from tutelage.errors import InputError

ALL = torch.ones(1, 3)
METHODS = (integrated_gradients, gradient_input)


def x_of(*rows: float) -> torch.Tensor:
    """One row of tokens with one-dimensional embeddings."""
    return torch.tensor([[[v] for v in rows]])


# -- prefix difference ------------------------------------------------------------------------------


def test_prefix_difference_by_hand() -> None:
    """Rewards of prefixes 0.5, 0.2, 1.0 after an empty reply's 0.1: 0.4, -0.3, 0.8, together 0.9."""
    states = x_of(0.5, 0.2, 1.0)
    got = prefix_difference(states, ALL, lambda h: h[..., 0], prompt_BD=torch.tensor([[0.1]]))
    assert got.score_BT[0].tolist() == pytest.approx([0.4, -0.3, 0.8])
    assert got.change_B.tolist() == pytest.approx([0.9])
    assert got.error_B.tolist() == pytest.approx([0.0], abs=1e-6)
    without = prefix_difference(states, ALL, lambda h: h[..., 0])
    assert without.score_BT[0].tolist() == pytest.approx([0.5, -0.3, 0.8])


def test_prefix_difference_of_a_pooled_head_by_hand() -> None:
    """Running means of 2, 4, 9 are 2, 3, 5."""
    got = prefix_difference(x_of(2.0, 4.0, 9.0), ALL, lambda h: h[..., 0], pool="mean")
    assert got.score_BT[0].tolist() == pytest.approx([2.0, 1.0, 2.0])


def test_what_lies_behind_a_reply_gets_nothing() -> None:
    keep = torch.tensor([[1.0, 1.0, 0.0]])
    for pool in ("last", "mean"):
        got = prefix_difference(x_of(1.0, 3.0, 99.0), keep, lambda h: h[..., 0], pool=pool)  # type: ignore[arg-type]
        assert got.score_BT[0, 2] == 0 and got.change_B.tolist() == [3.0 if pool == "last" else 2.0]


@pytest.fixture(scope="module")
def sums() -> Callable[[], Any]:
    """A tiny reply's tokens, where they lie, and a head."""
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(3, 300, (2, 11), generator=generator)
    head_D = 0.3 * torch.randn(48, generator=generator)
    return lambda: (tokens_BT, lambda h: torch.tanh(h.float() @ head_D))


def test_one_causal_forward_gives_what_single_forwards_of_prefixes_give(tiny_lm: Any, sums: Any) -> None:
    tokens_BT, head = sums()
    with torch.no_grad():
        states = tiny_lm.body(input_ids=tokens_BT, use_cache=False).last_hidden_state
        got = prefix_difference(states[:, 4:], torch.ones(2, 7), head, prompt_BD=states[:, 3])
        single = torch.stack(
            [
                head(tiny_lm.body(input_ids=tokens_BT[:, : n + 1], use_cache=False).last_hidden_state[:, -1])
                for n in range(3, 11)
            ],
            1,
        )
    assert torch.allclose(got.score_BT, single[:, 1:] - single[:, :-1], atol=1e-5)
    assert torch.allclose(got.change_B, single[:, -1] - single[:, 0], atol=1e-5)


# -- gradients --------------------------------------------------------------------------------------


def test_a_cubic_by_hand() -> None:
    """R = (x1 + x2)^3 at (1, 2): 27, by x: 9 and 18; two points of the rule are exact. Gradient 27: 27 and 54."""

    def value(x: torch.Tensor) -> torch.Tensor:
        return x[:, :2, 0].sum(-1) ** 3

    x = x_of(1.0, 2.0, 5.0)
    got = integrated_gradients(value, x, ALL, steps=2)
    assert got.score_BT[0].tolist() == pytest.approx([9.0, 18.0, 0.0])
    assert got.change_B.tolist() == pytest.approx([27.0]) and got.error_B.tolist() == pytest.approx([0.0], abs=1e-4)
    coarse = integrated_gradients(value, x, ALL, steps=1)  # the midpoint: 3 * 1.5^2 = 6.75
    assert coarse.score_BT[0].tolist() == pytest.approx([6.75, 13.5, 0.0])
    assert coarse.error_B.tolist() == pytest.approx([6.75])
    end = gradient_input(value, x, ALL)
    assert end.score_BT[0].tolist() == pytest.approx([27.0, 54.0, 0.0])
    assert end.error_B.tolist() == pytest.approx([-54.0])


@pytest.mark.parametrize("method", METHODS)
def test_the_prompt_stays_as_it_is_and_gets_nothing(method: Any) -> None:
    """R = x1 x2 x3 with x1 = 2 held: a blank of 1 has 2, the reply 2 * 3 * 4 = 24."""
    got = method(lambda x: x[..., 0].prod(-1), x_of(2.0, 3.0, 4.0), torch.tensor([[0.0, 1.0, 1.0]]),
                 baseline=torch.ones(1))  # fmt: skip
    assert got.score_BT[0, 0] == 0
    assert got.change_B.tolist() == pytest.approx([22.0])


def test_no_steps_are_refused() -> None:
    with pytest.raises(InputError, match="0 steps"):
        integrated_gradients(lambda x: x.sum((1, 2)), x_of(1.0), torch.ones(1, 1), steps=0)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 6))
def test_on_pairs_integrated_gradients_are_the_exact_shapley_values(seed: int, n: int) -> None:
    """R = sum w x + sum x J x: along the straight path each of a pair gets half, as over all orders."""
    generator = torch.Generator().manual_seed(seed)
    w_T, x_T = torch.randn(n, generator=generator).double(), torch.randn(n, generator=generator).double()
    pairs_TT = torch.randn(n, n, generator=generator).double()

    def value(x: torch.Tensor) -> torch.Tensor:
        return x[..., 0] @ w_T + torch.einsum("bi,ij,bj->b", x[..., 0], pairs_TT, x[..., 0])

    def of_subset(names: frozenset[str]) -> float:
        stays_T = torch.tensor([float(str(k) in names) for k in range(n)]).double()
        return float(value((stays_T * x_T)[None, :, None]))

    truth = shapley(Game([str(k) for k in range(n)], of_subset))
    got = integrated_gradients(value, x_T[None, :, None], torch.ones(1, n), steps=2)
    assert got.score_BT[0].tolist() == pytest.approx([truth[str(k)] for k in range(n)], abs=1e-9)


def test_on_a_known_additive_reward_signed_methods_find_the_truth_and_unsigned_ones_do_not() -> None:
    generator = torch.Generator().manual_seed(3)
    tokens_BT = torch.randint(0, 20, (12, 9), generator=generator)
    worth_V = torch.randn(20, generator=generator)
    keep_BT = (torch.arange(9)[None] < torch.randint(3, 10, (12, 1), generator=generator)).float()
    truth_BT = additive_truth(tokens_BT, worth_V, keep_BT)
    embeds_BTD, reward_B = torch.nn.functional.one_hot(tokens_BT, 20).float(), truth_BT.sum(-1)
    found = {
        "prefix": prefix_difference(truth_BT.cumsum(1)[..., None], keep_BT, lambda h: h[..., 0]),
        "ig": integrated_gradients(lambda x: ((x @ worth_V) * keep_BT).sum(-1), embeds_BTD, keep_BT, steps=1),
        "gradient": gradient_input(lambda x: ((x @ worth_V) * keep_BT).sum(-1), embeds_BTD, keep_BT),
    }
    for name, got in found.items():
        credit = assign_signed(reward_B, got.score_BT, keep_BT, beta=1.0)
        assert torch.allclose(credit, truth_BT, atol=1e-5), name
        assert correlation(credit, truth_BT, keep_BT) == pytest.approx(1.0, abs=1e-6)
        assert float(completeness_error(got.score_BT, got.change_B).max()) < 1e-5
    attention = torch.rand(12, 9, generator=generator)
    for method in ("attention", "last"):
        blind = correlation(weights(method, keep_BT, attention), truth_BT, keep_BT)  # type: ignore[arg-type]
        assert blind is not None and abs(blind) < 0.5
    assert correlation(weights("uniform", keep_BT, None), truth_BT, keep_BT) is None


def test_through_a_model_the_error_vanishes_with_the_steps_and_sooner_from_the_mean_embedding(
    tiny_lms: dict[str, Any], sums: Any
) -> None:
    """The zero vector is no place for a model that divides by the size of what it reads."""
    tokens_BT, head = sums()
    keep_BT = torch.zeros(2, 11)
    keep_BT[0, 4:], keep_BT[1, 4:9] = 1.0, 1.0
    lm = tiny_lms["llama"]
    embeds = lm.model.get_input_embeddings()(tokens_BT)
    value = reward_of(lm, head, torch.tensor([10, 8]))
    with torch.no_grad():
        plain = head(lm.body(input_ids=tokens_BT[1:, :9], use_cache=False).last_hidden_state[:, -1])
        assert torch.allclose(value(embeds)[1:], plain, atol=1e-5)  # what is padded is not seen
    errors = {}
    for name, blank in (("zero", None), ("mean", mean_embedding(lm))):
        for steps in (8, 64):
            got = integrated_gradients(value, embeds, keep_BT, baseline=blank, steps=steps)
            assert not got.score_BT[keep_BT == 0].any()
            errors[name, steps] = float(got.error_B.abs().max())
    assert errors["mean", 64] < 0.1 < errors["mean", 8]
    assert errors["mean", 64] < errors["zero", 64]
    assert all(not p.requires_grad and p.grad is None for p in lm.model.parameters())
