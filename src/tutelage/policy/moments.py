"""An optimiser's state as a flat table of tensors, for checkpoints without pickle."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["moments_of", "take_moments"]


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every number it keeps, by "PARAMETER.NAME"."""
    return {
        f"{i}.{key}": torch.as_tensor(value).contiguous()
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def take_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Take over what `moments_of` gave."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        i, _, key = name.partition(".")
        state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
