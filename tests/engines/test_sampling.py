"""Draws follow the distribution they claim, and the recorded log-probabilities are that distribution's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from tutelage.engines.sampling import draw, shape_logits
from tutelage.errors import ModelError
from tutelage.records import SamplerSettings

LOGITS = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, 1.2, 0.3, -2.0])
SETTINGS = {
    "plain": SamplerSettings(),
    "cold": SamplerSettings(temperature=0.5),
    "hot": SamplerSettings(temperature=2.0),
    "top-k": SamplerSettings(top_k=4),
    "top-p": SamplerSettings(top_p=0.7),
    "all": SamplerSettings(temperature=0.8, top_k=6, top_p=0.85),
}
LAST_UNIFORM = float(np.nextafter(np.float32(1), np.float32(0)))


def expected(logits_V: np.ndarray, settings: SamplerSettings) -> np.ndarray:
    """Probabilities by the textbook, token by token."""
    p = np.exp(logits_V / settings.temperature - np.max(logits_V / settings.temperature))
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    keep = order[: settings.top_k] if settings.top_k else order
    p = np.where(np.isin(np.arange(len(p)), keep), p, 0.0)
    p /= p.sum()
    if settings.top_p < 1.0:
        kept, mass = [], 0.0
        for token in order:
            kept.append(token)
            mass += p[token]
            if mass >= settings.top_p:
                break
        p = np.where(np.isin(np.arange(len(p)), kept), p, 0.0)
        p /= p.sum()
    return p


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_draws_pass_a_chi_square_test_against_the_softmax(settings: SamplerSettings) -> None:
    n = 40_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(3))
    tokens, _ = draw(torch.tensor(LOGITS).float().repeat(n, 1), uniform, settings)
    p = expected(LOGITS, settings)
    counts = np.bincount(tokens.numpy(), minlength=len(p))
    assert counts[p == 0].sum() == 0
    assert chisquare(counts[p > 0], n * p[p > 0]).pvalue > 0.001


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_evenly_spread_numbers_give_every_token_its_exact_share(settings: SamplerSettings) -> None:
    """The draw inverts the cumulative distribution, so N even numbers miss each share by at most 1/N."""
    n = 10_000
    tokens, _ = draw(torch.tensor(LOGITS).repeat(n, 1), (torch.arange(n) + 0.5) / n, settings)
    share = np.bincount(tokens.numpy(), minlength=len(LOGITS)) / n
    assert np.abs(share - expected(LOGITS, settings)).max() <= 2 / n


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_recorded_log_probability_is_that_of_the_shaped_distribution(settings: SamplerSettings) -> None:
    logits = torch.tensor(LOGITS).repeat(200, 1)
    tokens, logp = draw(logits, torch.rand(200, generator=torch.Generator().manual_seed(0)), settings)
    table = shape_logits(logits, settings).log_softmax(-1)
    assert torch.allclose(logp, table.gather(1, tokens[:, None])[:, 0], atol=1e-6)
    assert np.allclose(logp.exp().numpy(), expected(LOGITS, settings)[tokens.numpy()], atol=1e-6)


def test_greedy_takes_the_argmax_and_records_the_untempered_log_probability() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(1)) * 3
    settings = SamplerSettings(temperature=0.0, top_k=3, top_p=0.5)
    for uniform in (0.0, 0.5, LAST_UNIFORM):
        tokens, logp = draw(logits, torch.full((50,), uniform), settings)
        assert torch.equal(tokens, logits.argmax(-1))
        assert torch.allclose(logp, logits.log_softmax(-1).amax(-1), atol=1e-6)


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    # Probabilities 0.5, 0.3, 0.15, 0.05: 0.79 needs two tokens (0.8); just above 0.8 needs three.
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for p, kept in ((0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.94, 3), (0.96, 4)):
        shaped = shape_logits(logits, SamplerSettings(top_p=p))
        assert int(torch.isfinite(shaped).sum()) == kept


def test_bfloat16_logits_are_shaped_in_float32() -> None:
    shaped = shape_logits(torch.randn(2, 9).bfloat16(), SamplerSettings(temperature=0.7))
    assert shaped.dtype == torch.float32


def test_a_token_without_mass_is_not_drawn_at_the_edges() -> None:
    """Banned first and last tokens: numbers at either end of [0, 1) must not reach them."""
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")]]).repeat(2, 1)
    tokens, logp = draw(logits, torch.tensor([0.0, LAST_UNIFORM]), SamplerSettings())
    assert tokens.tolist() == [1, 3]
    assert torch.isfinite(logp).all()


@given(
    values=st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=40),
    banned=st.integers(0, 2**40 - 1),
    uniform=st.one_of(st.just(0.0), st.just(LAST_UNIFORM), st.floats(0, LAST_UNIFORM, width=32)),
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1.0),
)
def test_whatever_is_masked_is_never_drawn(
    values: list[float], banned: int, uniform: float, temperature: float, top_k: int, top_p: float
) -> None:
    logits = torch.tensor([values])
    for token in range(1, len(values)):
        if banned >> token & 1:
            logits[0, token] = float("-inf")
    settings = SamplerSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    shaped = shape_logits(logits, settings)
    tokens, logp = draw(logits, torch.tensor([uniform]), settings)
    assert torch.isfinite(shaped[0, tokens[0]])
    assert torch.isfinite(logits[0, tokens[0]])
    assert -200 < float(logp[0]) <= 1e-6
    assert torch.isfinite(shaped).any()
    # What is kept is what is most likely: nothing dropped is above anything kept.
    dropped = logits[0][~torch.isfinite(shaped[0])]
    assert len(dropped) == 0 or dropped.max() <= logits[0][torch.isfinite(shaped[0])].min()


@given(rows=st.integers(2, 6), seed=st.integers(0, 10**6))
def test_a_row_is_drawn_alike_alone_and_in_company(rows: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 17, generator=random) * 2
    uniform = torch.rand(rows, generator=random)
    settings = SamplerSettings(temperature=0.9, top_k=9, top_p=0.9)
    together, together_logp = draw(logits, uniform, settings)
    for row in range(rows):
        alone, alone_logp = draw(logits[row : row + 1], uniform[row : row + 1], settings)
        assert int(alone) == int(together[row])
        assert abs(float(alone_logp) - float(together_logp[row])) < 1e-6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_finite_is_refused(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, float("nan"), 1.0]])
    with pytest.raises(ModelError, match="not finite"):
        draw(logits, torch.tensor([0.5, 0.5]), SamplerSettings(temperature=temperature))


@given(st.integers(1, 1100), st.integers(0, 2**31 - 1), st.sampled_from([0, 1, 7, 400]))
def test_a_draw_over_many_blocks_inverts_the_distribution(size: int, seed: int, top_k: int) -> None:
    """The token drawn at u is the first whose cumulative probability passes u, up to float32 rounding."""
    dice = np.random.default_rng(seed)
    logits = torch.from_numpy(dice.normal(scale=4.0, size=(16, size)).astype(np.float32))
    uniform = np.append(dice.random(14), [0.0, LAST_UNIFORM]).astype(np.float32)
    tokens, logps = draw(logits, torch.from_numpy(uniform), SamplerSettings(top_k=top_k))
    p = shape_logits(logits, SamplerSettings(top_k=top_k)).double().softmax(-1).numpy()
    upper = p.cumsum(1)
    for row, token in enumerate(tokens.tolist()):
        assert p[row, token] > 0.0
        assert upper[row, token] >= uniform[row] - 1e-5
        assert upper[row, token] - p[row, token] <= uniform[row] + 1e-5
        assert abs(float(logps[row]) - np.log(p[row, token])) < 1e-4
