"""From a judge of a recipe to an engine: which model judges, and where it runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.config import Judge
from tutelage.records import Engine

if TYPE_CHECKING:
    from tutelage.engines.http import HttpEngine
    from tutelage.engines.load import LanguageModel

__all__ = ["Own", "open_engine"]

_URL = re.compile(r"^(?P<model>[^@]+)@(?P<url>https?://.+)$")
# Name, model and off-switch of a policy in memory.
Own = tuple[str, "LanguageModel", Callable[[], AbstractContextManager[object]]]


def open_engine(judge: Judge, *, own: Own | None = None, say: Callable[[str], None] = lambda _: None) -> Engine:
    """The engine that a judge names.

    Args:
        judge: Its `model` is MODEL@URL (a server that speaks the OpenAI protocol), FILE.gguf (llama.cpp),
            an embedded name or a directory (this process).
        own: A judge of the policy's name shares its weights, with what was learned switched off.
        say: Hears of a server's outages.

    Raises:
        ModelError: It cannot be loaded or reached, or an extra is missing.
    """
    remote = _URL.match(judge.model)
    if remote is not None:
        return _server(remote["model"], remote["url"], judge, say)
    if judge.model.endswith(".gguf"):
        from tutelage.engines.llamacpp import LlamaCppEngine

        return LlamaCppEngine(Path(judge.model).expanduser())
    from tutelage.engines.answering import LocalEngine

    if own is not None and judge.model == own[0]:
        return LocalEngine(own[1], frozen=own[2])
    from tutelage.engines.load import load_model

    return LocalEngine(load_model(judge.model))


def _server(model: str, url: str, judge: Judge, say: Callable[[str], None]) -> HttpEngine:
    from tutelage.engines.http import HttpEngine
    from tutelage.engines.limits import Limits

    limits = Limits(
        calls_per_minute=judge.calls_per_minute or math.inf,
        tokens_per_minute=judge.tokens_per_minute or math.inf,
        parallel=judge.parallel,
        calls=judge.max_calls or math.inf,
        tokens=judge.max_tokens or math.inf,
        money=judge.max_money or math.inf,
        price_in=judge.price_in,
        price_out=judge.price_out,
    )
    return HttpEngine(model, url, limits=limits, prefill=judge.prefill, say=say)
