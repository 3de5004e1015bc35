"""Rollouts through a real server on loopback: what is drawn, by which adapter, and what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.vllm_like import Server, serve

from tutelage.engines.packing import Group
from tutelage.engines.vllm import KEY_VARIABLE, VllmCompleter
from tutelage.errors import InputError, ModelError
from tutelage.policy.learner import score
from tutelage.policy.lora import attach
from tutelage.records import Generation, Message, Prompt, SamplerSettings

pytest_plugins = ["tests.tiny_world"]

SETTINGS = SamplerSettings(max_new_tokens=6)
PROMPTS = [Prompt(f"p{n}", (Message("user", text),)) for n, text in enumerate(["What is it?", "Who?", "Why so?"])]


@pytest.fixture
def server(tiny_dirs: dict[str, Path]) -> Iterator[Server]:
    with serve(tiny_dirs["llama"]) as running:
        yield running


def rescored(lm: Any, drawn: list[list[Generation]]) -> torch.Tensor:
    groups, row = [], 0
    for prompt, replies in zip(PROMPTS, drawn, strict=True):
        rows = tuple(range(row, row + len(replies)))
        groups.append(Group(lm.encode(prompt), tuple(r.tokens for r in replies), rows))
        row += len(replies)
    return score(lm, groups, budget=512).logp_BT


def assert_drawn_by(lm: Any, drawn: list[list[Generation]]) -> None:
    known = rescored(lm, drawn)
    for row, reply in enumerate(r for replies in drawn for r in replies):
        assert reply.logps == pytest.approx(known[row, : len(reply.tokens)].tolist(), abs=1e-4)


def test_replies_are_records_like_any_other(server: Server, tiny_lm: Any) -> None:
    completer = VllmCompleter(tiny_lm, server.url, parallel=4)
    done: list[int] = []
    drawn = completer.generate(PROMPTS, samples=3, settings=SETTINGS, seed=1, version="start", progress=done.append)
    assert sum(done) == 9
    assert [[(r.prompt_id, r.sample) for r in replies] for replies in drawn] == [
        [(p.id, g) for g in range(3)] for p in PROMPTS
    ]
    assert_drawn_by(tiny_lm, drawn)
    for reply in (r for replies in drawn for r in replies):
        assert reply.finished == (reply.tokens[-1] in tiny_lm.stop_tokens)
        assert reply.text == tiny_lm.decode(list(reply.tokens))
        assert (reply.policy_version, reply.seed, reply.settings) == ("start", 1, SETTINGS)
    flat = [r for replies in drawn for r in replies]
    assert len({r.id for r in flat}) == 9
    assert len({r.tokens for r in flat}) > 5, "samples of one prompt are drawn apart"
    assert {a["model"] for a in server.asked} == {"base"}


def test_each_version_is_drawn_by_its_own_adapter(
    server: Server, load_tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    lm = load_tiny("llama")
    adapter = attach(lm.model, rank=2, alpha=4.0, seed=0, first_layer=1)
    folders: dict[str, Path] = {}
    for number, version in enumerate(("r1", "r2")):
        state = {k: torch.randn(v.shape, generator=torch.Generator().manual_seed(number)) * 0.2
                 for k, v in adapter.state().items()}  # fmt: skip
        adapter.load_state(state, where="")
        adapter.save(tmp_path / version)
        folders[version] = tmp_path / version
    completer = VllmCompleter(lm, server.url, adapter=folders.get)

    def draw(version: str) -> list[list[Generation]]:
        return completer.generate(PROMPTS, samples=2, settings=SETTINGS, seed=0, version=version)

    assert_drawn_by(lm, draw("r2"))
    draw("r2")
    assert len(server.adapters) == 1, "what is loaded is not loaded again"
    drawn = draw("r1")
    adapter.load(folders["r1"])
    assert_drawn_by(lm, drawn)
    assert len(server.adapters) == 2
    assert len(server.unloaded) == 1
    with adapter.off():
        assert_drawn_by(lm, draw("start"))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, tiny_lm: Any, status: int) -> None:
    completer = VllmCompleter(tiny_lm, server.url, parallel=1)
    server.faults = [(status, "busy")] * 2
    drawn = completer.generate(PROMPTS[:1], samples=1, settings=SETTINGS, seed=0, version="start")
    assert drawn[0][0].tokens
    assert server.faults == []


def test_what_cannot_be_drawn_is_said_and_no_reply_is_made_up(
    server: Server, tiny_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "s3cret")

    def refused(completer: VllmCompleter, version: str = "start") -> str:
        with pytest.raises(ModelError) as caught:
            completer.generate(PROMPTS, samples=2, settings=SETTINGS, seed=0, version=version)
        assert "s3cret" not in str(caught.value)
        return str(caught.value)

    completer = VllmCompleter(tiny_lm, server.url)
    assert server.keys == {"Bearer s3cret"}
    server.faults = [(404, "LoRA is off")] * 20
    said = refused(completer)
    assert "LoRA is off" in said and "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in said and server.url in said
    server.faults = []
    server.answer_without_ids = True
    assert "return_token_ids" in refused(completer)
    long = Prompt("long", (Message("user", "word " * 400),))
    with pytest.raises(InputError, match="long"):
        completer.generate([long], samples=1, settings=SETTINGS, seed=0, version="start")
    with pytest.raises(ModelError, match="no server answers"):
        VllmCompleter(tiny_lm, "http://127.0.0.1:9", retries=0)
    server.models = {}
    with pytest.raises(ModelError, match="serves no model"):
        VllmCompleter(tiny_lm, server.url)


def test_a_run_learns_from_what_a_server_drew(server: Server, world: Any) -> None:
    done = world.play("--set", "update.rounds=2", "--set", f"sampling.server={server.url}", name="served")
    assert done.code == 3, done.err
    assert world.play("--set", "update.rounds=2", name="here").code == 3
    assert world.weights("served")["r0"] == world.weights("here")["r0"]
    assert world.weights("served")["r2"] != world.weights("here")["r2"]
    apart = [m["values"] for m in world.rows("metrics", "served", stage="importance")]
    assert len(apart) == 2
    assert all(abs(m["mismatch_kl"]) < 1e-3 and m["effective_sample_size"] > 0.999 for m in apart)
    assert len(server.adapters) == 2, "each round is drawn by the adapter that it starts from"


def test_a_server_that_is_gone_stops_the_run_and_loses_nothing(server: Server, world: Any) -> None:
    words = ("--set", "update.rounds=1", "--set", f"sampling.server={server.url}")
    server.faults = [(400, "out of order")] * 50
    done = world.play(*words)
    assert done.code == 2
    assert "out of order" in done.err
    server.faults = []
    assert world.resume().code == 3
    assert "r1" in world.weights()


@pytest.mark.parametrize("words", [("sampling.int8=true",), ("sampling.temperature=0.7",)])
def test_what_does_not_go_with_a_server_is_refused(world: Any, words: tuple[str, ...]) -> None:
    done = world.play("--set", "sampling.server=http://127.0.0.1:9", *[w for s in words for w in ("--set", s)])
    assert done.code == 2
    assert "sampling.server" in done.err
