"""The forecast: counts that are right, estimates that move the right way, nothing loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tutelage.config import Recipe
from tutelage.errors import InputError, ModelError
from tutelage.records import Message, Prompt
from tutelage.studio import forecast as module
from tutelage.studio.forecast import forecast, forecast_lines
from tutelage.studio.probe import Plane, Speeds, measure

SPEEDS = Speeds(
    decode=Plane(1e-2, 1e-3, 1e-2, 1e-4),
    begin=Plane(0.01, 1e-4, 1e-3, 1e-5),
    forward=Plane(1e-3, 1e-5, 1e-3, 1e-5),
    learn=Plane(2e-2, 3e-4, 2e-2, 3e-4),
    lead=20,
    prompt=12.0,
    layers=3,
)


@pytest.fixture(autouse=True)
def _fixed_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast this machine is just now must not decide a test."""
    monkeypatch.setattr(module, "measure", lambda *_: SPEEDS)


def recipe(model: Path, **sections: dict[str, Any]) -> Recipe:
    base: dict[str, dict[str, Any]] = {
        "model": {"name": str(model), "dtype": "float32", "device": "cpu"},
        "prompts": {"limit": 50, "gate_limit": 20, "heldout_limit": 30},
    }
    for name, values in sections.items():
        base.setdefault(name, {}).update(values)
    return Recipe.model_validate(base)


def test_counts_by_hand(tiny_dirs: dict[str, Path]) -> None:
    found = forecast(
        recipe(
            tiny_dirs["llama"],
            supervised={"samples": 2, "batch": 16, "epochs": 3},
            update={"rounds": 2, "prompts": 40, "samples": 4, "batch": 16},
        )
    )
    assert (found["training_prompts"], found["gate_items"], found["heldout_items"]) == (50, 20, 30)
    assert found["replies_judged"] == 50 * 2 + 2 * 40 * 4
    assert found["optimiser_steps"] == 4 * 3 + 2 * 3
    assert found["rounds"] == 2 and found["principles"] == 3
    assert found["warnings"] == []


def test_a_round_takes_no_more_prompts_than_there_are(tiny_dirs: dict[str, Path]) -> None:
    found = forecast(
        recipe(tiny_dirs["llama"], supervised={"enabled": False}, update={"rounds": 1, "prompts": 60, "samples": 2})
    )
    assert found["replies_judged"] == 50 * 2


@pytest.mark.parametrize(
    "more",
    [
        {"update": {"rounds": 30}},
        {"update": {"samples": 60}},
        {"supervised": {"samples": 40}},
        {"supervised": {"epochs": 60}},
        {"prompts": {"limit": 400}},
        {"lora": {"from_depth": 0.0}},
    ],
)
def test_more_work_takes_longer(more: dict[str, dict[str, Any]], tiny_dirs: dict[str, Path]) -> None:
    seconds = [forecast(recipe(tiny_dirs["llama"], **m))["estimated_seconds"] for m in ({}, more)]
    assert seconds[1] > seconds[0]


def test_what_a_user_should_think_about_is_said(tiny_dirs: dict[str, Path]) -> None:
    odd = recipe(tiny_dirs["llama"], gate={"enabled": False}, supervised={"enabled": False}, limits={"memory_gb": 0.1})
    warnings = forecast(odd)["warnings"]
    assert len(warnings) == 3
    assert [w for word in ("memory", "gate", "supervised") for w in warnings if word in w] == warnings
    lines = forecast_lines(forecast(odd))
    assert sum("warning:" in line for line in lines) == 3 and lines[-1] == "the recipe is valid"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt_neox"])
def test_parameters_are_counted_from_the_config(
    kind: str, tiny_dirs: dict[str, Path], tiny_lms: dict[str, Any]
) -> None:
    """All that a token is multiplied with: linear layers and the output matrix."""
    import torch

    shape = module._shape(recipe(tiny_dirs[kind]))
    linear = sum(m.weight.numel() for m in tiny_lms[kind].model.modules() if isinstance(m, torch.nn.Linear))
    return_tolerance = 0.25 if kind == "mistral" else 0.01  # its heads are wider than hidden / heads
    assert shape["parameters"] == pytest.approx(linear, rel=return_tolerance)


def test_broken_inputs_are_found_without_loading(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        forecast(recipe(tiny_dirs["llama"], prompts={"train": str(tmp_path / "nowhere.jsonl")}))
    with pytest.raises(ModelError):
        forecast(recipe(tmp_path / "nowhere"))
    broken = tmp_path / "broken"
    broken.mkdir()
    for text in ("{", "{}", "[]", json.dumps({"hidden_size": 8})):
        (broken / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ModelError):
            forecast(recipe(broken))


def test_a_plane_goes_through_its_corners() -> None:
    """start 1, slope 2, layer_start 3, layer_slope 4: 1 + 2 x + n (3 + 4 x)."""

    def truth(layers: float, size: float) -> float:
        return 1 + 2 * size + layers * (3 + 4 * size)

    plane = Plane.through([[truth(n, x) for x in (10, 50)] for n in (1, 3)], (1, 3), (10, 50))
    assert (plane.start, plane.slope, plane.layer_start, plane.layer_slope) == pytest.approx((1, 2, 3, 4))
    assert plane(30, 7) == pytest.approx(truth(30, 7)) and plane.of_layers(5, 2) == pytest.approx(5 * 11)


def test_a_plane_never_goes_below_zero() -> None:
    """A larger batch that happened to be faster does not make time run backwards."""
    plane = Plane.through([[2.0, 1.0], [1.0, 0.5]], (1, 3), (10, 50))
    assert min(plane.start, plane.slope, plane.layer_start, plane.layer_slope) >= 0 and plane(30, 1000) >= 0


def test_a_call_of_the_sampler_by_hand(tiny_dirs: dict[str, Path]) -> None:
    """8 prompts x 4 samples in 16 rows, 10 tokens each: 1.5 batches at 16 rows, then one length at 8."""
    work = module._Work(recipe(tiny_dirs["llama"], sampling={"rows": 16}), SPEEDS)
    full, half = SPEEDS.decode(3, 16), SPEEDS.decode(3, 8)
    assert work.generate(8, 4, 10.0) == pytest.approx(SPEEDS.begin(3, 8) + 15 * full + 10 * half)
    assert work.generate(0, 4, 10.0) == 0.0


def test_frozen_layers_are_passed_but_not_learned(tiny_dirs: dict[str, Path]) -> None:
    work = module._Work(recipe(tiny_dirs["llama"], lora={"from_depth": 0.67}), SPEEDS)
    assert work.learned == 1
    size = SPEEDS.lead + 5 * 30.0  # one step on five prompts
    wanted = SPEEDS.learn(1, size) + SPEEDS.forward.of_layers(2, size)
    assert work.learn(5, 5, 30.0) == pytest.approx(wanted)
    assert work.learn(5, 5, 30.0, anchored=True) == pytest.approx(wanted + SPEEDS.forward(3, size))


def test_tokens_are_read_where_critics_read_them() -> None:
    from tutelage.feedback.token_states import DEPTH

    assert module._ATTENDED == DEPTH


@pytest.mark.parametrize("full", [False, True])
def test_a_real_model_is_measured(full: bool, tiny_dirs: dict[str, Path]) -> None:
    prompts = [Prompt(f"p{i}", (Message("user", "Who was it?"),)) for i in range(5)]
    found = measure(recipe(tiny_dirs["llama"], lora={"full": full}), prompts)
    assert found.layers == 3 and found.lead > 0 and found.prompt > 0
    for plane in (found.decode, found.begin, found.forward, found.learn):
        assert plane(3, 64) > 0


def test_whole_matrices_take_more_memory(tiny_dirs: dict[str, Path]) -> None:
    one, whole = (forecast(recipe(tiny_dirs["llama"], lora={"full": full})) for full in (False, True))
    assert whole["estimated_memory_bytes"] > one["estimated_memory_bytes"]


def test_a_controllers_run_is_counted_by_its_own_section(tiny_dirs: dict[str, Path]) -> None:
    section: dict[str, Any] = {
        "enabled": True, "temperatures": (0.0, 0.5, 1.0), "top_k": (0, 9), "masks": ("no-a=a",), "grid_prompts": 7,
        "grid_samples": 2, "rounds": 3, "prompts": 16, "samples": 4, "batch": 6, "epochs": 5, "measure_samples": 2,
    }  # fmt: skip
    found = forecast(recipe(tiny_dirs["llama"], controller=section, supervised={"enabled": False}))
    settings = (1 + 2 * 2) * 2  # greedy has no top-k; each with the mask and without
    assert found["replies_judged"] == 7 * settings * 2 + 3 * 16 * 4 + 2 * 2 * (20 + 30)
    assert (found["rounds"], found["optimiser_steps"], found["warnings"]) == (3, 3 * 5 * 3, [])
    assert set(found["estimated_seconds_by_unit"]) == {"grid", "rounds", "final"}
    longer = forecast(recipe(tiny_dirs["llama"], controller=section | {"grid_prompts": 0}))
    by_unit = [f["estimated_seconds_by_unit"] for f in (found, longer)]
    assert by_unit[0]["grid"] < by_unit[1]["grid"]
    assert by_unit[0]["rounds"] == by_unit[1]["rounds"]
    plain = forecast(recipe(tiny_dirs["llama"]))
    assert found["estimated_memory_bytes"] < plain["estimated_memory_bytes"]


def test_pairs_of_a_file_take_time_and_steps(tiny_dirs: dict[str, Path]) -> None:
    off = {"enabled": False}
    plain = forecast(recipe(tiny_dirs["llama"], supervised=off))
    paired = forecast(recipe(tiny_dirs["llama"], supervised=off, pairs={"file": "builtin:pairs", "batch": 8}))
    # 80 pairs, a fifth of them held out: 64 in steps of 8
    assert (plain["pairs"], paired["pairs"]) == (0, 80)
    assert paired["optimiser_steps"] - plain["optimiser_steps"] == 8
    assert paired["estimated_seconds_by_unit"]["pairs"] > 0 and "pairs" not in plain["estimated_seconds_by_unit"]
    assert any("80 compared in builtin:pairs" in line for line in forecast_lines(paired))
