"""The harness that times two programs against each other, with two programs whose times are known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "benchmarks"

WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from duel import quiet_output, serve
pause, room = float(sys.argv[2]), int(sys.argv[3])
kept = b"x" * room
def step(number):
    print("a library's chatter must not be taken for an answer")
    time.sleep(pause)
    return {"number": number}
with quiet_output():
    serve(step, warmup=2)
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(HERE))
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    return str(tmp_path / "worker.py")


def test_speedup_and_memory_are_those_of_the_workers(script: str) -> None:
    from duel import duel

    fast, slow = [str(HERE), "0.02", "1000"], [str(HERE), "0.10", "60000000"]
    found = duel(script, fast, slow, repeats=3, threads=1)
    assert 2.0 < found["speedup"] < 5.5
    assert found["speedup_range"][0] <= found["speedup"] <= found["speedup_range"][1]
    assert found["memory_ratio"] < 0.5
    assert found["ours"]["number"] == 3  # steps 2, 3 and 4: two were warm-up
    assert len(found["peer"]["seconds_all"]) == 3


def test_a_worker_that_dies_ends_the_duel_with_its_code(script: str, tmp_path: Path) -> None:
    from duel import Worker

    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(7)", encoding="utf-8")
    with pytest.raises(SystemExit, match="code 7"):
        Worker(str(broken), [], threads=1)
    assert sys.executable
