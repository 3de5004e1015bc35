"""One round: generate, judge, reward, credit, update. It reads like that sentence and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from tutelage.errors import NothingToLearn
from tutelage.loop.bench import Workbench
from tutelage.loop.constraining import hold
from tutelage.loop.crediting import spread_credit
from tutelage.loop.imitating import meet
from tutelage.loop.preferring import prefer
from tutelage.loop.stages import (
    advantages,
    figures,
    generate,
    hold_to_anchors,
    judge,
    rescore,
    reward,
    teaching,
    update,
    watch,
)
from tutelage.loop.unlearning import unlearn
from tutelage.records import Prompt
from tutelage.store.ledger import Unit

__all__ = ["play_round"]


def play_round(bench: Workbench, prompts: Sequence[Prompt], unit: Unit, number: int) -> None:
    """Play round `number` on `prompts` and write everything seen into `unit`.

    Raises:
        NothingToLearn: No group has two valid rewards that differ.
        TrainingError: A loss or gradient is not finite; the last version is kept.
    """
    replies_PG = generate(bench, prompts, number)
    unit.generations(reply for group in replies_PG for reply in group)

    hold_to_anchors(bench, unit, number)
    meet(bench.judges, replies_PG, unit, number, bench.progress)
    findings = judge(bench, prompts, replies_PG, unit)
    rewards_PG = reward(bench, findings, replies_PG)
    unit.rewards(r for group in rewards_PG for r in group)

    seen = figures(findings, rewards_PG)
    if bench.watched:
        seen["cost"] = watch(bench, unit)
    if bench.recipe.constraint.enabled:
        bench.multiplier.update(seen["cost"])
    seen |= hold(bench.constraints, rewards_PG)
    unit.metrics(number, "rollout", seen | {"multiplier": bench.multiplier.value})
    bench.progress.figures(cost=seen["cost"], multiplier=bench.multiplier.value, abstains=seen["share_abstains"])

    spreads = bench.choice.family == "gradient"  # pairs teach by whole replies, marks by their own tokens
    own = spreads and bench.recipe.credit.method == "attention" and not bench.recipe.credit.explains
    scores = bench.frozen_scores(prompts, replies_PG, attention=own)
    drawn = rescore(bench, prompts, replies_PG, unit, number)
    advantage_PG = advantages(bench, rewards_PG, replies_PG, scores, drawn)
    if bench.choice.family == "preference":
        prefer(bench, prompts, replies_PG, rewards_PG, advantage_PG, scores, unit, number)
        return
    if bench.choice.family == "marks":
        unlearn(bench, prompts, replies_PG, findings.blamed, advantage_PG, scores, unit, number)
        return
    trains_PG = teaching(bench, rewards_PG, replies_PG, advantage_PG)
    if not any(map(any, trains_PG)):
        raise NothingToLearn(
            f"round {number}: no group of replies has rewards that differ",
            expected="at least one group with two valid, different rewards",
            fix="look at the abstentions in the ledger; raise update.samples or sampling.temperature",
        )
    credit_BT = spread_credit(bench, prompts, advantage_PG, rewards_PG, scores, replies_PG, unit, number)
    update(bench, prompts, replies_PG, scores, drawn, credit_BT, trains_PG, unit, number)
