"""What a chat-completions server said, read strictly: what is not an answer beyond doubt is none.

A judge's number must never come from a page of HTML, half a JSON text or a probability above one, so
every field that is used is checked for its type and its range, and nothing is repaired.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from tutelage.engines.labels import label_logps, openings

__all__ = ["Malformed", "Reply", "complaint", "read_reply"]

_ABOVE_ZERO = 1e-3  # servers compute in 16 bits: a certain token may come out a little above log 1
_ABOVE_ONE = 1e-2
_MOST_TOKENS = 10**9
_BROKEN_OFF = ("abort", "error")
_SHOWN = 300  # characters of a server's words in a message


class Malformed(ValueError):
    """What came is no completion; the message says what is wrong."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """One answer of a server.

    Args:
        text: What the model said.
        logps: Natural-log probability of each of its tokens; empty where the server gives none.
        label_logps: As in `Answer`; None as well where no label is among the likeliest tokens.
        declined: Why model or server would not answer; empty when they did.
        tokens_in: Tokens read, None where the server does not say.
        tokens_out: Tokens written, likewise.
    """

    text: str
    logps: tuple[float, ...] = ()
    label_logps: dict[str, float] | None = None
    declined: str = ""
    tokens_in: int | None = None
    tokens_out: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Position:
    token: str
    logp: float
    listed: tuple[tuple[str, float], ...]


def read_reply(body: bytes, labels: Sequence[str]) -> Reply:
    """Read the body of a chat completion.

    Args:
        body: What the server sent with status 200.
        labels: Labels of the question; empty for text.

    Raises:
        Malformed: It is no well-formed completion.
    """
    found = _parse(body)
    if not isinstance(found, dict):
        raise Malformed(f"{_kind(found)} instead of an object")
    if found.get("error"):
        raise Malformed(f"an error instead of an answer: {_shown(found['error'])}")
    choices = _typed(found, "choices", list)
    if len(choices) != 1 or not isinstance(choices[0], dict):
        raise Malformed(f"{len(choices)} choices instead of one")
    choice = choices[0]
    message = _typed(choice, "message", dict)
    finish = _typed(choice, "finish_reason", str)
    tokens_in, tokens_out = _usage(found.get("usage"))
    refusal = message.get("refusal")
    if refusal is not None and not isinstance(refusal, str):
        raise Malformed(f"refusal is {_kind(refusal)}")
    declined = f"the model refused: {_shown(refusal)}" if refusal else ""
    if finish == "content_filter":
        declined = "a content filter stopped the answer"
    if finish in _BROKEN_OFF:
        raise Malformed(f"an answer broken off by the server ({finish})")
    if declined:
        return Reply("", declined=declined, tokens_in=tokens_in, tokens_out=tokens_out)
    text = _typed(message, "content", str)
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise Malformed("half a surrogate pair, which no file can hold")
    positions = _positions(choice.get("logprobs"))
    if not text.strip():
        raise Malformed(f"an empty answer (finish_reason {finish[:40]})")
    heard = (
        label_logps(openings([(p.token, p.logp, p.listed) for p in positions]), labels) if positions and labels else {}
    )
    return Reply(
        text.strip(),
        tuple(p.logp for p in positions),
        heard if any(x > -math.inf for x in heard.values()) else None,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
    )


def complaint(body: bytes) -> str:
    """The words in which a server refused, shortened: the message of its JSON, or the text itself."""
    try:
        found = _parse(body)
    except Malformed:
        found = body[: 4 * _SHOWN].decode("utf-8", "replace")
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return _shown(found)


def _parse(body: bytes) -> Any:
    """JSON as the standard has it: no NaN, no infinity."""
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except RecursionError as error:
        raise Malformed("JSON nested too deeply") from error
    except UnicodeDecodeError as error:
        raise Malformed("no UTF-8") from error
    except json.JSONDecodeError as error:
        start = body[:200].lstrip().lower()
        what = "HTML" if start.startswith(b"<") else "nothing" if not start else "broken JSON"
        raise Malformed(f"{what} instead of JSON") from error
    except Malformed:
        raise
    except ValueError as error:  # a whole number of more digits than Python converts
        raise Malformed("an endless number") from error


def _no_number(name: str) -> NoReturn:
    raise Malformed(f"{name} instead of a number")


def _typed(found: dict[str, Any], key: str, kind: type) -> Any:
    value = found.get(key)
    if not isinstance(value, kind):
        raise Malformed(f"{key} is {_kind(value)}")
    return value


def _kind(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    words = " ".join(text.encode("utf-8", "replace").decode().split())
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]} ..."


def _usage(found: object) -> tuple[int | None, int | None]:
    """Tokens read and written; nonsense counts as not said."""
    if not isinstance(found, dict):
        return None, None
    values = [found.get("prompt_tokens"), found.get("completion_tokens")]
    known = [v if type(v) is int and 0 <= v <= _MOST_TOKENS else None for v in values]
    return known[0], known[1]


def _positions(found: object) -> list[_Position]:
    """Tokens of the answer with the likeliest tokens at each place; empty where the server gives none."""
    if found is None:
        return []
    if not isinstance(found, dict):
        raise Malformed(f"logprobs is {_kind(found)}")
    if found.get("content") is None:
        return []
    return [_position(p) for p in _typed(found, "content", list)]


def _position(found: object) -> _Position:
    token, logp = _candidate(found)
    top = found.get("top_logprobs") if isinstance(found, dict) else None
    if top is not None and not isinstance(top, list):
        raise Malformed(f"top_logprobs is {_kind(top)}")
    # What was drawn may be listed or not, and some servers list it twice.
    listed = list(dict.fromkeys(_candidate(c) for c in top or ()))
    if all(t != token for t, _ in listed):
        listed.append((token, logp))
    if math.fsum(math.exp(x) for _, x in listed) > 1.0 + _ABOVE_ONE:
        raise Malformed("probabilities of tokens that add up to more than one")
    return _Position(token, logp, tuple(listed))


def _candidate(found: object) -> tuple[str, float]:
    if not isinstance(found, dict):
        raise Malformed(f"a token's log-probability is {_kind(found)}")
    token, logp = _typed(found, "token", str), found.get("logprob")
    if isinstance(logp, bool) or not isinstance(logp, int | float):
        raise Malformed(f"logprob is {_kind(logp)}")
    # Whole numbers may be too long for a float, so the range comes first.
    if not -1e300 < logp <= _ABOVE_ZERO:
        raise Malformed(f"a log-probability of {float(logp):g}" if abs(logp) < 1e300 else "an endless log-probability")
    return token, min(0.0, float(logp))
