"""From a few words to an engine: which model judges, and where it runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.errors import RecipeError
from tutelage.records import Engine

if TYPE_CHECKING:
    from tutelage.engines.load import LanguageModel

__all__ = ["open_engine"]

_URL = re.compile(r"^(?P<model>[^@]+)@(?P<url>https?://.+)$")


def open_engine(
    spec: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    own: tuple[str, LanguageModel, Callable[[], AbstractContextManager[object]]] | None = None,
) -> Engine:
    """The engine that a spec names.

    Args:
        spec: `MODEL@URL` is a server that speaks the OpenAI protocol; `FILE.gguf` runs in llama.cpp;
            anything else (embedded name, directory) in this process.
        device: For models in this process.
        dtype: Likewise.
        own: Name, model and off-switch of a policy in memory: a judge of the same name shares its
            weights, with what was learned switched off.

    Raises:
        ModelError: It cannot be loaded or reached, or an extra is missing.
        RecipeError: The spec is empty.
    """
    if not spec.strip():
        raise RecipeError("a judge names no model", expected="an embedded name, directory, GGUF file or MODEL@URL")
    remote = _URL.match(spec)
    if remote is not None:
        from tutelage.engines.http import HttpEngine

        return HttpEngine(remote["model"], remote["url"])
    if spec.endswith(".gguf"):
        from tutelage.engines.llamacpp import LlamaCppEngine

        return LlamaCppEngine(Path(spec).expanduser())
    from tutelage.engines.answering import LocalEngine

    if own is not None and spec == own[0]:
        return LocalEngine(own[1], frozen=own[2])
    from tutelage.engines.load import load_model

    return LocalEngine(load_model(spec, device=device, dtype=dtype))
