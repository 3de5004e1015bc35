"""From what explains one judge's reward to credit for an advantage that many terms have made."""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["CAP", "Slopes", "slopes"]

CAP = 2.0  # reward-to-go is moved at most by this much of the group's largest advantage


@dataclasses.dataclass(frozen=True)
class Slopes:
    """How much advantage a unit of the explained reward is worth, by group.

    Args:
        slope_P: Not negative; 0 where the explanation has no part in the advantage.
        flat_P: Whether fewer than two rewards are known, or none differ.
        against_P: Whether the advantage falls as the reward rises.
        capped_P: Whether the slope was lowered to the cap.
    """

    slope_P: torch.Tensor
    flat_P: torch.Tensor
    against_P: torch.Tensor
    capped_P: torch.Tensor


def slopes(advantage_PG: torch.Tensor, reward_PG: torch.Tensor, score_PGT: torch.Tensor, *, cap: float = CAP) -> Slopes:
    """The share of each group's advantage that the explained reward accounts for, by least squares.

    Objective: k = sum_g (A_g - mean A)(r_g - mean r) / sum_g (r_g - mean r)^2, over the group's replies with a
        reward; below 0 it is 0. Then k s_gt is in the advantage's unit, and A_g - k sum_t s_gt is what others made.
    Difference: A_g s_gt / sum_t s_gt also sums to A_g, and divides by what is near zero wherever good and bad tokens
        balance. Here the only divisor is the spread of the group's rewards, and none is taken where it is zero.
    Assumption: within a group the advantage is about linear in the reward that is explained. What other terms say
        along with it is counted as its own. The slope is one for all of a group, so with prefix differences
        the credit is a shaping by a potential, k R(y_<=t), whatever the slope; that the slope is made from the same
        replies biases it as any normalisation within the group does.
    Cap: k is lowered until no k |sum_{u >= t} s_gu|, by which reward-to-go at t is moved, is above `cap` times the
        group's largest |A_g|: a group whose rewards hardly differ has a steep slope, and its tokens are noise.

    Args:
        advantage_PG: Of each reply.
        reward_PG: The reward that the scores explain; NaN where it is not known.
        score_PGT: Its scores by token, zero beyond a reply; of a reply without a reward all zero.
        cap: As above.
    """
    a_PG, r_PG, s_PGT = advantage_PG.double(), reward_PG.double(), score_PGT.double()
    known_PG = ~r_PG.isnan()
    count_P1 = known_PG.sum(-1, keepdim=True).clamp_min(1)
    a_PG, r_PG = (
        torch.where(known_PG, x - torch.where(known_PG, x, 0.0).sum(-1, keepdim=True) / count_P1, 0.0)
        for x in (a_PG, r_PG)
    )
    spread_P, both_P = (r_PG * r_PG).sum(-1), (a_PG * r_PG).sum(-1)
    # Rewards that are equal but for rounding have no slope.
    flat_P = (known_PG.sum(-1) < 2) | (
        spread_P <= 1e-12 * (1.0 + torch.nan_to_num(reward_PG.double()).square().sum(-1))
    )
    against_P = ~flat_P & (both_P < 0)
    slope_P = torch.where(flat_P, 0.0, both_P / spread_P.clamp_min(1e-300)).clamp_min(0.0)
    reach_P = s_PGT.flip(-1).cumsum(-1).abs().amax((-1, -2))
    most_P = cap * advantage_PG.double().abs().amax(-1)
    capped_P = slope_P * reach_P > most_P
    slope_P = torch.where(capped_P, most_P / reach_P.clamp_min(1e-300), slope_P)
    return Slopes(slope_P, flat_P, against_P, capped_P)
