"""How many questions until somebody's values are understood: chosen ones against any, through the real session.

    python benchmarks/values.py [--seeds 20] [--values 10] [--deviation 2.0]

A simulated person with known weights answers `tutelage values ask` at a terminal that is a pipe: the session, the
files and the posterior are those of the command. Counted are the answers after which the weights found order a
share of unseen pairs as the true ones do, and keep doing so for five answers; and what is lost, in worth a prompt,
by picking each prompt's reply by the weights found instead of the true ones. EVOI and BALD choose from the same
questions; any order is the third.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from tutelage.applications.value_bank import Bank, read_bank
from tutelage.applications.values import Asker, Choose
from tutelage.feedback.human import Label
from tutelage.studio.labelling import hold, shown_order

LASTING = 5


class Person:
    """Whoever answers at the terminal, with the noise that the model of answers assumes."""

    def __init__(self, asker: Asker, weights_K: np.ndarray, unseen_NK: np.ndarray, seed: int) -> None:
        self.asker, self.weights_K, self.unseen_NK = asker, weights_K, unseen_NK
        self.draw, self.task, self.right = np.random.default_rng(seed), None, [0.5]
        self.lost: list[float] = []
        self.row = {task.id: n for n, task in enumerate(asker.bank.tasks)}

    def choose(self, done: Mapping[str, Label]) -> Any:
        """The next question, which the person then sees."""
        self.task = self.asker.next(done)
        return self.task

    def kept(self, done: Mapping[str, Label]) -> None:
        """After each answer: keep it as the command does, and measure."""
        self.asker.keep(done)
        mean_K = self.asker.posterior(done).mean_K
        worths = [(phi_CK @ self.weights_K, phi_CK @ mean_K) for phi_CK in self.asker.bank.options]
        self.lost.append(statistics.fmean(float(true.max() - true[held.argmax()]) for true, held in worths))
        self.right.append(float(((self.unseen_NK @ mean_K > 0) == (self.unseen_NK @ self.weights_K > 0)).mean()))

    def readline(self) -> bytes:
        """A line typed."""
        if self.task is None:
            return b"q\n"
        n = self.row[self.task.id]
        margin = float((self.asker.bank.first_NK[n] - self.asker.bank.second_NK[n]) @ self.weights_K)
        first = self.draw.random() < 1.0 / (1.0 + math.exp(-margin))
        return b"%d\n" % (1 + shown_order(self.task, annotator="ada", seed=0).index(0 if first else 1))

    def isatty(self) -> bool:
        """A pipe."""
        return False

    @property
    def buffer(self) -> Person:
        """Of the pipe."""
        return self


def questions(folder: Path, values: int, seed: int) -> Bank:
    """Replies with random scores: 100 prompts, 4 replies each."""
    draw = np.random.default_rng(seed)
    names = [f"value-{k}" for k in range(values)]
    path = folder / "candidates.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for p in range(100):
            scores = [dict(zip(names, map(float, draw.normal(size=values)), strict=True)) for _ in range(4)]
            row = {"prompt": f"Question {p}?", "candidates": [f"{p}-{r}" for r in range(4)], "features": scores}
            file.write(json.dumps(row) + "\n")
    return read_bank(path)


def session(seed: int, how: Choose, *, values: int, deviation: float, most: int) -> Person:
    """A session to its end: what was right after 0, 1, 2, ... answers, and lost after 1, 2, ..."""
    with tempfile.TemporaryDirectory() as name:
        bank = questions(Path(name), values, seed)
        draw = np.random.default_rng([seed, 1])
        weights_K, unseen_NK = deviation * draw.normal(size=values), draw.normal(size=(2000, values))
        asker = Asker(
            bank, Path(name) / "values.json", annotator="ada", questions=most, how=how, prior=deviation, seed=seed
        )
        person = Person(asker, weights_K, unseen_NK, seed)
        before, sys.stdin = sys.stdin, person  # type: ignore[assignment]
        try:
            with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
                hold(bank.tasks, asker.labels, annotator="ada", choose=person.choose, kept=person.kept)
        finally:
            sys.stdin = before
        return person


def reached(right: list[float], share: float) -> int | None:
    """Answers after which the share is there and stays for `LASTING` answers; None when it never does."""
    good = [value >= share for value in right]
    return next((n for n in range(len(good) - LASTING) if all(good[n : n + LASTING + 1])), None)


def main() -> None:
    """Print one line a seed and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--values", type=int, default=10)
    parser.add_argument("--deviation", type=float, default=2.0)
    parser.add_argument("--most", type=int, default=200)
    options = parser.parse_args()
    rest = {"values": options.values, "deviation": options.deviation, "most": options.most}
    shares, table, lost = (0.85, 0.9, 0.95), [], []
    after = [n for n in (5, 10, 20, 40, 80) if n <= options.most]
    for seed in range(options.seeds):
        people = {how: session(seed, how, **rest) for how in get_args(Choose)}
        table.append({how: [reached(one.right, share) for share in shares] for how, one in people.items()})
        lost.append({how: [one.lost[n - 1] for n in after] for how, one in people.items()})
        print(seed, table[-1], lost[-1], flush=True)
    for n, share in enumerate(shares):
        counts = {h: [row[h][n] if row[h][n] is not None else math.inf for row in table] for h in get_args(Choose)}
        both = [b / a for a, b in zip(counts["bald"], counts["random"], strict=True) if a < math.inf]
        middle = {how: statistics.median(found) for how, found in counts.items()}
        ratio = f"ratio median {statistics.median(both):.2f}, least {min(both):.2f}" if both else "never reached"
        print(f"{share:.0%}: median {middle}, {ratio}")
    for n, count in enumerate(after):
        found = {how: [row[how][n] for row in lost] for how in get_args(Choose)}
        paired = sum(e < b for e, b in zip(found["evoi"], found["bald"], strict=True))
        middle = {how: round(statistics.median(values), 3) for how, values in found.items()}
        print(f"lost a prompt after {count}: median {middle}; evoi below bald in {paired} of {len(lost)}")


if __name__ == "__main__":
    main()
