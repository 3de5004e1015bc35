"""What a terminal shows: plain lines, a live bar, or JSON for machines."""

from __future__ import annotations

import io
import json
import sys

import pytest

from tutelage.studio.console import JsonProgress, LiveProgress, PlainProgress, choose_progress


def work(progress: PlainProgress | JsonProgress | LiveProgress) -> None:
    with progress as told:
        told.say("run [bold]one[/bold]")
        told.stage("generate", 3, "replies")
        told.advance()
        told.advance(2)
        told.figures(loss=0.123456, note="x")
        told.stage("judge", 1, "batch")
        told.advance()


def test_plain_lines_say_what_began_and_how_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    work(PlainProgress())
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["run [bold]one[/bold]", "generate (3 replies)"]
    assert lines[2].startswith("  3/3 replies in ") and lines[2].endswith("; loss 0.123, note x")
    assert lines[3] == "judge (1 batch)"
    assert lines[4].startswith("  1/1 batch in ") and "loss" not in lines[4]


def test_the_last_stage_ends_even_when_the_work_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with PlainProgress() as told:
            told.stage("generate", 3, "replies")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert "0/3 replies" in capsys.readouterr().out


def test_json_goes_to_stderr_a_line_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    work(JsonProgress())
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [json.loads(line) for line in shown.err.splitlines()] == [
        {"event": "message", "text": "run [bold]one[/bold]"},
        {"event": "stage", "name": "generate", "total": 3, "unit": "replies"},
        {"event": "figures", "loss": 0.123456, "note": "x"},
        {"event": "stage", "name": "judge", "total": 1, "unit": "batch"},
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    chosen = choose_progress(as_json=False)
    assert isinstance(chosen, LiveProgress)
    chosen.advance()  # before any stage: nothing to advance, and no error
    chosen.figures(loss=1.0)
    work(chosen)
    shown = screen.getvalue()
    assert "generate" in shown and "judge" in shown and "3/3" in shown
    assert "[bold]one[/bold]" in shown  # what a model wrote is never read as markup


def test_who_gets_what(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose_progress(as_json=True), JsonProgress)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert isinstance(choose_progress(as_json=False), PlainProgress)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert isinstance(choose_progress(as_json=True), JsonProgress)
