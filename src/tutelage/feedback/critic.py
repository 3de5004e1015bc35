"""A critic from labelled data: small heads on frozen features.

Two questions are answered apart, because their product explains itself: what does this *question*
call for (an answer, an abstention, a question back), and what does this *reply* do. Heads are
logistic regressions of scikit-learn; an ensemble over depths of the trunk gives an uncertainty.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from threadpoolctl import threadpool_limits

from tutelage.engines.encoder import Encoder
from tutelage.engines.features import Probe, Reading, read_trunk
from tutelage.engines.load import LanguageModel
from tutelage.errors import InputError, ModelError
from tutelage.records import Message, Prompt

__all__ = ["ACTS", "KINDS", "Critic", "Head", "LabelledText", "directions", "read_labelled", "read_questions"]

KINDS = ("answerable", "unanswerable", "ambiguous")
ACTS = ("answers", "abstains", "asks_back")

# Where the heads read, as shares of the depth, and how freely each may fit (scikit-learn's C): many
# weak readers are surer together than a few (docs/log.md).
PROBES = tuple(
    [Probe(layer / 30, "mean") for layer in range(11, 24, 2)] + [Probe(layer / 30, "last") for layer in range(13, 20)]
)
_STRENGTH = {"mean": 0.006, "last": 0.02}


@dataclasses.dataclass(frozen=True)
class LabelledText:
    """A text and what it is."""

    text: str
    label: str


def read_labelled(path: Path, labels: Sequence[str]) -> list[LabelledText]:
    """Read a JSONL file of labelled texts.

    Raises:
        InputError: A line is no such object, a label is unknown, or one never occurs.
    """
    rows: list[LabelledText] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", expected="a UTF-8 JSONL file") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            row = LabelledText(str(found["text"]), str(found["label"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} line {number} is not a labelled text",
                expected='{"text": "...", "label": "..."}',
                fix="mend or remove the line",
            ) from error
        if row.label not in labels:
            raise InputError(f"{path} line {number} has the label '{row.label}'", expected=", ".join(labels))
        rows.append(row)
    missing = [x for x in labels if sum(r.label == x for r in rows) < 5]
    if missing:
        raise InputError(f"{path} has fewer than 5 texts labelled {', '.join(missing)}", expected="5 of each label")
    return rows


@dataclasses.dataclass
class Head:
    """Multinomial logistic regression on standardised features: probability of each label."""

    weight_LF: np.ndarray
    bias_L: np.ndarray
    mean_F: np.ndarray
    scale_F: np.ndarray

    @classmethod
    def fit(cls, features_NF: np.ndarray, labels_N: np.ndarray, count: int, strength: float) -> Head:
        """Fit on integer labels 0..count-1; `strength` is scikit-learn's C."""
        mean, scale = features_NF.mean(0), features_NF.std(0) + 1e-6
        model = _regression(strength)
        model.fit((features_NF - mean) / scale, labels_N)
        weight = np.zeros((count, features_NF.shape[1]))
        bias = np.full(count, -30.0)
        weight[model.classes_], bias[model.classes_] = _full(model)
        return cls(weight, bias, mean, scale)

    def predict(self, features_NF: np.ndarray) -> np.ndarray:
        """(rows, labels) probabilities."""
        logits = ((features_NF - self.mean_F) / self.scale_F) @ self.weight_LF.T + self.bias_L
        logits -= logits.max(1, keepdims=True)
        odds = np.exp(logits)
        result: np.ndarray = odds / odds.sum(1, keepdims=True)
        return result


def directions(
    inputs: Mapping[str, torch.Tensor],
    labels_N: np.ndarray,
    *,
    ridge: float = 300.0,
    size: float = 0.5,
    spread: float = 4.0,
) -> dict[str, torch.Tensor]:
    """What in a layer's input tells the kinds of question apart: one direction a kind, by module path.

    Ridge regression of the one-hot labels on standardised inputs, centred, and scaled so that the
    reading has standard deviation `size` over the labelled questions.

    Args:
        inputs: (N, in_features) a path, as `Reading.inputs`; paths may share a matrix. Those whose
            inputs do not differ between questions get no direction.
        labels_N: Integer labels.
        ridge: Weight of the penalty; strong, since there are hardly more questions than features.
        size: A randomly started row of A reads with about 0.05; a few times that makes the critic's
            directions the easiest to use, without making the first steps jump.
        spread: Factor on `size` for value projections. They read at every token of the prompt, and
            attention passes on only a share of it: the directions of the mean over the prompt, which
            tell the kinds apart better than its last token, need a louder voice (docs/log.md).
    """
    truth = torch.nn.functional.one_hot(torch.from_numpy(labels_N), len(KINDS)).double()
    truth = truth - truth.mean(0)
    solved: dict[int, torch.Tensor | None] = {}
    found = {}
    for path, matrix in inputs.items():
        if id(matrix) not in solved:
            x = matrix.double()
            deviation = x.std(0) + 1e-6
            z = (x - x.mean(0)) / deviation
            gram = z.T @ z + ridge * torch.eye(z.shape[1], dtype=torch.float64)
            rows_KF = torch.linalg.solve(gram, z.T @ truth).T / deviation
            # Without the mean input's share a reading is centred, and says how a question differs
            # from others; with it, the first steps would move every reply alike, and far.
            middle = x.mean(0)
            rows_KF = rows_KF - (rows_KF @ middle / (middle @ middle))[:, None] * middle
            reach = (x @ rows_KF.T).std(0)[:, None]
            # The first layer sees the template's last token, the same in every question: nothing to read.
            factor = spread * size if _gathers(path) else size
            solved[id(matrix)] = (factor * rows_KF / reach).float() if bool((reach > 1e-9).all()) else None
        rows = solved[id(matrix)]
        if rows is not None:
            found[path] = rows
    return found


def _regression(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=1000)


def _full(model: LogisticRegression) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients a class; scikit-learn keeps one row for two classes."""
    if len(model.classes_) == 2:
        half = model.coef_ / 2
        return np.concatenate([-half, half]), np.concatenate([-model.intercept_ / 2, model.intercept_ / 2])
    return model.coef_, model.intercept_


_HASHER = HashingVectorizer(
    n_features=4096,
    ngram_range=(1, 2),
    token_pattern=r"\w+'?\w*|\?",  # noqa: S106
    alternate_sign=False,
    norm="l2",
)


class Critic:
    """What a question calls for, and what a reply does.

    Args:
        need_heads: One head a probe of the trunk.
        act_head: Head on the reply's embedding and hashed word pairs.
        quality: Cross-validated accuracy, Brier score and calibration error of both.
        version: Names the labelled data and the model the features come from.
    """

    def __init__(self, need_heads: list[Head], act_head: Head, quality: dict[str, float], version: str) -> None:
        self.need_heads, self.act_head = need_heads, act_head
        self.quality, self.version = quality, version

    @classmethod
    def train(
        cls,
        reading: Reading,
        encoder: Encoder,
        questions: Sequence[LabelledText],
        replies: Sequence[LabelledText],
        *,
        version: str,
    ) -> Critic:
        """Fit the heads on what the trunk read in the labelled questions (see `read_questions`)."""
        # One thread: the problems are so small that threads cost fifty times what they bring.
        with threadpool_limits(1):
            features = [x.numpy().astype(np.float64) for x in reading.probes]
            kinds = np.array([KINDS.index(q.label) for q in questions])
            strengths = [_STRENGTH[p.pool] for p in PROBES]
            folds = StratifiedKFold(5, shuffle=True, random_state=0)
            need_cv = np.zeros((len(kinds), len(KINDS)))
            heads = []
            for part, strength in zip(features, strengths, strict=True):
                heads.append(Head.fit(part, kinds, len(KINDS), strength))
                scaled = (part - part.mean(0)) / (part.std(0) + 1e-6)
                model = _regression(strength)
                need_cv += cross_val_predict(model, scaled, kinds, cv=folds, method="predict_proba") / len(features)
            act_features = _reply_features(encoder, [r.text for r in replies])
            acts = np.array([ACTS.index(r.label) for r in replies])
            act_head = _fit_acts(act_features, acts)
            act_cv = cross_val_predict(
                _regression(_ACT_STRENGTH),
                act_features,
                acts,
                cv=folds,
                method="predict_proba",
            )
            quality = {f"need_{k}": v for k, v in _quality(need_cv, kinds).items()}
            quality |= {f"act_{k}": v for k, v in _quality(act_cv, acts).items()}
            return cls(heads, act_head, quality, version)

    def needs(self, lm: LanguageModel, questions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """((questions, kinds) probabilities, (questions,) spread over the ensemble)."""
        parts = read_questions(lm, questions).probes
        votes = np.stack([h.predict(x.double().numpy()) for h, x in zip(self.need_heads, parts, strict=True)])
        mean = votes.mean(0)
        return mean, votes.std(0)[np.arange(len(mean)), mean.argmax(1)]

    def acts(self, encoder: Encoder, replies: Sequence[str]) -> np.ndarray:
        """(replies, acts) probabilities."""
        return self.act_head.predict(_reply_features(encoder, replies))

    def save(self, path: Path) -> None:
        """Write all heads as one safetensors file."""
        tensors = {
            f"{name}.{field}": np.ascontiguousarray(getattr(head, field))
            for name, head in [
                *((f"need{i}", h) for i, h in enumerate(self.need_heads)),
                ("act", self.act_head),
            ]
            for field in ("weight_LF", "bias_L", "mean_F", "scale_F")
        }
        save_file(tensors, path, metadata={"quality": json.dumps(self.quality), "version": self.version})

    @classmethod
    def load(cls, path: Path) -> Critic:
        """Read what `save` wrote.

        Raises:
            ModelError: The file is missing or no critic.
        """
        from safetensors import safe_open

        try:
            tensors = load_file(path)
            with safe_open(path, framework="numpy") as file:
                meta = file.metadata()
            fields = ("weight_LF", "bias_L", "mean_F", "scale_F")
            heads = [Head(*(tensors[f"need{i}.{f}"] for f in fields)) for i in range(len(PROBES))]
            act = Head(*(tensors[f"act.{f}"] for f in fields))
            return cls(heads, act, json.loads(meta["quality"]), meta["version"])
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise ModelError(f"{path} holds no critic ({error})", expected="a file written by Critic.save") from error


_ACT_STRENGTH = 3.0


def _fit_acts(features_NF: np.ndarray, labels_N: np.ndarray) -> Head:
    """As `Head.fit`, but without standardising: hashed counts are sparse and already of unit length."""
    model = _regression(_ACT_STRENGTH).fit(features_NF, labels_N)
    weight, bias = _full(model)
    size = features_NF.shape[1]
    return Head(weight, bias, np.zeros(size), np.ones(size))


def read_questions(
    lm: LanguageModel, texts: Sequence[str], *, watch: Mapping[str, torch.nn.Module] | None = None
) -> Reading:
    """One pass of the trunk over questions: the heads' features and, with `watch`, layers' inputs."""
    encoded = [lm.encode(Prompt(str(i), (Message("user", t),))) for i, t in enumerate(texts)]
    return read_trunk(lm, encoded, PROBES, watch=watch, pooled=[p for p in watch or () if _gathers(p)])


def _gathers(path: str) -> bool:
    """Whether what a layer reads at every token reaches the last one through attention."""
    return path.rpartition(".")[2] == "v_proj"


def _reply_features(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    meaning = encoder.embed(texts).numpy().astype(np.float64) * 2.0
    words = _HASHER.transform([t.lower() for t in texts]).toarray()
    return np.concatenate([meaning, words], axis=1)


def _quality(probability_NL: np.ndarray, labels_N: np.ndarray, bins: int = 10) -> dict[str, float]:
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
