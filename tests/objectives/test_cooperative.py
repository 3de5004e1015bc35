"""The posterior by hand and against quadrature, and whether choosing questions saves any."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import expit

from tutelage.errors import InputError, RecipeError, StoreError
from tutelage.objectives.cooperative import ValuePosterior, bald, choose_batch, decide, evoi, plausible
from tutelage.objectives.inverse import choice_gradient, fit_choices

K = 20
SEEDS = st.integers(0, 9999)


def answered(deltas: list[float], answers: list[float | None], prior: float = 1.0) -> ValuePosterior:
    found = ValuePosterior(["x"], prior=prior)
    for delta, answer in zip(deltas, answers, strict=True):
        found.compare([delta], [0.0], answer)
    return found


# ---- the posterior ----


def test_one_answer_by_hand() -> None:
    """Prior 1, delta 2, the first is better. Mode: w = 2 s(-2 w), there H = 1 + 4 p q with p = s(2 w), q = 1 - p.

    Third derivative of the log-likelihood: -8 p q (q - p), so the mean lies -4 p q (q - p) / H^2 from the mode.
    """
    found = answered([2.0], [1.0])
    w = float(found.mode_K[0])
    p, q = expit(2 * w), expit(-2 * w)
    assert w == pytest.approx(2 * q, abs=1e-7) and 0.5 < w < 0.7
    m = w - 4 * p * q * (q - p) / (1 + 4 * p * q) ** 2
    assert m > w and float(found.mean_K[0]) == pytest.approx(m)
    assert float(found.covariance_KK[0, 0]) == pytest.approx(1 / (1 + 4 * expit(2 * m) * expit(-2 * m)))
    for same in (answered([2.0], [0.0]), answered([-2.0], [1.0])):
        assert same.mean_K[0] == pytest.approx(-m)
    assert answered([2.0], [0.5]).mean_K[0] == pytest.approx(0.0)
    half = answered([2.0, 2.0], [0.75, 0.75]).mode_K
    assert half == pytest.approx(answered([2.0] * 4, [1.0, 1.0, 1.0, 0.0], prior=0.5**0.5).mode_K)


@pytest.mark.parametrize("deltas", [[2.0], [1.0, 1.0, 2.0], [0.5] * 6])
def test_mean_and_deviation_are_near_the_exact_ones(deltas: list[float]) -> None:
    """Against integrals over w; the mode alone is farther off."""
    found = answered(deltas, [1.0] * len(deltas))

    def moment(k: int) -> float:
        return quad(lambda w: w**k * math.exp(-w * w / 2) * math.prod(expit(d * w) for d in deltas), -9, 9)[0]

    mean = moment(1) / moment(0)
    deviation = math.sqrt(moment(2) / moment(0) - mean**2)
    assert float(found.mean_K[0]) == pytest.approx(mean, abs=0.06)
    assert abs(float(found.mean_K[0]) - mean) < 0.5 * abs(float(found.mode_K[0]) - mean)
    assert math.sqrt(float(found.covariance_KK[0, 0])) == pytest.approx(deviation, rel=0.08)


@given(seed=SEEDS)
@settings(max_examples=20)
def test_answers_and_demonstrations_are_one_likelihood(seed: int) -> None:
    """Against the fit of all lists at once, whatever the order in which they came."""
    random = np.random.default_rng(seed)
    phi, chosen = random.normal(size=(12, 3, 4)), random.integers(0, 3, 12)
    pairs, better = random.normal(size=(9, 2, 4)), random.integers(0, 2, 9)
    found = ValuePosterior("abcd", prior=1.5)
    for rows, c in zip(phi, chosen, strict=True):
        found.demonstrate(rows, int(c))
    assert np.isfinite(found.mean_K).all()  # looking in between must not matter
    for (first, second), b in zip(pairs, better, strict=True):
        found.compare(first, second, float(b))
    whole = np.concatenate([phi, np.concatenate([pairs, np.full((9, 1, 4), np.nan)], 1)])
    share = np.concatenate([np.eye(3)[chosen], np.stack([better, 1 - better, 0 * better], 1)])
    oracle = fit_choices(whole, share, prior=1.5)
    assert found.mode_K == pytest.approx(oracle.weights_K, abs=1e-4)
    late = ValuePosterior("abcd", prior=1.5)
    for (first, second), b in zip(pairs, better, strict=True):
        late.compare(second, first, 1.0 - float(b))
    for rows, c in zip(phi, chosen, strict=True):
        late.demonstrate(rows[::-1], 2 - int(c))
    assert late.mean_K == pytest.approx(found.mean_K, abs=1e-7)
    assert late.covariance_KK == pytest.approx(found.covariance_KK, abs=1e-7)


def test_a_choice_among_two_is_a_comparison_and_three_are_corrected_alike() -> None:
    """Third cumulant of a list against numerical differences of its curvature."""
    pair, choice = ValuePosterior("ab"), ValuePosterior("ab")
    pair.compare([1.0, 0.0], [0.0, 2.0], 0.0)
    choice.demonstrate([[1.0, 0.0], [0.0, 2.0]], 1)
    assert (pair.mean_K == choice.mean_K).all()
    phi, share = np.array([[[1.0, 0.0], [0.0, 2.0], [-1.0, 0.5]]]), np.array([[1.0, 0.0, 0.0]])
    three = ValuePosterior("ab")
    three.demonstrate(phi[0], 0)
    inverse = np.linalg.inv(choice_gradient(three.mode_K, phi, share)[2] + np.eye(2))
    slope = [
        np.trace(inverse @ (choice_gradient(three.mode_K + h, phi, share)[2] - choice_gradient(three.mode_K - h, phi, share)[2])) / 2e-5
        for h in 1e-5 * np.eye(2)
    ]  # fmt: skip
    assert three.mean_K - three.mode_K == pytest.approx(-0.5 * inverse @ slope, abs=1e-7)


def test_far_answers_throw_nothing_off() -> None:
    """Margins of hundreds: the mode solves its equation, and the correction is held to one deviation."""
    found = answered([300.0, -200.0, 250.0], [1.0, 0.0, 1.0], prior=50.0)
    w, before = float(found.mode_K[0]), float(found.covariance_KK[0, 0])
    assert 0.0 < w < 50.0 and w <= found.mean_K[0] <= w + 50.0 and 0.0 < before <= 2500.0
    found.compare([300.0], [0.0], 0.0)
    w = float(found.mode_K[0])
    slope = 300 * expit(-300 * w) + 200 * expit(-200 * w) + 250 * expit(-250 * w) - 300 * expit(300 * w) - w / 2500
    assert slope == pytest.approx(0.0, abs=1e-4)


def test_predictions_average_over_what_w_may_be() -> None:
    found = answered([2.0, 1.0], [1.0, 1.0])
    m, s = float(found.mean_K[0]), math.sqrt(float(found.covariance_KK[0, 0]))
    exact = quad(lambda w: expit(3 * w) * math.exp(-0.5 * ((w - m) / s) ** 2) / s / math.sqrt(2 * math.pi), -9, 9)[0]
    assert found.probability([3.0], [0.0]) == pytest.approx(exact, abs=1e-5)
    assert found.probability([3.0], [0.0]) < expit(3 * m)
    assert found.probability([0.0], [3.0]) == pytest.approx(1 - exact, abs=1e-5)
    drawn = found.sample(20_000, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(m, abs=0.02) and drawn.std() == pytest.approx(s, abs=0.02)


def test_missing_answers_are_skipped_and_counted() -> None:
    some, all_ = answered([2.0, 5.0, 1.0], [1.0, None, 0.0]), answered([2.0, 1.0], [1.0, 0.0])
    some.demonstrate([[1.0], [2.0]], None)
    assert some.mean_K == all_.mean_K and (len(some), some.skipped, all_.skipped) == (2, 2, 0)
    nobody = answered([1.0], [None], prior=2.0)
    assert nobody.mean_K == [0.0] and nobody.covariance_KK == [[4.0]]


def test_it_explains_itself() -> None:
    found = ValuePosterior(["honesty", "brevity", "jokes"])
    for _ in range(12):
        found.compare([2.0, 0.0, 0.0], [0.0, 0.0, 0.0], 1.0)
        found.compare([0.0, 0.0, 1.5], [0.0, 0.0, 0.0], 0.0)
    found.compare([0.0, 1.0, 0.0], [0.0, 0.0, 0.0], None)
    lines = found.explain()
    assert len(lines) == 4
    low, high = found.interval()[0]
    assert lines[0].startswith("jokes: less of it is better") and found.mean_K[2] < -found.mean_K[0]
    assert lines[1] == (
        f"honesty: more of it is better; weight {found.mean_K[0]:+.2f}, 90% sure {low:+.2f} to {high:+.2f}"
    )
    assert lines[2] == "brevity: unclear which way; weight +0.00, 90% sure -1.64 to +1.64"
    assert lines[3] == "from 24 answers; 1 questions were left unanswered"
    assert "50% sure -0.67 to +0.67" in found.explain(0.5)[2]
    with pytest.raises(RecipeError, match="level"):
        found.explain(1.0)


def test_it_survives_json(tmp_path: Path) -> None:
    found = ValuePosterior(["honesty", "简洁"], prior=1.5)
    found.compare([1.0, 0.5], [0.0, 0.1], 1.0)
    found.demonstrate([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], 2)
    found.compare([1.0, 0.5], [0.0, 0.1], None)
    found.save(tmp_path / "values.json")
    again = ValuePosterior.load(tmp_path / "values.json")
    assert again.to_dict() == found.to_dict() and again.explain() == found.explain()
    assert (again.mean_K == found.mean_K).all() and (again.covariance_KK == found.covariance_KK).all()
    (tmp_path / "torn.json").write_text("{")
    for path in (tmp_path / "torn.json", tmp_path / "none.json"):
        with pytest.raises(StoreError, match="cannot be read"):
            ValuePosterior.load(path)
    with pytest.raises(StoreError, match="cannot be written"):
        found.save(tmp_path / "no" / "folder.json")
    good = found.to_dict()
    for wrong in ({}, good | {"format": "x"}, good | {"names": ["a"]}, good | {"prior": "wide"},
                  good | {"answers": [{"features": [[1.0, 2.0]], "share": [math.nan]}]},
                  {k: v for k, v in good.items() if k != "answers"}):  # fmt: skip
        with pytest.raises(InputError):
            ValuePosterior.from_dict(wrong)


def test_bad_input_is_refused() -> None:
    found = ValuePosterior(["a", "b"])
    for first, second, answer in (
        ([1.0], [0.0], 1.0), ([1.0, math.nan], [0.0, 0.0], 1.0), ([1.0, 0.0], [0.0, 0.0], 1.5), ([1.0, 0.0], [0.0, 0.0], math.nan)
    ):  # fmt: skip
        with pytest.raises(InputError):
            found.compare(first, second, answer)
    for chosen in (-1, 2):
        with pytest.raises(InputError, match="candidate"):
            found.demonstrate([[1.0, 0.0], [0.0, 1.0]], chosen)
    for names, prior in (([], 1.0), (["a", "a"], 1.0), (["a"], 0.0), (["a"], math.inf)):
        with pytest.raises(RecipeError):
            ValuePosterior(names, prior=prior)
    assert len(found) == 0


# ---- which question ----


def test_bald_agrees_with_quadrature_and_knows_when_nothing_is_to_be_learned() -> None:
    """Margin N(0.5, 1) against an integral; no information in a known margin, at most log 2 in any."""

    def h(p: float) -> float:
        return -(p * math.log(p) + (1 - p) * math.log(1 - p))

    def mean(f: object) -> float:
        return quad(lambda m: f(expit(m)) * math.exp(-0.5 * (m - 0.5) ** 2) / math.sqrt(2 * math.pi), -9, 10)[0]

    got = bald(np.array([0.5]), np.eye(1), np.array([[1.0], [0.0]]))
    assert got[0] == pytest.approx(h(mean(lambda p: p)) - mean(h), abs=1e-6) and got[1] == 0.0
    assert bald(np.array([0.5]), 0 * np.eye(1), np.array([[1.0]]))[0] == pytest.approx(0.0, abs=1e-12)
    wide = bald(np.zeros(1), np.eye(1), np.array([[0.5], [2.0], [50.0]]))
    assert (np.diff(wide) > 0).all() and wide[2] < math.log(2)
    assert bald(np.ones(1), np.eye(1), np.array([[2.0]])) == pytest.approx(
        bald(np.ones(1), np.eye(1), np.array([[-2.0]]))
    )


def test_evoi_by_hand() -> None:
    """w is 1 or -1, options phi = 1 and -1: now worth 0, after an answer to delta d worth tanh(d / 2)."""
    particles, options = np.array([[1.0], [-1.0]]), np.array([[1.0], [-1.0]])
    got = evoi(particles, np.array([[0.0], [1.0], [4.0]]), options)
    assert got == pytest.approx([0.0, math.tanh(0.5), math.tanh(2.0)])
    # One option: nothing to decide. A third that is safe at 0.9: only what beats it counts.
    assert evoi(particles, np.array([[4.0]]), options[:1]) == pytest.approx([0.0])
    both, third = np.array([[1.0, 1.0], [-1.0, 1.0]]), np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.9]])
    assert evoi(both, np.array([[4.0, 0.0], [1.0, 0.0]]), third) == pytest.approx([math.tanh(2.0) - 0.9, 0.0])


def test_evoi_of_several_decisions_is_the_sum_of_each() -> None:
    draw = np.random.default_rng(0)
    particles, deltas, options = (draw.normal(size=(n, 3)) for n in (50, 7, 9))
    parts = [evoi(particles, deltas, options[a:b]) for a, b in ((0, 2), (2, 3), (3, 9))]
    assert evoi(particles, deltas, options, (0, 2, 3)) == pytest.approx(sum(parts))
    assert parts[1] == pytest.approx(np.zeros(7))  # where there is one thing to do


@given(seed=SEEDS)
def test_evoi_is_never_negative_and_blind_to_the_order_of_a_question(seed: int) -> None:
    random = np.random.default_rng(seed)
    particles, deltas, options = (random.normal(size=(n, 3)) for n in (50, 6, 4))
    got = evoi(particles, deltas, options)
    assert (got >= 0.0).all() and got == pytest.approx(evoi(particles, -deltas, options))
    # Knowing w itself is worth at least as much as any answer about it.
    worth = particles @ options.T
    assert (got <= worth.max(1).mean() - worth.mean(0).max() + 1e-9).all()


def test_asks_if_and_only_if_it_is_worth_the_cost() -> None:
    """Two values, one known well; what the options differ in decides which question is worth something."""
    found = ValuePosterior(["known", "open"])
    for _ in range(200):
        found.compare([1.0, 0.0], [0.0, 0.0], 1.0)
    deltas, options = np.array([[3.0, 0.0], [0.0, 3.0]]), np.array([[0.0, 1.0], [0.0, -1.0]])
    free = decide(found, deltas, options, cost=0.0)
    assert free.ask and free.query == 1 and free.gain > 0.3
    assert decide(found, deltas, options, cost=free.gain * 0.99).ask
    dear = decide(found, deltas, options, cost=free.gain)
    assert not dear.ask and dear == dataclasses.replace(free, ask=False, cost=free.gain)
    # The options differ in what is known: telling questions remain, and none is worth asking.
    sure = decide(found, deltas, options[:, ::-1], cost=0.01)
    assert not sure.ask and sure.act == 0 and sure.gain < 0.01
    assert bald(found.mean_K, found.covariance_KK, deltas)[1] > 0.1
    nothing = decide(found, np.zeros((0, 2)), options, cost=0.0)
    assert (nothing.ask, nothing.query) == (False, None)
    assert decide(found, deltas, options, cost=0.0, seed=1).gain != free.gain
    assert decide(found, deltas, options, cost=0.0, draws=100).gain != free.gain
    with pytest.raises(InputError, match="option"):
        decide(found, deltas, np.zeros((0, 2)), cost=0.0)
    for cost in (-1.0, math.nan):
        with pytest.raises(RecipeError, match="cost"):
            decide(found, deltas, options, cost=cost)


def test_a_batch_does_not_ask_the_same_twice() -> None:
    """Ten copies of the best question and two others: BALD alone takes copies, the batch takes all three kinds."""
    kinds = np.array([[4.0, 0.0, 0.0], [0.0, 3.8, 0.0], [0.0, 0.0, 3.6]])
    deltas = kinds[[0] * 10 + [1, 2]]
    found = ValuePosterior("abc")
    alone = np.argsort(-bald(found.mean_K, found.covariance_KK, deltas), kind="stable")[:3]
    assert set(alone) <= set(range(10))
    chosen = choose_batch(found, deltas, 3, cut=math.inf)
    assert chosen[0] in range(10) and chosen[1:] == [10, 11]
    assert len(choose_batch(found, deltas, 99, cut=math.inf)) == 12
    assert found.covariance_KK == pytest.approx(np.eye(3))  # nothing was answered yet


def test_outliers_and_malformed_questions_are_left_out() -> None:
    random = np.random.default_rng(0)
    deltas = np.concatenate(
        [random.normal(size=(60, 4)), [[40.0, 0, 0, 0], [0, 0, -60.0, 9], [np.nan, 0, 0, 0], [0.0] * 4]]
    )
    assert np.flatnonzero(~plausible(deltas)).tolist() == [60, 61, 62, 63]
    assert np.flatnonzero(~plausible(deltas, cut=math.inf)).tolist() == [62, 63]
    twin = np.concatenate([deltas, -deltas[60:61]])  # two alike are no outlier to one neighbour
    assert plausible(twin, neighbours=1)[60] and not plausible(twin, neighbours=3)[60]
    assert (plausible(-deltas) == plausible(deltas)).all()
    found = ValuePosterior("abcd")
    best_of_all = int(np.nanargmax(bald(found.mean_K, found.covariance_KK, np.nan_to_num(deltas))))
    assert best_of_all in (60, 61)  # without the filter it would be asked first
    assert not set(choose_batch(found, deltas, 20)) & {60, 61, 62, 63}
    assert 60 in choose_batch(found, deltas, 3, cut=math.inf)
    assert decide(found, deltas, np.eye(4), cost=0.0).query not in (60, 61, 62, 63)
    copies = np.array([[1.0, 0.0]] * 9 + [[0.9, 0.3], [70.0, 0.0]])
    assert plausible(copies, neighbours=1).tolist() == [True] * 10 + [False]
    assert plausible(np.array([[1.0], [0.0], [99.0]])).tolist() == [True, False, True]  # too few to tell
    with pytest.raises(RecipeError, match="neighbours"):
        plausible(deltas, neighbours=0)


# ---- twenty values, five hundred pairs ----


@functools.cache
def queries(seed: int, chosen: bool) -> tuple[int, ValuePosterior, np.ndarray]:
    """(answers until 95% of held-out pairs are right, the posterior then, the true w); at most 500.

    Looked at after every 8 chosen answers, and after every 16 random ones, which count as the 16 before and one.

    Weights have deviation 2: with 1, all 500 answers are too noisy for 95% in eight of twenty cases.
    """
    random, step = np.random.default_rng(seed), 8 if chosen else 16
    truth, pool, held_out = 2 * random.normal(size=K), random.normal(size=(500, K)), random.normal(size=(1000, K))
    answers = (random.random(500) < expit(pool @ truth)).astype(float)
    found = ValuePosterior([str(k) for k in range(K)], prior=2.0)
    left, order = np.arange(500), random.permutation(500)
    while len(left):
        took = left[choose_batch(found, pool[left], step)] if chosen else order[len(found) : len(found) + step]
        for row in took:
            found.compare(pool[row], np.zeros(K), answers[row])
        left = np.setdiff1d(left, took)
        if ((held_out @ found.mean_K > 0) == (held_out @ truth > 0)).mean() >= 0.95:
            break
    return len(found) - (0 if chosen else 15), found, truth


def test_chosen_questions_save_a_third_or_more() -> None:
    """Random needs at least 1.5 times as many, in every one of twenty cases; a median above twice."""
    ratios = np.array([queries(seed, False)[0] / queries(seed, True)[0] for seed in range(20)])
    assert ratios.min() >= 1.5 and np.median(ratios) > 2.0
    assert max(queries(seed, True)[0] for seed in range(20)) < 500  # each got there


def share_inside(cases: list[tuple[ValuePosterior, np.ndarray]], level: float = 0.9) -> float:
    limits = [(found.interval(level).T, truth) for found, truth in cases]
    return float(np.mean([(low < truth) & (truth < high) for (low, high), truth in limits]))


@pytest.mark.parametrize(("scale", "pairs"), [(1.0, 150), (1.0, 500)])
def test_the_intervals_hold_what_they_promise(scale: float, pairs: int) -> None:
    """w from the prior, random pairs, 60 people: of 1200 intervals at 90%, 87 to 93% hold the truth."""
    cases = []
    for seed in range(60):
        random = np.random.default_rng(1000 + seed)
        truth, pool = scale * random.normal(size=K), random.normal(size=(pairs, K))
        found = ValuePosterior([str(k) for k in range(K)], prior=scale)
        for delta, u in zip(pool, random.random(pairs), strict=True):
            found.compare(delta, np.zeros(K), float(u < expit(delta @ truth)))
        cases.append((found, truth))
    assert 0.87 <= share_inside(cases) <= 0.93
    assert 0.45 <= share_inside(cases, 0.5) <= 0.58


def test_the_intervals_hold_after_chosen_questions_too() -> None:
    assert 0.87 <= share_inside([queries(seed, True)[1:] for seed in range(20)]) <= 0.95
