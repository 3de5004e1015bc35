"""How fast, how much and how stubbornly a server is asked: rates, concurrency, budget, outages.

No input, no output, no sleep and no clock of its own: `Traffic` is told when a call wants to begin and
how it ended, and answers in seconds to wait. It may be shared by threads; its parts may not.
"""

from __future__ import annotations

import dataclasses
import email.utils
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal

from tutelage.errors import BudgetSpent, RecipeError

__all__ = [
    "Breaker",
    "Bucket",
    "Budget",
    "Concurrency",
    "Ending",
    "Limits",
    "Patience",
    "Traffic",
    "Use",
    "retry_after",
]

# With an answer; with a refusal that only a living server gives; with none; none, for it is busy; we broke it off.
Ending = Literal["answered", "alive", "failed", "busy", "gone"]

_MILLION = 1e6
_BURST = 0.1  # share of a minute's allowance that may go out at once
_FIRST_CALLS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
    """What calls took: their number, tokens read and tokens written."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return self.tokens_in + self.tokens_out

    def __add__(self, other: Use) -> Use:
        return Use(self.calls + other.calls, self.tokens_in + other.tokens_in, self.tokens_out + other.tokens_out)

    def __sub__(self, other: Use) -> Use:
        return Use(self.calls - other.calls, self.tokens_in - other.tokens_in, self.tokens_out - other.tokens_out)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What may be asked of a server. Infinite means no limit.

    Args:
        calls_per_minute: Calls begun in any 60 seconds.
        tokens_per_minute: Tokens in any 60 seconds; a call counts as the most it can take until it has ended.
        parallel: Calls under way at once, at most; how many it really is adapts to the server.
        calls: Calls in all. Repeated calls count.
        tokens: Tokens read and written in all.
        money: Money in all, in the currency of the prices.
        price_in: Price of a million tokens read.
        price_out: Price of a million tokens written.

    Raises:
        RecipeError: A limit is no positive number, or money is limited and nothing has a price.
    """

    calls_per_minute: float = math.inf
    tokens_per_minute: float = math.inf
    parallel: int = 64
    calls: float = math.inf
    tokens: float = math.inf
    money: float = math.inf
    price_in: float = 0.0
    price_out: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            free = field.name.startswith("price") and value == 0
            if not value > 0 and not free:
                raise RecipeError(f"{field.name} is {value}", expected="a number above 0")
        if math.isfinite(self.money) and not self.price_in + self.price_out > 0:
            raise RecipeError(
                f"money is limited to {self.money:g}, but tokens have no price",
                expected="the server's prices with the limit",
                fix="set price_in and price_out, per million tokens",
            )

    def cost(self, use: Use) -> float:
        """Money for tokens."""
        return (use.tokens_in * self.price_in + use.tokens_out * self.price_out) / _MILLION


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a server is waited for. Times are in seconds.

    Args:
        tries: Calls that one question may take.
        timeout: Longest call, from connecting to the last byte.
        first_wait: Wait before the second try, doubled before each further one (and drawn at random below that).
        longest_wait: Longest wait between two tries, whatever the server asks for.
        outage: Calls that fail in a row, of all questions, until the server counts as away.
        give_up: Longest outage that is waited for; then what is left fails.

    Raises:
        RecipeError: One of them is no positive number.
    """

    tries: int = 5
    timeout: float = 120.0
    first_wait: float = 1.0
    longest_wait: float = 60.0
    outage: int = 10
    give_up: float = math.inf

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise RecipeError(f"{field.name} is {getattr(self, field.name)}", expected="a number above 0")

    def wait(self, tries: int, asked: float | None, chance: float) -> float:
        """Seconds until the next try.

        Args:
            tries: Tries so far, at least 1.
            asked: What the server asked for (Retry-After), if it did.
            chance: Uniform in [0, 1): full jitter, so that calls that failed together come back apart
                (Brooker 2015, Exponential Backoff And Jitter).
        """
        if asked is not None:
            return min(asked, self.longest_wait) + chance * self.first_wait
        return chance * min(self.longest_wait, self.first_wait * 2.0 ** min(tries - 1, 60))


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for, or None where it says nothing that can be understood.

    Args:
        value: Seconds, or a date as in RFC 9110, section 10.2.3.
        now: Seconds since 1970, for dates.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, TypeError, OverflowError, OSError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


class Bucket:
    """A token bucket: in no 60 seconds more than `per_minute` units are taken, one at a time.

    It holds a tenth of a minute's allowance and fills so slowly that a full bucket and a minute's
    filling are together the allowance. What is larger than the bucket waits until it is full.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self.size = max(1.0, per_minute * _BURST)
        self.rate = (per_minute - self.size + 1.0) / 60.0
        self.level, self._at = self.size, now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; 0 means now."""
        if math.isinf(self.size):
            return 0.0
        self.level = min(self.size, self.level + max(0.0, now - self._at) * self.rate)
        self._at = max(now, self._at)
        missing = min(amount, self.size) - self.level
        return missing / self.rate if missing > 1e-9 else 0.0

    def take(self, amount: float) -> None:
        """Take it, or give it back where `amount` is negative."""
        if not math.isinf(self.size):
            self.level = min(self.size, self.level - amount)


class Concurrency:
    """Additive increase, multiplicative decrease, as TCP does (Chiu and Jain 1989).

    The limit doubles with each window of calls that went well until the server is busy for the first
    time, then grows by one a window. A busy server halves it, once for all calls of one window.
    """

    def __init__(self, most: int) -> None:
        self.most, self.limit = most, min(most, _FIRST_CALLS)
        self.flying = 0
        self._good, self._window, self._slow_start = 0, 0, True

    def enter(self) -> int:
        """A call begins; gives the window it belongs to."""
        self.flying += 1
        return self._window

    def leave(self, ending: Ending, window: int) -> None:
        """A call of a window has ended."""
        self.flying -= 1
        if ending == "busy":
            if window == self._window:
                self.limit, self._good, self._slow_start = max(1, self.limit // 2), 0, False
                self._window += 1
        elif ending in ("answered", "alive"):
            self._good += 1
            if self._good >= self.limit:
                self.limit = min(self.most, self.limit * 2 if self._slow_start else self.limit + 1)
                self._good = 0


class Budget:
    """What may be spent in all. The most a call can take is put aside before it begins, so nothing is overspent."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.spent, self.reserved = Use(), Use()

    def lacks(self, most: Use) -> str:
        """What is too little for one more call, in words; empty when it can be made."""
        limits, then = self.limits, self.spent + self.reserved + most
        for name, wanted, allowed in (
            ("calls", then.calls, limits.calls),
            ("tokens", then.tokens, limits.tokens),
            ("money", limits.cost(then), limits.money),
        ):
            if wanted > allowed:
                spent = limits.cost(self.spent) if name == "money" else getattr(self.spent, name)
                return f"{name}: {spent:g} of {allowed:g} spent, one more call could take {wanted - spent:g}"
        return ""

    def reserve(self, most: Use) -> None:
        """Put the most that a call can take aside."""
        self.reserved += most

    def settle(self, most: Use, used: Use) -> None:
        """The call has ended and took this."""
        self.reserved -= most
        self.spent += used


class Breaker:
    """Notices an outage: calls that failed in a row, none answered in between. Then one call at a time probes."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.failed, self.since = 0, 0.0
        self.open, self.probing = False, False
        self._next, self._interval = 0.0, patience.first_wait

    def wait(self, now: float) -> float:
        """Seconds until a call may begin: 0 means now, infinite that a probe is under way."""
        if not self.open:
            return 0.0
        return math.inf if self.probing else max(0.0, self._next - now)

    def left(self, now: float) -> float:
        """Seconds for which the outage will still be waited for; infinite while a probe is under way."""
        if not self.open or self.probing:
            return math.inf
        return self.since + self.patience.give_up - now

    def enter(self) -> bool:
        """A call begins; tells whether it is a probe."""
        self.probing = self.open
        return self.open

    def leave(self, ending: Ending, now: float, *, probe: bool) -> None:
        """A call has ended."""
        if ending in ("answered", "alive"):
            self.failed, self.open, self.probing = 0, False, False
            self._interval = self.patience.first_wait
            return
        if ending == "gone":
            self.probing = self.probing and not probe
            return
        self.failed += 1
        if self.failed == 1:
            self.since = now
        if probe and self.open:
            self.probing = False
            self._interval = min(self.patience.longest_wait, self._interval * 2)
            self._next = now + self._interval
        elif not self.open and self.failed >= self.patience.outage:
            self.open, self._next = True, now + self._interval


@dataclasses.dataclass(frozen=True, slots=True)
class Pass:
    """A call that may begin. `leave` wants it back.

    Args:
        most: The most that the call can take.
        window: The window of calls it belongs to.
        probe: It is to find out whether an outage is over.
    """

    most: Use
    window: int
    probe: bool


class Traffic:
    """All of the above for one server.

    Args:
        limits: What may be asked.
        patience: How long is waited.
        clock: Seconds that only grow.

    `tally` counts calls by what became of them; `spent` is what they took.
    """

    def __init__(self, limits: Limits, patience: Patience, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self.patience, self.clock = limits, patience, clock
        now = clock()
        self._calls, self._tokens = Bucket(limits.calls_per_minute, now), Bucket(limits.tokens_per_minute, now)
        self.concurrency, self.budget, self.breaker = Concurrency(limits.parallel), Budget(limits), Breaker(patience)
        self.tally: Counter[str] = Counter()
        self.answered = 0
        self._hold = -math.inf
        self._lock = threading.Lock()

    @property
    def spent(self) -> Use:
        """What all calls that have ended took."""
        return self.budget.spent

    def enter(self, most: Use) -> Pass | float:
        """A call wants to begin.

        Args:
            most: The most that it can take.

        Returns:
            Its pass; or the seconds until it is worth asking again, infinite when another call has to end first.

        Raises:
            BudgetSpent: It cannot be paid any more, whatever the calls under way take.
        """
        with self._lock:
            now = self.clock()
            pause = max(self._hold - now, self.breaker.wait(now))
            if pause > 0:
                return pause
            if self.concurrency.flying >= self.concurrency.limit:
                return math.inf
            pause = max(self._calls.wait(1, now), self._tokens.wait(most.tokens, now))
            if pause > 0:
                return pause
            lacks = self.budget.lacks(most)
            if lacks and self.concurrency.flying:
                return math.inf  # calls under way may take less than was put aside
            if lacks:
                raise BudgetSpent(
                    f"the budget is spent ({lacks})",
                    expected="room for one more call",
                    fix="raise the limit and resume the run: answers so far are kept",
                )
            self._calls.take(1)
            self._tokens.take(most.tokens)
            self.budget.reserve(most)
            return Pass(most, self.concurrency.enter(), self.breaker.enter())

    def leave(self, ticket: Pass, used: Use, ending: Ending, *, name: str, hold: float | None = None) -> None:
        """A call has ended.

        Args:
            ticket: As `enter` gave it.
            used: What the call took.
            ending: How it ended.
            name: What became of it, for the tally.
            hold: Seconds for which the server wants no call at all.
        """
        with self._lock:
            now = self.clock()
            self._tokens.take(used.tokens - ticket.most.tokens)
            self.budget.settle(ticket.most, used)
            self.concurrency.leave(ending, ticket.window)
            self.breaker.leave(ending, now, probe=ticket.probe)
            self.answered += ending == "answered"
            self.tally[name] += 1
            if hold is not None:
                self._hold = max(self._hold, now + min(hold, self.patience.longest_wait))
