"""What a recipe's `update.objective` stands for: a loss, an advantage, and what the round does around them.

Which options each name reads is in `config.objectives`, which imports no torch; a new objective needs
a line there and one here.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from tutelage.config import OBJECTIVES, Recipe
from tutelage.config.objectives import ObjectiveName
from tutelage.engines.batch import Objective
from tutelage.loop.ranking import Pairing
from tutelage.objectives.advantages import (
    advantages_grpo,
    advantages_opo,
    advantages_reinforce,
    advantages_rloo,
    advantages_whitened,
)
from tutelage.objectives.nash import Nash, self_play
from tutelage.objectives.policy_gradient import Dapo, DrGrpo, Grpo, Reinforce, ReinforcePlusPlus, Rloo
from tutelage.objectives.ppo import Ppo
from tutelage.objectives.preference import Aot, Dpo, ExoPair, Ipo, IpoPerToken, RobustDpo, Xpo
from tutelage.objectives.reference_free import Orpo, SimPo
from tutelage.objectives.unlikelihood import Unlikelihood
from tutelage.objectives.unpaired import Kto
from tutelage.objectives.weighted import CispoCap, CispoClamp, Gspo

__all__ = ["TABLE", "Choice", "Marking", "Rewards", "Row", "choose"]


@dataclasses.dataclass(frozen=True)
class Rewards:
    """What an advantage is worked out from.

    Args:
        rewards_PG: NaN where missing.
        lengths_PG: Tokens of each reply.
        before: Mean reward of earlier rounds; None before the first.
    """

    rewards_PG: torch.Tensor
    lengths_PG: torch.Tensor
    before: float | None = None


Advantage = Callable[[Rewards, Mapping[str, Any]], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Row:
    """One objective: its class, and its advantage from rewards and the options the recipe sets."""

    kind: Callable[..., Objective]
    advantage: Advantage


def _group(seen: Rewards, options: Mapping[str, Any]) -> torch.Tensor:
    return advantages_grpo(seen.rewards_PG, scale=options.get("scale", "group"))


def _centred(seen: Rewards, _: Mapping[str, Any]) -> torch.Tensor:
    return advantages_grpo(seen.rewards_PG, scale="none")


def _others(seen: Rewards, _: Mapping[str, Any]) -> torch.Tensor:
    return advantages_rloo(seen.rewards_PG)


def _one_number(seen: Rewards, options: Mapping[str, Any]) -> torch.Tensor:
    baseline = options.get("baseline", "batch")
    if baseline == "length":
        return advantages_opo(seen.rewards_PG, seen.lengths_PG)
    return advantages_reinforce(seen.rewards_PG, baseline=baseline, before=seen.before)


def _whitened(seen: Rewards, options: Mapping[str, Any]) -> torch.Tensor:
    return advantages_whitened(seen.rewards_PG, baseline=options.get("baseline", "batch"))


def _reward_itself(seen: Rewards, _: Mapping[str, Any]) -> torch.Tensor:
    """The value head knows what to subtract."""
    return advantages_reinforce(seen.rewards_PG, baseline="none")


def _won(seen: Rewards, _: Mapping[str, Any]) -> torch.Tensor:
    """How surely a reply beats the others of its group, as Bradley-Terry has it of their rewards."""
    r_PG = seen.rewards_PG
    return self_play(torch.sigmoid(r_PG[:, :, None] - r_PG[:, None, :]))


TABLE: Mapping[str, Row] = {
    "reinforce": Row(Reinforce, _one_number),
    "rloo": Row(Rloo, _others),
    "grpo": Row(Grpo, _group),
    "dr-grpo": Row(DrGrpo, _centred),
    "dapo": Row(Dapo, _group),
    "reinforce-plus-plus": Row(ReinforcePlusPlus, _whitened),
    "gspo": Row(Gspo, _group),
    "cispo-cap": Row(CispoCap, _group),
    "cispo-clamp": Row(CispoClamp, _group),
    "ppo": Row(Ppo, _reward_itself),
    "nash": Row(Nash, _won),
    "dpo": Row(Dpo, _group),
    "robust-dpo": Row(RobustDpo, _group),
    "ipo": Row(Ipo, _group),
    "ipo-per-token": Row(IpoPerToken, _group),
    "exo-pair": Row(ExoPair, _group),
    "aot": Row(Aot, _group),
    "xpo": Row(Xpo, _group),
    "simpo": Row(SimPo, _group),
    "orpo": Row(Orpo, _group),
    "kto": Row(Kto, _group),
    "unlikelihood": Row(Unlikelihood, _centred),
}


@dataclasses.dataclass(frozen=True)
class Marking:
    """Which tokens of a round's replies are pushed down, and how much the others of good replies are kept.

    Args:
        repeat_n: Length of the n-grams that should not come twice in a reply; 0 marks none.
        keep: Weight of the likelihood of unmarked tokens in replies above their group's mean.
    """

    repeat_n: int = 4
    keep: float = 0.1


@dataclasses.dataclass(frozen=True)
class Choice:
    """An objective as a recipe sets it.

    Args:
        loss: The objective proper.
        estimate: Advantages of a round's replies.
        divergence: Where the divergence is charged: in the loss, or to the reward of the whole
            `reply`, or of each `token`.
        overlong: Share of the longest reply in which reward is taken off; 0 is none.
        masks_truncated: Whether replies that were cut off teach nothing.
        decay: Of the moving baseline; None without one.
        values: The objective again, when it needs a value head.
        family: `gradient` weighs each token by its credit, `preference` learns from pairs, `marks` from tokens.
        pairing: How replies become pairs, for the latter.
        marking: Which tokens are marked, for the last.
        from_start: Whether half of a group's replies are drawn from the start model, and the policy's own are
            compared with those.
    """

    loss: Objective
    estimate: Callable[[Rewards], torch.Tensor]
    divergence: Literal["loss", "reply", "token"] = "loss"
    overlong: float = 0.0
    masks_truncated: bool = False
    decay: float | None = None
    values: Ppo | None = None
    family: Literal["gradient", "preference", "marks"] = "gradient"
    pairing: Pairing = dataclasses.field(default_factory=Pairing)
    marking: Marking = dataclasses.field(default_factory=Marking)
    from_start: bool = False


def choose(recipe: Recipe, name: ObjectiveName | None = None) -> Choice:
    """Read the recipe's sections [update] and [objective]; `name` is another objective than the rounds'."""
    u = recipe.update
    chosen = name or u.objective
    row, facts = TABLE[chosen], OBJECTIVES[chosen]
    given = {key: value for key, value in recipe.objective.model_dump().items() if value is not None}
    fields = inspect.signature(row.kind).parameters
    arguments = {key: value for key, value in given.items() if key in fields}
    if facts.clips:
        arguments["clip"] = u.clip
    if "longest" in fields:
        arguments["longest"] = recipe.sampling.max_new_tokens
    if "kl" in fields:
        arguments["kl"] = u.kl
    loss = row.kind(**arguments)
    o = recipe.objective
    fresh = isinstance(loss, Xpo)
    pairing: dict[str, Any] = {
        "select": "halves" if fresh else o.pairs,
        "temperature": o.pair_temperature,
        "tie": o.pair_tie,
    }
    return Choice(
        loss,
        lambda seen: row.advantage(seen, given),
        divergence=_charged(loss),
        overlong=loss.overlong if isinstance(loss, Dapo) else 0.0,
        masks_truncated=isinstance(loss, Dapo) and loss.mask_truncated,
        decay=(0.9 if o.decay is None else o.decay) if o.baseline == "moving" else None,
        values=loss if isinstance(loss, Ppo) else None,
        family=facts.family,
        pairing=Pairing(**{key: value for key, value in pairing.items() if value is not None}),
        marking=Marking(**{key: given[key] for key in ("repeat_n", "keep") if key in given}),
        from_start=fresh,
    )


def _charged(loss: Objective) -> Literal["loss", "reply", "token"]:
    if getattr(loss, "kl_estimator", "k3") != "k1-reward":
        return "loss"
    return "token" if isinstance(loss, Ppo) else "reply"
