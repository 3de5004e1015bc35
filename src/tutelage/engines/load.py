"""Load a causal language model with its tokenizer; the one place that chooses device and dtype.

Weights come from safetensors or GGUF, never from pickle, and code that lies beside a model is
never run (`trust_remote_code` stays off).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from tutelage.engines import allocator, attention, fused, weights
from tutelage.engines.packing import common_prefix
from tutelage.errors import InputError, ModelError
from tutelage.records import Message, Prompt, content_hash

__all__ = ["LanguageModel", "choose_device", "choose_dtype", "describe", "gguf_to_directory", "load_model"]


def choose_device(wish: str = "auto") -> torch.device:
    """`auto` takes a CUDA GPU if there is one, else the CPU.

    Raises:
        ModelError: A GPU is wished for, and there is none that this torch can use.
    """
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wish == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "model.device is cuda, but no CUDA GPU can be used",
            expected="a GPU and a build of torch for it",
            fix="set model.device=cpu",
        )
    return torch.device(wish)


def choose_dtype(wish: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the processor multiplies it natively, else float32.

    A CPU without such instructions emulates bfloat16 some sixty times slower than float32.
    """
    if wish != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wish]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    flags = torch.cpu.get_capabilities()
    return torch.bfloat16 if flags.get("avx512_bf16") or flags.get("amx_bf16") else torch.float32


@dataclasses.dataclass
class LanguageModel:
    """A causal language model, split into body and head, with its tokenizer.

    `body` maps tokens to the final hidden states, `head_VD` those to logits.
    """

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype

    @property
    def fingerprint(self) -> str:
        """Hash of a sample of the weights: tells two models of the same name apart."""
        parts = []
        for name, value in self.model.named_parameters():
            flat = value.detach().flatten()
            parts.append([name, list(value.shape), flat[:: max(1, flat.numel() // 16)].float().tolist()])
        return content_hash(parts)

    @functools.cached_property
    def lead(self) -> int:
        """Tokens with which the chat template begins every single-turn prompt."""
        probes = [Prompt("lead", (Message("user", text),)) for text in ("alpha", "7 beta", "Zeta?")]
        return common_prefix([self.encode(p) for p in probes])

    @property
    def body(self) -> Any:
        """The transformer without its output projection."""
        return self.model.base_model

    @property
    def head_VD(self) -> torch.Tensor:
        """Output projection, (vocabulary, hidden)."""
        weight: torch.Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def layers(self) -> int:
        """Number of transformer layers."""
        return int(self.model.config.num_hidden_layers)

    @property
    def context(self) -> int:
        """Longest sequence the model takes, in tokens."""
        config = self.model.config
        limits = [getattr(config, "max_position_embeddings", None), getattr(config, "sliding_window", None)]
        return min([int(n) for n in limits if n] or [1 << 20])

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a turn."""
        found: set[int] = set()
        for source in (self.model.generation_config, self.model.config, self.tokenizer):
            value = getattr(source, "eos_token_id", None)
            found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
        return frozenset(int(t) for t in found)

    @property
    def end_token(self) -> int:
        """The token that training appends to a finished turn."""
        token = self.tokenizer.eos_token_id
        return int(token) if token is not None else min(self.stop_tokens)

    def encode(self, prompt: Prompt, *, room: int = 0) -> tuple[int, ...]:
        """Token ids of the conversation, up to where the model's turn begins.

        Raises:
            InputError: The prompt and `room` more tokens do not fit into the context.
        """
        messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) + room > self.context:
            raise InputError(
                f"prompt '{prompt.id}' has {len(ids)} tokens and {room} more are to be generated",
                expected=f"at most {self.context} tokens together, the context of {self.name}",
                fix="shorten the prompt, or lower sampling.max_new_tokens",
            )
        return ids

    def encode_reply(self, text: str) -> tuple[int, ...]:
        """Token ids of a whole reply, ended."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return (*ids, self.end_token)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, without control tokens."""
        return self.whole_text(tokens).strip()

    def whole_text(self, tokens: Sequence[int]) -> str:
        """The same with the blanks at its ends."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def hidden(self, tokens_BT: torch.Tensor, position_BT: torch.Tensor) -> torch.Tensor:
        """Final hidden states, (B, T, D), under the active attention plan."""
        # A 4-dimensional mask is passed through untouched; the plan holds the real one.
        placeholder = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        out = self.body(
            input_ids=tokens_BT.to(self.device),
            position_ids=position_BT.to(self.device),
            attention_mask=placeholder,
            use_cache=False,
        )
        states: torch.Tensor = out.last_hidden_state
        return states


def load_model(spec: str, *, device: str = "auto", dtype: str = "auto", hub: bool = False) -> LanguageModel:
    """Load a model by embedded name, directory, GGUF file or (only with `hub`) hub name.

    Raises:
        ModelError: It is not there, lacks a tokenizer or chat template, or its head is not a plain
            linear map of the final hidden state.
    """
    import transformers

    source, name, tokenizer, place, number = _prepare(spec, device, dtype, hub)
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=number, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the model in {source} could not be loaded ({_first_line(error)})",
            expected="a causal language model of transformers with safetensors weights",
            fix="check the directory; convert pickled weights to safetensors first",
        ) from error
    absent = sorted(report.get("missing_keys") or ())
    if absent:  # transformers would fill them with random numbers
        raise ModelError(
            f"the weights in {source} lack {absent[0]}" + (f" and {len(absent) - 1} more" if absent[1:] else ""),
            expected="every weight that config.json implies",
            fix="restore the missing safetensors files",
        )
    loaded = LanguageModel(name, _dressed(model, place), tokenizer, place, number)
    _check_head(loaded)
    return loaded


def hollow_model(
    spec: str, *, layers: int, device: str = "auto", dtype: str = "auto", hub: bool = False
) -> tuple[LanguageModel, int]:
    """The same architecture with random weights in its first `layers` layers, to measure on; and how many it has.

    Raises:
        ModelError: It is not there, or lacks what `load_model` wants besides the weights.
    """
    import transformers

    source, name, tokenizer, place, number = _prepare(spec, device, dtype, hub)
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        whole, config.num_hidden_layers = int(config.num_hidden_layers), layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        with torch.random.fork_rng():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=number, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"config.json of {spec} cannot be read ({_first_line(error)})",
            expected="the config of a causal language model",
            fix="check the model directory",
        ) from error
    return LanguageModel(name, _dressed(model, place), tokenizer, place, number), whole


def _dressed(model: Any, place: torch.device) -> Any:
    """The model as the engine runs it: frozen, with our attention and fused layers."""
    model.set_attn_implementation(attention.install())
    model.requires_grad_(False)
    model.eval().to(place)
    fused.fuse(model)
    return model


def _prepare(spec: str, device: str, dtype: str, hub: bool) -> tuple[str, str, Any, torch.device, torch.dtype]:
    """What comes before the weights: source, name, tokenizer, device and dtype."""
    import transformers

    allocator.bound_caches()
    allocator.keep_pages()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source, name = _find(spec, hub=hub)
    place = choose_device(device)
    number = choose_dtype(dtype, place)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"no tokenizer could be read from {source} ({_first_line(error)})",
            expected="tokenizer.json (or the tokenizer's own files) beside the weights",
            fix="save the tokenizer into the directory with tokenizer.save_pretrained(DIR)",
        ) from error
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"the tokenizer in {source} has no chat template",
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            fix="use an instruct model, or add the template its training used",
        )
    return source, name, tokenizer, place, number


def describe(spec: str, *, hub: bool = False) -> str:
    """Folder (or hub name) of a model, without loading it.

    Raises:
        ModelError: There is no such model.
    """
    return _find(spec, hub=hub)[0]


def _find(spec: str, *, hub: bool) -> tuple[str, str]:
    if spec == weights.EMBEDDED_POLICY:
        return str(weights.locate(spec)), spec
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no such GGUF file: {path}", expected="a readable .gguf file", fix="check the path")
        return str(_unpacked(path)), path.stem
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} has no config.json",
                expected="a directory written by save_pretrained",
                fix="name the folder that holds config.json and the safetensors files",
            )
        return str(path), path.name
    looks_like_hub = spec.count("/") == 1 and not spec.startswith((".", "/", "~"))
    if hub and looks_like_hub:
        return spec, spec
    raise ModelError(
        f"model '{spec}' is neither '{weights.EMBEDDED_POLICY}', a directory nor a GGUF file",
        expected="one of these" + (", or a hub name" if hub else ""),
        fix="check the spelling and the path" + ("" if hub else "; for a hub name add --set model.hub=true"),
    )


def _unpacked(path: Path) -> Path:
    stat = path.stat()
    key = f"{path.stem}-{stat.st_size}-{stat.st_mtime_ns}"
    target = weights.cache_dir() / "gguf" / key
    if not (target / "config.json").is_file():
        scratch = target.with_name(f".{key}.{os.getpid()}")
        gguf_to_directory(path, scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.replace(target)
    return target


def gguf_to_directory(file: Path, target: Path) -> None:
    """Dequantise a GGUF file into a safetensors directory that loads quickly.

    Raises:
        ModelError: The file is not a GGUF that transformers can read.
    """
    import struct

    import transformers
    from transformers import GgufConfig

    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ModelError(f"{file} is no GGUF file", expected="a file that begins with GGUF", fix="check the path")

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
        )
    except (OSError, ValueError, KeyError, RuntimeError, IndexError, TypeError, EOFError, struct.error) as error:
        raise ModelError(
            f"{file} could not be read as GGUF ({_first_line(error)})",
            expected="a GGUF file of an architecture that transformers knows",
            fix="check that the file is complete",
        ) from error
    target.mkdir(parents=True, exist_ok=True)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    from safetensors.torch import save_file

    state = {
        key: value.to(torch.bfloat16).contiguous() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
        if not (tied and key == "lm_head.weight")
    }
    save_file(state, str(target / "model.safetensors"), metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "bfloat16"
    (target / "config.json").write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")
    tokenizer.save_pretrained(str(target))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@torch.no_grad()
def _check_head(loaded: LanguageModel) -> None:
    """Refuse a model whose logits are not a plain projection of the last hidden state."""
    linears = [m for m in loaded.body.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ModelError(
            f"{loaded.name} has no torch.nn.Linear layers to adapt",
            expected="an architecture with Linear layers (Llama, Qwen2, Mistral, GPT-NeoX, ...)",
            fix="choose another model; GPT-2's Conv1D layers are not supported",
        )
    probe = torch.arange(5, 9)[None].to(loaded.device) % loaded.head_VD.shape[0]
    place = torch.arange(4, device=loaded.device)[None]
    mask = torch.ones(4, 4, dtype=torch.bool, device=loaded.device).tril()
    with attention.attention_plan(attention.AttentionPlan(mask_TT=mask)):
        ours = loaded.hidden(probe, place) @ loaded.head_VD.T
    theirs = loaded.model(input_ids=probe, use_cache=False).logits
    gap = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp_min(1e-6)
    if not torch.isfinite(gap) or gap > (1e-3 if loaded.dtype == torch.float32 else 0.05):
        raise ModelError(
            f"{loaded.name} does not compute its logits as hidden state times output matrix, "
            "or its attention does not go through transformers' attention interface",
            expected="a standard causal language model",
            fix="choose another model, and report this architecture to the project",
        )
