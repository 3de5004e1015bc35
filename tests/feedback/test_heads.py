"""Heads against scikit-learn and by hand: predictions, folds, quality figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tutelage.feedback.heads import Committee, Head, quality


def clouds(count: int, *, labels: int, features: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clouds, one a label, on scales that differ by a thousand."""
    random = np.random.default_rng(seed)
    y = np.arange(count) % labels
    x = random.normal(size=(count, features)) + 2 * random.normal(size=(labels, features))[y]
    return x * np.logspace(-1.5, 1.5, features) + 5.0, y


@pytest.mark.parametrize("labels", [2, 3])
def test_a_head_predicts_what_scikit_learn_does(labels: int) -> None:
    x, y = clouds(90, labels=labels)
    head = Head.fit(x, y, labels, 0.5)
    fresh, _ = clouds(40, labels=labels, seed=1)
    scaled = [(part - x.mean(0)) / (x.std(0) + 1e-6) for part in (x, fresh)]
    model = LogisticRegression(C=0.5, max_iter=1000).fit(scaled[0], y)
    assert np.allclose(head.predict(fresh), model.predict_proba(scaled[1]), atol=1e-8)
    assert np.allclose(head.predict(fresh).sum(1), 1.0)
    assert (head.predict(x).argmax(1) == y).mean() > 0.7


def test_a_label_that_never_occurs_gets_no_probability() -> None:
    x, y = clouds(60, labels=2)
    got = Head.fit(x, np.where(y == 1, 2, 0), 3, 0.5).predict(x)
    assert got[:, 1].max() < 1e-6
    assert (got.argmax(1) == np.where(y == 1, 2, 0)).mean() > 0.7


def test_a_constant_feature_harms_nothing() -> None:
    x, y = clouds(60, labels=3)
    with_constant = np.concatenate([x, np.full((60, 1), 7.0)], 1)
    assert np.isfinite(Head.fit(with_constant, y, 3, 0.5).predict(with_constant)).all()


def test_extreme_features_do_not_overflow() -> None:
    x, y = clouds(60, labels=3)
    got = Head.fit(x, y, 3, 0.5).predict(x * 1e6)
    assert np.isfinite(got).all()
    assert np.allclose(got.sum(1), 1.0)


def test_quality_by_hand() -> None:
    """Four questions with the top label right, right, wrong, wrong.

    Accuracy 2/4. Brier: (0.1^2 + 0.1^2) + (0.4^2 + 0.3^2 + 0.1^2) + (0.9^2 + 0.9^2) + (0.6^2 + 0.6^2)
    = 0.02 + 0.26 + 1.62 + 0.72 = 2.62, over four 0.655. Calibration: the two sure at 0.9 are right
    half the time, |0.5 - 0.9| * 2/4; the two at 0.6 too, |0.5 - 0.6| * 2/4; together 0.25.
    """
    p = np.array([[0.9, 0.1, 0.0], [0.6, 0.3, 0.1], [0.9, 0.1, 0.0], [0.4, 0.6, 0.0]])
    got = quality(p, np.array([0, 0, 1, 0]))
    assert got == pytest.approx({"accuracy": 0.5, "brier": 0.655, "ece": 0.25})


def test_certainty_has_a_bin_too() -> None:
    got = quality(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1]))
    assert got == pytest.approx({"accuracy": 0.5, "brier": 1.0, "ece": 0.5})


# ---- committees ------------------------------------------------------------------------------


def crossed(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two labels by whether two hidden signs agree, seen in noisy copies: no linear head can tell."""
    random = np.random.default_rng(seed)
    signs = random.choice([-1.0, 1.0], size=(count, 2))
    x = np.tile(signs, 12) + random.normal(scale=0.7, size=(count, 24))
    return x.astype(np.float32), (signs.prod(1) > 0).astype(int)


def test_a_committee_learns_what_no_linear_head_can() -> None:
    x, y = crossed(1000)
    fresh, truth = crossed(300, seed=1)
    linear = (Head.fit(x, y, 2, 1.0).predict(fresh).argmax(1) == truth).mean()
    assert linear < 0.65
    committee, unseen = Committee.fit(x, y, 2)
    assert (committee.votes(fresh).mean(0).argmax(1) == truth).mean() > 0.9
    assert (unseen.argmax(1) == y).mean() > 0.9


def test_unseen_probabilities_are_those_of_the_member_that_did_not_see_the_row() -> None:
    """Labels drawn at random can be learned by heart, never foretold: honest figures stay at chance."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(300, 400)).astype(np.float32), random.integers(0, 3, 300)
    committee, unseen = Committee.fit(x, y, 3)
    assert np.allclose(unseen.sum(1), 1.0, atol=1e-5)
    assert (committee.votes(x).mean(0).argmax(1) == y).mean() > 0.8
    assert (unseen.argmax(1) == y).mean() < 0.45
    # Each row has one member that says of it what `unseen` says.
    same = np.isclose(committee.votes(x), unseen[None], atol=1e-4).all(-1)
    assert same.any(0).all()


def test_a_committee_is_the_same_again_and_leaves_the_random_state_alone() -> None:
    x, y = clouds(90, labels=3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, _ = Committee.fit(x, y, 3)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    two, _ = Committee.fit(x, y, 3)
    assert np.array_equal(one.votes(x), two.votes(x))
    other, _ = Committee.fit(x, y, 3, seed=1)
    assert not np.array_equal(one.votes(x), other.votes(x))


def test_votes_are_probabilities_whatever_the_features() -> None:
    x, y = clouds(90, labels=3)
    committee, _ = Committee.fit(x, y, 3, members=4)
    votes = committee.votes(x * 1e4)
    assert votes.shape == (4, 90, 3)
    assert np.isfinite(votes).all()
    assert np.allclose(votes.sum(-1), 1.0)
    again = Committee.of(committee.tensors())
    assert np.array_equal(again.votes(x), committee.votes(x))
