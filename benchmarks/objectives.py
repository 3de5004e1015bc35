"""Every objective on the same task with the same budget of samples: the honesty recipe, small, five seeds.

    python benchmarks/objectives.py --runs /tmp/objectives            # every objective, every seed
    python benchmarks/objectives.py --runs /tmp/objectives --only "grpo;dpo" --seeds 2
    python benchmarks/objectives.py --table                           # print the table from the records

All objectives of a seed start from the same supervised stage, played once, and draw the same number of
replies to the same prompts: ROUNDS x PROMPTS x SAMPLES. Step sizes are the recipe's for all (one tuned for
GRPO), except where ARMS says otherwise, because a loss is on another scale; none was chosen on the held-out
suite. What a run came to is a line of --records, so that sessions and machines add up; seconds are those of the machine
(`dtype` says which number format it had). Runs are kept under --runs and never repeated. Collapsed: more than half of
the held-out replies are one and the same text, or training stopped at a loss that was not finite.
"""

from __future__ import annotations

import argparse
import collections
import json
import sqlite3
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import records
from honesty import copy_start

import tutelage
from tutelage.config import load_recipe
from tutelage.errors import TutelageError
from tutelage.studio.console import PlainProgress

ROUNDS, PROMPTS, SAMPLES = 2, 32, 8
COMMON = [
    f"update.rounds={ROUNDS}", f"update.prompts={PROMPTS}", f"update.samples={SAMPLES}", "update.batch=8",
    "prompts.limit=240", "prompts.gate_limit=60",
]  # fmt: skip
START = "start-of"
ARMS: dict[str, list[str]] = {
    name: [f'update.objective="{name}"']
    for name in (
        "grpo", "reinforce", "rloo", "dr-grpo", "dapo", "reinforce-plus-plus", "gspo", "cispo-cap", "cispo-clamp",
        "ppo", "nash", "dpo", "robust-dpo", "ipo", "ipo-per-token", "exo-pair", "simpo", "orpo", "kto",
        "unlikelihood",
    )
}  # fmt: skip
ARMS["dpo, geometric"] = ['update.objective="dpo"', 'objective.mode="improve"']
ARMS["dpo, smoothed"] = ['update.objective="dpo"', "objective.smoothing=0.1"]
ARMS["dpo, every two"] = ['update.objective="dpo"', 'objective.pairs="all"']
ARMS |= {
    "grpo, uniform credit": ['update.objective="grpo"', 'credit.method="uniform"'],
    "grpo, sparse credit": ['update.objective="grpo"', 'credit.method="last"'],
    "grpo, decomposed credit": [
        'update.objective="grpo"',
        'credit.method="decomposed"',
        "credit.discount=0.0",
        'credit.rest="spread"',
    ],
}
FROM_ADAPTER = ("ppo",)
METRICS = ("made_up_unanswerable", "correct_answerable", "abstained_known", "asked_back_ambiguous")


def play(arm: str, seed: int, runs: Path) -> dict[str, Any]:
    """What one run came to; played when it is not there yet."""
    name = folder(arm, seed)
    done = runs / name / "summary.json"
    if not done.is_file():
        start = runs / f"{START}-{seed}"
        if arm == START:
            recipe = load_recipe("honesty", [*COMMON, "update.rounds=0", f"seed={seed}"])
        else:
            # A run with a value head cannot go on where one without it stood; it takes the stage's adapter.
            stage = [f'supervised.adapter="{start / "checkpoints" / "r0"}"'] if arm in FROM_ADAPTER else []
            recipe = load_recipe("honesty", [*COMMON, *ARMS[arm], *stage, f"seed={seed}"])
        resume = (runs / name / "recipe.toml").is_file()
        if arm != START and not resume and arm not in FROM_ADAPTER:
            copy_start(start, runs / name, recipe.to_toml())
            resume = True
        with PlainProgress() as progress:
            tutelage.run(recipe, name=name, runs=runs, resume=resume, progress=progress)
    summary: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    after = {e["metric"]: e["after"] for e in summary["evaluation"]}
    budget = {"rounds": ROUNDS, "prompts": PROMPTS, "samples": SAMPLES}
    row = {"arm": arm, "seed": seed, **budget, "after": after, "kl": summary.get("kl_to_start"), "dtype": dtype()}
    return row | looked(runs / name / "ledger.db", summary)


def dtype() -> str:
    """The number format that `auto` takes here."""
    import torch

    from tutelage.engines.load import choose_dtype

    return str(choose_dtype("auto", torch.device("cpu"))).removeprefix("torch.")


def folder(arm: str, seed: int) -> str:
    """Name of a run."""
    return f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"


def looked(ledger: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Share of the commonest held-out reply, seconds of the rounds, and whether the run collapsed."""
    db = sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)
    suite = summary["evaluation"][0]["suite"]
    query = "SELECT reply FROM outcomes WHERE suite = ? AND version = ?"
    texts = [text for (text,) in db.execute(query, (suite, summary["candidate"]))]
    seconds = sum(s for (s,) in db.execute("SELECT seconds FROM units WHERE stage IN ('policy-gradient', 'stopped')"))
    stopped = db.execute("SELECT count(*) FROM notes WHERE topic = 'failures' AND body != '[]'").fetchone()[0]
    db.close()
    commonest = max(collections.Counter(texts).values()) / len(texts) if texts else 0.0
    return {"commonest": commonest, "seconds": seconds, "collapsed": bool(stopped) or commonest > 0.5}


def triple(found: Sequence[float], form: str) -> str:
    """Median, interquartile range."""
    if not found:
        return "-"
    if len(found) == 1:
        return format(found[0], form)
    low, _, high = statistics.quantiles(found, n=4, method="inclusive")
    return f"{statistics.median(found):{form}} ({low:{form}} to {high:{form}})"


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Rows of RESULTS.md."""
    heads = ("objective", "seeds", *METRICS, "worst made up", "KL a token", "collapsed", "s of the rounds")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm, rows in found.items():

        def of(metric: str, rows: Sequence[dict[str, Any]] = rows) -> list[float]:
            return [value for r in rows if (value := r["after"].get(metric)) is not None]

        made_up = of("made_up_unanswerable")
        kl = [r["kl"] for r in rows if r["kl"] is not None]
        cells = [
            "supervised stage alone" if arm == START else arm, str(len(rows)), *(triple(of(m), ".0%") for m in METRICS),
            f"{max(made_up):.0%}" if made_up else "-", triple(kl, ".2f"),
            f"{sum(r['collapsed'] for r in rows)}/{len(rows)}", triple([r["seconds"] for r in rows], ".0f"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse and play."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parted by ;: " + "; ".join(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--records", type=Path, default=Path(__file__).parent / "records" / "objectives.jsonl")
    parser.add_argument("--table", action="store_true", help="play nothing")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    arms = [START, *(given.only.split(";") if given.only else ARMS)]
    if unknown := [arm for arm in arms[1:] if arm not in ARMS]:
        parser.error(f"--only: '{unknown[0]}' is none of {'; '.join(ARMS)}")
    budget = {"rounds": ROUNDS, "prompts": PROMPTS, "samples": SAMPLES}
    for seed in () if given.table else range(given.first_seed, given.first_seed + given.seeds):
        for arm in arms:
            done = {(r["arm"], r["seed"]) for r in records.read(given.records, **budget)}
            # Others of the seed go on from its start, so that it must lie here, whatever the records say.
            if (arm, seed) in done and (arm != START or all((a, seed) in done for a in arms)):
                continue
            try:
                row = play(arm, seed, given.runs)
            except TutelageError as error:  # the others are not lost
                print(f"{folder(arm, seed)}: {error}", file=sys.stderr, flush=True)
                continue
            if (arm, seed) not in done:
                records.add(given.records, row)
    found = [r for r in records.read(given.records, **budget) if r["arm"] in arms]
    by_arm = {arm: own for arm in arms if (own := [r for r in found if r["arm"] == arm])}
    print(json.dumps(by_arm) if given.json else table(by_arm))


if __name__ == "__main__":
    main()
