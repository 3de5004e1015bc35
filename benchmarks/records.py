"""Finished runs of a benchmark, one a line, so that several sessions and machines can add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: Path | None, **same: Any) -> list[dict[str, Any]]:
    """Rows of a file that have these values; the last of an arm and seed stands, in the order of seeds and arms.

    Raises:
        SystemExit: A line is no row.
    """
    found: dict[tuple[int, str], dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if all(row[key] == value for key, value in same.items()):
                found[row["seed"], row["arm"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}:{number} is no run ({error!r}); delete that line") from error
    return [found[key] for key in sorted(found)]


def add(path: Path | None, row: dict[str, Any]) -> None:
    """Write a row at once, so that nothing is lost when the next run is stopped."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
