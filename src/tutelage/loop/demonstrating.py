"""The stage of demonstrations: replies of the user's own, learned by likelihood or by inverse soft Q-learning."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from tutelage.engines.packing import Group
from tutelage.errors import InputError
from tutelage.loop.bench import Workbench, derive_seed
from tutelage.loop.supervised import schedule
from tutelage.objectives.inverse import InverseQ, inverse_q_parts
from tutelage.policy.learner import TrainGroup, score
from tutelage.records import Demonstration, Target
from tutelage.store.ledger import Unit

__all__ = ["check_room", "demonstrate"]


def check_room(bench: Workbench, shown: Sequence[Demonstration]) -> None:
    """Refuse a demonstration that does not fit into the model's context: cut off it would show another end.

    Raises:
        InputError: Prompt and reply are too long together.
    """
    for one in shown:
        length = len(bench.lm.encode(one.prompt)) + len(bench.lm.encode_reply(one.reply))
        if length > bench.lm.context:
            raise InputError(
                f"demonstration '{one.prompt.id}' (its number is the line's) has {length} tokens",
                expected=f"at most {bench.lm.context}, the context of {bench.lm.name}",
                fix="shorten it or take it out of demonstrations.file",
            )


def demonstrate(bench: Workbench, shown: Sequence[Demonstration], unit: Unit) -> None:
    """Optimiser steps on the demonstrations, and the reward that the logits imply before and after.

    Raises:
        TrainingError: A loss or gradient is not finite; the last version is kept.
    """
    how = bench.recipe.demonstrations
    unit.prompts((one.prompt for one in shown), "demonstrations")
    unit.targets(Target(d.prompt.id, d.reply, "demonstration", "", "shown by the user") for d in shown)
    rows = [(bench.lm.encode(d.prompt), bench.lm.encode_reply(d.reply)) for d in shown]
    before = _implied(bench, rows)
    objective = InverseQ(how.weight, how.gamma)
    groups = [_group(prompt, reply) for prompt, reply in rows]
    bench.restart_learner(how.learning_rate)
    batches = -(-len(groups) // how.batch)
    bench.progress.stage("demonstrations: learn", how.epochs * len(groups), "demonstrations")
    for epoch in range(how.epochs):
        order = list(range(len(groups)))
        random.Random(derive_seed(bench.recipe.seed, "demonstrations", epoch)).shuffle(order)  # noqa: S311
        for batch in range(batches):
            part = [groups[i] for i in order[batch * how.batch : (batch + 1) * how.batch]]
            number = epoch * batches + batch
            figures = bench.learner.step(part, objective, scale=schedule(number, how.epochs * batches))
            unit.metrics(number, "demonstrations", figures)
            bench.progress.figures(loss=figures["loss"])
            bench.progress.advance(len(part))
    bench.restart_learner(bench.recipe.update.learning_rate)
    after = _implied(bench, rows)
    unit.metrics(how.epochs * batches, "implied", _whole(before, after))
    replies = [
        {"prompt": d.prompt.id, "tokens": len(reply), "before": was, "after": now}
        for d, (_, reply), was, now in zip(shown, rows, before, after, strict=True)
    ]
    unit.note("demonstrations", {"weight": how.weight, "gamma": how.gamma, "replies": replies})


def _group(prompt: tuple[int, ...], reply: tuple[int, ...]) -> TrainGroup:
    none = ((0.0,) * len(reply),)
    return TrainGroup(prompt, (reply,), none, none, none)


def _implied(bench: Workbench, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[dict[str, float]]:
    """What the policy as it stands makes of each reply, a token: negative log-likelihood and implied reward."""
    groups = [Group(prompt, (reply,), (n,)) for n, (prompt, reply) in enumerate(rows)]
    bench.progress.stage("demonstrations: read", 1, "pass")
    seen = score(bench.lm, groups, budget=bench.recipe.update.token_budget, totals=True)
    bench.progress.advance()
    if seen.total_BT is None:
        raise ValueError("the totals were asked for")
    how = bench.recipe.demonstrations
    reward_BT = inverse_q_parts(seen.logp_BT, seen.total_BT, seen.keep_BT, weight=0.0, gamma=how.gamma).reward_BT
    length_B = seen.keep_BT.sum(-1)
    nll_B, reward_B = -seen.logp_BT.sum(-1) / length_B, reward_BT.nansum(-1) / length_B
    return [
        {"nll": round(float(nll), 6), "reward": round(float(reward), 6)}
        for nll, reward in zip(nll_B, reward_B, strict=True)
    ]


def _whole(before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over replies, each reply counted alike."""
    sides = (("before", before), ("after", after))
    return {f"{k}_{name}": math.fsum(r[k] for r in side) / len(side) for name, side in sides for k in ("nll", "reward")}
