"""Numbers to show: taken from the rows as they are, gaps kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.studio.figures import curves, gate_shares, measures, share_bars, thin


def row(unit, step, stage, **values):
    return {"unit": unit, "step": step, "stage": stage, "values": values}


def outcome(version, kind, result):
    return {"version": version, "kind": kind, "outcome": result}


@pytest.mark.parametrize(
    ("metric", "low", "high", "reading"),
    [
        ("made_up_unanswerable", -0.3, -0.1, "better"),
        ("made_up_unanswerable", 0.1, 0.3, "worse"),
        ("correct_answerable", 0.1, 0.3, "better"),
        ("correct_answerable", -0.3, -0.1, "worse"),
        ("correct_answerable", -0.1, 0.3, "unclear"),
        ("correct_answerable", 0.0, 0.3, "unclear"),
        ("never_heard_of", 0.1, 0.3, "changed"),
        ("correct_answerable", None, 0.3, "no interval"),
        ("correct_answerable", float("nan"), 0.3, "no interval"),
    ],
)
def test_a_change_is_clear_only_when_its_interval_leaves_zero_out(metric, low, high, reading):
    entry = {"suite": "s", "metric": metric, "before": 0.5, "after": 0.6, "low": low, "high": high, "n": 9}
    assert measures([entry])[0].reading == reading


def test_what_is_missing_or_not_finite_stays_missing():
    (m,) = measures([{"metric": "x", "before": None, "after": float("inf"), "low": "?", "n": None}])
    assert (m.before, m.after, m.low, m.high, m.difference, m.n) == (None, None, None, None, None, 0)
    assert measures(None) == ()


@given(st.integers(0, 5000), st.integers(2, 200))
def test_thinning_keeps_both_ends_and_the_order(count, most):
    kept = thin(count, most)
    assert len(kept) == min(count, most)
    assert kept == sorted(set(kept))
    if count:
        assert (kept[0], kept[-1]) == (0, count - 1)


def test_a_share_of_two_figures_and_a_gap():
    rows = [
        row("round-1", 1, "rollout", verdicts=8, verdicts_abstained=2, cost=0.1),
        row("round-2", 2, "rollout", verdicts=0, verdicts_abstained=0),
        row("round-3", 3, "rollout", verdicts=4),
    ]
    found = {c.title: c for c in curves(rows, {}, 0.08, 50)}
    # 2 / 8; nothing to divide by; nothing to divide.
    assert found["Abstained verdicts"].series[0].values == (0.25, None, None)
    assert found["Cost of caution"].series[0].values == (0.1, None, None)
    assert found["Cost of caution"].ticks == ("1", "2", "3")
    assert found["Cost of caution"].limit == 0.08
    assert found["Abstained verdicts"].limit is None
    assert "Multiplier" not in found


def test_terms_are_found_by_name_and_split_over_charts():
    names = ["fit", "principles", "a", "b", "c", "d"]
    rows = [row("round-1", 1, "rollout", **{f"term_{n}": 0.5 for n in names})]
    charts = [c for c in curves(rows, {}, None, 50) if c.title == "Reward by term"]
    assert [[s.name for s in c.series] for c in charts] == [names[:5], names[5:]]


def test_thinned_curves_say_how_many_points_there_were():
    rows = [row("supervised", i, "supervised", loss=float(i)) for i in range(1000)]
    (curve,) = curves(rows, {}, None, 10)
    assert (len(curve.ticks), curve.total) == (10, 1000)
    assert (curve.series[0].values[0], curve.series[0].values[-1]) == (0.0, 999.0)
    assert (curve.ticks[0], curve.ticks[-1]) == ("1", "1000")


def test_gate_shares_are_worked_out_by_hand():
    rows = [
        outcome("start", "unanswerable", "wrong"), outcome("start", "unanswerable", "wrong"),
        outcome("start", "unanswerable", "wrong"), outcome("start", "unanswerable", "abstained"),
        outcome("start", "answerable", "correct"), outcome("start", "answerable", "abstained"),
        outcome("r1", "ambiguous", "asked_back"),
    ]  # fmt: skip
    found = {r["unit"]: r["values"] for r in gate_shares(rows)}
    # 3 of 4 made up; 1 of 2 right; 1 of 2 withheld; no ambiguous question, so no share of them.
    assert found["start"] == {
        "made_up_unanswerable": 0.75, "correct_answerable": 0.5, "abstained_answerable": 0.5,
    }  # fmt: skip
    assert found["r1"] == {"asked_back_ambiguous": 1.0}
    (curve,) = curves(gate_shares(rows), {}, None, 50)
    assert curve.ticks == ("start", "r1")


def test_share_bars_count_every_reply_once_whatever_it_did():
    rows = [outcome("start", "answerable", o) for o in ("wrong", "correct", "correct", "sang")]
    before, after = share_bars(rows, ["answerable"], "start", "r1")
    assert before.counts == (("correct", 2), ("wrong", 1), ("sang", 1))
    assert before.n == 4
    assert (after.n, after.counts) == (0, ())
