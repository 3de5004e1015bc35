"""How true credit is: against a reward whose parts are known, and by deleting what it points at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from tutelage.errors import InputError

__all__ = ["Deletion", "additive_reward", "additive_truth", "completeness_error", "correlation", "deletion"]


def additive_truth(tokens_BT: torch.Tensor, worth_V: torch.Tensor, keep_BT: torch.Tensor) -> torch.Tensor:
    """What each token is really worth where the reward is the sum of w[token]."""
    return worth_V[tokens_BT] * keep_BT


def additive_reward(tokens_BT: torch.Tensor, worth_V: torch.Tensor, keep_BT: torch.Tensor) -> torch.Tensor:
    """The reward that is the sum of w[token]."""
    return additive_truth(tokens_BT, worth_V, keep_BT).sum(-1)


def correlation(credit_BT: torch.Tensor, truth_BT: torch.Tensor, keep_BT: torch.Tensor) -> float | None:
    """Pearson correlation over all tokens, each row around its own mean; None where either never varies.

    Rows are centred by themselves, so that getting a reply's total right, which every method does, earns nothing.
    """
    keep = keep_BT.double()
    length_B1 = keep.sum(-1, keepdim=True).clamp_min(1.0)
    x, y = ((v.double() - (v.double() * keep).sum(-1, keepdim=True) / length_B1) * keep for v in (credit_BT, truth_BT))
    size = float(x.norm() * y.norm())
    # Rows that never vary leave rounding behind, which correlates with nothing.
    least = 1e-12 * float(credit_BT.double().norm() * truth_BT.double().norm())
    return float((x * y).sum()) / size if size > least else None


def completeness_error(credit_BT: torch.Tensor, change_B: torch.Tensor) -> torch.Tensor:
    """How far each row's credit is from summing to what it explains, in units of the reward, float64."""
    return (credit_BT.double().sum(-1) - change_B.double()).abs()


@dataclasses.dataclass(frozen=True)
class Deletion:
    """Mean value of a text while its tokens are deleted one by one.

    Args:
        by_credit: The token with the most credit first. Lower is better.
        by_chance: The mean over random orders.
        curve: Value with 0, 1, ... tokens deleted by credit.
    """

    by_credit: float
    by_chance: float
    curve: tuple[float, ...]


def deletion(
    value: Callable[[torch.Tensor], torch.Tensor], credit_T: torch.Tensor, *, orders: int = 64, seed: int = 0
) -> Deletion:
    """Area under the value as tokens are deleted in the order of their credit, and in random orders.

    Args:
        value: (N, T) of 1.0 where a token stays and 0.0 where it is deleted -> (N,) values.
        credit_T: Credit of each token.
        orders: Random orders.
        seed: Of the random orders.

    Source: Petsiuk, Das and Saenko 2018 (arXiv 1806.07421), the deletion metric.

    Raises:
        InputError: No token, or no random order.
    """
    width = len(credit_T)
    if width < 1 or orders < 1:
        raise InputError(f"{width} tokens and {orders} random orders", expected="at least one of each")
    generator = torch.Generator().manual_seed(seed)
    curve = _curve(value, credit_T.argsort(descending=True, stable=True))
    chance = [_area(_curve(value, torch.randperm(width, generator=generator))) for _ in range(orders)]
    return Deletion(_area(curve), sum(chance) / orders, tuple(curve.tolist()))


def _curve(value: Callable[[torch.Tensor], torch.Tensor], order_T: torch.Tensor) -> torch.Tensor:
    width = len(order_T)
    rank_T = torch.empty(width, dtype=torch.long)
    rank_T[order_T] = torch.arange(width)
    stays_NT = (rank_T[None] >= torch.arange(width + 1)[:, None]).float()
    return value(stays_NT).double()


def _area(curve_N: torch.Tensor) -> float:
    """Mean height by the trapezoid rule."""
    return float(torch.trapezoid(curve_N) / (len(curve_N) - 1))
