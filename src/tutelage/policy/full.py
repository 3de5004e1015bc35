"""Full fine-tuning: every adapted matrix is trained as a whole, beside the frozen start model.

The change of a weight is kept in float32 from zero on, and the model computes with the sum in its own
dtype, so that small steps are not lost to bfloat16 and the start model stays at hand as the reference.
It takes 16 bytes a trained number (change, gradient, two moments) and two more for the sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from tutelage.engines.fused import Remake, remake_of
from tutelage.errors import ModelError
from tutelage.policy.merged import Merged, MergedLayers, Switch, linear_layers, put

__all__ = ["FullLinear", "FullWeights", "attach_full"]

_FILE = "weights_change.safetensors"


class _FullProduct(torch.autograd.Function):
    """y = x (W + D)^T + b, with dD = dY^T X."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        merged_OI: torch.Tensor,
        bias: torch.Tensor | None,
        change_OI: torch.Tensor,
        source: Remake | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(merged_OI, *([x] if source is None else []))
        ctx.source, ctx.number = source and source.reserve(), change_OI.dtype
        return F.linear(x, merged_OI, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        merged_OI, *rest = ctx.saved_tensors
        x = ctx.source.take() if ctx.source else rest[0]
        dy = grads[0].reshape(-1, merged_OI.shape[0])
        dx = (dy @ merged_OI).reshape(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, (dy.T @ x.reshape(-1, merged_OI.shape[1])).to(ctx.number), None


class FullLinear(Merged):
    """A linear layer whose whole weight is trained."""

    def __init__(self, base: nn.Linear, switch: Switch) -> None:
        super().__init__(base, switch)
        self.change = nn.Parameter(torch.zeros_like(base.weight, dtype=torch.float32))

    def add_change(self, wide_OI: torch.Tensor) -> None:
        """Add D."""
        wide_OI.add_(self.change)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """One product, with a gradient for the whole matrix."""
        out: torch.Tensor = _FullProduct.apply(  # type: ignore[no-untyped-call]
            x, self.merged, self.bias, self.change, remake_of(x)
        )
        return out


@dataclasses.dataclass
class FullWeights(MergedLayers):
    """All trained matrices of one model, by module path. Learner and loop use it as they use an `Adapter`."""

    layers: dict[str, FullLinear]
    model_name: str
    _switch: Switch

    def parameters(self) -> list[nn.Parameter]:
        """Trainable matrices in a fixed order."""
        return [layer.change for layer in self.layers.values()]

    def aim(self, directions: Mapping[str, torch.Tensor]) -> None:
        """Nothing: a whole matrix sees every direction from the start."""

    def clear(self) -> None:
        """Back to the start model."""
        with torch.no_grad():
            for layer in self.layers.values():
                layer.change.zero_()
        self.merge()

    def save(self, folder: Path) -> None:
        """Write the float32 changes, by module path."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {path: layer.change.detach() for path, layer in self.layers.items()}
        save_file(state, str(folder / _FILE), metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            ModelError: The folder holds no changes that fit this model.
        """
        try:
            state = load_file(str(folder / _FILE))
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"the trained weights in {folder} cannot be read ({error})",
                expected=f"{_FILE}, as a run with lora.full = true writes it",
                fix="check the path, or restore the file from a copy",
            ) from error
        wanted = {path: layer.change.shape for path, layer in self.layers.items()}
        if wanted != {path: value.shape for path, value in state.items()}:
            raise ModelError(
                f"the trained weights in {folder} do not fit {self.model_name}",
                expected=f"changes of {len(wanted)} matrices",
                fix="load them onto the model, depth and targets they were trained with",
            )
        with torch.no_grad():
            for path, layer in self.layers.items():
                layer.change.copy_(state[path])
        self.merge()


def attach_full(
    model: nn.Module, *, targets: Sequence[str] = (), first_layer: int = 0, model_name: str = ""
) -> FullWeights:
    """Let the linear layers of `model` be trained as a whole, in place; arguments as those of `lora.attach`.

    Embeddings, norms and the output matrix stay as they are.

    Raises:
        ModelError: No layer carries a wanted name.
    """
    switch = Switch()
    layers = {path: FullLinear(base, switch) for path, base in linear_layers(model, targets, first_layer).items()}
    for path, layer in layers.items():
        put(model, path, layer)
    weights = FullWeights(layers, model_name, switch)
    weights.merge()
    return weights
