"""Units of a run: what is timed, kept whole, and refused when the budget is spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tutelage.errors import BudgetSpent, NothingToLearn
from tutelage.store.ledger import Unit
from tutelage.store.runs import Run

__all__ = ["timed"]


@contextmanager
def timed(run: Run, name: str, stage: str, *, version: Callable[[], str]) -> Iterator[Unit]:
    """A unit of work, timed; refused when the time budget is spent.

    Args:
        run: Whose ledger it goes into.
        name: Of the unit.
        stage: Of the unit; "stopped" when there was nothing to learn, and what was seen is kept.
        version: Asked at the end: the version that the unit leaves.

    Raises:
        BudgetSpent: Earlier units took all the time that the recipe allows.
        NothingToLearn: Handed on, after the unit is kept.
    """
    limit = run.recipe.limits.seconds
    spent = sum(float(u["seconds"]) for u in run.ledger.units())
    if limit is not None and spent >= limit:
        raise BudgetSpent(
            f"the run has used {spent:.0f} s of the {limit:.0f} s it may use",
            expected="limits.seconds above that",
            fix="raise limits.seconds and go on with --resume; nothing is lost",
        )
    began = time.perf_counter()
    stop: NothingToLearn | None = None
    with run.ledger.unit(name, stage) as unit:
        try:
            yield unit
        except NothingToLearn as error:  # what was seen is kept: it says why
            stop, unit.stage = error, "stopped"
        unit.seconds = time.perf_counter() - began
        unit.version = version()
    run.rewrite_metrics()
    if stop is not None:
        raise stop
