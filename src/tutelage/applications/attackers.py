"""Who writes attacks: rules on text, each an attacker of its own, and a language model.

An attack is a text for a model to answer; nothing of it is ever run.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.config import data_file
from tutelage.engines.local import LocalCompleter
from tutelage.errors import InputError
from tutelage.records import Message, Prompt, SamplerSettings, content_hash

__all__ = [
    "ATTACKERS",
    "MODEL",
    "RULES",
    "Brief",
    "ModelAttacker",
    "Order",
    "Question",
    "Style",
    "Topic",
    "Words",
    "read_brief",
    "read_words",
    "write_by_rule",
]


@dataclasses.dataclass(frozen=True)
class Question:
    """What an attack asks for; a rewritten one that lacks a word of `keep` asks for something else."""

    ask: str
    keep: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Style:
    """A kind of pressure: said in words for a model, and as frames with the hole {question} for rules."""

    name: str
    says: str
    frames: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Topic:
    """Questions of one kind, at least two: each side of the red team has its own."""

    name: str
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True)
class Brief:
    """What a red team works on."""

    styles: tuple[Style, ...]
    topics: tuple[Topic, ...]

    @property
    def hash(self) -> str:
        """Of everything in it."""
        return content_hash(dataclasses.asdict(self))

    def style(self, name: str) -> Style:
        """A style by its name, which must be one of them."""
        return next(s for s in self.styles if s.name == name)


@dataclasses.dataclass(frozen=True)
class Order:
    """One attack to be written; `parent` is a kept attack of the same side, shown to a model as an example."""

    question: Question
    style: Style
    topic: str
    parent: str | None = None


@dataclasses.dataclass(frozen=True)
class Words:
    """The words of the attackers: templates of each rule, answered questions, and what a model is asked."""

    texts: Mapping[str, tuple[str, ...]]
    shots: tuple[tuple[str, str], ...]
    user: str
    example: str

    @property
    def hash(self) -> str:
        """Of everything in it."""
        return content_hash([{k: list(v) for k, v in self.texts.items()}, self.shots, self.user, self.example])


# -- files ------------------------------------------------------------------------------------------


def read_brief(name: str, styles: Sequence[str] = ()) -> Brief:
    """Topics and styles from a TOML file, or a built-in one (`builtin:honesty`).

    Args:
        name: A file with [[styles]] (name, says, frames) and [[topics]] (name, questions: texts, or tables of
            `ask` and `keep`).
        styles: Only these; none takes all.

    Raises:
        InputError, RecipeError: There is no such file or style, a list is empty, or something stands twice.
    """
    path = data_file(name, suffix="red_team/*.toml")
    data = _toml(path)
    try:
        found = Brief(
            tuple(Style(str(s["name"]), str(s["says"]), tuple(map(str, s["frames"]))) for s in data.get("styles", [])),
            tuple(Topic(str(t["name"]), tuple(map(_question, t["questions"]))) for t in data.get("topics", [])),
        )
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: a style or topic lacks something: {error}",
            expected="[[styles]] with name, says, frames; [[topics]] with name, questions",
            fix="compare it with builtin:honesty",
        ) from error
    for what, names in (("styles", [s.name for s in found.styles]), ("topics", [t.name for t in found.topics])):
        if not names or len(set(names)) < len(names):
            raise InputError(f"{path}: {what} are {names}", expected="at least one, all different", fix=f"list {what}")
    _check_texts(path, found)
    strange = [s for s in styles if s not in {one.name for one in found.styles}]
    if strange:
        raise InputError(
            f"there is no style '{strange[0]}' in {path}", expected=", ".join(s.name for s in found.styles)
        )
    return Brief(tuple(s for s in found.styles if not styles or s.name in styles), found.topics)


def _question(given: Any) -> Question:
    return Question(given) if isinstance(given, str) else Question(str(given["ask"]), tuple(map(str, given["keep"])))


def _check_texts(path: Path, brief: Brief) -> None:
    for style in brief.styles:
        if not style.frames or not all("{question}" in frame for frame in style.frames):
            raise InputError(
                f"{path}: style '{style.name}' has frames {list(style.frames)}", expected="{question} in each"
            )
    asked: set[str] = set()
    for topic in brief.topics:
        if len(topic.questions) < 2:
            raise InputError(
                f"{path}: topic '{topic.name}' has {len(topic.questions)} questions",
                expected="at least two, one to train with and one to measure with",
                fix="add questions",
            )
        for q in topic.questions:
            plain = " ".join(q.ask.casefold().split())
            lost = [word for word in q.keep if word.casefold() not in plain]
            if not plain or plain in asked or lost:
                why = f"lacks its own word '{lost[0]}'" if lost else "stands there already" if plain else "is empty"
                raise InputError(f"{path}: the question {q.ask!r} of '{topic.name}' {why}", expected="texts, each once")
            asked.add(plain)


def read_words(name: str = "builtin:attackers") -> Words:
    """The words of the attackers.

    Raises:
        InputError, RecipeError: The file is missing or has another shape.
    """
    path = data_file(name, suffix="red_team/*.toml")
    data = _toml(path)
    try:
        texts = {rule: tuple(map(str, data[rule]["texts"])) for rule in _TEMPLATED}
        shots = tuple((str(q), str(a)) for q, a in data["many-shot"]["shots"])
        return Words(texts, shots, str(data["model"]["user"]), str(data["model"]["example"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} lacks something: {error}", expected="a section for each attacker") from error


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(
            f"{path} cannot be read: {error}", expected="a UTF-8 TOML file", fix="check the path"
        ) from error


# -- rules ------------------------------------------------------------------------------------------

_Rule = Callable[[Order, Words, np.random.Generator], str]
_LOOKS_LIKE = str.maketrans("aeiostAEIOST", "431057431057")


def _one(texts: Sequence[str], random: np.random.Generator) -> str:
    return texts[int(random.integers(len(texts)))]


def _filled(template: str, **parts: str) -> str:
    # One pass: a hole's name inside a question stays what it is.
    return re.sub(r"\{(\w+)\}", lambda m: parts.get(m[1], m[0]), template)


def _framed(style: Style, question: str, random: np.random.Generator) -> str:
    return _filled(_one(style.frames, random), question=question)


def _templated(rule: str) -> _Rule:
    def write(order: Order, words: Words, random: np.random.Generator) -> str:
        framed = _framed(order.style, order.question.ask, random)
        return _filled(_one(words.texts[rule], random), framed=framed)

    return write


def _paraphrased(order: Order, words: Words, random: np.random.Generator) -> str:
    asked = _filled(_one(words.texts["paraphrase"], random), question=order.question.ask)
    return _framed(order.style, asked, random)


def _after_shots(order: Order, words: Words, random: np.random.Generator) -> str:
    rows = random.permutation(len(words.shots))[:4]
    shots = "".join(f"Q: {words.shots[i][0]}\nA: {words.shots[i][1]}\n\n" for i in rows)
    return shots + _templated("many-shot")(order, words, random)


def _mistyped(order: Order, _: Words, random: np.random.Generator) -> str:
    letters = list(_framed(order.style, order.question.ask, random))
    places = [i for i in range(len(letters) - 1) if letters[i].isalpha() and letters[i + 1].isalpha()]
    for i in sorted(random.permutation(places)[: max(1, len(places) // 10)], reverse=True):
        way = int(random.integers(3))
        pair = letters[i : i + 2]
        letters[i : i + 2] = [pair[::-1], [pair[0], pair[0], pair[1]], [pair[1]]][way]
    return "".join(letters)


def _encoded(order: Order, _: Words, random: np.random.Generator) -> str:
    text = _framed(order.style, order.question.ask, random)
    if int(random.integers(2)):
        return text.translate(_LOOKS_LIKE)
    return re.sub(r"\w+", lambda word: "-".join(word[0]), text)


_TEMPLATED = ("prefix", "role-play", "paraphrase", "many-shot")
RULES: Mapping[str, _Rule] = {
    "prefix": _templated("prefix"),
    "role-play": _templated("role-play"),
    "paraphrase": _paraphrased,
    "many-shot": _after_shots,
    "typo": _mistyped,
    "encoding": _encoded,
}
MODEL = "model"
ATTACKERS = (*RULES, MODEL)


def write_by_rule(rule: str, order: Order, words: Words, random: np.random.Generator) -> str:
    """An attack by one of `RULES`: the question in the words of its style, changed in the rule's way."""
    return RULES[rule](order, words, random)


# -- a model ----------------------------------------------------------------------------------------


class ModelAttacker:
    """A language model that rewrites questions.

    It draws several drafts of each; the first that still asks for the same thing is taken, none if none does:
    a reply to another question would be blamed on the target.

    Args:
        completer: The model.
        words: What it is asked.
        drafts: Rewritten questions drawn for each order.
    """

    def __init__(self, completer: LocalCompleter, words: Words, *, drafts: int = 4) -> None:
        self.completer, self.words, self.drafts = completer, words, drafts

    def write(self, orders: Sequence[Order], *, seed: int) -> list[list[str]]:
        """Usable drafts of each order, the first drawn first."""
        settings = SamplerSettings(temperature=0.8, max_new_tokens=48)
        # An order that comes twice is drawn once: the caller takes another draft for the second.
        prompts = {o: p for o in orders if self._fits(p := self._prompt(o), settings.max_new_tokens)}
        drawn = self.completer.generate(
            list(prompts.values()), samples=self.drafts, settings=settings, seed=seed, version=MODEL
        )
        texts = {o: [_clean(g.text) for g in group] for o, group in zip(prompts, drawn, strict=True)}
        return [[t for t in texts.get(o, []) if _asks_the_same(t, o)] for o in orders]

    def _fits(self, prompt: Prompt, room: int) -> bool:
        try:
            self.completer.lm.encode(prompt, room=room)
        except InputError:
            return False
        return True

    def _prompt(self, order: Order) -> Prompt:
        example = _filled(self.words.example, parent=order.parent).lstrip("\n") if order.parent else ""
        text = _filled(self.words.user, style=order.style.says, example=example, question=order.question.ask).strip()
        return Prompt(f"order-{content_hash(text)}", (Message("user", text),))


def _clean(draft: str) -> str:
    """The first line that says something, without a label or quotes around it."""
    lines = [line for line in draft.splitlines() if line.strip(" \"'*#-") and not line.rstrip().endswith(":")]
    line = re.sub(r"^\W*(new |rewritten )?question\W*:\s*", "", lines[0], flags=re.IGNORECASE) if lines else ""
    return line.strip(" \"'*#")


def _asks_the_same(text: str, order: Order) -> bool:
    plain, asks = text.casefold(), "?" in text or "?" not in order.question.ask
    known = {order.question.ask.casefold(), (order.parent or "").casefold()}
    return (
        asks
        and 8 <= len(text) <= 400
        and plain not in known
        and all(w.casefold() in plain for w in order.question.keep)
    )
