"""Two programs timed against each other: one worker process a side, taking steps in turn.

A worker loads its model, takes its warm-up steps, says `ready`, and then takes one step for each line
it reads. Both stay in memory, so that slow and fast minutes of a shared machine hit both alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

SAY = sys.stdout  # a worker's answers; whatever its libraries print goes to stderr


def serve(step: Callable[[int], dict[str, Any]], *, warmup: int) -> None:
    """The worker's side: warm up, then one step a line."""
    for number in range(warmup):
        step(number)
    answer({"ready": True})
    for number, _ in enumerate(sys.stdin, warmup):
        began = time.perf_counter()
        found = step(number)
        answer(found | {"seconds": found.get("seconds", time.perf_counter() - began), "peak_bytes": peak_memory()})


@contextlib.contextmanager
def quiet_output() -> Iterator[None]:
    """Keep the answers' channel for answers."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def answer(found: dict[str, Any]) -> None:
    """Say one thing to the parent."""
    SAY.write(json.dumps(found) + "\n")
    SAY.flush()


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


class Worker:
    """A side of the duel, in a process of its own."""

    def __init__(self, script: str, arguments: Sequence[str], *, threads: int) -> None:
        surroundings = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, script, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=surroundings,
        )  # fmt: skip
        self._to: Any = self.process.stdin
        self._from: Any = self.process.stdout
        self._read()

    def _read(self) -> dict[str, Any]:
        line = self._from.readline()
        if not line:
            code = self.process.wait()
            self.close()
            raise SystemExit(f"a worker ended with code {code}; see its messages above")
        found: dict[str, Any] = json.loads(line)
        return found

    def step(self) -> dict[str, Any]:
        """Let it take one step."""
        self._to.write("go\n")
        self._to.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self._to.close()
        self._from.close()


def arguments(about: str | None) -> argparse.ArgumentParser:
    """The options that all duels share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=["ours", "peer"], help=argparse.SUPPRESS)
    return parser


def contest(script: str, common: Sequence[str], given: argparse.Namespace, *, rest: float = 0.0) -> dict[str, Any]:
    """`duel` between the two workers of one script, as its options say."""
    sides = ([*common, "--worker", side] for side in ("ours", "peer"))
    return duel(script, *sides, repeats=given.repeats, threads=given.threads, rest=rest)


def verdict(found: dict[str, Any]) -> str:
    """A duel's outcome in one line."""
    low, high = found["speedup_range"]
    return f"speed-up {found['speedup']:.2f} (range {low:.2f} to {high:.2f}), memory ratio {found['memory_ratio']:.2f}"


def duel(
    script: str, ours: Sequence[str], peer: Sequence[str], *, repeats: int, threads: int, rest: float = 0.0
) -> dict[str, Any]:
    """Steps of both sides in turn, each after `rest` seconds in which what the other left running may end.

    Returns:
        `ours` and `peer` (median and all of the seconds a step; peak bytes), `speedup` and
        `speedup_range` (median, least and largest of the paired ratios) and `memory_ratio`.
    """
    sides = {"ours": Worker(script, ours, threads=threads), "peer": Worker(script, peer, threads=threads)}
    taken: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for _ in range(repeats):
        for name, worker in sides.items():
            time.sleep(rest)
            taken[name].append(worker.step())
    for worker in sides.values():
        worker.close()
    ratios = [p["seconds"] / o["seconds"] for o, p in zip(taken["ours"], taken["peer"], strict=True)]
    found: dict[str, Any] = {name: _sum_up(steps) for name, steps in taken.items()}
    return found | {
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "memory_ratio": found["ours"]["peak_bytes"] / found["peer"]["peak_bytes"],
        "machine": machine(threads),
    }


def _sum_up(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seconds = [s["seconds"] for s in steps]
    rest = {k: statistics.mean(s[k] for s in steps) for k in steps[0] if k not in ("seconds", "peak_bytes")}
    return {
        "seconds": statistics.median(seconds),
        "seconds_all": [round(s, 3) for s in seconds],
        "peak_bytes": max(s["peak_bytes"] for s in steps),
        **rest,
    }


def machine(threads: int) -> dict[str, Any]:
    """What a figure was measured on, without naming the machine."""
    import torch

    flags = [f for f, there in torch.cpu.get_capabilities().items() if there is True]
    return {"processor": platform.machine(), "threads": threads, "capabilities": flags, "torch": torch.__version__}
