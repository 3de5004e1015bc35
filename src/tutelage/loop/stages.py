"""The stages of a round, each taking what the one before gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from tutelage.credit import tokens as credit
from tutelage.errors import JudgeRefused
from tutelage.feedback.drift import Anchored
from tutelage.feedback.panel import Findings
from tutelage.loop.bench import Workbench, derive_seed
from tutelage.objectives.constrained import mix_advantages
from tutelage.objectives.policy_gradient import importance
from tutelage.policy.learner import Scores, TrainGroup, padded
from tutelage.records import Generation, Prompt, Reward, SamplerSettings
from tutelage.rewards.compose import compose
from tutelage.rewards.terms import text_verdict
from tutelage.store.ledger import Unit

__all__ = [
    "advantages", "figures", "generate", "hold_to_anchors", "judge", "reward", "share_withheld", "spread_credit",
    "update", "watch",
]  # fmt: skip

# Terms with an opinion on content: text terms alone must not train.
_ESSENTIAL = ("fit", "principles", "consistency")


def generate(bench: Workbench, prompts: Sequence[Prompt], number: int) -> list[list[Generation]]:
    """G replies a prompt from the policy as it stands."""
    recipe = bench.recipe
    settings = SamplerSettings(recipe.sampling.temperature, max_new_tokens=recipe.sampling.max_new_tokens)
    bench.progress.stage(f"round {number}: generate", len(prompts) * recipe.update.samples, "replies")
    return bench.roller.generate(
        prompts,
        samples=recipe.update.samples,
        settings=settings,
        seed=derive_seed(recipe.seed, "round", number),
        version=bench.version,
        progress=bench.progress.advance,
    )


def judge(
    bench: Workbench,
    prompts: Sequence[Prompt],
    replies_PG: Sequence[Sequence[Generation]],
    unit: Unit,
) -> Findings:
    """All verdicts on a batch, the text judge's included."""
    bench.progress.stage(f"{unit.name}: judge", 1, "batch")
    first = bench.version == "start"
    with bench.adapter.off():
        bench.panel.prepare(bench.lm, prompts)
    findings = bench.panel.examine(prompts, replies_PG, first_look=first)
    if "text" in bench.recipe.feedback.judges:
        for prompt, replies, terms in zip(prompts, replies_PG, findings.terms_PKG, strict=True):
            verdicts = [text_verdict(r, prompt.hash) for r in replies]
            terms["text"] = [v.value for v in verdicts]
            findings.verdicts.extend(verdicts)
    for one in bench.judges:
        bench.progress.stage(f"{unit.name}: {one.name}", len(prompts), "prompts")
        for terms, given in zip(findings.terms_PKG, one.judge(prompts, replies_PG), strict=True):
            terms[one.name] = [v.value for v in given]
            findings.verdicts.extend(given)
        bench.progress.advance(len(prompts))
    unit.verdicts(findings.verdicts)
    bench.progress.advance()
    return findings


def hold_to_anchors(bench: Workbench, unit: Unit, number: int) -> None:
    """Judge the pinned pairs again: a judge that has changed loses weight, one that has changed much ends the run.

    Raises:
        JudgeRefused: A judge's sums are at twice the alarm; the run can go on when it is mended.
    """
    if not bench.anchors or (number - 1) % bench.recipe.feedback.anchor_every:
        return
    for one in bench.judges:
        bench.progress.stage(f"{unit.name}: anchors, {one.name}", len(bench.anchors), "pairs")
        if one.name not in bench.anchored:
            bench.anchored[one.name] = Anchored.look(one, bench.anchors)
            continue
        action, factor, level = bench.anchored[one.name].again(one, bench.anchors)
        bench.trust[one.name] = factor
        unit.metrics(number, "drift", {f"level_{one.name}": level, f"trust_{one.name}": factor})
        if action == "down-weight":
            bench.progress.say(f"judge {one.name} has changed (level {level:.2f}); its weight falls to {factor:.0%}")
        if action == "stop":
            raise JudgeRefused(
                f"the judge '{one.name}' no longer says what it said of the anchors (level {level:.1f})",
                expected="a level below 2; 1 is an alarm",
                fix="bring the judge back to its model and words, then go on with --resume",
            )


def reward(bench: Workbench, findings: Findings, replies_PG: Sequence[Sequence[Generation]]) -> list[list[Reward]]:
    """Compose each group's terms into rewards."""
    own = {j.name: j.weight * bench.trust.get(j.name, 1.0) for j in bench.recipe.judges}
    weights = bench.recipe.rewards.model_dump() | own
    essential = (*_ESSENTIAL, *own)
    return [
        compose([r.id for r in replies], terms, weights, costs, essential=essential)
        for replies, terms, costs in zip(replies_PG, findings.terms_PKG, findings.costs_PG, strict=True)
    ]


def advantages(bench: Workbench, rewards_PG: Sequence[Sequence[Reward]]) -> torch.Tensor:
    """Advantages of the rewards, mixed with those of the constrained cost."""
    _, advantage = bench.objective()
    table = torch.tensor([[math.nan if r.total is None else r.total for r in g] for g in rewards_PG])
    mixed = advantage(table)
    if bench.recipe.constraint.enabled:
        costs = torch.tensor([[r.costs["over_abstention"] for r in g] for g in rewards_PG])
        cost_advantage = advantage(torch.where(table.isnan(), math.nan, costs))
        # Weighed by how answerable the question is held to be: a constraint on what should be answered.
        mixed = mix_advantages(mixed, cost_advantage * costs.amax(-1, keepdim=True), bench.multiplier.value)
    return mixed


def spread_credit(
    bench: Workbench,
    advantage_PG: torch.Tensor,
    scores: Scores,
    replies_PG: Sequence[Sequence[Generation]],
    unit: Unit,
) -> torch.Tensor:
    """Credit a token; kept in the ledger."""
    how = bench.recipe.credit
    advantage_B = advantage_PG.flatten().float()
    weights_BT = credit.weights(how.method, scores.keep_BT, scores.attention_BT)
    credit_BT = credit.assign(advantage_B, weights_BT, scores.keep_BT, beta=how.beta)
    flat = [r for group in replies_PG for r in group]
    for row, reply in enumerate(flat):
        unit.credit(reply.id, how.method, float(advantage_B[row]), credit_BT[row, : len(reply.tokens)].tolist())
    shown = {r.id: [bench.lm.tokenizer.decode([t]) for t in r.tokens] for group in replies_PG[:6] for r in group[:2]}
    unit.note("pieces", shown)
    return credit_BT


def update(
    bench: Workbench,
    prompts: Sequence[Prompt],
    replies_PG: Sequence[Sequence[Generation]],
    scores: Scores,
    credit_BT: torch.Tensor,
    advantage_PG: torch.Tensor,
    unit: Unit,
    number: int,
) -> None:
    """Optimiser steps on the groups that have something to teach."""
    objective, _ = bench.objective()
    value_BT = credit.reward_to_go(credit_BT)
    old_BT = None
    if not bench.recipe.sampling.exact:
        old_BT, weight_BT = _corrected(bench, prompts, replies_PG, unit, number)
        value_BT = value_BT * weight_BT
    groups, row = [], 0
    for prompt, replies, advantage_G in zip(prompts, replies_PG, advantage_PG, strict=True):
        rows = range(row, row + len(replies))
        row += len(replies)
        if not bool((advantage_G != 0).any()):
            continue  # a dead group: every reply did equally well
        lengths = [len(r.tokens) for r in replies]
        groups.append(
            TrainGroup(
                bench.encode(prompt),
                tuple(r.tokens for r in replies),
                tuple(tuple(value_BT[b, :n].tolist()) for b, n in zip(rows, lengths, strict=True)),
                tuple(
                    r.logps if old_BT is None else tuple(old_BT[b, : len(r.tokens)].tolist())
                    for b, r in zip(rows, replies, strict=True)
                ),
                tuple(tuple(scores.logp_BT[b, :n].tolist()) for b, n in zip(rows, lengths, strict=True)),
            )
        )
    size = bench.recipe.update.batch
    bench.progress.stage(f"round {number}: update", len(groups), "prompts")
    for start in range(0, len(groups), size):
        part = groups[start : start + size]
        numbers = bench.learner.step(part, objective, temperature=bench.recipe.sampling.temperature)
        unit.metrics(number * 1000 + start // size, "update", numbers)
        bench.progress.figures(kl=numbers.get("kl_to_start", 0.0), loss=numbers["loss"])
        bench.progress.advance(len(part))


def _corrected(
    bench: Workbench, prompts: Sequence[Prompt], replies_PG: Sequence[Sequence[Generation]], unit: Unit, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy's own log-probabilities of what a slightly other model drew, and importance weights for it."""
    scores = bench.scores(prompts, replies_PG)
    drawn_BT = padded([reply.logps for group in replies_PG for reply in group])
    weight_BT, apart = importance(scores.logp_BT, drawn_BT, scores.keep_BT, cap=bench.recipe.update.importance_cap)
    unit.metrics(number, "importance", apart)
    return scores.logp_BT, weight_BT


def figures(findings: Findings, rewards_PG: Sequence[Sequence[Reward]]) -> dict[str, float]:
    """What a round looked like, in numbers; every one recomputes from the ledger."""
    flat = [r for g in rewards_PG for r in g]
    acts = [a for g in findings.acts_PG for a in g]
    out: dict[str, float] = {
        "verdicts": len(findings.verdicts),
        "verdicts_abstained": sum(v.abstained for v in findings.verdicts),
        "missing_rewards": sum(r.total is None for r in flat),
        "dead_groups": sum(len({r.total for r in g}) <= 1 for g in rewards_PG),
    }
    for name in dict.fromkeys(k for r in flat for k in r.raw):
        known = [v for r in flat if (v := r.raw.get(name)) is not None]
        if known:
            out[f"term_{name}"] = sum(known) / len(known)
    content = [out[f"term_{n}"] for n in ("fit", "principles") if f"term_{n}" in out]
    if content:
        out["reward_raw"] = sum(content) / len(content)
    for act in ("answers", "abstains", "asks_back"):
        out[f"share_{act}"] = sum(a[act] for a in acts) / max(len(acts), 1)
    entropies = [s.entropy for s in findings.spreads if s.entropy is not None]
    if entropies:
        out["semantic_entropy"] = sum(entropies) / len(entropies)
    dues = [(b.answer_due, act) for b, g in zip(findings.beliefs, findings.acts_PG, strict=True) if b for act in g]
    out["cost"] = share_withheld(dues)
    return out


def share_withheld(dues: Sequence[tuple[float, Mapping[str, float]]]) -> float:
    """Of what is held answerable, the share withheld: the constrained quantity.

    Counted by what each reply most likely does: probabilities have a floor (an answer is seldom surely
    one), and no limit would ever be met.

    Args:
        dues: To what degree an answer is due, and the probability of each act of the reply.
    """
    due = sum(weight for weight, _ in dues)
    paid = sum(weight for weight, act in dues if max(act, key=lambda a: act[a]) != "answers")
    return paid / due if due else 0.0


def watch(bench: Workbench, unit: Unit) -> float:
    """The share withheld on greedy replies to all watched questions.

    A round's own replies are drawn, and to few questions: a cost measured on them is off by several
    points, and the multiplier follows. The likeliest replies withhold less than drawn ones, so the same
    limit then tolerates more (docs/log.md).
    """
    settings = SamplerSettings(0.0, max_new_tokens=bench.recipe.sampling.max_new_tokens)
    bench.progress.stage(f"{unit.name}: watch", len(bench.watched), "replies")
    replies = bench.completer.generate(
        bench.watched, samples=1, settings=settings, seed=0, version=bench.version, progress=bench.progress.advance
    )
    with bench.adapter.off():
        bench.panel.prepare(bench.lm, bench.watched)
    acts = bench.panel.acts([reply.text for (reply,) in replies])
    seen = [
        (prompt.id, reply.text, belief.answer_due, act)
        for prompt, (reply,), act in zip(bench.watched, replies, acts, strict=True)
        if (belief := bench.panel.belief(prompt)) is not None
    ]
    unit.note("watched", [[name, text, round(due, 4), max(act, key=lambda a: act[a])] for name, text, due, act in seen])
    return share_withheld([(due, act) for _, _, due, act in seen])
