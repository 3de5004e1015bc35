"""A run on disk: recipe, ledger, metrics, checkpoints, summary. Every file appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tutelage.config import Recipe, load_recipe
from tutelage.errors import InputError, RunBusy, StoreError
from tutelage.store.ledger import Ledger

__all__ = ["Run", "check_folder", "list_runs", "write_atomic"]


def check_folder(path: str | Path | None) -> None:
    """Refuse a file whose folder is not there, before the work that it should hold; None is no file.

    Raises:
        InputError: There is no such folder.
    """
    if path is not None and not Path(path).parent.is_dir():
        raise InputError(f"{path} cannot be written", expected="a file in a folder that exists", fix="make the folder")


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file under a temporary name, flush it to disk, and rename it.

    Raises:
        StoreError: No space left, no permission, or another failure of the file system.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    raw = data.encode("utf-8") if isinstance(data, str) else data
    try:
        with scratch.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise _store_error(path, error) from error


def _store_error(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path} cannot be written: {error.strerror or error}",
        expected="a writable folder with space left",
        fix="free space or choose another folder with --runs; a started run continues with --resume",
    )


class Run:
    """One run's folder, locked for one process.

    Args:
        folder: The run's folder.
        ledger: Its ledger.
        recipe: Its resolved recipe.
    """

    def __init__(self, folder: Path, ledger: Ledger, recipe: Recipe, lock: Any | None) -> None:
        self.folder, self.ledger, self.recipe, self._lock = folder, ledger, recipe, lock

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @classmethod
    def create(cls, root: Path, recipe: Recipe, name: str | None = None) -> Run:
        """Start a new run folder under `root`.

        Raises:
            StoreError: The folder exists already, or cannot be written.
        """
        chosen = name or f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        if Path(chosen).name != chosen or chosen in (".", ".."):
            raise StoreError(
                f"'{chosen}' is no name for a run", expected="a plain name", fix="put the folder in --runs"
            )
        folder = root / chosen
        try:
            folder.mkdir(parents=True, exist_ok=False)
        except FileExistsError as error:
            raise StoreError(
                f"the run '{chosen}' exists already in {root}",
                expected="a new name",
                fix=f"continue it with --resume --name {chosen}, or choose another --name",
            ) from error
        except OSError as error:
            raise _store_error(folder, error) from error
        lock = _take_lock(folder)
        try:
            write_atomic(folder / "recipe.toml", recipe.to_toml())
            (folder / "checkpoints").mkdir()
            return cls(folder, Ledger(folder / "ledger.db"), recipe, lock)
        except BaseException:
            lock.close()
            raise

    def discard(self) -> None:
        """Remove the folder of a run that never began (nothing but its recipe is in it)."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @classmethod
    def open(cls, folder: Path, *, write: bool) -> Run:
        """Open an existing run, to continue (`write`) or to read.

        Raises:
            StoreError: It is not a run folder.
            RunBusy: Another process is writing to it.
        """
        if not (folder / "recipe.toml").is_file():
            raise StoreError(
                f"{folder} is not a run",
                expected="a folder with recipe.toml",
                fix="see `tutelage runs` for the list",
            )
        lock = _take_lock(folder) if write else None
        ledger = Ledger(folder / "ledger.db", readonly=not write)
        return cls(folder, ledger, load_recipe(folder / "recipe.toml"), lock)

    def close(self) -> None:
        """Release the lock and close the ledger."""
        self.ledger.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def checkpoint(self, version: str) -> Path:
        """Folder of a version's checkpoint."""
        return self.folder / "checkpoints" / version

    def save_checkpoint(self, version: str, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a temporary folder, add a manifest of hashes, and rename it into place.

        Raises:
            StoreError: It could not be written; an older checkpoint of that name is untouched.
        """
        target = self.checkpoint(version)
        scratch = target.with_name(f".{version}.{os.getpid()}")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir(parents=True)
            write(scratch)
            hashes = {p.name: _sha256(p) for p in sorted(scratch.iterdir())}
            (scratch / "manifest.json").write_text(json.dumps(hashes, indent=2), encoding="utf-8")
            for file in scratch.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            # What is there is a leftover of an unfinished unit. It goes in one step, too: a kill while its
            # files are removed must not leave half of it under the name.
            old = target.with_name(f".{version}.old")
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.replace(old)
            scratch.replace(target)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException as error:
            shutil.rmtree(scratch, ignore_errors=True)
            if isinstance(error, SafetensorError):  # what its writer makes of a full disk
                raise _store_error(target, OSError(str(error))) from error
            if isinstance(error, OSError):
                raise _store_error(target, error) from error
            raise
        return target

    def verify_checkpoint(self, version: str) -> Path:
        """Folder of a checkpoint whose files match its manifest.

        Raises:
            StoreError: It is missing or damaged.
        """
        folder = self.checkpoint(version)
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise StoreError(f"checkpoint '{version}' of {self.name} is missing", expected=str(folder))
        try:
            hashes = dict(json.loads(manifest.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{manifest} is damaged", expected="a JSON table of hashes", fix="restore it, or start the run anew"
            ) from error
        for name, digest in hashes.items():
            if not (folder / name).is_file() or _sha256(folder / name) != digest:
                raise StoreError(
                    f"{folder / name} does not match its manifest",
                    expected=f"sha256 {digest}",
                    fix="restore the file from a copy, or start the run anew",
                )
        return folder

    def rewrite_metrics(self) -> None:
        """Bring `metrics.jsonl` in step with the ledger (a repeated unit leaves no double lines)."""
        lines = [
            json.dumps({"unit": m["unit"], "step": m["step"], "stage": m["stage"], **m["values"]}, ensure_ascii=False)
            for m in self.ledger.rows("metrics")
        ]
        write_atomic(self.folder / "metrics.jsonl", "".join(line + "\n" for line in lines))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`."""
        write_atomic(self.folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def summary(self) -> dict[str, Any] | None:
        """`summary.json`, or None before the run has ended."""
        path = self.folder / "summary.json"
        if not path.is_file():
            return None
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return loaded


def _take_lock(folder: Path) -> Any:
    """An operating-system lock: it is released when the process dies, however it dies."""
    try:
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise _store_error(folder / ".lock", error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise RunBusy(
            f"another process works on {folder}",
            expected="one process a run",
            fix="wait for it, or stop it (Ctrl-C leaves the run resumable)",
        ) from error
    return handle


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def list_runs(root: Path) -> list[Path]:
    """Run folders under `root`, newest first."""
    found = [p.parent for p in root.glob("*/recipe.toml")] if root.is_dir() else []
    return sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)
