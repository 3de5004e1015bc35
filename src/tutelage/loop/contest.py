"""Controller against the best single setting, on prompts that neither has seen; and what choosing costs."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from tutelage.loop.bench import derive_seed
from tutelage.loop.controlling import Control, choices_of
from tutelage.loop.evaluate import Answers, compare
from tutelage.loop.outcomes import outcome
from tutelage.policy.controller import Assigned, Steered
from tutelage.records import Evidence, Generation, Prompt, SuiteItem
from tutelage.store.ledger import Unit

__all__ = ["duel", "extra_time", "paired_mean"]


def paired_mean(
    before: Sequence[float], after: Sequence[float], *, confidence: float = 0.95
) -> tuple[float | None, float | None]:
    """Percentile interval of the mean of after - before, items resampled (2,000 draws, fixed seed)."""
    apart = np.array(after, dtype=float) - np.array(before, dtype=float)
    if not len(apart):
        return None, None
    rows = np.random.default_rng(0).integers(0, len(apart), size=(2000, len(apart)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(apart[rows].mean(1), [tail, 1 - tail])
    return float(low), float(high)


def duel(
    control: Control, items: Sequence[SuiteItem], suite: str, unit: Unit
) -> tuple[list[Evidence], dict[str, float]]:
    """Best single setting against the controller's likeliest choices, on prompts that neither has seen.

    Both draw from the same numbers, so that they differ only where the controller chooses something
    else; their replies to a prompt form one group of rewards.

    Returns:
        The reward's evidence first, then that of the outcomes by reference answers (first replies);
        and the share of the controller's choices each setting got.
    """
    rules, bench = control.rules, control.bench
    prompts = [item.prompt for item in items]
    steered = Steered(control.controller, control.menu, likeliest=True)
    arms = (("best-single", Assigned(control.menu, [control.best])), (control.version, steered))
    seed = derive_seed(bench.recipe.seed, "duel", suite)
    drawn = []
    for version, steering in arms:
        bench.progress.stage(f"{suite}: {version}", len(prompts) * rules.measure_samples, "replies")
        drawn.append(control.draw(prompts, steering, samples=rules.measure_samples, seed=seed, version=version))
        unit.note("choices", choices_of(steering.traces))
    merged = [[*a, *b] for a, b in zip(*drawn, strict=True)]
    rewards_PG, _ = control.judged(prompts, merged, unit, 0)
    before, after = [], []
    for group in rewards_PG:
        halves = group[: rules.measure_samples], group[rules.measure_samples :]
        means = [_mean_known([r.total for r in half]) for half in halves]
        if means[0] is not None and means[1] is not None:
            before.append(means[0])
            after.append(means[1])
    low, high = paired_mean(before, after, confidence=bench.recipe.gate.confidence)
    found = [Evidence(suite, "reward", _mean_known(before), _mean_known(after), low, high, len(before))]
    answers = []
    for (version, _), replies_PG in zip(arms, drawn, strict=True):
        texts = tuple(group[0].text for group in replies_PG)
        done = tuple(outcome(item, text) for item, text in zip(items, texts, strict=True))
        for item, text, act in zip(items, texts, done, strict=True):
            reference = item.references[0] if item.references else ""
            row = (item.prompt.id, item.prompt.text, item.kind, item.form, text, act, reference)
            unit.outcome(suite, version, *row)
        answers.append(Answers(suite, version, tuple(items), texts, done))
    counts = Counter(int(a) for t in steered.traces.values() for a in t.actions_T)
    settings = control.controller.grid.settings
    chosen = {str(settings[a]): n / counts.total() for a, n in counts.most_common()}
    return found + compare(*answers, confidence=bench.recipe.gate.confidence), chosen


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else None


class _Pinned:
    """A steering that lets the controller choose, and then takes one setting all the same."""

    def __init__(self, inner: Steered, action: int) -> None:
        self.inner, self.menu, self.action = inner, inner.menu, action
        self.per_token, self.depth = inner.per_token, inner.depth
        self.seconds = 0.0

    def choose(self, states_BD: torch.Tensor, uniform_B: torch.Tensor, sample_B: Sequence[int]) -> torch.Tensor:
        began = time.perf_counter()
        chosen = self.inner.choose(states_BD, uniform_B, sample_B)
        self.seconds += time.perf_counter() - began
        return torch.full_like(chosen, self.action)

    def record(self, reply: Generation, actions_T: torch.Tensor, states_TD: torch.Tensor) -> None:
        """Nothing is kept."""


def extra_time(control: Control, prompts: Sequence[Prompt], *, repeats: int = 3) -> dict[str, float]:
    """Seconds a token with and without the controller, the same tokens drawn; the shortest of each.

    Returns:
        `plain_seconds_a_token`, `steered_seconds_a_token`, their relative difference `extra`, and
        `choosing`, the network's own share of the steered time.
    """
    settings = control.controller.grid.settings
    action = max((s.temperature, a) for a, s in enumerate(settings) if not s.mask)[1]
    limit = control.bench.recipe.sampling.max_new_tokens
    plain = control.menu.settings(action, limit)
    pinned = _Pinned(Steered(control.controller, control.menu), action)
    times: dict[str, list[float]] = {"plain": [], "steered": []}
    spent, tokens = [], 0
    control.bench.progress.stage("time of choosing", repeats * len(prompts) * 4, "replies")
    for _ in range(repeats):
        began = time.perf_counter()
        replies = control.bench.completer.generate(prompts, samples=4, settings=plain, seed=0, version="time")
        middle = time.perf_counter()
        pinned.seconds = 0.0
        control.draw(prompts, pinned, samples=4, seed=0, version="time")
        ended = time.perf_counter()
        times["plain"].append(middle - began)
        times["steered"].append(ended - middle)
        spent.append(pinned.seconds / (ended - middle))
        tokens = sum(len(r.tokens) for group in replies for r in group)
    first, second = min(times["plain"]), min(times["steered"])
    return {
        "plain_seconds_a_token": first / tokens,
        "steered_seconds_a_token": second / tokens,
        "extra": second / first - 1.0,
        "choosing": min(spent),
    }
