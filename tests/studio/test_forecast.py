"""The forecast: counts that are right, estimates that move the right way, nothing loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tutelage.config import Recipe
from tutelage.errors import InputError, ModelError
from tutelage.studio import forecast as module
from tutelage.studio.forecast import forecast, forecast_lines


@pytest.fixture(autouse=True)
def _fixed_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast this machine is just now must not decide a test."""
    monkeypatch.setattr(module, "_speed", lambda: {"narrow": 1e10, "wide": 4e10})


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
def test_more_work_takes_longer(
    more: dict[str, dict[str, Any]], tiny_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_speed", lambda: {"narrow": 1e7, "wide": 1e7})
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
