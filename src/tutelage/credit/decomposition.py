"""A reward of whole replies as a sum over their tokens, learned from the rewards that a run gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tutelage.errors import StoreError

__all__ = ["Decomposition", "Fitted"]

_PENALTIES = tuple(10.0**k for k in range(-4, 5))  # a row and standardised column
_FILE = "decomposition.safetensors"


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Weights of a token's state, and the share of the rewards' variance within groups that they foretell unseen.

    The share is by generalised cross-validation: about what it would be on replies that were left out.
    """

    weight_F: torch.Tensor
    share: float


class Decomposition:
    """Ridge regression of rewards on mean states: w . mean_t h_t is a mean of w . h_t, so it says what each token adds.

    Objective: sum over groups g and their replies of ((r - mean_g r) - w . (x - mean_g x))^2 + a penalty on w, with x
        the mean of a reply's token states. What a prompt asks for, and how hard it is, drops out with the group's mean.
        The penalty is the one of least generalised cross-validation, on columns of unit deviation; with nothing to
        learn it is so large that w is zero, and nothing is said.
    Difference: a critic's prefixes ask a head about texts that it never saw; this head was only ever asked for sums, so
        that what it says of the parts adds up by construction. RUDDER trains a network on all prefixes for that.
    Assumption: a token's part shows in its own state, which is the frozen model's and knows what came before. What
        hangs on how tokens go together, and not on any of them, is left unexplained.
    Source: Efroni et al. 2021, reinforcement learning with trajectory feedback (arXiv 2008.06036), for the
        regression; Arjona-Medina et al. 2019, RUDDER (arXiv 1806.07857), for giving rewards back to what earned them;
        Golub, Heath and Wahba 1979 for the penalty.

    Args:
        size: Of a state, F.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.clear()

    def clear(self) -> None:
        """Forget all rewards."""
        self.inner_FF = torch.zeros(self.size, self.size, dtype=torch.float64)
        self.cross_F = torch.zeros(self.size, dtype=torch.float64)
        self.square = self.freedom = 0.0

    def add(self, mean_PGF: torch.Tensor, reward_PG: torch.Tensor) -> None:
        """Take replies in: mean states and rewards, NaN where one has none; groups with fewer than two say nothing."""
        for mean_GF, reward_G in zip(mean_PGF.double(), reward_PG.double(), strict=True):
            known_G = ~reward_G.isnan()
            if int(known_G.sum()) < 2:
                continue
            x_GF = mean_GF[known_G] - mean_GF[known_G].mean(0)
            r_G = reward_G[known_G] - reward_G[known_G].mean()
            self.inner_FF += x_GF.T @ x_GF
            self.cross_F += x_GF.T @ r_G
            self.square += float(r_G @ r_G)
            self.freedom += float(known_G.sum()) - 1.0

    def fit(self) -> Fitted:
        """The weights as things stand; zero where nothing can be told."""
        nothing = Fitted(torch.zeros(self.size), 0.0)
        scale_F = (self.inner_FF.diagonal() / max(self.freedom, 1.0)).sqrt()
        used_F = scale_F > 1e-9
        if self.square <= 1e-12 * max(self.freedom, 1.0) or not bool(used_F.any()):
            return nothing
        scale_F = scale_F[used_F]
        size_K, turn_FK = torch.linalg.eigh(self.inner_FF[used_F][:, used_F] / torch.outer(scale_F, scale_F))
        size_K, along_K = size_K.clamp_min(0.0), turn_FK.T @ (self.cross_F[used_F] / scale_F)
        best, chosen = self.square / self.freedom, None
        for penalty in _PENALTIES:
            kept_K = 1.0 / (size_K + penalty * self.freedom)
            left = self.square - float((along_K.square() * kept_K * (2.0 - size_K * kept_K)).sum())
            free = 1.0 - float((size_K * kept_K).sum()) / self.freedom
            error = left / self.freedom / free**2 if free > 1e-6 else float("inf")
            if error < best:
                best, chosen = error, kept_K
        if chosen is None:
            return nothing
        weight_F = torch.zeros(self.size, dtype=torch.float64)
        weight_F[used_F] = turn_FK @ (along_K * chosen) / scale_F
        return Fitted(weight_F.float(), 1.0 - best * self.freedom / self.square)

    def save(self, folder: Path) -> None:
        """Write what was learned beside a checkpoint."""
        sums = torch.tensor([self.square, self.freedom], dtype=torch.float64)
        save_file({"inner": self.inner_FF, "cross": self.cross_F, "sums": sums}, str(folder / _FILE))

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote; a checkpoint without it is from before anything was learned.

        Raises:
            StoreError: The file is damaged, or of another model.
        """
        self.clear()
        if not (folder / _FILE).is_file():
            return
        try:
            found = load_file(str(folder / _FILE))
            inner_FF, cross_F, sums = found["inner"], found["cross"], found["sums"]
        except (OSError, KeyError, SafetensorError) as error:
            raise StoreError(
                f"{folder / _FILE} cannot be read ({error})", expected="a checkpoint of tutelage"
            ) from error
        if inner_FF.shape != self.inner_FF.shape:
            raise StoreError(f"{folder / _FILE} is of a model of size {len(cross_F)}", expected=f"size {self.size}")
        self.inner_FF, self.cross_F = inner_FF, cross_F
        self.square, self.freedom = (float(value) for value in sums)
