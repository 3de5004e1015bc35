"""The recipe's [pairs] section: a file of compared replies, and how it is learned from before the rounds."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from tutelage.config.section import Count, Positive, Section

__all__ = ["PAIR_OBJECTIVES", "PairObjective", "Pairs"]

# Of the objectives on pairs XPO is missing: it needs fresh replies of which one is the start model's.
PairObjective = Literal["dpo", "robust-dpo", "ipo", "ipo-per-token", "exo-pair", "aot", "simpo", "orpo", "kto"]
PAIR_OBJECTIVES: tuple[str, ...] = get_args(PairObjective)


class Pairs(Section):
    """A stage before the rounds: preferences that a file holds, learned without drawing replies."""

    file: str = Field("", description="JSONL of compared replies; empty: no such stage")
    labels: Literal["votes", "hard"] = Field(
        "votes", description="soft labels from several people's votes, or 1 for the side with more"
    )
    objective: PairObjective | None = Field(
        None, description="what learns; not set: update.objective where that learns from pairs, else dpo"
    )
    against: Literal["rejected", "own"] = Field(
        "rejected", description="the better reply against the file's other one, or against the policy's own (SPIN)"
    )
    epochs: Count = Field(1, description="passes over the pairs; each is a unit of the run")
    batch: Count = Field(16, description="pairs an optimiser step")
    learning_rate: Positive = Field(2e-4, description="peak, after a short warm-up, then linear decay")
    limit: int | None = Field(None, ge=1, description="use only the first N lines of the file")
    heldout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.2, description="share of the prompts whose pairs are kept back and measured before and after"
    )
    longest: Count = Field(512, description="tokens that a prompt and one of its replies may have; others are left out")

    @model_validator(mode="after")
    def _makes_sense(self) -> Pairs:
        if not self.file:
            unread = [key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default]
            if unread:
                raise ValueError(f"pairs.{unread[0]} is not read without pairs.file")
        return self
