"""Labelling in the terminal: blind, in random order, by keyboard alone, with undo and resume.

Nothing about where a text comes from is shown. On a terminal one key is an answer; without one (a pipe)
one line is. Every answer is on disk before the next task is shown.
"""

from __future__ import annotations

import os
import select
import statistics
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tutelage.errors import InputError, StoreError
from tutelage.feedback.human import Label, Task, Word, append_label, append_undo, now, read_labels
from tutelage.feedback.human_data import read_tasks
from tutelage.records import content_hash

__all__ = ["Choose", "hold", "label", "shown_order", "visible"]

# Gets what is answered, by task; gives the next task, or None at the end.
Choose = Callable[[Mapping[str, Label]], Task | None]

_WIDE = 100  # columns from which two replies stand side by side
_ARROWS = {b"[D": "left", b"OD": "left", b"[C": "right", b"OC": "right"}
# Characters that turn the direction of what follows, and line ends that are not "\n".
_TURNING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029}
_QUESTIONS = {"pair": "Which reply is better?", "best": "Which reply is the best?"}
_COMMON = {"s": "skip", "u": "take back the last answer", "n": "write a note", "q": "quit", "?": "these keys"}


def visible(text: str) -> str:
    """The text with every character that could command a terminal written out as an escape."""
    return "".join(
        c if c in "\n\t" or not (unicodedata.category(c) in ("Cc", "Cs") or ord(c) in _TURNING) else _written_out(c)
        for c in text.replace("\r\n", "\n")
    )


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def shown_order(task: Task, *, annotator: str, seed: int) -> tuple[int, ...]:
    """Numbers of the candidates in the order in which this person sees them: always the same, from a hash."""
    return tuple(sorted(range(len(task.candidates)), key=lambda i: content_hash([seed, task.id, annotator, i])))


def label(
    tasks_path: Path, labels_path: Path, *, annotator: str, seed: int = 0, scale: int = 5, aside: bool = False
) -> dict[str, Any]:
    """Ask one person for labels until the tasks or the person are done; ctrl-c quits, nothing is lost.

    Args:
        tasks_path: What to label (`human_data.read_tasks`).
        labels_path: Where labels go; it only grows, may hold other people's, and says where to go on.
        annotator: Who answers.
        seed: Of the orders in which candidates are shown.
        scale: Highest rating, for tasks that do not say.
        aside: The session is shown on stderr, so that stdout is left to what is found.

    Returns:
        annotator, labels (path), tasks, labelled (of these, skipped ones among them), skipped, left, new
        and undone (in this session), of_other_tasks (labels in the file), median_seconds (an answer).

    Raises:
        InputError: A file cannot be read, or the annotator has no usable name.
        StoreError: The label file cannot be written.
    """
    _check_name(annotator)
    return hold(read_tasks(tasks_path, scale=scale), labels_path, annotator=annotator, seed=seed, aside=aside)


def hold(
    tasks: Sequence[Task],
    labels_path: Path,
    *,
    annotator: str,
    seed: int = 0,
    choose: Choose | None = None,
    goal: int | None = None,
    kept: Callable[[Mapping[str, Label]], None] = lambda _: None,
    aside: bool = False,
) -> dict[str, Any]:
    """`label` for tasks that are at hand, in an order that may depend on the answers.

    Args:
        tasks: What could be asked.
        labels_path: As in `label`.
        annotator: Who answers.
        seed: Of the orders in which candidates are shown.
        choose: Picks the next task; in the order given where it is left out.
        goal: How many tasks are to be answered, for the person to see; all where it is left out.
        kept: Told all answers after each one that is on disk, or taken back.
        aside: As in `label`.
    """
    _check_name(annotator)
    mine = [given for given in read_labels(labels_path) if given.annotator == annotator]
    try:
        labels_path.open("ab").close()  # rather now than after the first answer
    except OSError as error:
        problem = f"{labels_path} cannot be written: {os.strerror(error.errno) if error.errno else error}"
        raise StoreError(problem, expected="a file that can grow", fix="check the folder and its rights") from error
    session = _Session(tasks, labels_path, mine, annotator, seed, aside=aside)
    session.choose, session.kept, session.goal = choose or session.in_order, kept, goal or len(tasks)
    with ExitStack() as stack:
        keys = stack.enter_context(_Keyboard()) if sys.stdin.isatty() else _Lines()
        try:
            session.run(keys)
        except KeyboardInterrupt:
            session.say("stopped")
    return session.summary()


def _check_name(annotator: str) -> None:
    if not annotator.strip() or visible(annotator) != annotator or "\n" in annotator:
        raise InputError(f"the annotator is {visible(annotator)!r}", expected="a name", fix="name who labels")


class _Lines:
    """Answers from a pipe, one a line."""

    def key(self) -> str:
        """The next line that is not empty; "q" at the end."""
        while line := sys.stdin.buffer.readline():
            if word := line.decode("utf-8", errors="replace").strip():
                return word
        return "q"

    def line(self, ask: Callable[[], None]) -> str:
        """The next line, as it is."""
        ask()
        return sys.stdin.buffer.readline().decode("utf-8", errors="replace").strip()

    def forget(self) -> None:
        """A pipe is written ahead on purpose."""


class _Keyboard:
    """Answers from a terminal, one a key, without echo; the terminal gets its settings back."""

    def __enter__(self) -> Self:
        import termios
        import tty

        self._fd = sys.stdin.fileno()
        self._before = termios.tcgetattr(self._fd)
        tty.setcbreak(self._fd)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._set(self._before)

    def _set(self, settings: list[Any]) -> None:
        import termios

        termios.tcsetattr(self._fd, termios.TCSADRAIN, settings)

    def key(self) -> str:
        """The next key: a character, "left" or "right"; "q" at the end, "" for a key without a name."""
        # In turns: a ctrl-c that comes just before a read that blocks would wait for the next key.
        while not select.select([self._fd], [], [], 0.2)[0]:
            pass
        first = os.read(self._fd, 1)
        if first in (b"", b"\x04"):
            return "q"
        if first != b"\x1b":
            return first.decode("ascii", errors="ignore")
        sequence = b""
        # An arrow is several bytes at once: ESC, [ or O, and a last byte from @ to ~.
        while len(sequence) < 2 or not b"@" <= sequence[-1:] <= b"~":
            byte = os.read(self._fd, 1) if select.select([self._fd], [], [], 0.05)[0] else b""
            if not byte:
                break
            sequence += byte
        return _ARROWS.get(sequence, "")

    def line(self, ask: Callable[[], None]) -> str:
        """A line, typed with echo: from before it is asked for, so that a quick typist sees all of it."""
        import termios

        silent = termios.tcgetattr(self._fd)
        self._set(self._before)
        try:
            ask()
            return sys.stdin.buffer.readline().decode("utf-8", errors="replace").strip()
        finally:
            self._set(silent)

    def forget(self) -> None:
        """Drop keys that were pressed before a task was shown: they were not meant for it."""
        import termios

        termios.tcflush(self._fd, termios.TCIFLUSH)


class _Session:
    """One person's way through the tasks.

    Args:
        tasks: All of them.
        path: Label file.
        mine: This person's standing labels, oldest first.
        annotator: Who that is.
        seed: Of the orders.
        aside: On stderr.
    """

    def __init__(
        self, tasks: Sequence[Task], path: Path, mine: Sequence[Label], annotator: str, seed: int, *, aside: bool
    ) -> None:
        self.tasks, self.path, self.annotator, self.seed = {t.id: t for t in tasks}, path, annotator, seed
        self.done = {given.task: given for given in mine if given.task in self.tasks}
        self.others = len(mine) - len(self.done)
        self.new = self.undone = 0
        self.choose: Choose = self.in_order
        self.kept: Callable[[Mapping[str, Label]], None] = lambda _: None
        self.goal = len(tasks)
        self.console = Console(highlight=False, markup=False, emoji=False, stderr=aside)

    def say(self, text: str) -> None:
        """A line for the person."""
        self.console.print(Text(text))

    def run(self, keys: _Lines | _Keyboard) -> None:
        """Show, ask, keep; until everything is answered or the person quits."""
        task = self.choose(self.done)
        while task is not None or self.new:
            if task is None:
                self.say("That was the last task. u takes back the last answer, any other key ends.")
                if keys.key().lower() != "u":
                    return
                task = self._undo()
                continue
            keys.forget()
            given = self._ask(task, keys)
            if given == "q":
                return
            if isinstance(given, Label):
                append_label(self.path, given)
                self.done[task.id] = given
                self.new += 1
                self.kept(self.done)
                task = self.choose(self.done)
            else:
                task = self._undo()
        self.say("Nothing is left to label.")

    def in_order(self, done: Mapping[str, Label]) -> Task | None:
        """The first task without an answer."""
        return next((task for name, task in self.tasks.items() if name not in done), None)

    def _undo(self) -> Task:
        """Take the last answer back; its task comes again."""
        name, given = self.done.popitem()
        append_undo(self.path, given)
        self.undone += 1
        self.kept(self.done)
        return self.tasks[name]

    def _ask(self, task: Task, keys: _Lines | _Keyboard) -> Label | Literal["q", "u"]:
        """An answer; or that the person quits, or takes the last answer back."""
        order = shown_order(task, annotator=self.annotator, seed=self.seed)
        answers, words = _answers(task, order)
        self._show(task, order, words)
        began, note = time.monotonic(), ""
        while True:
            key = keys.key()
            key, said = (key[0], key[1:].strip()) if key[:2] == "n " else (key.lower(), "")
            if key == "q":
                return "q"
            if key == "u" and self.done:
                return "u"
            if key in answers:
                seconds = round(time.monotonic() - began, 3)
                return Label(task.id, task.kind, self.annotator, answers[key], order, seconds, now(), note)
            if key == "n":
                note = visible(said or keys.line(lambda: self.say("Note, ended by enter:")))
                self.say("noted; now the answer")
            elif key == "?":
                self.say("\n".join(f"  {name:>6}  {meaning}" for name, meaning in words.items()))
            elif key == "u":
                self.say("there is no answer to take back")
            elif key:
                self.say(f"{visible(key)!r} is no answer here; ? shows the keys")

    def _show(self, task: Task, order: Sequence[int], words: dict[str, str]) -> None:
        self.console.clear()
        self.console.rule(Text(f"{len(self.done) + 1} of {self.goal}"))
        for message in task.messages:
            self.console.print(Text.assemble((f"{message.role}: ", "bold cyan"), visible(message.content)))
        titles = [f"reply {n}" if len(order) > 1 else "reply" for n in range(1, len(order) + 1)]
        panels: list[RenderableType] = [
            Panel(Text(visible(task.candidates[i]) or "(empty)"), title=title, title_align="left")
            for i, title in zip(order, titles, strict=True)
        ]
        if task.kind == "pair" and self.console.width >= _WIDE:
            grid = Table.grid(expand=True)
            grid.add_column(ratio=1)
            grid.add_column(ratio=1)
            grid.add_row(*panels)
            panels = [grid]
        self.console.print(Group(*panels))
        question = _QUESTIONS.get(task.kind, f"How good is the reply, from 1 (worst) to {task.scale} (best)?")
        self.console.print(Text.assemble((question, "bold"), f"  {' '.join(words)}"))

    def summary(self) -> dict[str, Any]:
        """What the session came to."""
        seconds = [given.seconds for given in self.done.values() if given.seconds is not None]
        return {
            "annotator": self.annotator,
            "labels": str(self.path),
            "tasks": len(self.tasks),
            "labelled": len(self.done),
            "skipped": sum(given.answer == "skip" for given in self.done.values()),
            "left": len(self.tasks) - len(self.done),
            "new": self.new,
            "undone": self.undone,
            "of_other_tasks": self.others,
            "median_seconds": round(statistics.median(seconds), 3) if seconds else None,
        }


def _answers(task: Task, order: Sequence[int]) -> tuple[dict[str, int | Word], dict[str, str]]:
    """What each key answers, and the keys with their meanings, for this order."""
    skip: dict[str, int | Word] = {"s": "skip"}
    if task.kind == "rating":
        digits = range(1, task.scale + 1)
        return {**{str(n): n for n in digits}, **skip}, {**{str(n): f"rate {n}" for n in digits}, **_COMMON}
    numbered: dict[str, int | Word] = {str(n): i for n, i in enumerate(order, start=1)}
    meanings = {key: f"reply {key} is the best" for key in numbered}
    if task.kind == "best":
        return {**numbered, **skip}, {**meanings, **_COMMON}
    sides: dict[str, int | Word] = {"left": order[0], "right": order[1]}
    even: dict[str, int | Word] = {"=": "tie", "0": "tie", "tie": "tie", "b": "both_bad"}
    meanings = {"1": "reply 1 is better (or left arrow)", "2": "reply 2 is better (or right arrow)"}
    return {**numbered, **sides, **even, **skip}, {**meanings, "=": "a tie", "b": "both are bad", **_COMMON}
