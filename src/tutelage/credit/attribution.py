"""Signed credit from a reward that can be read at every prefix, or differentiated.

Each method answers scores a token and how far their sum is from the change of the reward that they
explain; `tokens.assign_signed` then makes credit of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from tutelage.engines.load import LanguageModel
from tutelage.errors import InputError

__all__ = [
    "Attribution", "gradient_input", "integrated_gradients", "mean_embedding", "prefix_difference", "reward_of",
]  # fmt: skip

Head = Callable[[torch.Tensor], torch.Tensor]  # (..., D) states -> (...) rewards
Value = Callable[[torch.Tensor], torch.Tensor]  # (B, T, D) embeddings -> (B,) rewards, each from its own row


@dataclasses.dataclass(frozen=True)
class Attribution:
    """What each token did.

    Args:
        score_BT: In units of the reward; zero outside of the reply.
        change_B: The change of the reward that the scores explain: of the reply against what it is
            compared with.
        error_B: `change_B` less the sum of the scores. Zero means complete.
    """

    score_BT: torch.Tensor
    change_B: torch.Tensor
    error_B: torch.Tensor


def _attribution(score_BT: torch.Tensor, change_B: torch.Tensor) -> Attribution:
    return Attribution(score_BT, change_B, change_B - score_BT.sum(-1))


@torch.no_grad()
def prefix_difference(
    states_BTD: torch.Tensor,
    keep_BT: torch.Tensor,
    head: Head,
    *,
    prompt_BD: torch.Tensor | None = None,
    pool: Literal["last", "mean"] = "last",
) -> Attribution:
    """What each token changes in the reward as the reply grows.

    Objective: s_t = R(y_<=t) - R(y_<t). The sum telescopes to R(y) - R(empty).
    Difference: integrated gradients blame a token for its part in the whole; this blames it for what
        was known when it came, so a bad end is not held against the beginning. It needs one causal
        forward and no gradient.
    Assumption: the head can judge unfinished replies. One trained on finished ones only is out of its
        depth on prefixes, and the scores then show surprise at a missing end more than harm.
    Source: Li et al. 2024, RED (arXiv 2411.08302), the redistributed reward.

    Args:
        states_BTD: Hidden state at each of the reply's tokens, from a causal model.
        keep_BT: 1.0 where the row has a token; every row has at least one, from column 0 on.
        head: Reward of a state.
        prompt_BD: State at the prompt's end, where the reply is still empty. Without it R(empty) is 0.
        pool: What the head was trained on: the `last` token's state, or the `mean` over the reply.
    """
    if pool == "mean":
        length_T1 = torch.arange(1, states_BTD.shape[1] + 1, device=states_BTD.device)[:, None]
        states_BTD = (states_BTD * keep_BT[..., None]).cumsum(1) / length_T1
    reward_BT = head(states_BTD)
    empty_B = torch.zeros_like(reward_BT[:, 0]) if prompt_BD is None else head(prompt_BD)
    before_BT = torch.cat([empty_B[:, None], reward_BT[:, :-1]], 1)
    last_B = keep_BT.sum(-1).long() - 1
    whole_B = reward_BT[torch.arange(len(reward_BT)), last_B]
    score_BT = torch.where(keep_BT > 0, reward_BT - before_BT, torch.zeros_like(reward_BT))
    return _attribution(score_BT, whole_B - empty_B)


def integrated_gradients(
    value: Value,
    embeds_BTD: torch.Tensor,
    keep_BT: torch.Tensor,
    *,
    baseline: torch.Tensor | None = None,
    steps: int = 32,
) -> Attribution:
    """Gradients along the straight path from a blank reply to the real one.

    Objective: s_t = (x_t - x0_t) . integral over a in [0, 1] of dR/dx_t at x0 + a (x - x0). The sum is
        R(x) - R(x0), up to the error of the quadrature, which is reported.
    Difference: gradient times input looks at the end of the path only, where a saturated reward has no
        gradient left.
    Assumption: the points on the path mean something to the model. From the zero vector they do not
        where the first layer normalises by size: nearly all of the change then happens within a sliver
        at the start of the path. `mean_embedding` is the better blank.
    Source: Sundararajan, Taly and Yan 2017 (arXiv 1703.01365), section 3, equation 1.

    Args:
        value: Differentiable reward of each row from its input embeddings.
        embeds_BTD: Embeddings of prompt and reply.
        keep_BT: 1.0 for the columns to explain. The others stay as they are on the whole path, so that
            the prompt gets none of the credit.
        baseline: The blank, broadcast against `embeds_BTD`; zeros by default.
        steps: Points of the Gauss-Legendre rule; one forward and backward each.

    Raises:
        InputError: `steps` is below 1.
    """
    if steps < 1:
        raise InputError(f"{steps} steps of integrated gradients", expected="at least 1", fix="take 32 or more")
    start_BTD, way_BTD = _path(embeds_BTD, keep_BT, baseline)
    nodes, shares = np.polynomial.legendre.leggauss(steps)
    slope_BTD = torch.zeros_like(way_BTD)
    for node, part in zip(nodes.tolist(), shares.tolist(), strict=True):
        slope_BTD += 0.5 * part * _gradient(value, start_BTD + 0.5 * (node + 1.0) * way_BTD)
    with torch.no_grad():
        change_B = value(start_BTD + way_BTD) - value(start_BTD)
    return _attribution((slope_BTD * way_BTD).sum(-1), change_B)


def gradient_input(
    value: Value,
    embeds_BTD: torch.Tensor,
    keep_BT: torch.Tensor,
    *,
    baseline: torch.Tensor | None = None,
) -> Attribution:
    """The gradient at the reply, times how far it is from the blank.

    Objective: s_t = (x_t - x0_t) . dR/dx_t at x.
    Difference: integrated gradients with one point, at the end of the path; one forward and backward.
    Assumption: the reward is linear between blank and reply. It is not, and `error_B` says by how much.
    Source: Shrikumar et al. 2017 (arXiv 1704.02685), section 2.2.

    Args:
        value: As for `integrated_gradients`.
        embeds_BTD: Likewise.
        keep_BT: Likewise.
        baseline: Likewise.
    """
    start_BTD, way_BTD = _path(embeds_BTD, keep_BT, baseline)
    slope_BTD = _gradient(value, start_BTD + way_BTD)
    with torch.no_grad():
        change_B = value(start_BTD + way_BTD) - value(start_BTD)
    return _attribution((slope_BTD * way_BTD).sum(-1), change_B)


def _path(
    embeds_BTD: torch.Tensor, keep_BT: torch.Tensor, baseline: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the path starts, and the way from there to the real embeddings."""
    x = embeds_BTD.detach()
    blank = torch.zeros_like(x) if baseline is None else baseline.to(x).expand_as(x)
    start = torch.where(keep_BT[..., None] > 0, blank, x)
    return start, x - start


def _gradient(value: Value, point_BTD: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        x = point_BTD.detach().requires_grad_(True)
        (found,) = torch.autograd.grad(value(x).sum(), x)
    return found


def reward_of(lm: LanguageModel, head: Head, last_B: torch.Tensor) -> Value:
    """The reward as a function of the model's input embeddings: `head` on the state at each row's last token.

    Rows are padded on the right: a causal model does not see what comes behind `last_B`.
    """

    def value(embeds_BTD: torch.Tensor) -> torch.Tensor:
        states_BTD = lm.body(inputs_embeds=embeds_BTD, use_cache=False).last_hidden_state
        return head(states_BTD[torch.arange(len(last_B)), last_B])

    return value


def mean_embedding(lm: LanguageModel) -> torch.Tensor:
    """The vocabulary's mean embedding, (D,): a blank of a size that the model knows."""
    table_VD: torch.Tensor = lm.model.get_input_embeddings().weight
    return table_VD.detach().float().mean(0).to(table_VD.dtype)
