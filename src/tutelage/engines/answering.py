"""A judge model in this process: questions that begin alike are computed together.

A judge asks much the same over and over: rubric, constitution and conversation stay, often the first
reply too. The questions of a batch are sorted and cut into groups so that as few tokens as possible
are computed; each group is a tree (what it shares, then each question's own end), and only the last
token of each question reaches the vocabulary.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from tutelage.engines.attention import AttentionPlan, attention_plan
from tutelage.engines.load import LanguageModel
from tutelage.engines.local import LocalCompleter
from tutelage.engines.packing import Group, pack
from tutelage.errors import InputError
from tutelage.records import Answer, Cost, Message, Prompt, Question, SamplerSettings, content_hash

__all__ = ["LocalEngine", "share_prefixes"]

_WIDEST = 64  # questions a group: the search for the best cuts is linear in it


def share_prefixes(sequences: Sequence[tuple[int, ...]]) -> list[Group]:
    """Cut token sequences into groups with a common prefix so that the fewest tokens are computed.

    Dynamic programming over the sorted sequences. A group computes its prefix once, save for the
    root that all groups share; every sequence keeps a token of its own.

    Args:
        sequences: Token ids, at least two each.

    Returns:
        Groups whose `rows` are places in `sequences`.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    ordered = [sequences[i] for i in order]
    near = [_common(a, b) for a, b in itertools.pairwise(ordered)]
    root = min(near, default=0)
    cost, start = [0.0], [0]
    for end in range(1, len(ordered) + 1):
        found = (math.inf, 0)
        tokens, shared = 0, len(ordered[end - 1]) - 1
        for first in range(end - 1, max(-1, end - 1 - _WIDEST), -1):
            tokens += len(ordered[first])
            shared = min(shared, near[first]) if first < end - 1 else shared
            saved = (end - first - 1) * shared + root
            found = min(found, (cost[first] + tokens - saved, first))
        cost.append(found[0])
        start.append(found[1])
    groups, end = [], len(ordered)
    while end:
        first = start[end]
        members = ordered[first:end]
        shared = min([len(members[0]) - 1, *near[first : end - 1]])
        groups.append(Group(members[0][:shared], tuple(m[shared:] for m in members), tuple(order[first:end])))
        end = first
    return groups[::-1]


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of what both begin with, at most one token short of the shorter."""
    limit = min(len(a), len(b)) - 1
    return next((i for i in range(limit) if a[i] != b[i]), limit)


class LocalEngine:
    """Asks a `LanguageModel` in this process.

    Args:
        lm: The model.
        frozen: Entered while it is asked; a policy that judges itself gives `adapter.off` here.
        budget: Tokens a pass may hold.
        rows: Texts written at once.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        frozen: Callable[[], AbstractContextManager[object]] = nullcontext,
        budget: int = 3072,
        rows: int = 32,
    ) -> None:
        self.lm, self.frozen, self.budget = lm, frozen, budget
        self.name = lm.name
        self.version = content_hash(["local", lm.fingerprint, str(lm.dtype)])
        self._completer = LocalCompleter(lm, rows=rows)
        self._firsts: dict[str, tuple[int, ...]] = {}
        special = [str(t) for t in lm.tokenizer.get_added_vocab()]
        self._control = sorted((t for t in special if len(t) > 1 and t.strip()), key=len, reverse=True)

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer a question; one that does not fit into the context fails alone."""
        answers: list[Answer | None] = [None] * len(questions)
        read: list[int] = []
        for i, question in enumerate(questions):
            size = len(self._encode(question)) + (0 if question.labels else question.max_new_tokens)
            if size > self.lm.context:
                answers[i] = Answer(failure=f"too long: {size} tokens, {self.lm.name} reads {self.lm.context}")
            elif question.labels:
                read.append(i)
        if read:
            for i, answer in zip(read, self._read([questions[i] for i in read]), strict=True):
                answers[i] = answer
        self._write(questions, answers)
        return [a for a in answers if a is not None]

    @torch.inference_mode()
    def _read(self, questions: Sequence[Question]) -> list[Answer]:
        """Log-probabilities of labels."""
        started = time.perf_counter()
        encoded = [self._encode(q) for q in questions]
        logps: list[dict[str, float]] = [{} for _ in questions]
        with self.frozen():
            for part in pack(share_prefixes(encoded), budget=self.budget):
                with attention_plan(AttentionPlan(tree=part.tree.to(self.lm.device))):
                    hidden = self.lm.hidden(part.tokens_T[None], part.position_T[None])[0]
                last = hidden[[last for _, last in part.spans]]
                logits_NV = (last @ self.lm.head_VD.T).float()
                logp_NV = logits_NV - logits_NV.logsumexp(-1, keepdim=True)
                for row, logp_V in zip(part.rows, logp_NV, strict=True):
                    logps[row] = self._labels(questions[row].labels, logp_V)
        cost = (time.perf_counter() - started) / len(questions)
        return [
            Answer(label_logps=found, cost=Cost(cost, len(tokens)))
            for found, tokens in zip(logps, encoded, strict=True)
        ]

    def _labels(self, labels: Sequence[str], logp_V: torch.Tensor) -> dict[str, float]:
        firsts = [self._first(label) for label in labels]
        if len({t for f in firsts for t in f}) != sum(map(len, firsts)):
            raise InputError(
                f"the labels {', '.join(labels)} begin with the same token for {self.lm.name}",
                expected="labels told apart by their first token",
                fix="choose other labels in the judge prompt, for example single letters or digits",
            )
        return {label: float(logp_V[list(f)].logsumexp(0)) for label, f in zip(labels, firsts, strict=True)}

    def _first(self, label: str) -> tuple[int, ...]:
        """First tokens of a label, with and without the space before it."""
        if label not in self._firsts:
            ids = (self.lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (label, f" {label}"))
            self._firsts[label] = tuple(sorted({self._telling(found) for found in ids}))
        return self._firsts[label]

    def _telling(self, ids: Sequence[int]) -> int:
        """The first token that is more than a space: some tokenizers give the space a token of its own."""
        return next((t for t in ids if self.lm.tokenizer.decode([t]).strip()), ids[0])

    def _write(self, questions: Sequence[Question], answers: list[Answer | None]) -> None:
        """Texts, for all questions without labels that have no answer yet."""
        by_settings: dict[SamplerSettings, list[int]] = {}
        for i, question in enumerate(questions):
            if answers[i] is None:
                settings = SamplerSettings(question.temperature, max_new_tokens=question.max_new_tokens)
                by_settings.setdefault(settings, []).append(i)
        for settings, places in by_settings.items():
            started = time.perf_counter()
            with self.frozen():
                written = self._completer.generate(
                    [self._prompt(questions[i]) for i in places],
                    samples=1, settings=settings, seed=0, version=self.version,
                    opening=[questions[i].opening for i in places],
                )  # fmt: skip
            cost = (time.perf_counter() - started) / len(places)
            for i, (reply,) in zip(places, written, strict=True):
                # `text` holds the opening, too; what is new comes after it.
                text = reply.text.removeprefix(questions[i].opening).strip()
                read = len(self._encode(questions[i])) + len(reply.tokens)
                answers[i] = Answer(text, reply.logps, cost=Cost(cost, read))

    def _prompt(self, question: Question) -> Prompt:
        turns = tuple(Message(m.role, self._harmless(m.content)) for m in question.messages)
        return Prompt(question.hash, turns)

    def _encode(self, question: Question) -> tuple[int, ...]:
        messages = [{"role": m.role, "content": m.content} for m in self._prompt(question).messages]
        text = self.lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tuple(self.lm.tokenizer(text + question.opening, add_special_tokens=False)["input_ids"])

    def _harmless(self, text: str) -> str:
        """A control token spelled out in a judged text stays text: it could end the judge's turn."""
        for token in self._control:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text
