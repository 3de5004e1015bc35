"""Composition by hand, and the law of the missing: what is missing is never zero and harms nobody else."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tutelage.records import Reward
from tutelage.rewards.compose import compose, normalise


def rewards(
    raw: dict[str, list[float | None]], weights: dict[str, float], *, essential: tuple[str, ...] = ()
) -> list[Reward]:
    count = len(next(iter(raw.values())))
    ids = [f"g{n}" for n in range(count)]
    return compose(ids, raw, weights, [{"over_abstention": n / 10} for n in range(count)], essential=essential)


def test_normalise_by_hand() -> None:
    assert normalise([1.0, 2.0, 3.0]) == [-1.0, 0.0, 1.0]  # mean 2, deviation sqrt((1 + 0 + 1) / 2) = 1
    # Without the missing one: mean 2, deviation sqrt((1 + 1) / 1) = sqrt 2.
    assert normalise([1.0, None, 3.0]) == [
        pytest.approx(-1 / math.sqrt(2)),
        None,
        pytest.approx(1 / math.sqrt(2)),
    ]
    assert normalise([5.0, 5.0, None]) == [0.0, 0.0, None]  # all alike is an opinion: no difference
    assert normalise([5.0, None, None]) == [None, None, None]  # one alone cannot be compared
    assert normalise([None, None]) == [None, None]
    assert normalise([]) == []


def test_compose_by_hand() -> None:
    """Normalised: fit -1, 0, 1; text 1, 0, -1 on a scale a hundred times larger. Weights 3 and 1.

    (3 * -1 + 1 * 1) / 4 = -0.5;  0;  (3 * 1 - 1) / 4 = 0.5
    """
    got = rewards({"fit": [0.1, 0.2, 0.3], "text": [300.0, 200.0, 100.0]}, {"fit": 3.0, "text": 1.0})
    assert [r.total for r in got] == pytest.approx([-0.5, 0.0, 0.5])
    assert got[0].terms == pytest.approx({"fit": -1.0, "text": 1.0})
    assert got[2].raw == {"fit": 0.3, "text": 100.0}
    assert [r.costs for r in got] == [{"over_abstention": n / 10} for n in range(3)]
    assert [r.generation_id for r in got] == ["g0", "g1", "g2"]


def test_a_missing_terms_weight_is_shared() -> None:
    """Reply 1 has no fit: its total is its text term alone, 0 of weight 3, 0 / 1, not diluted to a quarter."""
    got = rewards({"fit": [0.0, None, 1.0], "text": [1.0, 3.0, 2.0]}, {"fit": 3.0, "text": 1.0})
    root = 1 / math.sqrt(2)
    assert got[1].terms == {"fit": None, "text": 1.0}
    assert got[1].total == pytest.approx(1.0)
    assert got[0].total == pytest.approx((3 * -root - 1) / 4)
    assert got[2].total == pytest.approx((3 * root + 0) / 4)


def test_nothing_known_is_no_reward() -> None:
    got = rewards({"fit": [None, 1.0, 2.0], "text": [None, 0.0, 1.0]}, {"fit": 1.0, "text": 1.0})
    assert got[0].total is None
    assert got[1].total is not None
    assert [r.total for r in rewards({"fit": [None, None]}, {"fit": 1.0})] == [None, None]


def test_text_alone_does_not_train_where_content_is_essential() -> None:
    raw: dict[str, list[float | None]] = {"fit": [None, 0.0, 1.0], "text": [1.0, 0.0, 0.5]}
    weights = {"fit": 1.0, "text": 1.0}
    assert rewards(raw, weights)[0].total is not None
    strict = rewards(raw, weights, essential=("fit", "principles"))
    assert strict[0].total is None
    assert strict[0].terms["text"] == pytest.approx(1.0)  # still shown
    assert strict[1].total is not None
    # An essential term that the recipe weighs with nothing has no voice.
    assert [r.total for r in rewards(raw, {"fit": 0.0, "text": 1.0}, essential=("fit",))] == [None] * 3


def test_terms_without_weight_are_shown_raw_and_take_no_part() -> None:
    got = rewards({"fit": [0.0, 1.0], "text": [9.0, -9.0]}, {"fit": 1.0, "absent": 5.0})
    assert got[1].total == pytest.approx(1 / math.sqrt(2))
    assert set(got[1].terms) == {"fit"}
    assert got[1].raw == {"fit": 1.0, "text": -9.0}


VALUE = st.one_of(st.none(), st.floats(-100, 100, width=32))


@st.composite
def groups(draw: st.DrawFn) -> dict[str, list[float | None]]:
    size = draw(st.integers(2, 6))
    return {name: draw(st.lists(VALUE, min_size=size, max_size=size)) for name in ("fit", "text", "consistency")}


WEIGHTS = {"fit": 1.0, "text": 0.2, "consistency": 0.5}


@given(raw=groups(), term=st.sampled_from(list(WEIGHTS)), index=st.integers(0, 5))
def test_a_verdict_that_goes_missing_is_never_a_zero_and_touches_no_other_raw_term(
    raw: dict[str, list[float | None]], term: str, index: int
) -> None:
    size = len(raw["fit"])
    index %= size
    assume(raw[term][index] is not None)
    before = rewards(raw, WEIGHTS)
    holed = {name: list(values) for name, values in raw.items()}
    holed[term][index] = None
    after = rewards(holed, WEIGHTS)
    assert after[index].raw[term] is None
    assert after[index].terms[term] is None
    for g in range(size):
        for name in raw:
            if (g, name) != (index, term):
                assert after[g].raw[name] == before[g].raw[name]
                if name != term:
                    assert after[g].terms[name] == before[g].terms[name]
    known = [name for name in WEIGHTS if after[index].terms[name] is not None]
    if known:
        mass = sum(WEIGHTS[name] for name in known)
        wanted = sum(WEIGHTS[name] * (after[index].terms[name] or 0.0) for name in known) / mass
        assert after[index].total == pytest.approx(wanted, abs=1e-9)
    else:
        assert after[index].total is None


@given(raw=groups())
def test_totals_are_the_composition_of_the_terms_shown(raw: dict[str, list[float | None]]) -> None:
    for g, reward in enumerate(rewards(raw, WEIGHTS)):
        assert {name: reward.raw[name] for name in raw} == {name: values[g] for name, values in raw.items()}
        known = {k: v for k, v in reward.terms.items() if v is not None}
        if not known:
            assert reward.total is None
            continue
        mass = sum(WEIGHTS[k] for k in known)
        assert reward.total == pytest.approx(sum(WEIGHTS[k] * v for k, v in known.items()) / mass, abs=1e-9)


@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=8),
    scale=st.floats(0.01, 100),
    shift=st.floats(-50, 50),
)
def test_no_term_is_louder_for_its_unit(values: list[float], scale: float, shift: float) -> None:
    assume(max(values) - min(values) > 0.1)
    once = normalise(values)
    again = normalise([scale * v + shift for v in values])
    for a, b in zip(once, again, strict=True):
        assert a is not None
        assert b == pytest.approx(a, abs=1e-3)
    assert sum(v or 0.0 for v in once) == pytest.approx(0.0, abs=1e-6)
    assert sum((v or 0.0) ** 2 for v in once) == pytest.approx(len(values) - 1, rel=1e-6)
