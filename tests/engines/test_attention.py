"""The attention function: trees, recording, decoding in place, and the plain path, against eager attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tutelage.engines.attention import AttentionPlan, KeyValueMemory, attention_plan
from tutelage.engines.load import load_model
from tutelage.errors import ModelError

IDS = torch.tensor([[5, 9, 14, 30, 7, 22, 41]])
PLACES = torch.arange(7)[None]
CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()


@pytest.fixture
def lm(architecture: str, tiny_lms: dict[str, Any]) -> Any:
    return tiny_lms[architecture]


@pytest.fixture
def plain(architecture: str, plain_models: dict[str, Any]) -> Any:
    return plain_models[architecture]


def logits(lm: Any, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = lm.hidden(ids, places) @ lm.head_VD.T
    return out


@torch.no_grad()
def test_a_causal_tree_equals_the_model(lm: Any, plain: Any) -> None:
    with attention_plan(AttentionPlan(mask_TT=CAUSAL)):
        ours = logits(lm, IDS, PLACES)
    assert (ours - plain(IDS).logits).abs().max() < 1e-4


@torch.no_grad()
def test_without_a_plan_the_model_runs_as_before(lm: Any, plain: Any) -> None:
    assert (lm.model(IDS).logits - plain(IDS).logits).abs().max() < 1e-4


@torch.no_grad()
def test_without_a_plan_padding_is_masked(lm: Any, plain: Any) -> None:
    """A padded batch must not attend to its padding: the mask that comes in is the one that counts."""
    batch = torch.cat([IDS, torch.tensor([[0, 0, 0, 5, 9, 14, 30]])])
    mask = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    ours = lm.model(batch, attention_mask=mask, position_ids=places).logits
    theirs = plain(batch, attention_mask=mask, position_ids=places).logits
    assert (ours - theirs)[mask.bool()].abs().max() < 1e-4


@torch.no_grad()
def test_recorded_attention_is_the_last_layers_mean_over_heads(lm: Any, plain: Any) -> None:
    rows = torch.tensor([6, 3])
    plan = AttentionPlan(mask_TT=CAUSAL, record_rows_N=rows, record_layer=lm.layers - 1)
    with attention_plan(plan):
        lm.hidden(IDS, PLACES)
    wanted = plain(IDS, output_attentions=True).attentions[-1][0].mean(0)[rows]
    assert plan.recorded_NT is not None
    assert (plan.recorded_NT - wanted).abs().max() < 1e-5
    assert torch.allclose(plan.recorded_NT.sum(-1), torch.ones(2), atol=1e-5)


@torch.no_grad()
def test_captured_keys_and_values_are_the_models_cache(lm: Any, plain: Any) -> None:
    plan = AttentionPlan(mask_TT=CAUSAL, capture=True)
    with attention_plan(plan):
        lm.hidden(IDS, PLACES)
    cache = plain(IDS, use_cache=True).past_key_values
    assert sorted(plan.captured) == list(range(lm.layers))
    for index, layer in enumerate(cache.layers):
        assert (plan.captured[index][0] - layer.keys[0]).abs().max() < 1e-4
        assert (plan.captured[index][1] - layer.values[0]).abs().max() < 1e-4


@torch.no_grad()
def test_decoding_token_by_token_equals_one_pass(lm: Any, plain: Any) -> None:
    """Two rows of different length, in memory with stale numbers beyond what they may see."""
    memory = KeyValueMemory(rows=3, capacity=16)
    other = torch.tensor([[8, 6, 50, 51, 52]])
    texts = [IDS[0], other[0]]
    starts = (0, 2)  # row 1 starts two steps later, so lengths differ all along
    got: dict[tuple[int, int], torch.Tensor] = {}
    lengths = [0, 0]
    for index in range(lm.layers):  # filled with rubbish: what is not seen must not matter
        with attention_plan(AttentionPlan(mask_TT=CAUSAL, capture=True)) as plan:
            lm.hidden(IDS, PLACES)
        memory.fill(index, 0, *plan.captured[index])
        for store in (memory.keys[index], memory.values[index]):
            store.fill_(1e3)
    for step in range(7):
        active = [row for row in (0, 1) if starts[row] <= step < starts[row] + len(texts[row])]
        places = torch.tensor([lengths[row] for row in active])
        tokens = torch.tensor([int(texts[row][lengths[row]]) for row in active])
        with attention_plan(AttentionPlan(memory=memory, slots_B=places, reach=int(places.max()) + 1)):
            out = logits(lm, tokens[:, None], places[:, None])
        for n, row in enumerate(active):
            got[row, lengths[row]] = out[n, 0]
            lengths[row] += 1
    for row, ids in ((0, IDS), (1, other)):
        wanted = plain(ids).logits[0]
        for place in range(ids.shape[1]):
            assert (got[row, place] - wanted[place]).abs().max() < 1e-4


@torch.no_grad()
def test_a_plan_ends_with_its_block_even_after_an_error(tiny_lm: Any) -> None:
    blind = torch.eye(7, dtype=torch.bool)
    before = tiny_lm.model(IDS).logits
    with pytest.raises(RuntimeError, match="stop"), attention_plan(AttentionPlan(mask_TT=blind)):
        raise RuntimeError("stop")
    assert torch.equal(tiny_lm.model(IDS).logits, before)
    with attention_plan(AttentionPlan(mask_TT=CAUSAL)):
        outer = logits(tiny_lm, IDS, PLACES)
        with attention_plan(AttentionPlan(mask_TT=blind)):
            inner = logits(tiny_lm, IDS, PLACES)
        assert torch.equal(logits(tiny_lm, IDS, PLACES), outer)
    assert (inner - outer).abs().max() > 0.1


SIZE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 2,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "pad_token_id": 0, "sliding_window": 64,
}  # fmt: skip
UNUSUAL: dict[str, Callable[[], Any]] = {
    "softcap": lambda: transformers.Gemma2Config(
        **SIZE, attn_logit_softcapping=1.0, final_logit_softcapping=None, max_position_embeddings=128
    ),
    "sinks": lambda: transformers.GptOssConfig(
        **SIZE, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=128
    ),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_attention_of_another_kind_is_refused_or_computed_right(
    kind: str, tmp_path: Path, tiny_dirs: dict[str, Path]
) -> None:
    """Capped scores and attention sinks arrive as extra arguments; dropping them changes the model in silence."""
    model = transformers.AutoModelForCausalLM.from_config(UNUSUAL[kind]())
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=random))
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_dirs["llama"]).save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    try:
        lm = load_model(str(tmp_path), device="cpu", dtype="float32")
    except ModelError as error:
        assert "attention" in str(error)  # noqa: PT017 (a clear refusal is fine)
        return
    with torch.no_grad(), attention_plan(AttentionPlan(mask_TT=CAUSAL)):
        assert (logits(lm, IDS, PLACES) - plain(IDS).logits).abs().max() < 1e-4
