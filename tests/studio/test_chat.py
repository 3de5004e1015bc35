"""Chat: before and after, side by side, from a run written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tutelage.config import Recipe
from tutelage.errors import StoreError
from tutelage.policy.lora import attach
from tutelage.store.runs import Run
from tutelage.studio.chat import talk


@pytest.fixture
def runs(tmp_path: Path, tiny_dirs: dict[str, Path], load_tiny: Callable[[str], Any]) -> Iterator[Path]:
    """A run that broke off after its supervised stage, with an adapter that changes what is said."""
    model = {"name": str(tiny_dirs["llama"]), "device": "cpu", "dtype": "float32"}
    made = Run.create(tmp_path / "runs", Recipe.model_validate({"model": model}), "one")
    lora, lm = made.recipe.lora, load_tiny("llama")
    first = round(lora.from_depth * lm.layers)
    adapter = attach(lm.model, rank=lora.rank, alpha=lora.alpha, seed=0, first_layer=first)
    for layer in adapter.layers.values():
        layer.lora_b.data.fill_(0.3)
    made.save_checkpoint("r0", adapter.save)
    with made.ledger.unit("supervised", "supervised") as unit:
        unit.version = "r0"
    made.close()
    return tmp_path / "runs"


def asked(runs: Path, capsys: pytest.CaptureFixture[str], text: str, **more: Any) -> dict[str, str]:
    talk("one", runs=runs, question=text, max_new_tokens=8, as_json=True, **more)
    found: dict[str, str] = json.loads(capsys.readouterr().out)
    return found


def test_both_models_answer(runs: Path, capsys: pytest.CaptureFixture[str], tiny_dirs: dict[str, Path]) -> None:
    from tutelage import api
    from tutelage.engines.local import LocalCompleter
    from tutelage.records import Message, Prompt, SamplerSettings

    found = asked(runs, capsys, "Wer ist das?")
    assert found["prompt"] == "Wer ist das?" and found["before"] != found["after"]
    engine = LocalCompleter(api.load_for_use(str(tiny_dirs["llama"]), dtype="float32"))
    prompt = Prompt("x", (Message("user", "Wer ist das?"),))
    plain = engine.generate([prompt], samples=1, settings=SamplerSettings(0.0, max_new_tokens=8), seed=9, version="v")
    assert found["before"] == plain[0][0].text
    assert asked(runs, capsys, "Wer ist das?") == found  # greedy: the same again


def test_a_talk_ends_at_an_empty_line_or_the_end_of_input(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for last in ("  ", EOFError()):
        lines = iter(["Who?", "Where?", last])

        def read(_: str, lines: Iterator[Any] = lines) -> str:
            line = next(lines)
            if isinstance(line, EOFError):
                raise line
            return str(line)

        monkeypatch.setattr("builtins.input", read)
        talk(None, runs=runs, question=None, max_new_tokens=4, as_json=False)
        shown = capsys.readouterr().out
        assert shown.count("before:") == shown.count("after:") == 2


def test_a_damaged_checkpoint_is_not_talked_to(runs: Path) -> None:
    path = runs / "one" / "checkpoints" / "r0" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(StoreError, match="manifest"):
        talk("one", runs=runs, question="Who?", max_new_tokens=4, as_json=False)


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        talk("nowhere", runs=tmp_path, question="Who?", max_new_tokens=4, as_json=False)
