"""Fusion: better than each of its sources, sure of the right things, and undisturbed by silence."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.errors import InputError
from tutelage.feedback.fusion import fit_fusion, reliability


def world(seed, count=3000, strengths=(1.0, 0.8, 0.6), missing=0.0):
    """Items with a hidden answer; each source sees it through noise of its own and gives its log-odds."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, 2, size=count)
    sign = 2 * truth - 1
    odds = np.stack([2 * s * (s * sign + draw.normal(size=count)) for s in strengths], axis=1)
    odds[draw.random(odds.shape) < missing] = np.nan
    return odds, truth


def labelled(truth, count):
    return np.where(np.arange(len(truth)) < count, truth, -1)


def accuracy(log_odds, truth):
    return float(((log_odds > 0) == (truth == 1)).mean())


def test_fifty_labels_beat_every_source_on_held_out_items():
    gains = []
    for seed in range(20):
        odds, truth = world(seed)
        fused = fit_fusion(odds, labelled(truth, 50)).fuse(odds[50:])
        best = max(accuracy(odds[50:, j], truth[50:]) for j in range(odds.shape[1]))
        gains.append(accuracy(fused.log_odds_N, truth[50:]) - best)
    assert min(gains) > 0.0
    assert np.median(gains) > 0.03


def test_an_adversary_gets_a_weight_below_zero_and_a_coin_hardly_any():
    draw = np.random.default_rng(0)
    odds, truth = world(0)
    coin = draw.normal(size=(len(truth), 1))
    both = np.concatenate([odds, -odds[:, :1] + draw.normal(size=(len(truth), 1)), coin], axis=1)
    fitted = fit_fusion(both, labelled(truth, 300))
    assert fitted.weight_J[3] < 0.0
    assert abs(fitted.weight_J[4]) < 0.3 * abs(fitted.weight_J[0])


def test_probabilities_can_be_believed():
    odds, truth = world(3, count=6000)
    p = fit_fusion(odds, labelled(truth, 200)).fuse(odds[200:]).probability_N
    for low in (0.5, 0.7, 0.9):
        rows = (p >= low) & (p < low + 0.1)
        assert abs(float((truth[200:] == 1)[rows].mean()) - float(p[rows].mean())) < 0.06


def test_swapping_the_sides_turns_the_sign():
    odds, truth = world(4)
    label = labelled(truth, 50)
    one = fit_fusion(odds, label).fuse(odds[:20])
    other = fit_fusion(-odds, np.where(label < 0, -1, 1 - label)).fuse(-odds[:20])
    assert one.log_odds_N == pytest.approx(-other.log_odds_N, abs=1e-6)


@given(st.integers(0, 2), st.integers(0, 200))
def test_an_abstention_changes_nothing_but_what_that_source_said(source, row):
    odds, truth = world(5, count=300)
    fitted = fit_fusion(odds, labelled(truth, 50))
    silent = odds.copy()
    silent[row, source] = np.nan
    before, after = fitted.fuse(odds), fitted.fuse(silent)
    others = np.arange(len(odds)) != row
    assert (before.log_odds_N[others] == after.log_odds_N[others]).all()
    assert after.sources_N[row] == before.sources_N[row] - 1
    said = np.clip(odds[row, source] / fitted.scale_J[source], -3, 3) * fitted.weight_J[source]
    assert after.log_odds_N[row] == pytest.approx(before.log_odds_N[row] - said)


def test_where_nobody_spoke_there_is_no_verdict():
    odds, truth = world(6, count=200)
    odds[7] = np.nan
    fused = fit_fusion(odds, labelled(truth, 50)).fuse(odds)
    assert math.isnan(fused.log_odds_N[7]) and math.isnan(fused.probability_N[7]) and fused.sources_N[7] == 0
    assert np.isfinite(np.delete(fused.log_odds_N, 7)).all()


def test_more_labels_make_it_surer():
    odds, truth = world(7)
    few, many = (fit_fusion(odds, labelled(truth, n)).fuse(odds).deviation_N.mean() for n in (20, 500))
    assert many < 0.5 * few


def test_reliability_by_hand():
    """3 right of 4: Beta(4, 2) has the mean 2/3; what is not known does not count."""
    odds = np.array([[1.0], [2.0], [-1.0], [-3.0], [np.nan], [0.0], [5.0]])
    label = np.array([1, 1, 0, 1, 1, 1, -1])
    ((mean, low, high, n),) = reliability(odds, label)
    assert (mean, n) == (pytest.approx(4 / 6), 4)
    assert (low, high) == pytest.approx((0.284, 0.947), abs=1e-3)


def test_wrong_input_is_explained():
    odds, truth = world(8, count=40)
    for bad in (truth[:10], np.full(40, 2)):
        with pytest.raises(InputError):
            fit_fusion(odds, bad)
    with pytest.raises(InputError):
        fit_fusion(odds, labelled(truth, 5)).fuse(odds[:, :2])


@pytest.mark.parametrize("labels", [50, 200])
def test_a_majority_of_liars_is_seen_through_and_the_optimum_is_found(labels):
    """Dawid-Skene takes three liars for the truth, so the prior is against every label: the hardest start."""
    from scipy.optimize import minimize

    from tutelage.feedback import fusion

    for seed in range(4):
        draw = np.random.default_rng(seed)
        truth = draw.integers(0, 2, size=1500)
        right = draw.random((1500, 4)) < np.array([0.85, 0.1, 0.1, 0.1])
        odds = np.where(right, 1.0, -1.0) * (2 * truth - 1)[:, None] * draw.uniform(0.5, 2.0, size=(1500, 4))
        label = labelled(truth, labels)
        fitted = fit_fusion(odds, label)
        assert accuracy(fitted.fuse(odds[-500:]).log_odds_N, truth[-500:]) > 0.9
        x, y = fusion._unit(odds[:labels], fitted.scale_J), truth[:labels].astype(float)
        prior = fusion._from_agreement(odds, label)
        best = minimize(fusion._loss, np.zeros(4), args=(x, y, prior), method="BFGS").fun
        assert fusion._loss(fitted.weight_J, x, y, prior) <= best + 1e-6
