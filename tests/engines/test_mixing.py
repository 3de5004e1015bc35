"""Mixtures of models worked by hand, and what may not change them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.engines.mixing import contrast_logp, mix_logp
from tutelage.engines.sampling import draw
from tutelage.errors import ModelError, RecipeError
from tutelage.records import SamplerSettings

NEVER = float("-inf")
SEEDS = st.integers(0, 10_000)


def logits(seed: int, rows: int = 3, size: int = 7) -> torch.Tensor:
    return 2.0 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def rows(*probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_contrast_by_hand() -> None:
    """Base (1/2, 1/4, 1/4), expert (1/2, 1/3, 1/6), anti (1/4, 1/4, 1/2), alpha 1.

    Ratios expert/anti are 2, 4/3, 1/3, so the products are 1, 1/3, 1/12, of sum 17/12: (12, 4, 1)/17.
    """
    base, expert, anti = rows([0.5, 0.25, 0.25]), rows([1 / 2, 1 / 3, 1 / 6]), rows([0.25, 0.25, 0.5])
    got = contrast_logp(base, expert, anti, alpha=1.0, top_p=1.0).exp()
    assert got[0].tolist() == pytest.approx([12 / 17, 4 / 17, 1 / 17], abs=1e-6)


def test_an_anti_expert_alone_takes_the_base_for_the_expert() -> None:
    """p^2 / q with p = (1/2, 1/2), q = (1/4, 3/4): (1, 1/3), so (3/4, 1/4)."""
    got = contrast_logp(rows([0.5, 0.5]), None, rows([0.25, 0.75]), alpha=1.0, top_p=1.0).exp()
    assert got[0].tolist() == pytest.approx([0.75, 0.25], abs=1e-6)


def test_top_p_is_taken_of_the_base_before_the_expert_is_heard() -> None:
    """Base (.6, .3, .1) at 0.8 keeps two; the expert adores the third and cannot bring it back."""
    base, expert, anti = rows([0.6, 0.3, 0.1]), rows([0.01, 0.01, 0.98]), rows([1 / 3, 1 / 3, 1 / 3])
    got = contrast_logp(base, expert, anti, alpha=3.0, top_p=0.8)[0]
    assert got[2] == NEVER
    assert got[:2].exp().tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-6)
    assert contrast_logp(base, expert, anti, alpha=3.0, top_p=1.0)[0].argmax() == 2


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, alpha=st.floats(0.0, 4.0), top_p=st.floats(0.05, 1.0))
def test_contrast_is_normalised_and_shifts_of_a_row_change_nothing(seed: int, alpha: float, top_p: float) -> None:
    base, expert, anti = (logits(3 * seed + k) for k in range(3))
    got = contrast_logp(base, expert, anti, alpha=alpha, top_p=top_p)
    assert torch.allclose(got.exp().sum(-1), torch.ones(3), atol=1e-5)
    other = contrast_logp(base, expert + 5.0, anti - 3.0, alpha=alpha, top_p=top_p)
    assert torch.equal(torch.isfinite(got), torch.isfinite(other))
    assert torch.allclose(got.exp(), other.exp(), atol=1e-5)


def test_what_is_drawn_has_the_log_probability_that_stands_there() -> None:
    """The sampler finds the same number for its token, and draws tokens as often as it says."""
    got = contrast_logp(logits(1, 1), logits(2, 1), logits(3, 1), alpha=1.5, top_p=0.9)
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    tokens, logp = draw(got.expand(20_000, -1), uniform, SamplerSettings(temperature=1.0, top_k=0, top_p=1.0))
    assert torch.allclose(logp, got[0][tokens], atol=1e-5)
    assert torch.allclose(tokens.bincount(minlength=7) / 20_000, got[0].exp(), atol=1e-4)


def test_mixture_by_hand() -> None:
    """(.8, .2)^1/2 (.2, .8)^1/2 is uniform; (.8, .2)^3/4 (.5, .5)^1/4 has odds 4^(3/4)."""
    assert mix_logp([rows([0.8, 0.2]), rows([0.2, 0.8])], [0.5, 0.5]).exp()[0].tolist() == pytest.approx([0.5, 0.5])
    got = mix_logp([rows([0.8, 0.2]), rows([0.5, 0.5])], [0.75, 0.25])[0]
    assert float(got[0] - got[1]) == pytest.approx(0.75 * math.log(4.0), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, weight=st.floats(0.0, 1.0))
def test_mixture_invariants(seed: int, weight: float) -> None:
    """A model mixed with itself stays; the order is of no matter; weight 1 is the model alone."""
    first, second = logits(2 * seed), logits(2 * seed + 1)
    assert torch.allclose(mix_logp([first, first + 2.0], [weight, 1 - weight]), first.log_softmax(-1), atol=1e-4)
    one = mix_logp([first, second], [weight, 1 - weight])
    assert torch.allclose(one, mix_logp([second, first], [1 - weight, weight]), atol=1e-4)
    assert torch.allclose(one.exp().sum(-1), torch.ones(3), atol=1e-5)
    assert torch.allclose(mix_logp([first, second], [1.0, 0.0]), first.log_softmax(-1), atol=1e-6)


def test_the_mixture_is_the_optimum_it_claims_to_be() -> None:
    """No other distribution is nearer to both models in the weighted sum of KL(pi || pi_k)."""
    models, weights = [logits(5, 1)[0].log_softmax(-1), logits(6, 1)[0].log_softmax(-1)], [0.3, 0.7]

    def far(logp: torch.Tensor) -> float:
        return sum(w * float((logp.exp() * (logp - m)).sum()) for w, m in zip(weights, models, strict=True))

    best = mix_logp([m[None] for m in models], weights)[0]
    random = torch.Generator().manual_seed(0)
    others = [(best + 0.1 * torch.randn(7, generator=random)).log_softmax(-1) for _ in range(50)]
    assert all(far(best) < far(other) for other in others)


def test_a_veto_holds_only_with_a_weight() -> None:
    wary = torch.tensor([[0.0, NEVER]])
    assert mix_logp([torch.zeros(1, 2), wary], [0.9, 0.1])[0].tolist() == [0.0, NEVER]
    assert mix_logp([torch.zeros(1, 2), wary], [1.0, 0.0]).exp()[0].tolist() == pytest.approx([0.5, 0.5])


def test_nonsense_is_refused() -> None:
    one, wide = torch.zeros(1, 2), torch.zeros(1, 3)
    for alpha, top_p in ((-1.0, 0.9), (math.nan, 0.9), (1.0, 0.0), (1.0, 1.1)):
        with pytest.raises(RecipeError):
            contrast_logp(one, one, one, alpha=alpha, top_p=top_p)
    with pytest.raises(ModelError, match="one shape"):
        contrast_logp(one, wide, one, alpha=1.0)
    with pytest.raises(ModelError, match="not finite"):
        contrast_logp(one, one, torch.tensor([[0.0, NEVER]]), alpha=1.0, top_p=1.0)
    for weights in ([0.5], [0.7, 0.7], [1.5, -0.5], [math.nan, 1.0]):
        with pytest.raises(RecipeError):
            mix_logp([one, one], weights)
    with pytest.raises(ModelError, match="one shape"):
        mix_logp([one, wide], [0.5, 0.5])
    with pytest.raises(ModelError, match="no token"):
        mix_logp([torch.tensor([[0.0, NEVER]]), torch.tensor([[NEVER, 0.0]])], [0.5, 0.5])
