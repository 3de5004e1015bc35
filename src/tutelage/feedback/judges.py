"""Judges that ask a language model: pairs, ratings, lists, with or without a reason first.

A judge does no input or output. It is a generator that yields the questions it has and receives their
answers; `asking.settle` runs any number of them side by side, so that an engine sees all open questions of
a batch at once, shares what they have in common, and never waits for one judge to finish.

What cannot be read is an abstention that keeps the raw text. No failure becomes a number.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.errors import RecipeError
from tutelage.feedback.asking import Opinion, Steps, chance, read_labels
from tutelage.feedback.constitution import Constitution
from tutelage.feedback.judge_prompt import JudgePrompt, conversation, fence, rules
from tutelage.records import Answer, Cost, Prompt, Question, content_hash

__all__ = ["Listwise", "Pairwise", "Pointwise"]

_THOUGHT = 96  # tokens a reason may take


def _cost(answers: Sequence[Answer]) -> Cost:
    return sum((a.cost for a in answers), Cost())


def _raw(answers: Sequence[Answer]) -> str:
    return "\n".join(a.text for a in answers if a.text)


class _Asking:
    """What all judges of a model share: their words, the constitution and how they read.

    Args:
        words: The judge prompt.
        constitution: Principles to judge by; None leaves it to the model.
        each: Judge by every principle apart and weigh the outcomes, instead of by all at once.
        thoughts: Reasons written before the verdict; their verdicts are averaged. 0 asks for none.
    """

    kind = ""

    def __init__(
        self,
        words: JudgePrompt,
        constitution: Constitution | None = None,
        *,
        each: bool = False,
        thoughts: int = 0,
    ) -> None:
        if words.kind != self.kind:
            raise RecipeError(
                f"a {self.kind} judge was given the words of a {words.kind} one",
                expected=f'a judge prompt with kind = "{self.kind}"',
                fix=f"use builtin:{self.kind}, or leave the prompt out",
            )
        if thoughts and not words.reason:
            raise RecipeError("the judge prompt does not say how to ask for a reason", expected="a text under `reason`")
        self.words, self.constitution, self.each, self.thoughts = words, constitution, each, thoughts
        principles = constitution.principles if constitution else ()
        # (name, weight, rules) of each way to judge.
        self._views = [(p.id, p.weight, rules([p])) for p in principles] if each else [("", 1.0, rules(principles))]

    @property
    def version(self) -> str:
        """Hash of everything but the engine that decides a verdict."""
        return content_hash(
            [self.kind, self.words.hash, self.constitution.hash if self.constitution else "", self.each, self.thoughts]
        )

    def _read_all(
        self, shown: Sequence[tuple[Mapping[str, str], Sequence[str]]]
    ) -> Steps[tuple[list[list[float] | None], str, str, Cost, float]]:
        """Ask the same of several ways to show a subject.

        Args:
            shown: Holes and labels of each.

        Returns:
            Normalised label log-probs of each (None: unreadable), why, the raw texts, the cost, and
            the mean probability that went to labels.
        """
        thoughts: list[list[str]] = [[""] for _ in shown]
        cost, raws = Cost(), []
        if self.thoughts:
            questions = [self._thought(parts, draw) for parts, _ in shown for draw in range(self.thoughts)]
            answers = yield questions
            cost, raw = _cost(answers), _raw(answers)
            raws.append(raw)
            texts = [a.text.strip() for a in answers]
            thoughts = [texts[i * self.thoughts : (i + 1) * self.thoughts] for i in range(len(shown))]
            thoughts = [[t for t in kept if t] for kept in thoughts]
        questions = [
            self._question(parts, labels, thought)
            for (parts, labels), kept in zip(shown, thoughts, strict=True)
            for thought in kept
        ]
        answers = (yield questions) if questions else []
        cost = cost + _cost(answers)
        raws.append(_raw(answers))
        following = iter(answers)
        found: list[list[float] | None] = []
        why, masses = "", []
        for (_, labels), kept in zip(shown, thoughts, strict=True):
            heard = []
            for _ in kept:
                answer = next(following)
                logps, problem = read_labels(answer, labels, output=self.words.output, least_mass=self.words.least_mass)
                why = why or problem
                if logps is not None:
                    heard.append(logps)
                    if answer.label_logps is not None:
                        masses.append(math.fsum(math.exp(x) for x in answer.label_logps.values()))
            why = why or ("" if kept else "no reason was given before the verdict")
            found.append([math.fsum(column) / len(heard) for column in zip(*heard, strict=True)] if heard else None)
        return found, why, "\n".join(r for r in raws if r), cost, math.fsum(masses) / len(masses) if masses else 1.0

    def _thought(self, parts: Mapping[str, str], draw: int) -> Question:
        words = dataclasses.replace(self.words, user=self._asked(self.words.reason))
        warm = 0.0 if self.thoughts == 1 else 0.7
        return Question(words.messages(**parts), max_new_tokens=_THOUGHT, temperature=warm, draw=draw)

    def _asked(self, instead: str) -> str:
        """The user turn with its last paragraph, which asks for the verdict, put otherwise."""
        return self.words.user.strip().rpartition("\n\n")[0] + "\n\n" + instead.strip()

    def _question(self, parts: Mapping[str, str], labels: Sequence[str], thought: str) -> Question:
        words = self.words
        opening = f"{thought}\n{words.opening}" if thought else words.opening
        messages = words.messages(**parts)
        if words.output == "json":
            schema = {
                "type": "object",
                "properties": {"reason": {"type": "string"}, "verdict": {"type": "string", "enum": list(labels)}},
                "required": ["reason", "verdict"],
                "additionalProperties": False,
            }
            return Question(messages, max_new_tokens=_THOUGHT, schema=schema)
        return Question(messages, opening, tuple(labels))


class Pairwise(_Asking):
    """Which of two replies is better, asked in both orders.

    With l(x, y) the log-odds that the one shown first wins, the verdict is (l(a, b) - l(b, a)) / 2: a
    constant preference for a position drops out exactly, which averaging probabilities does not do
    (design/methods: a judge l = s + b gives s back). A pair of which only one order could be read is
    an abstention, since its position bias cannot be taken out.

    Source: Lee et al. 2023 (arXiv 2309.00267) for the two orders; averaged here as log-odds.
    """

    kind = "pairwise"

    def compare(self, prompt: Prompt, first: str, second: str) -> Steps[Opinion]:
        """The opinion on a pair; positive means that the first is better."""
        talk, a, b = conversation(prompt), fence(first), fence(second)
        shown = [
            ({"rules": text, "prompt": talk, "first": x, "second": y}, self.words.labels)
            for _, _, text in self._views
            for x, y in ((a, b), (b, a))
        ]
        found, why, raw, cost, mass = yield from self._read_all(shown)
        odds = [None if logps is None else logps[0] - logps[1] for logps in found]
        sides = []
        evidence: dict[str, Any] = {}
        for n, (name, weight, _) in enumerate(self._views):
            ab, ba = odds[2 * n], odds[2 * n + 1]
            if ab is None or ba is None:
                continue
            sides.append((weight, (ab - ba) / 2, (ab + ba) / 2))
            if name:
                evidence[name] = round((ab - ba) / 2, 4)
        if not sides:
            return Opinion(None, f"abstains: {why}", {}, raw, cost, ("first", "second"))
        weight = math.fsum(w for w, _, _ in sides)
        value = math.fsum(w * v for w, v, _ in sides) / weight
        position = math.fsum(w * p for w, _, p in sides) / weight
        evidence |= {
            "position": round(position, 4),
            "flipped": abs(position) > abs(value),
            "mass": round(mass, 4),
            "unread": len(self._views) - len(sides),
        }
        p = chance(value)
        reason = f"the {'first' if value > 0 else 'second'} is better with {max(p, 1 - p):.0%}, both orders averaged"
        return Opinion(value, reason, evidence, raw, cost, ("first", "second"))


class Pointwise(_Asking):
    """How good a reply is: the expectation over the whole distribution of ratings, from 0 to 1.

    Source: Liu et al. 2023 (G-Eval, arXiv 2303.16634) and d-RLAIF in Lee et al. 2023.
    """

    kind = "pointwise"

    def rate(self, prompt: Prompt, reply: str) -> Steps[Opinion]:
        """The opinion on a reply."""
        talk, text = conversation(prompt), fence(reply)
        labels = self.words.labels
        shown = [({"rules": view, "prompt": talk, "reply": text}, labels) for _, _, view in self._views]
        found, why, raw, cost, mass = yield from self._read_all(shown)
        top = len(labels) - 1
        rated = []
        evidence: dict[str, Any] = {}
        for (name, weight, _), logps in zip(self._views, found, strict=True):
            if logps is None:
                continue
            chances = [math.exp(x) for x in logps]
            total = math.fsum(chances)  # averaged over reasons as log-probs, they need not sum to one
            mean = math.fsum(i * c for i, c in enumerate(chances)) / total / top
            rated.append((weight, mean, [c / total for c in chances]))
            if name:
                evidence[name] = round(mean, 4)
        if not rated:
            return Opinion(None, f"abstains: {why}", {}, raw, cost)
        weight = math.fsum(w for w, _, _ in rated)
        value = math.fsum(w * m for w, m, _ in rated) / weight
        spread = [math.fsum(w * c[i] for w, _, c in rated) / weight for i in range(top + 1)]
        evidence |= {"ratings": [round(s, 4) for s in spread], "mass": round(mass, 4)}
        likely = labels[max(range(top + 1), key=lambda i: spread[i])]
        return Opinion(value, f"most likely rating {likely}, expected {value:.2f} of 1", evidence, raw, cost)


class Listwise(_Asking):
    """Which of a group's replies is best, asked in several rotations of their order.

    A reply's value is its mean log-probability of being called best, so that every reply has stood in
    several places. With as many rotations as replies each has stood in every place, and a constant
    preference for places drops out.

    Args:
        rotations: Orders in which the list is shown (at most as many as there are replies).
    """

    kind = "listwise"

    def __init__(
        self, words: JudgePrompt, constitution: Constitution | None = None, *, each: bool = False, rotations: int = 2
    ) -> None:
        super().__init__(words, constitution, each=each)
        self.rotations = rotations

    @property
    def version(self) -> str:
        """Hash of everything but the engine that decides a verdict."""
        return content_hash([super().version, self.rotations])

    def rank(self, prompt: Prompt, replies: Sequence[str]) -> Steps[list[Opinion]]:
        """One opinion a reply."""
        count = len(replies)
        if not 2 <= count <= len(string.ascii_uppercase):
            why = f"abstains: {count} replies, a list has 2 to {len(string.ascii_uppercase)}"
            return [Opinion(None, why) for _ in replies]
        talk, fenced = conversation(prompt), [fence(r) for r in replies]
        letters = string.ascii_uppercase[:count]
        turns = [round(r * count / self.rotations) for r in range(min(self.rotations, count))]
        shown = []
        for _, _, view in self._views:
            for turn in turns:
                order = [(i + turn) % count for i in range(count)]
                text = "\n\n".join(f"Reply {x}:\n{fenced[i]}" for x, i in zip(letters, order, strict=True))
                shown.append(({"rules": view, "prompt": talk, "replies": text}, list(letters)))
        found, why, raw, cost, mass = yield from self._read_all(shown)
        weights = [w for _, w, _ in self._views for _ in turns]
        offsets = turns * len(self._views)
        heard = [(w, t, x) for w, t, x in zip(weights, offsets, found, strict=True) if x is not None]
        share = cost.shared(count)
        if not heard:
            return [Opinion(None, f"abstains: {why}", {}, raw, share) for _ in replies]
        total = math.fsum(w for w, _, _ in heard)
        means = [math.fsum(w * x[(i - t) % count] for w, t, x in heard) / total for i in range(count)]
        evidence = {"mass": round(mass, 4), "orders_read": len(heard), "orders": len(shown)}
        return [
            Opinion(value, f"called best with {math.exp(value):.0%} over {len(heard)} orders", evidence, raw, share)
            for value in means
        ]
