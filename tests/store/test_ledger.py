"""The ledger only grows, keeps whole units or nothing, and gives back what went in."""

from __future__ import annotations

import dataclasses
import math
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tutelage.errors import StoreError
from tutelage.records import (
    Cost,
    Decision,
    Evidence,
    Generation,
    Message,
    Prompt,
    Reward,
    SamplerSettings,
    Target,
    Verdict,
)
from tutelage.store.ledger import Ledger, Unit

PROMPT = Prompt("p1", (Message("system", "Be brief."), Message("user", "Où est 東京? \u2028 'quoted'")), "e1")
SETTINGS = SamplerSettings(temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=12)
GENERATION = Generation("g1", "p1", 0, "Je ne sais pas.", (5, 6, 2), (-0.25, -1.5, -0.125), True, SETTINGS, "r1", 2**40)
VERDICT = Verdict(
    "critic", "abc", "g1", PROMPT.hash, 0.75, "looks right", {"act": {"answers": 0.75}}, Cost(0.5, 12, 0.01),
    ((0, 4, "here"),), "raw [1] text", ("g1", "g2"),
)  # fmt: skip
ABSTENTION = Verdict("consistency", "def", "g2", PROMPT.hash, None, "too few replies")
REWARD = Reward("g1", -0.5, {"fit": -0.5, "text": None}, {"fit": 0.25, "text": None}, {"over_abstention": 0.125})
DECISION = Decision(
    "held-out", "r1", "start", False, "not sure enough",
    (Evidence("honesty-gate", "made_up", 0.5, 0.25, -0.5, 0.125, 40), Evidence("s", "m", None, None, None, None, 0)),
)  # fmt: skip


def fill(unit: Unit) -> None:
    """One row or two in every table."""
    unit.version, unit.seconds, unit.state = "r1", 1.5, {"next": 2, "seeds": [1, 2]}
    unit.prompts([PROMPT], "train")
    unit.generations([GENERATION])
    unit.verdicts([VERDICT, ABSTENTION])
    unit.rewards([REWARD, Reward("g2", None, {"fit": None})])
    unit.credit("g1", "attention", 0.5, [0.125, 0.375])
    unit.targets([Target("p1", "I don't know.", "revised", "admit", "made up", 0.5)])
    unit.metrics(3, "update", {"loss": 0.5, "kl": math.nan, "ratio": math.inf})
    unit.outcome("honesty-gate", "r1", "i1", "Who?", "unanswerable", "plain", "Bob.", "wrong", "")
    unit.decision(DECISION)
    unit.note("failures", ["none", {"deep": [1, None]}])


TABLES = (
    "units", "prompts", "generations", "verdicts", "rewards", "credits", "targets", "metrics", "outcomes",
    "decisions", "notes",
)  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with one filled unit, written once: flushing to disk takes time."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    ledger = Ledger(path)
    with ledger.unit("round-1", "round") as unit:
        fill(unit)
    ledger.close()
    return path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    """A copy for one test."""
    return Path(shutil.copy(template, tmp_path))


@pytest.fixture
def ledger(path: Path) -> Any:
    opened = Ledger(path)
    yield opened
    opened.close()


def write(ledger: Ledger, name: str, then: Callable[[Unit], object]) -> None:
    """A filled unit, and something more at the end of its block."""
    with ledger.unit(name, "round") as unit:
        fill(unit)
        then(unit)


def stumble(_: Unit) -> None:
    raise KeyError


def dump(path: Path) -> list[str]:
    with sqlite3.connect(path) as db:
        found = list(db.iterdump())
    db.close()
    return found


def test_a_unit_is_kept_under_the_stage_that_it_ends_in(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    with ledger.unit("round-1", "grpo") as unit:
        unit.stage = "stopped"
    assert [u["stage"] for u in ledger.units()] == ["stopped"]
    ledger.close()


def test_every_record_comes_back(ledger: Ledger) -> None:
    (unit,) = ledger.units()
    assert (unit["name"], unit["stage"], unit["version"], unit["seconds"]) == ("round-1", "round", "r1", 1.5)
    assert unit["state"] == {"next": 2, "seeds": [1, 2]}
    (prompt,) = ledger.rows("prompts")
    assert prompt["messages"] == [dataclasses.asdict(m) for m in PROMPT.messages]
    assert (prompt["id"], prompt["split"], prompt["hash"]) == ("p1", "train", PROMPT.hash)
    (reply,) = ledger.rows("generations")
    assert reply.pop("unit") == "round-1"
    assert Generation(**{
        **reply, "tokens": tuple(reply["tokens"]), "logps": tuple(reply["logps"]),
        "finished": bool(reply["finished"]), "settings": SamplerSettings(**reply["settings"]),
    }) == GENERATION  # fmt: skip
    verdict, abstention = ledger.rows("verdicts")
    assert verdict.pop("unit") == "round-1"
    verdict["order"] = tuple(verdict.pop("shown"))
    verdict["cost"] = Cost(**verdict["cost"])
    verdict["spans"] = tuple(tuple(s) for s in verdict["spans"])
    assert Verdict(**verdict) == VERDICT
    assert abstention["value"] is None  # never 0
    reward, nothing = ledger.rows("rewards")
    assert reward.pop("unit") == "round-1"
    assert Reward(**reward) == REWARD
    assert nothing["total"] is None
    (credit,) = ledger.rows("credits")
    assert (credit["method"], credit["advantage"], credit["credit"]) == ("attention", 0.5, [0.125, 0.375])
    (target,) = ledger.rows("targets")
    assert Target(**{k: v for k, v in target.items() if k != "unit"}).origin == "revised"
    (outcome,) = ledger.rows("outcomes")
    assert list(outcome.values()) == [
        "round-1", "honesty-gate", "r1", "i1", "Who?", "unanswerable", "plain", "Bob.", "wrong", "",
    ]  # fmt: skip
    (decision,) = ledger.rows("decisions")
    assert tuple(Evidence(**e) for e in decision["evidence"]) == DECISION.evidence
    assert (decision["gate"], decision["accepted"], decision["reason"]) == ("held-out", 0, "not sure enough")
    (note,) = ledger.rows("notes")
    assert note["body"] == ["none", {"deep": [1, None]}]


def test_figures_that_are_not_finite_are_a_gap(ledger: Ledger) -> None:
    (row,) = ledger.rows("metrics")
    assert (row["unit"], row["step"], row["stage"], row["values"]) == ("round-1", 3, "update", {"loss": 0.5})


def test_rows_can_be_chosen_and_sorted(ledger: Ledger) -> None:
    assert [v["subject"] for v in ledger.rows("verdicts", judge="critic")] == ["g1"]
    assert [v["judge"] for v in ledger.rows("verdicts", order="judge")] == ["consistency", "critic"]
    assert ledger.rows("verdicts", judge="' OR 1=1 --") == []
    for table, order in (
        ("sqlite_master", "rowid"),
        ("units; DROP TABLE units", "rowid"),
        ("units", "1; DROP"),
    ):
        with pytest.raises(StoreError):
            ledger.rows(table, order=order)


@pytest.mark.parametrize("table", TABLES)
def test_triggers_refuse_every_change(path: Path, table: str) -> None:
    before = dump(path)
    with sqlite3.connect(path) as db:
        column = db.execute("SELECT name FROM pragma_table_info(?)", (table,)).fetchone()[0]
        assert db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] > 0  # noqa: S608 (a name from TABLES)
        update = f'UPDATE {table} SET "{column}" = "{column}"'  # noqa: S608
        for sql in (update, f"DELETE FROM {table}"):  # noqa: S608
            with pytest.raises(sqlite3.IntegrityError, match="only grows"):
                db.execute(sql)
    db.close()
    assert dump(path) == before


def test_triggers_cover_all_tables(path: Path) -> None:
    with sqlite3.connect(path) as db:
        found = {r[0] for r in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    db.close()
    assert found == set(TABLES)


def test_an_error_inside_the_block_leaves_nothing(ledger: Ledger, path: Path) -> None:
    before = dump(path)
    with pytest.raises(KeyError):
        write(ledger, "round-2", stumble)
    assert dump(path) == before
    assert not ledger.done("round-2")
    with ledger.unit("round-2", "round") as unit:
        fill(unit)
    assert [u["name"] for u in ledger.units()] == ["round-1", "round-2"]
    assert len(ledger.rows("generations", unit="round-2")) == 1


@pytest.mark.parametrize("spoil", ["same name", "bad row"])
def test_a_unit_that_cannot_be_written_leaves_nothing(ledger: Ledger, path: Path, spoil: str) -> None:
    before = dump(path)
    name = "round-1" if spoil == "same name" else "round-2"
    # NULL where the schema wants text, in the last table that is written.
    spoiled = (lambda unit: unit.note(None, 1)) if spoil == "bad row" else (lambda _: None)
    with pytest.raises(StoreError, match=name):
        write(ledger, name, spoiled)
    assert dump(path) == before
    assert not ledger.done("round-2")


def test_nothing_is_there_before_the_block_ends(ledger: Ledger, path: Path) -> None:
    """A reader in the middle of a unit sees the state before it."""
    with ledger.unit("round-2", "round") as unit:
        fill(unit)
        reader = Ledger(path, readonly=True)
        assert [u["name"] for u in reader.units()] == ["round-1"]
        reader.close()
    reader = Ledger(path, readonly=True)
    assert reader.done("round-2")
    reader.close()


def test_a_reader_cannot_write(path: Path) -> None:
    reader = Ledger(path, readonly=True)
    with pytest.raises(StoreError), reader.unit("round-2", "round") as unit:
        fill(unit)
    reader.close()


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, however long this text may be " * 50, encoding="utf-8")
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (x)").connection.close()
    for name, readonly in (("text.db", False), ("text.db", True), ("other.db", True), ("missing.db", True)):
        with pytest.raises(StoreError, match=name):
            Ledger(tmp_path / name, readonly=readonly)
    with pytest.raises(StoreError):
        Ledger(tmp_path / "no" / "folder" / "ledger.db")
    assert not (tmp_path / "missing.db").exists()


def test_an_old_ledger_is_opened_again_as_it_is(path: Path) -> None:
    before = dump(path)
    Ledger(path).close()
    assert dump(path) == before


_FULL_DISK = """
import resource, sys
from pathlib import Path
from tutelage.errors import StoreError
from tutelage.store.ledger import Ledger

path = Path(sys.argv[1])
ledger = Ledger(path)
size = path.stat().st_size + 20_000
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
try:
    with ledger.unit("round-2", "round") as unit:
        unit.note("big", "x" * 400_000)
except StoreError as error:
    print("refused:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert not ledger.done("round-2")
with ledger.unit("round-2", "round") as unit:
    unit.note("small", 1)
print([u["name"] for u in ledger.units()])
"""


def test_a_full_disk_is_a_store_error_and_the_ledger_stays_whole(path: Path, child_env: dict[str, str]) -> None:
    """A limit on the file's size stands in for the full disk: the write fails half way through the unit."""
    command = [sys.executable, "-c", _FULL_DISK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=child_env)
    assert done.returncode == 0, done.stderr
    assert "refused: unit 'round-2' could not be written" in done.stdout
    assert "['round-1', 'round-2']" in done.stdout
    reader = Ledger(path, readonly=True)
    assert [n["topic"] for n in reader.rows("notes")] == ["failures", "small"]
    reader.close()


_KILLED = """
import os, signal, sys
from pathlib import Path
from tutelage.store.ledger import Ledger

ledger = Ledger(Path(sys.argv[1]))
ledger._db.execute("BEGIN")
ledger._db.execute("INSERT INTO notes VALUES ('round-2', 'half', '1')")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_last_whole_unit(path: Path, child_env: dict[str, str]) -> None:
    before = dump(path)
    done = subprocess.run([sys.executable, "-c", _KILLED, str(path)], check=False, env=child_env)
    assert done.returncode == -9
    assert dump(path) == before
    Ledger(path).close()
    assert dump(path) == before
