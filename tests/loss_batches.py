"""Batches with known ratios, and a policy small enough to sum over everything it can say."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from tutelage.engines.batch import Batch

NAN = math.nan
LN2 = math.log(2)
F64 = torch.float64


def batch(
    ratio_BT: list[list[float]],
    advantage_BT: list[list[float]],
    *,
    gap_BT: list[list[float]] | None = None,
    keep_BT: list[list[float]] | None = None,
    rows: int | None = None,
    tokens: int | None = None,
) -> Batch:
    """A batch with given ratios to the sampler, and `gap` = log pi_ref - log pi (zero unless given)."""
    ratio = torch.tensor(ratio_BT, dtype=F64)
    old = torch.full_like(ratio, -1.5)
    logp = (old + ratio.log()).requires_grad_(True)
    keep = torch.ones_like(ratio) if keep_BT is None else torch.tensor(keep_BT, dtype=F64)
    gap = torch.zeros_like(ratio) if gap_BT is None else torch.tensor(gap_BT, dtype=F64)
    advantage = torch.tensor(advantage_BT, dtype=F64)
    count = rows if rows is not None else len(ratio)
    return Batch(logp, keep, old, logp.detach() + gap, advantage, count, tokens or int(keep.sum()))


def slope(objective: Any, b: Batch) -> tuple[float, list[list[float]]]:
    loss = objective(b)
    (grad,) = torch.autograd.grad(loss.value, b.logp_BT)
    return float(loss.value.detach()), grad.tolist()


# The tabular problem: 3 tokens, length 2, 9 sequences.
SEQUENCES = list(itertools.product(range(3), repeat=2))
REWARDS = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7, -0.4, 1.5, 0.1, -2.0], dtype=F64)


class Table:
    """A softmax policy with a row of logits for the first token and one for each first token's second."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(4, 3, generator=random, dtype=F64).requires_grad_(True)

    def logp_ST(self) -> torch.Tensor:
        """(9, 2) log-probabilities of both tokens of every sequence."""
        table = self.logits.log_softmax(-1)
        return torch.stack([torch.stack([table[0, a], table[1 + a, b]]) for a, b in SEQUENCES])

    def exact(self) -> torch.Tensor:
        """Gradient of the expected reward."""
        (grad,) = torch.autograd.grad((self.logp_ST().sum(-1).exp() * REWARDS).sum(), self.logits)
        return grad


def expected_gradient(policy: Table, sampler: torch.Tensor, objective: Any, advantage: Any, group: int = 2) -> Any:
    """Minus the loss's gradient, averaged over every tuple of `group` sequences by the sampler's odds."""
    logp = policy.logp_ST()
    weight = sampler.sum(-1).exp()
    total = torch.zeros((), dtype=F64)
    for drawn in itertools.product(range(9), repeat=group):
        rows = list(drawn)
        a = advantage(REWARDS[rows][None])[0][:, None].expand(group, 2)
        b = Batch(
            logp[rows],
            torch.ones(group, 2, dtype=F64),
            sampler[rows],
            logp[rows].detach(),
            a,
            group,
            2 * group,
        )
        total = total - weight[rows].prod() * objective(b).value
    (grad,) = torch.autograd.grad(total, policy.logits)
    return grad
