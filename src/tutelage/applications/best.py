"""Best of N: draw N replies a prompt, let the run's own judges choose one. Nothing is learned."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutelage.applications.judging import refuse_untrusted
from tutelage.applications.truthfulness import set_up
from tutelage.config import data_file
from tutelage.errors import InputError
from tutelage.feedback.constitution import load_constitution
from tutelage.loop.bench import Workbench, derive_seed
from tutelage.loop.contest import paired_mean
from tutelage.loop.stages import judge, reward
from tutelage.loop.versions import latest
from tutelage.records import Generation, Progress, Prompt, Reward, SamplerSettings, Verdict
from tutelage.store.ledger import Unit
from tutelage.store.prompts import read_prompts
from tutelage.store.runs import Run, check_folder, write_atomic

__all__ = ["best_of", "expected_best", "kl_bound", "pick", "summary"]

_TOGETHER = 64  # prompts judged at once


def kl_bound(n: int) -> float:
    """The most that best of n can be from one draw: log n - (n - 1)/n, in nats a reply.

    It was long taken for the divergence itself; it is an upper bound, tight where no two replies are equal and n is
    small beside their number. Source: Beirami et al. 2024 (arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def expected_best(rewards: Sequence[float], k: int) -> float:
    """Expected highest reward of k draws, without bias from n >= k draws: the mean over all subsets of size k.

    sum_i C(i - 1, k - 1) / C(n, k) r_(i), r_(i) the i-th smallest: it is the highest of that many subsets.
    """
    ranked = sorted(rewards)
    return math.fsum(math.comb(i, k - 1) * r for i, r in enumerate(ranked)) / math.comb(len(ranked), k)


def pick(rewards: Sequence[Reward]) -> int | None:
    """The number of the reply with the highest reward, the first of several; None when none has one."""
    known = [(r.total, -i) for i, r in enumerate(rewards) if r.total is not None]
    return -max(known)[1] if known else None


def best_of(
    prompts: str | Path,
    run_folder: Path,
    out: Path,
    *,
    n: int = 8,
    version: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Draw, judge, choose, and write a line a prompt with every reply and verdict.

    Args:
        prompts: JSONL, CSV or Parquet of prompts.
        run_folder: The run whose model draws and whose recipe says how it is judged.
        out: JSONL to write, whole or not at all.
        n: Replies a prompt.
        version: Checkpoint of the run, or "start"; None takes its candidate, or its last one.
        seed: Of the draws.
        limit: Only the first prompts.
        max_new_tokens: Longest reply; None takes the recipe's.
        temperature: Of the draws; None takes the recipe's.
        progress: Told what happens.

    Returns:
        Counts; `curve`, a number of draws its expected reward and the bound on the divergence (of prompts of which
        every reply has a reward); `terms`, what one draw and the chosen one have of each, paired.

    Raises:
        TutelageError: A file or the run cannot be read, a judge was refused, or a number makes no sense.
    """
    if n < 1:
        raise InputError(f"n is {n}", expected="1 or more replies a prompt", fix="give --n 8")
    check_folder(out)
    asked = read_prompts(data_file(str(prompts), suffix="questions/*.jsonl"), limit=limit)
    opened = Run.open(run_folder, write=False)
    try:
        if opened.recipe.controller.enabled and version != "start":
            raise InputError(
                f"{opened.name} trained a controller, which chooses how each reply is drawn",
                expected="a run that trained weights",
                fix="give --version start to draw from its model alone",
            )
        bench = _ready(opened, version or latest(opened), progress)
        settings = _settings(bench, max_new_tokens, temperature)
        rows: list[dict[str, Any]] = []
        groups: list[list[Reward]] = []
        for start in range(0, len(asked), _TOGETHER):
            part = asked[start : start + _TOGETHER]
            found = _chosen(bench, part, n, settings, seed)
            rows += found[0]
            groups += found[1]
        write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        told = {"run": opened.name, "version": bench.version, "n": n, "out": str(out)}
        return told | summary(groups, n)
    finally:
        opened.close()


def _ready(opened: Run, version: str, progress: Progress) -> Workbench:
    rules = load_constitution(data_file(opened.recipe.feedback.constitution, suffix="constitutions/*.toml"))
    bench = set_up(opened, rules, progress)
    feedback = opened.recipe.feedback
    refuse_untrusted(bench.judges, others=any(j != "text" for j in feedback.judges), allowed=feedback.allow_refused)
    if version != "start":
        bench.load(version)
    return bench


def _settings(bench: Workbench, longest: int | None, temperature: float | None) -> SamplerSettings:
    s = bench.recipe.sampling
    warmth = s.temperature if temperature is None else temperature
    if not 0.0 < warmth < math.inf:
        raise InputError(f"temperature is {warmth}", expected="above 0, or all replies are the same", fix="give 1")
    return SamplerSettings(warmth, max_new_tokens=s.max_new_tokens if longest is None else longest)


def _chosen(
    bench: Workbench, prompts: Sequence[Prompt], n: int, settings: SamplerSettings, seed: int
) -> tuple[list[dict[str, Any]], list[list[Reward]]]:
    """Lines of the file, and the rewards behind them."""
    bench.progress.stage(f"best of {n}: draw", len(prompts) * n, "replies")
    replies_PG = bench.completer.generate(
        prompts, samples=n, settings=settings, seed=derive_seed(seed, "best"), version=bench.version,
        progress=bench.progress.advance,
    )  # fmt: skip
    findings = judge(bench, prompts, replies_PG, Unit("best", "best"))
    rewards_PG = reward(bench, findings, replies_PG)
    said: dict[str, list[Verdict]] = {}
    for verdict in findings.verdicts:
        said.setdefault(verdict.subject, []).append(verdict)
    return [
        _line(bench.version, prompt, replies, rewards, said)
        for prompt, replies, rewards in zip(prompts, replies_PG, rewards_PG, strict=True)
    ], rewards_PG


def _line(
    version: str,
    prompt: Prompt,
    replies: Sequence[Generation],
    rewards: Sequence[Reward],
    said: dict[str, list[Verdict]],
) -> dict[str, Any]:
    best = pick(rewards)
    turns = [{"role": m.role, "content": m.content} for m in prompt.messages]
    return {
        "id": prompt.id,
        "prompt": turns[0]["content"] if len(turns) == 1 else turns,
        "reply": None if best is None else replies[best].text,
        "reward": None if best is None else rewards[best].total,
        "chosen": best,
        "version": version,
        "replies": [
            {
                "text": reply.text,
                "reward": r.total,
                "terms": dict(r.raw),
                "verdicts": [{"judge": v.judge, "value": v.value, "reason": v.reason} for v in said.get(reply.id, [])],
            }
            for reply, r in zip(replies, rewards, strict=True)
        ],
    }


def summary(groups: Sequence[Sequence[Reward]], n: int) -> dict[str, Any]:
    """What choosing brought, from the rewards of each prompt's n replies."""
    chosen = [(group, best) for group in groups if (best := pick(group)) is not None]
    totals = [[r.total for r in group if r.total is not None] for group in groups]
    whole = [t for t in totals if len(t) == n]
    counts = sorted({k for e in range(n.bit_length()) if (k := 2**e) <= n} | {n})
    curve = [
        {"n": k, "reward": math.fsum(expected_best(t, k) for t in whole) / len(whole), "kl_bound": kl_bound(k)}
        for k in counts
        if whole
    ]
    names = dict.fromkeys(name for group in groups for r in group for name in r.raw)
    terms = {name: row for name in names if (row := _term(chosen, name)) is not None}
    return {
        "prompts": len(groups),
        "abstained": len(groups) - len(chosen),
        "whole": len(whole),
        "kl_bound": kl_bound(n),
        "curve": curve,
        "terms": terms,
    }


def _term(chosen: Sequence[tuple[Sequence[Reward], int]], name: str) -> dict[str, float | int | None] | None:
    one, best = [], []
    for group, i in chosen:
        known = [v for r in group if (v := r.raw.get(name)) is not None]
        mine = group[i].raw.get(name)
        if known and mine is not None:
            one.append(math.fsum(known) / len(known))
            best.append(mine)
    if not best:
        return None
    low, high = paired_mean(one, best)
    n = len(best)
    return {"one": math.fsum(one) / n, "best": math.fsum(best) / n, "low": low, "high": high, "n": n}
