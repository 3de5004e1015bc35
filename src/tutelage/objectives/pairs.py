"""What objectives on pairs share: how a batch is read as pairs, and what a step reports of them.

A batch holds pairs as neighbouring rows, y1 then y2, and each part of a step holds whole pairs.
`advantage_BT` carries p, the probability that y1 is the better reply, at every token of y1, and 1 - p
at every token of y2.
"""

from __future__ import annotations

import dataclasses

import torch

from tutelage.engines.batch import Batch, Loss
from tutelage.errors import RecipeError, TrainingError

__all__ = ["Pairs", "check_option", "expected", "read", "smoothed"]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A part of a step as N pairs of 2N rows.

    Args:
        label_N: p, the probability that y1 is the better one.
        whole_N: 1.0 where both replies have tokens, which a mean over tokens needs.
        logp_B: log pi(y|x), summed over tokens.
        gain_B: log pi(y|x) - log pi_ref(y|x), summed over tokens.
        length_B: Tokens of each row, at least 1.
        in_step: Pairs in the whole step, over all its parts.
    """

    label_N: torch.Tensor
    whole_N: torch.Tensor
    logp_B: torch.Tensor
    gain_B: torch.Tensor
    length_B: torch.Tensor
    in_step: float

    def nll_N(self, label_N: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of the better reply, a mean over its tokens, expected over the label."""
        each_B = -self.logp_B / self.length_B
        return expected(label_N, each_B[0::2], each_B[1::2])

    def loss(self, loss_N: torch.Tensor, margin_N: torch.Tensor) -> Loss:
        """The part's share of the mean over the step's pairs, and sums over pairs for the metrics."""
        with torch.no_grad():
            side_N = torch.sign(self.label_N - 0.5)  # 0: the label takes no side
            first_N, second_N = self.gain_B[0::2], self.gain_B[1::2]
            # A pair without a side counts half for each, so that turning it round changes nothing.
            chosen_N = expected((1 + side_N) / 2, first_N, second_N)
            sums = {
                "accuracy": float(((1 + torch.sign(margin_N) * side_N) / 2).sum()),
                "margin": float((margin_N * side_N).sum()),
                "chosen_gain": float(chosen_N.sum()),
                "rejected_gain": float((first_N + second_N - chosen_N).sum()),
                "tokens": float(len(margin_N)),
            }
        return Loss(loss_N.sum() / self.in_step, sums)


def read(batch: Batch) -> Pairs:
    """Read a part of a step as pairs.

    A reply without tokens carries no label; its partner's says the same. Labels of a pair that do not
    add up to one are met halfway.

    Raises:
        TrainingError: The number of rows is odd.
    """
    if len(batch.logp_BT) % 2:
        raise TrainingError(
            f"{len(batch.logp_BT)} rows in a part of a step that learns from pairs",
            expected="two rows a pair, the whole pair in one group",
            fix="make the groups with tutelage.loop.pairing",
        )
    keep = batch.keep_BT
    count_B = keep.sum(-1)
    length_B = count_B.clamp_min(1.0)
    label_B = (batch.advantage_BT * keep).sum(-1) / length_B
    has_B = (count_B > 0).to(keep.dtype)
    said_N = has_B[0::2] + has_B[1::2]
    vote_N = label_B[0::2] * has_B[0::2] + (1.0 - label_B[1::2]) * has_B[1::2]
    logp_B = (batch.logp_BT * keep).sum(-1)
    return Pairs(
        label_N=torch.where(said_N > 0, vote_N / said_N.clamp_min(1.0), 0.5),
        whole_N=has_B[0::2] * has_B[1::2],
        logp_B=logp_B,
        gain_B=logp_B - (batch.ref_logp_BT * keep).sum(-1),
        length_B=length_B,
        in_step=batch.rows_in_step / 2,
    )


def expected(label_N: torch.Tensor, first_N: torch.Tensor, second_N: torch.Tensor) -> torch.Tensor:
    """What a hard label that is 1 with probability p gives on average: p first + (1 - p) second."""
    return label_N * first_N + (1.0 - label_N) * second_N


def smoothed(label_N: torch.Tensor, rate: float) -> torch.Tensor:
    """The label after a flip with probability `rate`: (1 - e) p + e (1 - p)."""
    return (1.0 - rate) * label_N + rate * (1.0 - label_N)


def check_option(objective: str, option: str, value: float, *, least: float, most: float, open_: bool = False) -> None:
    """Refuse an option outside of [least, most], or of (least, most) with `open_`.

    Raises:
        RecipeError: It lies outside, or is no number.
    """
    if not (least < value < most if open_ else least <= value <= most):
        ends = f"above {least} and below {most}" if open_ else f"{least} to {most}"
        raise RecipeError(f"{option} of {objective} is {value}", expected=ends, fix=f"change {option}")
