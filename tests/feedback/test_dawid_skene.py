"""Dawid-Skene: planted confusions come back, correlated judges share their say, and another implementation agrees."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.errors import InputError
from tutelage.feedback.dawid_skene import dawid_skene, group_judges, grouped_dawid_skene

PLANTED = np.array(
    [
        [[0.9, 0.1], [0.2, 0.8]],
        [[0.8, 0.2], [0.3, 0.7]],
        [[0.7, 0.3], [0.1, 0.9]],
        [[0.85, 0.15], [0.15, 0.85]],
        [[0.2, 0.8], [0.7, 0.3]],  # an adversary
    ]
)


def cast(count, seed=0, planted=PLANTED, missing=0.0):
    draw = np.random.default_rng(seed)
    truth = (draw.random(count) < 0.4).astype(int)
    chance = planted[:, truth, 1].T
    votes = (draw.random(chance.shape) < chance).astype(int)
    votes[draw.random(votes.shape) < missing] = -1
    return votes, truth


def test_planted_confusions_are_recovered():
    votes, truth = cast(12_000)
    found = dawid_skene(votes)
    assert np.abs(found.confusion_JKK - PLANTED).max() < 0.03
    assert found.prior_K[1] == pytest.approx(truth.mean(), abs=0.03)


def test_it_beats_the_majority_and_uses_the_adversary():
    votes, truth = cast(1_000, seed=1)
    found = dawid_skene(votes).posterior_NK.argmax(1)
    majority = (votes.mean(1) > 0.5).astype(int)
    assert (found == truth).mean() > (majority == truth).mean() + 0.02


def test_votes_that_are_missing_say_nothing():
    votes, _ = cast(6_000, seed=2, missing=0.4)
    found = dawid_skene(votes)
    assert np.abs(found.confusion_JKK - PLANTED).max() < 0.06
    nobody = np.concatenate([votes, np.full((1, 5), -1)])
    again = dawid_skene(nobody)
    assert again.posterior_NK[-1] == pytest.approx(again.prior_K)
    assert again.abstained_N[-1] == 5
    assert again.posterior_NK[:-1] == pytest.approx(found.posterior_NK, abs=1e-6)


def copies(count, seed):
    """Three honest judges, and one more whose votes a second one copies nine times in ten."""
    draw = np.random.default_rng(seed)
    planted = np.array([[[0.75, 0.25], [0.25, 0.75]]] * 5)
    votes, truth = cast(count, seed, planted)
    same = draw.random(count) < 0.9
    votes[same, 4] = votes[same, 3]
    return votes, truth


def belief_error(posterior, truth):
    """How much surer the posterior is than it is right."""
    return float(posterior.max(1).mean() - (posterior.argmax(1) == truth).mean())


def test_a_copy_makes_the_plain_fit_too_sure_and_grouping_mends_it():
    votes, truth = copies(4_000, 3)
    plain = dawid_skene(votes)
    shared, grouping = grouped_dawid_skene(votes)
    assert (3, 4) in grouping.clusters
    assert grouping.weight_J[3] < 0.65 and grouping.weight_J[0] > 0.95
    assert belief_error(plain.posterior_NK, truth) > 0.03
    assert abs(belief_error(shared.posterior_NK, truth)) < 0.5 * belief_error(plain.posterior_NK, truth)
    # Agreement of the two alone looks like being right.
    assert plain.confusion_JKK[3, 0, 0] > shared.confusion_JKK[3, 0, 0]


def test_strangers_are_not_linked():
    votes, _ = cast(3_000, seed=4)
    assert all(len(c) == 1 for c in group_judges(votes).clusters)


def test_known_classes_are_held_and_help_the_others():
    errors = []
    for seed in range(10):
        votes, truth = cast(400, seed)
        known = np.where(np.arange(len(truth)) < 200, truth, -1)
        found = dawid_skene(votes, known_N=known)
        assert (found.posterior_NK[:200].argmax(1) == truth[:200]).all()
        assert found.posterior_NK[:200].max(1).min() == pytest.approx(1.0)
        errors.append([np.abs(f.confusion_JKK - PLANTED).mean() for f in (found, dawid_skene(votes))])
    held, free = np.mean(errors, axis=0)
    assert held < free


def test_crowd_kit_agrees_on_complete_data():
    pytest.importorskip("crowdkit", reason="the oracle crowd-kit is not installed")
    import pandas as pd
    from crowdkit.aggregation import DawidSkene

    votes, _ = cast(400, seed=6)
    table = pd.DataFrame(
        [(i, j, int(votes[i, j])) for i in range(len(votes)) for j in range(5)], columns=["task", "worker", "label"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas' about crowd-kit's own code
        fitted = DawidSkene(n_iter=2000, tol=1e-12).fit_predict_proba(table)
    theirs = fitted.sort_index()[[0, 1]].to_numpy()
    ours = dawid_skene(votes, smoothing=0.0, tolerance=1e-14, limit=5000).posterior_NK
    assert np.abs(ours - theirs).max() < 1e-3


@given(st.permutations(range(5)))
@settings(max_examples=10)
def test_the_order_of_judges_does_not_matter(order):
    votes, _ = cast(200, seed=7)
    one, other = dawid_skene(votes), dawid_skene(votes[:, order])
    assert other.posterior_NK == pytest.approx(one.posterior_NK, abs=1e-6)
    assert other.confusion_JKK == pytest.approx(one.confusion_JKK[list(order)], abs=1e-6)


@pytest.mark.parametrize("votes", [np.zeros((0, 2), int), np.array([[0.5, 1.0]]), np.array([[-2, 0]])])
def test_wrong_input_is_explained(votes):
    with pytest.raises(InputError):
        dawid_skene(votes)
