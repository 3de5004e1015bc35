"""The benchmark of the honesty recipe: arms go on from the supervised stage of another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_world import World

pytest_plugins = ["tests.tiny_world"]

HERE = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    import honesty

    return honesty


def test_a_copied_start_ends_as_the_whole_run_and_draws_no_answer_twice(
    world: World, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tutelage.loop import improve

    few = ("--set", "prompts.gate_limit=3", "--set", "prompts.heldout_limit=3")
    assert world.play(*few, name="whole").code == 3
    whole, half = world.runs / "whole", world.runs / "half"
    bench.copy_start(whole, half, (whole / "recipe.toml").read_text(encoding="utf-8"))
    asked: list[tuple[str, str]] = []
    drawn = improve.evaluate

    def counted(*args: Any, suite: str, version: str, **rest: Any) -> Any:
        asked.append((suite, version))
        return drawn(*args, suite=suite, version=version, **rest)

    monkeypatch.setattr(improve, "evaluate", counted)
    assert world.resume(name="half").code == 3
    assert asked and "start" not in [version for _, version in asked]
    assert world.weights("half") == world.weights("whole")
    one, two = (json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in (whole, half))
    assert one["evaluation"] == two["evaluation"] and one["decision"] == two["decision"]
