"""Checks of the machine: what is there, what is missing, what to do about it."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sqlite3
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from tutelage.errors import TutelageError

__all__ = ["examine"]


def examine(runs: Path) -> list[dict[str, Any]]:
    """One row a check: `what`, `ok`, `found`. Nothing is changed and nothing leaves the machine."""
    rows: list[dict[str, Any]] = []

    def row(what: str, ok: bool, found: str) -> None:
        rows.append({"what": what, "ok": ok, "found": found})

    row("Python", sys.version_info >= (3, 11), f"{platform.python_version()} (3.11 or newer is needed)")
    for name in ("torch", "transformers", "safetensors", "scikit-learn"):
        row(name, True, importlib.metadata.version(name))
    row("SQLite", True, f"{sqlite3.sqlite_version} (rollback journal, so WAL faults do not matter)")
    row("processor", True, _processor())
    memory = psutil.virtual_memory()
    row(
        "memory",
        memory.available > 3e9,
        f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} (3 GB needed)",
    )
    place = next(p for p in (runs.resolve(), *runs.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    row("disk", free > 1e9, f"{free / 1e9:.1f} GB free at {place} (1 GB needed)")
    row("runs folder", _writable(place), f"{runs} can be written" if _writable(place) else f"{runs} cannot be written")
    for name, ok, found in _weights():
        row(name, ok, found)
    return rows


def _processor() -> str:
    import torch

    from tutelage.engines.load import choose_device, choose_dtype

    device = choose_device()
    number = str(choose_dtype("auto", device)).removeprefix("torch.")
    what = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{device.type}, {what}, computing in {number}"


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _weights() -> list[tuple[str, bool, str]]:
    from tutelage.engines import weights

    found = []
    for name in (weights.EMBEDDED_POLICY, weights.EMBEDDED_ENCODER):
        try:
            found.append((f"weights {name}", True, str(weights.locate(name))))
        except TutelageError:
            found.append((f"weights {name}", False, "not here; run `tutelage fetch`"))
    return found
