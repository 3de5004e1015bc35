"""Sampling speed, ours against transformers' `generate` or vLLM: the same model, prompts and number of tokens.

    python benchmarks/rollout.py                    # batches of 1, 8, 64 and 128 rows
    python benchmarks/rollout.py --int8 --json
    python benchmarks/rollout.py --vllm http://127.0.0.1:8000   # against a server that is running here

SmolLM2-135M-Instruct in bfloat16, temperature 1, 8 samples a prompt (1 at batch 1), 64 new tokens, none of
which may end the reply. `share_of_limit` is our tokens a second over what a matrix product of 2048
rows would allow on this machine, if nothing but the weights' products cost time.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from duel import arguments, contest, quiet_output, serve
from grpo_vs_trl import endless, questions

TOKENS = 64


def shape(batch: int) -> tuple[int, int]:
    """Prompts and samples of each."""
    return (1, 1) if batch == 1 else (batch // 8, 8)


def ours(batch: int, *, int8: bool) -> None:
    """Our worker."""
    from tutelage.engines.load import load_model
    from tutelage.engines.local import LocalCompleter
    from tutelage.records import Message, Prompt, SamplerSettings

    prompts, samples = shape(batch)
    completer = LocalCompleter(endless(load_model("smollm2-135m-instruct", dtype="bfloat16")), rows=batch, int8=int8)
    asked = [Prompt(f"p{i}", (Message("user", q),)) for i, q in enumerate(questions(prompts))]
    settings = SamplerSettings(1.0, max_new_tokens=TOKENS)

    def step(number: int) -> dict[str, Any]:
        found = completer.generate(asked, samples=samples, settings=settings, seed=number, version="v")
        return {"tokens": sum(len(r.tokens) for group in found for r in group)}

    serve(step, warmup=1)


def peer(batch: int) -> None:
    """The worker of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tutelage.engines.weights import EMBEDDED_POLICY, locate

    prompts, samples = shape(batch)
    folder = str(locate(EMBEDDED_POLICY))
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in questions(prompts)
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)

    def step(number: int) -> dict[str, Any]:
        torch.manual_seed(number)
        with torch.inference_mode():
            found = model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=samples,
                min_new_tokens=TOKENS,
                max_new_tokens=TOKENS,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
        return {"tokens": int(found.shape[0] * (found.shape[1] - inputs["input_ids"].shape[1]))}

    serve(step, warmup=1)


def served(batch: int, url: str) -> None:
    """The worker that asks a vLLM server, in one request a step; prompts are in its cache after the first."""
    import openai

    from tutelage.engines.load import load_model
    from tutelage.records import Message, Prompt

    prompts, samples = shape(batch)
    lm = load_model("smollm2-135m-instruct", dtype="bfloat16")
    asked = [list(lm.encode(Prompt(f"p{i}", (Message("user", q),)))) for i, q in enumerate(questions(prompts))]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id

    def step(number: int) -> dict[str, Any]:
        found = client.completions.create(
            model=model,
            prompt=asked,
            n=samples,
            max_tokens=TOKENS,
            temperature=1.0,
            logprobs=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        ).model_dump()
        return {"tokens": sum(len(choice["token_ids"]) for choice in found["choices"])}

    serve(step, warmup=1)


def limit(threads: int) -> float:
    """Tokens a second if only the weights' matrix products cost time, at the speed of a large one."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    best = 0.0
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048**3 / (time.perf_counter() - began))
    return best / (2 * 134.5e6)


def main() -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--batches", default="1,8,64,128")
    parser.add_argument("--int8", action="store_true", help="ours with 8-bit weights")
    parser.add_argument("--vllm", default="", metavar="URL", help="compare with a vLLM server that is running here")
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        with quiet_output():
            if given.worker == "ours":
                ours(given.batch, int8=given.int8)
            elif given.vllm:
                served(given.batch, given.vllm)
            else:
                peer(given.batch)
        return
    name = "vLLM" if given.vllm else "transformers"
    most = limit(given.threads)
    rows: dict[str, Any] = {}
    for batch in map(int, given.batches.split(",")):
        common = ["--batch", str(batch), *(["--int8"] if given.int8 else [])]
        common += ["--vllm", given.vllm] if given.vllm else []
        # vLLM's processes look for work in a busy loop for some seconds after their last.
        found = contest(__file__, common, given, rest=8.0 if given.vllm else 0.0)
        for side in ("ours", "peer"):
            found[side]["tokens_per_second"] = found[side]["tokens"] / found[side]["seconds"]
        found["share_of_limit"] = found["ours"]["tokens_per_second"] / most
        rows[str(batch)] = found
        if not given.json:
            print(
                f"batch {batch:4d}: ours {found['ours']['tokens_per_second']:7.1f} tokens/s, {name} "
                f"{found['peer']['tokens_per_second']:7.1f}, speed-up {found['speedup']:.2f} "
                f"({found['speedup_range'][0]:.2f} to {found['speedup_range'][1]:.2f}), "
                f"{100 * found['share_of_limit']:.0f}% of the limit",
                flush=True,
            )
    if given.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
