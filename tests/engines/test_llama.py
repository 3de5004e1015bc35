"""The fused decoding step against transformers' own layers, and what rounding to 8 bits costs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutelage.engines.attention import KeyValueMemory
from tutelage.engines.llama import LlamaStep, round_to_int8
from tutelage.engines.local import LocalCompleter
from tutelage.engines.packing import Group
from tutelage.errors import ModelError
from tutelage.policy.learner import score
from tutelage.policy.lora import attach
from tutelage.records import Message, Prompt, SamplerSettings

FAMILY = ("llama", "qwen2", "mistral")
PROMPTS = [Prompt(f"p{n}", (Message("user", t),)) for n, t in enumerate(["Who?", "What is the capital of France?"])]


def run_tokens(lm: Any, tokens_BT: torch.Tensor, **how: Any) -> torch.Tensor:
    """(rows, steps, vocabulary) logits, one decoding step a token."""
    step = LlamaStep(lm, rows=len(tokens_BT), **how)
    memory = KeyValueMemory(len(tokens_BT), 32)
    found = []
    with torch.inference_mode():
        for t in range(tokens_BT.shape[1]):
            found.append(step(tokens_BT[:, t], torch.full((len(tokens_BT),), t), memory, t + 1))
    return torch.stack(found, 1)


@pytest.fixture
def own(tiny_lms: dict[str, Any]) -> Any:
    """A copy, so that an adapter does not stay on the shared model."""
    return copy.deepcopy(tiny_lms["llama"])


@pytest.mark.parametrize("kind", FAMILY)
def test_logits_equal_those_of_transformers(kind: str, tiny_lms: dict[str, Any], plain_models: dict[str, Any]) -> None:
    tokens = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(0))
    assert LlamaStep.serves(tiny_lms[kind])
    theirs = plain_models[kind](tokens).logits
    assert torch.allclose(run_tokens(tiny_lms[kind], tokens), theirs, atol=2e-5)


def test_rows_may_stand_at_different_places(tiny_lms: dict[str, Any], plain_models: dict[str, Any]) -> None:
    """Row 0 restarts while row 1 goes on: what an earlier text left in the memory is not seen."""
    lm, text = tiny_lms["llama"], torch.randint(3, 300, (7,), generator=torch.Generator().manual_seed(1))
    step, memory = LlamaStep(lm, rows=2), KeyValueMemory(2, 16)
    with torch.inference_mode():
        for t in range(6):
            step(text[[t, t]], torch.tensor([t, t]), memory, t + 1)
        logits = step(text[[0, 6]], torch.tensor([0, 6]), memory, 7)
    assert torch.allclose(logits[0], plain_models["llama"](text[None, :1]).logits[0, -1], atol=2e-5)
    assert torch.allclose(logits[1], plain_models["llama"](text[None]).logits[0, -1], atol=2e-5)


def test_other_models_are_left_to_transformers(tiny_lms: dict[str, Any]) -> None:
    assert not LlamaStep.serves(tiny_lms["gpt_neox"])
    with pytest.raises(ModelError, match="int8"):
        LocalCompleter(tiny_lms["gpt_neox"], int8=True)
    stretched = copy.copy(tiny_lms["llama"])
    stretched.model = copy.deepcopy(stretched.model)
    stretched.model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not LlamaStep.serves(stretched)  # its frequencies change with the length


def test_an_adapter_takes_part_only_while_it_is_on(own: Any) -> None:
    tokens = torch.randint(3, 300, (2, 6), generator=torch.Generator().manual_seed(2))
    start = run_tokens(own, tokens)
    adapter = attach(own.model, rank=2, alpha=4.0, seed=0)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_b.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(3))
    adapter.merge()
    taught = run_tokens(own, tokens)
    with torch.no_grad():
        whole = own.model(tokens).logits
    assert torch.allclose(taught, whole, atol=5e-5) and not torch.allclose(taught, start, atol=0.1)
    with adapter.off():
        assert torch.allclose(run_tokens(own, tokens), start, atol=2e-5)


def test_bfloat16_on_packed_weights_stays_as_near_as_transformers(own: Any) -> None:
    """Both round on the way; the packed step must not lie further from float32 than transformers does."""
    tokens = torch.randint(3, 300, (4, 10), generator=torch.Generator().manual_seed(4))
    exact = run_tokens(own, tokens)
    own.model.to(torch.bfloat16)
    own.dtype = torch.bfloat16
    with torch.no_grad():
        theirs = (own.model(tokens).logits.float() - exact).abs().mean()
    ours = (run_tokens(own, tokens).float() - exact).abs().mean()
    assert float(ours) < 1.5 * float(theirs) + 1e-3


# ---- 8 bits --------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_rounding_errs_by_half_a_step_at_most(rows: int, width: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32) * 10.0
    values, scale = round_to_int8(torch.from_numpy(x))
    assert values.dtype == torch.int8 and int(values.abs().max()) <= 127
    assert float(((values.float() * scale[:, None]) - torch.from_numpy(x)).abs().max()) <= float(scale.max()) * 0.5001


def test_a_row_of_zeros_rounds_to_zeros() -> None:
    values, scale = round_to_int8(torch.zeros(2, 5))
    assert not values.any() and torch.isfinite(scale).all()


@pytest.mark.parametrize("kind", FAMILY)
def test_int8_logits_are_near(kind: str, tiny_lms: dict[str, Any]) -> None:
    tokens = torch.randint(3, 300, (4, 8), generator=torch.Generator().manual_seed(5))
    exact, rounded = run_tokens(tiny_lms[kind], tokens), run_tokens(tiny_lms[kind], tokens, int8=True)
    off = (rounded - exact).std() / exact.std()
    assert 0.0 < float(off) < 0.1


def test_int8_records_the_log_probs_of_the_model_that_drew(tiny_lms: dict[str, Any]) -> None:
    """They differ from a re-score under the exact model, and do not depend on what shares the batch."""
    lm, settings = tiny_lms["llama"], SamplerSettings(max_new_tokens=10)
    table = LocalCompleter(lm, rows=8, int8=True).generate(PROMPTS, samples=4, settings=settings, seed=1, version="v")
    groups = [
        Group(lm.encode(p), tuple(g.tokens for g in replies), tuple(range(4 * n, 4 * n + 4)))
        for n, (p, replies) in enumerate(zip(PROMPTS, table, strict=True))
    ]
    exact = score(lm, groups, budget=100)
    replies = [g for group in table for g in group]
    kept = exact.keep_BT > 0
    drawn = torch.zeros_like(exact.logp_BT)
    for row, reply in enumerate(replies):
        drawn[row, : len(reply.tokens)] = torch.tensor(reply.logps)
    gap = (drawn - exact.logp_BT)[kept].abs()
    assert 1e-3 < float(gap.mean()) < 0.3
    # Alone in its batch the first reply is the same: one row's rounding depends on no other row.
    alone = LocalCompleter(lm, rows=1, int8=True)
    again = alone.generate(PROMPTS[:1], samples=1, settings=settings, seed=1, version="v")
    assert again[0][0].tokens == replies[0].tokens
    assert np.allclose(again[0][0].logps, replies[0].logps, atol=1e-4)
