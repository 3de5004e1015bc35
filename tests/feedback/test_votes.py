"""Soft labels and agreement, worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom

from tutelage.feedback.votes import VotePrior, agreement, fit_prior, krippendorff_alpha

votes = st.integers(0, 9).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def test_two_votes_a_pair_by_hand() -> None:
    """Two votes agree with probability (a + 1) / (2a + 1), so a share u of them gives a = (1 - u) / (2u - 1)."""
    assert fit_prior([(2, 2), (0, 2), (2, 2), (1, 2)]).a == pytest.approx(0.5, rel=1e-4)  # u = 3/4
    assert fit_prior([(2, 2), (0, 2), (1, 2)]).a == pytest.approx(1.0, rel=1e-4)  # u = 2/3
    assert fit_prior([(2, 2)] * 60 + [(1, 2)] * 40) == fit_prior([(0, 2)] * 60 + [(1, 2)] * 40)


def test_three_votes_a_pair_by_hand() -> None:
    """Three votes agree with probability (a + 2) / (2 (2a + 1)): half of them at a = 1."""
    found = fit_prior([(3, 3), (2, 3), (1, 3), (0, 3)])
    assert found.a == pytest.approx(1.0, rel=1e-4)
    assert (found.pairs, found.bound) == (4, "")


def test_a_tie_is_half_a_vote_for_each_side() -> None:
    """Uniform prior, two wins and a tie: (1 + 2.5) / (2 + 3)."""
    assert VotePrior().posterior(2.5, 3).mean == pytest.approx(0.7)
    assert VotePrior().posterior(0.5, 1).mean == 0.5


def test_posterior_by_hand() -> None:
    """Uniform prior: one vote gives Beta(2, 1), whose distribution function is x squared."""
    one = VotePrior().posterior(1, 1)
    assert one.mean == pytest.approx(2 / 3)
    assert one.logit == pytest.approx(math.log(2))
    assert (one.low, one.high) == (pytest.approx(math.sqrt(0.025)), pytest.approx(math.sqrt(0.975)))
    assert VotePrior(0.5).posterior(2, 3).mean == pytest.approx(2.5 / 4)
    assert VotePrior().posterior(0, 0).mean == 0.5
    assert VotePrior().posterior(1, 1, level=0.5).low == pytest.approx(0.5)  # sqrt(1/4)


def test_one_vote_a_pair_says_nothing_about_the_prior() -> None:
    assert fit_prior([(1, 1)] * 50 + [(0, 1), (0, 0)]) == VotePrior(1.0, 0, "")
    assert fit_prior([]) == VotePrior(1.0, 0, "")


def test_unanimous_and_even_votes_stay_finite() -> None:
    clear = fit_prior([(3, 3), (0, 3), (3, 3)])
    assert (clear.a, clear.bound) == (0.05, "least")
    assert clear.posterior(3, 3).mean == pytest.approx(3.05 / 3.1)
    assert clear.posterior(1, 1).logit == pytest.approx(math.log(21))
    even = fit_prior([(2, 4)] * 5)
    assert (even.a, even.bound) == (50.0, "most")


def test_impossible_counts_are_refused() -> None:
    for first, total in ((2, 1), (-1, 3)):
        with pytest.raises(ValueError, match="votes"):
            VotePrior().posterior(first, total)


def test_list_of_two_is_a_pair() -> None:
    prior = VotePrior(0.7)
    picked, other = prior.log_pick(2)
    assert picked - other == pytest.approx(prior.posterior(1, 1).logit)
    picked, other = prior.log_pick(4)
    assert math.exp(picked) + 3 * math.exp(other) == pytest.approx(1.0)
    assert VotePrior().log_pick(3) == (pytest.approx(math.log(1 / 2)), pytest.approx(math.log(1 / 4)))


def likelihood(counts: list[tuple[int, int]], a: float) -> float:
    return sum(float(betabinom.logpmf(k, n, a, a)) for k, n in counts if n >= 2)


@settings(max_examples=40)
@given(
    counts=st.lists(
        st.integers(2, 7).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=1, max_size=8
    ),
    a=st.floats(0.05, 50),
)
def test_no_other_prior_is_more_likely(counts: list[tuple[int, int]], a: float) -> None:
    """Against SciPy's beta-binomial."""
    assert likelihood(counts, fit_prior(counts).a) >= likelihood(counts, a) - 1e-7


@given(counts=st.lists(votes, max_size=8))
def test_naming_the_other_one_first_mirrors_everything(counts: list[tuple[int, int]]) -> None:
    prior, mirrored = fit_prior(counts), fit_prior([(n - k, n) for k, n in counts])
    assert prior.a == mirrored.a
    for k, n in counts:
        soft, other = prior.posterior(k, n), prior.posterior(n - k, n)
        assert soft.logit == pytest.approx(-other.logit, abs=1e-9)
        assert soft.low == pytest.approx(1 - other.high, abs=1e-9)
        assert 0 < soft.mean < 1 and 0 <= soft.low < soft.mean < soft.high <= 1


def test_a_known_spread_is_found_again() -> None:
    """3,000 pairs of 5 votes with shares from Beta(2, 2)."""
    dice = np.random.default_rng(0)
    wins = dice.binomial(5, dice.beta(2, 2, size=3000))
    assert fit_prior([(int(k), 5) for k in wins]).a == pytest.approx(2.0, rel=0.1)


# Agreement


def test_alpha_of_two_observers_by_hand() -> None:
    """Krippendorff 2011, section A: 14 zeros, 6 ones, 4 disagreements: 1 - 19 * 4 / (14 * 6) = 0.095."""
    meg = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    owen = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert krippendorff_alpha(list(zip(meg, owen, strict=True))) == pytest.approx(1 - 19 * 4 / 84)


def test_alpha_of_four_observers_with_missing_values() -> None:
    """Krippendorff 2011, section C and on: 0.743 nominal, 0.815 ordinal, 0.849 interval."""
    units = [(1, 1, 1), (2, 2, 3, 2), (3,) * 4, (3,) * 4, (2,) * 4, (1, 2, 3, 4), (4,) * 4, (1, 1, 2, 1), (2,) * 4,
             (5,) * 3, (1, 1), (3,)]  # fmt: skip
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(units, scale="ordinal") == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha(units, scale="interval") == pytest.approx(0.849, abs=5e-4)


def test_alpha_that_is_not_defined() -> None:
    assert krippendorff_alpha([(1,), (2,)]) is None
    assert krippendorff_alpha([(1, 1), (1, 1)]) is None
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([(1, 1), (2, 2)]) == 1.0


def test_agreement_on_pairs_by_hand() -> None:
    """Three of four equal. Turned both ways chance is 1/2, so kappa is (3/4 - 1/2) / (1/2).

    Alpha: 16 values, 8 of each, 2 of the 8 turned pairs differ: 1 - 15 * 2 / (8 * 8).
    """
    ann = {"p": 0, "q": 0, "r": 1, "s": 1, "only ann": 1}
    bob = {"p": 0, "q": 0, "r": 1, "s": 0}
    found = agreement({"bob": bob, "ann": ann}, choices=2)
    assert found.same == 0.75
    assert found.items == 4
    assert found.kappas == {("ann", "bob"): (pytest.approx(0.5), 4)}
    assert found.alpha == pytest.approx(1 - 15 * 2 / 64)


def test_who_is_number_one_does_not_matter() -> None:
    """In a file of preferences the better one is always first; that is no agreement by chance."""
    all_first = {"p": 0, "q": 0, "r": 0}
    found = agreement({"ann": all_first, "bob": {**all_first, "r": 1}}, choices=2)
    mixed = agreement({"ann": {"p": 0, "q": 1, "r": 0}, "bob": {"p": 0, "q": 1, "r": 1}}, choices=2)
    assert found == mixed
    assert found.kappas["ann", "bob"][0] == pytest.approx(1 / 3)
    assert agreement({"ann": all_first, "bob": all_first}, choices=2).alpha == 1.0


def test_a_tie_is_an_answer_of_its_own() -> None:
    """Same on 1 of 2. Turned: values 0, 1 once each and a tie twice a person: chance (1 + 1 + 4) / 16."""
    found = agreement({"ann": {"p": 0, "q": -1}, "bob": {"p": 0, "q": -1}, "cy": {"p": -1, "q": 0}}, choices=2)
    assert found.kappas["ann", "bob"][0] == pytest.approx(1.0)
    assert found.kappas["ann", "cy"][0] == pytest.approx((0 - 6 / 16) / (1 - 6 / 16))
    assert found.same == pytest.approx(2 / 6)


def test_kappa_of_ratings_weighs_by_squared_distance() -> None:
    """Observed 1/3; by chance (0+4+4 + 1+1+1 + 4+0+0) / 9 = 15/9: 1 - (1/3) / (15/9) = 0.8."""
    found = agreement({"ann": {"p": 1, "q": 2, "r": 3}, "bob": {"p": 1, "q": 3, "r": 3}})
    assert found.kappas == {("ann", "bob"): (pytest.approx(0.8), 3)}


def test_kappa_that_is_not_defined() -> None:
    assert agreement({"ann": {"p": 4}, "bob": {"p": 4}}).kappas == {("ann", "bob"): (None, 1)}
    assert agreement({"ann": {"p": 4}, "bob": {"q": 4}}).kappas == {("ann", "bob"): (None, 0)}
    alone = agreement({"ann": {"p": 4}})
    assert (alone.alpha, alone.same, alone.items, alone.kappas) == (None, None, 0, {})
