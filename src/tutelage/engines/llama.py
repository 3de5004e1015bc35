"""One decoding step of the Llama family without a module call a layer.

Llama, Mistral and Qwen2 share one layer: RMS norm, rotary attention with shared key-value heads,
and a gated MLP. Here that layer is a dozen tensor operations on weights that are fused (query, key
and value; gate and up) and, on a CPU, packed once into the layout its matrix kernels want; the
prompt's pass and learning stay with transformers. Other models decode through transformers too.

With `int8=True` the weights are rounded to 8 bits (symmetric, one scale an output) and the
activations to 8 bits a row, so the drawn tokens come from a slightly other model; their recorded
log-probabilities are those of that model, which an importance-weighted objective needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from tutelage.engines.attention import KeyValueMemory, step_bias
from tutelage.engines.load import LanguageModel, choose_dtype

__all__ = ["LlamaStep", "round_to_int8"]

_FAMILY = {"llama", "mistral", "qwen2"}
_ROTARY = {"default", "linear", "llama3", "yarn"}  # frequencies that do not depend on the length

Linear = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass
class _Layer:
    before: torch.Tensor
    qkv: Linear
    out: Linear
    between: torch.Tensor
    gate_up: Linear
    down: Linear


class LlamaStep:
    """The next token's logits of a batch of rows, whose keys and values lie in a `KeyValueMemory`.

    Args:
        lm: A model for which `serves` is true. Adapters take part as they are merged now: a later
            change of the weights needs a new `LlamaStep`.
        rows: Rows the batch will mostly have; packed weights are laid out for it.
        int8: Round weights and activations to 8 bits.
    """

    def __init__(self, lm: LanguageModel, *, rows: int, int8: bool = False) -> None:
        body, config = lm.body, lm.model.config
        self.heads = int(config.num_attention_heads)
        self.shared = int(config.num_key_value_heads)
        self.width = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        self.eps = float(config.rms_norm_eps)
        self.rotary, self.embed_VD = body.rotary_emb, body.embed_tokens.weight
        self.last_norm = body.norm.weight
        make = _maker(lm, rows, int8)
        self.layers = [_fuse(layer, make) for layer in body.layers]
        self.head = make(lm.head_VD, None)

    @staticmethod
    def serves(lm: LanguageModel) -> bool:
        """Whether the model is built as this step computes."""
        config = lm.model.config
        rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        return (
            getattr(config, "model_type", "") in _FAMILY
            and getattr(config, "hidden_act", "") == "silu"
            and rotary in _ROTARY
            and hasattr(lm.body, "rotary_emb")
        )

    def __call__(
        self, tokens_B: torch.Tensor, slots_B: torch.Tensor, memory: KeyValueMemory, reach: int
    ) -> torch.Tensor:
        """Logits after `tokens_B`, (rows, vocabulary).

        Args:
            tokens_B: The token each of the rows 0..B-1 drew last.
            slots_B: Its position, which is also where its key and value go; below `reach`.
            memory: Keys and values of what came before.
            reach: Positions of the memory that are looked at.
        """
        return self.head(self.hidden(tokens_B, slots_B, memory, reach))

    def hidden(
        self,
        tokens_B: torch.Tensor,
        slots_B: torch.Tensor,
        memory: KeyValueMemory,
        reach: int,
        overheard: dict[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Final hidden states after `tokens_B`, (rows, hidden); `head` makes logits of them.

        What comes out of the layers that are keys of `overheard` is put there.
        """
        count, heads, shared, width = len(tokens_B), self.heads, self.shared, self.width
        half = width // 2
        x = self.embed_VD[tokens_B]
        cos, sin = (part[0, :, None] for part in self.rotary(x, slots_B[None]))
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)  # the sign of rotate-half, once for all layers
        bias = step_bias(slots_B, reach, shared, x.dtype)
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(F.rms_norm(x, x.shape[1:], layer.before, self.eps)).view(count, heads + 2 * shared, width)
            turned = qkv[:, : heads + shared]
            swapped = torch.cat([turned[..., half:], turned[..., :half]], -1)
            turned = torch.addcmul(turned * cos, swapped, sin)
            memory.write(index, slots_B, turned[:, heads:], qkv[:, heads + shared :])
            x = x + layer.out(memory.attend(index, turned[:, :heads], bias, width**-0.5))
            gate, up = layer.gate_up(F.rms_norm(x, x.shape[1:], layer.between, self.eps)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
            if overheard is not None and index in overheard:
                overheard[index] = x
        return F.rms_norm(x, x.shape[1:], self.last_norm, self.eps)


def _fuse(layer: Any, make: Callable[[torch.Tensor, torch.Tensor | None], Linear]) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp

    def joined(*parts: Any) -> Linear:
        biases = [part.bias for part in parts]
        bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
        # An adapted layer computes with its merged weight.
        return make(torch.cat([getattr(part, "current", part.weight).detach() for part in parts]), bias)

    return _Layer(
        layer.input_layernorm.weight,
        joined(attention.q_proj, attention.k_proj, attention.v_proj),
        joined(attention.o_proj),
        layer.post_attention_layernorm.weight,
        joined(mlp.gate_proj, mlp.up_proj),
        joined(mlp.down_proj),
    )


def _maker(lm: LanguageModel, rows: int, int8: bool) -> Callable[[torch.Tensor, torch.Tensor | None], Linear]:
    """Turns a weight into the function that multiplies by it, in the fastest form there is here."""
    if int8:
        return _int8
    if lm.device.type == "cpu" and lm.dtype == torch.bfloat16 == choose_dtype("auto", lm.device):
        return lambda weight, bias: _packed(weight, bias, rows)

    def plain(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return lambda x: F.linear(x, weight, bias)

    return plain


def _packed(weight_OI: torch.Tensor, bias: torch.Tensor | None, rows: int) -> Linear:
    held = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), rows)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, held, bias, "none", [], "")
        return out

    return multiply


def _int8(weight_OI: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    held_IO, scale_O = round_to_int8(weight_OI)
    held_IO = held_IO.t()

    def multiply(x: torch.Tensor) -> torch.Tensor:
        rounded, scale_B = round_to_int8(x)
        out = torch._int_mm(rounded, held_IO).float().mul_(scale_B[:, None]).mul_(scale_O)
        return (out if bias is None else out.add_(bias)).to(x.dtype)

    return multiply


def round_to_int8(rows_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric rounding, one scale a row: (int8 values, float32 scales) with values * scale near the input."""
    wide = rows_NK.float()
    scale_N = wide.abs().amax(1).clamp_min_(1e-12) / 127.0
    return (wide / scale_N[:, None]).round_().to(torch.int8), scale_N
