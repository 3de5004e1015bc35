"""Modules through the command line: adapters of a tiny model mixed, taken apart, exchanged, and credited."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_world import Done, tutelage_cli

from tutelage.applications.modules import attribute, read
from tutelage.config import load_recipe
from tutelage.errors import ModelError
from tutelage.policy.lora import attach
from tutelage.policy.merging import put_on
from tutelage.store.runs import Run

pytest_plugins = ["tests.tiny_world"]

IDS = torch.tensor([[5, 9, 14, 30, 7, 22, 41]])


@pytest.fixture(scope="module")
def shelf(tiny_lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters: short, kind, odd (which undoes short), shorter, and one of another model."""
    folder = tmp_path_factory.mktemp("shelf")
    for seed, (name, base) in enumerate(
        [("short", "tiny"), ("kind", "tiny"), ("shorter", "tiny"), ("stranger", "else")]
    ):
        adapter = attach(copy.deepcopy(tiny_lm.model), rank=2, alpha=4.0, seed=seed, model_name=base)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in adapter.layers.values():
                layer.lora_b.copy_(0.05 * torch.randn(layer.lora_b.shape, generator=generator))
        adapter.save(folder / name)
        if name == "short":
            with torch.no_grad():
                for layer in adapter.layers.values():
                    layer.lora_b.mul_(-0.5)
            adapter.save(folder / "odd")
    return folder


@pytest.fixture
def at(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shelf, as the working folder."""
    shutil.copytree(shelf, tmp_path / "shelf")
    monkeypatch.chdir(tmp_path / "shelf")
    return tmp_path / "shelf"


def told(*words: str | Path) -> Any:
    done = tutelage_cli("modules", *words, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def refused(*words: str) -> Done:
    done = tutelage_cli("modules", *words)
    assert done.code == 2 and done.out == ""
    return done


def changes(folder: str | Path) -> dict[str, torch.Tensor]:
    return {path: f.dense() for path, f in read(str(folder), Path("runs")).layers.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], factor: float = 1.0) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(v, factor * other[p], atol=1e-6) for p, v in one.items())


def test_a_mix_says_what_it_is_made_of_and_loads(at: Path, load_tiny: Callable[[], Any]) -> None:
    found = told("mix", "short", "nice=kind", "--weight", "1", "--weight", "0.5", "--out", "mixed")
    assert (found["method"], found["result_rank"], found["error"], found["base_model"]) == ("sum", 4, 0.0, "tiny")
    assert [(p["name"], p["weight"], p["rows"]) for p in found["parts"]] == [
        ("short", 1.0, [0, 2]), ("nice", 0.5, [2, 4]),
    ]  # fmt: skip
    assert [p["sha256"] for p in found["parts"]] == [read(n, at).digest for n in ("short", "kind")]
    assert json.loads((at / "mixed" / "mix.json").read_text()) == {k: v for k, v in found.items() if k != "out"}
    assert found["sha256"] == read("mixed", at).digest
    assert sorted(p.name for p in at.iterdir()) == ["kind", "mixed", "odd", "short", "shorter", "stranger"]
    lm = load_tiny()
    with torch.no_grad():
        start = lm.model(IDS, use_cache=False).logits
        put_on(lm.model, read("mixed", at))
        assert (lm.model(IDS, use_cache=False).logits - start).abs().max() > 0.01


def test_isolate_gives_back_what_went_in(at: Path) -> None:
    told("mix", "short", "kind", "--weight", "0.3", "--weight", "0.7", "--out", "mixed")
    told("isolate", "mixed", "kind", "--out", "kind-again")
    assert same(changes("kind-again"), changes("kind"))
    told("isolate", "mixed", "short", "--weight", "2", "--out", "twice")
    assert same(changes("twice"), changes("short"), 2.0)
    told("mix", "short", "kind", "--method", "soup", "--out", "soup")
    told("isolate", "soup", "short", "--out", "short-again")
    assert same(changes("short-again"), changes("short"))


@pytest.mark.parametrize("form", [[], ["--method", "soup"], ["--method", "ties", "--density", "0.5"], ["--rank", "3"],
                                  ["--method", "dare", "--drop", "0.2", "--seed", "5"]])  # fmt: skip
def test_swap_and_extend_are_mixes_of_the_new_parts_by_the_old_method(at: Path, form: list[str]) -> None:
    told("mix", "short", "kind", "--weight", "1", "--weight", "2", *form, "--out", "mixed")
    swapped = told("swap", "mixed", "short", "shorter", "--out", "swapped")
    told("mix", "shorter", "kind", "--weight", "1", "--weight", "2", *form, "--out", "anew")
    assert same(changes("swapped"), changes("anew"))
    assert [(p["name"], p["weight"]) for p in swapped["parts"]] == [("shorter", 1.0), ("kind", 2.0)]
    extended = told("extend", "mixed", "shorter", "--weight", "0.5", "--out", "extended")
    told("mix", "short", "kind", "shorter", "--weight", "1", "--weight", "2", "--weight", "0.5", *form, "--out", "all")
    assert same(changes("extended"), changes("all"))
    assert extended["method"] == swapped["method"]


def test_swap_takes_another_weight_and_extend_a_single_adapter(at: Path) -> None:
    found = told("extend", "short", "kind", "--weight", "0.5", "--out", "mixed")
    assert [(p["name"], p["weight"]) for p in found["parts"]] == [("short", 1.0), ("kind", 0.5)]
    found = told("swap", "mixed", "kind", "odd", "--weight", "2", "--out", "gone")
    assert [p["weight"] for p in found["parts"]] == [1.0, 2.0]
    assert same(changes("gone"), changes("short"), 0.0)  # odd is -0.5 of short


def test_show_tells_norms_and_interference(at: Path) -> None:
    told("mix", "short", "odd", "--out", "mixed")
    found = told("show", "short", "kind", "odd", "mixed")
    names = [a["name"] for a in found["adapters"]]
    assert names == ["short", "kind", "odd", "mixed", "mixed/short", "mixed/odd"]
    short, dense = found["adapters"][0], changes("short")
    assert short["norms"] == pytest.approx({p: float(d.norm()) for p, d in dense.items()}, rel=1e-4)
    assert list(short["by_layer"]) == ["0", "1", "2"]
    assert short["norm"] == pytest.approx(float(torch.cat([d.flatten() for d in dense.values()]).norm()), rel=1e-4)
    cosines = found["interference"]
    assert cosines[0][2] == pytest.approx(-1.0, abs=1e-5) and cosines[0][0] == 1.0
    assert abs(cosines[0][1]) < 0.1
    assert cosines[0][4] == pytest.approx(1.0, abs=1e-5)
    assert found["adapters"][3]["norm"] == pytest.approx(short["norm"] / 2, rel=1e-4)
    text = tutelage_cli("modules", "show", "short", "odd", "mixed")
    assert text.code == 0
    assert "-1.000" in text.out and "mixed/odd" in text.out and "sum of +1 short +1 odd" in text.out


def test_a_run_serves_as_an_adapter(at: Path) -> None:
    run = Run.create(at / "runs", load_recipe("honesty"), "one")
    for version, name in (("r1", "short"), ("r2", "kind")):
        run.save_checkpoint(version, lambda folder, name=name: shutil.copytree(at / name, folder, dirs_exist_ok=True))
    run.close()
    assert "checkpoint 'start' of one is missing" in refused("show", "one").err
    (at / "runs" / "one" / "summary.json").write_text('{"candidate": "r2"}')
    found = told("mix", "one", "first=one@r1", "--out", "mixed")
    assert [(p["name"], Path(p["source"]).name) for p in found["parts"]] == [("one", "r2"), ("first", "r1")]
    assert [p["sha256"] for p in found["parts"]] == [read(n, at).digest for n in ("kind", "short")]
    (at / "runs" / "one" / "checkpoints" / "r2" / "adapter_config.json").write_text("{}")
    assert "does not match its manifest" in refused("show", "one").err


def test_what_cannot_be_is_refused_and_nothing_is_left(at: Path) -> None:
    before = sorted(p.name for p in at.iterdir())
    assert "belongs to" in refused("mix", "short", "stranger", "--out", "x").err
    assert "belongs to" in refused("show", "short", "stranger").err
    assert "2 adapters and 1 weights" in refused("mix", "short", "kind", "--weight", "1", "--out", "x").err
    assert "two parts are called 'short'" in refused("mix", "short", "short", "--out", "x").err
    assert "two adapters are called" in refused("show", "short", "short").err
    assert "is there already" in refused("mix", "short", "kind", "--out", "odd").err
    assert "neither an adapter's folder nor a run" in refused("show", "nobody").err
    assert "is no mix" in refused("isolate", "short", "short", "--out", "x").err
    assert sorted(p.name for p in at.iterdir()) == before
    told("mix", "short", "kind", "--out", "mixed")
    assert "no part 'odd'" in refused("swap", "mixed", "odd", "kind", "--out", "x").err
    told("mix", "short", "kind", "--rank", "2", "--out", "cut")
    assert "do not lie apart" in refused("isolate", "cut", "short", "--out", "x").err
    assert tutelage_cli("modules", "show", "nobody", "--json").err.startswith('{"error": "ModelError"')


def test_a_changed_mix_and_a_changed_part_are_noticed(at: Path) -> None:
    told("mix", "short", "kind", "--out", "mixed")
    told("mix", "short", "kind", "--rank", "2", "--out", "cut")
    shutil.copy(at / "odd" / "adapter_model.safetensors", at / "short" / "adapter_model.safetensors")
    assert "has changed since 'cut'" in refused("extend", "cut", "odd", "--out", "x").err
    shutil.copy(at / "cut" / "adapter_model.safetensors", at / "mixed" / "adapter_model.safetensors")
    shutil.copy(at / "cut" / "adapter_config.json", at / "mixed" / "adapter_config.json")
    assert "not those that it describes" in refused("show", "mixed").err
    (at / "cut" / "mix.json").write_text("{}")
    assert "is damaged" in refused("show", "cut").err


def test_credit_of_parts_and_layers_of_a_real_model(at: Path, load_tiny: Callable[[], Any]) -> None:
    """Each subset reaches what a mix of exactly these parts reaches, and the credit sums to the whole gain."""
    told("mix", "short", "kind", "odd", "--out", "mixed")

    def measure(lm: Any) -> float:
        with torch.no_grad():
            return float(lm.model(IDS, use_cache=False).logits[0, -1].log_softmax(-1)[17])

    start, alone = measure(load_tiny()), load_tiny()
    put_on(alone.model, read("kind", at))
    got = attribute(load_tiny(), "mixed", measure)
    assert got.empty == pytest.approx(start, abs=1e-5)
    assert got.alone["kind"] == pytest.approx(measure(alone) - start, abs=1e-4)
    assert abs(got.gap) < 1e-6 and got.evaluations == 8
    assert sum(got.shapley.values()) == pytest.approx(got.whole - start, abs=1e-5)
    lm = load_tiny()
    by_layer = attribute(lm, "short", measure, by="layers")
    assert list(by_layer.shapley) == ["layer 0", "layer 1", "layer 2"]
    assert sum(by_layer.shapley.values()) == pytest.approx(by_layer.whole - start, abs=1e-5)
    assert measure(lm) == pytest.approx(by_layer.whole, abs=1e-6)  # the adapter is left whole
    told("mix", "short", "kind", "--rank", "2", "--out", "cut")
    with pytest.raises(ModelError, match="do not lie apart"):
        attribute(load_tiny(), "cut", measure)


@pytest.mark.parametrize("command", ["show", "mix", "isolate", "swap", "extend"])
def test_every_command_explains_itself(command: str) -> None:
    done = tutelage_cli("modules", command, "--help")
    assert done.code == 0
    assert "Examples" in done.out and f"tutelage modules {command}" in done.out and "--json" in done.out
