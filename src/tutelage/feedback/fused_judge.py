"""A panel of several judges as one: their log-odds on pairs, fused by weights that a few people's labels gave.

The file of a fusion is JSON and holds its members as a recipe would name them, the weights with their
covariance, and what was measured on pairs that the weights did not see. A member that is not the one
it was fitted with (another model, other words, other principles) is refused: its weight means nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from tutelage.config import Judge
from tutelage.errors import InputError, ModelError
from tutelage.feedback.asking import Opinion
from tutelage.feedback.fusion import Fusion, fit_fusion
from tutelage.feedback.model_judge import ComparingJudge, Pair, ring, standings
from tutelage.records import Cost, Generation, PreferencePair, Prompt, Verdict, content_hash

__all__ = ["FusedJudge", "fit_panel", "fusion_file", "open_fused"]

_FORMAT = "tutelage fusion 1"


class FusedJudge:
    """Asks every member about a pair and fuses what they say; members that abstain add nothing.

    Args:
        name: Name of the judge and of its term.
        members: At least two.
        fusion: Fitted weights, one a member.
        opponents: How many others of its group each reply is compared with.
    """

    def __init__(self, name: str, members: Sequence[ComparingJudge], fusion: Fusion, *, opponents: int = 2) -> None:
        self.name, self.members, self.fusion, self.opponents = name, members, fusion, opponents
        self.version = content_hash(
            ["fusion", [m.version for m in members], fusion.weight_J.tolist(), fusion.scale_J.tolist()]
        )

    def judge(self, prompts: Sequence[Prompt], generations_PG: Sequence[Sequence[Generation]]) -> list[list[Verdict]]:
        """One verdict a generation: its mean chance to win against those it met."""
        games = ring(generations_PG, self.opponents)
        told = self.compare(
            [Pair(prompts[p], generations_PG[p][i].text, generations_PG[p][j].text) for p, i, j in games]
        )
        return [
            [
                Verdict(self.name, self.version, g.id, prompt.hash, o.value, o.reason, o.evidence, o.cost)
                for g, o in zip(group, opinions, strict=True)
            ]
            for prompt, group, opinions in zip(
                prompts, generations_PG, standings(generations_PG, games, told), strict=True
            )
        ]

    def compare(self, pairs: Sequence[Pair]) -> list[Opinion]:
        """One opinion a pair: the log-odds after what is not known of the weights, and what each member said."""
        if not pairs:
            return []
        by_member = [member.compare(pairs) for member in self.members]
        odds_NJ = np.array([[_number(o) for o in row] for row in zip(*by_member, strict=True)])
        fused = self.fusion.fuse(odds_NJ)
        found = []
        for n, row in enumerate(zip(*by_member, strict=True)):
            cost = sum((o.cost for o in row), Cost())
            said = {
                m.name: None if o.value is None else round(o.value, 4) for m, o in zip(self.members, row, strict=True)
            }
            if fused.sources_N[n] == 0:
                found.append(Opinion(None, f"abstains: {row[0].reason}", said, cost=cost))
                continue
            p = float(fused.probability_N[n])
            evidence = said | {"deviation": round(float(fused.deviation_N[n]), 4)}
            reason = f"{int(fused.sources_N[n])} of {len(row)} judges fused: {p:.0%} for the first"
            found.append(Opinion(math.log(p / (1 - p)) if 0 < p < 1 else 0.0, reason, evidence, cost=cost))
        return found


def _number(opinion: Opinion) -> float:
    return math.nan if opinion.value is None else opinion.value


def fit_panel(
    members: Sequence[ComparingJudge], pairs: Sequence[PreferencePair], *, labels: int
) -> tuple[Fusion, dict[str, Any]]:
    """Fit the weights on some pairs' human labels, and measure fusion and members on the others.

    Args:
        members: Judges, at least two.
        pairs: What people preferred; even votes teach nothing and are left out.
        labels: How many pairs' labels are used; the others' are only measured on.

    Returns:
        The weights, and what was measured: accuracy of `fusion` and of each member by name, each with its
        95% interval, and `beats`, the fusion's accuracy minus each member's on the same pairs.

    Raises:
        InputError: There are too few judges, labels or pairs.
    """
    if len(members) < 2 or len({m.name for m in members}) < len(members):
        raise InputError(
            f"a fusion of {', '.join(m.name for m in members) or 'nobody'}",
            expected="at least two judges of different names",
            fix="name more judges",
        )
    decided = [p for p in pairs if p.votes[0] != p.votes[1]]
    if not 1 <= labels <= len(decided):
        raise InputError(
            f"{labels} labels of {len(decided)} pairs on which people agree",
            expected=f"1 to {len(decided)}",
            fix="fewer labels, or a file of more pairs",
        )
    # A hash decides which side is shown first and which pairs teach, so that the file's order means nothing.
    order = sorted(decided, key=lambda p: content_hash([p.prompt.hash, p.chosen, p.rejected]))
    first_N = np.array([int(content_hash([p.chosen, p.rejected]), 16) % 2 == 0 for p in order])
    shown = [
        Pair(p.prompt, p.chosen, p.rejected) if first else Pair(p.prompt, p.rejected, p.chosen)
        for p, first in zip(order, first_N, strict=True)
    ]
    odds_NJ = np.array([[_number(o) for o in member.compare(shown)] for member in members]).T
    better_N = np.array([p.votes[0] > p.votes[1] for p in order])
    yes_N = (first_N == better_N).astype(int)
    label_N = np.where(np.arange(len(order)) < labels, yes_N, -1)
    fusion = fit_fusion(odds_NJ, label_N)
    fused_N = fusion.fuse(odds_NJ).log_odds_N
    return fusion, _measured([m.name for m in members], fused_N[labels:], odds_NJ[labels:], yes_N[labels:])


def _measured(names: Sequence[str], fused_N: np.ndarray, odds_NJ: np.ndarray, yes_N: np.ndarray) -> dict[str, Any]:
    """Accuracies, where an abstention is a coin, and paired differences, with bootstrap intervals over pairs."""
    right_NJ = np.stack([_right(fused_N, yes_N), *(_right(odds, yes_N) for odds in odds_NJ.T)], axis=1)
    found: dict[str, Any] = {"pairs": len(yes_N), "accuracy": {}, "beats": {}}
    if not len(yes_N):
        return found
    rows = np.random.default_rng(0).integers(0, len(yes_N), (2000, len(yes_N)))
    for j, name in enumerate(("fusion", *names)):
        found["accuracy"][name] = _interval(right_NJ[:, j], rows)
        if j:
            found["beats"][name] = _interval(right_NJ[:, 0] - right_NJ[:, j], rows)
    return found


def _right(odds_N: np.ndarray, yes_N: np.ndarray) -> np.ndarray:
    silent = ~np.isfinite(odds_N) | (odds_N == 0)
    with np.errstate(invalid="ignore"):
        return np.where(silent, 0.5, (odds_N > 0) == (yes_N == 1)).astype(float)


def _interval(value_N: np.ndarray, rows_SN: np.ndarray) -> list[float]:
    low, high = np.quantile(value_N[rows_SN].mean(1), [0.025, 0.975])
    return [round(float(x), 4) for x in (value_N.mean(), low, high)]


def fusion_file(
    judges: Sequence[Judge], members: Sequence[ComparingJudge], fusion: Fusion, measured: Mapping[str, Any]
) -> str:
    """The file's text."""
    body = {
        "format": _FORMAT,
        "members": [
            {"judge": judge.model_dump(mode="json", exclude_defaults=True), "version": member.version}
            for judge, member in zip(judges, members, strict=True)
        ],
        "weight": fusion.weight_J.tolist(),
        "covariance": fusion.covariance_JJ.tolist(),
        "scale": fusion.scale_J.tolist(),
        "labels": fusion.labels,
        "measured": dict(measured),
    }
    return json.dumps(body, indent=2, ensure_ascii=False) + "\n"


def open_fused(spec: Judge, open_member: Callable[[Judge], ComparingJudge]) -> FusedJudge:
    """Load a fusion and its members.

    Args:
        spec: The judge; `model` is the file.
        open_member: Opens one member.

    Raises:
        ModelError: The file is no fusion, or a member is not the one it was fitted with.
    """
    path = Path(spec.model).expanduser()
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["format"] != _FORMAT:
            raise ValueError(f"format {body['format']!r}")
        judges = [Judge(**m["judge"]) for m in body["members"]]
        versions = [str(m["version"]) for m in body["members"]]
        size = len(judges)
        fusion = Fusion(
            np.array(body["weight"], dtype=float).reshape(size),
            np.array(body["covariance"], dtype=float).reshape(size, size),
            np.array(body["scale"], dtype=float).reshape(size),
            int(body["labels"]),
        )
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise ModelError(
            f"{path} is no fusion that can be read ({error})",
            expected="a file that `tutelage judge fuse` wrote",
            fix="check the path, or fit it again",
        ) from error
    if any(j.kind == "fusion" for j in judges):
        raise ModelError(f"{path} has a fusion as a member", expected="judges that answer themselves")
    members = [open_member(judge) for judge in judges]
    for judge, member, version in zip(judges, members, versions, strict=True):
        if member.version != version:
            raise ModelError(
                f"'{judge.name}' in {path} is not the judge that was fitted: model, words or principles differ",
                expected="the constitution and the model of the time it was fitted",
                fix="fit it again: tutelage judge fuse, with --constitution as the run has it",
            )
    return FusedJudge(spec.name, members, fusion, opponents=spec.opponents)
