"""The fused layers against transformers' own, and their gradients against finite differences."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch

from tutelage.engines import fused


def test_the_norms_gradient_is_that_of_its_values() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=random, dtype=torch.float32, requires_grad=True)
    weight = torch.rand(5, generator=random) + 0.5
    norm = types.SimpleNamespace(weight=weight, variance_epsilon=1e-5)
    ours = fused._norm_forward(norm, x)
    plain = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    push = torch.randn(3, 5, generator=random)
    assert torch.allclose(ours, plain, atol=1e-6)
    (got,), (wanted,) = (torch.autograd.grad((y * push).sum(), x) for y in (ours, plain))
    assert torch.allclose(got, wanted, atol=1e-5)


def test_the_gate_passes_finite_differences() -> None:
    random = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(4, 6, generator=random, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(fused._Gated.apply, (gate, up))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_a_fused_model_says_and_teaches_what_the_plain_one_does(kind: str, plain_models: dict[str, Any]) -> None:
    plain = plain_models[kind]
    model = copy.deepcopy(plain)
    fused.fuse(model)
    changed = [m for m in model.modules() if "forward" in vars(m)]
    assert len(changed) == 3 * 3 + 1  # two norms and an MLP a layer, and the last norm
    x = torch.randn(2, 7, plain.config.hidden_size, generator=torch.Generator().manual_seed(2)) * 3
    grads = []
    for one in (model, plain):
        inputs = x.clone().requires_grad_(True)
        logits = one(inputs_embeds=inputs).logits
        grads.append((logits, torch.autograd.grad(logits.square().mean(), inputs)[0]))
    assert torch.allclose(grads[0][0], grads[1][0], atol=1e-4)
    assert torch.allclose(grads[0][1], grads[1][1], atol=1e-4)
    assert torch.nn.functional.cosine_similarity(grads[0][1].flatten(), grads[1][1].flatten(), 0) > 0.9999


def test_what_is_not_kept_is_made_once_for_all_that_ask() -> None:
    made = []

    def double(x: torch.Tensor) -> torch.Tensor:
        made.append(2 * x)
        return made[-1]

    source = fused.Remake(double, torch.ones(3))
    assert source.reserve().reserve() is source
    assert source.take() is source.take() is made[0] and len(made) == 1
    with pytest.raises(RuntimeError, match="run the forward pass once more"):
        source.take()


def test_other_models_stay_as_they_are(plain_models: dict[str, Any]) -> None:
    model = copy.deepcopy(plain_models["gpt_neox"])
    fused.fuse(model)
    assert not [m for m in model.modules() if "forward" in vars(m)]
