"""Log-probabilities and divergences over the whole vocabulary, chunk by chunk: no whole logits ever exist.

All functions have a gradient for the hidden states only (the output matrix is frozen), and since
that gradient is known as soon as a chunk's probabilities are, it is computed in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["drift", "logps", "logps_and_totals"]

_CHUNK = 256  # rows of logits held at once, in the model's dtype: matrix products want many
_ROWS = 16  # rows worked on at once in float32: 16 x 49,152 numbers stay in the processor's cache


class _Known(torch.autograd.Function):
    """Values of h whose gradient has been computed along with them: `slope_ND` times what comes in."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, value_N: torch.Tensor, slope_ND: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slope_ND)
        return value_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slope_ND,) = ctx.saved_tensors
        return slope_ND * grads[0][:, None].to(slope_ND.dtype), None, None


class _LogpAndTotal(torch.autograd.Function):
    """The same for log-probabilities and the logsumexps in them.

    With p W the mean row of the head under the probabilities, the gradients are head[target] - p W and
    p W: one table serves both.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        target_N: torch.Tensor,
        logp_N: torch.Tensor,
        total_N: torch.Tensor,
        mean_ND: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(head_VD, target_N, mean_ND)
        return logp_N, total_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        head_VD, target_N, mean_ND = ctx.saved_tensors
        logp_N1, total_N1 = (grad[:, None].float() for grad in grads)
        slope_ND = logp_N1 * head_VD[target_N] + (total_N1 - logp_N1) * mean_ND
        return slope_ND.to(mean_ND.dtype), None, None, None, None, None


def _by_chunk(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    starts: Sequence[torch.Tensor],
    one: Callable[[slice, Sequence[torch.Tensor], bool], torch.Tensor],
) -> torch.Tensor:
    """Values of all rows, with their gradient for `hidden_ND` where one is wanted; see `_walk`."""
    value_N, slope_ND = _walk(hidden_ND, head_VD, starts, one)
    if slope_ND is None:
        return value_N
    found: torch.Tensor = _Known.apply(hidden_ND, value_N, slope_ND)  # type: ignore[no-untyped-call]
    return found


def _walk(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    starts: Sequence[torch.Tensor],
    one: Callable[[slice, Sequence[torch.Tensor], bool], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values of all rows, and where a gradient is wanted, what `one` left in the logits' place times the head.

    `one` gets a slice of rows and their logits, first those of `hidden_ND`, then those of `starts`. It
    gives the rows' values and, where asked, overwrites the first logits with the values' gradient for them.
    """
    wanted = hidden_ND.requires_grad and torch.is_grad_enabled()
    value_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
    slope_ND = torch.empty_like(hidden_ND, requires_grad=False) if wanted else None
    with torch.no_grad():
        rows = min(_CHUNK, len(hidden_ND))
        tables = [hidden_ND.new_empty(rows, len(head_VD)) for _ in range(1 + len(starts))]  # taken once
        for start in range(0, len(hidden_ND), _CHUNK):
            part = slice(start, start + _CHUNK)
            logits = [
                torch.mm(x[part], head_VD.T, out=table[: len(x[part])])
                for x, table in zip((hidden_ND, *starts), tables, strict=True)
            ]
            for low in range(0, len(logits[0]), _ROWS):
                few = [table[low : low + _ROWS] for table in logits]
                here = slice(start + low, start + low + len(few[0]))
                value_N[here] = one(here, few, wanted)
            if slope_ND is not None:
                torch.mm(logits[0], head_VD, out=slope_ND[part])
    return value_N, slope_ND


def logps(hidden_ND: torch.Tensor, head_VD: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target in nats: log softmax(h W^T)[target], (N,) float32."""

    def one(rows: slice, logits: Sequence[torch.Tensor], sloped: bool) -> torch.Tensor:
        (now_NV,) = logits
        target_N1 = target_N[rows, None]
        top_N1 = now_NV.amax(-1, keepdim=True).float()
        aim_N1 = now_NV.gather(-1, target_N1).float() - top_N1
        mass_NV = (now_NV - top_N1).exp_()
        total_N1 = mass_NV.sum(-1, keepdim=True)
        if sloped:  # the gradient for the logits is one at the target, minus their softmax
            now_NV.copy_(mass_NV.mul_(-1.0 / total_N1).scatter_add_(-1, target_N1, torch.ones_like(total_N1)))
        return (aim_N1 - total_N1.log())[:, 0]

    return _by_chunk(hidden_ND, head_VD, (), one)


def logps_and_totals(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, target_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `logps`, and the logsumexp of all logits, each (N,) float32 and with its own gradient.

    Costs what `logps` costs: the logarithm of the sum is there already, and its gradient is part of the other's.
    """
    total_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)

    def one(rows: slice, logits: Sequence[torch.Tensor], sloped: bool) -> torch.Tensor:
        (now_NV,) = logits
        top_N1 = now_NV.amax(-1, keepdim=True).float()
        aim_N1 = now_NV.gather(-1, target_N[rows, None]).float() - top_N1
        mass_NV = (now_NV - top_N1).exp_()
        sum_N1 = mass_NV.sum(-1, keepdim=True)
        if sloped:
            now_NV.copy_(mass_NV.div_(sum_N1))
        total_N[rows] = (top_N1 + sum_N1.log())[:, 0]
        return (aim_N1 - sum_N1.log())[:, 0]

    logp_N, mean_ND = _walk(hidden_ND, head_VD, (), one)
    if mean_ND is None:
        return logp_N, total_N
    found: tuple[torch.Tensor, torch.Tensor] = _LogpAndTotal.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head_VD, target_N, logp_N, total_N, mean_ND
    )
    return found


def drift(hidden_ND: torch.Tensor, head_VD: torch.Tensor, start_ND: torch.Tensor) -> torch.Tensor:
    """KL(start || now) of the next-token distributions in nats, summed over the vocabulary, (N,) float32.

    Exact where an estimate from sampled tokens is noisy: it also sees what was not sampled. `start_ND`
    are the start model's hidden states at the same places; they get no gradient.
    """

    def one(_: slice, logits: Sequence[torch.Tensor], sloped: bool) -> torch.Tensor:
        now_NV, then_NV = (x.float().log_softmax(-1) for x in logits)
        share_NV = then_NV.exp()
        value_N = (share_NV * then_NV.sub_(now_NV)).sum(-1)
        if sloped:  # the gradient for the logits is softmax(now) - softmax(start)
            logits[0].copy_(now_NV.exp_().sub_(share_NV))
        return value_N

    return _by_chunk(hidden_ND, head_VD, (start_ND,), one)
