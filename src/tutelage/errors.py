"""Every error that tutelage raises on purpose, in one tree.

    TutelageError                 exit code 2 unless said otherwise
    |-- RecipeError               the recipe or a command-line option makes no sense
    |-- InputError                a file that was given cannot be used (prompts, suite, constitution)
    |-- ModelError                a model directory, GGUF file or weight file cannot be used
    |-- StoreError                the run folder cannot be read or written
    |   `-- RunBusy               another process works on the same run
    |-- TrainingError             the numbers went wrong (non-finite loss); last version kept
    |-- NothingToLearn            no generation got a valid reward
    |-- GateRejected              exit code 3
    |-- JudgeRefused              exit code 4
    |-- BudgetSpent               exit code 5
    `-- Interrupted               exit code 130, the run can be resumed

Every message says what was got, what was expected, and what to do.
"""

from __future__ import annotations

__all__ = [
    "BudgetSpent",
    "GateRejected",
    "InputError",
    "Interrupted",
    "JudgeRefused",
    "ModelError",
    "NothingToLearn",
    "RecipeError",
    "RunBusy",
    "StoreError",
    "TrainingError",
    "TutelageError",
]


class TutelageError(Exception):
    """Base of all errors that carry a message for the user.

    Args:
        got: What was found, with its place (file, line, key).
        expected: What would have been accepted.
        fix: What the user can do now.
    """

    exit_code = 2

    def __init__(self, got: str, *, expected: str = "", fix: str = "") -> None:
        self.got, self.expected, self.fix = got, expected, fix
        super().__init__(got)

    def __str__(self) -> str:
        parts = [self.got]
        if self.expected:
            parts.append(f"expected: {self.expected}")
        if self.fix:
            parts.append(f"what to do: {self.fix}")
        return "\n  ".join(parts)

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the fields when the error crosses a process boundary."""
        return (_rebuild, (type(self), self.got, self.expected, self.fix))


def _rebuild(kind: type[TutelageError], got: str, expected: str, fix: str) -> TutelageError:
    return kind(got, expected=expected, fix=fix)


class RecipeError(TutelageError):
    """The recipe, or an option that overrides it, makes no sense."""


class InputError(TutelageError):
    """A file that was given cannot be used."""


class ModelError(TutelageError):
    """A model, tokenizer or weight file cannot be used."""


class StoreError(TutelageError):
    """A run folder cannot be read or written."""


class RunBusy(StoreError):
    """Another process works on the same run."""


class TrainingError(TutelageError):
    """The numbers went wrong during an update; the last version is kept."""


class NothingToLearn(TutelageError):
    """No generation of a whole round got a valid reward."""


class GateRejected(TutelageError):
    """The gate refused the candidate."""

    exit_code = 3


class JudgeRefused(TutelageError):
    """A judge failed its audit."""

    exit_code = 4


class BudgetSpent(TutelageError):
    """A limit on time, calls, tokens or money was reached."""

    exit_code = 5


class Interrupted(TutelageError):
    """The user stopped the run; it can be resumed."""

    exit_code = 130
