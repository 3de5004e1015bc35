"""From a round's rewards, verdicts and votes to what objectives on pairs and on single replies learn from.

Everything is a pure function; nothing here runs a model. A pair lies as two neighbouring completions in
one `TrainGroup`, y1 then y2, with p at every token of y1 and 1 - p at every token of y2.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from tutelage.engines.packing import Group
from tutelage.errors import TrainingError
from tutelage.feedback.votes import VotePrior
from tutelage.loop.ranking import Number, Pair, Pairing, known_rewards, plain
from tutelage.policy.learner import TrainGroup
from tutelage.records import Generation, PreferencePair, Prompt

__all__ = [
    "Paired", "Row", "apart", "mismatched", "pair_groups", "paired", "pairs_of_votes", "single_replies", "unpaired",
    "with_reference",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A reply as it trains: its tokens, and log-probabilities where they are known (zeros otherwise)."""

    tokens: tuple[int, ...]
    old_logp: tuple[float, ...] = ()
    ref_logp: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Paired:
    """What a round gives to learn from, and what it does not, counted.

    Args:
        groups: For the learner.
        counts: `pairs` taken. Pairs left out: `ties`, `same` (equal texts up to whitespace), `unjudged`
            (nobody compared the two), `empty` (a reply without tokens). Replies left out: `missing` (no
            reward). Of single replies: `good` and `bad`; left out `ties`, `missing`, `empty`.
    """

    groups: tuple[TrainGroup, ...]
    counts: Mapping[str, int]


def paired(
    prompts: Sequence[Sequence[int]],
    replies_PG: Sequence[Sequence[Generation]],
    pairing: Pairing,
    *,
    rewards_PG: Sequence[Sequence[Number]] | None = None,
    prefer_PGG: Sequence[Sequence[Sequence[Number]]] | None = None,
    ref_logp_BT: torch.Tensor | None = None,
) -> Paired:
    """A round's replies as pairs.

    Args:
        prompts: Tokens of each prompt.
        replies_PG: Its replies.
        pairing: How replies become pairs.
        rewards_PG: Their rewards, None or NaN where missing; or else
        prefer_PGG: P(y_i beats y_j) within each group.
        ref_logp_BT: Log-probabilities under the reference, one row a reply; None (zeros) for objectives
            that have none.

    Raises:
        TrainingError: Rewards and opinions were both given, or neither, or do not fit the replies.
    """
    texts_PG = [[r.text for r in replies] for replies in replies_PG]
    told_P = prefer_PGG if rewards_PG is None else rewards_PG
    if told_P is None or (rewards_PG is not None and prefer_PGG is not None):
        raise TrainingError("pairs were asked of both rewards and opinions, or of neither", expected="one of the two")
    if not len(prompts) == len(replies_PG) == len(told_P):
        raise TrainingError(
            f"{len(prompts)} prompts, {len(replies_PG)} groups of replies, {len(told_P)} of rewards or opinions",
            expected="as many of each",
        )
    if rewards_PG is not None:
        chosen_P = [pairing.from_rewards(*each) for each in zip(texts_PG, rewards_PG, strict=True)]
    else:
        chosen_P = [pairing.from_opinions(*each) for each in zip(texts_PG, prefer_PGG or (), strict=True)]
    parts = []
    for prompt, rows, (pairs, counts) in zip(prompts, _rows(replies_PG, ref_logp_BT), chosen_P, strict=True):
        laid = pair_groups(prompt, rows, pairs, together=pairing.together)
        parts.append(Paired(laid.groups, counts | dict(laid.counts)))
    return _joined(parts)


def _rows(replies_PG: Sequence[Sequence[Generation]], ref_logp_BT: torch.Tensor | None) -> list[list[Row]]:
    replies = sum(map(len, replies_PG))
    if ref_logp_BT is not None and len(ref_logp_BT) != replies:
        raise TrainingError(f"{len(ref_logp_BT)} rows of log-probabilities of {replies} replies", expected="one each")
    given = iter(ref_logp_BT.tolist()) if ref_logp_BT is not None else itertools.repeat([])
    return [[Row(r.tokens, r.logps, tuple(next(given)[: len(r.tokens)])) for r in group] for group in replies_PG]


def _joined(parts: Sequence[Paired]) -> Paired:
    counts: collections.Counter[str] = collections.Counter()
    for part in parts:
        counts.update(part.counts)  # unlike a sum of counters, this keeps what is 0
    return Paired(tuple(g for part in parts for g in part.groups), dict(counts))


def pair_groups(prompt: Sequence[int], rows: Sequence[Row], pairs: Sequence[Pair], *, together: int = 4) -> Paired:
    """Lay pairs of one prompt into groups.

    Args:
        prompt: Tokens of the prompt.
        rows: Its replies.
        pairs: (i, j, p): p is the probability that reply i beats reply j.
        together: Pairs in one group at most.

    SPIN (Chen et al. 2024, arXiv 2401.01335, algorithm 1) is this with p = 1 for a person's reply against the
    policy's own, the policy before the iteration as the reference, and `Dpo`.
    """
    kept = [(rows[i], rows[j], p) for i, j, p in pairs if rows[i].tokens and rows[j].tokens]
    groups = []
    for start in range(0, len(kept), together):
        laid = [(row, label) for y1, y2, p in kept[start : start + together] for row, label in ((y1, p), (y2, 1.0 - p))]
        groups.append(_group(prompt, laid))
    return Paired(tuple(groups), {"pairs": len(kept), "empty": len(pairs) - len(kept)})


def _group(prompt: Sequence[int], laid: Sequence[tuple[Row, float]]) -> TrainGroup:
    return TrainGroup(
        tuple(prompt),
        tuple(row.tokens for row, _ in laid),
        tuple((label,) * len(row.tokens) for row, label in laid),
        tuple(_filled(row.old_logp, len(row.tokens)) for row, _ in laid),
        tuple(_filled(row.ref_logp, len(row.tokens)) for row, _ in laid),
    )


def _filled(logp: tuple[float, ...], length: int) -> tuple[float, ...]:
    if logp and len(logp) != length:
        raise TrainingError(f"{len(logp)} log-probabilities of {length} tokens", expected="one a token, or none at all")
    return logp or (0.0,) * length


def single_replies(
    prompt: Sequence[int],
    rows: Sequence[Row],
    rewards: Sequence[Number],
    *,
    middle: float | None = None,
    temperature: float = 1.0,
    tie: float = 0.0,
) -> Paired:
    """Replies called good or bad, for `Kto`: w = 2 s((r - middle)/temperature) - 1 at every token.

    Args:
        prompt: Tokens of the prompt.
        rows: Its replies.
        rewards: Theirs; None or NaN where missing.
        middle: What is neither good nor bad; None is the mean of the group's rewards.
        temperature: 0 makes w hard, 1 or -1.
        tie: Rewards no further from the middle are neither, and left out.
    """
    have = known_rewards(len(rows), rewards)
    counts = {"good": 0, "bad": 0, "ties": 0, "missing": len(rows) - len(have), "empty": 0}
    centre = middle if middle is not None else math.fsum(have.values()) / max(len(have), 1)
    # The mean of equal rewards may differ from them by a rounding, which a hard label would make a verdict.
    least = max(tie, 1e-12 * max(map(abs, have.values()), default=0.0))
    laid = []
    for i, reward in have.items():
        lead = reward - centre
        if not rows[i].tokens:
            counts["empty"] += 1
        elif abs(lead) <= least:
            counts["ties"] += 1
        else:
            counts["good" if lead > 0 else "bad"] += 1
            # 2 s(x) - 1 is tanh(x / 2), which does not overflow.
            laid.append((rows[i], math.tanh(lead / temperature / 2) if temperature else math.copysign(1.0, lead)))
    return Paired((_group(prompt, laid),) if laid else (), counts)


def apart(prompt: Sequence[int], first: Row, second: Row, p: float) -> Paired:
    """The two replies of a pair as single ones, for `Kto`: w = 2 p - 1 of the first and 1 - 2 p of the second."""
    counts = {"good": 0, "bad": 0, "ties": 0, "empty": 0}
    if not first.tokens or not second.tokens:
        return Paired((), counts | {"empty": 1})
    if p == 0.5:
        return Paired((), counts | {"ties": 2})
    lead = 2.0 * p - 1.0
    return Paired((_group(prompt, [(first, lead), (second, -lead)]),), counts | {"good": 1, "bad": 1})


def unpaired(
    prompts: Sequence[Sequence[int]],
    replies_PG: Sequence[Sequence[Generation]],
    rewards_PG: Sequence[Sequence[Number]],
    *,
    middle: float | None = None,
    temperature: float = 1.0,
    tie: float = 0.0,
    ref_logp_BT: torch.Tensor | None = None,
) -> Paired:
    """A round's replies called good or bad: `single_replies` of each group."""
    return _joined(
        [
            single_replies(prompt, rows, rewards, middle=middle, temperature=temperature, tie=tie)
            for prompt, rows, rewards in zip(prompts, _rows(replies_PG, ref_logp_BT), rewards_PG, strict=True)
        ]
    )


def pairs_of_votes(
    pairs: Sequence[PreferencePair],
    *,
    encode: Callable[[Prompt], tuple[int, ...]],
    reply: Callable[[str], tuple[int, ...]],
    prior: VotePrior,
    tie: float = 0.0,
) -> Paired:
    """People's comparisons as pairs with p = (k + a)/(n + 2 a), k of n votes being for the first reply.

    Args:
        pairs: With their votes.
        encode: Tokens of a prompt, as the policy sees it.
        reply: Tokens of a reply, its end of turn included.
        prior: Beta(a, a) fitted to pairs with several votes (`tutelage.feedback.votes.fit_prior`); without
            it three votes of three would say that nobody could ever prefer the other.
        tie: Pairs with |2 p - 1| no more than this are left out. A pair that splits people evenly is a
            tie here; with a negative number it trains, and holds the policy to even odds.
    """
    parts = [Paired((), dict.fromkeys(("pairs", "ties", "same", "empty"), 0))]
    for pair in pairs:
        p = prior.posterior(pair.votes[0], sum(pair.votes)).mean
        if plain(pair.chosen) == plain(pair.rejected):
            parts.append(Paired((), {"same": 1}))
        elif abs(2.0 * p - 1.0) <= tie:
            parts.append(Paired((), {"ties": 1}))
        else:
            rows = Row(reply(pair.chosen)), Row(reply(pair.rejected))
            parts.append(pair_groups(encode(pair.prompt), rows, [(0, 1, p)]))
    return _joined(parts)


def with_reference(groups: Sequence[TrainGroup], logp_BT: torch.Tensor) -> list[TrainGroup]:
    """The groups with the reference's log-probabilities filled in.

    Args:
        groups: For the learner.
        logp_BT: One row a completion, in the groups' order: what `tutelage.policy.learner.score` gives for them
            with the adapter off, or under whatever model is the reference.

    Raises:
        TrainingError: The numbers of rows differ.
    """
    rows = sum(len(g.completions) for g in groups)
    if len(logp_BT) != rows:
        raise TrainingError(f"{len(logp_BT)} rows of log-probabilities of {rows} completions", expected="one each")
    given = iter(logp_BT.tolist())
    return [dataclasses.replace(g, ref_logp=tuple(tuple(next(given)[: len(c)]) for c in g.completions)) for g in groups]


def mismatched(groups: Sequence[TrainGroup]) -> list[Group]:
    """Every group's replies after the prompt of the group before: what `Kto`'s z0 is measured on.

    Score them under the policy and under the reference, and give both to
    `tutelage.objectives.unpaired.mismatched_kl`. Groups of one and the same prompt count as one; none are
    returned when there is no second prompt.
    """
    merged: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for g in groups:
        merged.setdefault(g.prompt, []).extend(g.completions)
    if len(merged) < 2:
        return []
    prompts, replies = list(merged), list(merged.values())
    laid, row = [], 0
    for prompt, others in zip(prompts, replies[1:] + replies[:1], strict=True):
        laid.append(Group(prompt, tuple(others), tuple(range(row, row + len(others)))))
        row += len(others)
    return laid
