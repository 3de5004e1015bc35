"""The update of a round that learns from pairs, or from single replies called good or bad.

What a reply is worth is the same as for the policy gradient: its reward within its group, mixed with the
constrained cost. Two replies of a group become a pair whose label is how surely the one is worth more.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

import torch

from tutelage.engines.batch import Batch, Loss, Objective
from tutelage.errors import NothingToLearn
from tutelage.loop.bench import Workbench
from tutelage.loop.pairing import mismatched, paired, unpaired
from tutelage.objectives.divergence import kl_k3
from tutelage.objectives.unpaired import Kto, mismatched_kl
from tutelage.policy.learner import Scores, TrainGroup, score
from tutelage.records import Generation, Prompt, Reward
from tutelage.store.ledger import Unit

__all__ = ["Watched", "prefer", "reference_point"]


@dataclasses.dataclass(frozen=True)
class Watched:
    """An objective that also says how far the policy is from its start, in nats a token."""

    inner: Objective

    @property
    def name(self) -> str:
        """The objective's own."""
        return self.inner.name

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step."""
        loss = self.inner(batch)
        with torch.no_grad():
            far = (kl_k3(batch.logp_BT, batch.ref_logp_BT) * batch.keep_BT).sum() / batch.keep_BT.sum().clamp_min(1.0)
        # The learner divides sums by how much was counted, which is pairs or rows here.
        return Loss(loss.value, loss.sums | {"kl_to_start": float(far) * loss.sums["tokens"]})


def prefer(
    bench: Workbench,
    prompts: Sequence[Prompt],
    replies_PG: Sequence[Sequence[Generation]],
    rewards_PG: Sequence[Sequence[Reward]],
    advantage_PG: torch.Tensor,
    scores: Scores,
    unit: Unit,
    number: int,
) -> None:
    """Optimiser steps on what the round's replies say of each other.

    Raises:
        NothingToLearn: No two replies of a group differ in worth.
        TrainingError: A loss or gradient is not finite; the last version is kept.
    """
    groups_P, counts = _laid(bench, prompts, replies_PG, rewards_PG, advantage_PG, scores)
    unit.metrics(number, "pairs", {key: float(count) for key, count in counts.items()})
    if not groups_P:
        raise NothingToLearn(
            f"round {number}: no two replies of a group differ in what they are worth",
            expected="at least one group with two valid, different rewards",
            fix="look at the abstentions in the ledger; raise update.samples or lower objective.pair_tie",
        )
    size, temperature = bench.recipe.update.batch, bench.recipe.sampling.temperature
    bench.progress.stage(f"round {number}: update", len(groups_P), "prompts")
    for start in range(0, len(groups_P), size):
        part = groups_P[start : start + size]
        groups = [group for groups in part for group in groups]
        loss = bench.choice.loss
        if isinstance(loss, Kto):
            other = groups_P[start - 1] if len(part) == 1 else ()  # one prompt alone has no other to be crossed with
            loss = dataclasses.replace(loss, z0=reference_point(bench, [*groups, *other], temperature=temperature))
        numbers = bench.learner.step(groups, Watched(loss), temperature=temperature)
        if isinstance(loss, Kto):
            numbers["z0"] = loss.z0
        unit.metrics(number * 1000 + start // size, "update", numbers)
        bench.progress.figures(kl=numbers["kl_to_start"], loss=numbers["loss"])
        bench.progress.advance(len(part))


def _laid(
    bench: Workbench,
    prompts: Sequence[Prompt],
    replies_PG: Sequence[Sequence[Generation]],
    rewards_PG: Sequence[Sequence[Reward]],
    advantage_PG: torch.Tensor,
    scores: Scores,
) -> tuple[list[tuple[TrainGroup, ...]], dict[str, int]]:
    """Each prompt's groups for the learner, prompts with nothing to teach left out, and counts over all."""
    counts: collections.Counter[str] = collections.Counter()
    found, row = [], 0
    pairing = bench.choice.pairing
    for prompt, replies, rewards, advantage_G in zip(prompts, replies_PG, rewards_PG, advantage_PG, strict=True):
        worth = [math.nan if r.total is None else float(a) for r, a in zip(rewards, advantage_G, strict=True)]
        reference = scores.logp_BT[row : row + len(replies)]
        row += len(replies)
        tokens = [bench.encode(prompt)]
        if isinstance(bench.choice.loss, Kto):
            laid = unpaired(
                tokens, [replies], [worth], middle=0.0, temperature=pairing.temperature, tie=pairing.tie,
                ref_logp_BT=reference,
            )  # fmt: skip
        else:
            laid = paired(tokens, [replies], pairing, rewards_PG=[worth], ref_logp_BT=reference)
        counts.update(laid.counts)
        if laid.groups:
            found.append(laid.groups)
    return found, dict(counts)


def reference_point(bench: Workbench, groups: Sequence[TrainGroup], *, temperature: float) -> float:
    """KTO's z0: how far the policy has come from its start, on replies to other prompts."""
    crossed = mismatched(groups)
    if not crossed:
        return 0.0
    budget = bench.recipe.update.token_budget
    now = score(bench.lm, crossed, budget=budget, temperature=temperature)
    with bench.adapter.off():
        start = score(bench.lm, crossed, budget=budget, temperature=temperature)
    return mismatched_kl(now.logp_BT, start.logp_BT, now.keep_BT)
