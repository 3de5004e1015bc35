"""Critique and revision: a reply is criticised under a principle and written anew, several times over.

Like judges, a revision is a generator of questions (`asking.settle` runs many side by side). What a model
fails to give ends the text's chain with its reason; nothing is put in its place.

Source: Bai et al. 2022 (arXiv 2212.08073), section 3. Critiques of models below a billion parameters are
mostly noise there and here: `critique=False` revises directly.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Sequence
from typing import Literal

from tutelage.feedback.asking import Steps
from tutelage.feedback.constitution import Constitution, Principle
from tutelage.feedback.judge_prompt import conversation, fence
from tutelage.feedback.words import Words, load_words
from tutelage.records import Answer, Prompt, Question, content_hash

__all__ = ["Order", "Revised", "RevisionStep", "choose_principles", "revise", "revision_words"]

Order = Literal["random", "all"]

_CRITIQUE = 128  # tokens a critique may take
_MARK = re.compile(r"<<<[0-9a-f]{12}\n?|\n?[0-9a-f]{12}>>>")


@dataclasses.dataclass(frozen=True, slots=True)
class RevisionStep:
    """One rewriting under one principle; `critique` is empty when none was asked for."""

    principle: str
    before: str
    critique: str
    after: str


@dataclasses.dataclass(frozen=True, slots=True)
class Revised:
    """A reply and what became of it.

    Args:
        prompt: The conversation that was replied to.
        first: The reply before any revision; empty when the model gave none.
        steps: Revisions in order. They are fewer than were asked for when one failed.
        failure: Why the chain ended early; empty when it did not.
    """

    prompt: Prompt
    first: str
    steps: tuple[RevisionStep, ...]
    failure: str = ""

    @property
    def final(self) -> str | None:
        """The last revision, or None when there was none: an unrevised reply is no target."""
        return self.steps[-1].after if self.steps else None


def revision_words(name: str = "builtin:revision") -> Words:
    """The words in which models are asked.

    Raises:
        InputError, RecipeError: There is no such file, or it lacks a part.
    """
    direct = ("prompt", "reply", "principle")
    return load_words(name, {"critique": direct, "revise": (*direct, "critique"), "direct": direct})


def choose_principles(
    constitution: Constitution, prompt: Prompt, *, rounds: int, order: Order, seed: int
) -> list[Principle]:
    """The principles that a prompt's reply is revised under, in order.

    Args:
        constitution: Where they come from.
        prompt: With the seed it decides the choice, whatever other prompts there are.
        rounds: How often.
        order: `random` draws one a round, by weight; `all` takes every one in turn, in each round.
        seed: Of the draw.
    """
    principles = constitution.principles
    if order == "all":
        return list(itertools.chain.from_iterable(itertools.repeat(principles, rounds)))
    draw = random.Random(content_hash(["revise", seed, prompt.hash]))  # noqa: S311 - a sample, not a secret
    return draw.choices(principles, [p.weight for p in principles], k=rounds)


def revise(
    words: Words,
    prompt: Prompt,
    principles: Sequence[Principle],
    *,
    reply: str = "",
    critique: bool = True,
    longest: int = 256,
) -> Steps[Revised]:
    """Revise a reply under each of the principles in turn.

    Args:
        words: As `revision_words` gives them.
        prompt: The conversation.
        principles: One a revision.
        reply: What is revised; empty lets the model reply first.
        critique: Ask for a critique before each revision.
        longest: Tokens a reply may take; one that needs more is a failure, for its end is missing.
    """
    steps: list[RevisionStep] = []
    first, why = reply, ""
    if not reply.strip():
        first, why = _written((yield [Question(prompt.messages, max_new_tokens=longest)]), "reply", longest)
        if why:
            return Revised(prompt, "", (), why)
    text = first
    for principle in principles:
        parts = {"prompt": conversation(prompt), "reply": fence(text), "principle": principle.text}
        said = ""
        if critique:
            question = Question(words.messages("critique", **parts), words.opening("critique"), (), _CRITIQUE)
            said, why = _written((yield [question]), "critique", None)
            if why:
                break
            parts["critique"] = fence(said)
        name = "revise" if critique else "direct"
        question = Question(words.messages(name, **parts), words.opening(name), (), longest)
        after, why = _written((yield [question]), "revision", longest)
        if why:
            break
        steps.append(RevisionStep(principle.id, text, said, after))
        text = after
    return Revised(prompt, first, tuple(steps), why)


def _written(answers: Sequence[Answer], what: str, longest: int | None) -> tuple[str, str]:
    """The text of the one answer and nothing, or nothing and why there is none."""
    (answer,) = answers
    text = _MARK.sub("", answer.text).strip()  # models like to repeat the fence
    if answer.failure:
        return "", f"no {what}: {answer.failure}"
    if not text:
        return "", f"the {what} is empty"
    if longest is not None and len(answer.logps) >= longest:
        return "", f"the {what} is cut off after {longest} tokens"
    return text, ""
