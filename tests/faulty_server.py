"""A chat-completions server on loopback whose answers are known beforehand, and which fails in many ways.

What it answers is a function of the question's text alone (`truth`), so that a test can tell a right
number from an invented one. Which calls go wrong, and how, is drawn from the seed, the question's text
and how often it was asked: the same whatever the order in which threads come along. Only the standard
library is used, and one function call a line of HTTP: the server must not be what a test waits for.
"""

from __future__ import annotations

import contextlib
import email.utils
import gzip
import hashlib
import json
import math
import random
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["FAULTS", "FINAL", "SLOW", "FaultyServer", "completion", "serve", "truth"]

Body = Any  # parsed JSON of a request
BIG = 10_000_000


def truth(text: str, labels: str = "AB") -> dict[str, float]:
    """Log-probabilities that the server gives the labels as the answer to a question that ends with `text`."""
    raw = hashlib.sha256(text.encode()).digest()
    weights = [1 + raw[i] for i in range(len(labels))]
    return {label: math.log(0.9 * w / sum(weights)) for label, w in zip(labels, weights, strict=True)}


def completion(body: Body, **changes: Any) -> dict[str, Any]:
    """The right answer: each label is spread over two ways to write it, and other words are likely as well."""
    text = body["messages"][-1]["content"]
    logps = truth(text)
    listed = [("The", math.log(0.06)), ("**", math.log(0.02))]
    for label, logp in logps.items():
        listed += [(label, logp + math.log(0.75)), (f" ({label})", logp + math.log(0.25))]
    best = max(logps, key=lambda label: logps[label])
    tops = [{"token": t, "logprob": x, "bytes": list(t.encode())} for t, x in sorted(listed, key=lambda p: -p[1])]
    first = {"token": best, "logprob": logps[best] + math.log(0.75), "top_logprobs": tops}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": best}}
    if body.get("logprobs"):
        choice["logprobs"] = {"content": [first]}
    found = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
    found["usage"] = {"prompt_tokens": len(text), "completion_tokens": 1, "total_tokens": len(text) + 1}
    return found | changes


class Handler(socketserver.StreamRequestHandler):
    """One connection: reads requests until the client goes or a fault ends it."""

    disable_nagle_algorithm = True
    server: FaultyServer

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while self._request():
                pass

    def _request(self) -> bool:
        if not self.rfile.readline():
            return False
        headers: dict[str, str] = {}
        while line := self.rfile.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        body = json.loads(self.rfile.read(int(headers["content-length"])))
        with self.server.working():
            name = self.server.next_fault(body, headers)
            if name:
                return FAULTS[name](self, body) is None
            self.json(completion(body))
            return True

    def reply(self, status: str, body: bytes, *headers: str, kind: str = "application/json") -> None:
        """A whole response."""
        head = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers]
        self.wfile.write("\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body)

    def json(self, found: object, status: str = "200 OK", *headers: str) -> None:
        """A whole response whose body is JSON, NaN and infinity as Python writes them."""
        self.reply(status, json.dumps(found).encode(), *headers)

    def reset(self) -> None:
        """End the connection rudely."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


class FaultyServer(socketserver.ThreadingTCPServer):
    """The server.

    `calls` counts what was served by the name of the fault, or "right". `keys` holds the Authorization headers
    that came, `times` when each request came, `headers` and `body` the last one; `flying` are under way,
    `most_flying` were at most. `work` are the seconds that each takes, `hang` those of slow faults.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, *, rate: float, faults: Mapping[str, float], seed: int, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.rate, self.seed = rate, seed
        self.names, self.weights = list(faults), list(faults.values())
        self.calls: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.keys: set[str | None] = set()
        self.headers: dict[str, str] = {}
        self.body: Body = None
        self.times: list[float] = []
        self.script: Callable[[Body], str] | None = None  # names the fault of a call, "" for none
        self.hang, self.work, self.flying, self.most_flying = 1.5, 0.0, 0, 0
        self._lock = threading.Lock()

    def next_fault(self, body: Body, headers: dict[str, str]) -> str:
        """The fault of this call; empty when it goes well."""
        text = body["messages"][-1]["content"]
        with self._lock:
            self.asked[text] += 1
            dice = random.Random(f"{self.seed} {text} {self.asked[text]}")
            name = dice.choices(self.names, self.weights)[0] if dice.random() < self.rate else ""
            if self.script is not None:
                name = self.script(body)
            self.calls[name or "right"] += 1
            self.keys.add(headers.get("authorization"))
            self.headers, self.body = headers, body
            self.times.append(time.monotonic())
        return name

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """A request is under way."""
        with self._lock:
            self.flying += 1
            self.most_flying = max(self.most_flying, self.flying)
        time.sleep(self.work)
        try:
            yield
        finally:
            with self._lock:
                self.flying -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go are part of the game; anything else is shown by the counts."""


@contextlib.contextmanager
def serve(
    *, rate: float = 0.0, faults: Mapping[str, float] | None = None, seed: int = 0, port: int = 0
) -> Iterator[FaultyServer]:
    """Serve while the context lasts.

    Args:
        rate: Share of calls that fail.
        faults: Weight of each fault; all of them by default, the slow ones rarely.
        seed: Decides which.
        port: 0 takes a free one.
    """
    weights = faults or {name: 0.1 if name in SLOW else 1.0 for name in FAULTS}
    server = FaultyServer(rate=rate, faults=weights, seed=seed, port=port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# Faults. Each answers one request; one that returns something else than None ends the connection.


def _status(status: str, *headers: str, said: str = "no", html: bool = False) -> Callable[[Handler, Body], None]:
    def fault(handler: Handler, _: Body) -> None:
        if html:
            handler.reply(
                status, f"<html><h1>{status}</h1></html>".encode(), *headers, kind="text/html; charset=base64"
            )
        else:
            handler.json({"error": {"message": said, "code": status}}, status, *headers)

    return fault


def _bytes(body: bytes, *headers: str) -> Callable[[Handler, Body], None]:
    return lambda handler, _: handler.reply("200 OK", body, *headers)


def _choice(change: Callable[[dict[str, Any]], object]) -> Callable[[Handler, Body], None]:
    """The right answer with its choice changed for the worse."""

    def fault(handler: Handler, body: Body) -> None:
        found = completion(body)
        change(found["choices"][0])
        handler.json(found)

    return fault


def _logprob(value: object) -> Callable[[Handler, Body], None]:
    """The right answer with the log-probability of its likeliest token replaced."""

    def change(choice: dict[str, Any]) -> None:
        choice["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = value

    return _choice(change)


def _message(**fields: Any) -> Callable[[Handler, Body], None]:
    def change(choice: dict[str, Any]) -> None:
        choice["message"] |= fields
        choice.pop("logprobs", None)

    return _choice(change)


def _whole(**fields: Any) -> Callable[[Handler, Body], None]:
    return lambda handler, body: handler.json(completion(body, **fields))


def _cut(handler: Handler, body: Body) -> bool:
    text = json.dumps(completion(body)).encode()
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text[: len(text) // 2])
    return False


def _half(handler: Handler, body: Body) -> None:
    text = json.dumps(completion(body)).encode()
    handler.reply("200 OK", text[: len(text) // 2])


def _raw(text: bytes) -> Callable[[Handler, Body], bool]:
    def fault(handler: Handler, _: Body) -> bool:
        handler.wfile.write(text)
        return False

    return fault


def _hang(head: bytes) -> Callable[[Handler, Body], bool]:
    def fault(handler: Handler, _: Body) -> bool:
        handler.wfile.write(head)
        time.sleep(handler.server.hang)
        return False

    return fault


def _drip(head: bytes) -> Callable[[Handler, Body], bool]:
    def fault(handler: Handler, _: Body) -> bool:
        handler.wfile.write(head)
        end = time.monotonic() + handler.server.hang
        while time.monotonic() < end:
            handler.wfile.write(b" ")
            time.sleep(0.02)
        return False

    return fault


def _reset(handler: Handler, _: Body) -> bool:
    handler.reset()
    return False


def _closes(handler: Handler, _: Body) -> bool:
    return False


def _huge(handler: Handler, _: Body) -> bool:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % BIG + b"x" * BIG)
    return False


def _huge_chunks(handler: Handler, _: Body) -> bool:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(100):
        handler.wfile.write(b"186a0\r\n" + b" " * 100_000 + b"\r\n")
    handler.wfile.write(b"0\r\n\r\n")
    return False


def _huge_error(handler: Handler, _: Body) -> bool:
    handler.wfile.write(b"HTTP/1.1 500 Oh\r\nContent-Length: %d\r\n\r\n" % BIG + b"x" * BIG)
    return False


def _date(handler: Handler, body: Body) -> None:
    _status("429 Busy", f"Retry-After: {email.utils.formatdate(time.time() - 5, usegmt=True)}")(handler, body)


def _no_logprobs(choice: dict[str, Any]) -> None:
    choice["logprobs"] = None


def _too_likely(choice: dict[str, Any]) -> None:
    for top in choice["logprobs"]["content"][0]["top_logprobs"]:
        top["logprob"] = -0.1


_BOMB = gzip.compress(b" " * BIG)
_STREAM = b'data: {"choices": [{"index": 0, "delta": {"content": "A"}}]}\n\ndata: [DONE]\n\n'

SLOW = (
    "hangs",
    "hangs in its answer",
    "drips its answer",
    "drips its headers",
    "10 MB",
    "10 MB in chunks",
    "10 MB of error",
)
# No other try can help: what the engine says about these is said at once.
FINAL = ("refusal", "filtered", "too long")

FAULTS: dict[str, Callable[[Handler, Body], object]] = {
    "429 with seconds": _status("429 Busy", "Retry-After: 0.01"),
    "429 with a date": _date,
    "429 with nonsense": _status("429 Busy", "Retry-After: soon"),
    "429": _status("429 Busy"),
    "408": _status("408 Slow"),
    "409": _status("409 Conflict"),
    "500": _status("500 Oh"),
    "500 in HTML": _status("500 Oh", html=True),
    "502": _status("502 Bad", html=True),
    "503": _status("503 Later"),
    "503 with seconds": _status("503 Later", "Retry-After: 0"),
    "504": _status("504 Slow"),
    "529": _status("529 Overloaded"),
    "401": _status("401 Who"),
    "404": _status("404 Where"),
    "redirect": _status("307 There", "Location: http://127.0.0.1:9/v1/chat/completions"),
    "too long": _status("400 Bad", said="this model's context length is exceeded"),
    "closes": _closes,
    "resets": _reset,
    "closes in its headers": _raw(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "closes in its answer": _cut,
    "no HTTP": _raw(b"\x16\x03\x01\x02 hello\r\n\r\n"),
    "bad chunk": _raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
    "endless header": _raw(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000 + b"\r\n\r\n"),
    "hangs": _hang(b""),
    "hangs in its answer": _hang(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"choices": ['),
    "drips its answer": _drip(b'HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{"choices": ['),
    "drips its headers": _drip(b"HTTP/1.1 200 OK\r\nX-Slow:"),
    "truncated JSON": _half,
    "HTML": _bytes(b"<!doctype html><html><body>A</body></html>"),
    "nothing": _bytes(b""),
    "204": lambda handler, _: handler.wfile.write(b"HTTP/1.1 204 No Content\r\n\r\n") and None,
    "no UTF-8": _bytes(b'{"choices": "\xff\xfe"}'),
    "deep JSON": _bytes(b"[" * 200_000),
    "a list": _bytes(b"[]"),
    "a string": _bytes(b'"A"'),
    "event stream": _bytes(_STREAM),
    "packed": _bytes(_BOMB, "Content-Encoding: gzip"),
    "packed badly": _bytes(b"A", "Content-Encoding: gzip"),
    "10 MB": _huge,
    "10 MB in chunks": _huge_chunks,
    "10 MB of error": _huge_error,
    "error with 200": _bytes(b'{"error": {"message": "out of memory", "code": 500}}'),
    "NaN": _logprob(math.nan),
    "infinity": _logprob(math.inf),
    "minus infinity": _logprob(-math.inf),
    "above zero": _logprob(0.7),
    "log-probability as text": _logprob("-0.1"),
    "log-probability null": _logprob(None),
    "log-probability true": _logprob(True),
    "endless number": _logprob(-(10**400)),
    "probabilities above one": _choice(_too_likely),
    "no choices": _whole(choices=[]),
    "choices null": _whole(choices=None),
    "choices an object": _whole(choices={"0": "A"}),
    "two choices": lambda handler, body: handler.json(completion(body, choices=completion(body)["choices"] * 2)),
    "message null": _choice(lambda choice: choice.update(message=None)),
    "content a number": _message(content=1),
    "content a list": _message(content=[{"type": "text", "text": "A"}]),
    "content null": _message(content=None, tool_calls=[{"id": "1"}]),
    "content empty": _message(content=" \n"),
    "half a surrogate": _message(content="A \ud83d"),
    "no finish": _choice(lambda choice: choice.pop("finish_reason")),
    "aborted": _choice(lambda choice: choice.update(finish_reason="abort")),
    "logprobs a number": _choice(lambda choice: choice.update(logprobs=-0.3)),
    "refusal": _message(content=None, refusal="I can't help with that."),
    "filtered": _choice(lambda choice: choice.update(finish_reason="content_filter")),
    "refusal in words": _message(content="I'm sorry, but I cannot compare these."),
    "another language": _message(content="Ответ зависит от контекста."),
    "no log-probabilities": _choice(_no_logprobs),
    "usage nonsense": _whole(usage={"prompt_tokens": -5, "completion_tokens": "many"}),
}
