"""What a terminal shows while a run works: a live bar, plain lines, or JSON lines for machines."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import Any

__all__ = ["JsonProgress", "LiveProgress", "PlainProgress", "choose_progress"]


class PlainProgress:
    """One line when a stage begins and when it ends; for logs and pipes."""

    def __init__(self) -> None:
        self._name, self._unit, self._total, self._done = "", "", 0, 0
        self._began = time.perf_counter()
        self._figures: dict[str, float | str] = {}

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def stage(self, name: str, total: int, unit: str) -> None:
        """A stage begins."""
        self._end()
        self._name, self._unit, self._total, self._done = name, unit, total, 0
        self._began = time.perf_counter()
        print(f"{name} ({total} {unit})", flush=True)

    def _end(self) -> None:
        if self._name:
            seconds = time.perf_counter() - self._began
            print(
                f"  {self._done}/{self._total} {self._unit} in {seconds:.1f} s{_shown(self._figures)}",
                flush=True,
            )
        self._name, self._figures = "", {}

    def advance(self, steps: int = 1) -> None:
        """Steps were done."""
        self._done += steps

    def figures(self, **values: float | str) -> None:
        """Live figures, shown at the stage's end."""
        self._figures.update(values)

    def say(self, text: str) -> None:
        """A line worth keeping."""
        print(text, flush=True)


class JsonProgress:
    """One JSON object a line on stderr, so that stdout holds the result alone."""

    def __enter__(self) -> JsonProgress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _tell(self, event: str, **more: Any) -> None:
        print(json.dumps({"event": event, **more}, ensure_ascii=False), file=sys.stderr, flush=True)

    def stage(self, name: str, total: int, unit: str) -> None:
        """A stage begins."""
        self._tell("stage", name=name, total=total, unit=unit)

    def advance(self, steps: int = 1) -> None:
        """Not told: a line a step would drown the rest."""

    def figures(self, **values: float | str) -> None:
        """Live figures."""
        self._tell("figures", **values)

    def say(self, text: str) -> None:
        """A line worth keeping."""
        self._tell("message", text=text)


class LiveProgress:
    """A bar with stage, steps, time left and the live figures (rich)."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Left

        self._console = Console()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            Left(),
            TextColumn("[cyan]{task.fields[figures]}"),
            console=self._console,
        )
        self._task: Any = None
        self._figures: dict[str, float | str] = {}

    def __enter__(self) -> LiveProgress:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def stage(self, name: str, total: int, unit: str) -> None:
        """A stage begins."""
        self._figures = {}
        self._task = self._bar.add_task(name, total=total, unit=unit, figures="")

    def advance(self, steps: int = 1) -> None:
        """Steps were done."""
        if self._task is not None:
            self._bar.advance(self._task, steps)

    def figures(self, **values: float | str) -> None:
        """Live figures beside the bar."""
        self._figures.update(values)
        if self._task is not None:
            self._bar.update(self._task, figures=_shown(self._figures).strip(" ;"))

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._console.print(text, markup=False, highlight=False)


def _shown(figures: dict[str, float | str]) -> str:
    parts = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()]
    return "; " + ", ".join(parts) if parts else ""


def choose_progress(*, as_json: bool) -> LiveProgress | PlainProgress | JsonProgress:
    """JSON when asked for; a live bar on a terminal; plain lines otherwise."""
    if as_json:
        return JsonProgress()
    return LiveProgress() if sys.stdout.isatty() else PlainProgress()
