"""The alarm: rarely without a change, soon after one."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tutelage.errors import InputError
from tutelage.feedback.drift import Cusum, action_of


def until_alarm(draw, shift, most):
    watch = Cusum(0.25)
    for look, z in enumerate(draw.normal(size=most), 1):
        if watch.update([0.25 * z + shift]) >= 1.0:
            return look
    return most


def test_it_alarms_once_in_five_hundred_looks_at_most_without_a_change():
    draw = np.random.default_rng(0)
    assert np.mean([until_alarm(draw, 0.0, 4000) for _ in range(300)]) >= 500


def test_a_shift_of_a_tenth_is_seen_within_sixty_looks():
    draw = np.random.default_rng(1)
    for shift in (0.1, -0.1):
        assert np.mean([until_alarm(draw, shift, 2000) for _ in range(300)]) <= 60


def test_by_hand():
    """sigma 1: 1, 1, -2 give sums .8, 1.6, 0 above and 0, 0, 1.8 below."""
    watch = Cusum(1.0)
    watch.update([1.0, 1.0])
    assert (watch.above, watch.below) == pytest.approx((1.6, 0.0))
    watch.update([-2.0])
    assert (watch.above, watch.below) == pytest.approx((0.0, 1.8))


def test_abstentions_change_nothing():
    watch = Cusum(1.0)
    watch.update([1.0, None, math.nan])
    assert (watch.above, watch.looks) == (0.8, 1)


def test_the_state_survives_a_checkpoint():
    watch = Cusum(0.5)
    watch.update([0.3, -0.2, 0.9])
    assert Cusum.load(json.loads(json.dumps(watch.state()))) == watch


def test_what_follows_from_a_level():
    assert action_of(0.99) == ("keep", 1.0)
    assert action_of(1.25) == ("down-weight", 0.8)
    assert action_of(2.0) == ("stop", 0.0)
    with pytest.raises(InputError):
        Cusum(0.0)
