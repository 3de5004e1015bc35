"""Log-probabilities and divergences in chunks: against whole logits, by hand, and by finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from tutelage.policy import vocabulary
from tutelage.policy.vocabulary import drift, logps, logps_and_totals


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 700])
def test_chunked_log_probs_equal_the_full_log_softmax(rows: int) -> None:
    """Values and gradient against float64 autograd over whole logits, around the chunk's edges."""
    random = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 24, generator=random, requires_grad=True)
    head = torch.randn(90, 24, generator=random)
    target = torch.randint(90, (rows,), generator=random)
    weight = torch.randn(rows, generator=random)
    ours = logps(hidden, head, target)
    (ours * weight).sum().backward()
    exact = hidden.detach().double().requires_grad_(True)
    theirs = (exact @ head.double().T).log_softmax(-1).gather(1, target[:, None])[:, 0]
    (theirs * weight.double()).sum().backward()
    assert hidden.grad is not None and exact.grad is not None
    assert gap(ours, theirs) < 1e-4
    assert gap(hidden.grad, exact.grad) < 1e-4


def test_chunked_log_probs_pass_gradcheck_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_CHUNK", 2)
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 4, generator=random, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 4, generator=random, dtype=torch.float64)
    target = torch.tensor([0, 6, 3, 3, 1])

    def total(h: torch.Tensor) -> torch.Tensor:
        return logps(h, head, target).double()

    # Logits are formed in float32 inside, so the finite difference takes a step well above its rounding.
    assert torch.autograd.gradcheck(total, (hidden,), eps=1e-2, atol=2e-3, rtol=1e-3)


def test_drift_by_hand() -> None:
    """Two words. Start: (1/2, 1/2). Now: (3/4, 1/4). KL = 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3).

    The gradient for the logits is now - start: (1/4, -1/4); with W the identity, that of h too.
    """
    hidden = torch.tensor([[math.log(3.0), 0.0]], requires_grad=True)
    found = drift(hidden, torch.eye(2), torch.zeros(1, 2))
    found.sum().backward()
    assert float(found.detach()) == pytest.approx(0.5 * math.log(4 / 3))
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [pytest.approx([0.25, -0.25])]


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 600])
def test_chunked_drift_equals_the_whole_divergence(rows: int) -> None:
    """Values and gradient against float64 autograd, around the chunk's edges; never negative, zero at the start."""
    random = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 24, generator=random, requires_grad=True)
    start, head = torch.randn(rows, 24, generator=random), torch.randn(90, 24, generator=random)
    weight = torch.randn(rows, generator=random)
    ours = drift(hidden, head, start)
    (ours * weight).sum().backward()
    exact = hidden.detach().double().requires_grad_(True)
    then = (start.double() @ head.double().T).log_softmax(-1)
    theirs = torch.nn.functional.kl_div(
        (exact @ head.double().T).log_softmax(-1), then, log_target=True, reduction="none"
    ).sum(-1)
    (theirs * weight.double()).sum().backward()
    assert hidden.grad is not None and exact.grad is not None
    assert gap(ours, theirs) < 1e-4
    assert gap(hidden.grad, exact.grad) < 1e-4
    assert float(ours.detach().min()) >= 0.0
    assert float(drift(start, head, start).abs().max()) < 1e-6


def test_chunked_drift_passes_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_CHUNK", 2)
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 4, generator=random, dtype=torch.float64, requires_grad=True)
    start = torch.randn(5, 4, generator=random, dtype=torch.float64)
    head = torch.randn(7, 4, generator=random, dtype=torch.float64)
    total = lambda h: drift(h, head, start).double()  # noqa: E731
    assert torch.autograd.gradcheck(total, (hidden,), eps=1e-2, atol=2e-3, rtol=1e-3)


def test_totals_by_hand() -> None:
    """Two words with logits (ln 3, 0) and the first as target: logp ln(3/4), total ln 4; p = (3/4, 1/4).

    Gradients for the logits: of logp (1/4, -1/4), of the total (3/4, 1/4).
    """
    hidden = torch.tensor([[math.log(3.0), 0.0]], requires_grad=True)
    logp, total = logps_and_totals(hidden, torch.eye(2), torch.tensor([0]))
    assert (float(logp.detach()), float(total.detach())) == pytest.approx((math.log(0.75), math.log(4.0)))
    for value, slope in ((logp, [0.25, -0.25]), (total, [0.75, 0.25])):
        (grad,) = torch.autograd.grad(value.sum(), hidden, retain_graph=True)
        assert grad.tolist() == [pytest.approx(slope)]


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 700])
def test_chunked_totals_equal_whole_logits(rows: int) -> None:
    """Values and gradient of a mixture of both against float64 autograd, around the chunk's edges."""
    random = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 24, generator=random, requires_grad=True)
    head = torch.randn(90, 24, generator=random)
    target = torch.randint(90, (rows,), generator=random)
    weight = torch.randn(2, rows, generator=random)
    logp, total = logps_and_totals(hidden, head, target)
    assert torch.equal(logp, logps(hidden, head, target))
    (logp * weight[0] + total * weight[1]).sum().backward()
    exact = hidden.detach().double().requires_grad_(True)
    logits = exact @ head.double().T
    whole = logits.logsumexp(-1)
    theirs = logits.gather(1, target[:, None])[:, 0] - whole
    (theirs * weight[0].double() + whole * weight[1].double()).sum().backward()
    assert gap(logp, theirs) < 1e-4 and gap(total, whole) < 1e-4
    assert hidden.grad is not None and exact.grad is not None
    assert gap(hidden.grad, exact.grad) < 1e-4
    with torch.no_grad():
        assert torch.equal(logps_and_totals(hidden, head, target)[1], total)


def test_totals_pass_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_CHUNK", 2)
    random = torch.Generator().manual_seed(2)
    hidden = torch.randn(5, 4, generator=random, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, 4, generator=random, dtype=torch.float64)
    target = torch.tensor([0, 6, 3, 3, 1])
    both = lambda h: tuple(x.double() for x in logps_and_totals(h, head, target))  # noqa: E731
    assert torch.autograd.gradcheck(both, (hidden,), eps=1e-2, atol=2e-3, rtol=1e-3)
