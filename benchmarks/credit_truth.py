"""How true credit is where the truth is known: every token earns a fixed amount, and a head knows only the sums.

    python benchmarks/credit_truth.py                     # two seeds, every method
    python benchmarks/credit_truth.py --task sentiment    # few words earn something (pip install vaderSentiment==3.3.2)
    python benchmarks/credit_truth.py --seeds 1 --json

Replies of SmolLM2-135M-Instruct (temperature 1, TOKENS tokens each) earn the sum of what their tokens are worth:
the KINDS commonest tokens a number from a normal distribution of the seed, all others nothing (`prices`), or words what
VADER's lexicon says, most of them nothing (`sentiment`). A ridge regression on
what a critic reads of whole replies (`critic_data.PROBES`) learns these sums from LEARNED replies; it never sees what
a token earned. Then REPLIES others are explained, behind no prompt. By method:

- correlation of its scores with what the tokens earned, each reply around its own mean;
- what the scores lack to the change of the head's reward that they explain, as a share of it;
- deletion: the true reward of what is left as tokens go, those with the highest score first; 0 is the mean of random
  orders, 1 that of the true order;
- seconds of the processor a reply; the generator's attention's are those of the pass that scores the replies anyway.

`attention` and `contribution` are those of a critic on tokens that was told less: which of the same LEARNED replies
earned more than the median. `generator` is the model's own attention.

Two yardsticks stand beside the methods: the truth itself, and `occlusion`, the head's reward less its reward without
the token (one reading for every token), which is the best that the head could know by simple means.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import torch
from credit_tasks import TASKS, fit_critic
from grpo_vs_trl import TOPICS, endless

from tutelage.credit import tokens as credit
from tutelage.credit.decomposition import Decomposition
from tutelage.credit.faithfulness import correlation, deletion
from tutelage.credit.spans import align, token_spans
from tutelage.engines.features import reply_states
from tutelage.engines.load import load_model
from tutelage.engines.local import LocalCompleter
from tutelage.engines.packing import Group
from tutelage.feedback.critic_data import Passage, read_passages
from tutelage.feedback.critic_reward import Reward
from tutelage.loop.explaining import SignedMethod, attended, explain, onto
from tutelage.policy.learner import score
from tutelage.records import Generation, Message, Prompt, SamplerSettings

LEARNED, REPLIES, TOKENS, KINDS, FOLDS, BUDGET = 400, 60, 16, 60, 5, 512
PENALTIES = (1e1, 1e2, 1e3, 1e4, 1e5)
METHODS = (
    "decomposed", "contribution", *get_args(SignedMethod), "attention", "generator", "uniform", "last", "occlusion",
    "truth",
)  # fmt: skip


Worth = Callable[[Generation], list[float]]


@dataclasses.dataclass(frozen=True)
class Task:
    """Replies, what each of their tokens is worth, and a head that was told the sums of others."""

    lm: Any
    replies: list[Generation]
    prompts: list[tuple[int, ...]]
    truth_BT: torch.Tensor
    reward: Reward
    fit: float  # correlation of the head's reward with the true sum, on these replies
    unseen: float  # the same on the replies it learned from, each from a head that had not seen it
    others: list[tuple[tuple[int, ...], Generation, float]]  # those, with their prompts and sums


def task(lm: Any, seed: int, kind: str) -> Task:
    """Draw replies, price their tokens, fit the head."""
    prompts = [Prompt(t, (Message("user", f"Write a long story about {t}."),)) for t in TOPICS]
    samples = -(-(LEARNED + REPLIES) // len(prompts))
    settings = SamplerSettings(1.0, max_new_tokens=TOKENS)
    drawn = LocalCompleter(endless(lm), rows=128).generate(
        prompts, samples=samples, settings=settings, seed=seed, version="start"
    )
    pairs = [(lm.encode(p), group[g]) for g in range(samples) for p, group in zip(prompts, drawn, strict=True)]
    pairs = [(p, r) for p, r in pairs if lm.encode_reply(r.text)[:-1] == tuple(r.tokens)][: LEARNED + REPLIES]
    replies, explained = [r for _, r in pairs[REPLIES:]], pairs[:REPLIES]
    worth_of = valences(lm) if kind == "sentiment" else prices([r for _, r in pairs], seed)
    sums = np.array([sum(worth_of(r)) for r in replies])
    reward, unseen = linear_head(read_passages(lm, [Passage(r.text) for r in replies], budget=BUDGET), sums)
    own = [r for _, r in explained]
    truth_BT = torch.tensor([worth_of(r) for r in own])
    said = reward(torch.from_numpy(read_passages(lm, [Passage(r.text) for r in own], budget=BUDGET)), truth_BT)
    fit = float(np.corrcoef(said.numpy(), truth_BT.sum(-1).numpy())[0, 1])
    others = [(p, r, float(one)) for (p, r), one in zip(pairs[REPLIES:], sums, strict=True)]
    return Task(lm, own, [p for p, _ in explained], truth_BT, reward, fit, unseen, others)


def prices(replies: Sequence[Generation], seed: int) -> Worth:
    """The commonest tokens earn a number from a normal distribution each."""
    common = Counter(t for r in replies for t in r.tokens).most_common(KINDS)
    worth = torch.randn(len(common), generator=torch.Generator().manual_seed(seed)).tolist()
    price = {token: value for (token, _), value in zip(common, worth, strict=True)}
    return lambda reply: [price.get(t, 0.0) for t in reply.tokens]


def valences(lm: Any) -> Worth:
    """Words earn what VADER's lexicon says, parted among their tokens by characters."""

    def worth(reply: Generation) -> list[float]:
        text, spans = token_spans(reply.tokens, lm.whole_text)
        words = TASKS["sentiment"].words(text, 0.0)
        return align([value for value, _ in words], [span for _, span in words], spans)

    return worth


def linear_head(x_NF: np.ndarray, y_N: np.ndarray) -> tuple[Reward, float]:
    """A head for these rewards of whole replies, and its correlation with those that were left out."""
    weight_F, bias, mean_F, scale_F, unseen = ridge(x_NF, y_N)
    w, m, s = (torch.tensor(t, dtype=torch.float32) for t in (weight_F, mean_F, scale_F))

    def reward(features_NF: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return ((features_NF - m) / s) @ w + bias

    return reward, unseen


def ridge(x_NF: np.ndarray, y_N: np.ndarray) -> tuple[np.ndarray, float, np.ndarray, np.ndarray, float]:
    """Weights of standardised columns, intercept, their mean and scale, and the correlation on rows left out.

    The penalty is the one with the least error on folds that were left out.
    """
    mean_F, scale_F = x_NF.mean(0), x_NF.std(0) + 1e-6
    z_NF = ((x_NF - mean_F) / scale_F).astype(np.float64)
    fold_N = np.arange(len(y_N)) % FOLDS

    def solve(rows_N: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
        z, y = z_NF[rows_N], y_N[rows_N]
        dual = np.linalg.solve(z @ z.T + penalty * np.eye(len(y)), y - y.mean())
        return z.T @ dual, float(y.mean())

    def left_out(penalty: float) -> np.ndarray:
        said = np.empty_like(y_N)
        for fold in range(FOLDS):
            weight_F, bias = solve(fold_N != fold, penalty)
            said[fold_N == fold] = z_NF[fold_N == fold] @ weight_F + bias
        return said

    tried = [(float(((left_out(p) - y_N) ** 2).mean()), p) for p in PENALTIES]
    penalty = min(tried)[1]
    weight_F, bias = solve(np.ones(len(y_N), bool), penalty)
    return weight_F, bias, mean_F, scale_F, float(np.corrcoef(left_out(penalty), y_N)[0, 1])


def scores_of(method: str, given: Task, steps: int) -> tuple[torch.Tensor, float | None]:
    """Scores by reply and token, and what they lack to what they explain; None where they explain no change."""
    passages = [Passage(r.text) for r in given.replies]
    if method == "truth":
        return given.truth_BT, None
    if method == "occlusion":
        return occluded(given), None
    if method == "decomposed":
        return decomposed(given), None
    if method in ("attention", "contribution"):
        return by_critic(method, given, passages)
    signed = next((m for m in get_args(SignedMethod) if m == method), None)
    if signed is not None:
        found = explain(signed, given.lm, passages, given.reward, contextual=False, steps=steps, budget=BUDGET)
        lacking = sum(one.defect for one in found) / sum(abs(one.change) for one in found)
        rows = [onto(given.lm, one, r.tokens)[0] for one, r in zip(found, given.replies, strict=True)]
        return torch.tensor(rows), lacking
    groups = [
        Group(p, (tuple(r.tokens),), (b,)) for b, (p, r) in enumerate(zip(given.prompts, given.replies, strict=True))
    ]
    found_s = score(given.lm, groups, budget=BUDGET, attention=method == "generator")
    plain: Any = "attention" if method == "generator" else method
    weights_BT = credit.weights(plain, found_s.keep_BT, found_s.attention_BT)
    reward_B = given.reward(torch.from_numpy(read_passages(given.lm, passages, budget=BUDGET)), weights_BT)
    # What a reply earns above the mean is spread, as an advantage is.
    return (reward_B - reward_B.mean())[:, None] * weights_BT, None


def by_critic(method: str, given: Task, passages: Sequence[Passage]) -> tuple[torch.Tensor, float | None]:
    """Where a critic looks that was told which of the others earn more, or what it says each token brought."""
    sums_N = np.array([one for *_, one in given.others])
    told = [Passage(r.text) for _, r, _ in given.others]
    critic = fit_critic(given.lm, told, (sums_N > np.median(sums_N)).tolist())
    found = attended(given.lm, passages, critic, budget=BUDGET)
    if method == "attention":
        reward_B = np.array([one.reward for one in found])
        above_B = reward_B - reward_B.mean()
        return torch.tensor([[a * x for x in one.shares] for a, one in zip(above_B, found, strict=True)]), None
    lacking = sum(one.defect for one in found) / sum(abs(one.change) for one in found)
    return torch.tensor([one.scores for one in found]), lacking


def decomposed(given: Task) -> torch.Tensor:
    """What a regression of the sums of the others gives each token, as `credit.method = decomposed` makes it."""
    told = Decomposition(given.lm.head_VD.shape[1])
    state_NTF = states(given.lm, [(p, r) for p, r, _ in given.others])
    told.add(state_NTF.mean(1)[None], torch.tensor([[one for *_, one in given.others]]))
    state_BTF = states(given.lm, list(zip(given.prompts, given.replies, strict=True)))
    return (state_BTF - state_NTF.mean((0, 1))) @ told.fit().weight_F / TOKENS


def states(lm: Any, pairs: Sequence[tuple[tuple[int, ...], Generation]]) -> torch.Tensor:
    """(replies, tokens, features) states of the first layer."""
    groups = [Group(p, (tuple(r.tokens),), (n,)) for n, (p, r) in enumerate(pairs)]
    found = dict(reply_states(lm, groups, depth=0.0, budget=BUDGET))
    return torch.stack([found[n] for n in range(len(pairs))])


def occluded(given: Task) -> torch.Tensor:
    """The head's reward less its reward without the token."""
    shown = []
    for reply in given.replies:
        without = [[*reply.tokens[:t], *reply.tokens[t + 1 :]] for t in range(len(reply.tokens))]
        shown += [Passage(reply.text), *(Passage(given.lm.decode(tokens)) for tokens in without)]
    said = given.reward(torch.from_numpy(read_passages(given.lm, shown, budget=BUDGET)), torch.zeros(len(shown)))
    table = said.view(len(given.replies), -1)
    return table[:, :1] - table[:, 1:]


def deleted(score_BT: torch.Tensor, truth_BT: torch.Tensor) -> float:
    """Mean over replies of how much of the way from random orders to the true one deletion by these scores goes."""
    gain, most = 0.0, 0.0
    for score_T, truth_T in zip(score_BT, truth_BT, strict=True):

        def left(stays_NT: torch.Tensor, truth_T: torch.Tensor = truth_T) -> torch.Tensor:
            return stays_NT @ truth_T

        mine, best = (deletion(left, by) for by in (score_T, truth_T))
        gain += mine.by_chance - mine.by_credit
        most += best.by_chance - best.by_credit
    return gain / most


def measure(seed: int, methods: Sequence[str], steps: int, kind: str) -> list[dict[str, Any]]:
    """One seed: a row a method."""
    lm = load_model("smollm2-135m-instruct")
    given = task(lm, seed, kind)
    print(f"seed {seed}: the head knows the sums to r = {given.fit:.2f} ({given.unseen:.2f} by folds)", file=sys.stderr)
    rows = []
    for method in methods:
        started = time.process_time()
        score_BT, lacking = scores_of(method, given, steps)
        seconds = (time.process_time() - started) / len(given.replies)
        rows.append(
            {
                "seed": seed,
                "method": method,
                "correlation": correlation(score_BT, given.truth_BT, torch.ones_like(given.truth_BT)),
                "lacking": lacking,
                "deletion": deleted(score_BT, given.truth_BT),
                "seconds": seconds,
                "head": given.fit,
                "replies": len(given.replies),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """A line a method: mean over the seeds, and each seed."""
    lines = [
        "| credit | seeds | correlation with truth | lacks | deletion | processor seconds a reply |",
        "|---" * 6 + "|",
    ]
    for method in dict.fromkeys(r["method"] for r in rows):
        own = [r for r in rows if r["method"] == method]

        def cell(key: str, form: str, own: Sequence[dict[str, Any]] = own) -> str:
            known = [r[key] for r in own if r[key] is not None]
            if not known:
                return "-"
            each = f" ({', '.join(format(v, form) for v in known)})" if len(known) > 1 else ""
            return f"{statistics.fmean(known):{form}}{each}"

        lines.append(
            f"| {method} | {len(own)} | {cell('correlation', '+.2f')} | {cell('lacking', '.0%')} | "
            f"{cell('deletion', '+.2f')} | {statistics.fmean(r['seconds'] for r in own):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", default=",".join(METHODS), help="parted by commas: " + ", ".join(METHODS))
    parser.add_argument("--steps", type=int, default=8, help="points on the path of integrated gradients")
    parser.add_argument("--task", choices=("prices", "sentiment"), default="prices")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    methods = given.methods.split(",")
    if unknown := [m for m in methods if m not in METHODS]:
        parser.error(f"--methods: '{unknown[0]}' is none of {', '.join(METHODS)}")
    rows = [
        row
        for seed in range(given.first_seed, given.first_seed + given.seeds)
        for row in measure(seed, methods, given.steps, given.task)
    ]
    print(json.dumps({"rows": rows}) if given.json else shown(rows))


if __name__ == "__main__":
    main()
