"""The critic's heads against scikit-learn, its quality figures by hand, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tutelage.config import data_file
from tutelage.errors import InputError, ModelError
from tutelage.feedback import critic as module
from tutelage.feedback.critic import ACTS, KINDS, Critic, Head, LabelledText, read_labelled


def clouds(count: int, *, labels: int, features: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clouds, one a label, on scales that differ by a thousand."""
    random = np.random.default_rng(seed)
    y = np.arange(count) % labels
    x = random.normal(size=(count, features)) + 2 * random.normal(size=(labels, features))[y]
    return x * np.logspace(-1.5, 1.5, features) + 5.0, y


@pytest.mark.parametrize("labels", [2, 3])
def test_a_head_predicts_what_scikit_learn_does(labels: int) -> None:
    x, y = clouds(90, labels=labels)
    head = Head.fit(x, y, labels, 0.5)
    fresh, _ = clouds(40, labels=labels, seed=1)
    scaled = [(part - x.mean(0)) / (x.std(0) + 1e-6) for part in (x, fresh)]
    model = LogisticRegression(C=0.5, max_iter=1000).fit(scaled[0], y)
    assert np.allclose(head.predict(fresh), model.predict_proba(scaled[1]), atol=1e-8)
    assert np.allclose(head.predict(fresh).sum(1), 1.0)
    assert (head.predict(x).argmax(1) == y).mean() > 0.7


def test_a_label_that_never_occurs_gets_no_probability() -> None:
    x, y = clouds(60, labels=2)
    got = Head.fit(x, np.where(y == 1, 2, 0), 3, 0.5).predict(x)
    assert got[:, 1].max() < 1e-6
    assert (got.argmax(1) == np.where(y == 1, 2, 0)).mean() > 0.7


def test_a_constant_feature_harms_nothing() -> None:
    x, y = clouds(60, labels=3)
    with_constant = np.concatenate([x, np.full((60, 1), 7.0)], 1)
    assert np.isfinite(Head.fit(with_constant, y, 3, 0.5).predict(with_constant)).all()


def test_extreme_features_do_not_overflow() -> None:
    x, y = clouds(60, labels=3)
    got = Head.fit(x, y, 3, 0.5).predict(x * 1e6)
    assert np.isfinite(got).all()
    assert np.allclose(got.sum(1), 1.0)


def test_quality_by_hand() -> None:
    """Four questions with the top label right, right, wrong, wrong.

    Accuracy 2/4. Brier: (0.1^2 + 0.1^2) + (0.4^2 + 0.3^2 + 0.1^2) + (0.9^2 + 0.9^2) + (0.6^2 + 0.6^2)
    = 0.02 + 0.26 + 1.62 + 0.72 = 2.62, over four 0.655. Calibration: the two sure at 0.9 are right
    half the time, |0.5 - 0.9| * 2/4; the two at 0.6 too, |0.5 - 0.6| * 2/4; together 0.25.
    """
    p = np.array([[0.9, 0.1, 0.0], [0.6, 0.3, 0.1], [0.9, 0.1, 0.0], [0.4, 0.6, 0.0]])
    got = module._quality(p, np.array([0, 0, 1, 0]))
    assert got == pytest.approx({"accuracy": 0.5, "brier": 0.655, "ece": 0.25})


def test_certainty_has_a_bin_too() -> None:
    got = module._quality(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1]))
    assert got == pytest.approx({"accuracy": 0.5, "brier": 1.0, "ece": 0.5})


# ---- labelled texts --------------------------------------------------------------------------


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rows(count: int = 5) -> list[Any]:
    return [{"text": f"{kind} {n}", "label": kind} for kind in KINDS for n in range(count)]


def test_labelled_texts_are_read_in_order(tmp_path: Path) -> None:
    got = read_labelled(write(tmp_path / "q.jsonl", [*rows(), "", '{"text": "à 何", "label": "ambiguous"}']), KINDS)
    assert len(got) == 16
    assert got[0] == LabelledText("answerable 0", "answerable")
    assert got[-1] == LabelledText("à 何", "ambiguous")


def test_a_text_may_hold_any_separator_that_json_allows(tmp_path: Path) -> None:
    """U+2028, U+0085 and the like end no line of a JSONL file."""
    text = "one\u2028two\x85three\x1cfour"
    raw = '{"text": "one\u2028two\x85three\\u001cfour", "label": "ambiguous"}'
    assert json.loads(raw)["text"] == text
    got = read_labelled(write(tmp_path / "q.jsonl", [*rows(), raw]), KINDS)
    assert got[-1] == LabelledText(text, "ambiguous")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 3"),
        ("[1, 2]", "line 3"),
        ('"text"', "line 3"),
        ("null", "line 3"),
        ('{"text": "a"}', "line 3"),
        ('{"text": "a", "label": "answers"}', "'answers'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = write(tmp_path / "q.jsonl", [*rows()[:2], line, *rows()[2:]])
    with pytest.raises(InputError) as caught:
        read_labelled(path, KINDS)
    assert says in str(caught.value)
    assert "q.jsonl line 3" in str(caught.value)


def test_too_few_of_a_label_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ambiguous"):
        read_labelled(write(tmp_path / "few.jsonl", rows()[:-1]), KINDS)
    with pytest.raises(InputError, match="cannot be read"):
        read_labelled(tmp_path / "missing.jsonl", KINDS)
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"UTF-8|cannot be read"):
        read_labelled(tmp_path / "latin.jsonl", KINDS)


@pytest.mark.parametrize(("name", "labels"), [("honesty-questions", KINDS), ("honesty-replies", ACTS)])
def test_the_built_in_labels_are_whole_and_unique(name: str, labels: tuple[str, ...]) -> None:
    got = read_labelled(data_file(f"builtin:critics/{name}", suffix="*.jsonl"), labels)
    assert {r.label for r in got} == set(labels)
    texts = [r.text.strip().lower() for r in got]
    assert len(set(texts)) == len(texts)


# ---- files -----------------------------------------------------------------------------------


def critic() -> Critic:
    heads = [Head.fit(*clouds(60, labels=3, seed=s), 3, 0.5) for s in range(len(module.PROBES))]
    return Critic(heads, Head.fit(*clouds(60, labels=3, seed=9), 3, 0.5), {"need_accuracy": 0.75}, "v1")


def test_a_saved_critic_predicts_the_same(tmp_path: Path) -> None:
    before = critic()
    before.save(tmp_path / "critic.safetensors")
    after = Critic.load(tmp_path / "critic.safetensors")
    x, _ = clouds(20, labels=3, seed=4)
    pairs = zip([*before.need_heads, before.act_head], [*after.need_heads, after.act_head], strict=True)
    assert all(np.array_equal(a.predict(x), b.predict(x)) for a, b in pairs)
    assert (after.quality, after.version) == (before.quality, before.version)


def test_a_missing_or_damaged_critic_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "critic.safetensors"
    with pytest.raises(ModelError):
        Critic.load(path)
    critic().save(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ModelError):
        Critic.load(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ModelError):
        Critic.load(path)


def test_a_layer_that_sees_the_same_in_every_question_gets_no_direction() -> None:
    random = torch.Generator().manual_seed(0)
    labels = np.arange(60) % 3
    found = module.directions({"same": torch.ones(60, 4), "other": torch.randn(60, 4, generator=random)}, labels)
    assert set(found) == {"other"}
    assert torch.isfinite(found["other"]).all()
