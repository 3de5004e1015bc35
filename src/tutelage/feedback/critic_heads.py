"""Heads of a critic of texts: linear ones by folds, the pool that calibrates them, and how good they are.

A row's logits are always taken from the member that was fitted without it, so that what the pool
learns to trust, and how far, is what the heads say of texts they do not know.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.isotonic import IsotonicRegression

from tutelage.feedback.critic_data import Block
from tutelage.feedback.heads import regression

__all__ = ["Figure", "Folds", "Linear", "Pool", "centred", "log_loss", "measure", "measure_pairs"]

Figure = tuple[float, float, float]  # value, and the limits of its 95% interval
Folds = Sequence[tuple[np.ndarray, np.ndarray]]
# Weights of the penalty that are tried, as scikit-learn's C: on standardised columns, and on hashed counts.
_DENSE, _SPARSE = (1e-4, 1e-3, 1e-2), (0.3, 3.0, 30.0)
_MOST_ROWS = 4000  # of which all products with each other are taken
_UNPENALISED = 10.0  # a column blown up so much is hardly held by the penalty


@dataclasses.dataclass(frozen=True)
class Linear:
    """Logistic regressions, each fitted without one fold of the rows, in the features' own units.

    With two labels there is one column of log-odds (L = 1).
    """

    weight_MFL: np.ndarray
    bias_ML: np.ndarray

    @classmethod
    def fit(cls, x_NF: Block, labels_N: np.ndarray, folds: Folds) -> tuple[Linear, np.ndarray]:
        """Fit on integer labels.

        Returns:
            The members, and (N, labels) centred logits of each row from the member that had not seen it;
            of several penalties the one with the least log loss there.
        """
        mean_F, scale_F = _scaling(x_NF)
        z_NR, back = _few_columns(_scaled(x_NF, mean_F, scale_F))
        tried = []
        for strength in _strengths(x_NF):
            models = [regression(strength).fit(z_NR[seen], labels_N[seen]) for seen, _ in folds]
            weight_MFL = np.stack([back(m.coef_.T) / scale_F[:, None] for m in models])
            bias_ML = np.stack([m.intercept_ - mean_F @ w for m, w in zip(models, weight_MFL, strict=True)])
            tried.append(cls(weight_MFL.astype(np.float32), bias_ML).unseen(x_NF, labels_N, folds))
        return _best(tried)

    @classmethod
    def fit_pairs(cls, x_NF: Block, folds: Folds, nuisance_N: np.ndarray) -> tuple[Linear, np.ndarray]:
        """Fit on differences of features, preferred minus other.

        Bradley-Terry: P(a preferred to b) = sigmoid(w (x_a - x_b)), that is logistic regression without
        intercept on both orders (Bradley & Terry 1952, Biometrika 39).

        Args:
            x_NF: Differences.
            folds: (fitted, left out) rows of each member.
            nuisance_N: A column that is fitted along and then left out: the others need not stand in for
                it. Zeros are no such column.

        Returns:
            As `fit`, label 1 being the preferred one.
        """
        _, scale_F = _scaling(x_NF)
        column = _UNPENALISED * nuisance_N[:, None] / (nuisance_N.std() + 1e-9)
        stack: Any = sparse if sparse.issparse(x_NF) else np
        z_NF = stack.hstack([_scaled(x_NF, 0.0 * scale_F, scale_F), column]).astype(np.float32)
        z_NF = z_NF.tocsr() if sparse.issparse(z_NF) else z_NF
        z_NR, back = _few_columns(z_NF)
        labels_N = np.ones(len(nuisance_N), np.int64)
        tried = []
        for strength in _strengths(x_NF):
            weights = []
            for seen, _ in folds:
                order = np.repeat([1, 0], len(seen))
                both = (sparse if sparse.issparse(z_NR) else np).vstack([z_NR[seen], -z_NR[seen]])
                model = regression(strength).set_params(fit_intercept=False).fit(both, order)
                weights.append(back(model.coef_.T)[:-1] / scale_F[:, None])
            head = cls(np.stack(weights).astype(np.float32), np.zeros((len(folds), 1)))
            tried.append(head.unseen(x_NF, labels_N, folds))
        return _best(tried)

    def unseen(self, x_NF: Block, labels_N: np.ndarray, folds: Folds) -> tuple[float, Linear, np.ndarray]:
        """Log loss and logits of each row from the member that had not seen it."""
        unseen_NL = np.zeros((len(labels_N), max(2, self.bias_ML.shape[1])))
        for (_, left), weight_FL, bias_L in zip(folds, self.weight_MFL, self.bias_ML, strict=True):
            unseen_NL[left] = centred(x_NF[left] @ weight_FL + bias_L)
        return log_loss(unseen_NL, labels_N), self, unseen_NL

    def logits(self, x_NF: Block) -> np.ndarray:
        """(members, rows, labels) centred logits."""
        return np.stack([centred(x_NF @ w + b) for w, b in zip(self.weight_MFL, self.bias_ML, strict=True)])


def centred(logits_NL: np.ndarray) -> np.ndarray:
    """Logits that sum to zero over the labels; one column of log-odds becomes two."""
    if logits_NL.shape[-1] == 1:
        half = logits_NL.astype(np.float64) / 2
        return np.concatenate([-half, half], axis=-1)
    centre: np.ndarray = logits_NL - logits_NL.mean(-1, keepdims=True)
    return centre.astype(np.float64)


def _few_columns(z_NF: Block) -> tuple[Block, Callable[[np.ndarray], np.ndarray]]:
    """The same rows in as few columns as there are rows, and what takes weights back to the columns that were.

    A squared penalty leaves the weights in the space that the rows span, so fitting there gives the same weights: with
    hundreds of rows of a hundred thousand hashed pieces, in a hundredth of the time. Other matrices stay as they are.
    """
    if not sparse.issparse(z_NF) or not 0 < z_NF.shape[0] <= _MOST_ROWS < z_NF.shape[1]:
        return z_NF, lambda weight_FL: weight_FL
    size_R, turn_NR = np.linalg.eigh((z_NF @ z_NF.T).toarray().astype(np.float64))
    kept = size_R > 1e-9 * size_R[-1]
    length_R, turn_NR = np.sqrt(size_R[kept]), turn_NR[:, kept]

    def back(weight_RL: np.ndarray) -> np.ndarray:
        weight_FL: np.ndarray = z_NF.T @ (turn_NR @ (weight_RL / length_R[:, None]))
        return weight_FL

    return turn_NR * length_R, back


def _strengths(x_NF: Block) -> tuple[float, ...]:
    return _SPARSE if sparse.issparse(x_NF) else _DENSE


def _scaling(x_NF: Block) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of dense columns; hashed counts are of unit length already."""
    if sparse.issparse(x_NF):
        return np.zeros(x_NF.shape[1]), np.ones(x_NF.shape[1])
    return x_NF.mean(0, dtype=np.float64), x_NF.std(0, dtype=np.float64) + 1e-6


def _scaled(x_NF: Block, mean_F: np.ndarray, scale_F: np.ndarray) -> Block:
    if sparse.issparse(x_NF):
        return x_NF
    scaled: np.ndarray = ((x_NF - mean_F) / scale_F).astype(np.float32)
    return scaled


def _best(tried: Sequence[tuple[float, Linear, np.ndarray]]) -> tuple[Linear, np.ndarray]:
    _, head, unseen_NL = min(tried, key=lambda found: found[0])
    return head, unseen_NL


def log_loss(logits_NL: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean surprise at the labels, in nats."""
    return -float(log_softmax(logits_NL, axis=1)[np.arange(len(labels_N)), labels_N].mean())


@dataclasses.dataclass(frozen=True)
class Pool:
    """Calibrated probabilities from the logits of H heads: softmax(sum_h weight_h logits_h + bias).

    With one head and no bias this is temperature scaling (Guo et al. 2017, arXiv:1706.04599, with the
    temperature 1 / weight); with two labels and a bias it is Platt's sigmoid (Platt 1999); with more
    heads it is their logarithmic opinion pool, weighted by what each adds.

    Args:
        weight_H: Not negative: a head is never read against its meaning.
        bias_L: Sums to zero.
        steps_2K: For two labels, the isotonic map that follows: knots, and the probability of label 1 there.
    """

    weight_H: np.ndarray
    bias_L: np.ndarray
    steps_2K: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((2, 0)))

    @classmethod
    def fit(cls, logits_HNL: np.ndarray, labels_N: np.ndarray, *, bias: bool, isotonic: bool = False) -> Pool:
        """Minimise the log loss on rows that the heads were not fitted on.

        Args:
            logits_HNL: What each head said of rows it had not seen.
            labels_N: Integer labels.
            bias: Whether to learn one; not for pairs, where swapping must turn the sign.
            isotonic: Follow with isotonic regression (two labels only; wants a thousand rows or more).
        """
        heads, rows, count = logits_HNL.shape
        truth_NL = np.eye(count)[labels_N]

        def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
            logits = np.tensordot(point[:heads], logits_HNL, 1) + point[heads:]
            error_NL = softmax(logits, axis=1) - truth_NL
            slope = np.concatenate([np.tensordot(logits_HNL, error_NL, 2), error_NL.sum(0) * bias])
            return -float((log_softmax(logits, axis=1) * truth_NL).sum()) / rows, slope / rows

        start = np.concatenate([np.full(heads, 1.0 / heads), np.zeros(count)])
        limits = [(0.0, None)] * heads + [(None, None)] * count
        found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=limits, options={"ftol": 1e-12}).x
        pool = cls(found[:heads], found[heads:] - found[heads:].mean())
        if not isotonic:
            return pool
        said_N = pool.probability(pool.logits(logits_HNL))[:, 1]
        steps = IsotonicRegression(y_min=0.0, y_max=1.0).fit(said_N, labels_N)
        return dataclasses.replace(pool, steps_2K=np.stack([steps.X_thresholds_, steps.y_thresholds_]))

    def logits(self, logits_HNL: np.ndarray) -> np.ndarray:
        """(..., L) pooled logits, centred; axes between heads and labels are kept."""
        pooled: np.ndarray = np.tensordot(self.weight_H, logits_HNL, 1) + self.bias_L
        return centred(pooled)

    def probability(self, logits_NL: np.ndarray) -> np.ndarray:
        """(..., L) probabilities from pooled logits."""
        said: np.ndarray = softmax(logits_NL, axis=-1)
        if self.steps_2K.shape[1] == 0:
            return said
        mapped = np.interp(said[..., 1], *self.steps_2K)
        return np.stack([1.0 - mapped, mapped], axis=-1)


def measure(
    probability_NL: np.ndarray,
    labels_N: np.ndarray,
    *,
    positive: int,
    families_N: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Figure]:
    """Accuracy, AUROC and Cohen's kappa, Brier score and calibration error, each with a 95% bootstrap interval.

    Args:
        probability_NL: Of rows that were not learned from.
        labels_N: Integer labels.
        positive: The label that AUROC tells from all others.
        families_N: Rows that belong together are drawn together; None draws single rows.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        (value, low, high) by name: `accuracy`, `auroc`, `kappa`, `brier` (sum over labels) and `ece`
        (10 bins of the top label's probability). A figure that the rows do not define is left out.
    """
    rows = len(labels_N)
    kin_N = np.unique(families_N, return_inverse=True)[1] if families_N is not None else np.arange(rows)
    figures_of = functools.partial(_figures, probability_NL, labels_N, positive)
    values = figures_of(np.ones((1, rows)))
    random = np.random.default_rng(seed)
    count = int(kin_N.max()) + 1
    parts = []
    for _ in range(-(-resamples // _AT_ONCE)):
        times_RN = random.multinomial(count, np.full(count, 1.0 / count), size=_AT_ONCE)[:, kin_N]
        parts.append(figures_of(times_RN.astype(float)))
    found = {}
    for name, value in values.items():
        drawn = np.concatenate([part[name] for part in parts])
        if np.isfinite(value[0]):
            low, high = np.nanpercentile(drawn, [2.5, 97.5])
            found[name] = (float(value[0]), float(low), float(high))
    return found


_AT_ONCE = 100  # resamples


def _figures(
    probability_NL: np.ndarray, labels_N: np.ndarray, positive: int, times_RN: np.ndarray, bins: int = 10
) -> dict[str, np.ndarray]:
    """The figures of `measure` for R samples in which each row occurs so many times; NaN where undefined."""
    count = probability_NL.shape[1]
    truth_NL, said_NL = np.eye(count)[labels_N], np.eye(count)[probability_NL.argmax(1)]
    right_N, sure_N = (truth_NL * said_NL).sum(1), probability_NL.max(1)
    share_RN = times_RN / times_RN.sum(1, keepdims=True)
    place_NB = np.eye(bins)[np.minimum((sure_N * bins).astype(int), bins - 1)]
    accuracy_R = share_RN @ right_N
    chance_R = ((share_RN @ truth_NL) * (share_RN @ said_NL)).sum(1)
    level = np.unique(probability_NL[:, positive], return_inverse=True)[1]
    order = np.argsort(level, kind="stable")
    starts = np.flatnonzero(np.diff(level[order], prepend=-1))
    yes_RU, no_RU = (
        np.add.reduceat((share_RN * wanted_N)[:, order], starts, axis=1)
        for wanted_N in (labels_N == positive, labels_N != positive)
    )
    below_RU = np.cumsum(no_RU, axis=1) - no_RU / 2  # ties count half
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "accuracy": accuracy_R,
            "auroc": (yes_RU * below_RU).sum(1) / (yes_RU.sum(1) * no_RU.sum(1)),
            "kappa": (accuracy_R - chance_R) / (1.0 - chance_R),
            "brier": share_RN @ ((probability_NL - truth_NL) ** 2).sum(1),
            "ece": np.abs((share_RN * (right_N - sure_N)) @ place_NB).sum(1),
        }


def measure_pairs(margin_N: np.ndarray, longer_N: np.ndarray, families_N: np.ndarray) -> dict[str, Figure]:
    """The figures of `measure` for N pairs, each in both orders, and the reward's correlation with length.

    Args:
        margin_N: Reward of the preferred text minus that of the other.
        longer_N: The same of the logarithm of the length.
        families_N: Pairs that belong together.

    Returns:
        As `measure`, and `length_correlation`: between both differences, over both orders, with Fisher's
        interval.
    """
    both_NL = softmax(centred(np.concatenate([margin_N, -margin_N])[:, None]), axis=1)
    order_N = np.repeat([1, 0], len(margin_N))
    found = measure(both_NL, order_N, positive=1, families_N=np.tile(families_N, 2))
    size = float(np.sqrt((margin_N @ margin_N) * (longer_N @ longer_N)))
    if size > 0 and len(margin_N) > 3:
        share = float(np.clip(margin_N @ longer_N / size, -0.999999, 0.999999))
        middle, half = np.arctanh(share), 1.96 / np.sqrt(len(margin_N) - 3)
        found["length_correlation"] = (share, float(np.tanh(middle - half)), float(np.tanh(middle + half)))
    return found
