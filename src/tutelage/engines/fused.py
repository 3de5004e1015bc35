"""Two small layers of the Llama family that keep less for the backward pass and run fewer operations.

As transformers writes them, RMS norm keeps several float32 copies of its input, and the gated MLP keeps
four tables of its inner width. Both can be worked out again from their inputs for less than it costs
to store and read them.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["fuse"]

_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm"}
_MLPS = {"LlamaMLP", "MistralMLP", "Qwen2MLP"}


class _RmsNorm(torch.autograd.Function):
    """y = w * x / sqrt(mean(x^2) + eps), in float32; keeps x as it came and one number a row.

    With r the factor of a row, dx = r (w dy) - x r^3 mean(x * w dy) and dw = sum over rows of r x dy.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        factor = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, factor)
        return weight * (wide * factor).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        dy, wide = grads[0].float(), x.float() * factor
        dw = (dy * wide).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dw, None
        slope = dy * weight
        shared = (slope * wide).mean(-1, keepdim=True)
        return slope.sub_(wide.mul_(shared)).mul_(factor).to(x.dtype), dw, None


class _Gated(torch.autograd.Function):
    """silu(gate) * up; keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        dy = grads[0]
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


def _norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
    return out


def _mlp_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    mixed = _Gated.apply(self.gate_proj(x), self.up_proj(x))  # type: ignore[no-untyped-call]
    out: torch.Tensor = self.down_proj(mixed)
    return out


def fuse(model: nn.Module) -> None:
    """Let the norms and gated MLPs of a Llama-family model run as here; others stay as they are."""
    silu = getattr(getattr(model, "config", None), "hidden_act", "") == "silu"
    for module in model.modules():
        kind = type(module).__name__
        if kind in _NORMS:
            module.forward = types.MethodType(_norm_forward, module)
        elif kind in _MLPS and silu:
            module.forward = types.MethodType(_mlp_forward, module)
