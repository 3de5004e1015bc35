"""The critic's labelled texts, its files and its directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tutelage.config import data_file
from tutelage.errors import InputError, ModelError
from tutelage.feedback import critic as module
from tutelage.feedback.critic import ACTS, KINDS, Critic, LabelledText, read_labelled
from tutelage.feedback.heads import Committee, Head


def clouds(count: int, *, labels: int, features: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clouds, one a label, on scales that differ by a thousand."""
    random = np.random.default_rng(seed)
    y = np.arange(count) % labels
    x = random.normal(size=(count, features)) + 2 * random.normal(size=(labels, features))[y]
    return x * np.logspace(-1.5, 1.5, features) + 5.0, y


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
    committee, _ = Committee.fit(*clouds(60, labels=3), 3)
    return Critic(committee, Head.fit(*clouds(60, labels=3, seed=9), 3, 0.5), {"need_accuracy": 0.75}, "v1")


def test_a_saved_critic_predicts_the_same(tmp_path: Path) -> None:
    before = critic()
    before.save(tmp_path / "critic.safetensors")
    after = Critic.load(tmp_path / "critic.safetensors")
    x, _ = clouds(20, labels=3, seed=4)
    assert np.array_equal(before.needs_head.votes(x), after.needs_head.votes(x))
    assert np.array_equal(before.act_head.predict(x), after.act_head.predict(x))
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
