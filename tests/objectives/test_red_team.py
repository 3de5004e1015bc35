"""The archive cell by cell, novelty by hand, and that what measures never trains."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.errors import InputError, RecipeError
from tutelage.objectives.red_team import (
    Archive,
    Attack,
    Sides,
    attack_success,
    attacker_reward,
    fluency,
)

SIDES = Sides(("ann", "bob"), ("eve",))


def attack(name: str, worth: float | None = 0.5, **change: Any) -> Attack:
    given = {"style": "plea", "topic": "locks", "attacker": "ann", "embedding": (1.0, 0.0)} | change
    return Attack(name, f"text of {name}", worth=worth, **given)


def archive() -> Archive:
    return Archive(("plea", "role"), ("locks", "drugs", "fraud"), SIDES)


def test_the_best_of_each_cell_is_kept() -> None:
    a = archive()
    assert a.add(attack("first", 0.4)).kept and a.coverage() == pytest.approx(1 / 6)
    equal = a.add(attack("equal", 0.4))
    assert not equal.kept and equal.reason == "the cell holds 'first', worth 0.4"
    better = a.add(attack("better", 0.7))
    assert better.kept and better.displaced == "first"
    assert a.add(attack("elsewhere", 0.1, topic="fraud")).displaced is None
    assert [x.id for x in a.training()] == ["better", "elsewhere"] and a.coverage() == pytest.approx(2 / 6)
    missing = a.add(attack("unknown", None, topic="drugs"))
    assert not missing.kept and missing.reason == "its worth is missing" and a.coverage() == pytest.approx(2 / 6)


@settings(max_examples=50)
@given(
    drawn=st.lists(st.tuples(st.sampled_from("pr"), st.sampled_from("lf"), st.integers(0, 5)), max_size=30),
)
def test_the_archive_holds_each_cells_maximum(drawn: list[tuple[str, str, int]]) -> None:
    a, best = Archive("pr", "lf", SIDES), dict[tuple[str, str], int]()
    for i, (style, topic, worth) in enumerate(drawn):
        a.add(attack(str(i), float(worth), style=style, topic=topic))
        best[style, topic] = max(worth, best.get((style, topic), -1))
    assert {(x.style, x.topic): x.worth for x in a.training()} == best


def test_novelty_by_hand() -> None:
    """(3, 4) against (1, 0): cosine 0.6, so 0.4; against (0, 1) as well: 0.8, so 0.2; opposite: 2."""
    a = archive()
    assert a.novelty((3.0, 4.0)) == 1.0
    assert a.add(attack("east")).novelty == 1.0
    assert a.novelty((3.0, 4.0)) == pytest.approx(0.4) and a.novelty((-2.0, 0.0)) == pytest.approx(2.0)
    a.add(attack("north", topic="drugs", embedding=(0.0, 9.0)))
    assert a.novelty((3.0, 4.0)) == pytest.approx(0.2)
    assert a.novelty((5.0, 0.0)) == pytest.approx(0.0)


def test_held_out_attackers_measure_and_never_train() -> None:
    """Eve's attack is worth more, in the same cell: it displaces nothing, and is all that measures."""
    a = archive()
    a.add(attack("hers", 0.9, attacker="eve", embedding=(0.0, 1.0)))
    assert a.novelty((0.0, 1.0)) == 1.0  # nor does an attacker in training learn that it exists
    assert a.novelty((0.0, 1.0), side="held_out") == pytest.approx(0.0)
    a.add(attack("his", 0.2, attacker="bob"))
    assert [x.id for x in a.training()] == ["his"] and [x.id for x in a.evaluation()] == ["hers"]
    assert a.coverage("held_out") == pytest.approx(1 / 6)
    with pytest.raises(InputError, match="no side"):
        a.add(attack("stranger", attacker="mallory"))


@settings(max_examples=60)
@given(
    names=st.lists(st.text("abcdefgh", min_size=1, max_size=3), unique=True, min_size=2, max_size=12),
    share=st.floats(0.05, 0.95),
    cut=st.integers(0, 12),
    seed=st.integers(0, 3),
)
def test_sides_are_for_good(names: list[str], share: float, cut: int, seed: int) -> None:
    early = Sides().assign(names[:cut], share=share, seed=seed)
    late = early.assign(names, share=share, seed=seed)
    assert set(early.training) <= set(late.training) and set(early.held_out) <= set(late.held_out)
    assert not set(late.training) & set(late.held_out)
    assert {*late.training, *late.held_out} == set(names)
    assert late.training and late.held_out
    assert late == early.assign(list(reversed(names)), share=share, seed=seed)


def test_the_share_and_the_seed_decide() -> None:
    names = [f"attacker {i}" for i in range(20)]
    assert [len(Sides().assign(names, share=s).held_out) for s in (0.1, 0.3, 0.5)] == [2, 6, 10]
    assert Sides().assign(names, share=0.3, seed=1) != Sides().assign(names, share=0.3)
    for share in (0.0, 1.0):
        with pytest.raises(RecipeError, match="held out"):
            Sides().assign(names, share=share)


def test_the_next_target_is_an_empty_cell_while_there_is_one() -> None:
    a, random = archive(), np.random.default_rng(0)
    assert a.target(random)[0] is None
    for topic in a.topics:
        a.add(attack(f"plea {topic}", topic=topic))
    drawn = [a.target(random) for _ in range(60)]
    assert {(style, topic) for _, style, topic in drawn} == {("role", t) for t in a.topics}
    assert {parent.id for parent, _, _ in drawn if parent} == {f"plea {t}" for t in a.topics}
    for topic in a.topics:
        a.add(attack(f"role {topic}", style="role", topic=topic))
    assert {a.target(random)[1:] for _ in range(200)} == {(s, t) for s in a.styles for t in a.topics}


def test_it_survives_json() -> None:
    a = archive()
    a.add(attack("one", 0.25))
    a.add(attack("two", 0.5, topic="fraud", attacker="eve", embedding=(0.1, 0.2)))
    again = Archive.from_dict(json.loads(json.dumps(a.to_dict())))
    assert again.to_dict() == a.to_dict() and again.training() == a.training() and again.evaluation() == a.evaluation()
    for broken in (
        a.to_dict() | {"format": "other"},
        {k: v for k, v in a.to_dict().items() if k != "topics"},
        a.to_dict() | {"attacks": [{"id": "x"}]},
        a.to_dict() | {"sides": {"training": ["ann", "bob", "eve"], "held_out": ["eve"]}},
        a.to_dict() | {"sides": {"training": ["ann"], "held_out": []}},
    ):
        with pytest.raises(InputError):
            Archive.from_dict(broken)


@pytest.mark.parametrize(
    "change",
    [{"style": "song"}, {"topic": "birds"}, {"embedding": ()}, {"embedding": (0.0, 0.0)}, {"embedding": (math.nan, 1)},
     {"embedding": (1.0, 0.0, 0.0)}, {"worth": math.inf}],
)  # fmt: skip
def test_what_fits_nowhere_is_refused(change: dict[str, Any]) -> None:
    a = archive()
    a.add(attack("first"))
    with pytest.raises(InputError):
        a.add(attack("bad", **change))
    with pytest.raises(RecipeError):
        Archive(("a", "a"), ("b",))


def test_rewards_by_hand() -> None:
    """Attacker 1 * 0.8 + 0.5 * 0.4 + 0.2 * 0.5 = 1.1. Fluency: two nats a token rarer is e^-2."""
    assert attacker_reward(0.8, 0.4, 0.5, weights=(1.0, 0.5, 0.2)) == pytest.approx(1.1)
    assert attacker_reward(0.8, None, 0.5, weights=(1.0, 0.5, 0.2)) is None
    assert attacker_reward(0.8, None, 0.5, weights=(1.0, 0.0, 0.2)) == pytest.approx(0.9)
    assert attacker_reward(None, 1.0, 1.0, weights=(1.0, 0.5, 0.2)) is None
    assert fluency(-5.0, -3.0) == pytest.approx(math.exp(-2.0)) and fluency(-1.0, -3.0) == 1.0


def test_success_is_counted_by_attacker_and_missing_is_not_safe() -> None:
    attacks = [attack("a"), attack("b"), attack("c", attacker="bob"), attack("d", attacker="bob")]
    assert attack_success(attacks, [0.9, 0.5, None, 0.6]) == {"ann": (1, 2, 0), "bob": (1, 1, 1)}
    assert attack_success(attacks, [0.9, 0.5, None, 0.6], threshold=0.4)["ann"] == (2, 2, 0)
