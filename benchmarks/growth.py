"""How a learning step's time and memory grow with its tokens: 16 times as many, in five steps.

    python benchmarks/growth.py
    python benchmarks/growth.py --json

GRPO on SmolLM2-135M-Instruct in bfloat16, LoRA rank 16 everywhere, groups of 8 replies of 64 tokens;
what grows is the number of groups. Each size runs in a process of its own, so that its peak memory is its own.
`linear_within` is the largest departure of seconds a token from their median over all sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from typing import Any

from duel import peak_memory

GROUPS = (2, 4, 8, 16, 32)
SAMPLES, TOKENS = 8, 64


def measure(count: int, repeats: int) -> dict[str, Any]:
    """Seconds of reference pass and optimiser step, and the peak of memory."""
    from tutelage.engines.load import load_model
    from tutelage.engines.packing import Group
    from tutelage.objectives.policy_gradient import Grpo
    from tutelage.policy.learner import Learner, TrainGroup, score
    from tutelage.policy.lora import attach
    from tutelage.records import Message, Prompt

    lm = load_model("smollm2-135m-instruct", dtype="bfloat16")
    adapter = attach(lm.model, rank=16, alpha=32, seed=0)
    learner = Learner(lm, adapter, learning_rate=1e-5, budget=2048)
    loaded = peak_memory()
    dice = random.Random(0)  # noqa: S311
    groups, train = [], []
    for i in range(count):
        prompt = lm.encode(Prompt(str(i), (Message("user", f"Tell me a long story about the number {i}."),)))
        replies = tuple(tuple(dice.randrange(3, 49_000) for _ in range(TOKENS)) for _ in range(SAMPLES))
        groups.append(Group(prompt, replies, tuple(range(i * SAMPLES, (i + 1) * SAMPLES))))
        same = tuple((-9.0,) * TOKENS for _ in replies)
        train.append(TrainGroup(prompt, replies, tuple((dice.gauss(0, 1),) * TOKENS for _ in replies), same, same))
    taken = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        with adapter.off():
            score(lm, groups, budget=2048)
        learner.step(train, Grpo(0.2, 0.04))
        taken.append(time.perf_counter() - began)
    return {
        "tokens": count * SAMPLES * TOKENS,
        "seconds": statistics.median(taken[1:]),
        "peak_bytes": peak_memory(),
        "loaded_bytes": loaded,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--groups", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.groups:
        print(json.dumps(measure(given.groups, given.repeats)))
        return
    rows = []
    for count in GROUPS:
        command = [sys.executable, __file__, "--groups", str(count), "--repeats", str(given.repeats)]
        surroundings = os.environ | {"OMP_NUM_THREADS": str(given.threads)}
        done = subprocess.run(command, env=surroundings, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        if not given.json:
            r = rows[-1]
            print(
                f"{r['tokens']:6d} tokens: {r['seconds']:6.2f} s, {1e3 * r['seconds'] / r['tokens']:.3f} ms a token, "
                f"{r['peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
    each = [r["seconds"] / r["tokens"] for r in rows]
    middle = statistics.median(each)
    found = {
        "sizes": rows,
        "linear_within": max(abs(x / middle - 1) for x in each),
        "memory_growth": rows[-1]["peak_bytes"] / rows[0]["peak_bytes"],
    }
    if given.json:
        print(json.dumps(found, indent=1))
    else:
        print(
            f"seconds a token within {100 * found['linear_within']:.0f}% of their median; "
            f"memory grows {found['memory_growth']:.2f} times over {GROUPS[-1] // GROUPS[0]} times the tokens"
        )


if __name__ == "__main__":
    main()
