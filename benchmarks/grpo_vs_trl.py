"""One GRPO step, ours against TRL's: generate, score the reference, learn. Same model, work and rewards.

    python benchmarks/grpo_vs_trl.py                       # 4 prompts x 8 replies x 64 tokens
    python benchmarks/grpo_vs_trl.py --size large          # 16 x 8 x 128
    python benchmarks/grpo_vs_trl.py --json
    python benchmarks/grpo_vs_trl.py --size short --curve 25   # learning curves of five seeds, not timed

Both sides: SmolLM2-135M-Instruct, LoRA rank 16 on all linear layers, bfloat16, temperature 1, KL
coefficient 0.04, one pass over the samples. TRL (pip install trl==1.16.0 peft datasets) runs with
bfloat16 weights, without gradient checkpointing (faster) and with the micro-batch of --peer-batch
(8 was the fastest of 4, 8, 16 and 32 on two cores). Every reply is exactly as long as asked on both
sides, so that the work is the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from duel import Worker, answer, arguments, contest, peak_memory, quiet_output, serve, verdict

SIZES = {"small": (4, 8, 64), "large": (16, 8, 128), "short": (4, 8, 16), "tiny": (2, 4, 16)}
RANK, ALPHA, BETA, RATE, CLIP = 16, 32, 0.04, 1e-5, 0.2
CURVE_RATE = 2e-4
BUDGET = 640  # tokens of a micro-batch: one group of 8 x 64; 1,200 is 5% faster and takes 0.35 GB more
TOPICS = (
    "a dog that finds a letter", "rain in a desert town", "two brothers and a boat", "the last train home",
    "a garden on a roof", "an old clock maker", "a lost kite", "the first day at school",
    "a storm at sea", "a bakery at night", "the fox in the barn", "a walk on the moon",
    "a broken piano", "the market in spring", "a secret cave", "a letter from far away",
)  # fmt: skip


def questions(count: int) -> list[str]:
    """Prompts whose replies go on for long."""
    return [f"Write a long story about {TOPICS[i % len(TOPICS)]}." for i in range(count)]


def distinct_words(text: str) -> float:
    """Share of distinct words: cheap, the same on both sides, and different from reply to reply."""
    words = text.lower().split()
    return len(set(words)) / max(len(words), 1)


def short_words(text: str) -> float:
    """Share of words of at most four letters: what the learning curves are about, since it can be learned soon."""
    words = text.split()
    return sum(len(w) <= 4 for w in words) / max(len(words), 1)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is rewarded, how fast is learned, and the seed of draws and adapter."""

    reward: Callable[[str], float] = distinct_words
    rate: float = RATE
    seed: int = 0


def ours(prompts: int, samples: int, tokens: int, task: Task, *, int8: bool) -> None:
    """Our worker."""
    import torch

    from tutelage.engines.load import load_model
    from tutelage.engines.local import LocalCompleter
    from tutelage.engines.packing import Group
    from tutelage.objectives.policy_gradient import Grpo, advantages_grpo
    from tutelage.policy.learner import Learner, TrainGroup, score
    from tutelage.policy.lora import attach
    from tutelage.records import Message, Prompt, SamplerSettings

    lm = load_model("smollm2-135m-instruct", dtype="bfloat16")
    adapter = attach(lm.model, rank=RANK, alpha=ALPHA, seed=task.seed)
    completer = LocalCompleter(endless(lm), rows=min(128, prompts * samples), int8=int8)
    learner = Learner(lm, adapter, learning_rate=task.rate, budget=BUDGET)
    asked = [Prompt(f"p{i}", (Message("user", q),)) for i, q in enumerate(questions(prompts))]
    encoded = [lm.encode(p) for p in asked]
    settings = SamplerSettings(1.0, max_new_tokens=tokens)

    def step(number: int) -> dict[str, Any]:
        marks = [time.perf_counter()]
        replies = completer.generate(
            asked, samples=samples, settings=settings, seed=1000 * task.seed + number, version=str(number)
        )
        marks.append(time.perf_counter())
        rewards = torch.tensor([[task.reward(r.text) for r in group] for group in replies])
        rows = iter(range(prompts * samples))
        groups = [
            Group(e, tuple(r.tokens for r in group), tuple(next(rows) for _ in group))
            for e, group in zip(encoded, replies, strict=True)
        ]
        with adapter.off():
            reference = score(lm, groups, budget=BUDGET).logp_BT
        marks.append(time.perf_counter())
        found = learner.step(
            [
                TrainGroup(
                    group.prompt,
                    group.completions,
                    tuple((a,) * len(c) for a, c in zip(advantages, group.completions, strict=True)),
                    tuple(r.logps for r in said),
                    tuple(
                        tuple(reference[row, : len(r.tokens)].tolist()) for row, r in zip(group.rows, said, strict=True)
                    ),
                )
                for group, said, advantages in zip(groups, replies, advantages_grpo(rewards).tolist(), strict=True)
            ],
            Grpo(CLIP, BETA),
        )
        marks.append(time.perf_counter())
        lengths = [len(r.tokens) for group in replies for r in group]
        took = [after - before for before, after in itertools.pairwise(marks)]
        parts = dict(zip(("generate", "reference", "learn"), took, strict=True))
        return {"tokens": sum(lengths), "reward": float(rewards.mean()), "kl": found["kl_to_start"], **parts}

    serve(step, warmup=1)


def endless(lm: Any) -> Any:
    """The model without a token that ends a turn: every reply has its full length."""

    class Endless(type(lm)):  # type: ignore[misc]
        stop_tokens = frozenset()

    return Endless(**{f.name: getattr(lm, f.name) for f in dataclasses.fields(lm)})


def peer(prompts: int, samples: int, tokens: int, task: Task, *, batch: int) -> None:
    """TRL's worker."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_DISABLED", "true")
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from tutelage.engines.weights import EMBEDDED_POLICY, locate

    total = prompts * samples
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=True,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": torch.bfloat16},
        per_device_train_batch_size=min(batch, total),
        gradient_accumulation_steps=max(1, total // batch),
        num_generations=samples,
        max_completion_length=tokens,
        generation_kwargs={"min_new_tokens": tokens},
        temperature=1.0,
        beta=BETA,
        epsilon=CLIP,
        loss_type="grpo",
        learning_rate=task.rate,
        seed=task.seed,
        lr_scheduler_type="constant",
        max_steps=10_000,
        save_strategy="no",
        report_to=[],
        logging_steps=1_000_000,
        disable_tqdm=True,
        shuffle_dataset=False,
        dataloader_num_workers=0,
    )
    seen: list[float] = []

    def rewards(completions: Sequence[Any], **_: Any) -> list[float]:
        found = [task.reward(c[0]["content"] if isinstance(c, list) else c) for c in completions]
        seen.append(sum(found) / len(found))
        return found

    class Turns(TrainerCallback):  # type: ignore[misc]
        """Lets the trainer take a step only when the other side has taken its own."""

        def __init__(self) -> None:
            self.began, self.number = 0.0, 0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if self.number >= 1 and not sys.stdin.readline():
                os._exit(0)
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.number += 1
            taken = time.perf_counter() - self.began
            if self.number == 1:
                answer({"ready": True})
            else:
                answer({"seconds": taken, "tokens": total * tokens, "reward": seen[-1], "peak_bytes": peak_memory()})

    trainer = GRPOTrainer(
        model=str(locate(EMBEDDED_POLICY)),
        reward_funcs=rewards,
        args=settings,
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": q}]} for q in questions(prompts)] * 64
        ),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Turns()],
    )
    trainer.train()


def curves(given: argparse.Namespace, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Mean reward of each step's samples, by side and seed: equal samples, prompts, rate and objective."""
    found: dict[str, Any] = {"steps": given.curve, "rate": CURVE_RATE, "samples_a_step": shape[0] * shape[1]}
    for side in ("ours", "peer"):
        rows = []
        for seed in range(given.repeats):
            options = ["--size", given.size, "--seed", str(seed), "--curve", str(given.curve), "--worker", side]
            worker = Worker(__file__, options, threads=given.threads)
            rows.append([worker.step()["reward"] for _ in range(given.curve)])
            worker.close()
        found[side] = rows
    return found


def shown(found: dict[str, Any]) -> str:
    """The curves as a table: means of five steps, median and range over seeds."""
    lines = []
    for start in range(0, found["steps"], 5):
        cells = []
        for side in ("ours", "peer"):
            means = [statistics.mean(row[start : start + 5]) for row in found[side]]
            cells.append(f"{side} {statistics.median(means):.3f} ({min(means):.3f} to {max(means):.3f})")
        lines.append(f"steps {start + 2:3d} to {min(start + 6, found['steps'] + 1):3d}: {'   '.join(cells)}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--peer-batch", type=int, default=8)
    parser.add_argument("--int8", action="store_true", help="sample with 8-bit weights")
    parser.add_argument("--curve", type=int, default=0, metavar="STEPS", help="learning curves, one a repeat, untimed")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    shape = SIZES[given.size]
    if given.worker:
        task = Task(short_words, CURVE_RATE, given.seed) if given.curve else Task()
        with quiet_output():
            if given.worker == "ours":
                ours(*shape, task, int8=given.int8)
            else:
                peer(*shape, task, batch=given.peer_batch)
        return
    if given.curve:
        rows = curves(given, shape)
        print(json.dumps(rows, indent=1) if given.json else shown(rows))
        return
    common = ["--size", given.size, "--peer-batch", str(given.peer_batch), *(["--int8"] if given.int8 else [])]
    found = contest(__file__, common, given)
    found |= {"size": given.size, "completions": shape[0] * shape[1], "new_tokens": shape[2]}
    for side in ("ours", "peer"):
        found[side]["completions_per_second"] = found["completions"] / found[side]["seconds"]
    if given.json:
        print(json.dumps(found, indent=1))
        return
    for side in ("ours", "peer"):
        s = found[side]
        print(
            f"{side:5s} {s['completions_per_second']:7.2f} completions/s  {s['seconds']:7.2f} s a step  "
            f"{s['peak_bytes'] / 1e9:5.2f} GB  {[round(x, 1) for x in s['seconds_all']]}"
        )
    print(verdict(found))


if __name__ == "__main__":
    main()
