"""Advantages: how much better a reply was than what could be expected. NaN is a missing reward.

All are pure functions of a table of rewards. A reply without a reward has advantage zero, and so has
every reply of a group with fewer than two of them: what cannot be compared teaches nothing.
"""

from __future__ import annotations

from typing import Literal

import torch

__all__ = [
    "Baseline", "Scale", "advantages_grpo", "advantages_opo", "advantages_reinforce", "advantages_rloo",
    "advantages_whitened", "gae", "moving_mean", "overlong_penalty", "whiten",
]  # fmt: skip

Scale = Literal["group", "batch", "none"]
Baseline = Literal["batch", "none", "moving", "length"]


def advantages_grpo(rewards_PG: torch.Tensor, *, eps: float = 1e-4, scale: Scale = "group") -> torch.Tensor:
    """(r - group mean) / (standard deviation + eps); zero where a reward is missing.

    Args:
        rewards_PG: Rewards, NaN where missing. Mean and (n-1) deviation are over what is there.
        eps: Keeps near-tied groups from exploding.
        scale: Whose deviation divides: the group's, that of all rewards of the batch that can be
            compared, or nobody's. "none" is the advantage of Dr. GRPO.

    Returns:
        advantages_PG. Groups with fewer than two valid rewards get zeros.

    Source: Shao et al. 2024 (arXiv 2402.03300), section 4.1; "none": Liu et al. 2025 (arXiv
    2503.20783), section 3.2.
    """
    centred, valid, count = _centred(rewards_PG)
    if scale == "none":
        return torch.where(valid & (count > 1), centred, 0.0)
    if scale == "batch":
        deviation = _deviation(rewards_PG[valid & (count > 1)])
        return torch.where(valid & (count > 1), centred / (deviation + eps), 0.0)
    variance = (centred**2).sum(-1, keepdim=True) / (count - 1).clamp_min(1)
    return torch.where(valid & (count > 1), centred / (variance.sqrt() + eps), 0.0)


def advantages_rloo(rewards_PG: torch.Tensor) -> torch.Tensor:
    """r_i minus the mean of the others, which is n/(n-1) (r_i - group mean); zero where missing.

    Args:
        rewards_PG: Rewards, NaN where missing.

    Returns:
        advantages_PG. Groups with fewer than two valid rewards get zeros.

    Source: Ahmadian et al. 2024 (arXiv 2402.14740), section 3.
    """
    centred, valid, count = _centred(rewards_PG)
    return torch.where(valid & (count > 1), centred * count / (count - 1).clamp_min(1), 0.0)


def advantages_reinforce(
    rewards_PG: torch.Tensor, *, baseline: Literal["batch", "none", "moving"] = "batch", before: float | None = None
) -> torch.Tensor:
    """Rewards minus one number for all replies.

    Args:
        rewards_PG: Rewards, NaN where missing.
        baseline: The mean of the batch's rewards (which shrinks the expected gradient by (n-1)/n),
            zero, or the mean of earlier batches (which does not, as it knows nothing of these replies).
        before: That mean of earlier batches; None before the first one, which takes its own mean.

    Source: Williams 1992 (Machine Learning 8), section 5: reinforcement comparison.
    """
    known = _compared(rewards_PG)
    if baseline == "none" or not bool(known.any()):
        return torch.where(known, rewards_PG, 0.0)
    if baseline == "moving" and before is not None:
        return torch.where(known, rewards_PG - before, 0.0)
    return torch.where(known, rewards_PG - rewards_PG[known].mean(), 0.0)


def moving_mean(before: float | None, rewards_PG: torch.Tensor, *, decay: float) -> float | None:
    """What a baseline knows after these rewards: decay * before + (1 - decay) * their mean; the first mean as it is."""
    known = rewards_PG[_compared(rewards_PG)]
    if not len(known):
        return before
    mean = float(known.mean())
    return mean if before is None else decay * before + (1.0 - decay) * mean


def advantages_opo(rewards_PG: torch.Tensor, lengths_PG: torch.Tensor) -> torch.Tensor:
    """Rewards minus the group's mean weighed by length, sum(len r) / sum(len).

    The baseline of least variance weighs rewards by the squared norm of their score; the length
    stands for it, as if tokens' scores were orthogonal and equally large.

    Args:
        rewards_PG: Rewards, NaN where missing.
        lengths_PG: Tokens of each reply.

    Source: Hao et al. 2025 (arXiv 2505.23585), section 3.
    """
    known = _compared(rewards_PG)
    weight = torch.where(known, lengths_PG.to(rewards_PG), 0.0)
    mean = (weight * rewards_PG.nan_to_num(0.0)).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.where(known, rewards_PG - mean, 0.0)


def advantages_whitened(
    rewards_PG: torch.Tensor, *, baseline: Literal["batch", "group"] = "batch", eps: float = 1e-8
) -> torch.Tensor:
    """(r - b) shifted and scaled so that the whole batch has mean 0 and deviation 1.

    Args:
        rewards_PG: Rewards, NaN where missing.
        baseline: "group" subtracts each group's mean first (REINFORCE++-baseline), "batch" nothing.
        eps: Added to the deviation.

    Every reply counts once, whatever its length; whitening after the rewards are spread over tokens,
    as some trainers do, lets long replies decide mean and deviation.

    Source: Hu et al. 2025 (arXiv 2501.03262), section 3.
    """
    known = _compared(rewards_PG)
    raw = _centred(rewards_PG)[0] if baseline == "group" else rewards_PG
    return torch.where(known, whiten(raw.nan_to_num(0.0), known.to(rewards_PG.dtype), eps=eps), 0.0)


def whiten(values: torch.Tensor, keep: torch.Tensor, *, eps: float = 1e-8) -> torch.Tensor:
    """(v - mean) / (deviation + eps) over what is kept, zero elsewhere; (n-1) in the deviation."""
    chosen = values[keep > 0]
    if not len(chosen):
        return torch.zeros_like(values)
    return (values - chosen.mean()) / (_deviation(chosen) + eps) * keep


def overlong_penalty(lengths_PG: torch.Tensor, *, limit: int, share: float) -> torch.Tensor:
    """What DAPO takes off a reply that comes near the longest one: from 0 down to -1, linearly.

    Args:
        lengths_PG: Tokens of each reply.
        limit: The longest a reply can be.
        share: The last part of `limit` in which the penalty grows; 0 is no penalty.

    Source: Yu et al. 2025 (arXiv 2503.14476), equation 13; share = 4096 / 20480 there.
    """
    lengths = lengths_PG.to(torch.get_default_dtype())
    if share <= 0.0:
        return torch.zeros_like(lengths)
    room = share * limit
    return ((limit - room - lengths) / room).clamp(-1.0, 0.0)


def gae(
    reward_BT: torch.Tensor, value_BT: torch.Tensor, keep_BT: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation: A_t = sum_l (gamma lam)^l d_(t+l), d_t = r_t + gamma V_(t+1) - V_t.

    Args:
        reward_BT: Reward a token.
        value_BT: What was expected from before each token on.
        keep_BT: 1.0 where there is a token; a row's tokens come first. The value behind the last one is 0.
        gamma: How much a reward one token later is worth.
        lam: 1 is the return minus the value (no bias, most variance), 0 is one step's surprise.

    Returns:
        advantage_BT, and return_BT = advantage + value, which the value head learns.

    Source: Schulman et al. 2016 (arXiv 1506.02438), equation 16.
    """
    advantage = torch.zeros_like(reward_BT)
    following = torch.zeros_like(reward_BT[:, 0])
    next_value = torch.zeros_like(following)
    for t in range(reward_BT.shape[1] - 1, -1, -1):
        keep = keep_BT[:, t]
        surprise = reward_BT[:, t] + gamma * next_value - value_BT[:, t]
        following = (surprise + gamma * lam * following) * keep
        next_value = value_BT[:, t] * keep
        advantage[:, t] = following
    return advantage, (advantage + value_BT) * keep_BT


def _centred(rewards_PG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    valid = ~rewards_PG.isnan()
    count = valid.sum(-1, keepdim=True)
    filled = rewards_PG.nan_to_num(0.0)
    mean = filled.sum(-1, keepdim=True) / count.clamp_min(1)
    return torch.where(valid, filled - mean, 0.0), valid, count


def _compared(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Where there is a reward that another one of its group can be held against."""
    valid = ~rewards_PG.isnan()
    return valid & (valid.sum(-1, keepdim=True) > 1)


def _deviation(values: torch.Tensor) -> torch.Tensor:
    return values.std() if len(values) > 1 else torch.ones_like(values.sum())
