"""The recipe's [[constraints]] and [[tiers]]: costs under limits beside the built-in one, and rewards in ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from tutelage.config.section import Fraction, Positive, Section
from tutelage.config.sections import Judge

__all__ = ["TERMS_OF", "CostConstraint", "Tier", "check_constraints", "check_tiers"]

# Which judge of [feedback] gives which term of [rewards].
TERMS_OF: Mapping[str, str] = {
    "fit": "critic", "principles": "constitution", "consistency": "consistency", "text": "text",
}  # fmt: skip


# What these say of a reply is no amount of anything: a chance to win against its neighbours, whose mean is a half
# whatever is said, a place in a list, or log-odds against a policy that moves.
_RELATIVE = ("pairwise", "listwise", "fusion", "discriminator")


class CostConstraint(Section):
    """A cost under a limit, as [[constraints]]: what a judge says against a reply, held down by its own multiplier."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", description="of the cost, in ledger and report")
    judge: str = Field(
        description="one of [[judges]], which then no longer counts as a reward, or a term of [rewards], which does"
    )
    high: bool = Field(False, description="high values are the harm, and the cost; false: it is one minus the value")
    reward: bool = Field(False, description="the judge of [[judges]] keeps its weight as a reward all the same")
    limit: Positive = Field(0.1, description="tolerated mean cost; per prompt: of what is above the threshold")
    per: Literal["mean", "prompt"] = Field(
        "mean", description="the mean over all replies, or each prompt by itself: none can pay for another"
    )
    threshold: Fraction = Field(0.0, description="per prompt: mean cost that a prompt may have")
    kp: float = Field(10.0, ge=0.0, description="proportional gain")
    ki: float = Field(5.0, ge=0.0, description="integral gain")
    kd: float = Field(1.0, ge=0.0, description="derivative gain")
    maximum: Positive = Field(10.0, description="largest multiplier")

    @model_validator(mode="after")
    def _makes_sense(self) -> CostConstraint:
        if self.name == "over_abstention":
            raise ValueError("the cost 'over_abstention' is that of [constraint]")
        if self.per == "mean" and self.threshold:
            raise ValueError("threshold is read with per = prompt only; with per = mean the limit says it")
        return self


class Tier(Section):
    """Rewards of one rank, as [[tiers]], the most important first."""

    terms: tuple[str, ...] = Field(min_length=1, description="terms of [rewards] and judges of [[judges]]")
    target: Fraction | None = Field(
        None, description="what their weighted mean must reach before later tiers count; not set: the best of the group"
    )
    tolerance: Fraction = Field(0.0, description="how far below it may stay")


def check_constraints(constraints: Sequence[CostConstraint], judges: Sequence[Judge], terms: Sequence[str]) -> None:
    """Refuse constraints that nothing measures, or that measure what no limit can hold.

    Args:
        constraints: Of the recipe.
        judges: Its [[judges]].
        terms: Of [rewards], those whose judge is in [feedback].

    Raises:
        ValueError: A name or judge comes twice, a judge does not exist or only compares, or its weight is not read.
    """
    if len({c.name for c in constraints}) < len(constraints):
        raise ValueError("two [[constraints]] have the same name")
    own, had = {j.name: j for j in judges}, dict[str, str]()
    for c in constraints:
        if c.judge not in (*own, *terms):
            known = ", ".join((*own, *terms))
            raise ValueError(f"constraints.judge is '{c.judge}' in '{c.name}': there are {known}")
        if c.judge in had:
            raise ValueError(f"'{had[c.judge]}' and '{c.name}' are costs of one judge, '{c.judge}': keep one of them")
        had[c.judge] = c.name
        judge = own.get(c.judge)
        if judge is None:
            if c.reward:
                raise ValueError(f"constraints.reward is not read in '{c.name}': rewards.{c.judge} says the weight")
            continue
        if judge.kind in _RELATIVE:
            raise ValueError(
                f"'{c.name}' limits a judge of kind '{judge.kind}', which says how a reply stands beside others: "
                "take a pointwise judge, a critic or code"
            )
        if not c.reward and judge.weight != Judge.model_fields["weight"].default:
            raise ValueError(
                f"judge '{c.judge}' has a weight, and '{c.name}' makes it a cost: leave the weight out, or set "
                "constraints.reward = true"
            )


def check_tiers(tiers: Sequence[Tier], weights: Mapping[str, float]) -> None:
    """Refuse tiers that leave a reward out, or name one that has no weight.

    Args:
        tiers: Of the recipe.
        weights: Weight of each reward that counts.

    Raises:
        ValueError: A term is unknown, comes twice or is in no tier, or the last tier asks for something.
    """
    if not tiers:
        return
    named = [term for tier in tiers for term in tier.terms]
    unknown = [term for term in named if not weights.get(term)]
    if unknown:
        known = ", ".join(name for name, weight in weights.items() if weight)
        raise ValueError(f"tiers.terms names '{unknown[0]}', which is no reward of this recipe: {known}")
    if len(set(named)) < len(named):
        raise ValueError(f"'{next(t for t in named if named.count(t) > 1)}' is in two [[tiers]]")
    left = [name for name, weight in weights.items() if weight and name not in named]
    if left:
        raise ValueError(f"'{left[0]}' is in none of the [[tiers]]: put it into one, or set its weight to 0")
    if len(tiers) < 2:
        raise ValueError("a single one of [[tiers]] ranks nothing: leave it out, or part it in two")
    if tiers[-1].target or tiers[-1].tolerance:
        raise ValueError("the last of [[tiers]] has a target or tolerance, and no tier comes after it")
