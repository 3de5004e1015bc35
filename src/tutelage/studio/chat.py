"""Talk to a run's model before and after its training, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.records import Message, Prompt, SamplerSettings

if TYPE_CHECKING:
    from tutelage.engines.load import LanguageModel

__all__ = ["talk"]


def talk(name: str | None, *, runs: Path, question: str | None, max_new_tokens: int, as_json: bool) -> None:
    """Answer one question, or ask for questions until an empty line.

    Args:
        name: Run, or None for the newest.
        runs: Folder that holds runs.
        question: Answer this one and return.
        max_new_tokens: Longest reply.
        as_json: One JSON object a question.
    """
    from tutelage.loop.versions import open_run
    from tutelage.store.runs import Run

    folder = open_run(name, runs)
    opened = Run.open(folder, write=False)
    controlled = opened.recipe.controller.enabled
    opened.close()
    speakers, title = (_controlled if controlled else _weights)(folder, runs, max_new_tokens)

    def answer(text: str) -> dict[str, str]:
        prompt = Prompt("chat", (Message("user", text),))
        return {when: speak(prompt) for when, speak in speakers.items()}

    if question is not None:
        _show(question, answer(question), as_json)
        return
    print(f"talking to {title}; an empty line ends")
    while True:
        try:
            text = input("\nyou> ").strip()
        except EOFError:
            return
        if not text:
            return
        _show(text, answer(text), as_json)


Speaker = Callable[[Prompt], str]


def _weights(folder: Path, runs: Path, longest: int) -> tuple[dict[str, Speaker], str]:
    """The start model and what was learned of it, both greedy."""
    from tutelage.loop.versions import load_for_use

    found = [load_for_use(str(folder), runs=runs, version=version) for version in ("start", None)]
    return {when: _greedy(lm, longest) for when, lm in zip(("before", "after"), found, strict=True)}, str(folder)


def _controlled(folder: Path, runs: Path, longest: int) -> tuple[dict[str, Speaker], str]:
    """The frozen model by itself, greedy, and as the run's controller chooses; one copy of its weights.

    Raises:
        StoreError: The run has no controller yet.
    """
    from tutelage.applications.controller import load_controlled

    used = load_controlled(str(folder), runs=runs)

    def steered(prompt: Prompt) -> str:
        return used.reply([prompt], max_new_tokens=longest)[0].text

    return {"before": _greedy(used.completer.lm, longest), "after": steered}, f"{folder}, controller {used.version}"


def _greedy(lm: LanguageModel, longest: int) -> Speaker:
    from tutelage.engines.local import LocalCompleter

    engine, settings = LocalCompleter(lm, rows=1), SamplerSettings(0.0, max_new_tokens=longest)
    return lambda p: engine.generate([p], samples=1, settings=settings, seed=0, version="chat")[0][0].text


def _show(question: str, replies: dict[str, str], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"prompt": question, **replies}, ensure_ascii=False))
        return
    for when, reply in replies.items():
        print(f"{when:>7}: {reply}")
