"""Runs that learn from pairs, on a small model."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.tiny_world import World

pytest_plugins = ["tests.tiny_world"]

WORDS = (
    "update.rounds=1",
    "update.learning_rate=0.01",
    "update.batch=2",
    "prompts.gate_limit=6",
    "prompts.heldout_limit=6",
)


@pytest.fixture
def play(new_world: Any) -> Any:
    def played(name: str, *more: str) -> World:
        world: World = new_world(f"{name}{len(more)}")
        words = [w for s in (*WORDS, f'update.objective="{name}"', *more) for w in ("--set", s)]
        done = world.play(*words)
        assert done.code == 3, done.err
        return world

    return played


def steps(world: World, stage: str) -> list[dict[str, float]]:
    return [m["values"] for m in world.rows("metrics") if m["stage"] == stage]


# All of them, and every option, learn in tests/loop/test_choice.py; here whole runs.
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_an_objective_on_pairs_plays_a_round(play: Any, name: str) -> None:
    world = play(name)
    (counted,) = steps(world, "pairs")
    assert counted["good" if name == "kto" else "pairs"] > 0
    updates = steps(world, "update")
    assert counted.get("pairs", 0) <= 8  # the best and the worst of each prompt's replies
    assert updates and all(math.isfinite(v) for step in updates for v in step.values())
    assert updates[-1]["kl_to_start"] >= 0 and updates[0]["grad_norm"] > 0
    assert world.weights()["r1"] != world.weights()["r0"]
    assert (world.runs / "one" / "report.html").is_file()


def test_xpo_compares_its_own_replies_with_the_start_models(play: Any) -> None:
    world = play("xpo", "objective.alpha=0.01")
    drawn = [g for g in world.rows("generations") if g["unit"] == "round-1"]
    assert {(g["sample"], g["policy_version"]) for g in drawn} == {(0, "r0"), (1, "r0"), (2, "start")}  # of three
    assert len({g["id"] for g in drawn}) == 24
    (counted,) = steps(world, "pairs")
    assert 0 < counted["pairs"] <= 8 and counted["pairs"] + counted["same"] + counted["ties"] <= 8
    assert world.weights()["r1"] != world.weights()["r0"]


def test_nothing_to_compare_stops_with_the_last_version(new_world: Any) -> None:
    world: World = new_world("tied")
    words = [w for s in (*WORDS, "update.objective=dpo", "objective.pair_tie=1000.0") for w in ("--set", s)]
    done = world.play(*words)
    assert done.code == 3 and set(world.weights()) == {"r0"}
    assert "differ in what they are worth" in (world.runs / "one" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("update.objective=dpo", "update.kl=0.2"), "objective.beta"),
        (("update.objective=dpo", "update.clip=0.5"), "update.clip"),
        (("update.objective=ipo", "objective.gamma=1.0"), "objective.gamma is not read"),
        (("update.objective=grpo", "objective.beta=1.0"), "objective.beta is not read"),
        (("update.objective=kto", "objective.pairs=all"), "objective.pairs is not read"),
        (("update.objective=dpo", "credit.method=uniform"), "[credit] is not read"),
        (("update.objective=exo-pair", "objective.smoothing=0.0"), "objective.smoothing"),
        (("update.objective=robust-dpo", "objective.flip=0.495"), "objective.flip"),
        (("controller.enabled=true", "supervised.adapter=."), "supervised.adapter"),
    ],
)
def test_options_that_nothing_reads_are_refused(world: World, settings: tuple[str, ...], said: str) -> None:
    done = world.play(*[w for s in settings for w in ("--set", s)])
    assert done.code == 2 and said in done.err
