"""Adapters as they lie in folders, by themselves, without a model: PEFT's file format, every scaling folded into B."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tutelage.errors import ModelError

__all__ = ["Factors", "SavedAdapter"]

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


class Factors(NamedTuple):
    """One layer's change of the weight: the product of two factors, all scaling included."""

    b_OR: torch.Tensor
    a_RI: torch.Tensor

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.a_RI)

    def dense(self) -> torch.Tensor:
        """The change written out, (O, I)."""
        return self.b_OR @ self.a_RI


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """An adapter as it lies in a folder, by itself, without a model.

    Args:
        name: What it is called in a mix.
        base: The model that it was trained on.
        layers: Its change, by module path.
        digest: SHA-256 of the file that it was read from; empty for one that was just made.
        source: Folder that it was read from.
    """

    name: str
    base: str
    layers: Mapping[str, Factors]
    digest: str = ""
    source: str = ""

    @property
    def rank(self) -> int:
        """The highest rank of a layer."""
        return max((f.rank for f in self.layers.values()), default=0)

    @classmethod
    def read(cls, folder: Path, name: str | None = None) -> SavedAdapter:
        """Read what `policy.lora` or PEFT wrote, with its alpha, rank patterns and rank-stabilised scaling.

        Raises:
            ModelError: It is not there, is damaged, or is more than a plain LoRA.
        """
        file = folder / "adapter_model.safetensors"
        if not file.is_file():
            raise ModelError(f"{folder} holds no adapter", expected="adapter_model.safetensors", fix="check the path")
        try:
            state = load_file(str(file))
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            _refuse_what_is_no_plain_lora(config, folder)
            layers = _layers(state, config, folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ModelError(
                f"the adapter in {folder} cannot be read ({error})",
                expected="adapter_model.safetensors and adapter_config.json as PEFT writes them",
                fix="restore the files from a copy",
            ) from error
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        base = str(config.get("base_model_name_or_path") or "")
        return cls(name or folder.resolve().name, base, layers, digest, str(folder.resolve()))

    def save(self, folder: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, every layer filled up to one rank."""
        folder.mkdir(parents=True, exist_ok=True)
        rank = self.rank
        save_file(self.state(), str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": self.base, "r": rank,
            "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "target_modules": sorted(self.layers),
            "fan_in_fan_out": False, "inference_mode": True,
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def state(self) -> dict[str, torch.Tensor]:
        """Factors under PEFT's names, every layer of the same rank; what is filled in is zero."""
        found = {}
        for path, (b, a) in self.layers.items():
            more = self.rank - len(a)
            found[f"base_model.model.{path}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, more)).contiguous()
            found[f"base_model.model.{path}.lora_B.weight"] = nn.functional.pad(b, (0, more)).contiguous()
        return found


def _refuse_what_is_no_plain_lora(config: Mapping[str, Any], folder: Path) -> None:
    strange = [key for key in ("use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias") if config.get(key)]
    strange += [f"{key} {config[key]}" for key, plain in (("peft_type", "LORA"), ("bias", "none"))
                if config.get(key, plain) != plain]  # fmt: skip
    if strange:
        raise ModelError(
            f"the adapter in {folder} is more than a plain LoRA: {', '.join(strange)}",
            expected="factors of linear layers and nothing else",
            fix="train the module as plain LoRA",
        )


def _layers(state: Mapping[str, torch.Tensor], config: Mapping[str, Any], folder: Path) -> dict[str, Factors]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        named = _KEY.fullmatch(key)
        if named is None or value.dim() != 2:
            raise ModelError(
                f"the adapter in {folder} holds '{key}', {tuple(value.shape)}",
                expected="lora_A and lora_B of linear layers",
                fix="train the module as plain LoRA on linear layers",
            )
        halves.setdefault(named[1], {})[named[2]] = value.float()
    layers = {}
    for path, half in sorted(halves.items()):
        a, b = half["A"], half["B"]
        rank = _patterned(config.get("rank_pattern"), path, config["r"])
        alpha = _patterned(config.get("alpha_pattern"), path, config["lora_alpha"])
        if not len(a) == b.shape[1] == rank:
            raise ModelError(
                f"the adapter in {folder} has factors {tuple(b.shape)} and {tuple(a.shape)} at {path}",
                expected=f"rank {rank:g}, as adapter_config.json says",
                fix="restore both files from the same copy",
            )
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        layers[path] = Factors(scale * b, a)
    if not layers:
        raise ModelError(f"the adapter in {folder} is empty", expected="at least one layer", fix="check the path")
    return layers


def _patterned(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    """What a layer's own pattern says, as PEFT matches them: the whole path, or its end."""
    return float(next((v for k, v in (patterns or {}).items() if re.fullmatch(rf"(?:.*\.)?(?:{k})", path)), default))
