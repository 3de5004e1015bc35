"""Which samples are shown: balanced, fixed, worst first; nothing invented for what is missing."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.studio.samples import (
    Card,
    Part,
    VerdictView,
    balanced,
    cards,
    clip,
    figures_of,
    heat_replies,
    pairs,
    tally,
    targets,
)


def told(item, version, outcome, kind="answerable"):
    return {
        "item": item, "version": version, "kind": kind, "form": "plain", "prompt": "?", "reply": outcome,
        "outcome": outcome, "reference": "",
    }  # fmt: skip


def verdict(subject, judge, value, reason="why"):
    return {"subject": subject, "judge": judge, "value": value, "reason": reason, "evidence": {}}


def reply(name, prompt="p"):
    return {
        "id": name, "unit": "round-1", "prompt_id": prompt, "text": "text", "finished": 1, "policy_version": "r0",
    }  # fmt: skip


@given(st.lists(st.sampled_from("abc"), max_size=60), st.integers(0, 40))
def test_no_group_is_favoured(groups, most):
    chosen = balanced(list(enumerate(groups)), lambda x: x[1], lambda x: x[0], most)
    assert len(chosen) == min(most, len(groups))
    assert len(set(chosen)) == len(chosen)
    taken = {g: sum(c[1] == g for c in chosen) for g in set(groups)}
    for group, count in taken.items():
        # A group that has more to give is never more than one behind another.
        if count < groups.count(group):
            assert count >= max(taken.values()) - 1


@pytest.mark.parametrize(
    ("text", "most", "shown"),
    [
        ("hello", 9, "hello"),
        ("hello", 3, "hel"),
        ("ae\u0301b", 2, "a"),  # not before the accent
        ("a\U0001f469\u200d\U0001f52cb", 2, "a"),  # not inside a joined emoji
        ("\u0301\u0301", 1, ""),
        (7, 5, "7"),
    ],
)
def test_a_text_is_cut_between_letters(text, most, shown):
    found = clip(text, most)
    assert (found.shown, found.length) == (shown, len(str(text)))
    assert found.cut == (len(shown) < len(str(text)))


@pytest.mark.parametrize(
    ("kind", "was", "now", "change"),
    [
        ("answerable", "wrong", "correct", "better"),
        ("answerable", "wrong", "abstained", "better"),
        ("answerable", "correct", "abstained", "worse"),
        ("answerable", "correct", "wrong", "worse"),
        ("unanswerable", "wrong", "asked_back", "better"),
        ("unanswerable", "abstained", "wrong", "worse"),
        ("ambiguous", "abstained", "asked_back", "better"),
        ("ambiguous", "wrong", "wrong", "same"),
    ],
)
def test_what_counts_as_better(kind, was, now, change):
    rows = [told("q", "start", was, kind), told("q", "r1", now, kind), told("other", "start", was, kind)]
    (pair,) = pairs(rows, "start", "r1", 100)
    assert (pair.item, pair.change) == ("q", change)


def test_a_card_keeps_abstentions_apart_from_low_values():
    found = cards(
        [reply("g1"), reply("g2"), reply("unjudged")],
        {"p": "Who?"},
        [
            verdict("g1", "critic", 0.9), verdict("g1", "constitution", 0.2), verdict("g1", "text", 1.0),
            verdict("g2", "critic", None, "abstains: too little is known"), verdict("g2", "text", 0.0),
        ],
        [{"generation_id": "g1", "total": 0.5, "terms": {"fit": 1.0, "text": None}, "raw": {"fit": 0.9}, "costs": {}}],
        {"fit": 1.0, "text": 0.2},
        100,
    )  # fmt: skip
    first, second = found
    # 0.9 - 0.2; the judge of form does not count.
    assert first.spread == pytest.approx(0.7)
    assert (first.abstained, first.group) == (0, "disagree")
    assert second.spread is None
    assert (second.abstained, second.group) == (1, "abstained: critic")
    assert (second.verdicts[0].value, second.verdicts[0].reason.shown) == (None, "too little is known")
    assert (first.rewarded, second.rewarded, second.total) == (True, False, None)
    assert first.parts[1] == Part("text", None, None, 0.2)


@pytest.mark.parametrize(("total", "answer"), [((1.0 * 0.8 + 0.5 * -0.4) / 1.5, True), (0.41, False), (None, None)])
def test_a_total_recomputes_from_the_terms_that_are_there(total, answer):
    parts = (Part("fit", 0.9, 0.8, 1.0), Part("principles", 0.3, -0.4, 0.5), Part("text", None, None, 0.2))
    blank = clip("", 1)
    card = Card(
        "g", "u", "r0", blank, blank, True, (VerdictView("critic", 0.9, blank, ()),), True, total, parts, (), None
    )
    assert card.recomputes is answer
    unknown = dataclasses.replace(card, parts=(*parts, Part("new", 0.1, 0.1, None)))
    assert unknown.recomputes is None


def test_evidence_is_grouped_in_its_own_order():
    evidence = {"kind": {"b": 0.5, "a": {"deep": -0.25}}, "n": 3, "none": None, "list": [1, 2]}
    assert figures_of(evidence) == (
        ("kind", (("b", "0.50"), ("a deep", "−0.25"))),
        ("", (("n", "3"), ("list", "2 values"))),
    )
    assert figures_of({"x": {str(i): 1.0 for i in range(50)}}, 3)[0][1] == tuple((str(i), "1.00") for i in range(3))


def credit(name, values, unit="round-1"):
    return {
        "generation_id": name, "unit": unit, "method": "last", "advantage": sum(values), "credit": values,
    }  # fmt: skip


def test_the_heat_map_shows_praise_and_blame_on_one_scale():
    rows = [
        credit("up", [0.8, 0.1]), credit("up2", [0.5, 0.1]), credit("down", [-0.4, 0.004]), credit("no-pieces", [1, 1]),
        credit("misfit", [3.0, 3.0]),
    ]  # fmt: skip
    generations = {r["generation_id"]: reply(r["generation_id"]) for r in rows}
    pieces = {"up": ["a", "b"], "up2": ["a", "b"], "down": ["c", "d"], "misfit": ["one"]}
    found = heat_replies(rows, generations, {"p": "Who?"}, pieces, 12, 100)
    # Of the two praised replies to the one prompt, the more praised; credit without fitting tokens is not shown.
    assert [h.id for h in found] == ["up", "down"]
    assert found[0].tokens == (("a", 0.8, 5), ("b", 0.1, 1))
    # -0.4 / 0.8 of five levels, rounded to even; 0.004 is too small to show.
    assert found[1].tokens == (("c", -0.4, -2), ("d", 0.004, 0))


def test_a_revision_stands_beside_what_the_model_had_said():
    rows = [
        {"prompt_id": "p", "text": "I don't know.", "origin": origin, "principle": "a", "reason": "r", "weight": 1.0}
        for origin in ("own", "revised")
    ]
    revised, own = targets(rows, {"p": "Who?"}, {"p": "It is Lurk."}, 10, 100)
    assert (revised.origin, revised.had_said.shown) == ("revised", "It is Lurk.")
    assert own.had_said is None
    assert tally(rows, "origin", "principle") == [(("own", "a"), 1), (("revised", "a"), 1)]
