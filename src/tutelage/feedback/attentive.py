"""A head that learns where to look: attention over the states of a text's tokens, and a linear reading of what it sees.

With z_t the standardised state of token t, a query q and a reading v and b a label,

    score_l = sum_t a_t (z_t . v_l) / sqrt F + b_l,    a = softmax_t(z_t . q / sqrt F).

So a score is a sum over tokens: a_t says how closely token t was looked at, a_t (z_t . v_l) / sqrt F what it brought.
Source: Ilse, Tomczak and Welling 2018 (arXiv 1802.04712), section 2.4, with a query without a hidden layer; that a
linear reading makes the score a sum over instances: Javed et al. 2022 (arXiv 2206.01794), section 3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.nn.functional import softplus

from tutelage.feedback.critic_heads import Folds, centred, log_loss
from tutelage.feedback.token_states import TokenStates

__all__ = ["Attentive"]

# Tried as weights of the decay; what is best on rows not seen is kept, as with linear heads.
_DECAYS = (0.3, 1.0, 3.0)
_RATE, _BATCH, _EPOCHS, _LEAST_STEPS = 3e-2, 64, 10, 300


@dataclasses.dataclass(frozen=True)
class Attentive:
    """Attention heads, each fitted without one fold of the rows.

    With two labels there is one column of log-odds (L = 1).

    Args:
        mean_F: Of the states, for standardising.
        scale_F: Of the states.
        query_MF: Where each member looks.
        value_MFL: What it reads there.
        bias_ML: What it says to a text of nothing but mean states.
    """

    mean_F: np.ndarray
    scale_F: np.ndarray
    query_MF: np.ndarray
    value_MFL: np.ndarray
    bias_ML: np.ndarray

    @classmethod
    def fit(cls, states: TokenStates, labels_N: np.ndarray, folds: Folds, *, seed: int) -> tuple[Attentive, np.ndarray]:
        """Fit on integer labels.

        Returns:
            The members, and (N, labels) centred logits of each row from the member that had not seen it; of several
            decays the one with the least log loss there.
        """
        truth_N, count = torch.from_numpy(labels_N), int(labels_N.max()) + 1

        def loss(score_BKL: torch.Tensor, rows_B: torch.Tensor) -> torch.Tensor:
            if count <= 2:
                sign_B = 2.0 * truth_N[rows_B] - 1.0
                return softplus(-sign_B[:, None] * score_BKL[..., 0])
            said_BKL = score_BKL.log_softmax(-1)
            return -said_BKL[torch.arange(len(rows_B)), :, truth_N[rows_B]]

        columns = 1 if count <= 2 else count
        return _kept(_trained((states,), folds, columns, loss, seed=seed), (states,), labels_N, folds)

    @classmethod
    def fit_pairs(
        cls, chosen: TokenStates, rejected: TokenStates, folds: Folds, nuisance_N: np.ndarray, *, seed: int
    ) -> tuple[Attentive, np.ndarray]:
        """Fit on pairs, by Bradley and Terry: P(chosen preferred) = sigmoid(score(chosen) - score(rejected)).

        Args:
            chosen: States of the preferred texts.
            rejected: Of the others.
            folds: (fitted, left out) rows of each member.
            nuisance_N: A column of differences that is fitted along and then left out. Zeros are no such column.
            seed: Of the order of rows.

        Returns:
            As `fit`, of the pairs; label 1 is the preferred one.
        """

        def loss(margin_BKL: torch.Tensor, _rows_B: torch.Tensor) -> torch.Tensor:
            return softplus(-margin_BKL[..., 0])

        sides, ones_N = (chosen, rejected), np.ones(len(chosen), np.int64)
        return _kept(_trained(sides, folds, 1, loss, nuisance_N, seed=seed), sides, ones_N, folds)

    def logits(self, states: TokenStates) -> np.ndarray:
        """(members, rows, labels) centred logits."""
        return centred(self.scores(states))

    def scores(self, states: TokenStates) -> np.ndarray:
        """(members, rows, L)."""
        if not len(states):
            return np.empty((len(self.bias_ML), 0, self.bias_ML.shape[1]))
        network = _Heads.of(self)
        with torch.inference_mode():
            parts = [network(*states.padded(rows_N)) for rows_N in states.batches(_BATCH)]
        said: np.ndarray = torch.cat(parts).transpose(0, 1).double().numpy()
        return said

    def looked(self, states: TokenStates) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each text where it looked, (M, T), and what each token brought, (M, T, L): with the bias, the scores."""
        network = _Heads.of(self)
        for rows_N in states.batches(_BATCH):
            with torch.inference_mode():
                share_BTK, brought_BTKL = network.parts(*states.padded(rows_N))
            for b, row in enumerate(rows_N):
                n = int(states.lengths[row])
                yield share_BTK[b, :n].T.double().numpy(), brought_BTKL[b, :n].transpose(0, 1).double().numpy()


@dataclasses.dataclass(frozen=True)
class _Heads:
    """K heads at once: they share one pass over the states, and no number but the states' moments."""

    mean_F: torch.Tensor
    scale_F: torch.Tensor
    query_FK: torch.Tensor
    value_FKL: torch.Tensor
    bias_KL: torch.Tensor

    @classmethod
    def of(cls, head: Attentive) -> _Heads:
        """With a fitted head's numbers."""
        numbers = (head.mean_F, head.scale_F, head.query_MF.T, head.value_MFL.transpose(1, 0, 2), head.bias_ML)
        return cls(*(torch.from_numpy(np.ascontiguousarray(part)).float() for part in numbers))

    @classmethod
    def blank(cls, mean_F: np.ndarray, scale_F: np.ndarray, heads: int, columns: int) -> _Heads:
        """That look everywhere alike, and see nothing."""
        size = len(mean_F)
        learned = ((size, heads), (size, heads, columns), (heads, columns))
        zeros = (torch.zeros(shape, requires_grad=True) for shape in learned)
        return cls(torch.from_numpy(mean_F).float(), torch.from_numpy(scale_F).float(), *zeros)

    def fitted(self) -> Attentive:
        """Its numbers."""
        numbers = (self.mean_F, self.scale_F, self.query_FK.T, self.value_FKL.transpose(0, 1), self.bias_KL)
        return Attentive(*(part.detach().contiguous().numpy() for part in numbers))

    def parts(self, state_BTF: torch.Tensor, keep_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, K) attention, and (B, T, K, L) what each token brought."""
        z_BTF = (state_BTF - self.mean_F) / (self.scale_F * math.sqrt(state_BTF.shape[-1]))
        share_BTK = (z_BTF @ self.query_FK).masked_fill(~keep_BT[..., None], -torch.inf).softmax(1)
        read_BTKL = (z_BTF @ self.value_FKL.flatten(1)).view(*keep_BT.shape, *self.bias_KL.shape)
        return share_BTK, share_BTK[..., None] * read_BTKL

    def __call__(self, state_BTF: torch.Tensor, keep_BT: torch.Tensor) -> torch.Tensor:
        """(B, K, L) scores."""
        return self.parts(state_BTF, keep_BT)[1].sum(1) + self.bias_KL


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (B, K, L) scores, (B,) rows -> (B, K)


def _trained(
    sides: Sequence[TokenStates],
    folds: Folds,
    columns: int,
    loss: Loss,
    nuisance_N: np.ndarray | None = None,
    *,
    seed: int,
) -> Attentive:
    """A head for every decay and fold, decays first; Adam, the rate falling to zero.

    All read the same batches, and a row counts in those that may see it: the states are gathered once for all.
    """
    count = len(sides[0])
    seen_NK = torch.zeros(count, len(_DECAYS) * len(folds))
    for k in range(seen_NK.shape[1]):
        seen_NK[folds[k % len(folds)][0], k] = 1.0
    decay_K = torch.tensor(_DECAYS).repeat_interleave(len(folds))
    column_N = torch.zeros(count)
    if nuisance_N is not None and nuisance_N.any():
        column_N = torch.from_numpy(nuisance_N / nuisance_N.std()).float()
    moments = zip(*(side.moments() for side in sides), strict=True)
    mean_F, scale_F = (np.mean(part, axis=0) for part in moments)
    network = _Heads.blank(mean_F, scale_F, len(decay_K), columns)
    along_K = torch.zeros(len(decay_K), requires_grad=True)
    optimizer = torch.optim.Adam([network.query_FK, network.value_FKL, network.bias_KL, along_K], lr=_RATE)
    batches = -(-count // _BATCH)
    epochs = max(_EPOCHS, -(-_LEAST_STEPS // batches))
    order, step = torch.Generator().manual_seed(seed), 0
    for _ in range(epochs):
        for rows_B in torch.split(torch.randperm(count, generator=order), _BATCH):
            score_BKL, *other = (network(*side.padded(rows_B.numpy())) for side in sides)
            score_BKL = score_BKL - other[0] if other else score_BKL
            score_BKL = score_BKL + (column_N[rows_B][:, None] * along_K)[..., None]
            optimizer.zero_grad()
            (loss(score_BKL, rows_B) * seen_NK[rows_B]).mean(0).sum().backward()  # type: ignore[no-untyped-call]
            rate = _RATE * (1.0 - step / (epochs * batches))
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            step += 1
            with torch.no_grad():  # apart from the gradient, and each head its own
                network.query_FK.mul_(1.0 - rate * decay_K)
                network.value_FKL.mul_(1.0 - rate * decay_K[:, None])
    return network.fitted()


def _kept(
    heads: Attentive, sides: Sequence[TokenStates], labels_N: np.ndarray, folds: Folds
) -> tuple[Attentive, np.ndarray]:
    """Of each decay's heads those that know unseen rows best, and what they say of them."""
    score_KNL, *other = (heads.scores(side) for side in sides)
    score_KNL = score_KNL - other[0] if other else score_KNL
    tried = []
    for start in range(0, len(score_KNL), len(folds)):
        unseen_NL = np.zeros((len(labels_N), max(2, score_KNL.shape[-1])))
        for (_, left), score_NL in zip(folds, score_KNL[start : start + len(folds)], strict=True):
            unseen_NL[left] = centred(score_NL[left])
        tried.append((log_loss(unseen_NL, labels_N), start, unseen_NL))
    _, start, unseen_NL = min(tried, key=lambda found: found[0])
    members = slice(start, start + len(folds))
    best = Attentive(
        heads.mean_F, heads.scale_F, heads.query_MF[members], heads.value_MFL[members], heads.bias_ML[members]
    )
    return best, unseen_NL
