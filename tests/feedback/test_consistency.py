"""Semantic entropy and its guard against stock phrases, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutelage.feedback.consistency import cluster, semantic_entropy, spread, stock_phrases

LN2 = math.log(2)


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane: their cosine is that of the angle between them."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def test_entropy_of_three_clusters_by_hand() -> None:
    """Shares 1/2, 1/4, 1/4: 1/2 ln 2 + 2 * 1/4 ln 4 = 1.5 ln 2."""
    assert semantic_entropy([0, 0, 1, 2]) == pytest.approx(1.5 * LN2)
    assert semantic_entropy([0, 1, 2]) == pytest.approx(math.log(3))
    assert semantic_entropy([0, 0, 0]) == 0.0


def test_weighted_entropy_by_hand() -> None:
    """Masses 0.2 + 0.4 and 0.2 of 0.8: 3/4 ln 4/3 + 1/4 ln 4; the weights' sum does not matter."""
    wanted = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert semantic_entropy([0, 0, 1], [0.2, 0.4, 0.2]) == pytest.approx(wanted)
    assert semantic_entropy([0, 0, 1], [2.0, 4.0, 2.0]) == pytest.approx(wanted)
    assert semantic_entropy([0, 1], [1.0, 0.0]) == 0.0


def test_weights_must_match_the_labels() -> None:
    with pytest.raises(ValueError, match="zip"):
        semantic_entropy([0, 1], [1.0])


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=12), seed=st.randoms(use_true_random=False))
def test_entropy_lies_between_one_opinion_and_all_different(labels: list[int], seed: object) -> None:
    entropy = semantic_entropy(labels)
    assert -1e-12 <= entropy <= math.log(len(set(labels))) + 1e-9
    assert (entropy < 1e-9) == (len(set(labels)) == 1)
    assert semantic_entropy(sorted(labels)) == pytest.approx(entropy)
    assert semantic_entropy([9 - n for n in labels]) == pytest.approx(entropy)  # names do not matter
    assert semantic_entropy(labels, [0.3] * len(labels)) == pytest.approx(entropy)


def test_clusters_follow_their_first_member() -> None:
    """cos 20 = 0.94, cos 40 = 0.77: 0 and 20 are one, 40 is too far from the first, near its own second."""
    assert cluster(at(0, 20, 40, 55, 180), same=0.9) == [0, 0, 1, 1, 2]
    assert cluster(at(0, 0, 0), same=0.99) == [0, 0, 0]
    assert cluster(at(0, 90, 180), same=0.5) == [0, 1, 2]
    assert cluster(at(), same=0.5) == []


def test_a_phrase_said_to_many_prompts_is_stock() -> None:
    """Everybody gets the phrase at 0 degrees; the other reply of each prompt is its own."""
    replies = [at(0, 60), at(1, 100), at(2, 140), at(0, 220)]
    assert stock_phrases(replies) == [[True, False]] * 4


def test_a_phrase_must_be_said_to_two_other_prompts() -> None:
    assert stock_phrases([at(0, 60), at(0, 100), at(200, 140)]) == [[False, False]] * 3
    assert stock_phrases([at(0, 60), at(0, 100), at(0, 140)]) == [[True, False]] * 3


def test_one_prompts_own_agreement_is_not_stock() -> None:
    """Five times the same within one prompt is what consistency is about."""
    assert stock_phrases([at(0, 0, 0, 0, 0), at(90), at(180), at(270)]) == [
        [False] * 5,
        [False],
        [False],
        [False],
    ]


def test_the_share_counts_with_many_prompts() -> None:
    """31 prompts, share 0.1: three of the other thirty are needed."""
    apart = [at(60 + 9 * n) for n in range(27)]
    three = [at(0), at(0), at(0), *apart, at(330)]
    four = [at(0), at(0), at(0), at(0), *apart]
    assert stock_phrases(three, near=0.999)[:3] == [[False]] * 3
    assert stock_phrases(four, near=0.999)[:4] == [[True]] * 4


def test_two_prompts_are_too_few_to_tell() -> None:
    assert stock_phrases([at(0, 0), at(0, 0)]) == [[False, False]] * 2


def test_spread_by_hand() -> None:
    """Six replies, one of them stock: clusters of 2, 2 and 1 of five.

    Agreement is the share of the other four: 1/4, 1/4 and 0. Entropy: 2 * 0.4 ln 2.5 + 0.2 ln 5.
    """
    found = spread(at(0, 5, 90, 0, 95, 180), [False, False, False, True, False, False], [-1.0] * 6, same=0.9)
    assert found.labels == (0, 0, 1, -1, 1, 2)
    assert found.agreement == (0.25, 0.25, 0.25, None, 0.25, 0.0)
    wanted = 0.8 * math.log(2.5) + 0.2 * math.log(5)
    assert found.entropy == pytest.approx(wanted)
    assert found.weighted_entropy == pytest.approx(wanted)  # equally likely replies
    assert found.usable == 5


def test_spread_weighs_by_probability_and_measures_cohesion() -> None:
    """Weights e^-1, e^-1, e^-2 and cosines cos 0 = 1, cos 90 = 0 twice: mean 1/3."""
    found = spread(at(0, 0, 90), [False] * 3, [-1.0, -1.0, -2.0], same=0.9)
    a, b = 2 * math.exp(-1), math.exp(-2)
    share = a / (a + b)
    assert found.weighted_entropy == pytest.approx(-share * math.log(share) - (1 - share) * math.log(1 - share))
    assert found.entropy == pytest.approx(math.log(3) - 2 / 3 * LN2)
    assert found.cohesion == pytest.approx(1 / 3)
    assert found.agreement == (0.5, 0.5, 0.0)


@pytest.mark.parametrize("stock", [[True, True, True], [True, False, True]])
def test_collapse_onto_a_stock_phrase_measures_nothing(stock: list[bool]) -> None:
    """Without the guard three equal replies would look like perfect knowledge."""
    found = spread(at(0, 0, 0), stock, [-1.0] * 3, same=0.9)
    assert (found.entropy, found.weighted_entropy, found.cohesion) == (None, None, None)
    assert found.agreement == (None, None, None)
    assert found.usable == stock.count(False)
