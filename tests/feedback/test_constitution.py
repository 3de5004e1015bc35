"""Constitutions: what is read, what is refused with file and place, and a hash that sees every change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tutelage.config import data_file
from tutelage.errors import InputError
from tutelage.feedback.constitution import Constitution, load_constitution

GOOD = """
name = "tést"

[[principles]]
id = "admit"
text = "Say so when you cannot know."
weight = 2
scope = "unanswerable"
wants = "abstains"
critique = 'Nobody can know "{question}".'
openings = ["I don't know", "知りません"]
examples = [{ prompt = "p", bad = "b", good = "g" }]

[[principles]]
id = "answer"
text = "Answer plainly."
scope = "any"
wants = "answers"
"""


def load(tmp_path: Path, text: str) -> Constitution:
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="utf-8")
    return load_constitution(path)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = load(tmp_path, GOOD)
    admit, answer = found.principles
    assert (found.name, admit.weight, admit.openings) == ("tést", 2.0, ("I don't know", "知りません"))
    assert admit.examples == (("p", "b", "g"),)
    assert admit.fallback == "g"  # the first example's good reply, when no fallback is given
    assert admit.critique == 'Nobody can know "{question}".'
    assert (answer.weight, answer.critique, answer.openings) == (1.0, "Answer plainly.", ())


def test_principles_are_about_their_scope(tmp_path: Path) -> None:
    found = load(tmp_path, GOOD)
    assert [p.id for p in found.about("unanswerable")] == ["admit", "answer"]
    assert [p.id for p in found.about("ambiguous")] == ["answer"]


def test_every_change_changes_the_hash(tmp_path: Path) -> None:
    found = load(tmp_path, GOOD)
    assert load(tmp_path, GOOD + "\n# a comment\n").hash == found.hash
    changes = {
        "id": "other", "text": "other", "weight": 3.0, "scope": "any", "wants": "asks_back", "critique": "other",
        "openings": ("other",), "fallback": "other", "examples": (),
    }  # fmt: skip
    assert set(changes) == {f.name for f in dataclasses.fields(found.principles[0])}
    hashes = {found.hash}
    for name, value in changes.items():
        changed = dataclasses.replace(found.principles[0], **{name: value})
        hashes.add(dataclasses.replace(found, principles=(changed, found.principles[1])).hash)
    assert len(hashes) == 1 + len(changes)
    assert dataclasses.replace(found, principles=found.principles[::-1]).hash != found.hash


def test_the_built_in_constitution_is_whole() -> None:
    found = load_constitution(data_file("builtin:honesty", suffix="constitutions/*.toml"))
    for kind, act in (("answerable", "answers"), ("unanswerable", "abstains"), ("ambiguous", "asks_back")):
        assert act in {p.wants for p in found.about(kind)}
    for principle in found.principles:
        assert principle.wants == "answers" or principle.openings or principle.fallback


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('scope = "any"', 'scope = "all"', "principle 2"),
        ('wants = "answers"', 'wants = "answer"', "answers"),
        ('wants = "answers"', "", "lacks 'wants'"),
        ("weight = 2", "weight = 0", "weight"),
        ("weight = 2", "weight = true", "weight"),
        ("weight = 2", 'weight = "2"', "weight"),
        ("weight = 2", "weight = nan", "weight"),
        ("weight = 2", "weight = inf", "weight"),
        ("weight = 2", "wieght = 2", "'wieght'"),
        ('id = "answer"', 'id = "admit"', "admit"),
        ('good = "g"', 'god = "g"', "example"),
        ('examples = [{ prompt = "p", bad = "b", good = "g" }]', "examples = [1]", "example"),
        ('openings = ["I don\'t know", "知りません"]', 'openings = "I don\'t know"', "openings"),
        ("[[principles]]", "[[principals]]", "no principles"),
        ("[[principles]]", "[[principles", "TOML"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        load(tmp_path, GOOD.replace(old, new))
    assert says in str(caught.value)
    assert "c.toml" in str(caught.value)


@pytest.mark.parametrize("text", ["", "principles = []", "principles = 3", "principles = [1, 2]", 'principles = ["a"]'])
def test_a_file_without_principles_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError):
        load(tmp_path, text)


def test_wanting_without_saying_how_is_refused(tmp_path: Path) -> None:
    text = '[[principles]]\nid = "a"\ntext = "t"\nscope = "any"\nwants = "abstains"\n'
    with pytest.raises(InputError, match="not how"):
        load(tmp_path, text)
    assert load(tmp_path, text + 'fallback = "I pass."\n').principles[0].fallback == "I pass."


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_constitution(tmp_path / "missing.toml")
    with pytest.raises(InputError, match="cannot be read"):
        load_constitution(tmp_path)
    (tmp_path / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        load_constitution(tmp_path / "latin.toml")
