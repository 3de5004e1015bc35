"""Shares and intervals, worked by hand; differences are paired, item by item."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.loop.evaluate import (
    METRICS,
    Answers,
    compare,
    evaluate,
    known_withheld,
    paired_difference,
    share,
    shares,
)
from tutelage.loop.outcomes import Outcome
from tutelage.records import Generation, Kind, Message, Prompt, SamplerSettings, SuiteItem

OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "abstained", "asked_back")


def item(number: int, kind: Kind) -> SuiteItem:
    references = ("Paris",) if kind == "answerable" else ()
    return SuiteItem(Prompt(f"i{number}", (Message("user", f"Question {number}?"),)), kind, references)


def answers(version: str, *parts: tuple[Kind, Sequence[Outcome]]) -> Answers:
    rows = [(kind, o) for kind, outcomes in parts for o in outcomes]
    items = tuple(item(n, kind) for n, (kind, _) in enumerate(rows))
    return Answers("suite", version, items, ("",) * len(rows), tuple(o for _, o in rows))


def test_wilsons_interval_by_hand() -> None:
    # p = 0.8, n = 10, z^2 = 3.8415: middle (0.8 + 0.19207) / 1.38415, half 1.95996 sqrt(0.0256037) / 1.38415
    assert share(8, 10) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-6)
    # p = 0: middle and half are both 0.19207 / 1.38415
    assert share(0, 10) == pytest.approx((0.0, 0.0, 0.277533), abs=1e-6)
    assert share(10, 10) == pytest.approx((1.0, 0.722467, 1.0), abs=1e-6)
    assert share(0, 0) == (None, None, None)
    # 90%: z^2 = 2.70554; (0.5 + 0.135277) / 1.270554, 1.644854 sqrt(0.025 + 0.00676386) / 1.270554
    assert share(5, 10, confidence=0.9) == pytest.approx((0.5, 0.269270, 0.730730), abs=1e-5)


def test_the_paired_interval_by_hand() -> None:
    # 10 pairs, 4 won and 1 lost; half a pair a cell: m = 12, middle (4.5 - 1.5) / 12 = 0.25,
    # half 1.959964 sqrt(6 - 9/12) / 12 = 0.374236.
    before = [False] * 4 + [True] + [True] * 3 + [False] * 2
    after = [True] * 4 + [False] + [True] * 3 + [False] * 2
    assert paired_difference(before, after) == pytest.approx((0.3, -0.124236, 0.624236), abs=1e-6)
    # Nothing changed in 10 pairs: middle 0, half 1.959964 sqrt(1) / 12.
    assert paired_difference(before, before) == pytest.approx((0.0, -0.163330, 0.163330), abs=1e-6)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_a_paired_interval_turns_with_the_pair_and_narrows_with_more_evidence(pairs: list[tuple[bool, bool]]) -> None:
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    difference, low, high = paired_difference(before, after)
    back, below, above = paired_difference(after, before)
    assert (back, below, above) == pytest.approx((-difference, -high, -low))
    assert -1.0 <= low <= high <= 1.0
    _, sure_low, sure_high = paired_difference(before, after, confidence=0.99)
    assert sure_low <= low and high <= sure_high
    _, many_low, many_high = paired_difference(before * 9, after * 9)
    assert many_high - many_low < high - low


@given(st.integers(0, 60), st.integers(0, 60))
def test_wilson_covers_its_share(hits: int, misses: int) -> None:
    p, low, high = share(hits, hits + misses)
    if hits + misses:
        assert p is not None and low is not None and high is not None
        assert 0.0 <= low <= p + 1e-12 and p - 1e-12 <= high <= 1.0


def test_every_metric_by_hand() -> None:
    found = shares(
        answers(
            "v",
            ("answerable", ["correct", "correct", "wrong", "abstained", "asked_back"]),
            ("unanswerable", ["wrong", "abstained", "asked_back", "abstained"]),
            ("ambiguous", ["asked_back", "abstained"]),
        )
    )
    assert {name: value for name, (value, _, _) in found.items()} == pytest.approx({
        "correct_answerable": 2 / 5,
        "abstained_answerable": 1 / 5,
        "made_up_unanswerable": 1 / 4,
        "asked_back_ambiguous": 1 / 2,
        "accuracy_answered": 2 / 3,  # abstaining and asking back are not in the denominator
    })  # fmt: skip
    assert set(found) == set(METRICS)


def test_a_kind_that_is_not_there_has_no_share() -> None:
    found = shares(answers("v", ("ambiguous", ["wrong"])))
    assert found["correct_answerable"] == (None, None, None)
    assert found["asked_back_ambiguous"][0] == 0.0
    by_name = {
        e.metric: e for e in compare(answers("a", ("ambiguous", ["wrong"])), answers("b", ("ambiguous", ["wrong"])))
    }
    assert by_name["correct_answerable"].low is None and by_name["correct_answerable"].n == 0


def test_differences_are_paired() -> None:
    before = answers("a", ("answerable", ["correct"] * 6 + ["wrong"] * 4))
    after = answers("b", ("answerable", ["correct"] * 5 + ["wrong"] + ["correct"] * 4))
    found = {e.metric: e for e in compare(before, after)}["correct_answerable"]
    assert (found.before, found.after, found.n) == (0.6, 0.9, 10)
    assert (found.low, found.high) == pytest.approx((-0.124236, 0.624236), abs=1e-6)  # 4 won, 1 lost


def test_the_bootstrap_interval_holds_the_difference_and_repeats() -> None:
    outcomes: list[Outcome] = ["correct", "wrong", "abstained", "correct", "wrong"] * 12
    better: list[Outcome] = ["correct", "correct", "abstained", "correct", "wrong"] * 12
    before, after = answers("a", ("answerable", outcomes)), answers("b", ("answerable", better))
    found, again = ({e.metric: e for e in compare(before, after)}["accuracy_answered"] for _ in range(2))
    assert found == again
    assert (found.before, found.after) == (0.5, 0.75)
    assert found.low is not None and found.high is not None
    assert 0.05 < found.low < 0.25 < found.high < 0.45
    # For one share of n items the normal interval is near: 12 of 48 pairs changed.
    normal = 1.96 * math.sqrt(12 / 48 - (12 / 48) ** 2) / math.sqrt(48)
    assert (found.high - found.low) / 2 == pytest.approx(normal, rel=0.35)


def test_a_ratio_without_a_denominator_has_no_interval() -> None:
    silent = answers("a", ("answerable", ["abstained"] * 4))
    found = {e.metric: e for e in compare(silent, silent)}["accuracy_answered"]
    assert (found.before, found.after, found.low, found.high) == (None, None, None, None)


def test_what_was_known_and_is_now_withheld() -> None:
    before = answers("a", ("answerable", ["correct"] * 5 + ["wrong"] * 5), ("unanswerable", ["abstained"] * 3))
    after = answers(
        "b",
        ("answerable", ["correct", "abstained", "asked_back", "wrong", "correct"] + ["abstained"] * 5),
        ("unanswerable", ["abstained"] * 3),
    )
    found = known_withheld(before, after)
    assert (found.metric, found.before, found.after, found.n) == ("abstained_known", 0.0, 0.4, 5)
    # Wilson with 2 of 5.
    assert (found.low, found.high) == pytest.approx((0.117621, 0.769277), abs=1e-5)
    nothing = known_withheld(answers("a", ("answerable", ["wrong"])), answers("b", ("answerable", ["wrong"])))
    assert (nothing.after, nothing.n) == (None, 0)


class Scripted:
    """Answers from a list, and keeps how it was asked."""

    def __init__(self, replies: list[str]) -> None:
        self.replies, self.asked = replies, []  # type: ignore[var-annotated]

    def generate(self, prompts, *, samples, settings, seed, version, progress=lambda _: None):  # type: ignore[no-untyped-def]
        self.asked.append((samples, settings))
        progress(len(prompts))
        return [
            [Generation(f"g{n}", p.id, 0, text, (1,), (0.0,), True, settings, version, seed)]
            for n, (p, text) in enumerate(zip(prompts, self.replies, strict=True))
        ]


def test_evaluation_is_greedy_and_judged_item_by_item() -> None:
    items = [item(0, "answerable"), item(1, "unanswerable"), item(2, "ambiguous")]
    engine = Scripted(["It is Paris.", "I don't know.", "Could you tell me which one you mean?"])
    done = []
    found = evaluate(engine, items, suite="s", version="v", max_new_tokens=9, progress=done.append)
    assert found.outcomes == ("correct", "abstained", "asked_back")
    assert found.replies[1] == "I don't know."
    assert engine.asked == [(1, SamplerSettings(temperature=0.0, max_new_tokens=9))]
    assert sum(done) == 3
    assert found.of("answerable") == ["correct"]
