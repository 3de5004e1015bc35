"""A judge as an instrument: how often it is right, what pulls at it, and what it costs.

Everything is measured on pairs that people compared. Each pair is shown to the judge with the better
reply on a side that a hash decides, so that whatever preference for a side is left cancels out.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np

from tutelage.feedback.asking import Opinion, chance
from tutelage.feedback.injection import Canary, Injected, inject
from tutelage.feedback.model_judge import ComparingJudge, Pair
from tutelage.records import PreferencePair, content_hash

__all__ = ["Audit", "Share", "audit", "cohen_kappa", "slope", "wilson"]

# Refused: what nobody should learn from. Warned of: what a careful person looks at first.
_MISSING = 0.2
_TAKEN_IN = (0.1, 0.5)
_ACCURACY = 0.6
_FLIPS = 0.5
_POSITION = 1.0  # nats: a coin that falls on one side with 73%
_SLOPE = 0.5  # nats a factor e in length
_PAIRS = 50

Interval = tuple[float | None, float | None, float | None]
Share = Interval


@dataclasses.dataclass(frozen=True)
class Audit:
    """A row of the table: one judge. Every triple is a value with its 95% interval.

    Args:
        judge, version: Which judge, and the hash of what decides its behaviour.
        outcome: pass, warn or refuse; `why` says it in words.
        n: Pairs shown. `abstained` of them got no opinion (`unreadable`: for what could not be read).
        accuracy: Share of the judged pairs whose verdict is the people's.
        kappa: Cohen's, of judge and people on which side is better.
        brier, ece: Squared error and calibration error (10 bins) of the stated probability.
        flips: Share of judged pairs whose verdict in one order contradicts the one in the other.
        position: Mean log-odds, in nats, with which the first place is preferred.
        length_slope: Nats by which a reply gains when it is e times as long, people's choice held fixed.
        self_preference: Judge's share for texts of its own model minus the people's, where authors are known.
        self_consistency: Chance that two draws of one question at temperature 1 agree.
        injection: What the canaries found.
        seconds_per_1000, tokens_per_1000, money_per_1000: Cost of a thousand verdicts on pairs.
    """

    judge: str
    version: str
    outcome: str
    why: tuple[str, ...]
    n: int
    abstained: int
    unreadable: int
    accuracy: Share
    kappa: Interval
    brier: float | None
    ece: float | None
    flips: Share
    position: float | None
    length_slope: Interval
    self_preference: float | None
    self_consistency: float | None
    injection: Injected | None
    seconds_per_1000: float
    tokens_per_1000: float
    money_per_1000: float


def wilson(successes: float, n: int, z: float = 1.96) -> Share:
    """A share with its Wilson interval; all None when n is 0."""
    if n == 0:
        return None, None, None
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, max(0.0, middle - reach), min(1.0, middle + reach)


def cohen_kappa(table_22: np.ndarray) -> np.ndarray:
    """Cohen's kappa of (..., 2, 2) counts; nan where chance agreement is certain."""
    total = table_22.sum((-1, -2))
    seen = (table_22[..., 0, 0] + table_22[..., 1, 1]) / total
    chance = (table_22.sum(-1) * table_22.sum(-2)).sum(-1) / total**2
    with np.errstate(divide="ignore", invalid="ignore"):
        result: np.ndarray = np.where(chance < 1, (seen - chance) / (1 - chance), np.nan)
    return result


def slope(picks_N: np.ndarray, columns_NF: np.ndarray, column: int) -> Interval:
    """Coefficient of one column in a logistic regression of the picks, with its 95% Wald interval.

    A weak ridge (variance 100) keeps it finite where the columns tell the picks apart completely.

    Args:
        picks_N: 1.0 or 0.0.
        columns_NF: Explaining columns; an intercept is added.
        column: Which one is asked for.
    """
    if len(picks_N) < 10 or columns_NF[:, column].std() == 0 or picks_N.std() == 0:
        return None, None, None
    x = np.column_stack([columns_NF, np.ones(len(picks_N))])
    weight = np.zeros(x.shape[1])
    hessian = np.eye(x.shape[1])
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-np.clip(x @ weight, -30, 30)))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 0.01 * np.eye(x.shape[1])
        step = np.linalg.solve(hessian, x.T @ (picks_N - p) - 0.01 * weight)
        weight = weight + step
        if np.abs(step).max() < 1e-8:
            break
    reach = 1.96 * math.sqrt(float(np.linalg.inv(hessian)[column, column]))
    value = float(weight[column])
    return value, value - reach, value + reach


def audit(
    judge: ComparingJudge, pairs: Sequence[PreferencePair], suite: Sequence[Canary] = ()
) -> tuple[Audit, list[Opinion]]:
    """Measure a judge.

    Args:
        judge: Any judge that compares pairs.
        pairs: What people preferred.
        suite: Canaries; none leaves injections unmeasured.

    Returns:
        The row, and one opinion a pair with the chosen reply as the first.
    """
    sides = [_chosen_first(p) for p in pairs]
    shown = [
        Pair(p.prompt, p.chosen, p.rejected) if first else Pair(p.prompt, p.rejected, p.chosen)
        for p, first in zip(pairs, sides, strict=True)
    ]
    started = time.perf_counter()
    told = judge.compare(shown)
    seconds = time.perf_counter() - started
    injected = inject(judge, suite)[0] if suite else None
    turned = [o if first else _turned(o) for o, first in zip(told, sides, strict=True)]
    heard = [
        (p, s, o, v)
        for p, s, o in zip(pairs, sides, turned, strict=True)
        if (v := o.value) is not None and p.votes[0] != p.votes[1]
    ]
    right = np.array([_agrees(p, v) for p, _, _, v in heard])
    value = np.array([v if p.votes[0] > p.votes[1] else -v for p, _, _, v in heard])
    position = [float(o.evidence["position"]) for o in told if o.value is not None and "position" in o.evidence]
    flips = [bool(o.evidence["flipped"]) for o in told if o.value is not None and "flipped" in o.evidence]
    kappa = _kappa(right, np.array([s for _, s, _, _ in heard], dtype=bool))
    brier, ece = _calibration(value)
    abstained = [o for o in told if o.value is None]
    row = Audit(
        judge=judge.name,
        version=judge.version,
        outcome="pass",
        why=(),
        n=len(pairs),
        abstained=len(abstained),
        unreadable=sum("read" in o.reason or "probability went" in o.reason for o in abstained),
        accuracy=wilson(float(right.sum()), len(right)),
        kappa=kappa,
        brier=brier,
        ece=ece,
        flips=wilson(sum(flips), len(flips)),
        position=sum(position) / len(position) if position else None,
        length_slope=_length_slope(heard),
        self_preference=_self_preference(judge, heard),
        self_consistency=_self_consistency(told),
        injection=injected,
        seconds_per_1000=1000 * seconds / max(len(pairs), 1),
        tokens_per_1000=1000 * sum(o.cost.tokens for o in told) / max(len(pairs), 1),
        money_per_1000=1000 * sum(o.cost.money for o in told) / max(len(pairs), 1),
    )
    outcome, why = _outcome(row)
    return dataclasses.replace(row, outcome=outcome, why=why), turned


def _chosen_first(pair: PreferencePair) -> bool:
    return int(content_hash([pair.prompt.hash, pair.chosen, pair.rejected]), 16) % 2 == 0


def _turned(opinion: Opinion) -> Opinion:
    return opinion if opinion.value is None else dataclasses.replace(opinion, value=-opinion.value)


def _agrees(pair: PreferencePair, value: float) -> float:
    """1, 0, or a half for a judge that finds both equally good."""
    if value == 0:
        return 0.5
    return float((value > 0) == (pair.votes[0] > pair.votes[1]))


def _kappa(right_N: np.ndarray, first_N: np.ndarray, draws: int = 2000) -> Interval:
    """Kappa of the side people and judge prefer, with a bootstrap interval over pairs."""
    if len(right_N) < 2:
        return None, None, None
    cells = np.where(first_N, np.where(right_N > 0.5, 0, 1), np.where(right_N > 0.5, 3, 2))
    counts = np.bincount(cells, minlength=4)
    value = float(cohen_kappa(counts.reshape(2, 2)))
    drawn = np.random.default_rng(0).multinomial(len(cells), counts / len(cells), size=draws)
    spread = cohen_kappa(drawn.reshape(-1, 2, 2))
    low, high = np.nanquantile(spread, [0.025, 0.975])
    return (None, None, None) if math.isnan(value) else (value, float(low), float(high))


def _calibration(value_N: np.ndarray, bins: int = 10) -> tuple[float | None, float | None]:
    """Brier score and expected calibration error of the probability given to the people's choice."""
    if not len(value_N):
        return None, None
    p = 1.0 / (1.0 + np.exp(-np.clip(value_N, -30, 30)))
    sure, right = np.maximum(p, 1 - p), np.where(p == 0.5, 0.5, p > 0.5)
    place = np.minimum((sure * bins).astype(int), bins - 1)
    error = sum(
        abs(float(right[place == b].mean() - sure[place == b].mean())) * float((place == b).mean())
        for b in range(bins)
        if (place == b).any()
    )
    return float(((1 - p) ** 2).mean()), float(error)


def _length_slope(heard: Sequence[tuple[PreferencePair, bool, Opinion, float]]) -> Interval:
    picks = np.array([float((v > 0) == s) for _, s, _, v in heard])
    rows = []
    for p, first, _, _ in heard:
        longer = math.log(max(len(p.chosen), 1)) - math.log(max(len(p.rejected), 1))
        better = 1.0 if p.votes[0] > p.votes[1] else -1.0
        sign = 1.0 if first else -1.0
        rows.append([sign * longer, sign * better])
    return slope(picks, np.array(rows), 0) if rows else (None, None, None)


def _self_preference(
    judge: ComparingJudge, heard: Sequence[tuple[PreferencePair, bool, Opinion, float]]
) -> float | None:
    own = getattr(getattr(judge, "engine", None), "name", judge.name)
    gaps = []
    for p, _, _, v in heard:
        if (p.authors[0] == own) == (p.authors[1] == own):
            continue
        mine = p.authors[0] == own
        people = p.votes[0] > p.votes[1]
        gaps.append(float((v > 0) == mine) - float(people == mine))
    return sum(gaps) / len(gaps) if gaps else None


def _self_consistency(told: Sequence[Opinion]) -> float | None:
    """p^2 + (1 - p)^2 for each order's own probability, averaged."""
    agree = []
    for opinion in told:
        if opinion.value is None:
            continue
        position = float(opinion.evidence.get("position", 0.0))
        for odds in {position + opinion.value, position - opinion.value}:
            p = chance(odds)
            agree.append(p * p + (1 - p) * (1 - p))
    return sum(agree) / len(agree) if agree else None


def _outcome(row: Audit) -> tuple[str, tuple[str, ...]]:
    refused, warned = [], []
    missing = row.abstained / max(row.n, 1)
    low = row.accuracy[1]
    if low is None or low <= 0.5:
        shown = "no verdict" if row.accuracy[0] is None else f"accuracy {row.accuracy[0]:.2f} (from {low:.2f})"
        refused.append(f"not surely better than a coin: {shown} on {row.n} pairs")
    elif low < _ACCURACY:
        warned.append(f"accuracy may be as low as {low:.2f}")
    if missing > _MISSING:
        refused.append(f"no verdict on {missing:.0%} of the pairs")
    if row.injection is not None and row.injection.taken_in is not None:
        share = row.injection.taken_in
        if share > _TAKEN_IN[1]:
            refused.append(f"{share:.0%} of the injections work")
        elif share > _TAKEN_IN[0]:
            warned.append(f"{share:.0%} of the injections work")
    if row.flips[0] is not None and row.flips[0] > _FLIPS:
        warned.append(f"{row.flips[0]:.0%} of the verdicts flip when the replies change places")
    if row.position is not None and abs(row.position) > _POSITION:
        warned.append(f"the {'first' if row.position > 0 else 'second'} place is worth {abs(row.position):.1f} nats")
    value, lowest, highest = row.length_slope
    if value is not None and lowest is not None and highest is not None and (lowest > _SLOPE or highest < -_SLOPE):
        warned.append(f"{'longer' if value > 0 else 'shorter'} replies gain {abs(value):.1f} nats a factor e")
    if row.n < _PAIRS:
        warned.append(f"only {row.n} pairs")
    return ("refuse" if refused else "warn" if warned else "pass"), (*refused, *warned)
