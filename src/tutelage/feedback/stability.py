"""Consistency over perturbations and paraphrases: what a model knows it still says when the question is put otherwise.

Each prompt is put in several other ways that ask the same: two letters of a word exchanged, the last mark
left out, a greeting before or thanks after it, and, where asked for, paraphrases by the model itself, kept only if
they mean the same. The model answers each, and a reply is worth the share of those answers that say what it says.

The guard against collapse: a phrase that the model gives to other questions just as well is stable for the
wrong reason. Replies that agree with the answers to half of the other prompts of a batch are left out, and
so is every reply where fewer than two other ways were answered.

Source: semantic consistency over paraphrases, Elazar et al. 2021 (TACL 9, arXiv 2102.01017).
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Sequence

import torch

from tutelage.feedback.asking import Opinion
from tutelage.feedback.judge_prompt import fence
from tutelage.feedback.model_judge import SCALE_ODDS, Pair, difference
from tutelage.feedback.words import load_words
from tutelage.records import Cost, Engine, Generation, Message, Prompt, Question, Verdict, content_hash

__all__ = ["StabilityJudge", "perturbed"]

Embed = Callable[[Sequence[str]], torch.Tensor]

_LONGEST = 64  # tokens of an answer: what is compared is what it says first
_LEAST = 2  # answers below which a share says nothing
_STOCK = 0.5  # share of the other prompts whose answers a reply must not agree with
_FRAMES = ("thanks", "greeting")
_MARK = re.compile(r"<<<[0-9a-f]{12}\n?|\n?[0-9a-f]{12}>>>")


def perturbed(text: str, more: Sequence[str] = ()) -> list[str]:
    """Other ways to write a question, by rules that hold in any script, and `more`; the same for the same text."""
    found = [_slip(text), _unmarked(text), *more]
    return list(dict.fromkeys(t for t in found if t.strip() and t != text))


def _slip(text: str) -> str:
    """Two neighbouring letters inside the longest word exchanged, as in quick typing."""
    words = [m for m in re.finditer(r"[^\W\d_]+", text) if len(m[0]) >= 4]
    if not words:
        return text
    word = max(words, key=lambda m: len(m[0]))
    inner = range(word.start() + 1, word.end() - 2)
    apart = [i for i in inner if text[i] != text[i + 1] and not unicodedata.combining(text[i + 1])]
    if not apart:
        return text
    at = apart[int(content_hash(["slip", text]), 16) % len(apart)]
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def _unmarked(text: str) -> str:
    """Without the mark at its end."""
    end = len(text.rstrip())
    while end and unicodedata.category(text[end - 1]).startswith("P"):
        end -= 1
    return text[:end].rstrip()


@dataclasses.dataclass(frozen=True)
class _Heard:
    """The answers to one prompt's other ways, as unit vectors, and what they took."""

    ways: tuple[str, ...]
    vectors_ND: torch.Tensor
    failures: tuple[str, ...]
    cost: Cost


class StabilityJudge:
    """Share of a model's answers to other ways of asking that say what the reply says, from 0 to 1.

    Args:
        name: Name of the judge and of its term.
        engine: The model that answers; usually the policy's start model.
        embed: Unit-length meanings of texts.
        paraphrases: Paraphrases asked of the model, beside the perturbations by rule.
        same: Cosine from which two texts mean the same.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        embed: Embed,
        *,
        paraphrases: int = 0,
        same: float = 0.8,
        words: str = "builtin:stability",
    ) -> None:
        self.name, self.engine, self.embed = name, engine, embed
        self.paraphrases, self.same = paraphrases, same
        self._words = load_words(words, dict.fromkeys((*_FRAMES, "paraphrase"), ("prompt",)))
        self.version = content_hash(["stability", engine.version, self._words.hash, paraphrases, same])

    def judge(self, prompts: Sequence[Prompt], generations_PG: Sequence[Sequence[Generation]]) -> list[list[Verdict]]:
        """One verdict a generation."""
        told = self._opinions(prompts, [[g.text for g in group] for group in generations_PG])
        return [
            [
                Verdict(self.name, self.version, g.id, p.hash, o.value, o.reason, o.evidence, o.cost)
                for g, o in zip(group, opinions, strict=True)
            ]
            for p, group, opinions in zip(prompts, generations_PG, told, strict=True)
        ]

    def compare(self, pairs: Sequence[Pair]) -> list[Opinion]:
        """One opinion a pair: which of the two the model would say again."""
        told = self._opinions([p.prompt for p in pairs], [[p.first, p.second] for p in pairs])
        return [difference(a, b, SCALE_ODDS) for a, b in told]

    def _opinions(self, prompts: Sequence[Prompt], texts_PG: Sequence[Sequence[str]]) -> list[list[Opinion]]:
        heard = self._hear(prompts)
        replies = [self.embed(list(texts)) if texts else torch.zeros(0, 1) for texts in texts_PG]
        hashes = [p.hash for p in prompts]
        return [
            [self._opinion(vector, p, heard, hashes, share=len(group)) for vector in group]
            for p, group in enumerate(replies)
        ]

    def _opinion(
        self, vector_D: torch.Tensor, p: int, heard: Sequence[_Heard], hashes: Sequence[str], *, share: int
    ) -> Opinion:
        own = heard[p]
        cost = own.cost.shared(share)
        if len(own.vectors_ND) < _LEAST:
            why = own.failures[0] if own.failures else "the prompt has no other form"
            return Opinion(None, f"abstains: too few other ways were answered ({why})", {}, cost=cost)
        others = {h: i for i, h in enumerate(hashes) if h != hashes[p] and len(heard[i].vectors_ND) >= _LEAST}
        also = [self._agreement(vector_D, heard[i]) >= _STOCK for i in others.values()]
        evidence = {"ways": list(own.ways), "elsewhere": sum(also), "others": len(also)}
        if len(also) >= 2 and sum(also) >= _STOCK * len(also):
            return Opinion(None, "abstains: the model says this to other questions just as well", evidence, cost=cost)
        value = self._agreement(vector_D, own)
        count = len(own.vectors_ND)
        return Opinion(value, f"{round(value * count)} of {count} answers to other ways say this", evidence, cost=cost)

    def _agreement(self, vector_D: torch.Tensor, heard: _Heard) -> float:
        return float((heard.vectors_ND @ vector_D >= self.same).float().mean())

    def _hear(self, prompts: Sequence[Prompt]) -> list[_Heard]:
        """Put each prompt's last turn in other ways and have them answered, each different prompt once."""
        distinct = {p.hash: p for p in prompts}
        ways = {h: perturbed(p.text, [self._framed(name, p) for name in _FRAMES]) for h, p in distinct.items()}
        extra, costs = self._paraphrases(distinct)
        for h, more in extra.items():
            ways[h] = list(dict.fromkeys([*ways[h], *more]))
        asked = [(h, way) for h in distinct for way in ways[h]]
        questions = [
            Question((*distinct[h].messages[:-1], Message("user", way)), max_new_tokens=_LONGEST) for h, way in asked
        ]
        answers = list(zip(asked, self.engine.ask(questions), strict=True))
        heard = {}
        for h in distinct:
            mine = [(way, a) for (of, way), a in answers if of == h]
            good = [(way, a.text) for way, a in mine if not a.failure and a.text.strip()]
            vectors = self.embed([text for _, text in good]) if good else torch.zeros(0, 1)
            failures = tuple(a.failure or "an empty answer" for _, a in mine if a.failure or not a.text.strip())
            cost = sum((a.cost for _, a in mine), costs.get(h, Cost()))
            heard[h] = _Heard(tuple(way for way, _ in good), vectors, failures, cost)
        return [heard[p.hash] for p in prompts]

    def _framed(self, name: str, prompt: Prompt) -> str:
        return self._words.messages(name, prompt=prompt.text)[-1].content

    def _paraphrases(self, distinct: dict[str, Prompt]) -> tuple[dict[str, list[str]], dict[str, Cost]]:
        """Paraphrases that mean what the prompt means; a model's failure to give one is one way less."""
        asked = [(h, draw) for h in distinct for draw in range(self.paraphrases)]
        questions = [
            Question(
                self._words.messages("paraphrase", prompt=fence(distinct[h].text)),
                max_new_tokens=_LONGEST,
                temperature=1.0 if draw else 0.0,
                draw=draw,
            )
            for h, draw in asked
        ]
        kept: dict[str, list[str]] = {}
        costs: dict[str, Cost] = {}
        for (h, _), answer in zip(asked, self.engine.ask(questions) if questions else [], strict=True):
            costs[h] = costs.get(h, Cost()) + answer.cost
            text = _MARK.sub("", answer.text).strip()
            original = distinct[h].text
            if answer.failure or not text or text == original.strip():
                continue
            one, other = self.embed([original, text])
            if float(one @ other) >= self.same:
                kept.setdefault(h, []).append(text)
        return kept, costs
