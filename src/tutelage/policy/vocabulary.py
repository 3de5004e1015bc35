"""Log-probabilities and divergences over the whole vocabulary, chunk by chunk: no whole logits ever exist.

Both functions have a gradient for the hidden states only (the output matrix is frozen), and since
that gradient is known as soon as a chunk's probabilities are, it is computed in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["drift", "logps"]

_CHUNK = 256  # rows of logits held at once: 256 x 49,152 in float32 is 50 MB


class _LogProbs(torch.autograd.Function):
    """The gradient for h is (W[target] - softmax(h W^T) W) g."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, head_VD: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        logp_N = torch.empty(len(target_N), dtype=torch.float32, device=hidden_ND.device)
        slope_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, len(target_N), _CHUNK):
            part = slice(start, start + _CHUNK)
            logits = (hidden_ND[part] @ head_VD.T).float()
            norm = logits.logsumexp(-1, keepdim=True)
            logp_N[part] = (logits.gather(-1, target_N[part, None]) - norm)[:, 0]
            if slope_ND is not None:
                probability = logits.sub_(norm).exp_().to(head_VD.dtype)
                slope_ND[part] = head_VD[target_N[part]] - probability @ head_VD
        if slope_ND is not None:
            ctx.save_for_backward(slope_ND)
        return logp_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slope_ND,) = ctx.saved_tensors
        return slope_ND * grads[0][:, None].to(slope_ND.dtype), None, None


class _Drift(torch.autograd.Function):
    """The gradient for h is (softmax(h W^T) - softmax(s W^T)) W g."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, head_VD: torch.Tensor, start_ND: torch.Tensor) -> torch.Tensor:
        drift_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        slope_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for begin in range(0, len(hidden_ND), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            now = (hidden_ND[part] @ head_VD.T).float().log_softmax(-1)
            then = (start_ND[part] @ head_VD.T).float().log_softmax(-1)
            share = then.exp()
            drift_N[part] = (share * then.sub_(now)).sum(-1)
            if slope_ND is not None:
                slope_ND[part] = now.exp_().sub_(share).to(head_VD.dtype) @ head_VD
        if slope_ND is not None:
            ctx.save_for_backward(slope_ND)
        return drift_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slope_ND,) = ctx.saved_tensors
        return slope_ND * grads[0][:, None].to(slope_ND.dtype), None, None


def logps(hidden_ND: torch.Tensor, head_VD: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target in nats: log softmax(h W^T)[target], (N,) float32."""
    found: torch.Tensor = _LogProbs.apply(hidden_ND, head_VD, target_N)  # type: ignore[no-untyped-call]
    return found


def drift(hidden_ND: torch.Tensor, head_VD: torch.Tensor, start_ND: torch.Tensor) -> torch.Tensor:
    """KL(start || now) of the next-token distributions in nats, summed over the vocabulary, (N,) float32.

    Exact where an estimate from sampled tokens is noisy: it also sees what was not sampled. `start_ND`
    are the start model's hidden states at the same places; they get no gradient.
    """
    found: torch.Tensor = _Drift.apply(hidden_ND, head_VD, start_ND)  # type: ignore[no-untyped-call]
    return found
