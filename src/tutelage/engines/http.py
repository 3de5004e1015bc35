"""Judge models behind any server that speaks OpenAI's protocol: vLLM, SGLang, Ollama, llama-server, hosted.

A server fails in every way there is. A call that failed never becomes a number: it is repeated where
that can help, and else the answer says why there is none. When nothing is answered any more, the run
waits until the server is back.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import heapq
import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tutelage.engines.exchange import Failure, address, call, connect
from tutelage.engines.limits import Ending, Limits, Pass, Patience, Traffic, Use
from tutelage.engines.replies import Reply
from tutelage.errors import BudgetSpent, ModelError, RecipeError
from tutelage.records import Answer, Cost, Question, content_hash

__all__ = ["KEY_VARIABLE", "HttpEngine", "Stopped"]

KEY_VARIABLE = "TUTELAGE_SERVER_KEY"
_A_TURN = 16  # tokens that chat templates put around a turn, at most; a byte of text is at most one token
_A_NAP = 0.05  # seconds; how often is looked whether a call of another thread has ended
_FIRST_KNOCKS = 3  # calls after which a server that never answered counts as not there


class Stopped(BudgetSpent):
    """The budget is spent. `answers` holds what had been answered before, None elsewhere."""

    answers: tuple[Answer | None, ...] = ()


@dataclasses.dataclass(slots=True)
class _Job:
    """A question on its way."""

    place: int
    question: Question
    body: dict[str, Any]
    most: Use
    tries: int = 0
    heard: int = -1  # answers of the server, to any question, when this one was last sent
    seconds: float = 0.0
    used: Use = dataclasses.field(default_factory=Use)


class HttpEngine:
    """Asks a server, many questions at once.

    Label questions are read from the likeliest tokens that the server lists; where it lists none, or
    no label is among them, the answer holds only text.

    Args:
        model: The model's name for the server.
        url: Address up to and without /chat/completions; without a path, /v1 is meant.
        limits: Rates, concurrency and budget.
        patience: Tries, waits and outages.
        key_variable: Environment variable with the key. It is sent to the host of `url` and nowhere
            else: redirects are not followed. If a variable of the same name with _HOST is set, it
            names the only host (HOST or HOST:PORT) that may have the key.
        prefill: Begin the model's turn with `Question.opening`. vLLM, SGLang and llama-server can; most
            hosted servers cannot, and leave the opening out.
        top_logprobs: How many likely tokens are asked for; 0 for servers that refuse.
        extra: Further fields of the request; None as a value leaves a field out.
        say: Hears of outages.

    `spent` is what was used so far, `tally` counts calls by what became of them.

    Raises:
        ModelError: The `http` extra is missing, the address is none, or the key belongs to another
            host. From `ask`: the server cannot be used at all (wrong key, address or model).
        RecipeError: A field of `extra` cannot be sent.
    """

    def __init__(
        self,
        model: str,
        url: str,
        *,
        limits: Limits | None = None,
        patience: Patience | None = None,
        key_variable: str = KEY_VARIABLE,
        prefill: bool = False,
        top_logprobs: int = 20,
        extra: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.url, self.host = address(url)
        self.name, self.model = model, model
        self.limits, self.patience = limits or Limits(), patience or Patience()
        self.key_variable, self.prefill, self.top_logprobs, self.say = key_variable, prefill, top_logprobs, say
        self.extra = dict(extra or {})
        try:
            self.version = content_hash(["http", self.url, model, prefill, top_logprobs, self.extra])
        except TypeError as error:
            raise RecipeError(f"`extra` cannot be sent: {error}", expected="what JSON can hold") from error
        self._key()
        self.traffic = Traffic(self.limits, self.patience)

    @property
    def spent(self) -> Use:
        """What all calls so far took."""
        return self.traffic.spent

    @property
    def tally(self) -> collections.Counter[str]:
        """Calls by what became of them: answered, declined, malformed, timeout, connection or a status."""
        return self.traffic.tally

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer a question. May be called by several threads: they share the limits.

        Raises:
            Stopped: A limit on calls, tokens or money does not allow another call.
            ModelError: Server, key, address or model are wrong.
        """
        if not _in_loop():
            return asyncio.run(self._ask(questions))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # inside a notebook
            return pool.submit(asyncio.run, self._ask(questions)).result()

    async def _ask(self, questions: Sequence[Question]) -> list[Answer]:
        jobs = [self._job(place, question) for place, question in enumerate(questions)]
        key = self._key()
        async with connect(self.url, key, self.patience.timeout) as client:
            return await _Asking(self, client, jobs, key).run()

    def _job(self, place: int, question: Question) -> _Job:
        turns = [{"role": m.role, "content": _sendable(m.content)} for m in question.messages]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": turns,
            "max_tokens": question.max_new_tokens,
            "temperature": 0.0 if question.labels else question.temperature,
        }
        if question.labels and self.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.prefill and question.opening:
            turns.append({"role": "assistant", "content": _sendable(question.opening)})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if question.schema is not None:
            schema = {"name": "verdict", "schema": dict(question.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        body = {k: v for k, v in (body | self.extra).items() if v is not None}
        texts = [t["content"] for t in turns] + ([json.dumps(question.schema)] if question.schema else [])
        read = sum(len(text.encode()) + _A_TURN for text in texts) + 2 * _A_TURN
        return _Job(place, question, body, Use(1, read, question.max_new_tokens))

    def _key(self) -> str:
        """The key, read anew each time so that no object holds it."""
        key = os.environ.get(self.key_variable, "").strip()
        only = os.environ.get(f"{self.key_variable}_HOST", "").strip()
        if key and only and only not in (self.host, self.host.rpartition(":")[0]):
            raise ModelError(
                f"the key in {self.key_variable} is for {only}, not for {self.host}",
                expected="the host that the key belongs to",
                fix=f"correct the address, or put this host's key and name into {self.key_variable} and _HOST",
            )
        if not all("!" <= c <= "~" for c in key):
            raise ModelError(f"the key in {self.key_variable} holds a space or a character that no header can hold")
        return key


def _sendable(text: str) -> str:
    """Half a surrogate pair, which a judged text may hold, cannot be sent."""
    return text.encode("utf-8", "replace").decode()


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class _Asking:
    """One batch of questions: sends what may be sent, sorts what comes back."""

    def __init__(self, engine: HttpEngine, client: Any, jobs: Sequence[_Job], key: str) -> None:
        self.engine, self.client, self.key = engine, client, key
        self.traffic, self.patience = engine.traffic, engine.patience
        self.answers: list[Answer | None] = [None] * len(jobs)
        self.fresh = collections.deque(jobs)
        self.later: list[tuple[float, int, _Job]] = []  # a heap: when it may be sent again, number of the try, job
        self.again = 0
        self.flying: set[asyncio.Task[None]] = set()

    async def run(self) -> list[Answer]:
        """Until there is an answer to each question."""
        try:
            while self.fresh or self.later or self.flying:
                pause = self._send_what_may()
                if self.flying:
                    patience = None if math.isinf(pause) else pause
                    done, self.flying = await asyncio.wait(
                        self.flying, timeout=patience, return_when=asyncio.FIRST_COMPLETED
                    )
                    await asyncio.gather(*done)  # raises what they raised
                elif self.fresh or self.later:
                    await asyncio.sleep(_A_NAP if math.isinf(pause) else pause)
        except BudgetSpent as spent:
            # Nothing is under way: a call that is could still turn out to leave enough for the next.
            stopped = Stopped(spent.got, expected=spent.expected, fix=spent.fix)
            stopped.answers = tuple(self.answers)
            raise stopped from None
        finally:
            for task in self.flying:
                task.cancel()
            await asyncio.gather(*self.flying, return_exceptions=True)
        return [a for a in self.answers if a is not None]

    def _send_what_may(self) -> float:
        """Begin calls. Gives the seconds until it is worth coming back, infinite when a call must end first."""
        while self.fresh or self.later:
            now = time.monotonic()
            due = bool(self.later) and self.later[0][0] <= now
            pause = 0.0 if due or self.fresh else self.later[0][0] - now
            if not pause:
                job = self.later[0][2] if due else self.fresh[0]
                found = self.traffic.enter(job.most)
                if isinstance(found, Pass):
                    if due:
                        heapq.heappop(self.later)
                    else:
                        self.fresh.popleft()
                    self.flying.add(asyncio.create_task(self._call(job, found)))
                    continue
                pause = found
            left = self.traffic.breaker.left(now)
            if left > 0:
                return min(pause, left)
            self._give_up()
        return math.inf

    async def _call(self, job: _Job, ticket: Pass) -> None:
        """One call, from its pass to its answer or its place in the queue."""
        started = time.monotonic()
        job.tries, job.heard = job.tries + 1, self.traffic.answered
        found: Reply | Failure | None = None
        try:
            found = await call(self.client, job.body, job.question.labels, self.patience.timeout)
        finally:
            used = self._used(job, found)
            job.seconds += time.monotonic() - started
            job.used += used
            self._account(ticket, used, found)
        if isinstance(found, Failure):
            self._failed(job, found)
        elif found.declined:
            self._settle(job, failure=found.declined)
        else:
            text = found.text.removeprefix(job.question.opening).strip() if self.engine.prefill else found.text
            self._settle(job, text=self._clean(text), logps=found.logps, label_logps=found.label_logps)

    def _used(self, job: _Job, found: Reply | Failure | None) -> Use:
        """What a call took. Where the server does not say, the most that it can have been."""
        if isinstance(found, Failure) and found.free:
            return Use(1)
        read = found.tokens_in if isinstance(found, Reply) else None
        written = found.tokens_out if isinstance(found, Reply) else None
        return Use(1, job.most.tokens_in if read is None else read, job.most.tokens_out if written is None else written)

    def _account(self, ticket: Pass, used: Use, found: Reply | Failure | None) -> None:
        breaker = self.traffic.breaker
        was_open, since = breaker.open, breaker.since
        ending: Ending = "answered"
        name, hold = "answered", None
        if found is None:
            ending, name = "gone", "broken off"
        elif isinstance(found, Reply):
            name = "declined" if found.declined else name
        else:
            ending = "busy" if found.busy else "alive" if found.fault == "question" else "failed"
            name, hold = found.name, found.after if found.busy else None
        self.traffic.leave(ticket, used, ending, name=name, hold=hold)
        if breaker.open and not was_open and isinstance(found, Failure):
            self._say(f"is away ({found.reason}); waiting until it is back")
        if was_open and not breaker.open:
            self._say(f"is back after {time.monotonic() - since:.0f} s")

    def _failed(self, job: _Job, failure: Failure) -> None:
        self._stop_if_hopeless(failure)
        # A question is not to blame for what befell it while nobody was answered.
        if failure.fault in ("unreachable", "away") and self.traffic.answered == job.heard:
            job.tries -= 1
        if failure.fault == "question":
            self._settle(job, failure=failure.reason)
        elif job.tries >= self.patience.tries:
            self._settle(job, failure=f"{failure.reason} (the last of {job.tries} tries)", passing=True)
        else:
            wait = self.patience.wait(max(1, job.tries), failure.after, random.random())  # noqa: S311 - no secret
            self.again += 1
            heapq.heappush(self.later, (time.monotonic() + wait, self.again, job))

    def _stop_if_hopeless(self, failure: Failure) -> None:
        """What is wrong with every question is not put to thousands of them."""
        engine, traffic = self.engine, self.traffic
        said = self._clean(failure.reason)
        fix = f"check address and model, and the key in {engine.key_variable}"
        if failure.fault == "settings" and (not traffic.answered or traffic.breaker.open):
            raise ModelError(
                f"the server at {engine.host} refuses: {said}", expected=f"a server that serves {engine.model}", fix=fix
            )
        if traffic.tally["unreachable"] == traffic.spent.calls >= _FIRST_KNOCKS:
            raise ModelError(f"the server at {engine.host} {said}", expected="a server that listens there", fix=fix)
        if failure.fault == "question" and not traffic.answered and traffic.spent.calls >= self.patience.outage:
            raise ModelError(
                f"the server at {engine.host} answered none of {traffic.spent.calls} calls, at last: {said}",
                expected="requests that it understands",
                fix="change the request with `extra`, or set top_logprobs to 0 if it gives no log-probabilities",
            )

    def _give_up(self) -> None:
        waited = f"away for {time.monotonic() - self.traffic.breaker.since:.0f} s"
        for job in (*self.fresh, *(job for _, _, job in self.later)):
            self._settle(job, failure=f"the server at {self.engine.host} was {waited}", passing=True)
        self._say(f"is {waited}; not waiting any longer")
        self.fresh.clear()
        self.later.clear()

    def _settle(self, job: _Job, **found: Any) -> None:
        found["failure"] = self._clean(found.get("failure", ""))
        cost = Cost(job.seconds, job.used.tokens, self.engine.limits.cost(job.used))
        self.answers[job.place] = Answer(**found, cost=cost)

    def _say(self, text: str) -> None:
        self.engine.say(f"{time.strftime('%H:%M:%S')} the server at {self.engine.host} {self._clean(text)}")

    def _clean(self, text: str) -> str:
        """A server can say everything, the key that it was given too."""
        return text.replace(self.key, "[key]") if self.key else text
