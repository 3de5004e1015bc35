"""Write src/tutelage/data/manifest.json: the sha256 of every data file of the package.

    python scripts/hash_data.py           write the manifest
    python scripts/hash_data.py --check   exit 1, naming the files, if the manifest is not current

Questions, labels, constitutions and recipes decide what a run measures, so none of them may change
unseen: the tests fail until this script has been run, and the change of a hash shows in the diff.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["MANIFEST", "hashes", "main", "render", "stale"]

DATA = Path(__file__).resolve().parent.parent / "src" / "tutelage" / "data"
MANIFEST = "manifest.json"


def hashes(folder: Path) -> dict[str, str]:
    """Sha256 of every file below `folder` by its path within it, sorted; without the manifest itself.

    Hidden files, byte code and caches are no data and are left out.
    """
    found = {}
    for path in folder.rglob("*"):
        inner = path.relative_to(folder)
        hidden = any(part.startswith((".", "__")) for part in inner.parts)
        if path.is_file() and not hidden and inner != Path(MANIFEST):
            found[inner.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return dict(sorted(found.items()))


def render(found: dict[str, str]) -> str:
    """The manifest's text: the same hashes always give the same bytes."""
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def stale(folder: Path) -> list[str]:
    """Files that are new, changed or gone since the manifest was written; all of them without a manifest."""
    manifest = folder / MANIFEST
    known: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    now = hashes(folder)
    return sorted(name for name in {*known, *now} if known.get(name) != now.get(name))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the manifest, or check it; returns the exit code."""
    parser = argparse.ArgumentParser(description="sha256 of every data file of the package")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the manifest is old")
    parser.add_argument("--folder", type=Path, default=DATA, help="the data folder")
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    if not folder.is_dir():
        print(f"{folder} is no folder; expected the package's data folder", file=sys.stderr)
        return 2
    changed = stale(folder)
    if options.check:
        for name in changed:
            print(f"{name} does not match {MANIFEST}; run: python scripts/hash_data.py", file=sys.stderr)
        return int(bool(changed))
    (folder / MANIFEST).write_text(render(hashes(folder)), encoding="utf-8", newline="\n")
    print(f"{folder / MANIFEST}: {len(hashes(folder))} files, {len(changed)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
