"""LoRA that costs no forward time: merged once per update, with exact low-rank gradients.

The adapted weight W + s B A is formed once after each optimiser step. The forward pass then is one
matrix product, as without adapter, and the backward pass gives the exact gradients

    dA = s (dY B)^T X        dB = s dY^T (X A^T)        dX = dY (W + s B A)

Files are read and written in PEFT's format. Source of LoRA: Hu et al. 2021, equation 3.
"""

from __future__ import annotations

import dataclasses
import json
import math
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

__all__ = ["Adapter", "LoraLinear", "attach"]


class _MergedLinear(torch.autograd.Function):
    """y = x W_merged^T + b, with gradients for the low-rank factors instead of the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        merged_OI: torch.Tensor,
        bias: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scale: float,
        source: Remake | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(merged_OI, a_RI, b_OR, *([x] if source is None else []))
        ctx.scale, ctx.source = scale, source and source.reserve()
        return F.linear(x, merged_OI, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        merged_OI, a_RI, b_OR, *rest = ctx.saved_tensors
        x = ctx.source.take() if ctx.source else rest[0]
        dy = grads[0].reshape(-1, merged_OI.shape[0])
        flat = x.reshape(-1, merged_OI.shape[1])
        dx = (dy @ merged_OI).reshape(x.shape) if ctx.needs_input_grad[0] else None
        a, b = a_RI.to(dy.dtype), b_OR.to(dy.dtype)
        da = ctx.scale * ((dy @ b).T @ flat)
        db = ctx.scale * (dy.T @ (flat @ a.T))
        return dx, None, None, da.to(a_RI.dtype), db.to(b_OR.dtype), None, None


class LoraLinear(Merged):
    """A frozen linear layer with an adapter that is merged outside the forward pass."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, switch: Switch) -> None:
        super().__init__(base, switch)
        out_features, in_features = base.weight.shape
        self.scale = scale
        place = base.weight.device
        self.lora_a = nn.Parameter(torch.zeros(rank, in_features, dtype=torch.float32, device=place))
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device=place))

    def add_change(self, wide_OI: torch.Tensor) -> None:
        """Add s B A."""
        wide_OI.addmm_(self.lora_b, self.lora_a, alpha=self.scale)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """One product, with gradients for the factors."""
        out: torch.Tensor = _MergedLinear.apply(  # type: ignore[no-untyped-call]
            x, self.merged, self.bias, self.lora_a, self.lora_b, self.scale, remake_of(x)
        )
        return out


@dataclasses.dataclass
class Adapter(MergedLayers):
    """All LoRA layers of one model, by module path."""

    layers: dict[str, LoraLinear]
    rank: int
    alpha: float
    target_names: tuple[str, ...]
    model_name: str
    _switch: Switch

    def parameters(self) -> list[nn.Parameter]:
        """Trainable factors in a fixed order."""
        return [p for layer in self.layers.values() for p in (layer.lora_a, layer.lora_b)]

    def aim(self, directions: Mapping[str, torch.Tensor]) -> None:
        """Let the first rows of A look along given directions, by module path.

        The output is unchanged as long as B is zero; what changes is what the first steps can use:
        the rows read off what a critic found to matter, instead of random mixtures.

        Args:
            directions: (k, in_features) rows a module path, k at most the rank; paths without an
                adapter are passed over.
        """
        with torch.no_grad():
            for path, rows in directions.items():
                if path in self.layers:
                    k = min(len(rows), self.rank)
                    self.layers[path].lora_a[:k] = rows[:k].to(self.layers[path].lora_a)
        self.merge()

    def clear(self) -> None:
        """Back to the start model: B is zero again, A stays."""
        with torch.no_grad():
            for layer in self.layers.values():
                layer.lora_b.zero_()
        self.merge()

    def state(self) -> dict[str, torch.Tensor]:
        """Factors under PEFT's names."""
        found = {}
        for path, layer in self.layers.items():
            found[f"base_model.model.{path}.lora_A.weight"] = layer.lora_a.detach().clone()
            found[f"base_model.model.{path}.lora_B.weight"] = layer.lora_b.detach().clone()
        return found

    def load_state(self, state: dict[str, torch.Tensor], *, where: str) -> None:
        """Take factors over and merge.

        Raises:
            ModelError: Names or shapes do not fit this model.
        """
        expected = {k: tuple(v.shape) for k, v in self.state().items()}
        got = {k: tuple(v.shape) for k, v in state.items()}
        if expected != got:
            wrong = sorted(set(expected.items()) ^ set(got.items()))[0]
            raise ModelError(
                f"the adapter in {where} does not fit {self.model_name}: {wrong[0]} {wrong[1]}",
                expected=f"rank {self.rank} on {', '.join(self.target_names)}",
                fix="load it onto the model and rank it was trained with",
            )
        with torch.no_grad():
            for path, layer in self.layers.items():
                layer.lora_a.copy_(state[f"base_model.model.{path}.lora_A.weight"])
                layer.lora_b.copy_(state[f"base_model.model.{path}.lora_B.weight"])
        self.merge()

    def save(self, folder: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state(), str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.model_name,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            # Full paths: PEFT matches names by suffix, and some layers may be left out.
            "target_modules": sorted(self.layers),
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read what `save` (or PEFT) wrote.

        Raises:
            ModelError: The folder holds no adapter that fits.
        """
        file = folder / "adapter_model.safetensors"
        if not file.is_file():
            raise ModelError(f"{folder} holds no adapter", expected="adapter_model.safetensors", fix="check the path")
        try:
            state = load_file(str(file))
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            scale = float(config["lora_alpha"]) / float(config["r"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"the adapter in {folder} cannot be read ({error})",
                expected="adapter_model.safetensors and adapter_config.json as PEFT writes them",
                fix="restore the files from a copy",
            ) from error
        special = [key for key in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern") if config.get(key)]
        if special:
            raise ModelError(
                f"the adapter in {folder} sets {', '.join(special)}",
                expected="one rank and one alpha for all layers, scaled by alpha / rank",
                fix="bring it into that form: tutelage modules mix FOLDER --out NEW --rank N",
            )
        if config["r"] == self.rank and abs(scale - self.alpha / self.rank) > 1e-9:
            raise ModelError(
                f"the adapter in {folder} was trained with alpha / rank = {scale:g}",
                expected=f"{self.alpha / self.rank:g}, as here",
                fix="attach with the same alpha and rank",
            )
        self.load_state(state, where=str(folder))


def attach(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    seed: int,
    targets: Sequence[str] = (),
    first_layer: int = 0,
    model_name: str = "",
) -> Adapter:
    """Put an adapter on the linear layers of `model`, in place.

    A starts uniform as in PEFT (Kaiming with a = sqrt 5), B at zero, so the model starts unchanged.

    Args:
        model: The model's body (the output projection is outside and stays as it is) or the whole.
        rank: r of the factors.
        alpha: The product is scaled by alpha / rank.
        seed: Decides the start of A.
        targets: Last names of the modules to adapt; empty means every linear layer.
        first_layer: Layers below this one stay as they are, which also spares their backward pass.
        model_name: Written into the adapter's file.

    Raises:
        ModelError: No layer carries a wanted name.
    """
    switch = Switch()
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, LoraLinear] = {}
    for path, module in linear_layers(model, targets, first_layer).items():
        layer = LoraLinear(module, rank, alpha / rank, switch)
        bound = 1.0 / math.sqrt(module.in_features)
        with torch.no_grad():
            start = torch.empty(rank, module.in_features).uniform_(-bound, bound, generator=generator)
            layer.lora_a.copy_(start)
        put(model, path, layer)
        layers[path] = layer
    names = tuple(sorted({p.rsplit(".", 1)[-1] for p in layers}))
    adapter = Adapter(layers, rank, alpha, names, model_name, switch)
    adapter.merge()
    return adapter
