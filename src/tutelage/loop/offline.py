"""The stage that learns from a file of compared replies: nothing is drawn, nobody judges.

One unit reads and measures (`pairs-0`), then each pass over the pairs is one (`pairs-1`, ...), with a checkpoint of
its own that keeps the optimiser's moments: a run that was cut off goes on within the stage, to the same weights.
"""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tutelage.engines.packing import Group
from tutelage.errors import InputError, NothingToLearn
from tutelage.feedback.comparisons import Compared, Comparisons
from tutelage.loop.agreement import agreements
from tutelage.loop.bench import Workbench, derive_seed
from tutelage.loop.choice import choose
from tutelage.loop.pairing import Row, apart, pair_groups, with_reference
from tutelage.loop.preferring import reference_point
from tutelage.loop.ranking import plain
from tutelage.loop.supervised import schedule
from tutelage.objectives.divergence import kl_k3
from tutelage.objectives.unpaired import Kto
from tutelage.policy.learner import TrainGroup, score
from tutelage.policy.moments import moments_of, take_moments
from tutelage.records import Prompt, SamplerSettings
from tutelage.store.ledger import Unit

__all__ = ["Offline", "begin_pairs", "lay", "learn_pairs", "measure_pairs", "split"]

_SCORED = 64  # pairs in one pass without gradients: bounds the tables that it fills
_DIVERGED = 64  # held-out prompts on which the divergence from the start is measured


@dataclasses.dataclass(frozen=True)
class Example:
    """A pair as tokens; `label` is P(first is better)."""

    prompt: Prompt
    tokens: tuple[int, ...]
    first: tuple[int, ...]
    second: tuple[int, ...]
    label: float


@dataclasses.dataclass(frozen=True)
class Offline:
    """A file's pairs, ready for the learner.

    Args:
        train: Learned from.
        heldout: Measured on; no prompt of theirs is learned from.
        counts: `pairs` of the file, `ties` among them (a label of 1/2), and what was left out: `same` (equal
            texts), `long` (above pairs.longest, or the model's context), `silent` (nobody said anything).
        told: What the ledger keeps of the labels.
    """

    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    counts: Mapping[str, int]
    told: Mapping[str, Any]


def split(pairs: Sequence[Compared], share: float, *, seed: int) -> set[str]:
    """Hashes of the prompts that are held out: `share` of them, the same for the same seed and prompts."""
    hashes = sorted({pair.prompt.hash for pair in pairs})
    random.Random(derive_seed(seed, "held-out pairs")).shuffle(hashes)  # noqa: S311
    return set(hashes[: round(share * len(hashes))])


def lay(bench: Workbench, found: Comparisons) -> Offline:
    """The pairs of a file as tokens, apart from those held out."""
    how, lm = bench.recipe.pairs, bench.lm
    counts = collections.Counter({"pairs": 0, "ties": 0, "same": 0, "long": 0, "silent": len(found.left_out)})
    out = split(found.pairs, how.heldout, seed=bench.recipe.seed)
    train: list[Example] = []
    heldout: list[Example] = []
    room = bench.recipe.sampling.max_new_tokens
    for pair, label in zip(found.pairs, found.labels(how.labels), strict=True):
        if plain(pair.first) == plain(pair.second):
            counts["same"] += 1
            continue
        first, second = (lm.encode_reply(text) for text in (pair.first, pair.second))
        try:
            tokens = lm.encode(pair.prompt, room=room)
        except InputError:  # longer than the model's context
            counts["long"] += 1
            continue
        if len(tokens) + max(len(first), len(second)) > min(how.longest, lm.context):
            counts["long"] += 1
            continue
        counts["pairs"] += 1
        counts["ties"] += label == 0.5
        (heldout if pair.prompt.hash in out else train).append(Example(pair.prompt, tokens, first, second, label))
    prior = found.prior
    told = {"labels": how.labels, "prior": prior.a if prior.pairs else None, "prior_pairs": prior.pairs}
    return Offline(tuple(train), tuple(heldout), dict(counts), told)


def begin_pairs(bench: Workbench, offline: Offline, unit: Unit) -> None:
    """Keep what the file held, and measure the policy as it stands on the pairs held out.

    Raises:
        NothingToLearn: No pair is left to learn from.
    """
    unit.note("pairs", dict(offline.told) | dict(offline.counts))
    unit.prompts({e.prompt.hash: e.prompt for e in offline.train}.values(), "pairs")
    unit.prompts({e.prompt.hash: e.prompt for e in offline.heldout}.values(), "pairs-heldout")
    if not offline.train:
        raise NothingToLearn(
            f"of the pairs in {bench.recipe.pairs.file} none is left to learn from ({dict(offline.counts)})",
            expected="at least one pair beside those held out",
            fix="raise pairs.longest, lower pairs.heldout, or add pairs",
        )
    measure_pairs(bench, offline, unit, 0)


def learn_pairs(bench: Workbench, offline: Offline, unit: Unit, epoch: int) -> None:
    """One pass over the pairs, the epochs counted from 1; after the last one the held-out pairs are measured again.

    Raises:
        NothingToLearn: No pair teaches anything.
        TrainingError: A loss or gradient is not finite; the last version is kept.
    """
    how, recipe = bench.recipe.pairs, bench.recipe
    choice = choose(recipe, recipe.pair_objective)
    groups = _groups(bench, offline, unit, epoch, single=isinstance(choice.loss, Kto))
    if not groups:
        raise NothingToLearn(
            f"no pair of {how.file} prefers one reply", expected="pairs that are no ties", fix="add votes to the file"
        )
    kept = moments_of(bench.learner.optimizer) if epoch > 1 else {}
    bench.restart_learner(how.learning_rate)
    if kept:
        take_moments(bench.learner.optimizer, kept)
    random.Random(derive_seed(recipe.seed, "pairs", epoch)).shuffle(groups)  # noqa: S311
    batches = -(-len(groups) // how.batch)
    bench.progress.stage(f"pairs, pass {epoch}", len(groups), "pairs")
    for batch in range(batches):
        part = groups[batch * how.batch : (batch + 1) * how.batch]
        loss = choice.loss
        if isinstance(loss, Kto):
            other = groups[batch * how.batch - 1 : batch * how.batch] if len(part) == 1 else []
            loss = dataclasses.replace(loss, z0=reference_point(bench, [*part, *other], temperature=1.0))
        number = (epoch - 1) * batches + batch
        figures = bench.learner.step(part, loss, scale=schedule(number, how.epochs * batches))
        if isinstance(loss, Kto):
            figures["z0"] = loss.z0
        unit.metrics(number, "offline", figures)
        bench.progress.figures(loss=figures["loss"])
        bench.progress.advance(len(part))
    if epoch == how.epochs:
        bench.restart_learner(recipe.update.learning_rate)
        measure_pairs(bench, offline, unit, epoch)


def _groups(bench: Workbench, offline: Offline, unit: Unit, epoch: int, *, single: bool) -> list[TrainGroup]:
    """The pairs for the learner, one a group, with the reference's log-probabilities."""
    own = bench.recipe.pairs.against == "own"
    examples = _against_own(bench, offline.train, unit, epoch) if own else offline.train
    laid: list[TrainGroup] = []
    for e in examples:
        rows = Row(e.first), Row(e.second)
        laid += (apart(e.tokens, *rows, e.label) if single else pair_groups(e.tokens, rows, [(0, 1, e.label)])).groups
    if own:  # the reference is the policy before the iteration
        return list(_referenced(bench, laid))
    with bench.adapter.off():
        return list(_referenced(bench, laid))


def _referenced(bench: Workbench, groups: Sequence[TrainGroup]) -> Iterator[TrainGroup]:
    for start in range(0, len(groups), _SCORED):
        part = groups[start : start + _SCORED]
        yield from with_reference(part, _logps(bench, [(g.prompt, g.completions) for g in part]))


def _logps(bench: Workbench, pairs: Sequence[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]]) -> Any:
    """Log-probabilities of completions under the model as it stands, at temperature 1, one row each."""
    groups, row = [], 0
    for prompt, completions in pairs:
        groups.append(Group(prompt, completions, tuple(range(row, row + len(completions)))))
        row += len(completions)
    return score(bench.lm, groups, budget=bench.recipe.update.token_budget).logp_BT


def _against_own(bench: Workbench, train: Sequence[Example], unit: Unit, epoch: int) -> list[Example]:
    """The better reply of each pair against what the policy says itself, drawn anew (SPIN).

    Ties name no better reply and are left out, as is an own reply that is the very same.
    """
    sided = [e for e in train if e.label != 0.5]
    bench.progress.stage(f"pairs, pass {epoch}: own replies", len(sided), "replies")
    replies = bench.completer.generate(
        [e.prompt for e in sided],
        samples=1,
        settings=SamplerSettings(1.0, max_new_tokens=bench.recipe.sampling.max_new_tokens),
        seed=derive_seed(bench.recipe.seed, "own", epoch),
        version=bench.version,
        progress=bench.progress.advance,
    )
    unit.generations(g for (g,) in replies)
    better = [e.first if e.label > 0.5 else e.second for e in sided]
    return [
        dataclasses.replace(e, first=real, second=own.tokens, label=1.0)
        for e, real, (own,) in zip(sided, better, replies, strict=True)
        if own.tokens and own.tokens != real
    ]


def measure_pairs(bench: Workbench, offline: Offline, unit: Unit, number: int) -> None:
    """What the policy makes of the held-out pairs, and how far it is from the start; kept in `unit`.

    Note `heldout_pairs` holds, a pair, its prompt, its label, the tokens of both replies, and their log-probabilities
    under the policy and under the start model, so that every figure recomputes.
    """
    if not offline.heldout:
        return
    bench.progress.stage(f"pairs: {bench.version if not number else f'p{number}'}", len(offline.heldout), "pairs")
    rows = []
    for start in range(0, len(offline.heldout), _SCORED):
        part = offline.heldout[start : start + _SCORED]
        laid = [(e.tokens, (e.first, e.second)) for e in part]
        now_B = _logps(bench, laid).sum(-1).tolist()
        with bench.adapter.off():
            start_B = _logps(bench, laid).sum(-1).tolist()
        for i, e in enumerate(part):
            lengths = len(e.first), len(e.second)
            rows.append([e.prompt.id, e.label, *lengths, *now_B[2 * i : 2 * i + 2], *start_B[2 * i : 2 * i + 2]])
        bench.progress.advance(len(part))
    unit.note("heldout_pairs", {"pass": number, "rows": rows})
    unit.metrics(
        number, "offline-heldout", agreements(rows) | {"kl_to_start": _divergence(bench, offline, unit, number)}
    )


def _divergence(bench: Workbench, offline: Offline, unit: Unit, number: int) -> float:
    """KL(policy, start) in nats a token, on replies that the policy draws to held-out prompts."""
    prompts = list({e.prompt.hash: e.prompt for e in offline.heldout}.values())[:_DIVERGED]
    settings = SamplerSettings(1.0, max_new_tokens=bench.recipe.sampling.max_new_tokens)
    version = bench.version if not number else f"p{number}"
    seed = derive_seed(bench.recipe.seed, "divergence", number)
    replies = bench.completer.generate(prompts, samples=1, settings=settings, seed=seed, version=version)
    unit.generations(g for (g,) in replies)
    laid = [(bench.lm.encode(p), (g.tokens,)) for p, (g,) in zip(prompts, replies, strict=True)]
    now_BT = _logps(bench, laid)
    with bench.adapter.off():
        start_BT = _logps(bench, laid)
    # Beyond a row's length both are 0, and so is the estimate.
    return float(kl_k3(now_BT, start_BT).sum()) / max(sum(len(g.tokens) for (g,) in replies), 1)
