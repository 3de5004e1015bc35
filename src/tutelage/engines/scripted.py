"""The fake: answers from a script, for tests and tutorials. It runs no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tutelage.records import Answer, Question

__all__ = ["ScriptedEngine"]


class ScriptedEngine:
    """Asks a function.

    Args:
        script: One answer a question.
        name: Shown in verdicts.
        version: Names the script, so that cached answers of another are not taken for its own.

    `asked` keeps every question in order.
    """

    def __init__(self, script: Callable[[Question], Answer], *, name: str = "scripted", version: str = "1") -> None:
        self.script, self.name, self.version = script, name, version
        self.asked: list[Question] = []

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer a question."""
        self.asked.extend(questions)
        return [self.script(q) for q in questions]
