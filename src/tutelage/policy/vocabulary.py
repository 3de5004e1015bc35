"""Log-probabilities and divergences over the whole vocabulary, chunk by chunk: no whole logits ever exist.

Both functions have a gradient for the hidden states only (the output matrix is frozen), and since
that gradient is known as soon as a chunk's probabilities are, it is computed in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["drift", "logps"]

_CHUNK = 256  # rows of logits held at once: 256 x 49,152 in float32 is 50 MB


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


def _by_chunk(
    hidden_ND: torch.Tensor, one: Callable[[slice, bool], tuple[torch.Tensor, torch.Tensor | None]]
) -> torch.Tensor:
    """`one` gives a chunk's values and, if asked, their gradient for the hidden states."""
    wanted = hidden_ND.requires_grad and torch.is_grad_enabled()
    value_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
    slope_ND = torch.empty_like(hidden_ND, requires_grad=False) if wanted else None
    with torch.no_grad():
        for start in range(0, len(hidden_ND), _CHUNK):
            part = slice(start, start + _CHUNK)
            value_N[part], slope = one(part, wanted)
            if slope_ND is not None and slope is not None:
                slope_ND[part] = slope
    if slope_ND is None:
        return value_N
    found: torch.Tensor = _Known.apply(hidden_ND, value_N, slope_ND)  # type: ignore[no-untyped-call]
    return found


def logps(hidden_ND: torch.Tensor, head_VD: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target in nats: log softmax(h W^T)[target], (N,) float32."""

    def one(part: slice, sloped: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        target = target_N[part]
        logits = (hidden_ND[part] @ head_VD.T).float()
        norm = logits.logsumexp(-1, keepdim=True)
        value = (logits.gather(-1, target[:, None]) - norm)[:, 0]
        # The gradient for h is W[target] - softmax(h W^T) W.
        return value, head_VD[target] - logits.sub_(norm).exp_().to(head_VD.dtype) @ head_VD if sloped else None

    return _by_chunk(hidden_ND, one)


def drift(hidden_ND: torch.Tensor, head_VD: torch.Tensor, start_ND: torch.Tensor) -> torch.Tensor:
    """KL(start || now) of the next-token distributions in nats, summed over the vocabulary, (N,) float32.

    Exact where an estimate from sampled tokens is noisy: it also sees what was not sampled. `start_ND`
    are the start model's hidden states at the same places; they get no gradient.
    """

    def one(part: slice, sloped: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        now = (hidden_ND[part] @ head_VD.T).float().log_softmax(-1)
        then = (start_ND[part] @ head_VD.T).float().log_softmax(-1)
        share = then.exp()
        value = (share * then.sub_(now)).sum(-1)
        # The gradient for h is (softmax(h W^T) - softmax(s W^T)) W.
        return value, now.exp_().sub_(share).to(head_VD.dtype) @ head_VD if sloped else None

    return _by_chunk(hidden_ND, one)
