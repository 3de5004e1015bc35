"""Credit a token: by attention, evenly, on the last, as a critic's head explains its reward, or as rewards tell."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tutelage.config import Recipe
from tutelage.credit import tokens as credit
from tutelage.credit.signed import slopes
from tutelage.credit.spans import sinks
from tutelage.engines.features import reply_states
from tutelage.engines.load import LanguageModel
from tutelage.errors import RecipeError
from tutelage.feedback.critic_data import Passage
from tutelage.feedback.critic_judge import ComparingCritic
from tutelage.feedback.critic_reward import reward_of_critic
from tutelage.feedback.text_critic import TextCritic
from tutelage.loop.bench import Workbench
from tutelage.loop.explaining import Explained, attended, explain, onto
from tutelage.policy.learner import Scores
from tutelage.records import Generation, Prompt
from tutelage.records import Reward as Total
from tutelage.store.ledger import Unit

__all__ = ["check_credit", "note_pieces", "spread_credit"]


def spread_credit(
    bench: Workbench,
    prompts: Sequence[Prompt],
    advantage_PG: torch.Tensor,
    rewards_PG: Sequence[Sequence[Total]],
    scores: Scores,
    replies_PG: Sequence[Sequence[Generation]],
    unit: Unit,
    number: int,
) -> torch.Tensor:
    """Credit a token; kept in the ledger."""
    how = bench.recipe.credit
    advantage_B = advantage_PG.flatten().float()
    flat = [r for group in replies_PG for r in group]
    names: list[str] = [how.method] * len(flat)
    if how.method == "attention" or how.method == "uniform" or how.method == "last":
        seen_BT, critic = scores.attention_BT, bool(bench.recipe.critic_of_credit)
        if critic:
            explained = _explained(bench, prompts, advantage_PG, rewards_PG, replies_PG, unit)
            seen_BT = _looked(explained, scores, flat, unit, number)
            names = [how.method if known else "uniform" for known in explained.said_B]
        drop_BT = _dropped(bench, scores, flat)
        weights_BT = credit.weights(how.method, scores.keep_BT, seen_BT, drop_BT, observer=not critic)
        credit_BT = credit.assign(advantage_B, weights_BT, scores.keep_BT, beta=how.beta, rest=how.rest)
    elif how.method == "decomposed":
        reward_PG = torch.tensor([[math.nan if r.total is None else r.total for r in group] for group in rewards_PG])
        credit_BT = _decomposed(bench, prompts, advantage_PG, reward_PG, scores, replies_PG, unit, number)
        names = ["uniform" if gone else how.method for gone in reward_PG.flatten().isnan().tolist()]
    else:
        explained = _explained(bench, prompts, advantage_PG, rewards_PG, replies_PG, unit)
        credit_BT = _signed(bench, explained, advantage_PG, scores, flat, unit, number)
        names = [how.method if known else "uniform" for known in explained.said_B]
    for row, (reply, name) in enumerate(zip(flat, names, strict=True)):
        unit.credit(reply.id, name, float(advantage_B[row]), credit_BT[row, : len(reply.tokens)].tolist())
    note_pieces(bench.lm, replies_PG, unit)
    return credit_BT


def note_pieces(lm: LanguageModel, replies_PG: Sequence[Sequence[Generation]], unit: Unit) -> None:
    """Keep the texts of the tokens of a few replies, which the report colours by their credit."""
    shown = {r.id: [lm.tokenizer.decode([t]) for t in r.tokens] for group in replies_PG[:6] for r in group[:2]}
    unit.note("pieces", shown)


def _dropped(bench: Workbench, scores: Scores, flat: Sequence[Generation]) -> torch.Tensor | None:
    """Columns that `credit.drop_sinks` leaves out."""
    which = bench.recipe.credit.drop_sinks
    if which == "none":
        return None
    pieces = [[bench.lm.tokenizer.decode([t]) for t in reply.tokens] for reply in flat]
    return sinks(pieces, punctuation=which == "all", width=scores.keep_BT.shape[1])[0]


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What the critic said (or not) of a batch's replies, and what explains it where it matters, by row."""

    said_B: list[bool]
    rows: dict[int, Explained]
    lm: LanguageModel


def _explained(
    bench: Workbench,
    prompts: Sequence[Prompt],
    advantage_PG: torch.Tensor,
    rewards_PG: Sequence[Sequence[Total]],
    replies_PG: Sequence[Sequence[Generation]],
    unit: Unit,
) -> _Batch:
    """Ask the critic's head about the replies that it has judged and that can teach something."""
    name = bench.recipe.critic_of_credit
    critic = next(j for j in bench.judges if j.name == name)
    how = bench.recipe.credit
    method = how.method
    if not isinstance(critic, ComparingCritic) or critic.judging.reader.lm is None:
        raise _refused(
            f"credit.method = {method} explains the judge '{name}', which is no critic on a trunk", how.reads
        )
    lm, told, budget = critic.judging.reader.lm, critic.judging.critic, bench.recipe.update.token_budget
    said_B = [one.raw.get(name) is not None for group in rewards_PG for one in group]
    flat = [(p, r) for p, group in zip(prompts, replies_PG, strict=True) for r in group]
    # A group without a difference teaches nothing, whatever explains it.
    alive_B = (advantage_PG != 0).any(-1, keepdim=True).expand_as(advantage_PG).flatten().tolist()
    rows = [row for row in range(len(flat)) if said_B[row] and alive_B[row]]
    bench.progress.stage(f"{unit.name}: credit", len(rows), "replies")
    passages = [Passage(flat[row][1].text, flat[row][0].messages) for row in rows]
    if method == "prefix" or method == "integrated-gradients" or method == "gradient-input":
        steps, reward = how.steps, reward_of_critic(told)
        found = explain(method, lm, passages, reward, contextual=told.contextual, steps=steps, budget=budget)
    else:
        found = attended(lm, passages, told, budget=budget)
    bench.progress.advance(len(rows))
    return _Batch(said_B, dict(zip(rows, found, strict=True)), lm)


def _looked(explained: _Batch, scores: Scores, flat: Sequence[Generation], unit: Unit, number: int) -> torch.Tensor:
    """Where the critic looked; nowhere in a reply of which it said nothing, which so falls back to even weights."""
    rows = {row: dataclasses.replace(one, scores=one.shares) for row, one in explained.rows.items()}
    share_BT, moved = _placed(dataclasses.replace(explained, rows=rows), scores, flat)
    unit.metrics(number, "credit", _counted(explained, moved))
    return share_BT


def _placed(explained: _Batch, scores: Scores, flat: Sequence[Generation]) -> tuple[torch.Tensor, int]:
    """The scores on the tokens that were drawn, and of how many replies they had to be moved."""
    score_BT, moved = torch.zeros_like(scores.keep_BT), 0
    for row, one in explained.rows.items():
        values, other = onto(explained.lm, one, flat[row].tokens)
        score_BT[row, : len(values)] = torch.tensor(values)
        moved += other
    return score_BT, moved


def _counted(explained: _Batch, moved: int) -> dict[str, float]:
    return {"explained": len(explained.rows), "abstained": explained.said_B.count(False), "retokenised": moved}


def _signed(
    bench: Workbench,
    explained: _Batch,
    advantage_PG: torch.Tensor,
    scores: Scores,
    flat: Sequence[Generation],
    unit: Unit,
    number: int,
) -> torch.Tensor:
    """Credit by the critic's scores; evenly spread where it said nothing."""
    score_BT, moved = _placed(explained, scores, flat)
    reward_B = torch.full((len(scores.keep_BT),), math.nan)
    for row, one in explained.rows.items():
        reward_B[row] = one.reward
    change = math.fsum(abs(one.change) for one in explained.rows.values())
    defect = math.fsum(one.defect for one in explained.rows.values()) / change if change else 0.0
    numbers = _counted(explained, moved) | {"defect": defect}
    credit_BT, found = _in_advantage(bench, score_BT, reward_B, explained.said_B, advantage_PG, scores, flat)
    unit.metrics(number, "credit", numbers | found)
    return credit_BT


def _decomposed(
    bench: Workbench,
    prompts: Sequence[Prompt],
    advantage_PG: torch.Tensor,
    reward_PG: torch.Tensor,
    scores: Scores,
    replies_PG: Sequence[Sequence[Generation]],
    unit: Unit,
    number: int,
) -> torch.Tensor:
    """Credit by what a regression of all rewards so far, these too, gives each token; even without a reward."""
    told = bench.decomposition
    if told is None:
        raise ValueError("the workbench of another recipe")
    flat = [r for group in replies_PG for r in group]
    groups = bench.grouped(prompts, replies_PG)

    def states() -> Iterator[tuple[int, torch.Tensor]]:
        depth, budget = bench.recipe.credit.depth, bench.recipe.update.token_budget
        return reply_states(bench.lm, groups, depth=depth, budget=budget)

    bench.progress.stage(f"{unit.name}: credit", len(flat), "replies")
    # Read twice rather than kept: all states of long replies would not fit into memory.
    with bench.adapter.off():
        mean_BF = torch.zeros(len(flat), told.size)
        for row, state_TF in states():
            mean_BF[row] = state_TF.mean(0)
        mean_PGF = mean_BF.view(*reward_PG.shape, -1)
        told.add(mean_PGF, reward_PG)
        fitted = told.fit()
        centre_P = (mean_PGF @ fitted.weight_F).mean(-1)
        score_BT = torch.zeros_like(scores.keep_BT)
        for row, state_TF in states():
            part_T = state_TF @ fitted.weight_F - centre_P[row // reward_PG.shape[1]]
            score_BT[row, : len(part_T)] = part_T / len(part_T)
    bench.progress.advance(len(flat))
    reward_B = reward_PG.flatten()
    said_B = (~reward_B.isnan()).tolist()
    score_BT[reward_B.isnan()] = 0.0
    credit_BT, found = _in_advantage(bench, score_BT, reward_B, said_B, advantage_PG, scores, flat)
    numbers = {"explained": sum(said_B), "learned_from": told.freedom, "foretold": fitted.share}
    unit.metrics(number, "credit", numbers | found)
    return credit_BT


def _in_advantage(
    bench: Workbench,
    score_BT: torch.Tensor,
    reward_B: torch.Tensor,
    said_B: Sequence[bool],
    advantage_PG: torch.Tensor,
    scores: Scores,
    flat: Sequence[Generation],
) -> tuple[torch.Tensor, dict[str, float]]:
    """Credit of signed scores in a reward's unit, and what there is to count; even where nothing was said."""
    how, keep_BT = bench.recipe.credit, scores.keep_BT
    drop_BT = _dropped(bench, scores, flat)
    if drop_BT is not None:
        score_BT = score_BT * ~drop_BT
    groups, width = advantage_PG.shape
    slope = slopes(advantage_PG, reward_B.view(groups, width), score_BT.view(groups, width, -1))
    advantage_B = advantage_PG.flatten().float()
    scaled_BT = slope.slope_P.repeat_interleave(width).float()[:, None] * score_BT
    credit_BT = credit.assign_signed(advantage_B, scaled_BT, keep_BT, beta=how.beta, rest=how.rest)
    even_BT = credit.assign(
        advantage_B, credit.weights("uniform", keep_BT, None), keep_BT, beta=how.beta, rest=how.rest
    )
    numbers: dict[str, float] = {
        "groups_flat": int((slope.flat_P & (advantage_PG != 0).any(-1)).sum()),
        "groups_against": int(slope.against_P.sum()),
        "groups_capped": int(slope.capped_P.sum()),
    }
    return torch.where(torch.tensor(said_B)[:, None], credit_BT, even_BT), numbers


def check_credit(recipe: Recipe) -> None:
    """Look into the critic that credit is to be explained by, before any model is loaded.

    Raises:
        ModelError: Its file is no critic.
        RecipeError: It reads more than the trunk.
    """
    name = recipe.critic_of_credit
    if not name:
        return
    file = next(judge.model for judge in recipe.judges if judge.name == name)
    source, how = TextCritic.load(Path(file).expanduser()).source, recipe.credit
    if source != how.reads:
        raise _refused(f"credit.method = {how.method} explains the judge '{name}', which reads '{source}'", how.reads)


def _refused(got: str, reads: str) -> RecipeError:
    return RecipeError(
        got,
        expected=f"a critic on {reads} alone",
        fix=f"train it with --features {reads}, name another in credit.judge, or take another credit.method",
    )
