"""Heads on frozen features: numbers read in a text become probabilities of its labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

__all__ = ["Committee", "Head", "quality", "regression"]


@dataclasses.dataclass
class Head:
    """Multinomial logistic regression on standardised features: probability of each label."""

    weight_LF: np.ndarray
    bias_L: np.ndarray
    mean_F: np.ndarray
    scale_F: np.ndarray

    @classmethod
    def fit(
        cls, features_NF: np.ndarray, labels_N: np.ndarray, count: int, strength: float, *, standardise: bool = True
    ) -> Head:
        """Fit on integer labels 0..count-1; `strength` is scikit-learn's C."""
        size = features_NF.shape[1]
        mean, scale = np.zeros(size), np.ones(size)
        if standardise:
            mean, scale = features_NF.mean(0), features_NF.std(0) + 1e-6
        model = regression(strength)
        model.fit((features_NF - mean) / scale, labels_N)
        weight = np.zeros((count, size))
        bias = np.full(count, -30.0)
        weight[model.classes_], bias[model.classes_] = _full(model)
        return cls(weight, bias, mean, scale)

    def predict(self, features_NF: np.ndarray) -> np.ndarray:
        """(rows, labels) probabilities."""
        return _softmax(((features_NF - self.mean_F) / self.scale_F) @ self.weight_LF.T + self.bias_L)


@dataclasses.dataclass
class Committee:
    """Networks of one hidden layer on the same standardised features, each fitted without one fold of the rows.

    Their mean is the probability of each label, and how far they are apart says how sure it is. What
    they say of the fold that they did not see measures them, at no further cost.

    Args:
        mean_F, scale_F: For standardising.
        inner_MFH, inner_bias_MH: First layers of the M members.
        outer_MHL, outer_bias_ML: Second layers.
    """

    mean_F: np.ndarray
    scale_F: np.ndarray
    inner_MFH: np.ndarray
    inner_bias_MH: np.ndarray
    outer_MHL: np.ndarray
    outer_bias_ML: np.ndarray

    @classmethod
    def fit(
        cls,
        features_NF: np.ndarray,
        labels_N: np.ndarray,
        count: int,
        *,
        members: int = 5,
        hidden: int = 128,
        seed: int = 0,
    ) -> tuple[Committee, np.ndarray]:
        """Fit on integer labels 0..count-1, of each at least `members`.

        Returns:
            The committee, and (rows, labels) probabilities that each row got from the member that had
            not seen it.
        """
        mean, scale = features_NF.mean(0), features_NF.std(0) + 1e-6
        x_NF = torch.from_numpy((features_NF - mean) / scale).float()
        y_N = torch.from_numpy(labels_N)
        unseen_NL = np.zeros((len(labels_N), count))
        parts: list[list[np.ndarray]] = []
        folds = StratifiedKFold(members, shuffle=True, random_state=seed).split(labels_N, labels_N)
        for member, (seen, kept) in enumerate(folds):
            network = _train(x_NF[seen], y_N[seen], count, hidden, seed=seed * 1009 + member)
            with torch.inference_mode():
                unseen_NL[kept] = network(x_NF[kept]).softmax(-1).numpy()
            inner, inner_bias, outer, outer_bias = (p.detach().numpy() for p in network.parameters())
            parts.append([inner.T, inner_bias, outer.T, outer_bias])
        return cls(mean, scale, *(np.stack(t) for t in zip(*parts, strict=True))), unseen_NL

    def votes(self, features_NF: np.ndarray) -> np.ndarray:
        """(members, rows, labels) probabilities."""
        x_NF = (features_NF - self.mean_F) / self.scale_F
        inside_MNH = np.maximum(x_NF @ self.inner_MFH + self.inner_bias_MH[:, None], 0.0)
        return _softmax(inside_MNH @ self.outer_MHL + self.outer_bias_ML[:, None])

    def tensors(self) -> dict[str, np.ndarray]:
        """By field, as `Committee(**tensors)` takes them."""
        return {f.name: np.ascontiguousarray(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> Committee:
        """From `tensors`; raises KeyError when one is missing."""
        return cls(**{f.name: tensors[f.name] for f in dataclasses.fields(cls)})


# Of the settings tried (docs/log.md) none stood out: what brings the gain over a linear head is the
# hidden layer, and what keeps it from learning by heart is that a third of the features is dropped.
_EPOCHS, _BATCH, _RATE, _DECAY, _DROPPED = 12, 128, 1e-3, 1.0, 0.3
# A few hundred labels would otherwise be seen in a few dozen steps, and hardly be learned.
_LEAST_STEPS = 300


def _train(x_NF: torch.Tensor, y_N: torch.Tensor, count: int, hidden: int, *, seed: int) -> torch.nn.Sequential:
    """One member: cross-entropy, AdamW, the rate falling to zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Dropout(_DROPPED),
            torch.nn.Linear(x_NF.shape[1], hidden),
            torch.nn.ReLU(),
            torch.nn.Dropout(_DROPPED),
            torch.nn.Linear(hidden, count),
        )
        optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_DECAY, fused=True)
        batches = -(-len(y_N) // _BATCH)
        epochs = max(_EPOCHS, -(-_LEAST_STEPS // batches))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / (epochs * batches))
        network.train()
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(y_N)), _BATCH):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(network(x_NF[rows]), y_N[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return network.eval()


def regression(strength: float) -> LogisticRegression:
    """The regression of every linear head."""
    return LogisticRegression(C=strength, max_iter=1000)


def _full(model: LogisticRegression) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients a class; scikit-learn keeps one row for two classes."""
    if len(model.classes_) == 2:
        half = model.coef_ / 2
        return np.concatenate([-half, half]), np.concatenate([-model.intercept_ / 2, model.intercept_ / 2])
    return model.coef_, model.intercept_


def _softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    result: np.ndarray = odds / odds.sum(-1, keepdims=True)
    return result


def quality(probability_NL: np.ndarray, labels_N: np.ndarray, bins: int = 10) -> dict[str, float]:
    """Accuracy, Brier score (sum over labels) and expected calibration error of the top label."""
    rows = np.arange(len(labels_N))
    truth = np.zeros_like(probability_NL)
    truth[rows, labels_N] = 1.0
    top, sure = probability_NL.argmax(1), probability_NL.max(1)
    right = (top == labels_N).astype(float)
    place = np.minimum((sure * bins).astype(int), bins - 1)
    error = sum(
        abs(right[place == b].mean() - sure[place == b].mean()) * (place == b).mean()
        for b in range(bins)
        if (place == b).any()
    )
    return {
        "accuracy": float(right.mean()),
        "brier": float(((probability_NL - truth) ** 2).sum(1).mean()),
        "ece": float(error),
    }
