"""What leaves the project: merged models for transformers, adapters for PEFT, with equal logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.policy.lora import Adapter, attach
from tutelage.policy.model import save_merged

TOKENS = torch.tensor([[5, 40, 77, 12, 250, 9]])


def adapted(load_tiny: Callable[[str], Any], kind: str) -> tuple[Any, Adapter]:
    lm = load_tiny(kind)
    adapter = attach(lm.model, rank=2, alpha=8.0, seed=3, first_layer=1, model_name=kind)
    dice = torch.Generator().manual_seed(1)
    for layer in adapter.layers.values():
        layer.lora_b.data.normal_(0, 0.05, generator=dice)
    adapter.merge()
    return lm, adapter


def plain(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def test_a_merged_model_loads_in_transformers_with_equal_logits(
    architecture: str, load_tiny: Callable[[str], Any], tmp_path: Path, plain_models: dict[str, Any]
) -> None:
    lm, adapter = adapted(load_tiny, architecture)
    target = tmp_path / "new" / "merged"
    save_merged(lm, target)
    ours, theirs = logits(lm.model), logits(plain(target))
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert not torch.allclose(theirs, logits(plain_models[architecture]), atol=1e-2)  # it did learn something
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    assert tokenizer.chat_template == lm.tokenizer.chat_template
    assert tokenizer("What is it?")["input_ids"] == lm.tokenizer("What is it?")["input_ids"]
    assert adapter.layers


def test_a_merged_model_is_taken_as_a_start_model_again(
    architecture: str, load_tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    from tutelage.engines.load import load_model

    lm, _ = adapted(load_tiny, architecture)
    save_merged(lm, tmp_path / "merged")
    again = load_model(str(tmp_path / "merged"), device="cpu", dtype="float32")
    assert torch.allclose(logits(again.model), logits(lm.model), atol=1e-4)
    assert again.stop_tokens == lm.stop_tokens


def test_a_model_without_an_adapter_is_written_as_it_is(
    architecture: str, load_tiny: Callable[[str], Any], tmp_path: Path, plain_models: dict[str, Any]
) -> None:
    save_merged(load_tiny(architecture), tmp_path / "copy")
    assert torch.equal(logits(plain(tmp_path / "copy")), logits(plain(Path(plain_models[architecture].name_or_path))))


def test_peft_loads_a_checkpoints_adapter_with_equal_logits(
    architecture: str, load_tiny: Callable[[str], Any], tiny_dirs: dict[str, Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    lm, adapter = adapted(load_tiny, architecture)
    adapter.save(tmp_path / "r1")
    theirs = peft.PeftModel.from_pretrained(plain(tiny_dirs[architecture]), tmp_path / "r1").eval()
    assert torch.allclose(logits(theirs), logits(lm.model), atol=1e-4)
