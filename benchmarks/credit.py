"""Steps to a level by how credit is spread over a reply's tokens.

    python benchmarks/credit.py                       # ten seeds of ARMS
    python benchmarks/credit.py --seeds 3 --json
    python benchmarks/credit.py --records credit.jsonl --first-seed 4 --seeds 2 --arms last,prefix@0
    python benchmarks/credit.py --records credit.jsonl --table     # play nothing, print what is there

SmolLM2-135M-Instruct, LoRA rank 16 on all linear layers, GRPO, 2 prompts x 4 replies x 32 tokens a step, rate 4e-4, KL
coefficient 0.04: so few replies that noise decides (with 4 x 8 x 16 at 2e-4 not even the truth was of use). Every
STRIDE steps the policy is measured on 16 prompts that it never learns from, 2 replies each. A run ends when the mean of
its last two measurements has reached the task's level, or after --longest steps, which then counts as its number.

Tasks: `sentiment` (pip install vaderSentiment==3.3.2) measures and rewards VADER's compound score of stories; few words
bear it. `critic` measures the same, and rewards what a critic says that learned it. `short` measures and rewards the
share of a reply's words that have at most four letters; every word bears it.

An arm is a method, behind @ its discount (without: 1, reward-to-go). `last` is the usual sequence-level reward: every
token gets the whole advantage. `attention` follows the attention of a critic on tokens, and `contribution` what it
says that each token brought; it learned from the labels good and bad of HEARD replies of the start model, which count
as no step. `generator` follows the start model's attention. `decomposed` learns as it goes what tokens bring, from the
same rewards. prefix, integrated-gradients and gradient-input explain a head (ridge regression on the trunk's features)
that was told the worth of as many replies. `truth` gives each word's tokens what the word brought: the ceiling for any
credit. With --records every finished run is appended to a file at once and never repeated, so that several sessions
can add up.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import records
import torch
from credit_tasks import TASKS, Task, asked, critic_of, heard
from credit_truth import linear_head
from grpo_vs_trl import ALPHA, BETA, CLIP, RANK, TOPICS, endless, questions

from tutelage.credit import tokens as credit
from tutelage.credit.decomposition import Decomposition
from tutelage.credit.signed import slopes
from tutelage.credit.spans import align, token_spans
from tutelage.engines.features import reply_states
from tutelage.engines.load import load_model
from tutelage.engines.local import LocalCompleter
from tutelage.engines.packing import Group
from tutelage.feedback.critic_data import Passage, Reader, read_passages
from tutelage.feedback.critic_reward import Reward
from tutelage.feedback.text_critic import TextCritic
from tutelage.loop.explaining import SignedMethod, attended, explain, onto
from tutelage.objectives.advantages import advantages_grpo
from tutelage.objectives.policy_gradient import Grpo
from tutelage.policy.learner import Learner, TrainGroup, score
from tutelage.policy.lora import attach
from tutelage.records import Prompt, SamplerSettings

PLAIN = {"generator": "attention", "uniform": "uniform", "last": "last"}
BY_CRITIC = ("attention", "contribution")
METHODS = (*PLAIN, *BY_CRITIC, "decomposed", *get_args(SignedMethod), "truth")
POINTS = 8  # on the path of integrated gradients
PROMPTS, SAMPLES, TOKENS, RATE, STRIDE, BUDGET = 2, 4, 32, 4e-4, 4, 640
ARMS = ("last", "uniform", "attention", "attention@0", "contribution@0")
SHARE = 0.8  # of the advantage that is spread; the recipe's
_CRITICS: dict[tuple[str, int], TextCritic] = {}


@dataclasses.dataclass
class Way:
    """How a run's credit comes about."""

    task: Task
    method: str
    discount: float
    critic: TextCritic | None = None  # which credit follows; where the task is judged the reward is its, too
    head: Reward | Decomposition | None = None

    @property
    def rest(self) -> Any:
        """Without a discount the recipe's; with one the last token would have all that is left to itself."""
        return "last" if self.discount == 1.0 else "spread"

    def rewards(self, lm: Any, replies: Any) -> torch.Tensor:
        """(P, G)."""
        if not self.task.judged:
            return torch.tensor([[self.task.worth(r.text) for r in group] for group in replies])
        shown = [Passage(r.text) for group in replies for r in group]
        said = self.critic.score_features(Reader("tokens", lm).read(shown, contextual=False))
        return torch.from_numpy(said.log_odds_N).float().view(len(replies), -1)


def run(arm: str, seed: int, *, task: str, level: float, longest: int) -> dict[str, Any]:
    """One training: steps it took, the curve on unseen prompts, KL a token at the end."""
    method, _, later = arm.partition("@")
    way = Way(TASKS[task], method, float(later or 1.0))
    torch.manual_seed(seed)
    lm = load_model("smollm2-135m-instruct")  # bfloat16 only where the processor has it
    adapter = attach(lm.model, rank=RANK, alpha=ALPHA, seed=seed)
    completer = LocalCompleter(endless(lm), rows=64)
    learner = Learner(lm, adapter, learning_rate=RATE, budget=BUDGET)
    settings = SamplerSettings(1.0, max_new_tokens=TOKENS)
    learned, unseen = asked(questions(PROMPTS)), asked([f"Tell me a tale about {topic}." for topic in TOPICS])
    if way.task.judged or method in BY_CRITIC:
        if (task, seed) not in _CRITICS:
            with adapter.off():
                _CRITICS[task, seed] = critic_of(way.task, lm, completer, seed, TOKENS)
        way.critic = _CRITICS[task, seed]
    if method == "decomposed":
        way.head = Decomposition(lm.head_VD.shape[1])
    elif method in get_args(SignedMethod):
        way.head = head_of(way.task, lm, completer, seed)
    curve: list[float] = []
    kl, steps, reached = 0.0, 0, False
    while steps < longest and not reached:
        steps += 1
        replies = completer.generate(
            learned, samples=SAMPLES, settings=settings, seed=1000 * seed + steps, version=str(steps)
        )
        kl = learner.step(groups_of(lm, adapter, learned, replies, way), Grpo(CLIP, BETA))["kl_to_start"]
        if steps % STRIDE == 0:
            said = completer.generate(unseen, samples=2, settings=settings, seed=7, version=str(steps))
            curve.append(statistics.fmean(way.task.worth(r.text) for group in said for r in group))
            reached = len(curve) > 1 and (curve[-1] + curve[-2]) / 2 >= level
    return {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "reached": reached,
        "curve": curve,
        "kl": kl,
        "dtype": str(lm.dtype),
    }


def head_of(task: Task, lm: Any, completer: LocalCompleter, seed: int) -> Reward:
    """A head that knows the worth of whole replies of the start model, and nothing of words."""
    shown = heard(completer, seed, TOKENS)
    return linear_head(read_passages(lm, shown), np.array([task.worth(p.text) for p in shown]))[0]


def in_advantage(score_BT: Any, rewards: Any, advantage_PG: Any, keep_BT: Any, *, beta: float, rest: Any) -> Any:
    """Credit of signed scores in the rewards' unit."""
    slope_P = slopes(advantage_PG, rewards, score_BT.view(*advantage_PG.shape, -1)).slope_P
    scaled_BT = slope_P.repeat_interleave(advantage_PG.shape[1]).float()[:, None] * score_BT
    return credit.assign_signed(advantage_PG.flatten(), scaled_BT, keep_BT, beta=beta, rest=rest)


def explained(lm: Any, way: Way, replies: Any, advantage_PG: Any, keep_BT: Any) -> Any:
    """Credit as a head or critic explains its reward, as `loop.crediting` makes it."""
    flat = [r for group in replies for r in group]
    shown = [Passage(r.text) for r in flat]
    if way.method in BY_CRITIC:
        found = attended(lm, shown, way.critic, budget=BUDGET)
    else:
        found = explain(way.method, lm, shown, way.head, contextual=False, steps=POINTS, budget=BUDGET)
    if way.method == "attention":
        found = [dataclasses.replace(one, scores=one.shares) for one in found]
    score_BT = torch.zeros_like(keep_BT)
    for b, (one, reply) in enumerate(zip(found, flat, strict=True)):
        score_BT[b, : len(reply.tokens)] = torch.tensor(onto(lm, one, reply.tokens)[0])
    if way.method == "attention":
        weights_BT = credit.weights("attention", keep_BT, score_BT, observer=False)
        return credit.assign(advantage_PG.flatten(), weights_BT, keep_BT, beta=SHARE, rest=way.rest)
    rewards = torch.tensor([one.reward for one in found]).view_as(advantage_PG)
    return in_advantage(score_BT, rewards, advantage_PG, keep_BT, beta=SHARE, rest=way.rest)


def decomposed(
    lm: Any, packed: Any, told: Decomposition, rewards: Any, advantage_PG: Any, keep_BT: Any, rest: Any
) -> Any:
    """Credit as the rewards of all steps so far tell, as `loop.crediting` makes it."""
    state_BTF = torch.zeros(*keep_BT.shape, told.size)
    for row, state_TF in reply_states(lm, packed, depth=0.0, budget=BUDGET):
        state_BTF[row, : len(state_TF)] = state_TF
    mean_PGF = state_BTF.mean(1).view(*rewards.shape, -1)  # every reply has its full length
    told.add(mean_PGF, rewards)
    weight_F = told.fit().weight_F
    centre_B = (mean_PGF @ weight_F).mean(-1).repeat_interleave(rewards.shape[1])
    score_BT = (state_BTF @ weight_F - centre_B[:, None]) / keep_BT.shape[1]
    return in_advantage(score_BT, rewards, advantage_PG, keep_BT, beta=SHARE, rest=rest)


def true_scores(lm: Any, task: Task, reply: Any, mean: float) -> list[float]:
    """What each token's word brought."""
    text, spans = token_spans(reply.tokens, lm.whole_text)
    words = task.words(text, mean)
    return align([worth for worth, _ in words], [span for _, span in words], spans)


def true_credit(lm: Any, way: Way, replies: Any, advantage_PG: Any, rewards: Any, keep_BT: Any) -> Any:
    """Credit as it would be were everything known."""
    score_BT = torch.zeros_like(keep_BT)
    means = [float(group.mean()) for group in rewards for _ in group]
    for b, reply in enumerate(reply for group in replies for reply in group):
        score_BT[b, : len(reply.tokens)] = torch.tensor(true_scores(lm, way.task, reply, means[b]))
    return in_advantage(score_BT, rewards, advantage_PG, keep_BT, beta=1.0, rest="last")


def groups_of(lm: Any, adapter: Any, prompts: Sequence[Prompt], replies: Any, way: Way) -> list[TrainGroup]:
    """What a step learns from: each token weighed by the credit from it on."""
    rows = iter(range(PROMPTS * SAMPLES))
    packed = [
        Group(lm.encode(p), tuple(r.tokens for r in group), tuple(next(rows) for _ in group))
        for p, group in zip(prompts, replies, strict=True)
    ]
    with adapter.off():
        scores = score(lm, packed, budget=BUDGET, attention=way.method == "generator")
        rewards = way.rewards(lm, replies)
        advantage_PG, keep_BT = advantages_grpo(rewards), scores.keep_BT
        if way.method == "truth":
            credit_BT = true_credit(lm, way, replies, advantage_PG, rewards, keep_BT)
        elif way.method in PLAIN:
            plain: Any = PLAIN[way.method]
            weights = credit.weights(plain, keep_BT, scores.attention_BT)
            credit_BT = credit.assign(advantage_PG.flatten(), weights, keep_BT, beta=SHARE, rest=way.rest)
        elif isinstance(way.head, Decomposition):
            credit_BT = decomposed(lm, packed, way.head, rewards, advantage_PG, keep_BT, way.rest)
        else:
            credit_BT = explained(lm, way, replies, advantage_PG, keep_BT)
    ahead = credit.reward_to_go(credit_BT, discount=way.discount)
    if way.discount < 1.0:
        ahead = credit.as_loud(ahead, credit_BT, keep_BT)
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
    """A line a method: steps as median, quartiles and worst, and times fewer than others' seed by seed; KL."""
    others = [arm for arm in ("last", "uniform") if any(r["arm"] == arm for r in rows)]
    fewer = [f"times fewer than {arm}" for arm in others]
    heads = ("credit", "seeds", "steps to the level", "worst", "reached", *fewer, "KL a token")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    taken = {(r["arm"], r["seed"]): r["steps"] for r in rows}
    for arm in dict.fromkeys(r["arm"] for r in rows):
        own = [r for r in rows if r["arm"] == arm]
        steps = [r["steps"] for r in own]
        kl = statistics.median(r["kl"] for r in own)
        reached = sum(r["reached"] for r in own)
        ratios = [
            spread([taken[o, r["seed"]] / r["steps"] for r in own if (o, r["seed"]) in taken], ".2f") for o in others
        ]
        cells = (arm, str(len(own)), spread(steps, "g"), str(max(steps)), f"{reached}/{len(own)}", *ratios, f"{kl:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(found: Sequence[float], form: str) -> str:
    """Median and quartiles."""
    if len(found) < 2:
        return format(found[0], form) if found else "-"
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def play(seeds: Iterable[int], arms: Sequence[str], file: Path | None, **how: Any) -> Any:
    """Run what is not in the records; each run is written before the next begins."""
    rows = []
    for seed in seeds:
        for arm in arms:
            # Read again each time: another session may have finished it meanwhile.
            if any((r["seed"], r["arm"]) == (seed, arm) for r in records.read(file, **how)):
                continue
            row = run(arm, seed, **how) | how
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            records.add(file, row)
    return records.read(file, **how) if file else rows


def is_arm(arm: str) -> bool:
    """A method, with a discount or without."""
    method, at, discount = arm.partition("@")
    return method in METHODS and (not at or bool(re.fullmatch(r"0(\.\d+)?|1", discount)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--arms", default=",".join(ARMS), help="METHOD or METHOD@DISCOUNT of " + ", ".join(METHODS))
    parser.add_argument("--task", choices=TASKS, default="sentiment")
    parser.add_argument("--level", type=float, help="default: the task's")
    parser.add_argument("--longest", type=int, default=96)
    parser.add_argument("--records", type=Path, help="append finished runs here, and skip those that stand there")
    parser.add_argument("--table", action="store_true", help="play nothing: print what stands in --records")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    arms = given.arms.split(",")
    if unknown := [arm for arm in arms if not is_arm(arm)]:
        parser.error(
            f"--arms: '{unknown[0]}' is none of {', '.join(METHODS)}, with a discount from 0 to 1 behind @ or without"
        )
    if given.table and not given.records:
        parser.error("--table needs --records")
    level = TASKS[given.task].level if given.level is None else given.level
    seeds = range(given.first_seed, given.first_seed + (0 if given.table else given.seeds))
    rows = play(seeds, arms, given.records, task=given.task, level=level, longest=given.longest)
    rows = rows if given.table else [r for r in rows if r["arm"] in arms]
    print(json.dumps({"rows": rows, "task": given.task, "level": level}) if given.json else shown(rows))


if __name__ == "__main__":
    main()
