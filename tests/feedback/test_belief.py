"""Belief: what a question calls for, fused by hand from critic and consistency."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.feedback.belief import Belief, consistency_odds, fuse

weights = st.floats(0.01, 1.0)


def test_fusing_by_hand() -> None:
    # Odds of 1 with weight 2 ln 2: answerable doubles, unanswerable halves, ambiguous stays.
    found = fuse([0.3, 0.4, 0.3], 0.1, 1.0, weight=2 * math.log(2))
    assert found is not None
    assert [found.answerable, found.unanswerable, found.ambiguous] == pytest.approx([0.6 / 1.1, 0.2 / 1.1, 0.3 / 1.1])
    assert (found.spread, found.sources, found.kind) == (0.1, ("critic", "consistency"), "answerable")


def test_each_source_alone() -> None:
    critic = fuse([0.2, 0.7, 0.1], 0.05, None, weight=1.0)
    assert critic is not None
    assert (critic.of("unanswerable"), critic.kind, critic.sources) == (pytest.approx(0.7), "unanswerable", ("critic",))
    heard = fuse(None, 0.0, 2.0, weight=1.0)
    assert heard is not None
    assert heard.answerable == pytest.approx(1 / (1 + math.exp(-2))) and heard.ambiguous == 0.0
    assert fuse(None, 0.0, None, weight=1.0) is None


@given(st.tuples(weights, weights, weights), st.floats(-2, 2), st.floats(0, 3))
def test_a_belief_is_a_distribution_and_ambiguity_keeps_its_odds_to_the_geometric_mean(
    needs: tuple[float, float, float], odds: float, weight: float
) -> None:
    prior = [n / sum(needs) for n in needs]
    found = fuse(prior, 0.0, odds, weight=weight)
    assert found is not None
    assert found.answerable + found.unanswerable + found.ambiguous == pytest.approx(1.0)
    before = prior[2] / math.sqrt(prior[0] * prior[1])
    assert found.ambiguous / math.sqrt(found.answerable * found.unanswerable) == pytest.approx(before)
    shift = math.log(found.answerable / found.unanswerable) - math.log(prior[0] / prior[1])
    assert shift == pytest.approx(odds * weight, abs=1e-9)


def test_anything_is_certain_of_any() -> None:
    assert Belief(0.2, 0.3, 0.5, 0.0, ()).of("any") == 1.0
    assert Belief(0.2, 0.3, 0.5, 0.0, ()).as_dict() == {"answerable": 0.2, "unanswerable": 0.3, "ambiguous": 0.5}


def test_odds_by_hand() -> None:
    # Median of 0.1 .. 0.9 is 0.5, deviations 0.4 .. 0 .. 0.4 with median 0.2.
    cohesion = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, None]
    assert consistency_odds(cohesion) == pytest.approx([-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 0], abs=1e-3)


def test_too_few_to_compare_with_say_nothing() -> None:
    assert consistency_odds([0.1, 0.9, 0.5, None]) == [0.0] * 4
    assert consistency_odds([]) == []


@given(st.lists(st.floats(-1, 1), min_size=8, max_size=40))
def test_odds_are_bounded_keep_the_order_and_cannot_call_everything_unknown(cohesion: list[float]) -> None:
    odds = consistency_odds(list(cohesion))
    assert all(-2 <= o <= 2 for o in odds)
    ranked = [o for _, o in sorted(zip(cohesion, odds, strict=True))]
    assert ranked == sorted(ranked)
    assert sum(o >= 0 for o in odds) >= len(odds) // 2


@pytest.mark.parametrize(
    ("belief", "due"),
    [((0.5, 0.3, 0.2), 0.5), ((0.4, 0.35, 0.25), 0.4), ((0.4, 0.6, 0.0), 0.0), ((0.3, 0.2, 0.5), 0.0)],
)
def test_an_answer_is_due_only_where_it_is_the_most_likely_call(belief: tuple[float, float, float], due: float) -> None:
    assert Belief(*belief, 0.0, ()).answer_due == due
