"""Prediction-powered means: coverage, width, the formula by hand, and another implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tutelage.errors import InputError
from tutelage.feedback.ppi import ppi_mean


def test_by_hand():
    """y = 1, 0, 1, 1; f = 1, 0, 0, 1; others 1, 1, 0, 0, 1, 0. lam = 0.5:

    mean(y - f/2) = (.5 + 0 + 1 + .5) / 4 = .5, + .5 * .5 = .75.
    """
    y, f, g = np.array([1.0, 0, 1, 1]), np.array([1.0, 0, 0, 1]), np.array([1.0, 1, 0, 0, 1, 0])
    found = ppi_mean(y, f, g, lam=0.5)
    assert found.estimate == pytest.approx(0.75)
    variance = np.array([0.5, 0, 1, 0.5]).var(ddof=1) / 4 + 0.25 * 0.3 / 6
    assert found.high - found.estimate == pytest.approx(3.182446 * math.sqrt(variance), rel=1e-6)  # Student, 3 degrees
    alone = ppi_mean(y, f, g, lam=0.0)
    assert alone.estimate == pytest.approx(0.75) and alone.effective == pytest.approx(4.0)


def simulate(draw, n, total, bias=0.2):
    truth = draw.normal(size=n + total)
    judge = 0.8 * truth + bias + 0.6 * draw.normal(size=n + total)
    return truth[:n], judge[:n], judge[n:]


def test_intervals_hold_the_truth_as_often_as_they_say_though_the_judge_is_biased():
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        found = ppi_mean(*simulate(draw, 100, 1000), level=0.9)
        held += found.low <= 0.0 <= found.high
    assert 0.88 <= held / 2000 <= 0.92


def test_the_width_is_the_formulas():
    """Variance against people alone: 1 - rho^2 N / (n + N), here rho = 0.8, n = 200, N = 2,000."""
    draw = np.random.default_rng(1)
    widths = []
    for _ in range(400):
        y, f, g = simulate(draw, 200, 2000)
        with_judge, alone = ppi_mean(y, f, g), ppi_mean(y, f, g, lam=0.0)
        widths.append((with_judge.high - with_judge.low) / (alone.high - alone.low))
    expected = math.sqrt(1 - 0.64 * 2000 / 2200)
    assert np.mean(widths) == pytest.approx(expected, rel=0.03)


def test_a_judge_that_knows_nothing_is_left_out():
    draw = np.random.default_rng(2)
    y, f, g = draw.normal(size=300), draw.normal(size=300), draw.normal(size=3000)
    assert ppi_mean(y, f, g).lam < 0.1
    assert ppi_mean(y, np.ones(300), np.ones(3000)).lam == 0.0


def test_another_implementation_agrees():
    ppi_py = pytest.importorskip("ppi_py", reason="the oracle ppi-python is not installed")
    y, f, g = simulate(np.random.default_rng(3), 500, 5000)
    low, high = ppi_py.ppi_mean_ci(y, f, g, alpha=0.1, lam=0.5)
    found = ppi_mean(y, f, g, level=0.9, lam=0.5)
    assert (found.low, found.high) == pytest.approx((float(np.ravel(low)[0]), float(np.ravel(high)[0])), rel=5e-3)


def test_wrong_input_is_explained():
    for y, f, g in (([1.0], [1.0], [1.0]), ([1.0, 0], [1.0], [1.0]), ([1.0, math.nan], [1.0, 0], [1.0])):
        with pytest.raises(InputError):
            ppi_mean(np.array(y), np.array(f), np.array(g))
    with pytest.raises(InputError, match="beyond"):
        ppi_mean(np.array([1.0, 0]), np.array([1.0, 0]), np.array([]), lam=1.0)
