"""Several models that say each token together, against each model by itself as transformers runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tutelage.engines.attention import AttentionPlan, attention_plan
from tutelage.engines.local import LocalCompleter
from tutelage.engines.mixing import contrast_logp, mix_logp
from tutelage.engines.packing import Group, pack
from tutelage.engines.voices import Blend, against_anti_expert, product
from tutelage.errors import ModelError
from tutelage.policy.lora import attach
from tutelage.records import Generation, Message, Prompt, SamplerSettings

PROMPTS = [
    Prompt(f"p{n}", (Message("user", text),)) for n, text in enumerate(("What is the capital?", "Who?", "a b c d e"))
]
GREEDY = SamplerSettings(temperature=0.0, max_new_tokens=10)
DRAWN = SamplerSettings(temperature=0.7, max_new_tokens=10)


def said(lm: Any, blend: Blend | None, settings: SamplerSettings, samples: int = 2) -> list[Generation]:
    table = LocalCompleter(lm, rows=3, prefill_budget=40, blend=blend).generate(
        PROMPTS, samples=samples, settings=settings, seed=3, version="v"
    )
    return [reply for group in table for reply in group]


def texts(replies: Sequence[Generation]) -> list[tuple[int, ...]]:
    return [reply.tokens for reply in replies]


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def pair(request: pytest.FixtureRequest, load_tiny: Callable[[str], Any]) -> tuple[Any, Any]:
    """A model and a changed copy of it; one family with the fast step, one without."""
    first, second = load_tiny(request.param), load_tiny(request.param)
    adapter = attach(second.model, rank=2, alpha=8.0, seed=1)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_b.copy_(0.1 * torch.randn(layer.lora_b.shape, generator=random))
    adapter.merge()
    return first, second


@torch.inference_mode()
def forced(lm: Any, prompt: Prompt, reply: Generation) -> torch.Tensor:
    """Logits for each token of a reply, by one plain pass over both."""
    ids = lm.encode(prompt)
    (part,) = pack([Group((*ids, *reply.tokens), (), ())], budget=512)
    with attention_plan(AttentionPlan(tree=part.tree)):
        hidden = lm.hidden(part.tokens_T[None], part.position_T[None])[0, len(ids) - 1 : -1]
    found: torch.Tensor = hidden @ lm.head_VD.T
    return found


def test_a_blend_says_what_its_only_voice_with_weight_says(pair: tuple[Any, Any]) -> None:
    first, second = pair
    alone = said(second, None, DRAWN)
    assert texts(said(first, product([second], [0.0, 1.0]), DRAWN)) == texts(alone)
    assert texts(alone) != texts(said(first, None, DRAWN))


def test_a_model_with_itself_is_itself(pair: tuple[Any, Any]) -> None:
    first, _ = pair
    assert texts(said(first, product([first], [0.4, 0.6]), DRAWN)) == texts(said(first, None, DRAWN))
    assert texts(said(first, against_anti_expert(first, alpha=3.0, top_p=1.0), DRAWN)) == texts(
        said(first, None, DRAWN)
    )


@pytest.mark.parametrize("kind", ["product", "contrast"])
def test_recorded_log_probs_are_the_blends(pair: tuple[Any, Any], kind: str) -> None:
    """Prompts of different lengths, more samples than rows: rows are refilled and moved on the way."""
    first, second = pair
    blend = product([second], [0.3, 0.7]) if kind == "product" else against_anti_expert(second, alpha=1.5, top_p=0.9)
    for n, reply in enumerate(said(first, blend, SamplerSettings(max_new_tokens=10))):
        own, other = (forced(lm, PROMPTS[n // 2], reply) for lm in (first, second))
        want = (
            mix_logp([own, other], [0.3, 0.7])
            if kind == "product"
            else contrast_logp(own, None, other, alpha=1.5, top_p=0.9)
        )
        got = torch.tensor(reply.logps)
        assert torch.allclose(got, want.gather(1, torch.tensor(reply.tokens)[:, None])[:, 0], atol=2e-4)


def test_expert_and_anti_expert_push_apart(pair: tuple[Any, Any]) -> None:
    """With the changed copy as expert its own tokens become likelier under it than with it as anti-expert."""
    first, second = pair
    toward = said(first, against_anti_expert(first, second, alpha=2.0, top_p=1.0), GREEDY, 1)
    away = said(first, against_anti_expert(second, alpha=2.0, top_p=1.0), GREEDY, 1)

    def likelihood(replies: Sequence[Generation]) -> float:
        total = 0.0
        for prompt, reply in zip(PROMPTS, replies, strict=True):
            logp = forced(second, prompt, reply).log_softmax(-1)
            total += float(logp.gather(1, torch.tensor(reply.tokens)[:, None]).mean())
        return total

    assert likelihood(toward) > likelihood(away)


def test_models_of_different_vocabularies_are_refused(tiny_lm: Any, load_tiny: Callable[[str], Any]) -> None:
    other = load_tiny("llama")
    other.tokenizer.add_tokens(["<|new|>"])
    with pytest.raises(ModelError, match="do not share a vocabulary"):
        LocalCompleter(tiny_lm, blend=product([other], [0.5, 0.5]))
