"""The error tree: as drawn, picklable, and every message says what to do."""

from __future__ import annotations

import pickle
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tutelage import errors
from tutelage.errors import RunBusy, StoreError, TutelageError

ALL = [getattr(errors, name) for name in errors.__all__]


def test_the_tree_is_as_drawn() -> None:
    """Name, parent and exit code of every class stand in the module's drawing."""
    drawn: dict[str, str] = {}
    above = ["TutelageError"]
    for mark, name in re.findall(r"^\s+((?:\| {3})*[|`]-- )(\w+)", errors.__doc__ or "", re.MULTILINE):
        depth = len(mark) // 4
        above[depth:] = [name]
        drawn[name] = above[depth - 1]
    assert drawn == {kind.__name__: kind.__base__.__name__ for kind in ALL if kind is not TutelageError}


@pytest.mark.parametrize(
    ("name", "code"), [("GateRejected", 3), ("JudgeRefused", 4), ("BudgetSpent", 5), ("Interrupted", 130)]
)
def test_exit_codes(name: str, code: int) -> None:
    assert getattr(errors, name).exit_code == code


def test_everything_else_exits_with_two() -> None:
    special = {"GateRejected", "JudgeRefused", "BudgetSpent", "Interrupted"}
    assert {kind.exit_code for kind in ALL if kind.__name__ not in special} == {2}


def test_messages_say_got_expected_and_what_to_do() -> None:
    error = StoreError("the disk is full", expected="some space", fix="free it")
    assert str(error) == "the disk is full\n  expected: some space\n  what to do: free it"
    assert str(StoreError("no")) == "no"
    assert str(StoreError("no", fix="wait")) == "no\n  what to do: wait"
    assert (error.got, error.expected, error.fix) == ("the disk is full", "some space", "free it")


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_errors_survive_pickling(kind: type[TutelageError]) -> None:
    back = pickle.loads(pickle.dumps(kind("gót", expected="e", fix="f")))  # noqa: S301
    assert type(back) is kind
    assert str(back) == str(kind("gót", expected="e", fix="f"))
    assert back.exit_code == kind.exit_code


def test_errors_cross_a_process_boundary() -> None:
    with (
        ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool,
        pytest.raises(RunBusy, match="taken") as caught,
    ):
        pool.submit(_busy).result()
    assert caught.value.fix == "wait"
    assert isinstance(caught.value, StoreError)


def _busy() -> None:
    raise RunBusy("taken", fix="wait")
