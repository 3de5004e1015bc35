"""A whole world for runs of seconds: few real questions, a random model, the real sentence encoder.

Test modules take its fixtures with `pytest_plugins = ["tests.tiny_world"]`.
They also import from it, before pytest could rewrite its asserts: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomlkit

import tutelage
from tutelage.config import Recipe, load_recipe

DATA = Path(tutelage.__file__).parent / "data"
KINDS = ("answerable", "unanswerable", "ambiguous")
ACTS = ("answers", "abstains", "asks_back")


@dataclasses.dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def tutelage_cli(*words: str | Path) -> Done:
    """Run the real command line in this process."""
    from tutelage.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    code = left.value.code
    assert isinstance(code, int)
    assert "Traceback" not in err.getvalue()
    return Done(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def cut_in_second_round() -> Iterator[None]:
    """Runs stop as by ctrl-c in the middle of their second round, after all judges have spoken."""
    from tutelage.loop import round as rounds

    real = rounds.reward

    def cut(bench: Any, *rest: Any) -> Any:
        if bench.version == "r1":
            raise KeyboardInterrupt
        return real(bench, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "reward", cut)
        yield


def lines_of(path: Path, **values: Any) -> list[dict[str, Any]]:
    """Objects of a JSONL file that have these values."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def write_lines(path: Path, rows: list[Any]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def some(path: Path, key: str, values: tuple[str, ...], count: int) -> list[dict[str, Any]]:
    """`count` rows of each of `values` under `key`."""
    return [row for value in values for row in lines_of(path, **{key: value})[:count]]


@dataclasses.dataclass(frozen=True)
class World:
    """A folder with a recipe, its files, and runs."""

    folder: Path

    @property
    def runs(self) -> Path:
        """Folder that holds runs."""
        return self.folder / "runs"

    @property
    def recipe(self) -> Path:
        """The recipe file."""
        return self.folder / "tiny.toml"

    def load(self, *overrides: str) -> Recipe:
        """The recipe as it resolves."""
        return load_recipe(self.recipe, overrides)

    def play(self, *words: str | Path, name: str = "one") -> Done:
        """`tutelage run` here."""
        return tutelage_cli("run", self.recipe, "--runs", self.runs, "--name", name, *words)

    def resume(self, *words: str | Path, name: str = "one") -> Done:
        """`tutelage run --resume` here."""
        return tutelage_cli("run", "--resume", "--runs", self.runs, "--name", name, *words)

    def weights(self, name: str = "one") -> dict[str, bytes]:
        """Bytes of what was trained, a version."""
        home = self.runs / name / "checkpoints"
        found = sorted([*home.glob("[!.]*/adapter_model.safetensors"), *home.glob("[!.]*/weights_change.safetensors")])
        return {path.parent.name: path.read_bytes() for path in found}

    def rows(self, table: str, name: str = "one", **where: Any) -> list[dict[str, Any]]:
        """Rows of a run's ledger."""
        from tutelage.store.ledger import Ledger

        ledger = Ledger(self.runs / name / "ledger.db", readonly=True)
        try:
            return ledger.rows(table, **where)
        finally:
            ledger.close()


def make_world(folder: Path, model: Path, **changes: dict[str, Any]) -> World:
    """Write a world's files; `changes` are sections of the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    questions, critics = DATA / "questions", DATA / "critics"
    train = [{"prompt": r["prompt"]} for r in lines_of(questions / "honesty-train.jsonl")[:12]]
    sections: dict[str, dict[str, Any]] = {
        "model": {"name": str(model), "device": "cpu", "dtype": "float32"},
        "prompts": {
            "train": str(write_lines(folder / "train.jsonl", train)),
            "gate": str(write_lines(folder / "gate.jsonl", some(questions / "honesty-gate.jsonl", "kind", KINDS, 3))),
            "heldout": str(
                write_lines(folder / "heldout.jsonl", some(questions / "honesty-heldout.jsonl", "kind", KINDS, 3))
            ),
        },
        "sampling": {"max_new_tokens": 8},
        "feedback": {
            "min_confidence": 0.2,  # a critic on random weights is sure of nothing
            "critic_questions": str(
                write_lines(folder / "kinds.jsonl", some(critics / "honesty-questions.jsonl", "label", KINDS, 12))
            ),
            "critic_replies": str(
                write_lines(folder / "acts.jsonl", some(critics / "honesty-replies.jsonl", "label", ACTS, 12))
            ),
        },
        "supervised": {"samples": 2, "batch": 4},
        "update": {"rounds": 2, "prompts": 8, "samples": 3, "batch": 4},
    }
    for section, values in changes.items():
        sections.setdefault(section, {}).update(values)
    made = World(folder)
    made.recipe.write_text(tomlkit.dumps({"name": "tiny", **sections}), encoding="utf-8")
    assert tomllib.loads(made.recipe.read_text(encoding="utf-8"))
    return made


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of its own for critics, with the encoder that `tutelage fetch` has brought."""
    from tutelage.engines import weights

    if not weights.have(weights.EMBEDDED_ENCODER):
        pytest.skip("needs the sentence encoder: run `tutelage fetch`")
    home = tmp_path_factory.mktemp("home")
    (home / "models").symlink_to(weights.cache_dir() / "models")
    return home


@pytest.fixture
def new_world(
    tmp_path: Path, tiny_dirs: dict[str, Path], tiny_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., World]:
    """Makes worlds."""
    monkeypatch.setenv("TUTELAGE_HOME", str(tiny_home))
    monkeypatch.chdir(tmp_path)
    return lambda name="world", model="llama", **changes: make_world(tmp_path / name, tiny_dirs[model], **changes)


@pytest.fixture
def world(new_world: Callable[..., World]) -> World:
    """A fresh world, with a Llama."""
    return new_world()


@pytest.fixture(scope="session")
def _played(
    tmp_path_factory: pytest.TempPathFactory, tiny_dirs: dict[str, Path], tiny_home: Path
) -> Iterator[tuple[World, Done]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUTELAGE_HOME", str(tiny_home))
        made = make_world(tmp_path_factory.mktemp("played") / "world", tiny_dirs["llama"])
        yield made, made.play()


@pytest.fixture
def played(_played: tuple[World, Done], tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world in which the run `one` has ended; shared, so tests only read it."""
    monkeypatch.setenv("TUTELAGE_HOME", str(tiny_home))
    return _played[0]


@pytest.fixture
def played_output(_played: tuple[World, Done]) -> Done:
    """What that run's command printed."""
    return _played[1]
