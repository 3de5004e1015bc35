"""The Nash objective against exact sums over all nine replies of two tokens from a vocabulary of three."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from tests.pair_batches import F64

from tutelage.engines.batch import Batch
from tutelage.errors import RecipeError
from tutelage.objectives.nash import Nash, against_opponents, mixture_logits, self_play

NINE = list(itertools.product(range(3), range(3)))
KL = 0.3
UNCAPPED = 1e9


def logits(seed: int, scale: float = 1.0) -> torch.Tensor:
    """(4, 3): the first token's logits, then the second's after each first token."""
    return scale * torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)


def token_logps(table: torch.Tensor) -> torch.Tensor:
    """(9, 2) log-probabilities of every reply's tokens."""
    logp = torch.log_softmax(table, -1)
    return torch.stack([torch.stack([logp[0, a], logp[1 + a, b]]) for a, b in NINE])


def preference(seed: int = 7) -> torch.Tensor:
    """(9, 9) P(row beats column): random, hence not transitive; P + P^T = 1."""
    draw = torch.randn(9, 9, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return torch.sigmoid(2.0 * (draw - draw.T))


PREFER = preference()
REF = logits(1, 0.5)


def exact_gradient(table: torch.Tensor, opponent_9: torch.Tensor, kl: float = KL) -> torch.Tensor:
    """Of E_y[P(y beats the opponent)] - 1/2 - kl KL(pi || pi_ref), the opponent held fixed."""
    table = table.clone().requires_grad_(True)
    logp_9 = token_logps(table).sum(-1)
    gain = logp_9.exp() @ (PREFER @ opponent_9) - 0.5
    drift = logp_9.exp() @ (logp_9 - token_logps(REF).sum(-1))
    (grad,) = torch.autograd.grad(gain - kl * drift, table)
    return grad


def reply_batch(table: torch.Tensor, old: torch.Tensor, advantage_9: torch.Tensor) -> Batch:
    logp, ref = token_logps(table), token_logps(REF)
    return Batch(logp, torch.ones_like(ref), old, ref, advantage_9[:, None].expand(9, 2), 1, 18)


def expected_gradient(
    objective: Nash, table: torch.Tensor, drawn: torch.Tensor, advantage_9: torch.Tensor
) -> torch.Tensor:
    """Sum over replies of the probability to draw each, times what the objective makes of it (ascent)."""
    table, total = table.clone().requires_grad_(True), torch.zeros(4, 3, dtype=F64)
    old = token_logps(drawn)
    whole = reply_batch(table, old, advantage_9)
    for n, weight in enumerate(old.sum(-1).exp()):
        fields = ("logp_BT", "keep_BT", "old_logp_BT", "ref_logp_BT", "advantage_BT")
        row = dataclasses.replace(whole, **{f: getattr(whole, f)[n : n + 1] for f in fields})
        (grad,) = torch.autograd.grad(-objective(row).value, table, retain_graph=True)
        total += weight * grad
    return total


def test_by_hand() -> None:
    """Log-ratios 0.5 and -1: from the first token on -0.5. A = 2 and t = 0.5 weigh the scores 2.25 and 2.5."""
    logp = torch.tensor([[-1.0, -2.0]], dtype=F64, requires_grad=True)
    ref, ones = torch.tensor([[-1.5, -1.0]], dtype=F64), torch.ones(1, 2, dtype=F64)
    loss = Nash(kl=0.5)(Batch(logp, ones, logp.detach(), ref, 2.0 * ones, 1, 2))
    assert float(loss.value.detach()) == pytest.approx(2.25 * 1.0 + 2.5 * 2.0)
    (grad,) = torch.autograd.grad(loss.value, logp)
    assert torch.allclose(grad, torch.tensor([[-2.25, -2.5]], dtype=F64))
    assert loss.sums == {"kl_to_start": pytest.approx(-0.5), "truncated": 0.0, "tokens": 2.0}


@pytest.mark.parametrize("baseline", [0.0, 0.4])
def test_the_expected_gradient_is_that_of_the_regularised_game(baseline: float) -> None:
    table, opponent_9 = logits(2), token_logps(logits(3)).sum(-1).exp()
    advantage_9 = PREFER @ opponent_9 - 0.5 - baseline
    found = expected_gradient(Nash(kl=KL, cap=UNCAPPED), table, table, advantage_9)
    exact = exact_gradient(table, opponent_9)
    assert exact.abs().max() > 0.01
    assert (found - exact).abs().max() < 1e-12


def test_each_tokens_own_log_ratio_would_bias_the_gradient() -> None:
    """What this objective must not do: weigh a token's score with that token's log-ratio alone."""
    table = logits(2).requires_grad_(True)
    logp, ref = token_logps(table), token_logps(REF)
    own = ((logp - ref).detach() * logp).sum(-1)
    (trap,) = torch.autograd.grad(-KL * (logp.sum(-1).exp().detach() @ own), table)
    nobody = torch.zeros(9, dtype=F64)
    exact = exact_gradient(table.detach(), nobody)
    assert (
        expected_gradient(Nash(kl=KL, cap=UNCAPPED), table.detach(), table.detach(), nobody) - exact
    ).abs().max() < 1e-12
    assert (trap - exact).abs().max() > 0.1 * exact.abs().max()


def test_replies_of_another_policy_are_weighed_and_the_cap_bounds_the_weight() -> None:
    table, drawn, opponent_9 = logits(2), logits(2) + 0.5 * logits(4), token_logps(logits(3)).sum(-1).exp()
    advantage_9 = PREFER @ opponent_9 - 0.5
    exact = exact_gradient(table, opponent_9)
    off = [expected_gradient(Nash(kl=KL, cap=c), table, drawn, advantage_9) - exact for c in (UNCAPPED, 1.0)]
    assert off[0].abs().max() < 1e-12 and off[1].abs().max() > 1e-3
    batch = reply_batch(table, token_logps(drawn), advantage_9)
    assert Nash(cap=UNCAPPED)(batch).sums["truncated"] == 0.0
    assert Nash(cap=1.0)(batch).sums["truncated"] == 2.0 * int(
        (token_logps(table) - token_logps(drawn)).sum(-1).gt(0).sum()
    )


def test_a_group_of_two_playing_itself_has_the_exact_gradient_on_average() -> None:
    """Over all 81 groups: the opponent is the policy itself, and 1/2 is baseline enough."""
    table = logits(2).requires_grad_(True)
    logp = token_logps(table)
    pi_9, ref = logp.detach().sum(-1).exp(), token_logps(REF)
    total = torch.zeros_like(logp)
    leaf = logp.detach().requires_grad_(True)
    for i, j in itertools.product(range(9), range(9)):
        pick = [i, j]
        advantage_PG = self_play(PREFER[pick][:, pick][None])
        ones = torch.ones(2, 2, dtype=F64)
        batch = Batch(leaf[pick], ones, leaf.detach()[pick], ref[pick], advantage_PG[0][:, None] * ones, 2, 4)
        (grad,) = torch.autograd.grad(-Nash(kl=KL, cap=UNCAPPED)(batch).value, leaf)
        total += pi_9[i] * pi_9[j] * grad
    (found,) = torch.autograd.grad((total * logp).sum(), table)
    assert (found - exact_gradient(table.detach(), pi_9)).abs().max() < 1e-12


def test_ascent_against_oneself_ends_at_the_equilibrium() -> None:
    """There, log (pi / pi_ref) = P(y beats pi) / t + constant, whatever the preference's cycles.

    A reply's weight in the step is its probability, which is also its ratio to a policy that draws all
    nine replies alike: 1/9 each, so one batch of nine rows is the exact expectation.
    """
    table, ref = REF.clone().requires_grad_(True), token_logps(REF)
    alike = torch.full_like(ref, math.log(1 / 3))
    for _ in range(600):
        logp = token_logps(table)
        advantage_9 = PREFER @ logp.detach().sum(-1).exp() - 0.5
        batch = Batch(logp, torch.ones_like(ref), alike, ref, advantage_9[:, None].expand(9, 2), 9, 18)
        (grad,) = torch.autograd.grad(Nash(kl=KL, cap=UNCAPPED)(batch).value, table)
        table = (table - 2.0 * grad).detach().requires_grad_(True)
    log_9 = token_logps(table.detach()).sum(-1)
    level_9 = log_9 - ref.sum(-1) - PREFER @ log_9.exp() / KL
    assert float(level_9.max() - level_9.min()) < 1e-3
    start_9 = PREFER @ ref.sum(-1).exp() / KL
    assert float(start_9.max() - start_9.min()) > 0.5


# -- rewards from preferences ---------------------------------------------------------------------


def test_self_play_by_hand() -> None:
    """The first wins with 0.8 and 0.6, so 0.7 - 0.5; with a missing opinion only the other one counts."""
    gone = math.nan
    prefer = torch.tensor([[9.0, 0.8, 0.6], [0.2, 9.0, gone], [0.4, gone, 9.0]])
    assert torch.allclose(self_play(prefer[None]), torch.tensor([[0.2, -0.3, -0.1]]))
    assert torch.equal(self_play(torch.full((1, 3, 3), gone)), torch.zeros(1, 3))
    assert torch.equal(self_play(torch.tensor([[[0.9]]])), torch.zeros(1, 1))


def test_self_play_sums_to_zero_where_opinions_are_complete() -> None:
    """So leaving one out as baseline would only rescale: each of the others' rewards was won against it."""
    reward_PG = self_play(PREFER[None])
    assert float(reward_PG.sum()) == pytest.approx(0.0, abs=1e-12)
    left_out = reward_PG - (reward_PG.sum() - reward_PG) / 8
    assert torch.allclose(left_out, reward_PG * 9 / 8)


def test_against_opponents_by_hand() -> None:
    """Means 0.75, 0.25 and 0.5: each against the mean of the two others."""
    prefer = torch.tensor([[[0.9, 0.6], [0.1, 0.4], [0.5, math.nan]]])
    assert torch.allclose(against_opponents(prefer), torch.tensor([[0.375, -0.375, 0.0]]))
    lone = torch.tensor([[[0.9, 0.6], [math.nan, math.nan]]])
    assert torch.equal(against_opponents(lone), torch.zeros(1, 2))


def test_mixture_by_hand() -> None:
    """pi = (0.8, 0.2) and pi_ref = (0.2, 0.8): the even mixture is even, and its ends are the two themselves."""
    pi, ref = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.2, 0.8]]).log()
    for share, first in ((0.0, 0.8), (0.5, 0.5), (1.0, 0.2), (0.25, 2 / 3)):
        mixed = mixture_logits(pi + 3.0, ref - 1.0, share=share).exp()
        assert float(mixed[0, 0]) == pytest.approx(first) and float(mixed.sum()) == pytest.approx(1.0)


def test_every_option_changes_something() -> None:
    table = logits(2).requires_grad_(True)
    batch = reply_batch(table, token_logps(logits(4)), PREFER.mean(-1))
    grads = [
        torch.autograd.grad(n(batch).value, table, retain_graph=True)[0] for n in (Nash(), Nash(kl=0.5), Nash(cap=0.5))
    ]
    assert not torch.allclose(grads[0], grads[1], rtol=1e-3) and not torch.allclose(grads[0], grads[2], rtol=1e-3)


@pytest.mark.parametrize("options", [{"kl": -0.1}, {"cap": 0.0}, {"kl": math.nan}])
def test_an_option_that_makes_no_sense_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        Nash(**options)
