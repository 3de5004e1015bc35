"""The append-only ledger of a run: one SQLite file, one writer, nothing ever changed.

Everything belongs to a *unit* of work ("round-1", "final", ...). A unit's rows and the mark that it
is done are one transaction, so after a crash a unit is either wholly there or not at all, and the
run repeats it from its last checkpoint. Triggers refuse UPDATE and DELETE.

The journal is SQLite's rollback journal, not WAL: Debian 12 ships SQLite 3.40.1, which lies in the
range (3.7.0 to 3.51.2) where a WAL reset could corrupt a database.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tutelage.errors import StoreError
from tutelage.records import Decision, Generation, Prompt, Reward, Target, Verdict

__all__ = ["Ledger", "Unit"]

_TABLES = {
    "units": "name TEXT PRIMARY KEY, stage TEXT NOT NULL, version TEXT NOT NULL, seconds REAL NOT NULL, "
    "state TEXT NOT NULL, finished_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ','now'))",
    "prompts": "unit TEXT NOT NULL, id TEXT NOT NULL, split TEXT NOT NULL, hash TEXT NOT NULL, messages TEXT NOT NULL",
    "generations": "unit TEXT NOT NULL, id TEXT NOT NULL, prompt_id TEXT NOT NULL, sample INTEGER NOT NULL, "
    "text TEXT NOT NULL, tokens TEXT NOT NULL, logps TEXT NOT NULL, finished INTEGER NOT NULL, "
    "settings TEXT NOT NULL, policy_version TEXT NOT NULL, seed INTEGER NOT NULL",
    "verdicts": "unit TEXT NOT NULL, judge TEXT NOT NULL, judge_version TEXT NOT NULL, subject TEXT NOT NULL, "
    "prompt_hash TEXT NOT NULL, value REAL, reason TEXT NOT NULL, evidence TEXT NOT NULL, cost TEXT NOT NULL, "
    "spans TEXT NOT NULL, raw TEXT NOT NULL, shown TEXT NOT NULL",
    "rewards": "unit TEXT NOT NULL, generation_id TEXT NOT NULL, total REAL, terms TEXT NOT NULL, "
    "raw TEXT NOT NULL, costs TEXT NOT NULL",
    "credits": "unit TEXT NOT NULL, generation_id TEXT NOT NULL, method TEXT NOT NULL, advantage REAL NOT NULL, "
    "credit TEXT NOT NULL",
    "targets": "unit TEXT NOT NULL, prompt_id TEXT NOT NULL, text TEXT NOT NULL, origin TEXT NOT NULL, "
    "principle TEXT NOT NULL, reason TEXT NOT NULL, weight REAL NOT NULL",
    "metrics": 'unit TEXT NOT NULL, step INTEGER NOT NULL, stage TEXT NOT NULL, "values" TEXT NOT NULL',
    "outcomes": "unit TEXT NOT NULL, suite TEXT NOT NULL, version TEXT NOT NULL, item TEXT NOT NULL, "
    "prompt TEXT NOT NULL, kind TEXT NOT NULL, form TEXT NOT NULL, reply TEXT NOT NULL, outcome TEXT NOT NULL, "
    "reference TEXT NOT NULL",
    "decisions": "unit TEXT NOT NULL, gate TEXT NOT NULL, candidate TEXT NOT NULL, baseline TEXT NOT NULL, "
    "accepted INTEGER NOT NULL, reason TEXT NOT NULL, evidence TEXT NOT NULL",
    "notes": "unit TEXT NOT NULL, topic TEXT NOT NULL, body TEXT NOT NULL",
}

_JSON_COLUMNS = {
    "messages", "tokens", "logps", "settings", "evidence", "cost", "spans", "shown", "terms", "raw_terms",
    "costs", "credit", "values", "state",
}  # fmt: skip


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


@dataclasses.dataclass
class Unit:
    """Collects a unit's rows in memory; `Ledger.unit` writes them in one transaction."""

    name: str
    stage: str
    rows: dict[str, list[tuple[Any, ...]]] = dataclasses.field(default_factory=dict)
    version: str = ""
    seconds: float = 0.0
    state: dict[str, Any] = dataclasses.field(default_factory=dict)

    def _add(self, table: str, row: tuple[Any, ...]) -> None:
        self.rows.setdefault(table, []).append((self.name, *row))

    def prompts(self, prompts: Iterable[Prompt], split: str) -> None:
        """Keep prompts."""
        for p in prompts:
            turns = [{"role": m.role, "content": m.content} for m in p.messages]
            self._add("prompts", (p.id, split, p.hash, _json(turns)))

    def generations(self, generations: Iterable[Generation]) -> None:
        """Keep replies with their tokens, log-probs and settings."""
        for g in generations:
            logps = [round(x, 6) for x in g.logps]
            settings = _json(dataclasses.asdict(g.settings))
            self._add(
                "generations",
                (g.id, g.prompt_id, g.sample, g.text, _json(g.tokens), _json(logps), int(g.finished), settings,
                 g.policy_version, g.seed),
            )  # fmt: skip

    def verdicts(self, verdicts: Iterable[Verdict]) -> None:
        """Keep verdicts, abstentions included."""
        for v in verdicts:
            self._add(
                "verdicts",
                (v.judge, v.judge_version, v.subject, v.prompt_hash, v.value, v.reason, _json(dict(v.evidence)),
                 _json(dataclasses.asdict(v.cost)), _json(v.spans), v.raw, _json(v.order)),
            )  # fmt: skip

    def rewards(self, rewards: Iterable[Reward]) -> None:
        """Keep rewards with their terms."""
        for r in rewards:
            row = (r.generation_id, r.total, _json(dict(r.terms)), _json(dict(r.raw)), _json(dict(r.costs)))
            self._add("rewards", row)

    def credit(self, generation_id: str, method: str, advantage: float, credit: Sequence[float]) -> None:
        """Keep the credit of one reply's tokens."""
        self._add("credits", (generation_id, method, advantage, _json([round(c, 6) for c in credit])))

    def targets(self, targets: Iterable[Target]) -> None:
        """Keep what the supervised stage imitates."""
        for t in targets:
            self._add("targets", (t.prompt_id, t.text, t.origin, t.principle, t.reason, t.weight))

    def metrics(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Keep one step's figures. Non-finite ones are left out: a gap is honest."""
        finite = {k: v for k, v in values.items() if v == v and abs(v) != float("inf")}
        self._add("metrics", (step, stage, _json(finite)))

    def outcome(
        self, suite: str, version: str, item: str, prompt: str, kind: str, form: str, reply: str, result: str,
        reference: str,
    ) -> None:  # fmt: skip
        """Keep one evaluated reply."""
        self._add("outcomes", (suite, version, item, prompt, kind, form, reply, result, reference))

    def decision(self, decision: Decision) -> None:
        """Keep a gate's decision with the numbers it saw."""
        evidence = _json([dataclasses.asdict(e) for e in decision.evidence])
        self._add(
            "decisions",
            (
                decision.gate,
                decision.candidate,
                decision.baseline,
                int(decision.accepted),
                decision.reason,
                evidence,
            ),
        )

    def note(self, topic: str, body: Any) -> None:
        """Keep anything else that the report shows, as JSON."""
        self._add("notes", (topic, _json(body)))


class Ledger:
    """Reader and single writer of a run's `ledger.db`.

    Raises:
        StoreError: The file cannot be opened, or is no ledger.
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self.path = path
        try:
            if readonly:
                self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
                self._db.execute("SELECT count(*) FROM units")
            else:
                self._db = sqlite3.connect(path)
                self._create()
        except sqlite3.Error as error:
            raise StoreError(
                f"the ledger {path} cannot be opened: {error}",
                expected="a ledger written by tutelage",
                fix="check the path and its permissions, and that the disk is not full",
            ) from error
        self._db.row_factory = sqlite3.Row

    def _create(self) -> None:
        self._db.execute("PRAGMA journal_mode=DELETE")
        self._db.execute("PRAGMA synchronous=FULL")
        with self._db:
            for table, columns in _TABLES.items():
                self._db.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns}) STRICT")
                for verb in ("UPDATE", "DELETE"):
                    self._db.execute(
                        f"CREATE TRIGGER IF NOT EXISTS {table}_{verb.lower()} BEFORE {verb} ON {table} "
                        "BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END"
                    )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def unit(self, name: str, stage: str) -> Iterator[Unit]:
        """Collect a unit's rows and commit them, with its done-mark, when the block ends without error.

        Raises:
            StoreError: The rows cannot be written (disk full, file gone); nothing of the unit is kept.
        """
        unit = Unit(name, stage)
        yield unit
        try:
            with self._db:
                for table, rows in unit.rows.items():
                    holes = ",".join("?" * len(rows[0]))
                    self._db.executemany(f"INSERT INTO {table} VALUES ({holes})", rows)
                self._db.execute(
                    "INSERT INTO units (name, stage, version, seconds, state) VALUES (?,?,?,?,?)",
                    (name, unit.stage, unit.version, unit.seconds, _json(unit.state)),
                )
        except sqlite3.Error as error:
            raise StoreError(
                f"unit '{name}' could not be written to {self.path}: {error}",
                expected="a writable disk with space left",
                fix="free some space, then continue with `tutelage run --resume`",
            ) from error

    def units(self) -> list[dict[str, Any]]:
        """Finished units in order."""
        return self.rows("units", order="rowid")

    def done(self, name: str) -> bool:
        """Whether a unit is finished."""
        return any(u["name"] == name for u in self.units())

    def rows(self, table: str, *, order: str = "rowid", **where: Any) -> list[dict[str, Any]]:
        """Rows of a table as dictionaries, JSON columns decoded.

        Args:
            table: One of the ledger's tables.
            order: Column to sort by.
            where: Column = value conditions.
        """
        if table not in _TABLES or not order.isidentifier() or not all(k.isidentifier() for k in where):
            raise StoreError(f"no such table or column: {table}", expected=", ".join(_TABLES))
        clause = " AND ".join(f"{k} = ?" for k in where)
        sql = f"SELECT * FROM {table}" + (f" WHERE {clause}" if clause else "") + f" ORDER BY {order}"
        found = []
        for row in self._db.execute(sql, tuple(where.values())):
            item = dict(row)
            for key, value in item.items():
                if isinstance(value, str) and (key in _JSON_COLUMNS or (table, key) in _EXTRA_JSON):
                    item[key] = json.loads(value)
            found.append(item)
        return found


_EXTRA_JSON = {("rewards", "raw"), ("notes", "body")}
