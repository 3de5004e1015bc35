"""Learning from pairs of replies without a reference model: one model in memory, and none to stay near."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.nn import functional as F

from tutelage.engines.batch import Batch, Loss
from tutelage.objectives.pairs import check_option, expected, read

__all__ = ["Orpo", "SimPo"]

_SUREST = -1e-6  # of a mean log-probability: odds of a reply that is certain would be infinite


@dataclasses.dataclass(frozen=True)
class SimPo:
    """Simple preference optimisation: the mean log-probability of a token is the reward.

    Objective: L = - 1/N sum_i [ p_i log s(m_i - g) + (1 - p_i) log s(-m_i - g) ], with
    m = b [ log pi(y1|x)/|y1| - log pi(y2|x)/|y2| ], g the margin that the better one must lead by, and p
    the probability that y1 is the better one.
    Difference: DPO sums over tokens and subtracts the reference; here length does not count, as it does
    not when text is generated, and nothing but the learning rate holds the policy near its start.
    Assumption: few steps at a small rate. Long training ruins what the pairs do not show. With g > 0 a
    soft label is met at a larger margin than its odds. A pair with a reply of no tokens teaches nothing.
    Source: Meng et al. 2024 (arXiv 2405.14734), equation 6; soft labels as in DPO.
    """

    beta: float = 2.5
    gamma: float = 1.375
    name: str = "simpo"

    def __post_init__(self) -> None:
        check_option(self.name, "beta", self.beta, least=0.0, most=math.inf, open_=True)
        check_option(self.name, "gamma", self.gamma, least=0.0, most=math.inf)

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step; `ref_logp_BT` counts in the metrics only."""
        pairs = read(batch)
        mean_B = pairs.logp_B / pairs.length_B
        margin_N = self.beta * (mean_B[0::2] - mean_B[1::2]) * pairs.whole_N
        up_N, down_N = F.logsigmoid(margin_N - self.gamma), F.logsigmoid(-margin_N - self.gamma)
        return pairs.loss(-expected(pairs.label_N, up_N, down_N) * pairs.whole_N, margin_N)


@dataclasses.dataclass(frozen=True)
class Orpo:
    """Odds ratio preference optimisation: imitation of the better reply, and a push between the odds of both.

    Objective: L = 1/N sum_i [ n_i - w (p_i log s(o_i) + (1 - p_i) log s(-o_i)) ], where n is the better
    reply's negative log-likelihood as a mean over its tokens, expected over the label, o the log of
    odds(y1|x)/odds(y2|x), odds = P/(1 - P), and P = exp(log pi(y|x)/|y|).
    Difference: SimPO compares log P, with a margin, and imitates nothing; here imitation is the main term
    and the push, with `weight` w, an aside, so that supervised tuning and preferences are one stage.
    Assumption: the better replies are worth imitating, as in supervised tuning. TRL's trainer also
    imitates the prompt; here only replies train. A pair with a reply of no tokens teaches nothing.
    Source: Hong et al. 2024 (arXiv 2403.07691), equation 6.
    """

    weight: float = 0.1
    name: str = "orpo"

    def __post_init__(self) -> None:
        check_option(self.name, "weight", self.weight, least=0.0, most=math.inf)

    def __call__(self, batch: Batch) -> Loss:
        """Loss of one part of a step; `ref_logp_BT` counts in the metrics only."""
        pairs = read(batch)
        mean_B = (pairs.logp_B / pairs.length_B).clamp_max(_SUREST)
        odds_B = mean_B - torch.log(-torch.expm1(mean_B))
        margin_N = (odds_B[0::2] - odds_B[1::2]) * pairs.whole_N
        push_N = -expected(pairs.label_N, F.logsigmoid(margin_N), F.logsigmoid(-margin_N))
        return pairs.loss((pairs.nll_N(pairs.label_N) + self.weight * push_N) * pairs.whole_N, margin_N)
