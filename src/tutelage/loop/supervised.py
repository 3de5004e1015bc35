"""The first stage: critique, revise, imitate. Without it abstaining is never sampled, so never learned."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tutelage.feedback.belief import Belief
from tutelage.feedback.constitution import Principle
from tutelage.feedback.panel import Findings
from tutelage.loop.bench import Workbench, derive_seed
from tutelage.loop.stages import judge
from tutelage.objectives.supervised import Supervised
from tutelage.policy.learner import TrainGroup
from tutelage.records import Generation, Prompt, SamplerSettings, Target
from tutelage.store.ledger import Unit

__all__ = ["imitate", "look", "revise", "schedule"]


def look(bench: Workbench, prompts: Sequence[Prompt], unit: Unit) -> tuple[list[list[Generation]], Findings]:
    """The start model's replies (the first of each prompt greedy, the rest sampled) and their verdicts."""
    recipe = bench.recipe
    settings = SamplerSettings(
        recipe.supervised.temperature,
        recipe.supervised.top_k,
        recipe.supervised.top_p,
        recipe.sampling.max_new_tokens,
    )
    bench.progress.stage("supervised: generate", len(prompts) * recipe.supervised.samples, "replies")
    replies_PG = bench.completer.generate(
        prompts,
        samples=recipe.supervised.samples,
        settings=settings,
        seed=derive_seed(recipe.seed, "supervised"),
        version=bench.version,
        greedy_first=True,
        progress=bench.progress.advance,
    )
    unit.generations(g for group in replies_PG for g in group)
    return replies_PG, judge(bench, prompts, replies_PG, unit)


def revise(
    bench: Workbench,
    prompts: Sequence[Prompt],
    replies_PG: Sequence[Sequence[Generation]],
    findings: Findings,
) -> list[tuple[Prompt, Target, tuple[int, ...]]]:
    """For each question the reply to imitate: its own when it keeps the principles, else a revision.

    A revision begins as the broken principle says; the model itself goes on, and the panel must hold
    the result to do what the principle wants, or the principle's fallback is taken. Questions that
    the panel is unsure of teach nothing here.
    """
    todo: list[tuple[Prompt, Principle, str, Belief]] = []
    found: list[tuple[Prompt, Target, tuple[int, ...]]] = []
    for prompt, replies, acts, belief in zip(prompts, replies_PG, findings.acts_PG, findings.beliefs, strict=True):
        if belief is None or belief.of(belief.kind) < bench.recipe.feedback.min_confidence:
            continue
        principles = bench.panel.constitution.about(belief.kind)
        if not principles:
            continue
        principle = max(principles, key=lambda p: p.weight)
        # An own reply that seems to abstain must surely do so: to imitate a made-up one would teach the fault.
        least = 0.5 if principle.wants == "answers" else 0.85
        best = max(range(len(replies)), key=lambda g: (acts[g][principle.wants] >= least, -g))
        if acts[best][principle.wants] >= least:
            reply = replies[best]
            reason = f"keeps '{principle.id}' ({belief.of(belief.kind):.2f})"
            target = Target(prompt.id, reply.text, "own", principle.id, reason, belief.of(belief.kind))
            found.append((prompt, target, reply.tokens))
        elif principle.wants != "answers":
            openings = principle.openings or (principle.fallback,)
            number = derive_seed(bench.recipe.seed, "opening", prompt.id) % len(openings)
            todo.append((prompt, principle, openings[number], belief))
    return found + _continue(bench, todo)


def _continue(
    bench: Workbench, todo: Sequence[tuple[Prompt, Principle, str, Belief]]
) -> list[tuple[Prompt, Target, tuple[int, ...]]]:
    if not todo:
        return []
    bench.progress.stage("supervised: revise", len(todo), "revisions")
    drafts = bench.completer.generate(
        [p for p, _, _, _ in todo],
        samples=1,
        settings=SamplerSettings(0.0, max_new_tokens=16),
        seed=0,
        version=bench.version,
        opening=[opening for _, _, opening, _ in todo],
        progress=bench.progress.advance,
    )
    acts = bench.panel.acts([d[0].text for d in drafts])
    found = []
    for (prompt, principle, _, belief), draft, act in zip(todo, drafts, acts, strict=True):
        text = draft[0].text
        good = draft[0].finished and act[principle.wants] >= 0.6 and "," not in text
        if not good:
            text = principle.fallback or text
        reason = principle.critique.replace("{question}", prompt.text).replace("{reply}", "")
        target = Target(prompt.id, text, "revised", principle.id, reason, belief.of(belief.kind))
        found.append((prompt, target, bench.lm.encode_reply(text)))
    return found


def schedule(step: int, steps: int, *, warmup: int = 4) -> float:
    """Factor on the learning rate: linear warm-up, then linear decay to a tenth."""
    return min((step + 1) / warmup, 1.0) * max(0.1, 1.0 - step / max(steps, 1))


def imitate(bench: Workbench, targets: Sequence[tuple[Prompt, Target, tuple[int, ...]]], unit: Unit) -> None:
    """Supervised steps on the targets, in an order that the seed decides."""
    how = bench.recipe.supervised
    wants = {p.id: p.wants for p in bench.panel.constitution.principles}
    groups = [
        _group(bench.encode(p), t.weight, tokens, how.anchor if (t.origin, wants[t.principle]) == _KEPT else 0.0)
        for p, t, tokens in targets
    ]
    bench.restart_learner(how.learning_rate)
    batches = -(-len(groups) // how.batch)
    steps = how.epochs * batches
    bench.progress.stage("supervised: learn", how.epochs * len(groups), "targets")
    for epoch in range(how.epochs):
        order = list(range(len(groups)))
        random.Random(derive_seed(bench.recipe.seed, "epoch", epoch)).shuffle(order)  # noqa: S311
        for batch in range(batches):
            part = [groups[i] for i in order[batch * how.batch : (batch + 1) * how.batch]]
            number = epoch * batches + batch
            figures = bench.learner.step(part, Supervised(), scale=schedule(number, steps))
            unit.metrics(number, "supervised", figures)
            bench.progress.figures(loss=figures["loss"])
            bench.progress.advance(len(part))
    bench.restart_learner(bench.recipe.update.learning_rate)


# An own answer that keeps the principles only holds the policy to the start; all else is imitated.
_KEPT = ("own", "answers")


def _group(prompt: tuple[int, ...], weight: float, tokens: tuple[int, ...], anchor: float) -> TrainGroup:
    none, same = ((0.0,) * len(tokens),), ((weight,) * len(tokens),)
    if anchor:
        return TrainGroup(prompt, (tokens,), none, none, none, ((anchor * weight,) * len(tokens),))
    return TrainGroup(prompt, (tokens,), same, none, none)
