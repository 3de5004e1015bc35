"""Judging pairs in both orders, ours against a plain loop over transformers' forward: same model, same questions.

    python benchmarks/judging.py                  # single pairs, each of another prompt
    python benchmarks/judging.py --size group     # 8 replies to one prompt, each compared with each
    python benchmarks/judging.py --json

Both sides: SmolLM2-135M-Instruct, bfloat16, the built-in pairwise judge, about 256 tokens an order. The
plain loop reads one question at a time, whole; with --last it is spared the logits of all tokens but the
last, which takes an argument that few loops give. Verdicts are compared in float32, where rounding does
not hide a difference, in a run of its own; `apart` is the largest difference of a probability there,
`apart_bfloat16` that of the timed run (both sides round, each in its own way).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

from duel import Worker, arguments, contest, quiet_output, serve, verdict

SINGLE, SAMPLES = 6, 8
SENTENCES = (
    "It helps to begin early in the morning, when the streets are still empty and the air is cool.",
    "Most people forget that the simplest tools are often the best ones for this kind of work.",
    "A friend of mine once tried the opposite and was surprised by how well it went in the end.",
    "You should write down what you changed, so that you can go back if something goes wrong.",
    "There is no need to hurry, since nobody will ask how long it took when it is done well.",
    "If the first attempt fails, take a short break and look at the problem from another side.",
    "In my experience a good plan saves more time than any clever trick that comes later.",
    "Remember to ask somebody who has done it before, because small mistakes are hard to see alone.",
)
TOPICS = (
    "repair a bicycle", "plan a garden", "learn a song", "bake bread", "paint a room", "read a map",
    "build a shelf", "write a letter",
)  # fmt: skip


def reply(number: int) -> str:
    """A text of about 45 tokens."""
    return " ".join(SENTENCES[(number * 3 + k) % len(SENTENCES)] for k in range(2)) + f" That is point {number + 1}."


def pairs(size: str) -> list[Any]:
    """What is compared in one step."""
    from tutelage.feedback.model_judge import Pair
    from tutelage.records import Message, Prompt

    def asked(topic: str) -> Prompt:
        return Prompt(topic, (Message("user", f"How do I {topic}? Please tell me what matters most."),))

    if size == "group":
        texts = [reply(n) for n in range(SAMPLES)]
        return [Pair(asked(TOPICS[0]), a, b) for a, b in itertools.combinations(texts, 2)]
    return [Pair(asked(TOPICS[n]), reply(2 * n), reply(2 * n + 1)) for n in range(SINGLE)]


def worker(side: str, size: str, dtype: str, *, last: bool) -> None:
    """A worker of either side."""
    from tutelage.feedback.judge_prompt import load_judge_prompt
    from tutelage.feedback.judges import Pairwise
    from tutelage.feedback.model_judge import ModelJudge

    engine = _ours(dtype) if side == "ours" else _plain(dtype, last=last)
    judge = ModelJudge("judge", Pairwise(load_judge_prompt("builtin:pairwise")), engine)
    shown = pairs(size)

    def step(_: int) -> dict[str, Any]:
        told = judge.compare(shown)
        values = {f"verdict {i}": float(o.value if o.value is not None else math.nan) for i, o in enumerate(told)}
        return {"tokens_an_order": sum(o.cost.tokens for o in told) / len(told) / 2, **values}

    serve(step, warmup=1 if dtype == "bfloat16" else 0)


def _ours(dtype: str) -> Any:
    from tutelage.engines.answering import LocalEngine
    from tutelage.engines.load import load_model
    from tutelage.engines.weights import EMBEDDED_POLICY

    return LocalEngine(load_model(EMBEDDED_POLICY, dtype=dtype))


def _plain(dtype: str, *, last: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tutelage.engines.scripted import ScriptedEngine
    from tutelage.engines.weights import EMBEDDED_POLICY, locate
    from tutelage.records import Answer, Cost, Question

    folder = str(locate(EMBEDDED_POLICY))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ask(question: Question) -> Answer:
        turns = [{"role": m.role, "content": m.content} for m in question.messages]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + question.opening
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logp_V = (
                model(input_ids=ids, use_cache=False, logits_to_keep=int(last)).logits[0, -1].float().log_softmax(-1)
            )
        found = {}
        for label in question.labels:
            firsts = {tokenizer(x, add_special_tokens=False)["input_ids"][0] for x in (label, f" {label}")}
            found[label] = float(logp_V[sorted(firsts)].logsumexp(0))
        return Answer(label_logps=found, cost=Cost(tokens=ids.shape[1]))

    return ScriptedEngine(ask)


def apart(ours: dict[str, Any], peer: dict[str, Any]) -> float:
    """Largest difference of a probability that the first is better."""
    keys = [k for k in ours if k.startswith("verdict ")]
    return max(abs(_chance(ours[k]) - _chance(peer[k])) for k in keys)


def _chance(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-log_odds))


def _exact(size: str, threads: int) -> float:
    told = []
    for side in ("ours", "peer"):
        one = Worker(__file__, ["--size", size, "--dtype", "float32", "--worker", side], threads=threads)
        told.append(one.step())
        one.close()
    return apart(*told)


def main(words: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = arguments(__doc__)
    parser.add_argument("--size", choices=["single", "group"], default="single")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help=argparse.SUPPRESS)
    parser.add_argument("--last", action="store_true", help="the plain loop forms only the last token's logits")
    given = parser.parse_args(words)
    if given.worker:
        with quiet_output():
            worker(given.worker, given.size, given.dtype, last=given.last)
        return
    found = contest(__file__, ["--size", given.size, *(["--last"] if given.last else [])], given)
    found |= {
        "size": given.size,
        "pairs": len(pairs(given.size)),
        "apart_bfloat16": apart(found["ours"], found["peer"]),
        "apart": _exact(given.size, given.threads),
    }
    for side in ("ours", "peer"):
        found[side] = {k: v for k, v in found[side].items() if not k.startswith("verdict ")}
        found[side]["pairs_per_second"] = found["pairs"] / found[side]["seconds"]
    if given.json:
        print(json.dumps(found, indent=1))
        return
    for side in ("ours", "peer"):
        s = found[side]
        print(f"{side:5s} {s['pairs_per_second']:6.2f} pairs/s  {s['seconds']:7.2f} s a step  {s['seconds_all']}")
    print(verdict(found) + f", probabilities apart by at most {found['apart']:.1e} in float32")


if __name__ == "__main__":
    main()
