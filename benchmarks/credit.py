"""Steps to a level of reward by how credit is spread over a reply's tokens: attention, uniform, all on the last.

    python benchmarks/credit.py                       # ten seeds, three methods
    python benchmarks/credit.py --seeds 3 --json

SmolLM2-135M-Instruct, LoRA rank 16 on all linear layers, bfloat16, GRPO with reward-to-go, 4 prompts x 8
replies x 16 tokens a step, rate 2e-4, KL coefficient 0.04. The reward is the share of a reply's words that have
at most four letters, so truth about credit is known: each word earns its own. Every STRIDE steps the policy is
measured on 16 prompts that it never learns from, 2 replies each. A run ends when the mean of its last two
measurements has reached --level, or after --longest steps, which then counts as its number. `last` is the usual
sequence-level reward: with reward-to-go every token gets the whole advantage.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from grpo_vs_trl import ALPHA, BETA, CLIP, RANK, TOPICS, endless, questions, short_words

from tutelage.credit import tokens as credit
from tutelage.engines.load import load_model
from tutelage.engines.local import LocalCompleter
from tutelage.engines.packing import Group
from tutelage.objectives.advantages import advantages_grpo
from tutelage.objectives.policy_gradient import Grpo
from tutelage.policy.learner import Learner, TrainGroup, score
from tutelage.policy.lora import attach
from tutelage.records import Message, Prompt, SamplerSettings

METHODS = ("attention", "uniform", "last")
PROMPTS, SAMPLES, TOKENS, RATE, STRIDE, BUDGET = 4, 8, 16, 2e-4, 2, 640
SHARE = 0.8  # of the advantage that is spread; the recipe's


def asked(texts: Sequence[str]) -> list[Prompt]:
    """Prompts of these texts."""
    return [Prompt(text, (Message("user", text),)) for text in texts]


def run(method: str, seed: int, *, level: float, longest: int) -> dict[str, Any]:
    """One training: steps it took, the curve on unseen prompts, KL a token at the end."""
    torch.manual_seed(seed)
    lm = load_model("smollm2-135m-instruct", dtype="bfloat16")
    adapter = attach(lm.model, rank=RANK, alpha=ALPHA, seed=seed)
    completer = LocalCompleter(endless(lm), rows=64)
    learner = Learner(lm, adapter, learning_rate=RATE, budget=BUDGET)
    settings = SamplerSettings(1.0, max_new_tokens=TOKENS)
    learned, unseen = asked(questions(PROMPTS)), asked([f"Tell me a tale about {topic}." for topic in TOPICS])
    curve: list[float] = []
    kl, steps = 0.0, 0
    while steps < longest:
        steps += 1
        replies = completer.generate(
            learned, samples=SAMPLES, settings=settings, seed=1000 * seed + steps, version=str(steps)
        )
        kl = learner.step(groups_of(lm, adapter, learned, replies, method), Grpo(CLIP, BETA))["kl_to_start"]
        if steps % STRIDE == 0:
            said = completer.generate(unseen, samples=2, settings=settings, seed=7, version=str(steps))
            curve.append(statistics.fmean(short_words(r.text) for group in said for r in group))
            if len(curve) > 1 and (curve[-1] + curve[-2]) / 2 >= level:
                break
    reached = len(curve) > 1 and (curve[-1] + curve[-2]) / 2 >= level
    return {"method": method, "seed": seed, "steps": steps, "reached": reached, "curve": curve, "kl": kl}


def groups_of(lm: Any, adapter: Any, prompts: Sequence[Prompt], replies: Any, method: Any) -> list[TrainGroup]:
    """What a step learns from: each token weighed by the credit from it on."""
    rows = iter(range(PROMPTS * SAMPLES))
    packed = [
        Group(lm.encode(p), tuple(r.tokens for r in group), tuple(next(rows) for _ in group))
        for p, group in zip(prompts, replies, strict=True)
    ]
    with adapter.off():
        scores = score(lm, packed, budget=BUDGET, attention=method == "attention")
    rewards = torch.tensor([[short_words(r.text) for r in group] for group in replies])
    weights = credit.weights(method, scores.keep_BT, scores.attention_BT)
    advantage_B = advantages_grpo(rewards).flatten()
    ahead = credit.reward_to_go(credit.assign(advantage_B, weights, scores.keep_BT, beta=SHARE))
    found = []
    for group, said in zip(packed, replies, strict=True):
        lengths = [len(c) for c in group.completions]
        tables = (ahead, scores.logp_BT)
        worth, reference = (
            tuple(tuple(table[row, :n].tolist()) for row, n in zip(group.rows, lengths, strict=True))
            for table in tables
        )
        found.append(TrainGroup(group.prompt, group.completions, worth, tuple(r.logps for r in said), reference))
    return found


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """A line a method: steps as median, quartiles and worst; how many reached the level; KL."""
    lines = ["| credit | seeds | steps to the level | worst | reached | KL a token at the end |", "|---" * 6 + "|"]
    for method in METHODS:
        own = [r for r in rows if r["method"] == method]
        if not own:
            continue
        steps = [r["steps"] for r in own]
        low, _, high = statistics.quantiles(steps, n=4, method="inclusive") if len(steps) > 1 else (steps[0],) * 3
        kl = statistics.median(r["kl"] for r in own)
        reached = sum(r["reached"] for r in own)
        lines.append(
            f"| {method} | {len(own)} | {statistics.median(steps):g} ({low:g} to {high:g}) | {max(steps)} | "
            f"{reached}/{len(own)} | {kl:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--level", type=float, default=0.8)
    parser.add_argument("--longest", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = []
    for seed in range(given.seeds):
        for method in METHODS:
            rows.append(run(method, seed, level=given.level, longest=given.longest))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"rows": rows, "level": given.level}) if given.json else shown(rows))


if __name__ == "__main__":
    main()
