"""Shapley values by hand, by their axioms, and against every order of the players."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.credit.shapley import Game, alone, leave_one_out, shapley
from tutelage.errors import InputError


def random_game(names: str, seed: int) -> Game:
    draw = random.Random(seed)
    table = {frozenset(s): draw.uniform(-5, 5) for n in range(len(names) + 1) for s in itertools.combinations(names, n)}
    return Game(list(names), table.__getitem__)


def test_gloves_by_hand() -> None:
    """One left glove, two right ones, a pair is worth 6: 4, 1, 1. Without either right one nothing is lost."""
    game = Game(["left", "right", "also"], lambda s: 6.0 if "left" in s and len(s) > 1 else 0.0)
    assert shapley(game) == pytest.approx({"left": 4.0, "right": 1.0, "also": 1.0})
    assert leave_one_out(game) == {"left": 6.0, "right": 0.0, "also": 0.0}
    assert alone(game) == {"left": 0.0, "right": 0.0, "also": 0.0}


@given(seed=st.integers(0, 1000), n=st.integers(1, 5))
def test_they_are_the_mean_over_all_orders_and_sum_to_the_whole(seed: int, n: int) -> None:
    names = "abcde"[:n]
    game = random_game(names, seed)
    got = shapley(game)
    total = dict.fromkeys(names, 0.0)
    for order in itertools.permutations(names):
        for k, player in enumerate(order):
            total[player] += game(order[: k + 1]) - game(order[:k])
    assert got == pytest.approx({p: v / math.factorial(n) for p, v in total.items()}, abs=1e-9)
    assert math.fsum(got.values()) == pytest.approx(game(names) - game(()), abs=1e-9)


@given(seed=st.integers(0, 1000))
def test_who_does_nothing_gets_nothing_and_equals_get_the_same(seed: int) -> None:
    inner = random_game("ab", seed)
    game = Game(["a", "b", "idle", "twin"], lambda s: inner(s & {"a", "b"}) + 3.0 * len(s & {"b", "twin"}))
    got = shapley(game)
    assert got["idle"] == pytest.approx(0.0, abs=1e-9)
    assert got["twin"] == pytest.approx(3.0)
    assert got["b"] == pytest.approx(shapley(inner)["b"] + 3.0)


def test_every_subset_is_evaluated_once() -> None:
    asked: list[frozenset[str]] = []
    game = Game(list("abcd"), lambda s: asked.append(s) or float(len(s)))  # type: ignore[func-returns-value]
    shapley(game), leave_one_out(game), alone(game)
    assert len(asked) == len(set(asked)) == game.evaluations == 16


def test_ten_players_are_enough_and_eleven_too_many() -> None:
    ten = [str(k) for k in range(10)]
    got = shapley(Game(ten, lambda s: float(sum(map(int, s)))))
    assert got == pytest.approx({p: float(p) for p in ten})
    for wrong in ([*ten, "10"], [], ["a", "a"]):
        with pytest.raises(InputError):
            Game(wrong, lambda _: 0.0)


def test_a_value_that_is_no_number_is_refused_with_its_subset() -> None:
    with pytest.raises(InputError, match=r"\{a, b\} is nan"):
        shapley(Game(["a", "b"], lambda s: math.nan if len(s) == 2 else 0.0))
