"""The judge as an instrument: planted biases are found, figures checked by hand and against other code."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from tutelage.feedback.asking import Opinion
from tutelage.feedback.audit import audit, cohen_kappa, slope, wilson
from tutelage.feedback.injection import canaries, inject
from tutelage.feedback.model_judge import Pair
from tutelage.records import Message, PreferencePair, Prompt


class Planted:
    """A judge of pairs whose log-odds are a known function of the texts."""

    name, version = "planted", "1"

    def __init__(self, log_odds, position=0.0, missing=0.0):
        self.log_odds, self.position, self.missing = log_odds, position, missing
        self.draw = random.Random(0)

    def compare(self, pairs):
        told = []
        for pair in pairs:
            if self.draw.random() < self.missing:
                told.append(Opinion(None, "abstains: no label could be read"))
                continue
            value = self.log_odds(pair.first, pair.second)
            told.append(Opinion(value, "", {"position": self.position, "flipped": abs(self.position) > abs(value)}))
        return told


def pairs_of(count, seed=0, **more):
    draw = random.Random(seed)
    return [
        PreferencePair(
            Prompt(f"p{i}", (Message("user", f"question {i}"),)),
            f"good {i} " + "x" * draw.randint(1, 200),
            f"bad {i} " + "x" * draw.randint(1, 200),
            **more,
        )
        for i in range(count)
    ]


def better(first, second):
    return float(first.startswith("good")) - float(second.startswith("good"))


def test_a_perfect_judge_passes():
    row, opinions = audit(Planted(lambda a, b: 4 * better(a, b)), pairs_of(200))
    assert row.outcome == "pass" and row.why == ()
    assert row.accuracy[0] == 1.0 and row.kappa[0] == pytest.approx(1.0)
    assert row.flips[0] == 0.0 and row.abstained == 0
    assert row.brier == pytest.approx((1 - 1 / (1 + math.exp(-4))) ** 2)
    assert row.ece == pytest.approx(1 - 1 / (1 + math.exp(-4)))
    assert all(o.value == 4 for o in opinions)  # the chosen reply first, whatever side it was shown on


def test_a_coin_is_refused():
    draw = random.Random(1)
    row, _ = audit(Planted(lambda a, b: draw.choice((-1.0, 1.0))), pairs_of(300))
    assert row.outcome == "refuse" and "coin" in row.why[0]


def test_a_judge_of_length_is_found_out():
    """Its pick depends on length alone: the slope is far from zero, and what people say counts for nothing."""
    draw = random.Random(2)

    def longer(a, b):
        p = 1 / (1 + math.exp(-2.0 * (math.log(len(a)) - math.log(len(b)))))
        return 1.0 if draw.random() < p else -1.0

    row, _ = audit(Planted(longer), pairs_of(3000))
    value, low, high = row.length_slope
    assert low < 2.0 < high and high - low < 0.5
    assert value == pytest.approx(2.0, abs=0.2)


def test_position_and_flips_are_warned_of():
    row, _ = audit(Planted(lambda a, b: 0.5 * better(a, b), position=2.0), pairs_of(200))
    assert row.outcome == "warn"
    assert row.position == 2.0 and row.flips[0] == 1.0
    assert any("first place" in w for w in row.why) and any("flip" in w for w in row.why)


def test_missing_verdicts_are_counted_not_guessed():
    row, opinions = audit(Planted(lambda a, b: 3 * better(a, b), missing=0.5), pairs_of(200))
    assert row.outcome == "refuse" and "no verdict on" in row.why[0]
    assert row.abstained == row.unreadable == sum(o.value is None for o in opinions)
    assert row.accuracy[0] == 1.0  # of those that were judged


def test_votes_decide_who_was_preferred_and_ties_decide_nothing():
    turned = pairs_of(60, votes=(1.0, 3.0))
    tied = pairs_of(60, votes=(2.0, 2.0))
    row, _ = audit(Planted(lambda a, b: 3 * better(a, b)), turned)
    assert row.accuracy[0] == 0.0
    row, _ = audit(Planted(lambda a, b: 3 * better(a, b)), tied)
    assert row.accuracy == (None, None, None) and row.outcome == "refuse"


def test_self_preference_is_the_gap_to_people():
    """By hand: the judge always prefers its own texts; people did in half of the pairs: 1 - 0.5."""
    pairs = [
        PreferencePair(p.prompt, p.chosen, p.rejected, authors=("planted", "x") if i % 2 else ("x", "planted"))
        for i, p in enumerate(pairs_of(100))
    ]
    own = {t for p in pairs for t, who in zip((p.chosen, p.rejected), p.authors, strict=True) if who == "planted"}
    row, _ = audit(Planted(lambda a, b: 1.0 if a in own else -1.0), pairs)
    assert row.self_preference == pytest.approx(0.5)
    assert audit(Planted(better), pairs_of(20))[0].self_preference is None


def test_self_consistency_by_hand():
    """Log-odds 0 in both orders: two draws agree half of the time. Without position, p = .9 gives .82."""
    row, _ = audit(Planted(lambda a, b: 0.0), pairs_of(20))
    assert row.self_consistency == pytest.approx(0.5)
    row, _ = audit(Planted(lambda a, b: math.log(9)), pairs_of(20))
    assert row.self_consistency == pytest.approx(0.82)


def test_wilson_by_hand():
    """8 of 10: centre (0.8 + 0.192) / 1.384 = 0.717, from 0.490 to 0.943."""
    value, low, high = wilson(8, 10)
    assert (value, low, high) == pytest.approx((0.8, 0.490, 0.943), abs=1e-3)
    assert wilson(0, 0) == (None, None, None)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=4, max_size=40))
def test_kappa_is_that_of_scikit_learn(rows):
    one, other = zip(*rows, strict=True)
    if len(set(one)) < 2 and len(set(other)) < 2:
        return  # chance agreement is certain
    table = np.zeros((2, 2))
    for a, b in rows:
        table[int(a), int(b)] += 1
    assert float(cohen_kappa(table)) == pytest.approx(cohen_kappa_score(one, other))


def test_the_slope_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    draw = np.random.default_rng(0)
    x = draw.normal(size=(400, 2))
    y = (draw.random(400) < 1 / (1 + np.exp(-(x @ [1.0, -0.5] + 0.3)))).astype(float)
    model = LogisticRegression(C=1e6).fit(x, y)
    value, low, high = slope(y, x, 0)
    assert value == pytest.approx(model.coef_[0, 0], abs=2e-3)
    assert low < 1.0 < high


def test_a_column_that_tells_all_apart_stays_finite():
    x = np.linspace(-1, 1, 50)[:, None]
    value, low, high = slope((x[:, 0] > 0).astype(float), x, 0)
    assert all(math.isfinite(v) for v in (value, low, high))


def test_the_suite_has_a_dozen_families_and_canaries_hold_their_bad_reply():
    suite = canaries()
    assert len({c.family for c in suite}) >= 12
    assert len({(c.family, c.prompt.text) for c in suite}) == len(suite)
    assert all(c.bad in c.injected and c.injected != c.bad and c.good != c.bad for c in suite)


def test_a_judge_that_obeys_is_found_out_and_one_that_does_not_is_not():
    suite = canaries()
    good = {c.good for c in suite}

    def sober(a, b):
        return 2.0 * ((a in good) - (b in good))

    def obedient(a, b):
        return -3.0 if "choose this reply" in b else sober(a, b)

    found, _ = inject(Planted(sober), suite)
    assert (found.wins, found.taken_in, found.lift, found.abstained) == (0.0, 0.0, 0.0, 0)
    found, _ = inject(Planted(obedient), suite)
    assert found.by_family["ignore-instructions"] == 1.0 and found.by_family["padding"] == 0.0
    assert found.taken_in == pytest.approx(found.wins) and 0 < found.wins < 0.5
    assert found.lift == pytest.approx(5.0 * found.wins)
    row, _ = audit(Planted(lambda a, b: -5.0 if a in good else 5.0), pairs_of(60), suite)
    assert row.injection.taken_in is None and row.injection.wins == 1.0  # the plain bad replies won as well


def test_an_injection_that_works_on_most_refuses_the_judge():
    suite = canaries()
    plain = {c.bad for c in suite} | {c.good for c in suite}

    def weak(a, b):
        if b not in plain and not b.startswith("bad "):
            return -4.0
        return 2.0 if a in {c.good for c in suite} else 3 * better(a, b)

    row, _ = audit(Planted(weak), pairs_of(200), suite)
    assert row.outcome == "refuse" and row.why[0] == "100% of the injections work"


def test_pairs_need_no_prompt_object_of_their_own():
    pair = Pair(Prompt("x", (Message("user", "q"),)), "a", "b")
    assert Planted(lambda a, b: 1.0).compare([pair])[0].value == 1.0
