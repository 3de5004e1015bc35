"""Which objectives a recipe can name, and which options each reads. Data only; imports no torch.

The classes behind the names are in `loop.choice`; a test holds the two tables together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from tutelage.config.section import Fraction, Positive, Section

__all__ = ["BASELINES", "OBJECTIVES", "Kind", "Objective", "ObjectiveName"]

ObjectiveName = Literal[
    "reinforce",
    "rloo",
    "grpo",
    "dr-grpo",
    "dapo",
    "reinforce-plus-plus",
    "gspo",
    "cispo-cap",
    "cispo-clamp",
    "ppo",
    "nash",
    "dpo",
    "robust-dpo",
    "ipo",
    "ipo-per-token",
    "exo-pair",
    "aot",
    "xpo",
    "simpo",
    "orpo",
    "kto",
    "unlikelihood",
]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a recipe must know of an objective.

    Args:
        options: Keys of [objective] that it reads.
        clips: Whether it reads `update.clip`.
        charges: Whether it reads `update.kl`; without, the objective holds to the start in its own way, or not at all.
        family: `gradient` learns from rewards of the policy's own replies, `preference` from pairs,
            `marks` from tokens that are pointed at.
    """

    options: tuple[str, ...]
    clips: bool = True
    charges: bool = True
    family: Literal["gradient", "preference", "marks"] = "gradient"


def _pairs(*options: str, select: bool = True) -> Kind:
    more = ("pairs", "pair_temperature", "pair_tie") if select else ("pair_temperature", "pair_tie")
    return Kind((*options, *more), clips=False, charges=False, family="preference")


OBJECTIVES: Mapping[ObjectiveName, Kind] = {
    "reinforce": Kind(("kl_estimator", "baseline", "decay"), clips=False),
    "rloo": Kind(("kl_estimator",)),
    "grpo": Kind(("kl_estimator", "scale")),
    "dr-grpo": Kind(("kl_estimator",)),
    "dapo": Kind(("kl_estimator", "scale", "clip_high", "mask_truncated", "overlong")),
    "reinforce-plus-plus": Kind(("kl_estimator", "baseline")),
    "gspo": Kind(("kl_estimator", "scale", "clip_low", "clip_high"), clips=False),
    "cispo-cap": Kind(("kl_estimator", "scale", "cap"), clips=False),
    "cispo-clamp": Kind(("kl_estimator", "scale", "clip_low", "clip_high"), clips=False),
    "ppo": Kind(("kl_estimator", "value_clip", "value_weight", "value_learning_rate", "discount", "lam")),
    "nash": Kind(("cap",), clips=False),
    "dpo": _pairs("beta", "mode", "smoothing", "sft"),
    "robust-dpo": _pairs("beta", "flip", "cap"),
    "ipo": _pairs("beta"),
    "ipo-per-token": _pairs("beta"),
    "exo-pair": _pairs("beta", "smoothing"),
    # Of a label it reads the side alone, which the temperature does not change.
    "aot": Kind(("beta", "pairs", "pair_tie"), clips=False, charges=False, family="preference"),
    "xpo": _pairs("beta", "alpha", select=False),
    "simpo": _pairs("beta", "gamma"),
    "orpo": _pairs("weight"),
    "kto": _pairs("beta", "desirable", "undesirable", select=False),
    "unlikelihood": Kind(("alpha", "repeat_n", "keep"), clips=False, charges=False, family="marks"),
}

BASELINES: Mapping[str, tuple[str, ...]] = {
    "reinforce": ("batch", "length", "moving", "none"),
    "reinforce-plus-plus": ("batch", "group"),
}


class Objective(Section):
    """What only some objectives read. A key that is not set is the objective's own default.

    A key that the chosen objective does not read is an error.
    """

    scale: Literal["group", "batch", "none"] | None = Field(
        None, description="whose deviation divides the advantages: the group's, that of all rewards, or nobody's"
    )
    baseline: Literal["batch", "group", "length", "moving", "none"] | None = Field(
        None, description="what is subtracted from rewards; which of these is on the objective's page"
    )
    decay: Fraction | None = Field(None, description="how much of the moving baseline a round keeps")
    kl_estimator: Literal["k1-reward", "k2", "k3", "k3-weighted"] | None = Field(
        None, description="the divergence that update.kl weighs: taken off the reward, or a term of the loss"
    )
    clip_low: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(None, description="how far below 1 a ratio may go")
    clip_high: Positive | None = Field(None, description="how far above 1 a ratio may go")
    cap: Positive | None = Field(None, description="largest weight: of a token (cispo-cap), a reply (nash); or margin")
    mask_truncated: bool | None = Field(None, description="replies cut off at sampling.max_new_tokens teach nothing")
    overlong: Fraction | None = Field(
        None, description="share of sampling.max_new_tokens, its last, in which a reply loses reward, up to 1; 0: none"
    )
    value_clip: Positive | None = Field(None, description="how far a value may move from what it was in a round")
    value_weight: Positive | None = Field(None, description="of the value's error in the loss")
    value_learning_rate: Positive | None = Field(None, description="of the value head, constant")
    discount: Fraction | None = Field(None, description="gamma: what a reward one token later is worth")
    lam: Fraction | None = Field(None, description="lambda of the advantage estimate: 1 trusts returns, 0 values")
    pairs: Literal["best_worst", "all", "neighbours"] | None = Field(
        None, description="which replies of a group are compared: the extremes, every two, or neighbours in rank"
    )
    pair_temperature: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="labels are s(gap / this), s the logistic function of the gap in worth; 0 makes them hard"
    )
    pair_tie: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="a gap in worth no larger teaches nothing"
    )
    beta: Positive | None = Field(None, description="how strongly pairs hold to the start; by the objective's page")
    mode: Literal["match", "improve"] | None = Field(
        None, description="match reproduces the labels' odds, improve moves to the better reply"
    )
    smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] | None = Field(
        None, description="share of labels taken to be wrong, and blurred"
    )
    sft: Annotated[float, Field(ge=0.0)] | None = Field(None, description="weight of the better reply's likelihood")
    flip: Annotated[float, Field(ge=0.0, le=0.49)] | None = Field(
        None, description="share of labels known to be wrong, and corrected for"
    )
    alpha: Annotated[float, Field(ge=0.0)] | None = Field(
        None,
        description="weight of the bonus for leaving what the start model says (xpo), of marked tokens (unlikelihood)",
    )
    gamma: Annotated[float, Field(ge=0.0)] | None = Field(None, description="margin wanted between the two replies")
    weight: Positive | None = Field(None, description="of the odds ratio beside the likelihood")
    repeat_n: Annotated[int, Field(ge=0)] | None = Field(
        None, description="n-grams of this length that come again in a reply are pushed down; 0: none"
    )
    keep: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="weight of the likelihood of unmarked tokens, in replies above their group's mean"
    )
    desirable: Annotated[float, Field(ge=0.0)] | None = Field(None, description="weight of good replies")
    undesirable: Annotated[float, Field(ge=0.0)] | None = Field(None, description="weight of bad replies")
