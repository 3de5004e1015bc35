"""Answers kept by content: the same question is never put to the same model twice.

One SQLite file serves any number of engines and runs. Failures are not kept: they may pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from tutelage.errors import BudgetSpent, StoreError
from tutelage.records import Answer, Cost, Engine, Question

__all__ = ["CachedEngine"]

_PORTION = 64  # questions after which answers are on disk, whatever happens next


class CachedEngine:
    """An engine that looks into a file first.

    Args:
        engine: Who is asked what the file does not hold.
        path: The file; made when it is not there.

    `hits` and `misses` count questions; a question that stands twice in a batch is asked once.

    Raises:
        StoreError: The file cannot be opened or is none of ours.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        self.engine, self.path = engine, path
        self.name, self.version = engine.name, engine.version
        self.hits = self.misses = 0
        self._blind = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60.0)
            with self._db:
                self._db.execute(
                    "CREATE TABLE IF NOT EXISTS answers (engine TEXT, question TEXT, answer TEXT NOT NULL, "
                    "PRIMARY KEY (engine, question)) STRICT, WITHOUT ROWID"
                )
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"the answers in {path} cannot be opened: {error}",
                expected="a file that tutelage wrote, in a writable folder",
                fix="remove the file: it only saves questions",
            ) from error

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer a question, from the file or from the engine."""
        known: dict[str, Answer] = {}
        fresh: dict[str, Question] = {}
        for question in questions:
            key = question.hash
            if key in known or key in fresh:
                continue
            found = None if self._blind else self._find(key)
            if found is None:
                fresh[key] = question
            else:
                known[key] = found
        self.hits += len(questions) - len(fresh)
        self.misses += len(fresh)
        keys = list(fresh)
        for start in range(0, len(keys), _PORTION):
            part = keys[start : start + _PORTION]
            try:
                answers = self.engine.ask([fresh[k] for k in part])
            except BudgetSpent as spent:  # what was paid for is kept
                self._keep(part, [a or Answer(failure="not asked") for a in getattr(spent, "answers", ())])
                raise
            known.update(zip(part, answers, strict=True))
            self._keep(part, answers)
        return [known[q.hash] for q in questions]

    @contextlib.contextmanager
    def anew(self) -> Iterator[None]:
        """Ask everything anew while the context lasts, to see whether the model still says the same."""
        self._blind = True
        try:
            yield
        finally:
            self._blind = False

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _find(self, key: str) -> Answer | None:
        row = self._db.execute(
            "SELECT answer FROM answers WHERE engine = ? AND question = ?", (self.version, key)
        ).fetchone()
        if row is None:
            return None
        kept = json.loads(row[0])
        logps = kept["label_logps"]
        if logps is not None:
            logps = {label: -math.inf if value is None else float(value) for label, value in logps.items()}
        return Answer(kept["text"], tuple(kept["logps"]), logps, cost=Cost())

    def _keep(self, keys: Sequence[str], answers: Sequence[Answer]) -> None:
        rows = []
        for key, answer in zip(keys, answers, strict=False):
            if answer.failure:
                continue
            body = {k: v for k, v in dataclasses.asdict(answer).items() if k in ("text", "logps", "label_logps")}
            if body["label_logps"] is not None:  # JSON has no infinity
                body["label_logps"] = {k: v if math.isfinite(v) else None for k, v in body["label_logps"].items()}
            rows.append((self.version, key, json.dumps(body, ensure_ascii=False, allow_nan=False)))
        try:
            with self._db:
                self._db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise StoreError(
                f"answers could not be written to {self.path}: {error}", expected="a writable disk with space left"
            ) from error
