"""A critic from labelled data: small heads on frozen features.

Two questions are answered apart, because their product explains itself: what does this *question*
call for (an answer, an abstention, a question back), and what does this *reply* do. Questions are
read at several depths of the trunk and judged by a committee of small networks, whose disagreement
gives an uncertainty; replies by a logistic regression.
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
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from threadpoolctl import threadpool_limits

from tutelage.engines.encoder import Encoder
from tutelage.engines.features import Probe, Reading, read_trunk
from tutelage.engines.load import LanguageModel
from tutelage.errors import InputError, ModelError
from tutelage.feedback.heads import Committee, Head, quality, regression
from tutelage.records import Message, Prompt

__all__ = ["ACTS", "KINDS", "Critic", "LabelledText", "directions", "read_labelled", "read_questions"]

KINDS = ("answerable", "unanswerable", "ambiguous")
ACTS = ("answers", "abstains", "asks_back")

# Where the committee reads, as shares of the depth (docs/log.md).
PROBES = tuple(
    [Probe(layer / 30, "mean") for layer in (13, 16, 19, 22)] + [Probe(layer / 30, "last") for layer in (16, 19)]
)


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
        spread: Factor on `size` for key and value projections. They read at every token of the prompt,
            and attention passes on only a share of it: the directions of the mean over the prompt,
            which tell the kinds apart better than its last token, need a louder voice (docs/log.md).
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
        needs_head: Committee on the probes of the trunk, side by side.
        act_head: Head on the reply's embedding and hashed word pairs.
        quality: Accuracy, Brier score and calibration error of both, on rows that were not learned from.
        version: Names the labelled data and the model the features come from.
    """

    def __init__(self, needs_head: Committee, act_head: Head, quality: dict[str, float], version: str) -> None:
        self.needs_head, self.act_head = needs_head, act_head
        self.quality, self.version = quality, version

    @classmethod
    def train(
        cls,
        probes: Sequence[torch.Tensor],
        encoder: Encoder,
        questions: Sequence[LabelledText],
        replies: Sequence[LabelledText],
        *,
        version: str,
    ) -> Critic:
        """Fit the heads on what the trunk read in the labelled questions (see `read_questions`)."""
        kinds = np.array([KINDS.index(q.label) for q in questions])
        needs_head, need_cv = Committee.fit(_side_by_side(probes), kinds, len(KINDS))
        act_features = _reply_features(encoder, [r.text for r in replies])
        acts = np.array([ACTS.index(r.label) for r in replies])
        # One thread: the problem is so small that threads cost fifty times what they bring.
        with threadpool_limits(1):
            # Hashed counts are sparse and already of unit length.
            act_head = Head.fit(act_features, acts, len(ACTS), _ACT_STRENGTH, standardise=False)
            folds = StratifiedKFold(5, shuffle=True, random_state=0)
            model = regression(_ACT_STRENGTH)
            act_cv = cross_val_predict(model, act_features, acts, cv=folds, method="predict_proba")
        measured = {f"need_{k}": v for k, v in quality(need_cv, kinds).items()}
        measured |= {f"act_{k}": v for k, v in quality(act_cv, acts).items()}
        return cls(needs_head, act_head, measured, version)

    def needs(self, lm: LanguageModel, questions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """((questions, kinds) probabilities, (questions,) spread over the committee)."""
        votes = self.needs_head.votes(_side_by_side(read_questions(lm, questions).probes))
        mean = votes.mean(0)
        return mean, votes.std(0)[np.arange(len(mean)), mean.argmax(1)]

    def acts(self, encoder: Encoder, replies: Sequence[str]) -> np.ndarray:
        """(replies, acts) probabilities."""
        return self.act_head.predict(_reply_features(encoder, replies))

    def save(self, path: Path) -> None:
        """Write all heads as one safetensors file."""
        tensors = {f"needs.{name}": tensor for name, tensor in self.needs_head.tensors().items()}
        tensors |= {f"act.{f}": np.ascontiguousarray(getattr(self.act_head, f)) for f in _HEAD_FIELDS}
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
            needs = {name.removeprefix("needs."): tensor for name, tensor in tensors.items()}
            act = Head(*(tensors[f"act.{f}"] for f in _HEAD_FIELDS))
            return cls(Committee.of(needs), act, json.loads(meta["quality"]), meta["version"])
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise ModelError(f"{path} holds no critic ({error})", expected="a file written by Critic.save") from error


_ACT_STRENGTH = 3.0
_HEAD_FIELDS = tuple(f.name for f in dataclasses.fields(Head))


def _side_by_side(probes: Sequence[torch.Tensor]) -> np.ndarray:
    """All that was read of a question in one row."""
    return np.concatenate([p.numpy().astype(np.float32) for p in probes], axis=1)


def read_questions(
    lm: LanguageModel, texts: Sequence[str], *, watch: Mapping[str, torch.nn.Module] | None = None
) -> Reading:
    """One pass of the trunk over questions: the heads' features and, with `watch`, layers' inputs."""
    encoded = [lm.encode(Prompt(str(i), (Message("user", t),))) for i, t in enumerate(texts)]
    return read_trunk(lm, encoded, PROBES, watch=watch, pooled=[p for p in watch or () if _gathers(p)])


def _gathers(path: str) -> bool:
    """Whether what a layer reads at every token reaches the last one through attention, or draws it there."""
    return path.rpartition(".")[2] in ("k_proj", "v_proj")


def _reply_features(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    meaning = encoder.embed(texts).numpy().astype(np.float64) * 2.0
    words = _HASHER.transform([t.lower() for t in texts]).toarray()
    return np.concatenate([meaning, words], axis=1)
