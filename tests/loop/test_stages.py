"""A round: every number in the ledger recomputes from the rows beside it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny_world import World

from tutelage.config import Recipe
from tutelage.loop.choice import choose
from tutelage.loop.constraining import constraints_of
from tutelage.loop.stages import Drawn, teaching
from tutelage.loop.stages import advantages as advantages_of
from tutelage.records import Reward
from tutelage.rewards.compose import normalise

pytest_plugins = ["tests.tiny_world"]

ROUNDS = ("round-1", "round-2")


def bench(*, objective: str = "grpo", constrained: bool = True, multiplier: float = 1.0) -> Any:
    recipe = Recipe.model_validate({"constraint": {"enabled": constrained}, "update": {"objective": objective}})
    return SimpleNamespace(
        recipe=recipe,
        choice=choose(recipe),
        multiplier=SimpleNamespace(value=multiplier),
        baselines={},
        values=None,
        constraints=constraints_of(recipe),
        trust={},
    )


def rewards(*rows: tuple[float | None, float]) -> list[list[Reward]]:
    return [[Reward(f"g{n}", total, {}, {}, {"over_abstention": cost}) for n, (total, cost) in enumerate(rows)]]


def advantages(
    bench: Any, rewards: list[list[Reward]], *, lengths: tuple[int, ...] = (), spent: float = 0.0
) -> torch.Tensor:
    """Of one group of replies of these lengths (one token each unless given), `spent` nats apart from the start."""
    (group,) = rewards
    long = lengths or (1,) * len(group)
    keep = (torch.arange(max(long))[None] < torch.tensor(long)[:, None]).float()
    replies: Any = [[SimpleNamespace(tokens=(0,) * n, finished=n < 9) for n in long]]
    scores: Any = SimpleNamespace(logp_BT=torch.zeros_like(keep), keep_BT=keep)
    return advantages_of(bench, rewards, replies, scores, Drawn(torch.full_like(keep, spent)))


def test_advantages_without_a_constraint_are_the_objectives() -> None:
    found = advantages(bench(objective="rloo", constrained=False), rewards((1.0, 0.9), (2.0, 0.0), (6.0, 0.0)))
    assert found.tolist() == [pytest.approx([-3.0, -1.5, 4.5])]  # r minus the mean of the other two


def test_advantages_with_a_constraint_by_hand() -> None:
    # Rewards: -3, -1.5, 4.5. Costs 0.6, 0, 0.3 minus the others' mean: 0.45, -0.45, 0; times the
    # largest cost 0.6: 0.27, -0.27, 0. Mixed with multiplier 2: (A - 2 C) / 3.
    found = advantages(bench(objective="rloo", multiplier=2.0), rewards((1.0, 0.6), (2.0, 0.0), (6.0, 0.3)))
    assert found.tolist() == [pytest.approx([(-3 - 0.54) / 3, (-1.5 + 0.54) / 3, 1.5], abs=1e-6)]


def test_a_missing_reward_is_missing_and_not_zero() -> None:
    found = advantages(bench(constrained=False), rewards((None, 0.0), (1.0, 0.0), (3.0, 0.0)))
    assert found[0, 0] == 0.0  # trains nothing, and the others' mean is theirs alone
    assert found[0, 1] == pytest.approx(-found[0, 2].item())
    silent = advantages(bench(multiplier=5.0), rewards((None, 0.9), (None, 0.0)))
    assert silent.tolist() == [[0.0, 0.0]]  # costs alone teach nothing


def test_a_round_asks_nothing_twice() -> None:
    """Also a round that begins in one pass over the prompts and ends in the next; none is left out."""
    from tutelage.loop.bench import Workbench
    from tutelage.records import Message, Prompt

    prompts = [Prompt(f"p{n}", (Message("user", f"{n}?"),)) for n in range(10)]
    walker: Any = SimpleNamespace(recipe=Recipe())
    for count in (1, 4, 7, 10, 25):
        rounds = [[p.id for p in Workbench.pick(walker, prompts, count, n)] for n in range(1, 11)]
        assert all(len(r) == len(set(r)) == min(count, 10) for r in rounds)
        asked = {i for r in rounds for i in r}
        assert asked == {p.id for p in prompts} or count == 1


# ---- what a run wrote --------------------------------------------------------------------------


def by(rows: list[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    return {r[key]: r for r in rows}


def groups_of(world: World, unit: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in world.rows("generations", unit=unit):
        found[row["prompt_id"]].append(row)
    return found


@pytest.mark.parametrize("unit", ROUNDS)
def test_rewards_are_the_composition_of_the_verdicts(played: World, unit: str) -> None:
    weights = played.load().rewards.model_dump()
    judge_of = {"critic": "fit", "constitution": "principles", "consistency": "consistency", "text": "text"}
    said: dict[str, dict[str, float | None]] = defaultdict(dict)
    for verdict in played.rows("verdicts", unit=unit):
        said[verdict["subject"]][judge_of[verdict["judge"]]] = verdict["value"]
    kept = by(played.rows("rewards", unit=unit), "generation_id")
    groups = groups_of(played, unit)
    assert sum(map(len, groups.values())) == len(kept) > 0
    for group in groups.values():
        scaled = {term: normalise([said[g["id"]][term] for g in group]) for term in weights}
        for n, generation in enumerate(group):
            reward = kept[generation["id"]]
            assert reward["raw"] == said[generation["id"]]
            there = {t: v[n] for t, v in scaled.items() if v[n] is not None}
            expected = math.fsum(weights[t] * there[t] for t in there) / math.fsum(weights[t] for t in there)
            assert reward["total"] == pytest.approx(expected)


@pytest.mark.parametrize("unit", ROUNDS)
def test_credit_sums_to_the_advantage_and_has_a_number_a_token(played: World, unit: str) -> None:
    generations = by(played.rows("generations", unit=unit), "id")
    credits = played.rows("credits", unit=unit)
    assert {c["generation_id"] for c in credits} == set(generations)
    for row in credits:
        assert len(row["credit"]) == len(generations[row["generation_id"]]["tokens"])
        assert sum(row["credit"]) == pytest.approx(row["advantage"], abs=1e-5)
    for group in groups_of(played, unit).values():
        total = sum(by(credits, "generation_id")[g["id"]]["advantage"] for g in group)
        assert total == pytest.approx(0.0, abs=1e-5)  # nobody gains without the others' loss


@pytest.mark.parametrize("unit", ROUNDS)
def test_figures_recompute(played: World, unit: str) -> None:
    (rollout,) = [m["values"] for m in played.rows("metrics", unit=unit) if m["stage"] == "rollout"]
    verdicts, kept = played.rows("verdicts", unit=unit), played.rows("rewards", unit=unit)
    assert rollout["verdicts"] == len(verdicts)
    assert rollout["verdicts_abstained"] == sum(v["value"] is None for v in verdicts)
    assert rollout["missing_rewards"] == sum(r["total"] is None for r in kept)
    for term in ("fit", "principles", "consistency", "text"):
        known = [r["raw"][term] for r in kept if r["raw"][term] is not None]
        if known:
            assert rollout[f"term_{term}"] == pytest.approx(sum(known) / len(known))
    acts = [v["evidence"]["act"] for v in verdicts if v["judge"] == "critic"]
    for act in ("answers", "abstains", "asks_back"):
        assert rollout[f"share_{act}"] == pytest.approx(sum(a[act] for a in acts) / len(acts))
    kinds = [v["evidence"]["kind"] for v in verdicts if v["judge"] == "critic"]
    due = [k["answerable"] if k["answerable"] == max(k.values()) else 0.0 for k in kinds]
    paid = sum(d for d, a in zip(due, acts, strict=True) if max(a, key=lambda act: a[act]) != "answers")
    # Beliefs are kept to four digits.
    assert rollout["cost"] == pytest.approx(paid / sum(due) if sum(due) else 0.0, abs=1e-3)


def test_the_cost_on_watched_questions_recomputes(new_world: Callable[..., World]) -> None:
    world = new_world(constraint={"questions": 7}, update={"rounds": 1})
    assert world.play().code == 3
    (rollout,) = [m["values"] for m in world.rows("metrics") if m["stage"] == "rollout"]
    (watched,) = [n["body"] for n in world.rows("notes") if n["topic"] == "watched"]
    assert len({name for name, *_ in watched}) == len(watched) == 7
    paid = sum(due for _, _, due, act in watched if act != "answers")
    total = sum(due for _, _, due, _ in watched)
    assert rollout["cost"] == pytest.approx(paid / total if total else 0.0, abs=1e-3)


def test_the_documented_figures_of_a_rollout_are_there(played: World) -> None:
    (rollout,) = [m["values"] for m in played.rows("metrics", unit="round-1") if m["stage"] == "rollout"]
    assert {"share_answers", "share_abstains", "share_asks_back", "verdicts", "verdicts_abstained", "dead_groups",
            "missing_rewards", "cost", "multiplier"} <= set(rollout)  # fmt: skip
    updates = [m["values"] for m in played.rows("metrics", unit="round-1") if m["stage"] == "update"]
    assert updates and all({"loss", "kl_to_start", "clip_fraction", "ratio", "grad_norm"} <= set(u) for u in updates)


def test_the_first_step_of_a_round_is_on_policy(played: World) -> None:
    for unit in ROUNDS:
        first = next(m["values"] for m in played.rows("metrics", unit=unit) if m["stage"] == "update")
        assert first["ratio"] == pytest.approx(1.0, abs=1e-4)
        assert first["clip_fraction"] == 0.0


def test_replies_say_which_policy_gave_them(played: World) -> None:
    said = {u: {g["policy_version"] for g in played.rows("generations", unit=u)} for u in ("supervised", *ROUNDS)}
    assert said == {"supervised": {"start"}, "round-1": {"r0"}, "round-2": {"r1"}}


def test_rounds_draw_without_truncation(played: World) -> None:
    """A truncated sampler without the same truncation in the trainer would bias the ratios."""
    for unit in ROUNDS:
        for row in played.rows("generations", unit=unit):
            assert (row["settings"]["top_k"], row["settings"]["top_p"]) == (0, 1.0)


def test_log_probs_of_the_ledger_are_those_of_the_saved_version(played: World) -> None:
    from tutelage.api import load_for_use
    from tutelage.engines.packing import Group
    from tutelage.policy.learner import score
    from tutelage.records import Message, Prompt

    lm = load_for_use("one", runs=played.runs, version="r1")
    texts = {p["id"]: p["messages"] for p in played.rows("prompts")}
    for prompt_id, group in list(groups_of(played, "round-2").items())[:3]:
        messages = tuple(Message(m["role"], m["content"]) for m in texts[prompt_id])
        completions = tuple(tuple(g["tokens"]) for g in group)
        found = score(lm, [Group(lm.encode(Prompt("p", messages)), completions, tuple(range(len(group))))], budget=512)
        for row, generation in enumerate(group):
            own = found.logp_BT[row, : len(generation["tokens"])]
            assert torch.allclose(own, torch.tensor(generation["logps"]), atol=2e-4)


# ---- what the round does around an objective ----------------------------------------------------


def test_the_divergence_is_charged_to_the_reward_of_a_reply() -> None:
    """0.5 nats a token, beta 0.2: replies of 1, 2 and 3 tokens pay 0.1, 0.2 and 0.3."""
    recipe = Recipe.model_validate(
        {"constraint": {"enabled": False}, "update": {"objective": "reinforce", "kl": 0.2}, "objective": {"kl_estimator": "k1-reward", "baseline": "none"}}
    )  # fmt: skip
    given: Any = SimpleNamespace(
        recipe=recipe, choice=choose(recipe), baselines={}, constraints=constraints_of(recipe), trust={}
    )
    found = advantages(given, rewards((1.0, 0), (2.0, 0), (3.0, 0)), lengths=(1, 2, 3), spent=0.5)
    assert found.tolist() == [pytest.approx([0.9, 1.8, 2.7])]


def test_dapo_takes_reward_off_near_the_limit_and_cut_off_replies_teach_nothing() -> None:
    """Limit 10, share 0.2: 9 tokens cost 0.5, 10 cost 1. Rewards 1, 1 - 0.5, 2 - 1: 1, 0.5, 1."""
    recipe = Recipe.model_validate(
        {"constraint": {"enabled": False}, "update": {"objective": "dapo"}, "sampling": {"max_new_tokens": 10}, "objective": {"scale": "none"}}
    )  # fmt: skip
    given: Any = SimpleNamespace(
        recipe=recipe, choice=choose(recipe), baselines={}, constraints=constraints_of(recipe), trust={}
    )
    totals = rewards((1.0, 0), (1.0, 0), (2.0, 0))
    found = advantages(given, totals, lengths=(3, 9, 10))
    assert found.tolist() == [pytest.approx([1 / 6, -1 / 3, 1 / 6])]
    replies: Any = [[SimpleNamespace(finished=n < 2) for n in range(3)]]
    assert teaching(given, totals, replies, found) == [[True, True, False]]
    assert teaching(given, totals, replies, torch.zeros(1, 3)) == [[False] * 3]


def test_a_value_head_also_learns_from_ties_and_never_from_what_is_missing() -> None:
    recipe = Recipe.model_validate({"update": {"objective": "ppo"}})
    given: Any = SimpleNamespace(recipe=recipe, choice=choose(recipe))
    replies: Any = [[SimpleNamespace(finished=True)] * 3]
    zeros = torch.zeros(1, 3)
    assert teaching(given, rewards((1.0, 0), (None, 0), (1.0, 0)), replies, zeros) == [[True, False, True]]
    assert teaching(given, rewards((1.0, 0), (None, 0), (None, 0)), replies, zeros) == [[False] * 3]


def test_a_moving_baseline_is_that_of_earlier_rounds() -> None:
    recipe = Recipe.model_validate(
        {"constraint": {"enabled": False}, "update": {"objective": "reinforce"}, "objective": {"baseline": "moving", "decay": 0.5}}
    )  # fmt: skip
    given: Any = SimpleNamespace(
        recipe=recipe, choice=choose(recipe), baselines={}, constraints=constraints_of(recipe), trust={}
    )
    assert advantages(given, rewards((1.0, 0), (3.0, 0))).tolist() == [[-1.0, 1.0]]  # its own mean: nothing earlier
    assert given.baselines == {"reward": 2.0}
    assert advantages(given, rewards((5.0, 0), (5.0, 0))).tolist() == [[3.0, 3.0]]
    assert given.baselines == {"reward": 3.5}


def test_tied_and_silent_groups_are_counted() -> None:
    from tutelage.feedback.panel import Findings
    from tutelage.loop.stages import figures

    def group(*totals: float | None) -> list[Reward]:
        return [Reward("g", total, {}) for total in totals]

    found = figures(
        Findings([], [], [], [], [], []), [group(1.0, 1.0), group(1.0, None), group(None, None), group(1.0, 2.0)]
    )
    assert (found["dead_groups"], found["tied_groups"], found["silent_groups"]) == (2, 1, 1)
