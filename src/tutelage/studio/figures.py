"""Numbers to show, read from the ledger as they are: measured differences, curves, shares of outcomes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.studio.wording import metric, plain

__all__ = [
    "Curve",
    "Measure",
    "Series",
    "ShareBar",
    "curves",
    "gate_shares",
    "measures",
    "share_bars",
    "thin",
]

Rows = Sequence[Mapping[str, Any]]

_SERIES_A_CHART = 5  # more lines than that cannot be told apart
_OUTCOMES = ("correct", "abstained", "asked_back", "wrong")


@dataclasses.dataclass(frozen=True, slots=True)
class Measure:
    """One measure before and after; `low` and `high` bound the difference after - before."""

    suite: str
    metric: str
    before: float | None
    after: float | None
    low: float | None
    high: float | None
    n: int

    @property
    def label(self) -> str:
        """Plain words."""
        return metric(self.metric).label

    @property
    def meaning(self) -> str:
        """Share of what, or in which unit."""
        return metric(self.metric).meaning

    @property
    def share(self) -> bool:
        """From 0 to 1, shown in percent."""
        return metric(self.metric).share

    @property
    def difference(self) -> float | None:
        """After - before, or None where one of them is missing."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def reading(self) -> str:
        """`better`, `worse`, `changed` (no known direction), `unclear` (holds 0) or `no interval`."""
        if self.difference is None or self.low is None or self.high is None:
            return "no interval"
        if self.low <= 0.0 <= self.high:
            return "unclear"
        direction = metric(self.metric).better * (1 if self.low > 0 else -1)
        return {1: "better", -1: "worse", 0: "changed"}[direction]


@dataclasses.dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart; None is a gap."""

    name: str
    values: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Curve:
    """One small chart.

    Args:
        title: What is shown.
        note: How to read it.
        x_title: What the horizontal axis counts.
        y_title: What the vertical axis measures, with its unit.
        share: The values are shares (0 to 1), shown in percent.
        ticks: Name of each point on the horizontal axis.
        units: Unit of work each point belongs to.
        series: The lines, each as long as `ticks`.
        limit: A line to compare with, or None.
        total: Points the ledger holds; more than `ticks` when thinned.
        main: Belongs to the first view, not to the details.
    """

    title: str
    note: str
    x_title: str
    y_title: str
    share: bool
    ticks: tuple[str, ...]
    units: tuple[str, ...]
    series: tuple[Series, ...]
    limit: float | None
    total: int
    main: bool


@dataclasses.dataclass(frozen=True, slots=True)
class ShareBar:
    """Outcomes of one version on one kind of question: (outcome, count), in a fixed order."""

    kind: str
    version: str
    role: str
    n: int
    counts: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Spec:
    stage: str
    title: str
    note: str
    y_title: str
    keys: tuple[tuple[str, str], ...]
    share: bool = False
    main: bool = True


_SPECS = (
    _Spec(
        "rollout", "Reward by term", "Mean raw value of each ingredient, before comparison within its group.",
        "mean raw value", (("term_*", ""),),
    ),
    _Spec(
        "rollout", "Reward", "Mean over the replies. Higher means that the judges like them more.",
        "mean reward", (("reward_mean", "reward"), ("reward_raw", "content terms, raw")),
    ),
    _Spec(
        "rollout", "What the replies do", "Shares of the sampled replies, as the judges see them.",
        "share of replies", (("share_answers", "answers"), ("share_abstains", "does not know"),
         ("share_asks_back", "asks back")), share=True,
    ),
    _Spec(
        "rollout", "Cost of caution", "Withheld, of what is believed to have an answer. Dashed: the limit.",
        "share withheld", (("cost", "cost"),), share=True,
    ),
    _Spec(
        "rollout", "Multiplier", "Weight the cost gets; it grows while the cost is above its limit.",
        "weight", (("multiplier", "multiplier"),),
    ),
    _Spec(
        "rollout", "Costs under limits", "Mean of each cost of [[constraints]], as its limit reads it.",
        "mean cost", (("cost_*", ""),),
    ),
    _Spec(
        "rollout", "Multipliers of these costs", "Each grows while its cost is above its limit.",
        "weight", (("multiplier_*", ""),),
    ),
    _Spec(
        "rollout", "Abstained verdicts", "Share of verdicts in which a judge gave no opinion.",
        "share of verdicts", (("verdicts_abstained/verdicts", "abstained"),), share=True,
    ),
    _Spec(
        "update", "Distance from the start", "KL divergence of the learning model from the start model.",
        "KL, nats a token", (("kl_to_start", "KL"),),
    ),
    _Spec(
        "supervised", "Supervised loss", "Summed over each reply that is imitated, and weighted.",
        "loss, nats a reply", (("loss", "loss"),),
    ),
    _Spec(
        "supervised", "Surprise at what is imitated", "How unlikely the model finds it. Lower is better.",
        "nats a token", (("nll", "negative log-likelihood"),),
    ),
    _Spec(
        "demonstrations", "Surprise at the demonstrations", "How unlikely the model finds what the user showed.",
        "nats a token", (("nll", "negative log-likelihood"),),
    ),
    _Spec(
        "demonstrations", "Reward that the logits imply", "Mean over demonstrated tokens, with the inverse-Q penalty.",
        "nats", (("implied_reward", "implied reward"),), main=False,
    ),
    _Spec(
        "offline", "Loss on pairs", "Of the objective that learns from the file's pairs, a step.",
        "loss", (("loss", "loss"),),
    ),
    _Spec(
        "offline", "Pairs on the right side", "Share of a step's pairs of which the better reply has gained more.",
        "share of pairs", (("accuracy", "accuracy"),), share=True,
    ),
    _Spec(
        "offline-heldout", "Held-out pairs", "Before the stage and after it; nothing was learned from these.",
        "share of pairs", (("reward", "better reply gained more"), ("likelihood", "better reply likelier"),
         ("per_token", "likelier a token")), share=True,
    ),
    _Spec(
        "gate", "Gate suite by version", "What the gate measured on its own questions.", "share of questions",
        (("made_up_unanswerable", "made up"), ("correct_answerable", "right answers"),
         ("abstained_answerable", "withheld"), ("asked_back_ambiguous", "asked back")), share=True,
    ),
    _Spec(
        "rollout", "Groups that taught nothing", "Dead groups and replies without a reward.",
        "count", (("dead_groups", "dead groups"), ("missing_rewards", "missing rewards")), main=False,
    ),
    _Spec(
        "rollout", "Spread of meaning", "Mean semantic entropy of the groups.",
        "nats", (("semantic_entropy", "semantic entropy"),), main=False,
    ),
    _Spec(
        "rollout", "Length of replies", "Mean length.", "tokens", (("reply_tokens", "tokens"),), main=False,
    ),
    _Spec(
        "update", "Policy loss", "What is minimised; its level has no meaning of its own.",
        "loss", (("loss", "loss"),), main=False,
    ),
    _Spec(
        "update", "Clipped tokens", "Share of tokens whose ratio was clipped.",
        "share of tokens", (("clip_fraction", "clipped"),), share=True, main=False,
    ),
    _Spec(
        "update", "Probability ratio", "New against sampling policy; far from 1 is stale data.",
        "ratio", (("ratio", "ratio"),), main=False,
    ),
    _Spec(
        "update", "Gradient norm, rounds", "Before scaling down.",
        "norm", (("grad_norm", "norm"),), main=False,
    ),
    _Spec(
        "supervised", "Gradient norm, supervised", "Before scaling down.",
        "norm", (("grad_norm", "norm"),), main=False,
    ),
)  # fmt: skip
_GATE_SHARES = {
    "made_up_unanswerable": ("unanswerable", "wrong"),
    "correct_answerable": ("answerable", "correct"),
    "abstained_answerable": ("answerable", "abstained"),
    "asked_back_ambiguous": ("ambiguous", "asked_back"),
}
_X_TITLES = {
    "rollout": "batch of replies",
    "update": "optimiser step",
    "supervised": "optimiser step",
    "demonstrations": "optimiser step",
    "offline": "optimiser step",
    "offline-heldout": "measurement",
    "gate": "version",
}


def measures(evidence: Any) -> tuple[Measure, ...]:
    """Rows of `summary.json`'s evaluation, or of a decision's evidence."""
    found = []
    for row in evidence or ():
        numbers = {k: _finite(row.get(k)) for k in ("before", "after", "low", "high")}
        found.append(
            Measure(str(row.get("suite", "")), str(row.get("metric", "")), n=int(row.get("n") or 0), **numbers)
        )
    return tuple(found)


def _finite(value: Any) -> float | None:
    """A number, or None for what is missing or not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def thin(count: int, most: int) -> list[int]:
    """At most `most` (>= 2) of `count` positions, evenly spread, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def gate_shares(outcomes: Rows) -> list[dict[str, Any]]:
    """Shares by version on the gate's suite, as metrics rows; each recomputes from the outcomes."""
    rows: list[dict[str, Any]] = []
    for version in dict.fromkeys(o["version"] for o in outcomes):
        values = {}
        for name, (kind, counted) in _GATE_SHARES.items():
            mine = [o["outcome"] == counted for o in outcomes if (o["version"], o["kind"]) == (version, kind)]
            if mine:
                values[name] = sum(mine) / len(mine)
        rows.append({"unit": version, "step": len(rows), "stage": "gate", "values": values})
    return rows


def curves(metrics: Rows, versions: Mapping[str, str], limit: float | None, most: int) -> list[Curve]:
    """All charts for which the ledger has values.

    Args:
        metrics: Rows of the ledger's table of that name.
        versions: Version each unit ended with.
        limit: Tolerated mean cost, or None when the constraint is off.
        most: Points a line, at most.
    """
    found: list[Curve] = []
    for spec in _SPECS:
        rows = [m for m in metrics if m["stage"] == spec.stage]
        keys = [k for key in spec.keys for k in _expand(key, rows)]
        series = [Series(name, tuple(_value(r["values"], key) for r in rows)) for key, name in keys]
        series = [s for s in series if any(v is not None for v in s.values)]
        for start in range(0, len(series), _SERIES_A_CHART):
            part = series[start : start + _SERIES_A_CHART]
            found.append(_curve(spec, rows, part, versions, limit if spec.keys[0][0] == "cost" else None, most))
    return found


def _expand(key: tuple[str, str], rows: Rows) -> list[tuple[str, str]]:
    """`term_*` stands for every such key, in order of appearance."""
    if not key[0].endswith("*"):
        return [key]
    start = key[0][:-1]
    names = dict.fromkeys(k for r in rows for k in r["values"] if k.startswith(start))
    return [(name, plain(name.removeprefix(start))) for name in names]


def _value(values: Mapping[str, Any], key: str) -> float | None:
    """A figure of one row; `a/b` is the share of a in b. What is missing is None, never 0."""
    part, _, whole = key.partition("/")
    value, base = values.get(part), values.get(whole) if whole else 1.0
    if not isinstance(value, int | float) or not isinstance(base, int | float) or not base:
        return None
    return value / base


def _curve(
    spec: _Spec,
    rows: Rows,
    series: Sequence[Series],
    versions: Mapping[str, str],
    limit: float | None,
    most: int,
) -> Curve:
    """One chart, thinned. Its horizontal axis counts rows: step numbers may start anew in every unit."""
    kept = thin(len(rows), most)
    units = [str(rows[i]["unit"]) for i in kept]
    one_a_unit = len({r["unit"] for r in rows}) == len(rows)
    if spec.stage == "gate":
        ticks = [versions.get(u) or u for u in units]
    elif one_a_unit and spec.stage == "rollout":
        ticks = [u.removeprefix("round-") for u in units]
    else:
        ticks = [str(i + 1) for i in kept]
    x_title = "round" if one_a_unit and spec.stage == "rollout" else _X_TITLES[spec.stage]
    lines = tuple(Series(s.name, tuple(s.values[i] for i in kept)) for s in series)
    return Curve(
        spec.title, spec.note, x_title, spec.y_title, spec.share, tuple(ticks), tuple(units), lines, limit,
        len(rows), spec.main,
    )  # fmt: skip


def share_bars(outcomes: Rows, kinds: Sequence[str], before: str, after: str) -> list[ShareBar]:
    """Counts of outcomes by kind, before and after."""
    bars = []
    for kind in kinds:
        for version, role in ((before, "before"), (after, "after")):
            mine = [o["outcome"] for o in outcomes if o["kind"] == kind and o["version"] == version]
            names = (*_OUTCOMES, *sorted(set(mine) - set(_OUTCOMES)))
            counts = tuple((name, mine.count(name)) for name in names if name in mine)
            bars.append(ShareBar(kind, version, role, len(mine), counts))
    return bars
