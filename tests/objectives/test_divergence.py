"""Divergences by exact sums over a vocabulary, and weights for tokens that another model drew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.loss_batches import F64, LN2

from tutelage.objectives.divergence import importance, kl_k1, kl_k2, kl_k3, kl_term

REF = torch.tensor([0.2, 0.2, 0.6], dtype=F64).log()
SAMPLER = torch.tensor([0.6, 0.1, 0.3], dtype=F64).log()
LOGITS = torch.tensor([0.5, 0.3, 0.2], dtype=F64).log()


def mean_gradient(term: Any, sampler: torch.Tensor | None = None) -> torch.Tensor:
    """Gradient for the logits of a term's mean over tokens drawn from `sampler`, whose odds are constants."""
    logits = LOGITS.clone().requires_grad_(True)
    logp = logits.log_softmax(-1)
    odds = (logp.detach() if sampler is None else sampler).exp()
    (grad,) = torch.autograd.grad((odds * term(logp)).sum(), logits)
    return grad


def divergence_gradient(*, turned: bool = False) -> torch.Tensor:
    """The true gradient of KL(pi || ref), or of KL(ref || pi)."""
    logits = LOGITS.clone().requires_grad_(True)
    logp = logits.log_softmax(-1)
    value = (REF.exp() * (REF - logp)).sum() if turned else (logp.exp() * (logp - REF)).sum()
    (grad,) = torch.autograd.grad(value, logits)
    return grad


def test_values() -> None:
    """d = ln 2 between the two: k1 = -ln 2 and ln 2, k2 the same for both, k3 1 - ln 2 and ln 2 - 1/2."""
    logp, ref = torch.tensor([[-1.0, -1.0]], dtype=F64), torch.tensor([[-1.0 + LN2, -1.0 - LN2]], dtype=F64)
    assert kl_k1(logp, ref)[0].tolist() == pytest.approx([-LN2, LN2])
    assert kl_k2(logp, ref)[0].tolist() == pytest.approx([LN2**2 / 2] * 2)
    assert kl_k3(logp, ref)[0].tolist() == pytest.approx([1 - LN2, LN2 - 0.5])


def test_k1_and_k3_are_unbiased_values_and_k2_is_not() -> None:
    odds, exact = LOGITS.exp(), float((LOGITS.exp() * (LOGITS - REF)).sum())
    assert float((odds * kl_k1(LOGITS, REF)).sum()) == pytest.approx(exact)
    assert float((odds * kl_k3(LOGITS, REF)).sum()) == pytest.approx(exact)
    assert abs(float((odds * kl_k2(LOGITS, REF)).sum()) - exact) > 0.004
    weighted = kl_term("k3-weighted", LOGITS, SAMPLER, REF)
    assert float((SAMPLER.exp() * weighted).sum()) == pytest.approx(exact)


def test_which_gradient_each_gives() -> None:
    """In a loss k1 does nothing, k2 pulls along KL(pi || ref), k3 along KL(ref || pi)."""
    assert float(mean_gradient(lambda p: kl_k1(p, REF)).abs().max()) < 1e-12
    assert torch.allclose(mean_gradient(lambda p: kl_k2(p, REF)), divergence_gradient())
    assert torch.allclose(mean_gradient(lambda p: kl_k3(p, REF)), divergence_gradient(turned=True))
    assert float((divergence_gradient() - divergence_gradient(turned=True)).abs().max()) > 0.05
    # In the reward k1 is right: minus the score function's gradient.
    spent = (LOGITS - REF).detach()
    assert torch.allclose(mean_gradient(lambda p: spent * p), divergence_gradient())


def test_off_policy_only_the_weighted_one_is_right() -> None:
    """Tokens of another policy: its mean gradient is still that of KL(pi || ref); those of k2 and k3 are not."""
    weighted = mean_gradient(lambda p: kl_term("k3-weighted", p, SAMPLER, REF), SAMPLER)
    assert torch.allclose(weighted, divergence_gradient())
    assert float((mean_gradient(lambda p: kl_k2(p, REF), SAMPLER) - divergence_gradient()).abs().max()) > 0.02
    turned = mean_gradient(lambda p: kl_k3(p, REF), SAMPLER) - divergence_gradient(turned=True)
    assert float(turned.abs().max()) > 0.02


# ---- importance --------------------------------------------------------------------------------

OLD = torch.tensor([[2.0, 0.5, 1.0], [4.0, 1.0, 9.0]], dtype=F64).log()  # against a sampler of ones
KEEP = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], dtype=F64)


def weights(method: Any, *, cap: float, low: float = 0.5) -> tuple[list[list[float]], dict[str, float]]:
    weight, apart = importance(OLD, torch.zeros(2, 3, dtype=F64), KEEP, cap=cap, method=method, low=low)
    return weight.tolist(), apart


def test_weights_by_hand() -> None:
    """Ratios 2, 1/2, 1 (product 1, geometric mean 1) and 4, 1 (product 4, geometric mean 2)."""
    assert weights("token", cap=3.0)[0] == [[2.0, 0.5, 1.0], [3.0, 1.0, 0.0]]
    assert weights("mask", cap=3.0)[0] == [[2.0, 0.5, 1.0], [0.0, 1.0, 0.0]]
    assert weights("mask", cap=3.0, low=0.6)[0] == [[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    assert weights("sequence", cap=3.0)[0] == [pytest.approx([1.0] * 3), pytest.approx([3.0, 3.0, 0.0])]
    assert weights("geometric", cap=3.0)[0] == [[1.0] * 3, [1.0, 1.0, 0.0]]
    assert weights("geometric", cap=1.9)[0] == [[1.0] * 3, [0.0, 0.0, 0.0]]
    assert weights("geometric", cap=3.0, low=1.5)[0] == [[0.0] * 3, [1.0, 1.0, 0.0]]
    assert weights("none", cap=3.0)[0] == [[1.0] * 3, [1.0, 1.0, 0.0]]


def test_what_is_told_of_the_mismatch() -> None:
    """Log-ratios sum to ln 4 over five tokens; k3 of them: (2 - ln 2 - 1) + (1/2 + ln 2 - 1) + (4 - ln 4 - 1)."""
    for method, units in (("token", [2, 0.5, 1, 4, 1]), ("mask", [2, 0.5, 1, 4, 1]), ("none", [2, 0.5, 1, 4, 1]),
                          ("sequence", [1, 4]), ("geometric", [1, 2])):  # fmt: skip
        _, apart = weights(method, cap=1.9, low=0.6)
        assert apart["mismatch_kl"] == pytest.approx(-2 * LN2 / 5)
        assert apart["mismatch_k3"] == pytest.approx((1 - LN2 + LN2 - 0.5 + 3 - 2 * LN2) / 5)
        assert apart["effective_sample_size"] == pytest.approx(sum(units) ** 2 / sum(u**2 for u in units) / len(units))
    cut = {m: weights(m, cap=1.9, low=0.6)[1]["truncated"] for m in ("token", "mask", "sequence", "geometric", "none")}
    assert cut == {"token": 0.4, "mask": pytest.approx(0.6), "sequence": 0.4, "geometric": 0.4, "none": 0.0}


@given(seed=st.integers(0, 10_000), method=st.sampled_from(["token", "mask", "sequence", "geometric", "none"]))
def test_weights_are_bounded_and_finite(seed: int, method: Any) -> None:
    random = torch.Generator().manual_seed(seed)
    old, drawn = (60 * torch.randn(3, 4, generator=random) for _ in range(2))
    keep = (torch.arange(4)[None] < torch.tensor([[4], [2], [0]])).float()
    weight, apart = importance(old, drawn, keep, cap=2.0, method=method)
    assert ((weight >= 0) & (weight <= 2.0)).all()
    assert not weight[keep == 0].any()
    assert all(x == x for x in apart.values())
    assert 0 < apart["effective_sample_size"] <= 1.0 + 1e-5
