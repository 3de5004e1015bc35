"""Inverse constitutions: hidden principles are found again, and what they explain is measured apart."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.engines.scripted import ScriptedEngine
from tutelage.feedback.asking import Opinion, settle
from tutelage.feedback.inverse import (
    ballot,
    inverse_words,
    propose,
    reconstruct,
    representatives,
    select,
    vote,
)
from tutelage.feedback.judge_prompt import fence, load_judge_prompt
from tutelage.records import Answer, Message, PreferencePair, Prompt

WORDS = inverse_words()
VOTING = load_judge_prompt("builtin:inverse-vote")
PAIR = PreferencePair(Prompt("p", (Message("user", "Wo?"),)), "hier 3", "dort")
VOCABULARY = ("you", "the", "we", "maybe", "please", "sorry", "7", "12", "!", "?", "well", "so", "and", "but", "now")


def principles():
    """50 functions of a text: three true ones, their near relations, and what has nothing to do with it."""
    true = (
        ("no digits", lambda words: -any(w.isdigit() for w in words)),
        ("second person", lambda words: "you" in words),
        ("at most 12 words", lambda words: len(words) <= 12),
    )
    # Nearer ones than these cannot be told from the true ones on 200 pairs, by whatever method.
    near = tuple((f"at most {n} words", lambda words, n=n: len(words) <= n) for n in (6, 8, 17, 19))
    near += (("no 7", lambda words: -("7" in words)), ("no 12", lambda words: -("12" in words)))
    near += (("begins with you", lambda words: words[0] == "you"),)
    other = tuple((f"has {w}", lambda words, w=w: w in words) for w in VOCABULARY if w not in ("you", "7", "12"))
    other += tuple((f"begins with {w}", lambda words, w=w: words[0] == w) for w in VOCABULARY[1:])
    other += tuple((f"ends with {w}", lambda words, w=w: words[-1] == w) for w in VOCABULARY[1:])
    return (true + near + other)[:50]


def written(random):
    """4 to 20 words; every second text has no digits, and every second one no "you"."""
    left_out = {w for words in (("7", "12"), ("you",)) if random.random() < 0.5 for w in words}
    return [str(w) for w in random.choice([w for w in VOCABULARY if w not in left_out], random.integers(4, 21))]


def world(seed, pairs=400, flipped=0.1):
    """Votes (50, pairs) of all principles, for chosen over rejected; exactly a tenth of each half is flipped."""
    random = np.random.default_rng(seed)
    functions = [f for _, f in principles()]
    columns = []
    while len(columns) < pairs:
        texts = [written(random) for _ in range(2)]
        votes = np.array([np.sign(int(f(texts[0])) - int(f(texts[1]))) for f in functions], dtype=float)
        if votes[:3].sum():  # the three true ones have the same weight; ties say nothing
            columns.append(votes * np.sign(votes[:3].sum()))
    votes_MN = np.stack(columns, axis=1)
    half = pairs // 2
    for start in (0, half):
        votes_MN[:, start + random.choice(half, int(flipped * half), replace=False)] *= -1
    return votes_MN[:, :half], votes_MN[:, half:]


def test_there_are_fifty_different_candidates():
    assert len(dict(principles())) == 50


@pytest.mark.parametrize("seed", range(8))
def test_exactly_the_three_hidden_principles_are_found(seed):
    """Of 50 candidates on 200 pairs with a tenth of the labels flipped; 0.90 could be given back at best."""
    seen, apart = world(seed)
    kept = select(seen, most=5)
    assert sorted(k.row for k in kept) == [0, 1, 2]
    found = reconstruct([k.weight for k in kept], apart[[k.row for k in kept]])
    share, low, high = found.accuracy
    assert share >= 0.88
    assert low < 0.9 < high
    assert found.right + found.wrong + found.undecided == 200


def test_labels_without_a_reason_give_no_principle():
    kept = [select(np.where(np.random.default_rng(s).random((50, 200)) < 0.5, 1.0, -1.0), most=5) for s in range(40)]
    # Each time with a chance of 5% at most: seven of forty would be one in a thousand.
    assert sum(map(bool, kept)) <= 6


def test_the_limit_keeps_those_that_add_most():
    seen, _ = world(0)
    (one,) = select(seen, most=1)
    assert one.row in (0, 1, 2)


def test_of_two_that_say_the_same_one_stays():
    seen, _ = world(1)
    kept = select(np.concatenate([seen[:3], seen[:1]]), most=5)
    assert len(kept) == 3
    assert {k.row for k in kept} in ({0, 1, 2}, {1, 2, 3})


def test_the_sign_test_by_hand():
    """One candidate: 5 of 5 has p = 1/32 < 0.05; of two candidates p must be below 0.025, so 6 of 6 (1/64)."""
    one = np.ones((1, 5))
    assert [k.row for k in select(np.concatenate([one, one], axis=1), most=5)] == [0]
    assert select(np.ones((1, 4)), most=5) == []
    assert select(np.stack([np.ones(5), np.zeros(5)]), most=5) == []
    assert select(-np.ones((1, 50)), most=5) == []
    (kept,) = select(np.array([[1.0] * 30 + [-1.0] * 3 + [0.0] * 5 + [math.nan] * 7]), most=5)
    assert (kept.votes_for, kept.votes_against) == (30, 3)


def test_the_order_is_by_votes():
    seen, _ = world(2)
    margins = [k.votes_for - k.votes_against for k in select(seen, most=5)]
    assert margins == sorted(margins, reverse=True)


def test_reconstruction_by_hand():
    """Weights 2 and 1: (1, -1) is right, (-1, 1) wrong, (0, nan) undecided, (0, 1) right: 2 of 4."""
    found = reconstruct([2.0, 1.0], np.array([[1, -1, 0, 0], [-1, 1, math.nan, 1]]))
    assert (found.right, found.wrong, found.undecided) == (2, 1, 1)
    assert found.accuracy[0] == 0.5
    assert reconstruct([], np.zeros((0, 3))).undecided == 3
    assert reconstruct([1.0], np.zeros((1, 0))).accuracy == (None, None, None)


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 30))
def test_selection_does_not_depend_on_the_order_of_the_pairs(seed, rows, columns):
    random = np.random.default_rng(seed)
    votes_MN = random.choice([-1.0, 0.0, 1.0, 1.0, 1.0, math.nan], (rows, columns))
    kept = select(votes_MN, most=3)
    other = select(votes_MN[:, random.permutation(columns)], most=3)
    assert [(k.row, k.votes_for) for k in kept] == [(k.row, k.votes_for) for k in other]
    assert all(k.weight > 0 and k.votes_for > k.votes_against for k in kept)
    assert len(kept) <= 3


@pytest.mark.parametrize(
    ("value", "evidence", "expected"),
    [(2.0, {}, 1.0), (-2.0, {}, -1.0), (0.1, {}, 0.0), (2.0, {"flipped": True}, 0.0), (None, {}, math.nan)],
)
def test_a_vote_abstains_when_unsure_and_is_missing_when_unread(value, evidence, expected):
    assert ballot(Opinion(value, "", evidence)) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("liked", "position", "expected"), [(1.5, 0.5, 1.0), (-1.5, 0.5, -1.0), (0.5, 3.0, 0.0)])
def test_a_vote_is_asked_in_both_orders(liked, position, expected):
    """The planted judge likes the chosen reply with `liked` nats, and the first place with `position`."""

    def script(question):
        text = question.messages[-1].content
        assert text.index("- Be near.") > text.index(fence("dort"))
        first = text.index(fence("hier 3")) < text.index(fence("dort"))
        odds = (liked if first else -liked) + position
        p = 1 / (1 + math.exp(-odds))
        return Answer(label_logps={"A": math.log(p), "B": math.log(1 - p)})

    engine = ScriptedEngine(script)
    (opinion,) = settle(engine, [vote(VOTING, "Be near.", PAIR)])
    assert opinion.value == pytest.approx(liked)
    assert ballot(opinion) == expected
    assert len(engine.asked) == 2


def test_proposals_are_read_line_by_line():
    text = (
        "1. The better reply is near.\n\n- 近いほうがよい。\n2) The better reply is near.\n* third\n(4) fourth\n"
        + "x" * 241
    )
    engine = ScriptedEngine(lambda q: Answer(text))
    found = settle(engine, [propose(WORDS, PAIR, count=n) for n in (2, 9)])
    assert found[0] == ["The better reply is near.", "近いほうがよい。"]
    assert found[1] == [*found[0], "third", "fourth"]
    asked = engine.asked[0].messages[-1].content
    assert asked.index(fence("hier 3")) < asked.index(fence("dort"))
    assert "Write 2 or fewer" in asked
    nothing = ScriptedEngine(lambda q: Answer(failure="away"))
    assert settle(nothing, [propose(WORDS, PAIR, count=3)]) == [[]]


def test_a_cluster_is_stood_for_by_its_most_central_member():
    """Angles in degrees: (0, 10, 30) and (100, 120, 125); nearest to their means are 10 and 120."""
    angles = np.radians([100.0, 0.0, 10.0, 120.0, 30.0, 125.0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert representatives(vectors, clusters=2) == [2, 3]
    assert representatives(vectors, clusters=6) == list(range(6))
    assert representatives(vectors[:0], clusters=3) == []


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 6))
def test_clusters_have_one_representative_each(seed, rows, clusters):
    vectors = np.random.default_rng(seed).normal(size=(rows, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = representatives(vectors, clusters=clusters)
    assert len(set(found)) == min(rows, clusters)
    assert all(a < b for a, b in itertools.pairwise(found))
