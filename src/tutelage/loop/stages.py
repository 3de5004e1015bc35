"""The stages of a round, each taking what the one before gives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from tutelage.credit import tokens as credit
from tutelage.errors import JudgeRefused
from tutelage.feedback.drift import Anchored
from tutelage.feedback.panel import Findings
from tutelage.loop.bench import Workbench, derive_seed
from tutelage.loop.choice import Rewards
from tutelage.loop.constraining import cost_terms, mixed, tiered
from tutelage.loop.marking import candidates, note_triggers, scorer_of
from tutelage.objectives.advantages import gae, moving_mean, overlong_penalty, whiten
from tutelage.objectives.divergence import importance, kl_k1
from tutelage.policy.learner import Scores, TrainGroup, padded
from tutelage.records import Generation, Prompt, Reward, SamplerSettings
from tutelage.rewards.compose import compose
from tutelage.rewards.terms import text_verdict
from tutelage.store.ledger import Unit

__all__ = [
    "Drawn", "advantages", "figures", "generate", "hold_to_anchors", "judge", "rescore", "reward",
    "share_withheld", "teaching", "update", "watch",
]  # fmt: skip

# Terms with an opinion on content: text terms alone must not train.
_ESSENTIAL = ("fit", "principles", "consistency")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What is known of the tokens that were drawn.

    Args:
        logp_BT: Their log-probabilities under the policy, before this round's steps.
        weight_BT: Importance weights; None where the policy itself drew them.
        value_BT: What the value head expected before each; None without one.
    """

    logp_BT: torch.Tensor
    weight_BT: torch.Tensor | None = None
    value_BT: torch.Tensor | None = None


def generate(bench: Workbench, prompts: Sequence[Prompt], number: int) -> list[list[Generation]]:
    """G replies a prompt from the policy as it stands; of some objectives half of them are the start model's."""
    recipe = bench.recipe
    settings = SamplerSettings(recipe.sampling.temperature, max_new_tokens=recipe.sampling.max_new_tokens)
    samples = recipe.update.samples
    others = samples // 2 if bench.choice.from_start else 0
    bench.progress.stage(f"round {number}: generate", len(prompts) * samples, "replies")
    own_PG = bench.roller.generate(
        prompts,
        samples=samples - others,
        settings=settings,
        seed=derive_seed(recipe.seed, "round", number),
        version=bench.version,
        progress=bench.progress.advance,
    )
    if not others:
        return own_PG
    with bench.adapter.off():
        start_PG = bench.completer.generate(
            prompts,
            samples=others,
            settings=settings,
            seed=derive_seed(recipe.seed, "round", number, "start"),
            version="start",
            progress=bench.progress.advance,
        )
    return [
        [*own, *(dataclasses.replace(g, sample=g.sample + samples - others) for g in start)]
        for own, start in zip(own_PG, start_PG, strict=True)
    ]


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
    if "critic" in bench.recipe.feedback.judges:
        fit_PG = [terms["fit"] for terms in findings.terms_PKG]
        note_triggers("fit", bench.panel.liking, candidates(prompts, replies_PG, fit_PG), unit)
    if "text" in bench.recipe.feedback.judges:
        for prompt, replies, terms in zip(prompts, replies_PG, findings.terms_PKG, strict=True):
            verdicts = [text_verdict(r, prompt.hash) for r in replies]
            terms["text"] = [v.value for v in verdicts]
            findings.verdicts.extend(verdicts)
    for one in bench.judges:
        bench.progress.stage(f"{unit.name}: {one.name}", len(prompts), "prompts")
        given_PG = one.judge(prompts, replies_PG)
        for terms, given in zip(findings.terms_PKG, given_PG, strict=True):
            terms[one.name] = [v.value for v in given]
            findings.verdicts.extend(given)
        if score := scorer_of(one):
            rows = candidates(prompts, replies_PG, [[v.value for v in given] for given in given_PG])
            for reply, places in note_triggers(one.name, score, rows, unit).items():
                findings.blamed.setdefault(reply, []).extend(places)
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
    essential = (*_ESSENTIAL, *(j.name for j in bench.recipe.judges))
    weights = _weights(bench)
    found = []
    for replies, terms, costs_G in zip(replies_PG, findings.terms_PKG, findings.costs_PG, strict=True):
        more_G = cost_terms(bench.recipe, terms, len(replies))
        costs = [one | more for one, more in zip(costs_G, more_G, strict=True)]
        found.append(compose([r.id for r in replies], terms, weights, costs, essential=essential))
    return found


def _weights(bench: Workbench) -> dict[str, float]:
    """Of each term, less what a judge that has changed has lost."""
    return {name: weight * bench.trust.get(name, 1.0) for name, weight in bench.recipe.weights.items()}


def rescore(
    bench: Workbench, prompts: Sequence[Prompt], replies_PG: Sequence[Sequence[Generation]], unit: Unit, number: int
) -> Drawn:
    """What the policy gave the drawn tokens, importance weights for them, and the value head's expectations.

    The policy scores the replies again only where a slightly other model drew them, or for the values.
    """
    drawn_BT = padded([reply.logps for group in replies_PG for reply in group])
    exact = bench.recipe.sampling.exact
    if (exact and bench.values is None) or bench.choice.family != "gradient":
        return Drawn(drawn_BT)  # pairs and marks are read under the policy and the start alone, whoever drew them
    scores = bench.scores(prompts, replies_PG)
    if exact:
        return Drawn(drawn_BT, None, scores.value_BT)
    u = bench.recipe.update
    weight_BT, apart = importance(
        scores.logp_BT, drawn_BT, scores.keep_BT, cap=u.importance_cap, method=u.importance, low=u.importance_low
    )
    unit.metrics(number, "importance", apart)
    return Drawn(scores.logp_BT, weight_BT, scores.value_BT)


def advantages(
    bench: Workbench,
    rewards_PG: Sequence[Sequence[Reward]],
    replies_PG: Sequence[Sequence[Generation]],
    scores: Scores,
    drawn: Drawn,
) -> torch.Tensor:
    """Advantages of the rewards, mixed with those of the constrained cost."""
    choice = bench.choice
    lengths = torch.tensor([[len(r.tokens) for r in group] for group in replies_PG])
    table = totals = torch.tensor([[math.nan if r.total is None else r.total for r in g] for g in rewards_PG])
    if choice.overlong:
        table = table + overlong_penalty(lengths, limit=bench.recipe.sampling.max_new_tokens, share=choice.overlong)
    if choice.divergence == "reply":
        spent_B = (kl_k1(drawn.logp_BT, scores.logp_BT) * scores.keep_BT).sum(-1)
        table = table - bench.recipe.update.kl * spent_B.view_as(table)

    def estimate(name: str, table_PG: torch.Tensor) -> torch.Tensor:
        return _estimate(bench, name, table_PG, lengths)

    if bench.recipe.tiers:
        earned = tiered(bench.recipe, _weights(bench), rewards_PG, estimate, extra_PG=table - totals)
    else:
        earned = estimate("reward", table)
    held = {}
    if bench.recipe.constraint.enabled:
        costs = torch.tensor([[r.costs["over_abstention"] for r in g] for g in rewards_PG])
        cost_advantage = estimate("cost", torch.where(table.isnan(), math.nan, costs))
        # Weighed by how answerable the question is held to be: a constraint on what should be answered.
        held["over_abstention"] = (cost_advantage * costs.amax(-1, keepdim=True), bench.multiplier.value)
    return mixed(earned, bench.constraints, rewards_PG, estimate, held=held)


def _estimate(bench: Workbench, name: str, table_PG: torch.Tensor, lengths_PG: torch.Tensor) -> torch.Tensor:
    """Advantages, and what later rounds need to know of these rewards."""
    before = bench.baselines.get(name)
    found = bench.choice.estimate(Rewards(table_PG, lengths_PG, before))
    if bench.choice.decay is not None:
        after = moving_mean(before, table_PG, decay=bench.choice.decay)
        if after is not None:
            bench.baselines[name] = after
    return found


def update(
    bench: Workbench,
    prompts: Sequence[Prompt],
    replies_PG: Sequence[Sequence[Generation]],
    scores: Scores,
    drawn: Drawn,
    credit_BT: torch.Tensor,
    trains_PG: Sequence[Sequence[bool]],
    unit: Unit,
    number: int,
) -> None:
    """Optimiser steps on the replies that have something to teach."""
    tables = {"old_logp": drawn.logp_BT, "ref_logp": scores.logp_BT}
    if bench.choice.values is None:
        discount = bench.recipe.credit.discount
        tables["advantage"] = credit.reward_to_go(credit_BT, discount=discount)
        if discount < 1.0:
            tables["advantage"] = credit.as_loud(tables["advantage"], credit_BT, scores.keep_BT)
    else:
        kept_B = torch.tensor([one for group in trains_PG for one in group], dtype=scores.keep_BT.dtype)
        tables |= _expected(bench, scores, drawn, credit_BT, scores.keep_BT * kept_B[:, None])
    if drawn.weight_BT is not None:
        tables["advantage"] = tables["advantage"] * drawn.weight_BT
    groups, row = [], 0
    for prompt, replies, trains_G in zip(prompts, replies_PG, trains_PG, strict=True):
        rows = [row + g for g, trains in enumerate(trains_G) if trains]
        kept = [reply.tokens for reply, trains in zip(replies, trains_G, strict=True) if trains]
        row += len(replies)
        if not kept:
            continue  # a dead group: every reply did equally well, or none can be learned from
        cut = {
            key: tuple(tuple(table[b, : len(tokens)].tolist()) for b, tokens in zip(rows, kept, strict=True))
            for key, table in tables.items()
        }
        groups.append(TrainGroup(bench.encode(prompt), tuple(kept), **cut))
    size = bench.recipe.update.batch
    bench.progress.stage(f"round {number}: update", len(groups), "prompts")
    for start in range(0, len(groups), size):
        part = groups[start : start + size]
        numbers = bench.learner.step(part, bench.choice.loss, temperature=bench.recipe.sampling.temperature)
        unit.metrics(number * 1000 + start // size, "update", numbers)
        bench.progress.figures(kl=numbers.get("kl_to_start", 0.0), loss=numbers["loss"])
        bench.progress.advance(len(part))


def teaching(
    bench: Workbench,
    rewards_PG: Sequence[Sequence[Reward]],
    replies_PG: Sequence[Sequence[Generation]],
    advantage_PG: torch.Tensor,
) -> list[list[bool]]:
    """Which replies train. A group without a difference teaches nothing, except to a value head."""
    found = []
    for rewards, replies, advantage_G in zip(rewards_PG, replies_PG, advantage_PG, strict=True):
        known = sum(r.total is not None for r in rewards) > 1
        alive = known if bench.choice.values is not None else bool((advantage_G != 0).any())
        found.append(
            [
                alive
                and (reply.finished or not bench.choice.masks_truncated)
                and (reward.total is not None or bench.choice.values is None)
                for reward, reply in zip(rewards, replies, strict=True)
            ]
        )
    return found


def _expected(
    bench: Workbench, scores: Scores, drawn: Drawn, credit_BT: torch.Tensor, keep_BT: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Advantages and returns against what the value head expected."""
    how = bench.choice.values
    if how is None or drawn.value_BT is None:
        raise ValueError("there is no value head to expect anything")
    reward_BT = credit_BT
    if bench.choice.divergence == "token":
        reward_BT = credit_BT - bench.recipe.update.kl * kl_k1(drawn.logp_BT, scores.logp_BT)
    advantage_BT, return_BT = gae(reward_BT * keep_BT, drawn.value_BT, keep_BT, how.discount, how.lam)
    return {"advantage": whiten(advantage_BT, keep_BT), "old_value": drawn.value_BT, "returns": return_BT}


def figures(findings: Findings, rewards_PG: Sequence[Sequence[Reward]]) -> dict[str, float]:
    """What a round looked like, in numbers; every one recomputes from the ledger."""
    flat = [r for g in rewards_PG for r in g]
    acts = [a for g in findings.acts_PG for a in g]
    known_PG = [[r.total for r in g if r.total is not None] for g in rewards_PG]
    out: dict[str, float] = {
        "verdicts": len(findings.verdicts),
        "verdicts_abstained": sum(v.abstained for v in findings.verdicts),
        "missing_rewards": sum(r.total is None for r in flat),
        "dead_groups": sum(len({r.total for r in g}) <= 1 for g in rewards_PG),
        "tied_groups": sum(len(known) > 1 and len(set(known)) == 1 for known in known_PG),
        "silent_groups": sum(not known for known in known_PG),
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
