"""Talk to a run's model before and after its training, side by side."""

from __future__ import annotations

import json
from pathlib import Path

from tutelage.records import Message, Prompt, SamplerSettings

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
    from tutelage.engines.local import LocalCompleter
    from tutelage.loop.versions import load_for_use, open_run

    folder = str(open_run(name, runs))
    engines = {
        when: LocalCompleter(load_for_use(folder, runs=runs, version=version), rows=1)
        for when, version in (("before", "start"), ("after", None))
    }
    settings = SamplerSettings(0.0, max_new_tokens=max_new_tokens)

    def answer(text: str) -> dict[str, str]:
        prompt = Prompt("chat", (Message("user", text),))
        return {
            when: engine.generate([prompt], samples=1, settings=settings, seed=0, version=when)[0][0].text
            for when, engine in engines.items()
        }

    if question is not None:
        _show(question, answer(question), as_json)
        return
    print(f"talking to {folder}; an empty line ends")
    while True:
        try:
            text = input("\nyou> ").strip()
        except EOFError:
            return
        if not text:
            return
        _show(text, answer(text), as_json)


def _show(question: str, replies: dict[str, str], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"prompt": question, **replies}, ensure_ascii=False))
        return
    for when, reply in replies.items():
        print(f"{when:>7}: {reply}")
