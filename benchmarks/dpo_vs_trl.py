"""One DPO step, ours against TRL's: the same pairs, model, adapter and start.

    python benchmarks/dpo_vs_trl.py                 # speed and memory in bfloat16
    python benchmarks/dpo_vs_trl.py --check         # losses of four steps in float32, side by side
    python benchmarks/dpo_vs_trl.py --json

Both sides: SmolLM2-135M-Instruct, LoRA rank 16 on all linear layers with the same start, beta 0.1, 16
pairs a step, replies of 40 to 120 tokens, AdamW at a constant 1e-4. TRL runs without gradient
checkpointing (faster); --peer-batch is its micro-batch in pairs.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import tempfile
import time
from typing import Any

from duel import Worker, answer, arguments, contest, peak_memory, quiet_output, serve, verdict

RANK, ALPHA, BETA, RATE, PAIRS, STEPS = 16, 32, 0.1, 1e-4, 16, 64
WORDS = re.findall(
    r"[a-z]+",
    "the of and to in is that was for on are with as his they at be this from have or by one had not but what "
    "all were when we there can an your which their said if do will each about how up out them then she many "
    "some so these would other into has more her two like him see time could no make than first been its who "
    "now people my made over did down only way find use may water long little very after words called just "
    "where most know ",
)


def texts(step: int) -> list[tuple[str, str, str]]:
    """Question, better and worse reply of each pair of a step: words in no order, lengths that differ."""
    dice = random.Random(step)  # noqa: S311
    found = []
    for _ in range(PAIRS):
        question = f"Tell me about {dice.choice(WORDS)} and {dice.choice(WORDS)}, in your own words, and say why."
        replies = [" ".join(dice.choices(WORDS, k=dice.randint(40, 120))) for _ in range(2)]
        found.append((question, *replies))
    return found


def ours(dtype: str) -> None:
    """Our worker."""
    from tutelage.engines.load import load_model
    from tutelage.engines.packing import Group
    from tutelage.objectives.preference import Dpo
    from tutelage.policy.learner import Learner, TrainGroup, score
    from tutelage.policy.lora import attach
    from tutelage.records import Message, Prompt

    lm = load_model("smollm2-135m-instruct", dtype=dtype)
    adapter = attach(lm.model, rank=RANK, alpha=ALPHA, seed=0)
    learner = Learner(lm, adapter, learning_rate=RATE, budget=1024, betas=(0.9, 0.999))

    def step(number: int) -> dict[str, Any]:
        groups = []
        for i, (question, *replies) in enumerate(texts(number)):
            prompt = lm.encode(Prompt(str(i), (Message("user", question),)))
            groups.append(Group(prompt, tuple(lm.encode_reply(r) for r in replies), (2 * i, 2 * i + 1)))
        with adapter.off():
            reference = score(lm, groups, budget=1024).logp_BT
        pairs = [
            TrainGroup(
                g.prompt,
                g.completions,
                tuple((p,) * len(c) for p, c in zip((1.0, 0.0), g.completions, strict=True)),
                tuple((0.0,) * len(c) for c in g.completions),
                tuple(tuple(reference[row, : len(c)].tolist()) for row, c in zip(g.rows, g.completions, strict=True)),
            )
            for g in groups
        ]
        found = learner.step(pairs, Dpo(BETA))
        return {"loss": found["loss"], "tokens": sum(len(c) for g in groups for c in g.completions)}

    serve(step, warmup=0 if dtype == "float32" else 1)


def peer(dtype: str, batch: int) -> None:
    """TRL's worker."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from tutelage.engines.weights import EMBEDDED_POLICY, locate

    warmup = 0 if dtype == "float32" else 1
    folder = str(locate(EMBEDDED_POLICY))
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def asked(question: str) -> str:
        said = [{"role": "user", "content": question}]
        return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))

    end = tokenizer.eos_token
    rows = [
        {"prompt": asked(q), "chosen": better + end, "rejected": worse + end}
        for step in range(STEPS)
        for q, better, worse in texts(step)
    ]
    settings = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=dtype == "bfloat16",
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": getattr(torch, dtype)},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=PAIRS // batch,
        beta=BETA,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_steps=STEPS,
        max_length=None,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )

    class Turns(TrainerCallback):  # type: ignore[misc]
        """Lets the trainer take a step only when the other side has taken its own."""

        def __init__(self) -> None:
            self.began, self.number, self.taken = 0.0, 0, 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if self.number == 0 and warmup == 0:
                answer({"ready": True})
            if self.number >= warmup and not sys.stdin.readline():
                os._exit(0)
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.taken = time.perf_counter() - self.began

        def on_log(self, _arguments: Any, _state: Any, _control: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" not in logs:
                return
            self.number += 1
            if self.number == warmup:
                answer({"ready": True})
            elif self.number > warmup:
                answer({"seconds": self.taken, "loss": logs["loss"], "peak_bytes": peak_memory()})

    trainer = DPOTrainer(
        model=folder,
        args=settings,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Turns()],
    )
    _same_start(trainer.model)
    trainer.train()


def _same_start(model: Any) -> None:
    """Give PEFT's adapter the start of ours."""
    from tutelage.engines.load import load_model
    from tutelage.policy.lora import attach

    lm = load_model("smollm2-135m-instruct", dtype="float32")
    wanted = attach(lm.model, rank=RANK, alpha=ALPHA, seed=0).state()
    found = 0
    for name, value in model.named_parameters():
        key = name.replace(".default", "").removeprefix("module.")
        if key in wanted:
            value.data.copy_(wanted[key])
            found += 1
    if found != len(wanted):
        raise SystemExit(f"only {found} of {len(wanted)} adapter tensors have the same names")


def check(threads: int, peer_batch: int) -> dict[str, Any]:
    """Losses of the first steps in float32: the same numbers if the same thing is computed."""
    common = ["--dtype", "float32", "--peer-batch", str(peer_batch)]
    found: dict[str, list[float]] = {}
    for side in ("ours", "peer"):
        worker = Worker(__file__, [*common, "--worker", side], threads=threads)
        found[side] = [worker.step()["loss"] for _ in range(4)]
        worker.close()
    gap = max(abs(a - b) for a, b in zip(found["ours"], found["peer"], strict=True))
    return {"losses": found, "largest_gap": gap}


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--peer-batch", type=int, default=4, help="pairs a micro-batch on TRL's side")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    given = parser.parse_args()
    if given.worker:
        with quiet_output():
            ours(given.dtype) if given.worker == "ours" else peer(given.dtype, given.peer_batch)
        return
    if given.check:
        print(json.dumps(check(given.threads, given.peer_batch), indent=1))
        return
    common = ["--dtype", given.dtype, "--peer-batch", str(given.peer_batch)]
    found = contest(__file__, common, given)
    for side in ("ours", "peer"):
        found[side]["pairs_per_second"] = PAIRS / found[side]["seconds"]
    if given.json:
        print(json.dumps(found, indent=1))
        return
    for side in ("ours", "peer"):
        s = found[side]
        print(f"{side:5s} {s['pairs_per_second']:6.2f} pairs/s  {s['peak_bytes'] / 1e9:5.2f} GB  {s['seconds_all']}")
    print(verdict(found))


if __name__ == "__main__":
    main()
