"""Linear layers that compute with a merged weight, start plus change, formed once after each update.

What the change is made of (LoRA's factors, or a whole matrix) is the layer's own affair; with the
switch off it is the start model, which is also the reference policy.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn import functional as F

from tutelage.errors import ModelError

__all__ = ["Merged", "MergedLayers", "Switch", "dither", "linear_layers", "put", "round_down"]


def dither(device: torch.device) -> torch.Tensor:
    """int32 numbers: each from 0 to 65,535 once, in an order that is even over every stretch (a Weyl sequence)."""
    step = 40_503  # 2^16 by the golden ratio
    return (torch.arange(1 << 16, dtype=torch.int64, device=device) * step + (1 << 15) & 0xFFFF).to(torch.int32)


def round_down(bits_N: torch.Tensor, dither_D: torch.Tensor) -> None:
    """Cut float32 numbers, as bits, to what bfloat16 holds, in place, after adding the dither below its last bit.

    Plain rounding would lose every change below half of a weight's last bit, which is all of a small first
    step, on all weights alike. So a change by p of the last bit moves a share p of the weights, and products
    with many weights see it whole. A number that bfloat16 holds stays what it is: without a change the
    weights are those of the start model. The same change gives the same weights: resumed runs stay bit-equal.

    Source: stochastic rounding, Gupta et al. 2015 (arXiv 1502.02551), with a fixed dither instead of a random one.
    """
    whole = len(bits_N) - len(bits_N) % len(dither_D)
    bits_N[:whole].view(-1, len(dither_D)).add_(dither_D)
    bits_N[whole:].add_(dither_D[: len(bits_N) - whole])
    bits_N.bitwise_and_(-65_536)


@dataclasses.dataclass
class Switch:
    """Shared by all layers of one model: whether their change takes part."""

    on: bool = True

    @contextlib.contextmanager
    def turned_off(self) -> Iterator[None]:
        """The start model inside the block."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


class Merged(nn.Module, abc.ABC):
    """A linear layer whose frozen weight stays beside the merged one."""

    def __init__(self, base: nn.Linear, switch: Switch) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self._switch = switch
        self.merged: torch.Tensor = base.weight.detach()
        self._own = False

    @abc.abstractmethod
    def add_change(self, wide_OI: torch.Tensor) -> None:
        """Add what was learned to the start weight, in float32 and in place."""

    @abc.abstractmethod
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """The product with the merged weight, with gradients for the change."""

    @property
    def current(self) -> torch.Tensor:
        """The weight the layer computes with now: merged, or the start model's while the switch is off."""
        return self.merged if self._switch.on else self.weight

    def merge(self, scratch: torch.Tensor, dither_D: torch.Tensor | None) -> None:
        """Form start plus change anew, in the weight's dtype.

        Args:
            scratch: float32 numbers to work in, at least as many as the weight has.
            dither_D: For a bfloat16 weight, `dither`.
        """
        with torch.no_grad():
            if not self._own:  # memory is taken once and reused by every merge
                self.merged, self._own = torch.empty_like(self.weight), True
            flat = scratch[: self.weight.numel()]
            wide = flat.view(self.weight.shape).copy_(self.weight)
            self.add_change(wide)
            if dither_D is not None:
                round_down(flat.view(torch.int32), dither_D)
            self.merged.copy_(wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        if self._switch.on and torch.is_grad_enabled():
            return self.multiply(x)
        return F.linear(x, self.current, self.bias)


class MergedLayers(abc.ABC):
    """All merged layers of one model, by module path: what a learner changes."""

    layers: Mapping[str, Merged]
    _switch: Switch

    @abc.abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What gets gradients, in a fixed order."""

    def merge(self) -> None:
        """Bring the weights that the model computes with up to date."""
        layers = self.layers.values()
        first = next(iter(layers))
        scratch = torch.empty(max(x.weight.numel() for x in layers), device=first.weight.device)
        dither_D = dither(scratch.device) if first.weight.dtype == torch.bfloat16 else None
        for layer in layers:
            layer.merge(scratch, dither_D)

    def off(self) -> AbstractContextManager[None]:
        """The frozen start model inside the block: it is also the reference policy."""
        return self._switch.turned_off()


def linear_layers(model: nn.Module, targets: Sequence[str], first_layer: int) -> dict[str, nn.Linear]:
    """The linear layers to change, by module path: all but the head, or those whose last name is a target.

    Raises:
        ModelError: No layer carries a wanted name.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    wanted = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and (not targets or path.rsplit(".", 1)[-1] in targets)
        and _layer_number(path) >= first_layer
    }
    if not wanted:
        present = sorted({p.rsplit(".", 1)[-1] for p, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(
            f"no linear layer is named {', '.join(targets)}",
            expected=f"some of: {', '.join(present)}",
            fix="change lora.targets in the recipe, or leave it empty for all",
        )
    return wanted


def _layer_number(path: str) -> int:
    """Which transformer layer a module belongs to; a module outside of layers counts as the last."""
    found = re.search(r"\.(\d+)\.", path)
    return int(found.group(1)) if found else 1 << 30


def put(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Set a module in another's place."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
