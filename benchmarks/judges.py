"""Every judge beside every other on pairs that people compared: prompted models, critics, and their fusion.

    python benchmarks/judges.py --cache /tmp/judges                       # ask, train, fuse, print
    python benchmarks/judges.py --cache /tmp/judges --judge judge.gguf --pairs 100
    python benchmarks/judges.py --cache /tmp/judges --json

Data: the folder ../shared/data beside the checkout, or --data. Two sets: Anthropic's HH (harmless, half of
the test split, dialogues) and Open-Instruct's human pairs (annotators' majority), each a random part of the
pairs of at most --longest characters, the same part for every judge. Prompted judges are the embedded model
and GGUF files given with --judge (the extra `gguf`); what they said is kept under --cache, ten pairs at a
time, with the seconds it took. Critics (`critic words`, `critic encoder`, `critic trunk`) learn from the other
four fifths of all pairs of the set. The fusion is fitted on 50 pairs' human labels, drawn 40 times, and
measured on the pairs that were not drawn; `beats` is its accuracy minus each source's on the same pairs.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import critics
import numpy as np
from sklearn.model_selection import GroupKFold

from tutelage.applications.judging import answers_file, parse_judge
from tutelage.feedback.asking import Opinion
from tutelage.feedback.audit import Audit, audit
from tutelage.feedback.critic_data import BLOCKS, Pairs, Passage, families
from tutelage.feedback.fusion import fit_fusion
from tutelage.feedback.model_judge import ComparingJudge, Pair
from tutelage.feedback.roster import open_judge
from tutelage.feedback.text_critic import TextCritic
from tutelage.records import Message, PreferencePair, Prompt, content_hash

LABELS, DRAWS, RESAMPLES = 50, 40, 2000
PORTION = 10  # pairs after which what a judge said is on disk
Said = list[dict[str, Any]]


def open_instruct(data: Path) -> list[PreferencePair]:
    """Pairs with the annotators' majority; even splits say nothing."""
    votes: dict[tuple[str, str, str], list[int]] = {}
    for row in critics.lines(data / "openinstruct-human" / "annotations.jsonl.gz"):
        one, other = (row[f"completion_{side}"] or "" for side in "ab")
        if row["preference"] == "tie" or not one.strip() or not other.strip() or one.strip() == other.strip():
            continue
        better, worse = (one, other) if row["preference"].startswith("a") else (other, one)
        count = votes.setdefault((row["prompt"], *sorted((one, other))), [0, 0])  # type: ignore[arg-type]
        count[better > worse] += 1
    found = []
    for (prompt, low, high), (for_low, for_high) in votes.items():
        if for_low != for_high:
            chosen, rejected = (low, high) if for_low > for_high else (high, low)
            asked = (Message("user", prompt),)
            counted = (float(max(for_low, for_high)), float(min(for_low, for_high)))
            found.append(PreferencePair(Prompt(content_hash([prompt]), asked), chosen, rejected, counted))
    return found


def hh(data: Path) -> list[PreferencePair]:
    """Dialogues that differ in their last reply."""
    pairs = critics.hh(data).pairs
    found = []
    for better, worse in zip(pairs.chosen, pairs.rejected, strict=True):
        if better.text.strip() and worse.text.strip() and better.text.strip() != worse.text.strip():
            prompt = Prompt(content_hash([[m.role, m.content] for m in better.context]), better.context)
            found.append(PreferencePair(prompt, better.text, worse.text))
    return found


SETS: dict[str, Callable[[Path], list[PreferencePair]]] = {"hh-rlhf": hh, "open-instruct": open_instruct}


def chosen_part(pairs: Sequence[PreferencePair], count: int, longest: int) -> list[int]:
    """Rows of a random part of the pairs that are not too long; a larger part begins with the smaller one."""

    def size(pair: PreferencePair) -> int:
        return sum(len(m.content) for m in pair.prompt.messages) + len(pair.chosen) + len(pair.rejected)

    short = [n for n, pair in enumerate(pairs) if size(pair) <= longest]
    random.Random(0).shuffle(short)  # noqa: S311
    return short[:count]


def key(pair: PreferencePair) -> str:
    """What a pair is called in the files of --cache."""
    return content_hash([pair.prompt.hash, pair.chosen, pair.rejected])


class Told:
    """What a judge said of pairs, the chosen reply as the first, as a judge again."""

    def __init__(self, name: str, said: Said) -> None:
        self.name = self.version = name
        self._said = {row["key"]: row for row in said}

    def compare(self, pairs: Sequence[Pair]) -> list[Opinion]:
        """From either side."""
        found = []
        for pair in pairs:
            one = self._said.get(content_hash([pair.prompt.hash, pair.first, pair.second]))
            row = one or self._said[content_hash([pair.prompt.hash, pair.second, pair.first])]
            sign = 1.0 if one else -1.0
            value = None if row["value"] is None else sign * row["value"]
            found.append(Opinion(value, row["reason"], row["evidence"]))
        return found

    def judge(self, prompts: Any, generations_PG: Any) -> Any:
        """Not asked here."""
        raise NotImplementedError


def ask(judge: ComparingJudge, pairs: Sequence[PreferencePair], file: Path) -> Said:
    """Show the judge the pairs that the file does not hold; the side of the better reply is a hash's."""
    said: Said = json.loads(file.read_text()) if file.is_file() else []
    known = {row["key"] for row in said}
    left = [pair for pair in pairs if key(pair) not in known]
    for start in range(0, len(left), PORTION):
        part = left[start : start + PORTION]
        sides = [int(key(pair), 16) % 2 == 0 for pair in part]
        shown = [
            Pair(p.prompt, p.chosen, p.rejected) if first else Pair(p.prompt, p.rejected, p.chosen)
            for p, first in zip(part, sides, strict=True)
        ]
        started = time.perf_counter()
        told = judge.compare(shown)
        seconds = (time.perf_counter() - started) / len(part)
        for pair, first, opinion in zip(part, sides, told, strict=True):
            value = None if opinion.value is None else opinion.value * (1 if first else -1)
            evidence = {k: v for k, v in opinion.evidence.items() if k in ("position", "flipped")}
            row = {"key": key(pair), "value": value, "reason": opinion.reason, "evidence": evidence}
            said.append(row | {"seconds": seconds, "tokens": opinion.cost.tokens})
        file.write_text(json.dumps(said))
    return [row for row in said if row["key"] in {key(pair) for pair in pairs}]


def learned(
    name: str, source: str, pairs: Sequence[PreferencePair], rows: Sequence[int], shelf: critics.Shelf
) -> tuple[Said, float]:
    """What critics of preference say of some pairs, each having learned from the folds without it; seconds to fit."""
    sides = [
        tuple(Passage(text, pair.prompt.messages) for pair, text in zip(pairs, texts, strict=True))
        for texts in ([p.chosen for p in pairs], [p.rejected for p in pairs])
    ]
    both = Pairs(*sides)
    kin_N = families(both.chosen, both.rejected)
    features, seconds = shelf.read(f"judges-{name}", (*both.chosen, *both.rejected), (source,), contextual=True)
    wanted = {block: features[block] for block in (*BLOCKS[source], "length")}
    count, margin_N, started = len(pairs), np.zeros(len(pairs)), time.perf_counter()
    for seen, out in GroupKFold(5, shuffle=True, random_state=0).split(kin_N, groups=kin_N):
        learning = (critics.part(wanted, seen), critics.part(wanted, seen + count))
        critic = TextCritic.fit_pairs(*learning, kin_N[seen], source=source, disentangle=False, seed=0)
        better, worse = (critic.score_features(critics.part(wanted, s)).log_odds_N for s in (out, out + count))
        margin_N[out] = better - worse
    fit = time.perf_counter() - started
    said = [
        {"key": key(pairs[n]), "value": float(margin_N[n]), "reason": "", "evidence": {},
         "seconds": 2 * seconds[source] / 1000, "tokens": 0}
        for n in rows
    ]  # fmt: skip
    return said, fit


def fused(names: Sequence[str], value_NJ: np.ndarray, labels: int = LABELS) -> dict[str, Any]:
    """The fusion's figures on pairs whose labels it did not see; the chosen reply is the first of half the pairs."""
    rng = np.random.default_rng(0)
    count = len(value_NJ)
    flip_N = np.where(np.arange(count) % 2 == 0, 1.0, -1.0)
    odds_NJ, yes_N = value_NJ * flip_N[:, None], (flip_N > 0).astype(int)
    right_SN = np.full((DRAWS, count), np.nan)
    p_SN = np.full((DRAWS, count), np.nan)
    for draw in range(DRAWS):
        known = rng.permutation(count)[:labels]
        label = np.full(count, -1)
        label[known] = yes_N[known]
        found = fit_fusion(odds_NJ, label).fuse(odds_NJ)
        right_SN[draw] = np.where(found.log_odds_N == 0, 0.5, (found.log_odds_N > 0) == (yes_N == 1))
        p_SN[draw] = np.where(yes_N == 1, found.probability_N, 1 - found.probability_N)
        right_SN[draw][known] = p_SN[draw][known] = np.nan
    value = np.where(np.isnan(value_NJ) | (value_NJ == 0), 0.5, value_NJ > 0)  # a source that abstains is a coin
    rows_SN = rng.integers(0, count, (RESAMPLES, count))
    mean_N = np.nanmean(right_SN, 0)
    drawn = mean_N[rows_SN].mean(1)

    def interval(of: np.ndarray) -> list[float]:
        return [float(x) for x in np.quantile(of, [0.025, 0.975])]

    return {
        "accuracy": [float(mean_N.mean()), *interval(drawn)],
        "brier": float(np.nanmean((1 - p_SN) ** 2)),
        "spread_over_draws": [float(x) for x in np.quantile(np.nanmean(right_SN, 1), [0.25, 0.5, 0.75])],
        "beats": {
            name: [float((mean_N - value[:, j]).mean()), *interval((mean_N - value[:, j])[rows_SN].mean(1))]
            for j, name in enumerate(names)
        },
        "pairs": count,
        "labels": labels,
    }


def row_of(audited: Audit, said: Said, *, fit: float | None = None) -> dict[str, Any]:
    """A judge's line of the table."""
    fields = ("judge", "outcome", "n", "abstained", "accuracy", "kappa", "brier", "ece", "flips", "position")
    found = {name: getattr(audited, name) for name in fields}
    seconds = sorted(row["seconds"] for row in said)
    found["length_slope"] = audited.length_slope
    found["seconds_per_1000"] = (
        1000 * seconds[len(seconds) // 2]
    )  # of portions of ten; the median forgives a busy minute
    found["why"] = audited.why
    return found | ({} if fit is None else {"seconds_to_fit": fit})


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For RESULTS.md."""
    heads = (
        "set",
        "judge",
        "pairs",
        "accuracy",
        "kappa",
        "Brier",
        "ECE",
        "flips",
        "position, nats",
        "s / 1,000",
        "check",
    )
    out = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [
            row["set"], row["judge"], str(row["n"]), shown(row["accuracy"]), shown(row["kappa"]), number(row["brier"]),
            number(row["ece"]), shown(row["flips"]), number(row["position"]), f"{row['seconds_per_1000']:.0f}",
            row["outcome"],
        ]  # fmt: skip
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def shown(triple: Sequence[float | None]) -> str:
    """Value and interval."""
    return "-" if triple[0] is None else "{:.2f} ({:.2f} to {:.2f})".format(*triple)


def number(value: float | None) -> str:
    """Two digits."""
    return "-" if value is None else f"{value:.2f}"


def main() -> None:
    """Ask, train, fuse, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for what judges said and for features")
    parser.add_argument("--set", action="append", choices=list(SETS))
    parser.add_argument("--judge", action="append", default=[], help="as for `tutelage judge check`; repeat")
    parser.add_argument("--pairs", type=int, default=200, help="of each set")
    parser.add_argument("--longest", type=int, default=1400, help="characters of prompt and both replies together")
    parser.add_argument("--source", action="append", choices=critics.SOURCES, help="of critics")
    parser.add_argument("--ask-only", action="store_true", help="only ask the prompted judges")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    rows, fusions = [], {}
    for name in given.set or SETS:
        everything = SETS[name](given.data)
        part = chosen_part(everything, given.pairs, given.longest)
        pairs = [everything[n] for n in part]
        said: dict[str, Said] = {}
        fits: dict[str, float] = {}
        for spec in given.judge:
            judge = open_judge(parse_judge(spec), None, answers=answers_file())
            said[judge.name] = ask(judge, pairs, given.cache / f"{name}-{judge.name}-{judge.version}.json")
        if given.ask_only:
            continue
        shelf = critics.Shelf(given.cache)
        for source in given.source or ("words", "encoder", "trunk"):
            told, fit = learned(name, source, everything, part, shelf)
            said[f"critic {source}"], fits[f"critic {source}"] = told, fit
        for who, told in said.items():
            audited, _ = audit(Told(who, told), pairs)
            rows.append({"set": name} | row_of(audited, told, fit=fits.get(who)))
        tables = [{row["key"]: row["value"] for row in told} for told in said.values()]
        value_NJ = np.array([[t.get(key(p)) for t in tables] for p in pairs], dtype=float)
        fusions[name] = fused(list(said), value_NJ)
    if given.json:
        print(json.dumps({"rows": rows, "fusion": fusions}))
    elif not given.ask_only:
        print(table(rows))
        for name, found in fusions.items():
            print(
                f"\n{name}: fusion with {LABELS} labels {shown(found['accuracy'])}, Brier {found['brier']:.2f}; beats"
            )
            print("\n".join(f"  {who}: {shown(by)}" for who, by in found["beats"].items()))


if __name__ == "__main__":
    main()
