"""Two small layers of the Llama family that keep less for the backward pass and run fewer operations.

As transformers writes them, RMS norm keeps several float32 copies of its input, and the gated MLP keeps
four tables of its inner width. Both can be worked out again from their inputs for less than it costs
to store and read them. What they give is not kept either: it carries a `Remake`, and a layer that
needs its input in the backward pass asks for it there.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["Remake", "fuse", "remake_of"]

_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm"}
_MLPS = {"LlamaMLP", "MistralMLP", "Qwen2MLP"}


class Remake:
    """How a tensor is worked out again in the backward pass, once for all layers that need it.

    Args:
        make: Gives the tensor from `kept`.
        kept: Tensors that the backward pass keeps anyway.
    """

    def __init__(self, make: Callable[..., torch.Tensor], *kept: torch.Tensor) -> None:
        self._make, self._kept = make, tuple(x.detach() for x in kept)
        self._users = 0
        self._made: torch.Tensor | None = None

    def reserve(self) -> Remake:
        """Count in one layer that will `take` it."""
        self._users += 1
        return self

    def take(self) -> torch.Tensor:
        """The tensor; the last layer that asks frees it."""
        if not self._users:
            raise RuntimeError("these gradients have been computed already: run the forward pass once more")
        made = self._make(*self._kept) if self._made is None else self._made
        self._users -= 1
        self._made, self._kept = (made, self._kept) if self._users else (None, ())
        return made


def remake_of(x: torch.Tensor) -> Remake | None:
    """The way to work `x` out again, if it came from one of the layers here."""
    return getattr(x, "_tutelage_remake", None)


def _normed(x: torch.Tensor, weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (x * factor).to(x.dtype) * weight


class _RmsNorm(torch.autograd.Function):
    """y = w * x / sqrt(mean(x^2) + eps), in float32; keeps x as it came and one number a row.

    With r the factor of a row, dx = r (w dy) - x r^3 mean(x * w dy) and dw = sum over rows of r x dy.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, factor)
        return _normed(x, weight, factor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        dy, wide = grads[0].float(), x * factor
        dw = (dy * wide).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dw, None
        slope = dy.mul_(weight) if dy is not grads[0] else dy * weight
        shared = (slope * wide).mean(-1, keepdim=True)
        return slope.sub_(wide.mul_(shared)).mul_(factor).to(x.dtype), dw, None


class _Gated(torch.autograd.Function):
    """silu(gate) * up; keeps gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        dy = grads[0]
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate).mul_(up)


def _norm_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        factor = size.square_().div_(x.shape[-1]).add_(self.variance_epsilon).rsqrt_()
    if not torch.is_grad_enabled():
        return _normed(x, self.weight, factor)
    out: torch.Tensor = _RmsNorm.apply(x, self.weight, factor)  # type: ignore[no-untyped-call]
    out._tutelage_remake = Remake(_normed, x, self.weight, factor)  # type: ignore[attr-defined]
    return out


def _mlp_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    mixed: torch.Tensor = _Gated.apply(gate, up)  # type: ignore[no-untyped-call]
    mixed._tutelage_remake = Remake(_gated, gate, up)  # type: ignore[attr-defined]
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
