"""A run on disk: whole files or none, one writer, and damage that is noticed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tutelage.config import Recipe
from tutelage.errors import RunBusy, StoreError
from tutelage.store.runs import Run, list_runs, write_atomic

RECIPE = Recipe(name="test", title="Frage → Antwort", seed=7)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    opened = Run.create(tmp_path, RECIPE, "one")
    yield opened
    opened.close()


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.name != ".lock")


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "adapter.bin").write_text(text, encoding="utf-8")
        (folder / "state.json").write_text("{}", encoding="utf-8")

    return write


def test_a_new_run_holds_its_recipe_and_an_empty_ledger(run: Run) -> None:
    assert files(run.folder) == ["checkpoints", "ledger.db", "recipe.toml"]
    assert run.name == "one"
    assert run.ledger.units() == []
    run.close()
    again = Run.open(run.folder, write=True)
    assert again.recipe == RECIPE
    assert again.recipe.hash == RECIPE.hash
    again.close()


def test_a_run_without_a_name_gets_the_recipes_and_the_time(tmp_path: Path) -> None:
    made = Run.create(tmp_path, RECIPE)
    made.close()
    assert made.name.startswith("test-20")


def test_names_are_not_used_twice_and_folders_must_be_runs(run: Run, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="exists already"):
        Run.create(tmp_path, RECIPE, "one")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(StoreError, match="not a run"):
            Run.open(folder, write=False)
    with pytest.raises(StoreError, match="cannot be written"):
        Run.create(run.folder / "recipe.toml", RECIPE, "below-a-file")


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "missing") == []
    for age, name in enumerate(("new", "old", "oldest")):
        Run.create(tmp_path, RECIPE, name).close()
        os.utime(tmp_path / name, (1_000_000 - age, 1_000_000 - age))
    (tmp_path / "other").mkdir()
    assert [p.name for p in list_runs(tmp_path)] == ["new", "old", "oldest"]


# ---- one writer --------------------------------------------------------------------------------

_HOLDER = """
import sys, time
from pathlib import Path
from tutelage.store.runs import Run
run = Run.open(Path(sys.argv[1]), write=True)
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(run: Run, child_env: dict[str, str]) -> None:
    run.close()
    command = [sys.executable, "-c", _HOLDER, str(run.folder)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_env)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunBusy, match="another process"):
            Run.open(run.folder, write=True)
        reader = Run.open(run.folder, write=False)  # reading is always allowed
        assert reader.ledger.units() == []
        reader.close()
        holder.send_signal(signal.SIGKILL)  # however it dies, the lock dies with it
        holder.wait()
        Run.open(run.folder, write=True).close()
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()


def test_one_process_cannot_open_a_run_twice_for_writing(run: Run) -> None:
    with pytest.raises(RunBusy):
        Run.open(run.folder, write=True)
    run.close()
    run.close()  # closing twice is harmless
    Run.open(run.folder, write=True).close()


# ---- files that appear whole -------------------------------------------------------------------


def test_write_atomic_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "één")
    write_atomic(path, b"\x00two")
    assert path.read_bytes() == b"\x00two"
    assert files(tmp_path) == ["a.json"]
    with pytest.raises(StoreError, match="cannot be written"):
        write_atomic(tmp_path / "missing" / "a.json", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError):
        write_atomic(tmp_path / "folder", "x")
    assert files(tmp_path) == ["a.json", "folder"]


def test_summary_and_metrics_come_from_the_run(run: Run) -> None:
    assert run.summary() is None
    run.write_summary({"run": "one", "decision": "promoted", "word": "né"})
    assert run.summary() == {"run": "one", "decision": "promoted", "word": "né"}
    for number in (1, 2):
        with run.ledger.unit(f"round-{number}", "round") as unit:
            unit.metrics(number, "update", {"loss": number / 2})
        run.rewrite_metrics()
    run.rewrite_metrics()  # again: no double lines
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"unit": f"round-{n}", "step": n, "stage": "update", "loss": n / 2} for n in (1, 2)
    ]


# ---- checkpoints -------------------------------------------------------------------------------


def test_a_checkpoint_is_whole_and_verified(run: Run) -> None:
    folder = run.save_checkpoint("r1", writer("weights"))
    assert folder == run.checkpoint("r1") == run.verify_checkpoint("r1")
    assert files(run.folder / "checkpoints") == ["r1", "r1/adapter.bin", "r1/manifest.json", "r1/state.json"]
    run.save_checkpoint("r1", writer("other"))  # a repeated unit replaces its leftover
    assert (run.verify_checkpoint("r1") / "adapter.bin").read_text(encoding="utf-8") == "other"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("boom"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_rubbish(run: Run, error: BaseException) -> None:
    run.save_checkpoint("r1", writer("weights"))

    def fail(folder: Path) -> None:
        writer("half")(folder)
        raise error

    with pytest.raises(StoreError if isinstance(error, OSError) else type(error)):
        run.save_checkpoint("r1", fail)
    with pytest.raises(StoreError if isinstance(error, OSError) else type(error)):
        run.save_checkpoint("r2", fail)
    assert (run.verify_checkpoint("r1") / "adapter.bin").read_text(encoding="utf-8") == "weights"
    assert files(run.folder / "checkpoints") == ["r1", "r1/adapter.bin", "r1/manifest.json", "r1/state.json"]


def damage_content(folder: Path) -> None:
    (folder / "adapter.bin").write_text("wEights", encoding="utf-8")


def damage_missing(folder: Path) -> None:
    (folder / "state.json").unlink()


def damage_manifest_gone(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_manifest_cut(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:30])


def damage_manifest_empty(folder: Path) -> None:
    (folder / "manifest.json").write_text("", encoding="utf-8")


def damage_manifest_strange(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1]", encoding="utf-8")


@pytest.mark.parametrize(
    "damage",
    [
        damage_content, damage_missing, damage_manifest_gone, damage_manifest_cut, damage_manifest_empty,
        damage_manifest_strange,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_damage_is_noticed(run: Run, damage: Callable[[Path], None]) -> None:
    damage(run.save_checkpoint("r1", writer("weights")))
    with pytest.raises(StoreError):
        run.verify_checkpoint("r1")


def test_a_missing_checkpoint_is_named(run: Run) -> None:
    with pytest.raises(StoreError, match="'r9'"):
        run.verify_checkpoint("r9")


_FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from tutelage.errors import StoreError
from tutelage.store.runs import Run, write_atomic

run = Run.open(Path(sys.argv[1]), write=True)
write_atomic(run.folder / "report.html", "old")
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

def by_hand(folder):
    (folder / "adapter.bin").write_bytes(b"x" * 200_000)

def by_safetensors(folder):
    save_file({"a": np.zeros(100_000)}, str(folder / "adapter.safetensors"))

for name, action in (
    ("atomic", lambda: write_atomic(run.folder / "report.html", "x" * 200_000)),
    ("plain", lambda: run.save_checkpoint("r1", by_hand)),
    ("safetensors", lambda: run.save_checkpoint("r1", by_safetensors)),
):
    try:
        action()
    except StoreError as error:
        print(name, "refused:", str(error).splitlines()[0])
"""


def test_a_full_disk_is_a_store_error_and_old_files_stay(run: Run, child_env: dict[str, str]) -> None:
    """A limit on the size of files stands in for the full disk, also for what safetensors writes."""
    run.save_checkpoint("r1", writer("weights"))
    before = files(run.folder)
    run.close()
    command = [sys.executable, "-c", _FULL_DISK, str(run.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=child_env)
    assert "atomic refused" in done.stdout, done.stderr
    assert "plain refused" in done.stdout, done.stderr
    assert "safetensors refused" in done.stdout, done.stderr
    assert files(run.folder) == sorted([*before, "report.html"])
    assert (run.folder / "report.html").read_text(encoding="utf-8") == "old"
    assert (run.verify_checkpoint("r1") / "adapter.bin").read_text(encoding="utf-8") == "weights"
