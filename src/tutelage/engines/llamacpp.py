"""GGUF files through a prebuilt llama.cpp (the extra `gguf`): quantised judges on a processor.

llama.cpp keeps the keys and values of the last conversation, so questions are asked in the order of
their texts: those that begin alike follow one another, and what they share is computed once.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.engines.labels import Listed, label_logps, openings
from tutelage.errors import ModelError
from tutelage.records import Answer, Cost, Question, content_hash

__all__ = ["LlamaCppEngine"]

_LISTED = 64  # likeliest tokens among which labels are looked for
_FIRST = 2  # some vocabularies put a token of nothing but space before a digit


class LlamaCppEngine:
    """Asks a GGUF model in this process.

    Args:
        file: The GGUF file.
        context: Tokens of question and answer together, at most.
        threads: Processor threads; None takes all that this process may use.

    Raises:
        ModelError: The extra is not installed, or the file is no model that llama.cpp reads.
    """

    def __init__(self, file: Path, *, context: int = 4096, threads: int | None = None) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise ModelError(
                f"{file} is to be run by llama.cpp, which is not installed",
                expected="the extra 'gguf'",
                fix="pip install 'tutelage[gguf]'",
            ) from error
        _check(file)
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.cpuparams.n_threads = threads or _processors()
        params.warmup, params.verbosity = False, -1
        self.name, self.context = file.stem, context
        stat = file.stat()
        # The hash of a gigabyte takes longer than a question; size and a sample tell files apart.
        self.version = content_hash(["llamacpp", stat.st_size, _sample(file), xllamacpp.__version__])
        try:
            with _quiet():
                self._server = xllamacpp.Server(params)
        except (RuntimeError, OSError, ValueError) as error:
            raise ModelError(
                f"llama.cpp cannot load {file} ({error})",
                expected="a complete GGUF file of a chat model",
                fix="check the file",
            ) from error

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer a question; questions that begin alike are asked one after another."""
        answers = [Answer(failure="not asked")] * len(questions)
        order = sorted(range(len(questions)), key=lambda i: ([m.content for m in questions[i].messages], i))
        for i in order:
            answers[i] = self._ask(questions[i])
        return answers

    def _ask(self, question: Question) -> Answer:
        turns = [{"role": m.role, "content": m.content} for m in question.messages]
        if question.opening:
            turns.append({"role": "assistant", "content": question.opening})
        body: dict[str, Any] = {
            "messages": turns,
            "max_tokens": _FIRST if question.labels else question.max_new_tokens,
            "temperature": question.temperature,
            "seed": question.draw,
            "logprobs": True,
            "top_logprobs": _LISTED if question.labels else 1,
            "cache_prompt": True,
        }
        if question.schema is not None:
            schema = {"name": "verdict", "schema": dict(question.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        started = time.perf_counter()
        try:
            found = self._server.handle_chat_completions(body)
        except (RuntimeError, ValueError) as error:
            return Answer(failure=f"llama.cpp: {error}")
        return _read(found, question, time.perf_counter() - started)


def _read(found: Any, question: Question, seconds: float) -> Answer:
    if not isinstance(found, Mapping) or "choices" not in found:
        said = found.get("error", found) if isinstance(found, Mapping) else found
        return Answer(failure=f"llama.cpp: {str(said)[:200]}")
    choice = found["choices"][0]
    text = str(choice["message"]["content"] or "").removeprefix(question.opening).strip()
    tokens = (choice.get("logprobs") or {}).get("content") or []
    cost = Cost(seconds, int(found.get("usage", {}).get("total_tokens", 0)))
    if not question.labels:
        return Answer(text, tuple(float(t["logprob"]) for t in tokens), cost=cost)
    if not tokens:
        return Answer(failure="llama.cpp gave no token", cost=cost)
    return Answer(text, label_logps=label_logps(openings([_place(t) for t in tokens]), question.labels), cost=cost)


def _place(token: Mapping[str, Any]) -> Listed:
    listed = [(str(t["token"]), float(t["logprob"])) for t in token["top_logprobs"]]
    return str(token["token"]), float(token["logprob"]), listed


def _processors() -> int:
    """Processors that this process may use: fewer than the machine's in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(file: Path) -> None:
    try:
        with file.open("rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}", expected="a GGUF file") from error
    if magic != b"GGUF":
        raise ModelError(f"{file} is no GGUF file", expected="a file that begins with GGUF", fix="check the path")


def _sample(file: Path) -> str:
    with file.open("rb") as handle:
        head = handle.read(1 << 16)
        handle.seek(file.stat().st_size // 2)
        return content_hash([head.hex(), handle.read(1 << 16).hex()])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """llama.cpp writes its life story to stderr while it loads."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
