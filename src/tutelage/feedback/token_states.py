"""The states of the tokens of many texts, which an attention head looks over."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from tutelage.engines.features import Probe, tapped
from tutelage.engines.load import LanguageModel
from tutelage.engines.packing import Group, pack

__all__ = ["TokenStates", "read_states"]

DEPTH = 0.2  # of the layers: where tokens are read (docs/log.md)
_LARGEST = 6e4  # of what 16 bits hold; states beyond belong to sinks


@dataclasses.dataclass(frozen=True)
class TokenStates:
    """The states of the tokens of N texts, one text after the other.

    Args:
        state_SF: float16, a row a token.
        end_N: Where each text's rows end. A text has one token at least.
    """

    state_SF: np.ndarray
    end_N: np.ndarray

    def __len__(self) -> int:
        return len(self.end_N)

    def __getitem__(self, rows_N: np.ndarray) -> TokenStates:
        starts_N, length_N = self._starts[rows_N], self.lengths[rows_N]
        place_S = np.concatenate([np.arange(a, a + n) for a, n in zip(starts_N, length_N, strict=True)])
        return TokenStates(self.state_SF[place_S], length_N.cumsum())

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(N,) tokens."""
        return np.diff(self.end_N, prepend=0)

    def padded(self, rows_N: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, F) float32 states of some texts, and (B, T) True where there is a token."""
        length_N = self.lengths[rows_N]
        keep_BT = np.arange(length_N.max()) < length_N[:, None]
        place_BT = np.where(keep_BT, self._starts[rows_N][:, None] + np.arange(keep_BT.shape[1]), 0)
        return torch.from_numpy(self.state_SF[place_BT]).float(), torch.from_numpy(keep_BT)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All rows in order, so many at a time."""
        for start in range(0, len(self), size):
            yield np.arange(start, min(start + size, len(self)))

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """(F,) mean and standard deviation over tokens, in double precision."""
        total_F = self.state_SF.sum(0, dtype=np.float64)
        mean_F = total_F / len(self.state_SF)
        square_F = np.zeros_like(mean_F)
        for start in range(0, len(self.state_SF), 4096):
            square_F += ((self.state_SF[start : start + 4096] - mean_F) ** 2).sum(0)
        return mean_F, np.sqrt(square_F / len(self.state_SF)) + 1e-6

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        starts: np.ndarray = self.end_N - self.lengths
        return starts


@torch.inference_mode()
def read_states(
    lm: LanguageModel, groups: Sequence[Group], count: int, *, depth: float = DEPTH, budget: int = 512
) -> TokenStates:
    """What `critic_data.laid_out` laid out, without the end token that closes each text.

    Args:
        lm: The trunk.
        groups: Texts behind their contexts.
        count: Texts in all.
        depth: As a share of the layers.
        budget: Tokens of a pass.
    """
    found: dict[int, np.ndarray] = {}
    with tapped(lm, [Probe(depth, "mean")]) as read:
        for part in pack(groups, budget=budget):
            (states_TD,) = read(part)
            for row, (first, last) in zip(part.rows, part.spans, strict=True):
                # A text of no token of its own keeps its end token: there must be something to look at.
                own = states_TD[first : max(last, first + 1)].float().clamp(-_LARGEST, _LARGEST)
                found[row] = own.half().cpu().numpy()
    if not found:
        return TokenStates(np.empty((0, 0), np.float16), np.empty(0, np.int64))
    rows = [found[n] for n in range(count)]
    return TokenStates(np.concatenate(rows), np.cumsum([len(r) for r in rows]))
