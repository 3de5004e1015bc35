"""Rates, concurrency, budget and outages on a clock that the tests turn by hand."""

from __future__ import annotations

import math
import random
import threading
import time
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.engines.limits import (
    Breaker,
    Bucket,
    Budget,
    Concurrency,
    Ending,
    Limits,
    Pass,
    Patience,
    Traffic,
    Use,
    retry_after,
)
from tutelage.errors import BudgetSpent, RecipeError

ENDINGS: list[Ending] = ["answered", "alive", "failed", "busy", "gone"]


class Clock:
    """Seconds, when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# Rates


def test_a_bucket_by_hand():
    """60 a minute: 6 at once, then one every 60 / 55 seconds."""
    bucket = Bucket(60, now=0.0)
    for _ in range(6):
        assert bucket.wait(1, 0.0) == 0.0
        bucket.take(1)
    assert bucket.wait(1, 0.0) == pytest.approx(60 / 55)
    assert bucket.wait(1, 1.0) == pytest.approx(60 / 55 - 1)
    assert bucket.wait(1, 60 / 55) == 0.0
    assert bucket.wait(1, 1e6) == 0.0
    assert bucket.level == 6.0, "an hour's rest saves no more than a bucket"


def test_what_was_not_needed_goes_back_and_what_is_too_large_waits_for_a_full_bucket():
    bucket = Bucket(1000, now=0.0)
    bucket.take(100)
    assert bucket.wait(50, 0.0) == pytest.approx(50 / (901 / 60))
    bucket.take(-60)
    assert bucket.wait(50, 0.0) == 0.0
    assert bucket.wait(5000, 0.0) == pytest.approx(40 / (901 / 60))
    bucket = Bucket(1000, now=0.0)
    assert bucket.wait(5000, 0.0) == 0.0
    bucket.take(5000)
    assert bucket.wait(1, 0.0) == pytest.approx(4901 / (901 / 60)), "the debt is paid off first"


@given(
    per_minute=st.integers(1, 300),
    pauses=st.lists(st.floats(0, 20), min_size=1, max_size=60),
    burst=st.integers(1, 40),
)
def test_no_minute_has_more_calls_than_allowed_and_waiting_as_told_is_enough(
    per_minute: int, pauses: list[float], burst: int
):
    bucket, now, taken = Bucket(per_minute, 0.0), 0.0, []
    for pause in pauses:
        now += pause
        for _ in range(burst):
            now += bucket.wait(1, now)
            assert bucket.wait(1, now) < 1e-6
            bucket.take(1)
            taken.append(now)
    for i, start in enumerate(taken):
        assert sum(t < start + 60 - 1e-6 for t in taken[i:]) <= per_minute
    if len(taken) > per_minute:  # and nine tenths of what is allowed are used by who wants them
        hungry = (len(taken) - bucket.size) / bucket.rate
        assert now <= sum(pauses) + hungry + 60 / per_minute


def test_no_limit_never_waits():
    bucket = Bucket(math.inf, 0.0)
    bucket.take(1e12)
    assert bucket.wait(1e12, 0.0) == 0.0


# Concurrency


def test_concurrency_doubles_until_the_server_is_busy_and_then_feels_its_way():
    gate = Concurrency(most=64)

    def window(ending: Ending) -> int:
        tickets = [gate.enter() for _ in range(gate.limit)]
        for ticket in tickets:
            gate.leave(ending, ticket)
        return gate.limit

    assert [window("answered") for _ in range(4)] == [8, 16, 32, 64]
    assert window("answered") == 64
    assert window("busy") == 32, "one window of complaints halves it once"
    assert [window("answered") for _ in range(3)] == [33, 34, 35]
    assert window("busy") == 17
    assert window("failed") == 17, "other failures say nothing about load"
    assert [window("busy") for _ in range(6)] == [8, 4, 2, 1, 1, 1]
    assert gate.flying == 0


@given(most=st.integers(1, 100), endings=st.lists(st.sampled_from(ENDINGS), max_size=300))
def test_concurrency_stays_in_its_bounds(most: int, endings: list[Ending]):
    gate, tickets = Concurrency(most), []
    for ending in endings:
        while gate.flying < gate.limit:
            tickets.append(gate.enter())
        gate.leave(ending, tickets.pop(0))
        assert 1 <= gate.limit <= most
        assert gate.flying == len(tickets)


# Budget


def test_a_budget_by_hand():
    """3 per million read and 15 per million written: 1000 and 100 tokens are 0.003 + 0.0015."""
    limits = Limits(money=0.0100, price_in=3.0, price_out=15.0)
    assert limits.cost(Use(1, 1000, 100)) == pytest.approx(0.0045)
    budget = Budget(limits)
    most = Use(1, 1000, 100)
    budget.reserve(most)
    budget.reserve(most)
    assert budget.lacks(most).startswith("money: 0 of 0.01")
    budget.settle(most, Use(1, 1000, 10))
    budget.settle(most, Use(1, 200, 0))
    assert (budget.spent, budget.reserved) == (Use(2, 1200, 10), Use())
    assert budget.lacks(most) == ""
    assert Budget(Limits(calls=1)).lacks(Use(2)).startswith("calls: 0 of 1")
    assert Budget(Limits(tokens=1099)).lacks(most).startswith("tokens: 0 of 1099")


@given(
    limits=st.builds(
        Limits,
        parallel=st.integers(1, 8), calls=st.integers(1, 30), tokens=st.integers(50, 3000),
        money=st.floats(1e-5, 1e-2), price_in=st.floats(0.1, 5), price_out=st.floats(0.1, 20),
    ),
    sizes=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=60),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_nothing_is_ever_overspent(limits: Limits, sizes: list[tuple[int, int, float]], seed: int):
    """Calls begin when they may and end in any order, having taken any part of what they could."""
    dice, clock = random.Random(seed), Clock()
    traffic = Traffic(limits, Patience(), clock)
    under_way: list[tuple[Pass, Use]] = []
    stopped = False
    for read, written, share in sizes:
        most = Use(1, read, written)
        try:
            found = traffic.enter(most)
        except BudgetSpent:
            assert not under_way, "what is under way may take less than was put aside"
            stopped = True
            break
        if isinstance(found, Pass):
            under_way.append((found, Use(1, int(read * share), int(written * share))))
        if under_way and (not isinstance(found, Pass) or dice.random() < 0.5):
            ticket, used = under_way.pop(dice.randrange(len(under_way)))
            traffic.leave(ticket, used, dice.choice(["answered", "failed"]), name="x")
            clock.now += 100
        then = traffic.spent
        assert then.calls <= limits.calls and then.tokens <= limits.tokens and limits.cost(then) <= limits.money + 1e-12
    if not stopped and not under_way:
        assert traffic.budget.reserved == Use()


def test_a_spent_budget_says_what_is_spent():
    traffic = Traffic(Limits(calls=1), Patience(), Clock())
    ticket = traffic.enter(Use(1))
    assert isinstance(ticket, Pass)
    assert traffic.enter(Use(1)) == math.inf, "the call under way is waited for"
    traffic.leave(ticket, Use(1), "answered", name="answered")
    with pytest.raises(BudgetSpent, match="calls: 1 of 1 spent") as caught:
        traffic.enter(Use(1))
    assert "raise the limit" in str(caught.value)


# Outages


def test_an_outage_by_hand():
    breaker = Breaker(Patience(outage=3, first_wait=1.0, longest_wait=5.0, give_up=100.0))
    for now in (10.0, 11.0):
        breaker.leave("failed", now, probe=breaker.enter())
    assert breaker.wait(11.0) == 0.0 and breaker.left(11.0) == math.inf
    late = breaker.enter()
    breaker.leave("busy", 12.0, probe=breaker.enter())
    assert breaker.open
    assert (breaker.since, breaker.wait(12.0), breaker.wait(12.4)) == (10.0, 1.0, pytest.approx(0.6))
    breaker.leave("failed", 12.5, probe=late)
    assert breaker.wait(12.5) == 0.5, "who had left before the outage was noticed is no probe"
    now, waits = 13.0, []
    for _ in range(5):
        probe = breaker.enter()
        assert probe and breaker.wait(now) == math.inf and breaker.left(now) == math.inf, "one probe at a time"
        breaker.leave("failed", now, probe=probe)
        waits.append(breaker.wait(now))
        now += waits[-1]
    assert waits == [2.0, 4.0, 5.0, 5.0, 5.0]
    assert breaker.left(now) == pytest.approx(100.0 - (now - 10.0))
    breaker.leave("gone", now, probe=breaker.enter())
    assert breaker.open and breaker.wait(now) == 0.0, "a probe that was broken off found nothing out"
    breaker.leave("answered", now, probe=breaker.enter())
    assert not breaker.open and breaker.wait(now) == 0.0
    for later in range(2):
        breaker.leave("failed", now + later, probe=False)
    assert not breaker.open, "counting begins anew"
    breaker.leave("failed", now + 3, probe=False)
    assert breaker.wait(now + 3) == 1.0, "and so do the waits"


@given(st.lists(st.sampled_from(ENDINGS), max_size=100), st.integers(1, 12))
def test_only_failures_in_a_row_are_an_outage(endings: list[Ending], outage: int):
    breaker, row = Breaker(Patience(outage=outage)), 0
    for now, ending in enumerate(endings):
        row = {"failed": row + 1, "busy": row + 1, "gone": row}.get(ending, 0)
        breaker.leave(ending, float(now), probe=breaker.enter())
        assert breaker.open == (row >= outage)


# Waiting


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, None), ("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("nan", None), ("inf", None), ("soon", None), ("", None),
        (formatdate(1030, usegmt=True), 30.0), (formatdate(900, usegmt=True), 0.0),
        ("Wed, 99 Foo 2024 00:00:00 GMT", None), ("9" * 400, None),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(value: str | None, wanted: float | None):
    assert retry_after(value, 1000.0) == wanted


@given(st.text(max_size=40))
def test_retry_after_reads_anything(value: str):
    found = retry_after(value, 0.0)
    assert found is None or 0.0 <= found < math.inf


def test_waits_double_are_drawn_below_that_and_never_exceed_the_longest():
    patience = Patience(first_wait=1.0, longest_wait=10.0)
    assert [patience.wait(n, None, 0.999999) for n in (1, 2, 3, 4, 5, 5000)] == pytest.approx(
        [1, 2, 4, 8, 10, 10], rel=1e-5
    )
    assert patience.wait(4, None, 0.25) == 2.0
    assert patience.wait(1, 3.0, 0.5) == 3.5
    assert patience.wait(1, 86400.0, 0.0) == 10.0, "a server that asks for a day is asked again before"


def test_a_busy_server_can_ask_all_to_hold():
    clock = Clock()
    traffic = Traffic(Limits(), Patience(longest_wait=20.0), clock)
    first, second = traffic.enter(Use(1)), traffic.enter(Use(1))
    assert isinstance(first, Pass) and isinstance(second, Pass)
    traffic.leave(first, Use(1), "busy", name="429", hold=7.0)
    assert traffic.enter(Use(1)) == 7.0
    clock.now += 5
    assert traffic.enter(Use(1)) == 2.0
    traffic.leave(second, Use(1), "busy", name="429", hold=3600.0)
    assert traffic.enter(Use(1)) == 20.0, "but not for longer than anybody waits"
    clock.now += 20
    assert isinstance(traffic.enter(Use(1)), Pass)
    assert traffic.tally == {"429": 2}


def test_threads_share_the_limits():
    traffic = Traffic(Limits(parallel=5, calls=400), Patience())
    seen: list[int] = []

    def work() -> None:
        while True:
            try:
                found = traffic.enter(Use(1, 3, 2))
            except BudgetSpent:
                return
            if isinstance(found, Pass):
                seen.append(traffic.concurrency.flying)
                time.sleep(0)
                traffic.leave(found, Use(1, 2, 1), "answered", name="answered")

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert traffic.spent == Use(400, 800, 400)
    assert traffic.tally == {"answered": 400} and traffic.answered == 400
    assert max(seen) <= 5
    assert traffic.budget.reserved == Use()


@pytest.mark.parametrize("name", ["calls_per_minute", "tokens_per_minute", "parallel", "calls", "tokens", "money"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_limits_are_positive(name: str, value: float):
    with pytest.raises(RecipeError, match=name):
        Limits(**{name: value, "price_in": 1.0})


def test_money_needs_prices_and_times_are_positive():
    with pytest.raises(RecipeError, match="no price"):
        Limits(money=1.0)
    with pytest.raises(RecipeError, match="price_out"):
        Limits(price_out=-1.0)
    with pytest.raises(RecipeError, match="timeout"):
        Patience(timeout=0)
