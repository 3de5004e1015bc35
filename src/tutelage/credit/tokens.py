"""Credit: a reply's advantage spread over its tokens. It always sums to the advantage exactly."""

from __future__ import annotations

from typing import Literal

import torch

__all__ = ["as_loud", "assign", "assign_signed", "reward_to_go", "weights"]

Method = Literal["attention", "uniform", "last"]
Rest = Literal["last", "spread"]


def weights(
    method: Method,
    keep_BT: torch.Tensor,
    attention_BT: torch.Tensor | None,
    drop_BT: torch.Tensor | None = None,
    *,
    observer: bool = True,
) -> torch.Tensor:
    """Non-negative weights over each row's tokens that sum to one.

    Args:
        method: `attention` follows attention (of a critic's head, or of the model's last layer at the reply's
            last token), `uniform` gives every token the same, `last` all to the last token.
        keep_BT: 1.0 where the row has a token; every row has at least one.
        attention_BT: Needed for `attention`. Columns outside the reply (the prompt, with its
            attention sink at the first token) are not in it. A row without weight falls back to uniform.
        drop_BT: True for columns that draw attention whatever they say (`spans.sinks` finds them); they
            are left out before normalising. Only `attention` reads it.
        observer: Whether the last token is who looks: its weight on itself is dropped then, because it says
            nothing about the others.

    Source: Chan et al. 2024 (arXiv 2402.00782), section 3.
    """
    length_B1 = keep_BT.sum(-1, keepdim=True)
    last_BT = torch.arange(keep_BT.shape[1]) == length_B1 - 1
    uniform = keep_BT / length_B1
    if method == "uniform":
        return uniform
    if method == "last":
        return last_BT.to(keep_BT.dtype)
    if attention_BT is None:
        raise ValueError("attention credit needs the attention of the scored replies")
    seen = attention_BT.clamp_min(0.0) * keep_BT
    if observer:
        seen = seen * ~last_BT
    if drop_BT is not None:
        seen = seen * ~drop_BT
    total = seen.sum(-1, keepdim=True)
    return torch.where(total > 1e-8, seen / total.clamp_min(1e-8), uniform)


def assign(
    advantage_B: torch.Tensor,
    weights_BT: torch.Tensor,
    keep_BT: torch.Tensor,
    *,
    beta: float,
    rest: Rest = "last",
) -> torch.Tensor:
    """credit_BT = beta A w_t, plus (1 - beta) A on the last token or spread evenly; rows sum to A, prompts get none."""
    length_B = keep_BT.sum(-1).long()
    credit = beta * advantage_B[:, None] * weights_BT
    rows = torch.arange(len(advantage_B))
    if rest == "spread":
        credit += (1.0 - beta) * advantage_B[:, None] * keep_BT / length_B[:, None]
    else:
        credit[rows, length_B - 1] += (1.0 - beta) * advantage_B
    # Rounding leaves about 1e-7; the last token takes it, so that the sum is exact in float64 terms.
    credit[rows, length_B - 1] += advantage_B - credit.sum(-1)
    return credit * keep_BT


def assign_signed(
    advantage_B: torch.Tensor,
    score_BT: torch.Tensor,
    keep_BT: torch.Tensor,
    *,
    beta: float,
    rest: Rest = "last",
) -> torch.Tensor:
    """credit_BT = beta s_t, plus what is missing to A; rows sum to A, prompts get none.

    Unlike with `assign`, a token of a praised reply can be blamed.

    Args:
        advantage_B: What each row is worth.
        score_BT: Signed scores in the advantage's unit: where rewards were divided by something, so must be
            these.
        keep_BT: 1.0 where the row has a token; every row has at least one.
        beta: Factor on the scores.
        rest: Who takes A - beta sum s: the `last` token, or all in equal parts (`spread`). With prefix
            differences and `last`, reward-to-go at t is A less a function of what came before t, a baseline
            that leaves the expected policy gradient as it was (Ng, Harada and Russell 1999, theorem 1).
            `spread` depends on the reply's length and has no such warrant.
    """
    length_B = keep_BT.sum(-1).long()
    rows, last_B = torch.arange(len(advantage_B)), length_B - 1
    credit = beta * score_BT.to(advantage_B.dtype) * keep_BT
    if rest == "spread":
        credit = credit + (advantage_B - credit.sum(-1))[:, None] * keep_BT / length_B[:, None]
    missing_B = advantage_B.double() - credit.double().sum(-1)
    credit[rows, last_B] += missing_B.to(credit.dtype)
    return credit


def reward_to_go(credit_BT: torch.Tensor, *, discount: float = 1.0) -> torch.Tensor:
    """What a token can still influence: sum_s discount^(s - t) credit_s over the tokens from it to the end.

    With all credit on the last token and no discount every token gets the whole advantage, which is the usual
    sequence-level policy gradient; spread credit gives early, decisive tokens more than late ones. A discount
    below 1 trusts the credit more: at 0 a token answers for its own alone. That takes the noise of all later tokens
    out of its gradient, and also whatever it does to them: it is biased where a token's worth is what follows.
    """
    if discount == 1.0:
        return credit_BT.flip(-1).cumsum(-1).flip(-1)
    ahead_BT = credit_BT.clone()
    for t in range(credit_BT.shape[1] - 2, -1, -1):
        ahead_BT[:, t] += discount * ahead_BT[:, t + 1]
    return ahead_BT


def as_loud(ahead_BT: torch.Tensor, credit_BT: torch.Tensor, keep_BT: torch.Tensor) -> torch.Tensor:
    """Scaled so that a batch's tokens get as much, in absolute terms, as if each had its row's advantage.

    A discount makes all that tokens get smaller, and not their meaning: beside a penalty (divergence, entropy) they
    would drown.
    """
    loud, whole = float(ahead_BT.abs().sum()), float((credit_BT.sum(-1).abs() * keep_BT.sum(-1)).sum())
    return ahead_BT * (whole / loud) if loud else ahead_BT
