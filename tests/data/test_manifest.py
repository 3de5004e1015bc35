"""Tests that the manifest of the package's data files is current, and that its script notices a change."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "hash_data.py"
DATA = ROOT / "src" / "tutelage" / "data"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def manifest(folder: Path) -> dict[str, str]:
    loaded: dict[str, str] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    shutil.copytree(DATA, folder)
    assert run("--folder", str(folder)).returncode == 0
    return folder


def test_the_manifest_is_current() -> None:
    """If this fails after a wanted change of a data file: python scripts/hash_data.py."""
    checked = run("--check")
    assert checked.returncode == 0, checked.stderr


def test_the_manifest_holds_every_file_with_its_true_hash() -> None:
    found = manifest(DATA)
    files = [p for p in DATA.rglob("*") if p.is_file() and p.name != "manifest.json" and p.suffix != ".pyc"]
    assert list(found) == sorted(p.relative_to(DATA).as_posix() for p in files)
    assert {name: hashlib.sha256((DATA / name).read_bytes()).hexdigest() for name in found} == found
    for name in (
        "questions/honesty-train.jsonl",
        "critics/honesty-questions.jsonl",
        "constitutions/honesty.toml",
    ):
        assert name in found


@pytest.mark.parametrize("change", ["one byte", "new file", "lost file", "lost manifest"])
def test_a_change_is_noticed_and_writing_again_settles_it(change: str, copy: Path) -> None:
    assert run("--check", "--folder", str(copy)).returncode == 0
    questions = copy / "questions" / "honesty-gate.jsonl"
    if change == "one byte":
        questions.write_bytes(questions.read_bytes() + b"\n")
    elif change == "new file":
        (copy / "questions" / "more.jsonl").write_text("{}\n", encoding="utf-8")
    elif change == "lost file":
        questions.unlink()
    else:
        (copy / "manifest.json").unlink()
    checked = run("--check", "--folder", str(copy))
    assert checked.returncode == 1
    name = "more.jsonl" if change == "new file" else "honesty-gate.jsonl"
    assert f"questions/{name} does not match manifest.json; run: python scripts/hash_data.py" in checked.stderr
    assert run("--folder", str(copy)).returncode == 0
    assert run("--check", "--folder", str(copy)).returncode == 0


def test_caches_are_no_data_and_writing_twice_changes_nothing(copy: Path) -> None:
    before = (copy / "manifest.json").read_bytes()
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "a.pyc").write_bytes(b"")
    (copy / ".hidden").write_bytes(b"")
    assert run("--folder", str(copy)).returncode == 0
    assert (copy / "manifest.json").read_bytes() == before


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = run("--folder", str(tmp_path / "no"))
    assert done.returncode == 2
    assert "is no folder" in done.stderr
