"""Loading models: what is taken, what is refused, and what a loaded model says of itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.engines.load import choose_device, choose_dtype, describe, gguf_to_directory, load_model
from tutelage.errors import InputError, ModelError
from tutelage.records import Message, Prompt


def prompt(text: str = "What is it?") -> Prompt:
    return Prompt("p7", (Message("user", text),))


@pytest.fixture
def copy(tiny_dirs: dict[str, Path], tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_dirs["llama"], folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, **changes}), encoding="utf-8")


def test_device_and_dtype_are_chosen_in_one_place() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    assert choose_dtype("float32", torch.device("cpu")) is torch.float32
    assert choose_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)


def test_every_architecture_loads_with_its_own_logits(
    architecture: str, tiny_lms: dict[str, Any], plain_models: dict[str, Any]
) -> None:
    lm = tiny_lms[architecture]
    tokens = torch.tensor([[5, 40, 77, 12]])
    with torch.no_grad():
        assert torch.allclose(
            lm.model(input_ids=tokens, use_cache=False).logits,
            plain_models[architecture](input_ids=tokens).logits,
            atol=1e-4,
        )
    assert (lm.layers, lm.end_token, lm.stop_tokens) == (3, 2, frozenset({2}))
    assert lm.context == (128 if architecture == "mistral" else 160)
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert not lm.model.training


def test_a_conversation_is_encoded_up_to_the_models_turn(tiny_lm: Any) -> None:
    text = tiny_lm.tokenizer.decode(tiny_lm.encode(prompt()))
    assert text == "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_lm.encode_reply("Yes.")[-1] == tiny_lm.end_token
    assert tiny_lm.decode(tiny_lm.encode_reply(" Yes. ")) == "Yes."


def test_the_context_bounds_prompt_and_reply_together(tiny_lm: Any) -> None:
    size = len(tiny_lm.encode(prompt()))
    tiny_lm.encode(prompt(), room=tiny_lm.context - size)
    with pytest.raises(InputError, match="'p7'") as found:
        tiny_lm.encode(prompt(), room=tiny_lm.context - size + 1)
    assert str(tiny_lm.context) in found.value.expected


def test_the_fingerprint_tells_weights_apart(load_tiny: Callable[[str], Any]) -> None:
    one, same, other = load_tiny("llama"), load_tiny("llama"), load_tiny("llama")
    assert one.fingerprint == same.fingerprint
    with torch.no_grad():
        next(iter(other.model.parameters())).add_(0.1)
    assert one.fingerprint != other.fingerprint


def test_a_hub_name_needs_a_word(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither") as found:
        describe("someone/model")
    assert "model.hub=true" in found.value.fix
    assert describe("someone/model", hub=True) == "someone/model"
    with pytest.raises(ModelError):
        describe("./someone/model", hub=True)


def test_code_beside_a_model_is_never_run(copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (copy / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w')\n", encoding="utf-8")
    auto = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    edit(copy / "config.json", auto_map=auto)
    load_model(str(copy), device="cpu", dtype="float32")
    edit(copy / "config.json", model_type="evil")
    with pytest.raises(ModelError):
        load_model(str(copy), device="cpu", dtype="float32")
    assert not mark.exists()


def test_pickled_weights_are_never_opened(copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(mark), "w"))

    torch.save({"model.embed_tokens.weight": Evil()}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(copy), device="cpu", dtype="float32")
    assert not mark.exists()


def test_weights_that_are_missing_are_not_made_up(copy: Path) -> None:
    """transformers fills in random numbers and only warns."""
    from safetensors.torch import load_file, save_file

    state = load_file(copy / "model.safetensors")
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="up_proj"):
        load_model(str(copy), device="cpu", dtype="float32")


def test_a_model_without_linear_layers_is_refused(tmp_path: Path, tiny_dirs: dict[str, Path]) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_dirs["llama"] / name, tmp_path / "gpt2" / name)
    with pytest.raises(ModelError, match="Linear"):
        load_model(str(tmp_path / "gpt2"), device="cpu", dtype="float32")


def test_a_head_that_is_not_plain_is_refused(tmp_path: Path, tiny_dirs: dict[str, Path]) -> None:
    """Gemma 2 bends its logits: hidden state times matrix is not what it computes."""
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=32, max_position_embeddings=64, final_logit_softcapping=0.5, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.5)
    model.save_pretrained(tmp_path / "gemma2")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_dirs["llama"] / name, tmp_path / "gemma2" / name)
    with pytest.raises(ModelError, match="logits"):
        load_model(str(tmp_path / "gemma2"), device="cpu", dtype="float32")


# ---- GGUF --------------------------------------------------------------------------------------


def test_files_that_are_no_gguf_are_refused(tmp_path: Path) -> None:
    for name, content in (("text", b"hello" * 100), ("empty", b""), ("cut", b"GGUF\x03\x00\x00\x00")):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(ModelError, match="GGUF"):
            gguf_to_directory(path, tmp_path / f"out-{name}")
        assert not (tmp_path / f"out-{name}").exists()


def write_gguf(folder: Path, file: Path) -> None:
    """The tiny Llama as GGUF in float32, with its tokenizer as llama.cpp stores one."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda pair: pair[1])
    special = {t["id"] for t in tokenizer["added_tokens"]}
    tokens = [t for t, _ in vocabulary] + [f"<unused{n}>" for n in range(config["vocab_size"] - len(vocabulary))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if n in special else 1 for n in range(len(tokens))])
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(template)
    names = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }  # fmt: skip
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name in names:
            writer.add_tensor(names[name], tensor.float().numpy())
            continue
        _, _, layer, part = name.split(".", 3)
        value = tensor.float()
        for which, count in (("q_proj", heads), ("k_proj", shared)):
            if which in part:  # llama.cpp keeps the halves of a rotated pair side by side
                size = value.shape[0] // count // 2
                value = value.reshape(count, 2, size, -1).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"blk.{layer}.{parts[part.removesuffix('.weight')]}.weight", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_unpacked_once_and_computes_the_same(
    tiny_dirs: dict[str, Path], tiny_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTELAGE_HOME", str(tmp_path / "home"))
    file = tmp_path / "tiny.gguf"
    write_gguf(tiny_dirs["llama"], file)
    lm = load_model(str(file), device="cpu", dtype="float32")
    assert lm.name == "tiny"
    assert lm.tokenizer.chat_template == tiny_lm.tokenizer.chat_template
    assert lm.encode(prompt()) == tiny_lm.encode(prompt())
    tokens = torch.tensor([[5, 40, 77, 12]])
    with torch.no_grad():
        ours, theirs = (m.model(input_ids=tokens, use_cache=False).logits for m in (lm, tiny_lm))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.999  # kept as bfloat16
    (unpacked,) = (tmp_path / "home" / "gguf").iterdir()
    before = (unpacked / "model.safetensors").stat().st_mtime_ns
    load_model(str(file), device="cpu", dtype="float32")
    assert (unpacked / "model.safetensors").stat().st_mtime_ns == before
