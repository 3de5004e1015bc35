"""What judge models are asked: prompts as files with a hash, judged text behind a fence it cannot close."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.config import data_file
from tutelage.errors import InputError
from tutelage.feedback.constitution import Principle
from tutelage.records import Message, Prompt, content_hash

__all__ = ["JudgePrompt", "conversation", "fence", "filled", "load_judge_prompt", "rules"]

_HOLES = {
    "pairwise": ("prompt", "first", "second"),
    "pointwise": ("prompt", "reply"),
    "listwise": ("prompt", "replies"),
}
_LEAST_MASS = 0.05


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    """The words of a judge.

    Args:
        kind: pairwise, pointwise or listwise.
        system: System turn; may be empty.
        user: User turn with the holes {rules}, {prompt} and, by kind, {first} {second}, {reply} or {replies}.
        labels: Words of which one is the answer: two for pairs, in the order shown; ratings from bad
            to good; empty for lists, whose labels are letters.
        opening: How the answer begins, up to the label.
        reason: What is asked before the verdict by a judge that reasons first.
        output: `labels` reads the labels' log-probabilities, `json` a JSON object with "verdict".
        least_mass: Probability that must go to the labels; below it the judge abstains.
    """

    kind: str
    system: str
    user: str
    labels: tuple[str, ...] = ()
    opening: str = ""
    reason: str = ""
    output: str = "labels"
    least_mass: float = _LEAST_MASS

    @property
    def hash(self) -> str:
        """Content hash; every verdict carries it."""
        return content_hash(dataclasses.astuple(self))

    def messages(self, **parts: str) -> tuple[Message, ...]:
        """The conversation with its holes filled in."""
        return filled(self.system, self.user, parts)


def filled(system: str, user: str, parts: Mapping[str, str]) -> tuple[Message, ...]:
    """A user turn with its {holes} filled in, after a system turn if there is one."""
    # One pass over the template: a hole's name inside a judged text stays what it is.
    text = re.sub(r"\{(\w+)\}", lambda m: parts.get(m[1], m[0]), user.strip())
    lead = (Message("system", system.strip()),) if system.strip() else ()
    return (*lead, Message("user", text))


def rules(principles: Sequence[Principle]) -> str:
    """Principles as the opening paragraph of a judge's prompt; empty without any."""
    if not principles:
        return ""
    lines = "\n".join(f"- {p.text}" for p in principles)
    return f"Judge by these principles:\n{lines}\n\n"


def fence(text: str) -> str:
    """The text between two marks that it cannot contain.

    The mark is a hash of the text, so that it is the same in every run (answers are cached by
    content), and is drawn again until the text does not hold it.
    """
    nonce = content_hash(["fence", text], length=12)
    while nonce in text:
        nonce = content_hash(["fence", nonce, text], length=12)
    return f"<<<{nonce}\n{text}\n{nonce}>>>"


def conversation(prompt: Prompt) -> str:
    """A conversation as a judge reads it: fenced, each turn after its role."""
    if len(prompt.messages) == 1:
        return fence(prompt.text)
    return fence("\n".join(f"{m.role.capitalize()}: {m.content}" for m in prompt.messages))


def load_judge_prompt(name: str) -> JudgePrompt:
    """Read a prompt by file or built-in name (`builtin:pairwise`).

    Raises:
        InputError, RecipeError: There is no such file, or it is no judge prompt.
    """
    path = data_file(name, suffix="judges/*.toml")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"the judge prompt {path} cannot be read: {error}", expected="a UTF-8 TOML file") from error
    return _checked(path, data)


def _checked(path: Path, data: Mapping[str, Any]) -> JudgePrompt:
    known = {f.name for f in dataclasses.fields(JudgePrompt)}
    strange = sorted(set(data) - known)
    if strange:
        raise InputError(f"{path} has the unknown key '{strange[0]}'", expected=", ".join(sorted(known)))
    kind = data.get("kind")
    if kind not in _HOLES:
        raise InputError(f"{path}: kind is {kind!r}", expected=" | ".join(_HOLES))
    texts = {k: data.get(k, "") for k in ("system", "user", "opening", "reason")}
    if not all(isinstance(v, str) for v in texts.values()):
        raise InputError(f"{path}: system, user, opening and reason must be texts", expected='for example user = "..."')
    lacking = [h for h in _HOLES[kind] if "{" + h + "}" not in texts["user"]]
    if lacking:
        raise InputError(f"{path}: user lacks {{{lacking[0]}}}", expected=", ".join(f"{{{h}}}" for h in _HOLES[kind]))
    labels = data.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(x, str) and x.strip() for x in labels):
        raise InputError(f"{path}: labels is {labels!r}", expected='for example labels = ["A", "B"]')
    wanted = {"pairwise": len(labels) == 2, "pointwise": len(labels) >= 2, "listwise": not labels}[kind]
    if not wanted or len(set(labels)) != len(labels):
        raise InputError(
            f"{path}: labels is {labels!r}", expected="two labels for pairs, ratings from bad to good, none for lists"
        )
    output, mass = data.get("output", "labels"), data.get("least_mass", _LEAST_MASS)
    if output not in ("labels", "json") or (output == "json" and kind == "listwise"):
        raise InputError(f"{path}: output is {output!r}", expected="labels, or json for pairs and ratings")
    if isinstance(mass, bool) or not isinstance(mass, int | float) or not 0 <= mass <= 1:
        raise InputError(f"{path}: least_mass is {mass!r}", expected="a number from 0 to 1")
    return JudgePrompt(kind, labels=tuple(labels), output=output, least_mass=float(mass), **texts)
