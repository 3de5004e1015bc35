"""Train a critic of texts on a file, and measure it on rows of which it never saw a relative."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from tutelage.errors import InputError, ModelError
from tutelage.feedback.critic_data import Features, Reader, families, read_labelled_passages, read_pairs
from tutelage.feedback.text_critic import DESCRIBED, FOLDS, POSITIVE, TextCritic

__all__ = ["train_critic"]


def train_critic(
    data: Path,
    out: Path,
    *,
    kind: str,
    reader: Reader,
    positive: str | None = None,
    isotonic: bool = False,
    disentangle: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a critic on a file, measure it on a fifth of the rows that it never saw, and save it.

    Args:
        data: Labelled texts (`read_labelled_passages`) or, for a preference, pairs (`read_pairs`).
        out: The safetensors file to write.
        kind: A key of `POSITIVE`.
        reader: What reads the features.
        positive: Label that is looked for; of costs the harmful one. None takes the kind's own word.
        isotonic: Calibrate two labels by isotonic regression after the sigmoid.
        disentangle: Take length out of a preference.
        seed: Of the split, the folds and the networks.

    Returns:
        What was trained and how good it is, JSON-able: `quality` holds (value, low, high).

    Raises:
        InputError: The file cannot be used, or the kind or label is unknown.
        ModelError: The file to write cannot be written.
    """
    if kind not in POSITIVE:
        raise InputError(f"a critic of '{kind}'", expected=", ".join(POSITIVE), fix="choose one of these kinds")
    if kind == "preference":
        critic, counts = _train_on_pairs(data, reader, disentangle=disentangle, seed=seed)
    else:
        critic, counts = _train_on_labels(data, reader, kind, positive, isotonic=isotonic, seed=seed)
    critic.marks = reader.marks()
    try:
        critic.save(out)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{out} cannot be written ({error})", fix="choose another place") from error
    described = {name: getattr(critic, name) for name in DESCRIBED}
    return {"file": str(out), "version": critic.version, **described, **counts}


def _train_on_pairs(data: Path, reader: Reader, *, disentangle: bool, seed: int) -> tuple[TextCritic, dict[str, int]]:
    pairs = read_pairs(data)
    kin_N = families(pairs.chosen, pairs.rejected)
    _enough(data, {"pairs": kin_N})
    features = reader.read((*pairs.chosen, *pairs.rejected), contextual=True)
    rows = len(kin_N)
    seen, left = next(GroupKFold(FOLDS, shuffle=True, random_state=seed).split(kin_N, groups=kin_N))
    critic = TextCritic.fit_pairs(
        _part(features, seen),
        _part(features, seen + rows),
        kin_N[seen],
        source=reader.source,
        disentangle=disentangle,
        seed=seed,
    )
    critic.quality = critic.measure_pairs(_part(features, left), _part(features, left + rows), kin_N[left])
    return critic, {"rows": rows, "held_out": len(left)}


def _train_on_labels(
    data: Path, reader: Reader, kind: str, positive: str | None, *, isotonic: bool, seed: int
) -> tuple[TextCritic, dict[str, int]]:
    found = read_labelled_passages(data)
    labels = sorted(set(found.labels))
    sought = (positive or POSITIVE[kind]).casefold()
    if len(labels) < 2 or sought not in [x.casefold() for x in labels]:
        raise InputError(
            f"{data} has the labels {', '.join(labels)}",
            expected=f"two or more, one of them '{positive or POSITIVE[kind]}'",
            fix=f"say which label means {POSITIVE[kind]}",
        )
    if isotonic and len(labels) > 2:
        raise InputError(f"isotonic calibration of {len(labels)} labels", expected="two labels", fix="leave it out")
    contextual = any(p.context for p in found.passages)
    labels_N = np.array([labels.index(x) for x in found.labels])
    kin_N = families(found.passages)
    _enough(data, {f"texts labelled {x}": kin_N[labels_N == n] for n, x in enumerate(labels)})
    features = reader.read(found.passages, contextual=contextual)
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    seen, left = next(splitter.split(labels_N, labels_N, kin_N))
    critic = TextCritic.fit(
        _part(features, seen),
        labels_N[seen],
        kin_N[seen],
        kind=kind,
        labels=labels,
        positive=[x.casefold() for x in labels].index(sought),
        source=reader.source,
        contextual=contextual,
        isotonic=isotonic,
        seed=seed,
    )
    critic.quality = critic.measure(_part(features, left), labels_N[left], kin_N[left])
    return critic, {"rows": len(labels_N), "held_out": len(left)}


def _enough(data: Path, kin: Mapping[str, np.ndarray]) -> None:
    """Folds within folds need some unrelated rows of everything."""
    for what, kin_N in kin.items():
        if len(set(kin_N.tolist())) < 2 * FOLDS:
            raise InputError(
                f"{data} has {len(set(kin_N.tolist()))} unrelated {what}",
                expected=f"at least {2 * FOLDS}; rows that share a text or a prompt count once",
                fix="label more texts",
            )


def _part(features: Features, rows: np.ndarray) -> Features:
    return {block: x[rows] for block, x in features.items()}
