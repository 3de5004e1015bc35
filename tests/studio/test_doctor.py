"""The machine's check: what is there, what is missing, what to do."""

from __future__ import annotations

import os
from collections import namedtuple
from pathlib import Path

import pytest

from tutelage.studio import doctor
from tutelage.studio.doctor import examine


def rows(folder: Path) -> dict[str, tuple[bool, str]]:
    return {r["what"]: (r["ok"], r["found"]) for r in examine(folder)}


def test_what_is_looked_at_and_nothing_is_changed(tmp_path: Path) -> None:
    found = rows(tmp_path / "deep" / "runs")
    assert {"Python", "torch", "transformers", "SQLite", "processor", "memory", "disk", "runs folder"} <= set(found)
    assert sum(name.startswith("weights ") for name in found) == 2
    assert all(text for _, text in found.values())
    assert found["Python"][0] and found["runs folder"][0]
    assert list(tmp_path.iterdir()) == []


def test_missing_weights_say_how_to_bring_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTELAGE_HOME", str(tmp_path / "nothing"))
    found = rows(tmp_path)
    for name, (ok, text) in found.items():
        if name.startswith("weights "):
            assert not ok and "tutelage fetch" in text


def test_little_memory_and_a_full_disk_are_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    memory = namedtuple("memory", "available total")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(10e9, 9.9e9, 1e8))
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory(1e9, 8e9))
    found = rows(tmp_path)
    assert not found["disk"][0] and "0.1 GB free" in found["disk"][1]
    assert not found["memory"][0] and "1.0 GB free of 8.0" in found["memory"][1]


def test_a_folder_that_cannot_be_written_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    if os.access(closed, os.W_OK):  # root writes everywhere, so the refusal is made by hand

        def refuse(**_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    ok, text = rows(closed)["runs folder"]
    assert not ok and "cannot be written" in text


@pytest.mark.parametrize("below", ["runs", "a/b/runs"])
def test_a_file_where_the_runs_folder_should_be(below: str, tmp_path: Path) -> None:
    (tmp_path / below.split("/")[0]).write_text("x", encoding="utf-8")
    assert not rows(tmp_path / below)["runs folder"][0]
