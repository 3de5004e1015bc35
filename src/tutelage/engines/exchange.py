"""One call to a chat-completions server: a request goes out, a reply or a failure comes back, nothing else.

Bodies are cut off at a limit, so no server can fill the memory. The key is put into a request at the
last moment and only when it goes to the host that the key is for; the client itself never has it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import sys
import time
import urllib.parse
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal

from tutelage.engines.limits import retry_after
from tutelage.engines.replies import Malformed, Reply, complaint, read_reply
from tutelage.errors import ModelError

__all__ = ["Failure", "Fault", "address", "call", "connect", "modules"]

_MOST_BYTES = 2_000_000  # of a body; 20 candidates at each of 512 tokens take half of it
_HEADERS = {"host", "accept", "connection", "content-type", "content-length", "user-agent"}
_PASSING = {408, 409, 425}
_AWAY = {429, 502, 503, 504, 520, 521, 522, 523, 524, 529}
_BUSY = {429, 503, 529}
_SETTINGS = {401, 402, 403, 404, 405, 410}

# What failed: the server cannot be reached; it is up, but takes no calls now; something broke that may have to
# do with the question; key, account, address or model are wrong; the question cannot be answered by this server.
Fault = Literal["unreachable", "away", "broken", "settings", "question"]


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """A call without a reply.

    Args:
        fault: Where the cause lies.
        name: A status code, or one of timeout, connection, malformed, unreachable.
        reason: In words, the server's own among them.
        after: Seconds that the server asks to wait.
        busy: The server has more to do than it can.
        free: Nothing was computed, so nothing is paid.
    """

    fault: Fault
    name: str
    reason: str
    after: float | None = None
    busy: bool = False
    free: bool = False


class _Unreadable(Exception):
    """A response that is not worth reading to its end."""


@functools.cache
def modules() -> tuple[Any, Any]:
    """The openai client, and the HTTP library under it: httpx2 since its version 3, httpx before.

    Raises:
        ModelError: The `http` extra is not installed.
    """
    try:
        import openai
    except ImportError as error:
        raise ModelError(
            "a judge behind a server needs the openai client, which is not installed",
            expected="the extra 'http'",
            fix="pip install 'tutelage[http]'",
        ) from error
    client = next(c for c in openai.DefaultAsyncHttpxClient.__mro__ if c.__name__ == "AsyncClient")
    return openai, sys.modules[client.__module__.partition(".")[0]]


def address(url: str) -> tuple[str, str]:
    """Base address of the protocol, and the host with its port.

    Raises:
        ModelError: It is no address of a server, or holds a name, password or parameters.
    """
    try:
        parts = urllib.parse.urlsplit(url.strip().rstrip("/").removesuffix("/chat/completions"))
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, known = urllib.parse.urlsplit(""), False
    if not known or parts.username is not None or parts.query or parts.fragment:
        # The address itself may hold a password, so it is not repeated.
        raise ModelError(
            "the address of the server cannot be used",
            expected="http://HOST:PORT or https://HOST/PATH, without name, password and parameters",
            fix="put a key into the environment, not into the address",
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path or '/v1'}", parts.netloc.lower()


def connect(url: str, key: str, timeout: float) -> Any:
    """A client for one host, to be used as an asynchronous context.

    Of the environment it takes proxies and certificates, and those for https alone: over http a proxy
    would read the key. Headers that the openai client makes of OPENAI_* variables are taken out again.
    """
    openai, http = modules()
    home = http.URL(url)

    async def sign(request: Any) -> None:
        for name in set(request.headers) - _HEADERS:
            del request.headers[name]
        request.headers["accept-encoding"] = "identity"
        if key and (request.url.scheme, request.url.netloc) == (home.scheme, home.netloc):
            request.headers["authorization"] = f"Bearer {key}"

    class Bounded(http.AsyncByteStream):  # type: ignore[misc, name-defined]
        """A body that ends with an exception where it grows too long."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for part in self.stream:
                size += len(part)
                if size > _MOST_BYTES:
                    raise _Unreadable(f"more than {_MOST_BYTES // 1_000_000} MB")
                yield part

        async def aclose(self) -> None:
            await self.stream.aclose()

    async def bound(response: Any) -> None:
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise _Unreadable("packed, which nobody asked for")  # a few bytes could unpack to any number
        response.encoding = "utf-8"  # the header could name a codec that is none for text
        response.stream = Bounded(response.stream)

    session = openai.DefaultAsyncHttpxClient(
        event_hooks={"request": [sign], "response": [bound]},
        follow_redirects=False,
        trust_env=home.scheme == "https",
    )
    return openai.AsyncOpenAI(base_url=url, api_key="unset", max_retries=0, timeout=timeout, http_client=session)


async def call(client: Any, body: Mapping[str, Any], labels: Sequence[str], longest: float) -> Reply | Failure:
    """Ask once.

    Args:
        client: As `connect` makes it.
        body: The request.
        labels: Labels of the question; empty for text.
        longest: Seconds from connecting to the last byte, however slowly bytes may drip.
    """
    openai, http = modules()
    try:
        async with asyncio.timeout(longest):
            response = await client.post("/chat/completions", body=body, cast_to=http.Response)
        return read_reply(response.content, labels)
    except Malformed as error:
        return _malformed(error)
    except (TimeoutError, openai.APITimeoutError):
        return Failure("broken", "timeout", f"no answer within {longest:g} s", busy=True)
    except openai.APIStatusError as error:
        return _refused(error.response)
    except (openai.OpenAIError, http.HTTPError, http.StreamError, OSError, _Unreadable) as error:
        cause = error if isinstance(error, _Unreadable) or error.__cause__ is None else error.__cause__
        if isinstance(cause, _Unreadable):
            return _malformed(cause)
        told = str(cause) or type(cause).__name__
        if isinstance(cause, http.ConnectError | http.ConnectTimeout):
            return Failure("unreachable", "unreachable", f"cannot be reached: {told}", free=True)
        return Failure("broken", "connection", f"the connection broke: {told}")


def _malformed(error: Exception) -> Failure:
    return Failure("broken", "malformed", f"no usable answer: {error}")


def _refused(response: Any) -> Failure:
    status = int(response.status_code)
    fault: Fault = "question"
    words = complaint(response.content)
    if status < 400:
        fault, words = "settings", "it redirects elsewhere, and a key follows no redirect"
    elif status in _AWAY:
        fault = "away"
    elif status in _PASSING or status >= 500:
        fault = "broken"
    elif status in _SETTINGS:
        fault = "settings"
    after = retry_after(response.headers.get("retry-after"), time.time())
    return Failure(fault, str(status), f"{status}: {words}".rstrip(": "), after, busy=status in _BUSY, free=True)
