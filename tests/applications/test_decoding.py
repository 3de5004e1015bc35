"""Decoding with several models from the command line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_world import tutelage_cli

from tutelage.policy.lora import attach

pytest_plugins = ["tests.tiny_world"]

SUITE = [
    {"prompt": "What is the capital of France?", "references": ["Paris"], "kind": "answerable"},
    {"prompt": "What did I have for lunch?", "references": [], "kind": "unanswerable"},
]


@pytest.fixture(scope="module")
def loud(tiny_lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes what the model says."""
    adapter = attach(copy.deepcopy(tiny_lm.model), rank=2, alpha=8.0, seed=1, model_name="tiny")
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_b.copy_(0.1 * torch.randn(layer.lora_b.shape, generator=random))
    folder = tmp_path_factory.mktemp("adapters") / "loud"
    adapter.save(folder)
    return folder


def decode(*words: str | Path) -> Any:
    return tutelage_cli("modules", "decode", *words)


def reply(base: Path, *words: str | Path) -> str:
    done = decode(base, *words, "--prompt", "Who?", "--max-new-tokens", "8", "--json")
    assert done.code == 0, done.err
    said: str = json.loads(done.out)["reply"]
    return said


def test_weights_move_the_reply_from_one_model_to_the_other(tiny_dirs: dict[str, Path], loud: Path) -> None:
    base = tiny_dirs["llama"]
    alone = reply(base, "--with", base, "--weight", "1")
    adapted = reply(base, "--with", loud, "--weight", "1")
    assert alone != adapted
    assert reply(base, "--with", loud, "--with", base, "--weight", "0.0001", "--weight", "0.9") == alone
    pushed = reply(base, "--anti-expert", loud, "--alpha", "0")
    assert pushed == alone, "without strength an anti-expert says nothing"
    assert reply(base, "--anti-expert", loud, "--alpha", "4", "--top-p", "1") != alone


def test_prompts_become_lines_of_a_file(tiny_dirs: dict[str, Path], loud: Path, tmp_path: Path) -> None:
    asked, out = tmp_path / "asked.jsonl", tmp_path / "said.jsonl"
    asked.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("Who?", "a b c", "What is it?")))
    done = decode(
        tiny_dirs["llama"], "--with", loud, "--weight", "0.5", "--prompts", asked, "--limit", "2", "--out", out,
        "--temperature", "1", "--max-new-tokens", "5",
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Who?", "a b c"]
    assert all(row["logp"] < 0 and 1 <= row["tokens"] <= 5 for row in rows)


def test_a_suite_is_measured_against_the_base_alone(tiny_dirs: dict[str, Path], loud: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite.jsonl"
    suite.write_text("".join(json.dumps(row) + "\n" for row in SUITE))
    done = decode(tiny_dirs["llama"], "--with", loud, "--weight", "0.5", "--suite", suite, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["n"] == 2
    assert "loud" in found["model"]
    assert {row["metric"] for row in found["against"]} >= {"correct_answerable", "made_up_unanswerable"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", "Who?"), "a base alone"),
        (("--with", "x", "--weight", "1", "--anti-expert", "x", "--prompt", "Who?"), "companions and an anti-expert"),
        (("--with", "x", "--prompt", "Who?"), "1 companions and 0 weights"),
        (("--with", "x", "--weight", "1.5", "--prompt", "Who?"), "together at most 1"),
        (("--anti-expert", "x", "--alpha", "-1", "--prompt", "Who?"), "alpha"),
        (("--anti-expert", "x", "--top-p", "0", "--prompt", "Who?"), "top-p"),
        (("--with", "x", "--weight", "1"), "nothing to answer"),
        (("--with", "x", "--weight", "1", "--prompts", "q.jsonl"), "nothing to answer"),
        (("--with", "no-such-model", "--weight", "1", "--prompt", "Who?"), "no-such-model"),
    ],
)
def test_what_makes_no_sense_is_told_and_leaves_with_code_2(
    tiny_dirs: dict[str, Path], words: tuple[str, ...], message: str
) -> None:
    done = decode(tiny_dirs["llama"], *words)
    assert (done.code, "Traceback" in done.err) == (2, False)
    assert message in " ".join(done.err.split())
