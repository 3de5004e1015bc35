"""The value head: what reward can still be expected, read off the policy's final hidden states."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from tutelage.errors import StoreError

__all__ = ["ValueHead"]

_FILE = "value_head.safetensors"


class ValueHead(nn.Module):
    """V = w h + b, with h the state at which a token is predicted, normalised to mean 0 and deviation 1.

    It begins with zero everywhere. The states get no gradient from it: what the model computes is for
    the policy to say, and a head with random weights would pull at it.

    Args:
        width: Numbers in a hidden state.
        device: Where the states are.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight_D = nn.Parameter(torch.zeros(width, device=device))
        self.bias = nn.Parameter(torch.zeros((), device=device))

    def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """(N, hidden) -> (N,) float32."""
        states = F.layer_norm(hidden_ND.detach().float(), hidden_ND.shape[-1:])
        return states @ self.weight_D + self.bias

    def clear(self) -> None:
        """Back to zero."""
        with torch.no_grad():
            for weight in self.parameters():
                weight.zero_()

    def save(self, folder: Path) -> None:
        """Write the head's weights beside an adapter's."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().clone() for name, value in self.state_dict().items()}
        save_file(state, str(folder / _FILE), metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            StoreError: There is no head in the folder, or one of another width.
        """
        try:
            state = load_file(str(folder / _FILE))
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"the value head in {folder} cannot be read ({error})",
                expected=f"{_FILE}, as a run with update.objective = ppo writes it",
                fix="restore the file from a copy, or start a new run",
            ) from error
        wanted = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        got = {name: tuple(value.shape) for name, value in state.items()}
        if wanted != got:
            raise StoreError(
                f"the value head in {folder} holds {got}",
                expected=f"{wanted}, the width of this model",
                fix="load it onto the model it was trained with",
            )
        self.load_state_dict(state)
