"""The recipe's [[constraints]] and [[tiers]]: costs under limits beside the built-in one, and rewards in ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from tutelage.config.section import Fraction, Positive, Section

__all__ = ["TERMS_OF", "CostConstraint", "Tier", "check_constraints", "check_tiers"]

# Which judge of [feedback] gives which term of [rewards].
TERMS_OF: Mapping[str, str] = {
    "fit": "critic", "principles": "constitution", "consistency": "consistency", "text": "text",
}  # fmt: skip


class CostConstraint(Section):
    """A cost under a limit, as [[constraints]]: one minus what a judge says, held down by a multiplier of its own."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", description="of the cost, in ledger and report")
    judge: str = Field(
        description="one of [[judges]], which then no longer counts as a reward, or a term of [rewards], which does"
    )
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
    target: Fraction = Field(0.0, description="what their weighted mean must reach before later tiers count")
    tolerance: Fraction = Field(0.0, description="how far below it may stay")


def check_constraints(constraints: Sequence[CostConstraint], judges: Sequence[str], terms: Sequence[str]) -> None:
    """Refuse constraints that nothing measures.

    Args:
        constraints: Of the recipe.
        judges: Names of [[judges]].
        terms: Of [rewards], those whose judge is in [feedback].

    Raises:
        ValueError: A name comes twice, or a judge does not exist.
    """
    names = [c.name for c in constraints]
    if len(set(names)) < len(names):
        raise ValueError("two [[constraints]] have the same name")
    for c in constraints:
        if c.judge not in (*judges, *terms):
            known = ", ".join((*judges, *terms))
            raise ValueError(f"constraints.judge is '{c.judge}' in '{c.name}': there are {known}")


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
