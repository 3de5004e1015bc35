"""Same seed, same weights: also after Ctrl-C, after kills at random moments, and on a full disk."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from tests.tiny_world import World

from tutelage.store.runs import Run

pytest_plugins = ["tests.tiny_world"]

UNITS = ["start", "supervised", "round-1", "round-2", "final"]

# Imports once, then forks a child a command: a kill costs no second start of torch.
_NURSERY = """
import os, signal, sys, time
import tutelage.applications.truthfulness, tutelage.api, tutelage.studio.report, tutelage.studio.console
import transformers
transformers.AutoTokenizer, transformers.AutoModel, transformers.AutoModelForCausalLM
from tutelage.cli import main
import torch
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
for line in sys.stdin:
    delay, sign, *words = line.rstrip("\\n").split("\\t")
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        out = os.open(os.environ["CHILD_LOG"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1); os.dup2(out, 2)
        try:
            main(words)
        except SystemExit as left:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(left.code)
        except BaseException:
            import traceback
            traceback.print_exc()
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(99)
    if float(delay) >= 0:
        time.sleep(float(delay))
        sent = time.monotonic()
        os.kill(child, int(sign))
    else:
        sent = began
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    print(f"{code} {time.monotonic() - sent}", flush=True)
"""


class Nursery:
    """Runs commands in children that can be signalled at any moment."""

    def __init__(self, env: dict[str, str], log: Path) -> None:
        self.log = log
        self._parent = subprocess.Popen(
            [sys.executable, "-c", _NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**env, "CHILD_LOG": str(log), "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip

    def run(self, *words: str | Path, after: float = -1.0, sign: int = signal.SIGKILL) -> tuple[int, float]:
        """(exit code, seconds since the signal, or since the start without one)."""
        assert self._parent.stdin is not None and self._parent.stdout is not None
        line = "\t".join([str(after), str(int(sign)), *map(str, words)])
        self._parent.stdin.write(line + "\n")
        self._parent.stdin.flush()
        code, seconds = self._parent.stdout.readline().split()
        return int(code), float(seconds)

    def close(self) -> None:
        for pipe in (self._parent.stdin, self._parent.stdout):
            assert pipe is not None
            pipe.close()
        self._parent.wait()


@pytest.fixture(scope="session")
def _nursery(child_env: dict[str, str], tiny_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    log = tmp_path_factory.mktemp("nursery") / "log.txt"
    made = Nursery({**child_env, "TUTELAGE_HOME": str(tiny_home), "OMP_NUM_THREADS": "1"}, log)
    yield made
    made.close()


@pytest.fixture
def nursery(_nursery: Nursery, world: World) -> Nursery:
    return _nursery


def start(world: World, name: str) -> tuple[str | Path, ...]:
    return ("run", world.recipe, "--runs", world.runs, "--name", name)


def go_on(world: World, name: str) -> tuple[str | Path, ...]:
    return ("run", "--resume", "--runs", world.runs, "--name", name)


def checkpoint_names(folder: Path) -> list[str]:
    return [p.name for p in (folder / "checkpoints").iterdir() if not p.name.startswith(".")]


def assert_checkpoints_are_whole(folder: Path) -> None:
    """Any checkpoint without a leading dot has a manifest, and its files are what the manifest says."""
    if not (folder / "checkpoints").is_dir():
        return
    from tutelage.config import Recipe

    run = Run(folder, cast(Any, None), Recipe(), None)  # its ledger may not be there yet
    for name in checkpoint_names(folder):
        run.verify_checkpoint(name)


def assert_whole(world: World, name: str, undisturbed: dict[str, bytes]) -> None:
    """The run is what it would have been without disturbance."""
    assert [u["name"] for u in world.rows("units", name)] == UNITS
    lines = (world.runs / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [(m["unit"], m["step"], m["stage"]) for m in map(json.loads, lines)]
    assert len(steps) == len(set(steps))
    assert len(steps) == len(world.rows("metrics", name)) > 0
    generations = [g["id"] for g in world.rows("generations", name)]
    assert len(generations) == len(set(generations))
    assert (world.runs / name / "summary.json").is_file()
    assert (world.runs / name / "report.html").is_file()
    found = world.weights(name)
    assert sorted(found) == sorted(undisturbed) == ["r0", "r1", "r2"]
    assert [v for v in found if found[v] != undisturbed[v]] == []


def whole_table(world: World, name: str, table: str) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k != "cost"} for row in world.rows(table, name)]


def test_same_seed_same_bits_and_another_seed_differs(played: World, world: World) -> None:
    assert world.play(name="again").code == 3
    assert world.play("--set", "seed=1", name="other").code == 3
    undisturbed, again, other = played.weights(), world.weights("again"), world.weights("other")
    assert sorted(undisturbed) == ["r0", "r1", "r2"]
    assert again == undisturbed
    assert all(other[version] != undisturbed[version] for version in undisturbed)
    for table in ("generations", "verdicts", "rewards", "credits", "targets", "metrics", "outcomes"):
        assert whole_table(world, "again", table) == whole_table(played, "one", table), table


def test_threads_of_a_second_process_give_the_same_bits(nursery: Nursery, played: World, world: World) -> None:
    code, _ = nursery.run(*start(world, "one"))
    assert code == 3, nursery.log.read_text(encoding="utf-8")
    assert_whole(world, "one", played.weights())


@pytest.mark.parametrize("unit", UNITS[:-1])
def test_a_run_cut_between_two_units_ends_the_same(
    unit: str, played: World, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill right behind a unit's commit, without luck: every later number must be the same."""
    from tutelage.store.runs import Run

    class Cut(BaseException):
        pass

    rewrite = Run.rewrite_metrics

    def cut(self: Run) -> None:
        if self.ledger.units()[-1]["name"] == unit:
            raise Cut
        rewrite(self)

    monkeypatch.setattr(Run, "rewrite_metrics", cut)
    from tutelage.cli import app

    with pytest.raises(Cut):
        app([str(w) for w in start(world, "one")], result_action="return_value")
    monkeypatch.setattr(Run, "rewrite_metrics", rewrite)
    assert world.resume().code == 3
    assert_whole(world, "one", played.weights())
    for table in ("generations", "verdicts", "rewards", "credits", "targets", "metrics", "outcomes"):
        assert whole_table(world, "one", table) == whole_table(played, "one", table), table


def test_killed_at_ten_random_moments_a_run_ends_bit_equal(nursery: Nursery, played: World, world: World) -> None:
    code, seconds = nursery.run(*start(world, "timed"))
    assert code == 3, nursery.log.read_text(encoding="utf-8")
    dice = random.Random(20)
    kills = 0
    for turn in range(10):
        name = f"killed-{turn // 2}"  # five runs, each killed twice
        folder = world.runs / name
        words = go_on(world, name) if (folder / "recipe.toml").is_file() else start(world, name)
        code, _ = nursery.run(*words, after=dice.uniform(0.1, 1.0) * seconds * (1.0 if turn % 2 == 0 else 0.6))
        kills += code == -signal.SIGKILL
        assert code in (-signal.SIGKILL, 3), nursery.log.read_text(encoding="utf-8")
        assert_checkpoints_are_whole(folder)
    assert kills >= 5
    for number in range(5):
        name = f"killed-{number}"
        begun = (world.runs / name / "recipe.toml").is_file()
        code, _ = nursery.run(*(go_on(world, name) if begun else start(world, name)))
        assert code == 3, nursery.log.read_text(encoding="utf-8")
        assert_whole(world, name, played.weights())


@pytest.mark.parametrize("turn", range(3))
def test_a_kill_during_a_save_leaves_no_half_checkpoint(turn: int, nursery: Nursery, played: World, world: World, child_env: dict[str, str], tiny_home: Path) -> None:  # fmt: skip
    """Many saves in a row, killed in the midst of one."""
    saver = """
import sys
from pathlib import Path
from tutelage.store.runs import Run
run = Run.open(Path(sys.argv[1]), write=True)
def write(folder):
    for part in range(20):
        (folder / f"part-{part}.bin").write_bytes(bytes([part]) * 50_000)
print("go", flush=True)
for n in range(10_000):
    run.save_checkpoint(f"v{n % 7}", write)
"""
    from tutelage.config import Recipe

    made = Run.create(world.runs, Recipe(), "saves")
    made.close()
    child = subprocess.Popen(
        [sys.executable, "-c", saver, str(made.folder)], stdout=subprocess.PIPE, text=True, env=child_env
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "go\n"
    while not checkpoint_names(made.folder):  # the machine may be busy
        time.sleep(0.01)
    time.sleep(random.Random(turn).uniform(0.05, 0.3))
    child.kill()
    child.wait()
    child.stdout.close()
    names = checkpoint_names(made.folder)
    assert names
    assert_checkpoints_are_whole(made.folder)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_ctrl_c_ends_soon_says_how_to_go_on_and_loses_nothing(
    share: float, nursery: Nursery, played: World, world: World
) -> None:
    # The first run of a process is slower than those after it.
    seconds = min(nursery.run(*start(world, name))[1] for name in ("warm", "timed"))
    code, waited = nursery.run(*start(world, "one"), after=share * seconds, sign=signal.SIGINT)
    said = nursery.log.read_text(encoding="utf-8")
    assert code == 130, said
    assert waited < 5.0
    assert "--resume" in said
    assert "Traceback" not in said
    assert_checkpoints_are_whole(world.runs / "one")
    code, _ = nursery.run(*go_on(world, "one"))
    assert code == 3, nursery.log.read_text(encoding="utf-8")
    assert_whole(world, "one", played.weights())


def test_a_killed_command_leaves_the_list_of_runs_readable(nursery: Nursery, world: World) -> None:
    """A kill between the first files of a folder must not make the other runs unreadable."""
    (world.runs / "half").mkdir(parents=True)
    (world.runs / "half" / "recipe.toml").write_text(world.load().to_toml(), encoding="utf-8")
    code, _ = nursery.run("runs", "--runs", world.runs)
    assert code == 0, nursery.log.read_text(encoding="utf-8")
    assert "half" in nursery.log.read_text(encoding="utf-8")
    code, _ = nursery.run(*go_on(world, "half"))
    assert code == 3, nursery.log.read_text(encoding="utf-8")


def test_a_finished_run_is_resumed_without_doing_anything_again(played: World, world: World) -> None:
    assert world.play().code == 3
    before = {t: world.rows(t) for t in ("units", "generations", "outcomes")}
    again = world.resume("--json")
    assert again.code == 3
    assert json.loads(again.out)["run"] == "one"
    assert {t: world.rows(t) for t in before} == before
    assert world.weights() == played.weights()


def test_a_summary_lost_to_a_kill_is_written_again(world: World) -> None:
    """The last unit is committed before `summary.json` is written."""
    assert world.play().code == 3
    summary = world.runs / "one" / "summary.json"
    kept = json.loads(summary.read_text(encoding="utf-8"))
    summary.unlink()
    assert world.resume().code == 3
    assert json.loads(summary.read_text(encoding="utf-8")) == kept


def test_a_spent_budget_is_raised_when_resuming(world: World) -> None:
    stopped = world.play("--set", "limits.seconds=0.000001")
    assert stopped.code == 5
    assert world.resume("--set", "limits.seconds=600").code == 3


def test_a_damaged_checkpoint_is_not_trained_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from tutelage.loop import improve

    play_round = improve.play_round

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(improve, "play_round", stop)
    assert world.play().code == 130
    monkeypatch.setattr(improve, "play_round", play_round)
    path = world.runs / "one" / "checkpoints" / "r0" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    done = world.resume()
    assert done.code == 2 and "manifest" in done.err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("free", [20_000, 120_000, 200_000])
def test_no_space_left_is_said_and_the_run_goes_on_when_there_is(
    free: int, small_disk: Path, played: World, new_world: Callable[..., World]
) -> None:
    world = new_world()
    (world.folder / "runs").symlink_to(small_disk)
    ballast = small_disk / "ballast.bin"
    size = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast.write_bytes(b"x" * (size - free))
    full = world.play()
    assert full.code == 2, full.err
    assert "space" in full.err or "full" in full.err
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert_checkpoints_are_whole(world.runs / "one")
    done = world.resume()
    assert done.code == 3, done.err
    assert_whole(world, "one", played.weights())


def test_a_second_process_on_the_same_run_is_refused(nursery: Nursery, world: World) -> None:
    assert world.play().code == 3
    held = Run.open(world.runs / "one", write=True)
    try:
        code, _ = nursery.run(*go_on(world, "one"))
        said = nursery.log.read_text(encoding="utf-8")
        assert code == 2
        assert "another process" in said and "Traceback" not in said
        assert world.resume().code == 2
    finally:
        held.close()
