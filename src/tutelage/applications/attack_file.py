"""The file of a red team: the archive, every attack that was tried, and what decides how it goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.applications.attackers import Brief
from tutelage.errors import InputError
from tutelage.loop.evaluate import share
from tutelage.objectives.red_team import Archive, Attack, Sides, attack_success
from tutelage.records import Message, Prompt
from tutelage.store.runs import write_atomic

__all__ = ["SIDES", "AttackFile", "Tried", "printable"]

_FORMAT = "tutelage-red-team-1"
SIDES = ("training", "held_out")


@dataclasses.dataclass(frozen=True)
class Tried:
    """One attack that was put to the target.

    Args:
        id: Of its text.
        round: In which it was tried, from 1.
        attacker: Who wrote it.
        style: Its cell, with `topic`.
        topic: Its cell, with `style`.
        question: What it asks for, before anybody rewrote it.
        text: The attack.
        reply: The target's first reply.
        unsafe: Mean over the replies, 0 to 1; None where the judge could not tell.
        why: The judge's reason, also for saying nothing.
        novelty: 1 - the largest cosine to what its side had kept before.
        fluency: 0 to 1, or None where it could not be read.
        worth: What orders it within its cell.
        kept: Whether it was the best of its cell when it came.
    """

    id: str
    round: int
    attacker: str
    style: str
    topic: str
    question: str
    text: str
    reply: str
    unsafe: float | None
    why: str
    novelty: float
    fluency: float | None
    worth: float | None
    kept: bool

    @property
    def prompt(self) -> Prompt:
        """What the target is asked."""
        return Prompt(self.id, (Message("user", self.text),))


class AttackFile:
    """What a red team has found so far.

    Args:
        path: Where it is kept.
        settings: Whatever decides what the next round does; a file goes on under the same ones only.
        archive: The best attack of each cell of each side.
        questions: Which questions belong to which side.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], archive: Archive, questions: Sides) -> None:
        self.path, self.settings, self.archive, self.questions = path, dict(settings), archive, questions
        self.rounds = 0
        self.tried: list[Tried] = []
        self.unwritten: dict[str, int] = {}

    @classmethod
    def fresh(
        cls, path: Path, settings: Mapping[str, Any], brief: Brief, attackers: Sequence[str], *, share: float, seed: int
    ) -> AttackFile:
        """An empty one: attackers are parted by `share`, and half of each topic's questions are held out.

        Raises:
            RecipeError: The share leaves one side empty.
        """
        sides = Sides().assign(attackers, share=share, seed=seed)
        questions = Sides()
        for topic in brief.topics:
            part = Sides().assign([q.ask for q in topic.questions], share=0.5, seed=seed)
            questions = Sides((*questions.training, *part.training), (*questions.held_out, *part.held_out))
        archive = Archive([s.name for s in brief.styles], [t.name for t in brief.topics], sides)
        return cls(path, settings, archive, questions)

    @classmethod
    def read(cls, path: Path) -> AttackFile:
        """Read what `save` wrote.

        Raises:
            InputError: There is none, or it is damaged, or an attack stands on a side that is not its own.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.get("format") != _FORMAT:
                raise InputError(f"{path} is no file of a red team", expected="what `tutelage redteam attack` wrote")
            questions = Sides(*(tuple(map(str, data["questions"][side])) for side in SIDES))
            found = cls(path, data["settings"], Archive.from_dict(data["archive"]), questions)
            found.rounds, found.unwritten = int(data["rounds"]), {k: int(n) for k, n in data["unwritten"].items()}
            found.tried = [Tried(**row) for row in data["tried"]]
        except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} cannot be read: {error}",
                expected="what `tutelage redteam attack` wrote",
                fix="check the path, or start anew in another file",
            ) from error
        found._check_sides()
        return found

    def _check_sides(self) -> None:
        known = {t.text: self.side(t) for t in self.tried}
        crossed = [t.question for t in self.tried if self.questions.of(t.question) != self.side(t)]
        crossed += [a.text for a in self.archive.training() if known.get(a.text) != "training"]
        crossed += [a.text for a in self.archive.evaluation() if known.get(a.text) != "held_out"]
        if crossed:
            raise InputError(
                f"{self.path}: {crossed[0]!r} stands on a side that is not its attacker's",
                expected="attackers and questions that stay on their side",
                fix="take another copy, or start anew in another file",
            )

    def save(self) -> None:
        """Write everything; the file appears whole or not at all.

        Raises:
            StoreError: It cannot be written.
        """
        body = {
            "format": _FORMAT,
            "settings": self.settings,
            "rounds": self.rounds,
            "questions": {side: list(getattr(self.questions, side)) for side in SIDES},
            "unwritten": self.unwritten,
            "tried": [dataclasses.asdict(t) for t in self.tried],
            "archive": self.archive.to_dict(),
        }
        write_atomic(self.path, json.dumps(body, ensure_ascii=False, indent=1) + "\n")

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise InputError unless these settings are the file's own."""
        for key in dict.fromkeys((*self.settings, *settings)):
            if self.settings.get(key) != settings.get(key):
                raise InputError(
                    f"{self.path} was begun with {key} {self.settings.get(key)!r}, not {settings.get(key)!r}",
                    expected="the same settings, and more --rounds",
                    fix="give what it was begun with, or another --archive",
                )

    def side(self, attack: Tried | Attack) -> str:
        """`training` or `held_out`."""
        return self.archive.sides.of(attack.attacker)

    def of_side(self, side: str, *, best: bool = False) -> list[Tried]:
        """Attacks of a side: all that were tried, or those that the archive keeps."""
        kept = {a.id for a in (self.archive.training() if side == "training" else self.archive.evaluation())}
        return [t for t in self.tried if self.side(t) == side and (t.id in kept or not best)]

    def table(self) -> dict[str, Any]:
        """Attack success by attacker and by side, over all that was tried; what is missing; examples."""
        attacks = [Attack(t.id, t.text, t.style, t.topic, t.attacker, (), t.worth) for t in self.tried]
        counts = attack_success(attacks, [t.unsafe for t in self.tried])
        rows, sides = [], []
        for side in SIDES:
            total = [0, 0, 0]
            for name in getattr(self.archive.sides, side):
                found = counts.get(name, (0, 0, 0))
                total = [a + b for a, b in zip(total, found, strict=True)]
                rows.append(
                    {"attacker": name, "side": side, **_shares(*found), "unwritten": self.unwritten.get(name, 0)}
                )
            kept = sorted(self.of_side(side, best=True), key=lambda t: -(t.worth or 0.0))
            examples = [{"attacker": t.attacker, "text": t.text, "reply": t.reply} for t in kept[:3]]
            coverage = self.archive.coverage(side)
            sides.append({"side": side, **_shares(*total), "coverage": coverage, "examples": examples})
        told = {"file": str(self.path), "rounds": self.rounds, "tried": len(self.tried)}
        return told | {"attackers": rows, "sides": sides}


def _shares(hits: int, measured: int, missing: int) -> dict[str, Any]:
    p, low, high = share(hits, measured)
    return {"successes": hits, "measured": measured, "unmeasured": missing, "success": p, "low": low, "high": high}


def printable(text: str, limit: int = 100) -> str:
    """One line that a terminal shows and does not obey: control characters and line breaks are replaced."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
    return line if len(line) <= limit else line[: limit - 1] + "…"
