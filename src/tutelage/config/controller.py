"""The recipe's [controller] section: a small network that sets how a frozen model is drawn from."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tutelage.config.section import Count, Positive, Section

__all__ = ["Controller"]

Temperature = Annotated[float, Field(ge=0.0, le=10.0)]


class Controller(Section):
    """A small network reads the frozen model's hidden state and chooses temperature, top-k, mask and opening."""

    enabled: bool = Field(False, description="learn this instead of the model, which stays as it is")
    scope: Literal["sequence", "token"] = Field("sequence", description="choose once a reply, or at every token")
    objective: Literal["policy-gradient", "lpo"] = Field(
        "policy-gradient", description="REINFORCE with a leave-one-out baseline, or latent preferences"
    )
    temperatures: tuple[Temperature, ...] = Field(
        (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), description="temperatures to choose from; 0 takes the likeliest token"
    )
    top_k: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), description="top-k values to choose from; 0 is off")
    masks: tuple[str, ...] = Field(
        (), description='masks to choose from beside none, as "NAME=REGEX": tokens in whose text it is found are barred'
    )
    openings: tuple[str, ...] = Field(
        (), description="texts to choose from beside none: a reply begins with the text; with scope sequence"
    )
    depth: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.6, description="share of the layers after which the state is read; 1 is the last hidden state"
    )
    width: Count = Field(32, description="inner units of the network")
    rounds: Count = Field(6, description="rounds of drawing, judging and learning")
    prompts: Count = Field(64, description="prompts a round")
    samples: int = Field(8, ge=2, description="replies a prompt, each under settings of its own")
    batch: Count = Field(16, description="prompts an optimiser step")
    epochs: Count = Field(2, description="passes over a round's replies")
    learning_rate: Positive = Field(3e-3, description="constant")
    entropy: float = Field(0.01, ge=0.0, description="policy gradient: weight of the choices' entropy")
    clip: Positive = Field(0.2, description="policy gradient: epsilon of the ratio clip")
    beta: Positive = Field(1.0, description="LPO: slope of the preference")
    anchored: bool = Field(False, description="LPO: measure gains from where the network stood as the round began")
    grid_samples: Count = Field(1, description="replies a prompt and setting in the search for the best single one")
    grid_prompts: int = Field(0, ge=0, description="that search looks at the first N training prompts; 0 is all")
    measure_samples: Count = Field(4, description="replies a held-out prompt, by each of the two compared")

    @field_validator("temperatures", "top_k")
    @classmethod
    def _distinct(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or len(set(values)) < len(values):
            raise ValueError("the values to choose from must be at least one, and all different")
        return values

    @field_validator("openings")
    @classmethod
    def _said(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if not all(text.strip() for text in values) or len(set(values)) < len(values):
            raise ValueError("openings must be texts, and all different")
        return values

    @field_validator("masks")
    @classmethod
    def _patterns(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        names = []
        for text in values:
            name, sign, pattern = text.partition("=")
            if not sign or not name.strip() or not pattern:
                raise ValueError(f"'{text}' is not NAME=REGEX")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression: {error}") from error
            names.append(name.strip())
        if len(set(names)) < len(names):
            raise ValueError("two masks have the same name")
        return values

    @model_validator(mode="after")
    def _makes_sense(self) -> Controller:
        if self.choices < 2:
            raise ValueError("temperatures, top_k, masks and openings leave a single setting: nothing to choose")
        if self.openings and self.scope == "token":
            raise ValueError("an opening is chosen before the first token: openings need scope = 'sequence'")
        return self

    @property
    def choices(self) -> int:
        """Distinct settings: a greedy draw has no use for top-k."""
        warm = sum(t > 0 for t in self.temperatures) * len(self.top_k)
        return (warm + (0.0 in self.temperatures)) * (1 + len(self.masks)) * (1 + len(self.openings))

    @property
    def patterns(self) -> tuple[tuple[str, str], ...]:
        """(name, regular expression) a mask."""
        parts = (text.partition("=") for text in self.masks)
        return tuple((name.strip(), pattern) for name, _, pattern in parts)
