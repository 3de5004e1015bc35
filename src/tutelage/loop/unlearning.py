"""The update of a round that points at single tokens: repeats and blamed words down, the rest of good replies up.

A reply's reward says which replies to keep likely; what is pushed down is marked token by token, whatever the reply
earned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tutelage.credit.spans import Span, token_spans
from tutelage.engines.load import LanguageModel
from tutelage.errors import NothingToLearn
from tutelage.loop.bench import Workbench
from tutelage.loop.crediting import note_pieces
from tutelage.loop.preferring import Watched
from tutelage.objectives.unlikelihood import mark_repeats, mark_spans
from tutelage.policy.learner import Scores, TrainGroup
from tutelage.records import Generation, Prompt
from tutelage.store.ledger import Unit

__all__ = ["token_weights", "unlearn"]


def token_weights(
    lm: LanguageModel, reply: Generation, blamed: Sequence[Span], *, repeat_n: int, keep: float
) -> list[float]:
    """A weight for each token of a reply: -1 where it is marked, elsewhere `keep`.

    Args:
        lm: Whose tokens they are.
        reply: The reply.
        blamed: Places in its text, in characters.
        repeat_n: Length of the n-grams that should not come twice; 0 marks none.
        keep: Of tokens that nothing marks.
    """
    found = mark_repeats(reply.tokens, repeat_n, rest=keep) if repeat_n else [keep] * len(reply.tokens)
    if not blamed:
        return found
    text, offsets_T = token_spans(reply.tokens, lm.whole_text)
    lead = len(text) - len(text.lstrip())  # a reply's text is without it
    spans = [(start + lead, end + lead, -1.0) for start, end in blamed]
    return [min(pair) for pair in zip(found, mark_spans(offsets_T, spans, rest=keep), strict=True)]


def unlearn(
    bench: Workbench,
    prompts: Sequence[Prompt],
    replies_PG: Sequence[Sequence[Generation]],
    blamed: Mapping[str, Sequence[Span]],
    advantage_PG: torch.Tensor,
    scores: Scores,
    unit: Unit,
    number: int,
) -> None:
    """Optimiser steps on the marked tokens of a round's replies, and on the others of those above their group's mean.

    Args:
        bench: The workbench.
        prompts: Of the round.
        replies_PG: Their replies.
        blamed: Places that critics hold against a reply, by its id.
        advantage_PG: What replies are worth beside their group; above zero they are kept likely.
        scores: The start model's, for the distance to it.
        unit: Where it is noted.
        number: Of the round.

    Raises:
        NothingToLearn: No token is marked, and no reply is above its group's mean.
        TrainingError: A loss or gradient is not finite; the last version is kept.
    """
    marking = bench.choice.marking
    groups, row = [], 0
    tokens = marked = kept = 0
    for prompt, replies, advantage_G in zip(prompts, replies_PG, advantage_PG.tolist(), strict=True):
        weights_G = []
        for reply, advantage in zip(replies, advantage_G, strict=True):
            keep = marking.keep if advantage > 0 else 0.0
            weights = token_weights(bench.lm, reply, blamed.get(reply.id, ()), repeat_n=marking.repeat_n, keep=keep)
            unit.credit(reply.id, "marks", advantage, weights)
            weights_G.append(tuple(weights))
            tokens += len(weights)
            marked += sum(w < 0 for w in weights)
            kept += sum(w > 0 for w in weights)
        start_G = tuple(tuple(scores.logp_BT[row + g, : len(reply.tokens)].tolist()) for g, reply in enumerate(replies))
        row += len(replies)
        if any(map(any, weights_G)):
            completions = tuple(reply.tokens for reply in replies)
            groups.append(TrainGroup(bench.encode(prompt), completions, tuple(weights_G), start_G, start_G))
    note_pieces(bench.lm, replies_PG, unit)
    counts = {"tokens": tokens, "marked": marked, "kept": kept, "blamed_replies": len(blamed)}
    unit.metrics(number, "marks", {key: float(count) for key, count in counts.items()})
    if not groups:
        raise NothingToLearn(
            f"round {number}: no token is marked, and no reply is above its group's mean",
            expected="a repeat, a place that a critic blames, or rewards that differ",
            fix="lower objective.repeat_n, add a critic to [[judges]], or raise update.samples",
        )
    size = bench.recipe.update.batch
    bench.progress.stage(f"round {number}: update", len(groups), "prompts")
    for start in range(0, len(groups), size):
        part = groups[start : start + size]
        loss = Watched(bench.choice.loss)
        figures = bench.learner.step(part, loss, temperature=bench.recipe.sampling.temperature)
        unit.metrics(number * 1000 + start // size, "update", figures)
        bench.progress.figures(kl=figures["kl_to_start"], loss=figures["loss"])
        bench.progress.advance(len(part))
