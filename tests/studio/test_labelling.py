"""The labelling session, driven as a person drives it: lines through a pipe, keys through a terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tutelage
from tutelage.errors import InputError, StoreError
from tutelage.feedback.human import Label, append_label, read_labels, verdicts
from tutelage.feedback.human_data import read_tasks
from tutelage.studio.labelling import label, shown_order, visible

PROGRAM = """
import json, sys
from pathlib import Path
from tutelage.studio.labelling import label
print("SUMMARY" + json.dumps(label(Path(sys.argv[1]), Path(sys.argv[2]), annotator=sys.argv[3], seed=5)))
"""
ASKED = "q ?\r\n"  # the last of the keys: now an answer is waited for
# A session with a terminal of its own, as a shell gives it, so that ctrl-c is a signal; and one that is heard:
# a suite started in the background hands on that interrupts are ignored.
OWN_TERMINAL = """
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(tutelage.__file__).parents[1]), "TERM": "xterm", "COLUMNS": "80"}

ROWS: list[dict[str, Any]] = [
    {"id": "one", "prompt": "Why?", "chosen": "Because it is.", "rejected": "It is not.", "model": "secret-7b"},
    {"id": "two", "prompt": "何ですか？", "candidates": ["りんご", "みかん"], "ids": ["secret-a", "secret-b"]},
    {"id": "rate", "prompt": "How?", "response": "So.", "scale": 7},
    {"id": "best", "prompt": "Which?", "candidates": ["alpha", "beta", "gamma"]},
]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return tasks, tmp_path / "labels.jsonl"


@pytest.fixture
def typed(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Label with these lines on a pipe; what it came to, and what was shown."""

    def run(*lines: str, annotator: str = "ann", **more: Any) -> tuple[dict[str, Any], str]:
        data = "".join(line + "\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        summary = label(*files, annotator=annotator, **more)
        return summary, capsys.readouterr().out

    return run


def answers(path: Path) -> list[Any]:
    return [given.answer for given in read_labels(path)]


def test_answers_are_kept_in_the_order_of_the_file(typed: Any, files: tuple[Path, Path]) -> None:
    summary, _ = typed("1", "right", "6", "3", seed=5)
    tasks, found = read_tasks(files[0]), read_labels(files[1])
    orders = [shown_order(task, annotator="ann", seed=5) for task in tasks]
    assert [given.order for given in found] == orders
    assert [given.answer for given in found] == [orders[0][0], orders[1][1], 6, orders[3][2]]
    assert [given.kind for given in found] == ["pair", "pair", "rating", "best"]
    assert all(given.seconds is not None and 0 <= given.seconds < 60 and given.at for given in found)
    assert summary["labelled"] == summary["tasks"] == summary["new"] == 4
    assert (summary["left"], summary["skipped"], summary["undone"], summary["of_other_tasks"]) == (0, 0, 0, 0)
    assert len(verdicts(tasks, found)) == 6


def test_every_word_of_a_pair(typed: Any, files: tuple[Path, Path]) -> None:
    task = read_tasks(files[0])[0]
    first, second = shown_order(task, annotator="ann", seed=0)
    said = {
        "1": first,
        "2": second,
        "left": first,
        "RIGHT": second,
        "=": "tie",
        "0": "tie",
        "b": "both_bad",
        "s": "skip",
    }
    for word, answer in said.items():
        files[1].unlink(missing_ok=True)
        typed(word, "q")
        assert answers(files[1]) == [answer]


def test_what_is_no_answer_is_asked_again(typed: Any, files: tuple[Path, Path]) -> None:
    _, shown = typed("3", "x", "", "u", "?", "=", "=", "8", "b", "=", "7", "4", "s")
    assert answers(files[1]) == ["tie", "tie", 7, "skip"]
    assert shown.count("is no answer here") == 6
    assert shown.count("there is no answer to take back") == 1
    assert "both are bad" in shown


def test_undo_shows_the_task_again(typed: Any, files: tuple[Path, Path]) -> None:
    summary, shown = typed("1", "2", "u", "u", "=", "b", "q")
    assert answers(files[1]) == ["tie", "both_bad"]
    assert [re.search(r"\d+ of 4", line)[0] for line in shown.splitlines() if " of 4 " in line] == [
        f"{n} of 4" for n in (1, 2, 3, 2, 1, 2, 3)
    ]
    assert (summary["undone"], summary["labelled"], summary["new"]) == (2, 2, 4)
    lines = files[1].read_text(encoding="utf-8").splitlines()
    assert [json.loads(line).get("undo", False) for line in lines] == [False, False, True, True, False, False]


def test_the_last_answer_can_be_taken_back(typed: Any, files: tuple[Path, Path]) -> None:
    typed("=", "=", "1", "1", "u", "s", "q")
    assert answers(files[1]) == ["tie", "tie", 1, "skip"]


def test_a_session_goes_on_where_it_stopped(typed: Any, files: tuple[Path, Path]) -> None:
    first, _ = typed("=", "q")
    assert (first["labelled"], first["left"]) == (1, 3)
    second, shown = typed("u", "b", "s")  # what an earlier session answered can be taken back too
    assert "2 of 4" in shown and (second["labelled"], second["new"], second["skipped"]) == (2, 2, 1)
    _, shown = typed("4", "1")
    assert "Why?" not in shown and "How?" in shown
    last, shown = typed("1")
    assert "Nothing is left" in shown and (last["new"], last["left"]) == (0, 0)
    assert len(files[1].read_text(encoding="utf-8").splitlines()) == 6


def test_people_do_not_see_each_others_answers(typed: Any, files: tuple[Path, Path]) -> None:
    typed("=", "=", "1", "1")
    append_label(files[1], Label("gone-123", "pair", "bob", 0, (0, 1)))
    summary, shown = typed("b", "q", annotator="bob")
    assert "1 of 4" in shown and (summary["labelled"], summary["of_other_tasks"]) == (1, 1)
    assert [(given.annotator, given.answer) for given in read_labels(files[1])][-1] == ("bob", "both_bad")


def test_notes(typed: Any, files: tuple[Path, Path]) -> None:
    typed("n", "hängt ab", "=", "n zu kurz", "b", "q")
    assert [given.note for given in read_labels(files[1])] == ["hängt ab", "zu kurz"]


def test_labelling_is_blind(typed: Any) -> None:
    _, shown = typed("?", "=", "?", "=", "?", "1", "?", "1")
    assert "Because it is." in shown and "みかん" in shown and "gamma" in shown
    for word in ("secret", "chosen", "rejected", "one-", "tasks.jsonl"):
        assert word not in shown


def test_the_screen_shows_the_recorded_order(typed: Any, files: tuple[Path, Path]) -> None:
    _, shown = typed("q")
    (task, *_), places = read_tasks(files[0]), [shown.index(text) for text in ("Because it is.", "It is not.")]
    order = shown_order(task, annotator="ann", seed=0)
    assert (places[0] < places[1]) == (order == (0, 1))


def test_orders_are_fair_and_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Q{n}", "candidates": ["A", "B"]}) + "\n" for n in range(400)))
    tasks = read_tasks(path)
    firsts = [shown_order(task, annotator="ann", seed=0)[0] for task in tasks]
    assert 160 < sum(firsts) < 240  # four standard deviations
    assert firsts == [shown_order(task, annotator="ann", seed=0)[0] for task in tasks]
    for other in ({"annotator": "bob", "seed": 0}, {"annotator": "ann", "seed": 1}):
        same = sum(a == shown_order(task, **other)[0] for a, task in zip(firsts, tasks, strict=True))
        assert 160 < same < 240


def test_what_cannot_begin_is_refused(typed: Any, files: tuple[Path, Path], tmp_path: Path) -> None:
    for name in (" ", "a\x1b[2J", "a\nb"):
        with pytest.raises(InputError, match="annotator"):
            typed(annotator=name)
    with pytest.raises(StoreError, match="nowhere"):
        label(files[0], tmp_path / "nowhere" / "labels.jsonl", annotator="ann")
    before = files[0].read_bytes()
    with pytest.raises(InputError, match="is no label"):  # one file given for both
        label(files[0], files[0], annotator="ann")
    assert files[0].read_bytes() == before


# Texts that would command the terminal


def test_visible_by_hand() -> None:
    assert visible("a\x1b[31mb\x07\r\n\tc\rd\x9bm\x7f") == "a\\x1b[31mb\\x07\n\tc\\x0dd\\x9bm\\x7f"
    assert visible("a\u202eb\u2066\u2028\ud800") == "a\\u202eb\\u2066\\u2028\\ud800"
    kept = "שלום नमस्ते 👩‍👩‍👧 می‌خواهم é"
    assert visible(kept) == kept


@given(st.text())
def test_no_control_character_is_left(text: str) -> None:
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", visible(text))
    assert visible(visible(text)) == visible(text)


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b1m \r[bold]x[/bold] :smile: \u202eevil"


def hostile_file(folder: Path) -> Path:
    path = folder / "hostile.jsonl"
    row = {
        "prompt": [{"role": "user", "content": "Q" + HOSTILE}],
        "candidates": ["A" + HOSTILE, "B" + HOSTILE],
        "id": HOSTILE,
    }
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


def test_no_command_reaches_a_pipe(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(hostile_file(tmp_path)), str(tmp_path / "labels.jsonl"), "ann"]
    done = subprocess.run(command, input=b"\x1b[A\n1\n", capture_output=True, env=ENVIRONMENT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)
    assert shown.count("\\x1b]0;owned\\x07\\x1b[2J\\x9b1m \\x0d[bold]x[/bold] :smile: \\u202eevil") == 3
    assert json.loads(shown.rpartition("SUMMARY")[2])["labelled"] == 1


# A real terminal


class Terminal:
    """The program on a pseudo-terminal."""

    def __init__(self, tasks: Path, labels: Path, *, columns: int = 80) -> None:
        self.screen, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        self.shown = b""
        environment = {**ENVIRONMENT, "COLUMNS": str(columns)}
        command = [sys.executable, "-c", OWN_TERMINAL + PROGRAM, str(tasks), str(labels), "ann"]
        ends = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave}
        self.program = subprocess.Popen(command, **ends, env=environment, start_new_session=True)

    def wait(self, text: str) -> str:
        """Everything that was shown up to and with `text`, since the last wait."""
        wanted, deadline = text.encode(), time.monotonic() + 30
        while wanted not in self.shown:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown[-300:]!r}"
            if select.select([self.screen], [], [], 0.2)[0]:
                self.shown += os.read(self.screen, 65536)
        before, _, self.shown = self.shown.partition(wanted)
        return before.decode() + text

    def press(self, keys: bytes) -> None:
        os.write(self.screen, keys)

    def end(self) -> dict[str, Any]:
        """The summary; the terminal is as it was."""
        self.wait("SUMMARY")
        summary = self.wait("}")
        assert self.program.wait(60) == 0
        assert termios.tcgetattr(self.slave) == self.before
        return json.loads(summary)

    def close(self) -> None:
        if self.program.poll() is None:
            self.program.send_signal(signal.SIGKILL)
            self.program.wait()
        os.close(self.screen)
        os.close(self.slave)


@pytest.fixture
def terminal(request: pytest.FixtureRequest) -> Iterator[Any]:
    made: list[Terminal] = []

    def start(*files: Path, **more: Any) -> Terminal:
        made.append(Terminal(*files, **more))
        return made[-1]

    yield start
    for one in made:
        one.close()


def test_keys_on_a_real_terminal(terminal: Any, files: tuple[Path, Path]) -> None:
    tasks = read_tasks(files[0])
    (left, _), (_, right) = (shown_order(task, annotator="ann", seed=5) for task in tasks[:2])
    seat = terminal(*files)
    seat.wait(ASKED)
    seat.press(b"\x1b[A")  # an arrow without a meaning, and a key that is none
    seat.press(b"x")
    seat.wait("'x' is no answer here")
    seat.press(b"\x1b[D")  # left
    seat.wait("2 of 4")
    seat.wait(ASKED)
    seat.press(b"u")
    seat.wait("1 of 4")
    seat.wait(ASKED)
    seat.press(b"\x1b[D")
    seat.wait("2 of 4")
    seat.wait(ASKED)
    seat.press(b"n")
    seat.wait("Note")
    seat.press("größer\n".encode())
    seat.wait("größer")  # typed with echo
    seat.wait("noted")
    seat.press(b"\x1bOC")  # right, as some terminals say it
    seat.wait("3 of 4")
    seat.wait(ASKED)
    seat.press(b"\x03")
    assert {"labelled": 2, "left": 2, "new": 3, "undone": 1}.items() <= seat.end().items()
    found = read_labels(files[1])
    assert [(given.answer, given.note) for given in found] == [(left, ""), (right, "größer")]


def test_a_key_pressed_too_early_answers_nothing(terminal: Any, files: tuple[Path, Path]) -> None:
    """Ten strokes at once: the first answers, those that came before the next task was shown are dropped."""
    seat = terminal(*files)
    seat.wait(ASKED)
    seat.press(b"=" * 10)
    seat.wait("2 of 4")
    seat.wait(ASKED)
    seat.press(b"q")
    assert seat.end()["labelled"] == 1


def test_no_command_reaches_a_terminal(terminal: Any, tmp_path: Path) -> None:
    seat = terminal(hostile_file(tmp_path), tmp_path / "labels.jsonl", columns=160)
    shown = seat.wait("reply 1") + seat.wait("reply 2") + seat.wait(ASKED)
    assert "\x1b]" not in shown and "\x07" not in shown and "\x9b" not in shown and "\u202e" not in shown
    assert shown.count("\x1b[2J") == 1  # our own, before the task
    assert shown.count("\\x1b]0;owned") == 3
    # Wide enough for two replies side by side.
    assert "\n" not in shown[shown.index("reply 1") : shown.index("reply 2")]
    seat.press(b"\x04")
    assert seat.end()["labelled"] == 0
