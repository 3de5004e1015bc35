"""Tiny models made on the spot: real architectures and a real tokenizer, random weights, no download."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples on every machine, and no failure because a machine is busy.
settings.register_profile("tutelage", deadline=None, derandomize=True, database=None)
settings.load_profile("tutelage")

# Files that take longest, longest first: with several workers they begin, so that no worker is left alone with one.
_SLOW = (
    "test_embedded_model", "test_truthfulness", "test_resume", "test_imitating", "test_red_team", "test_http",
    "test_questions", "test_cli", "test_offline", "test_crediting",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which `--dist loadfile` hands files out."""
    rank = {name: n for n, name in enumerate(_SLOW)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


ARCHITECTURES = ("llama", "qwen2", "mistral", "gpt_neox")

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = (
    "What is the capital of France? The capital of France is Paris.",
    "I don't know what you had for lunch. Could you tell me what you mean?",
    "user assistant system question answer when the thing asked about does not exist",
)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=special[0], eos_token=special[2])
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)


def _config(kind: str) -> Any:
    import transformers as t

    size: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 96, "max_position_embeddings": 160, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    if kind == "llama":
        return t.LlamaConfig(**size, num_key_value_heads=2, tie_word_embeddings=False)
    if kind == "qwen2":
        return t.Qwen2Config(**size, num_key_value_heads=1, tie_word_embeddings=True)
    if kind == "mistral":
        return t.MistralConfig(**size, num_key_value_heads=2, head_dim=16, sliding_window=128)
    return t.GPTNeoXConfig(**size, rotary_pct=0.5, use_parallel_residual=True)


def _save_model(kind: str, folder: Path) -> None:
    """Random weights large enough that next-token distributions are far from uniform."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(_config(kind))
    random = torch.Generator().manual_seed(ARCHITECTURES.index(kind))
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=random)
            scale_of_norm = "norm" in name and name.endswith("weight")
            weight.copy_(1.0 + 0.1 * noise if scale_of_norm else 0.2 * noise)
    model.save_pretrained(folder)
    _save_tokenizer(folder)


@pytest.fixture(scope="session")
def child_env() -> dict[str, str]:
    """Environment in which a second Python process finds what this one finds, installed or not."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}


@pytest.fixture(scope="session")
def tiny_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory an architecture, as `save_pretrained` writes it."""
    import torch

    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    root = tmp_path_factory.mktemp("models")
    for kind in ARCHITECTURES:
        _save_model(kind, root / kind)
    return {kind: root / kind for kind in ARCHITECTURES}


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def load_tiny(tiny_dirs: dict[str, Path]) -> Callable[[str], Any]:
    """Loads a fresh tiny model, for tests that change it."""
    from tutelage.engines.load import load_model

    return lambda kind="llama": load_model(str(tiny_dirs[kind]), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def tiny_lms(tiny_dirs: dict[str, Path], load_tiny: Callable[[str], Any]) -> dict[str, Any]:
    """Loaded models that tests share and must not change."""
    return {kind: load_tiny(kind) for kind in tiny_dirs}


@pytest.fixture(scope="session")
def tiny_lm(tiny_lms: dict[str, Any]) -> Any:
    """The shared Llama."""
    return tiny_lms["llama"]


@pytest.fixture(scope="session")
def plain_models(tiny_dirs: dict[str, Path]) -> dict[str, Any]:
    """The same weights as transformers runs them with its own eager attention: the yardstick."""
    import transformers

    return {
        kind: transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        for kind, folder in tiny_dirs.items()
    }
