"""The same in Python as on the command line, and what can be got out of a run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_world import World

import tutelage
from tutelage import api
from tutelage.config import Recipe
from tutelage.errors import InputError, StoreError, TutelageError

pytest_plugins = ["tests.tiny_world"]

TOKENS = torch.tensor([[5, 40, 77, 12, 250, 9]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found


def plain(folder: Path | str) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_packages_front_door() -> None:
    assert tutelage.run is api.run and tutelage.evaluate is api.evaluate
    assert tutelage.__version__


def test_run_returns_what_the_summary_says(world: World, played: World) -> None:
    result = api.run(world.load(), runs=world.runs, name="one")
    assert result.decision == result.summary["decision"] == "rejected"
    kept = json.loads((world.runs / "one" / "summary.json").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(result.summary))
    assert [e.metric for e in result.evaluation] == [e["metric"] for e in kept["evaluation"]]
    assert world.weights() == played.weights()


def test_bad_inputs_leave_no_folder(world: World) -> None:
    for settings in ({"prompts": "nowhere.jsonl"}, {"model": "nowhere"}, {"overrides": ["update.rounds=-1"]}):
        with pytest.raises(TutelageError) as found:
            api.run(world.recipe, runs=world.runs, **settings)  # type: ignore[arg-type]
        assert found.value.got and (found.value.expected or found.value.fix)
    assert not world.runs.exists() or list(world.runs.iterdir()) == []


def test_a_run_that_failed_can_be_opened_again_in_the_same_process(
    world: World, tiny_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tutelage.applications import truthfulness

    def fail(*_: object, **__: object) -> None:
        raise StoreError("full")

    monkeypatch.setattr(truthfulness, "improve", fail)
    with pytest.raises(StoreError):
        api.run(world.load(), runs=world.runs, name="one")
    monkeypatch.undo()
    monkeypatch.setenv("TUTELAGE_HOME", str(tiny_home))
    assert api.run(runs=world.runs, name="one", resume=True).decision == "rejected"


def test_the_newest_run_is_found_and_others_by_name_or_path(played: World, tmp_path: Path) -> None:
    folder = played.runs / "one"
    assert api.open_run(None, played.runs) == api.open_run("one", played.runs) == folder
    assert api.open_run(str(folder), tmp_path) == folder
    with pytest.raises(StoreError, match="no run in"):
        api.open_run(None, tmp_path)
    with pytest.raises(StoreError, match="'two'"):
        api.open_run("two", played.runs)


@pytest.mark.parametrize("version", ["r0", "r1", "r2"])
def test_every_version_of_a_run_can_be_loaded(version: str, played: World) -> None:
    lm = api.load_for_use("one", runs=played.runs, version=version)
    assert lm.name == f"one@{version}" + (" (rejected by the gate)" if version == "r2" else "")
    assert not torch.equal(logits(lm.model), logits(api.load_for_use("one", runs=played.runs, version="start").model))


def test_the_start_version_is_the_model_itself(played: World) -> None:
    start = api.load_for_use("one", runs=played.runs, version="start")
    own = api.load_for_use(played.load().model.name, dtype="float32")
    assert torch.equal(logits(start.model), logits(own.model))
    assert (
        api.load_for_use("one", runs=played.runs).name == "one@r2 (rejected by the gate)"
    )  # a rejected candidate can be looked at
    with pytest.raises(StoreError, match="r9"):
        api.load_for_use("one", runs=played.runs, version="r9")


@pytest.mark.parametrize("lora", [{}, {"from_depth": 0.0}, {"rank": 3, "alpha": 5.0}, {"targets": ["q_proj"]}])
def test_any_adapter_comes_back_as_it_was_trained(lora: dict[str, Any], new_world: Callable[..., World]) -> None:
    """A loaded run answers the held-out suite as the run itself did."""
    world = new_world(lora=lora, supervised={"learning_rate": 0.02}, update={"rounds": 0})
    assert world.play().code == 3
    found = api.evaluate("one", suite=world.folder / "heldout.jsonl", runs=world.runs, max_new_tokens=8)
    kept = world.rows("outcomes", suite="heldout", version="r0")
    out = world.folder / "found.json"
    api.evaluate("one", suite=world.folder / "heldout.jsonl", runs=world.runs, max_new_tokens=8, out=out)
    assert [a["reply"] for a in json.loads(out.read_text(encoding="utf-8"))["answers"]] == [k["reply"] for k in kept]
    assert found.n == len(kept)


def test_an_exported_model_is_the_runs_model(played: World, tmp_path: Path) -> None:
    target = api.export("one", merged=tmp_path / "merged", runs=played.runs)
    ours = api.load_for_use("one", runs=played.runs)
    assert torch.allclose(logits(plain(target)), logits(ours.model), atol=1e-5)
    with pytest.raises(InputError, match="not empty"):
        api.export("one", merged=target, runs=played.runs)


def test_peft_loads_a_runs_checkpoint_onto_the_start_model(played: World) -> None:
    peft = pytest.importorskip("peft")
    checkpoint = played.runs / "one" / "checkpoints" / "r2"
    theirs = peft.PeftModel.from_pretrained(plain(played.load().model.name), checkpoint).eval()
    ours = api.load_for_use("one", runs=played.runs)
    assert torch.allclose(logits(theirs), logits(ours.model), atol=1e-5)


def test_a_system_prompt_is_put_before_every_question(played: World, tmp_path: Path) -> None:
    suite, model = played.folder / "gate.jsonl", played.load().model.name
    for name, system in (("without", None), ("with", "Answer in one word.")):
        api.evaluate(model, suite=suite, system=system, max_new_tokens=8, out=tmp_path / f"{name}.json")
    replies = [
        [a["reply"] for a in json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["answers"]]
        for name in ("without", "with")
    ]
    assert replies[0] != replies[1]


def test_a_model_against_itself_does_not_differ(played: World) -> None:
    model = played.load().model.name
    found = api.evaluate(model, suite=played.folder / "gate.jsonl", against=model, max_new_tokens=8)
    for row in found.against:
        if row["metric"] != "abstained_known":
            assert row["before"] == row["after"]
            assert row["low"] is None or row["low"] <= 0 <= row["high"]


def test_progress_is_told(world: World) -> None:
    class Heard:
        def __init__(self) -> None:
            self.stages: list[tuple[str, int]] = []
            self.steps: list[int] = []
            self.lines: list[str] = []
            self.shown: dict[str, object] = {}

        def stage(self, name: str, total: int, unit: str) -> None:
            self.stages.append((name, total))
            self.steps.append(0)

        def advance(self, steps: int = 1) -> None:
            self.steps[-1] += steps

        def figures(self, **values: float | str) -> None:
            self.shown |= values

        def say(self, text: str) -> None:
            self.lines.append(text)

    heard = Heard()
    api.run(world.load("update.rounds=1"), runs=world.runs, name="one", progress=heard)
    names = [name for name, _ in heard.stages]
    assert "supervised: generate" in names and "round 1: update" in names
    assert [n for n, s in zip(heard.stages, heard.steps, strict=True) if s > n[1]] == []
    # Every stage that begins is brought to its end; of an update only groups with a lesson count.
    assert [n for n, s in zip(heard.stages, heard.steps, strict=True) if s != n[1]] == []
    assert {"loss", "kl", "cost", "multiplier"} <= set(heard.shown)


def test_the_default_recipe_is_the_built_in_one() -> None:
    from tutelage.config import load_recipe

    assert load_recipe("honesty").feedback == Recipe().feedback
