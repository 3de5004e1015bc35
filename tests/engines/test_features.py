"""Frozen features: the trunk's hidden states, as one plain forward pass gives them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tutelage.engines.features import Probe, read_trunk, reply_states
from tutelage.engines.packing import Group
from tutelage.records import Message, Prompt

QUESTIONS = ("What is it?", "Who is the king of France?", "Where does it go when it rains?", "Why?")
PROBES = (Probe(0.4, "mean"), Probe(0.7, "last"), Probe(1.0, "last"))  # layers 1, 2 and (capped) 2 of 3


def encoded(lm: Any) -> list[tuple[int, ...]]:
    return [lm.encode(Prompt(f"p{n}", (Message("user", q),))) for n, q in enumerate(QUESTIONS)]


@torch.no_grad()
def plain_states(model: Any, tokens: tuple[int, ...]) -> list[torch.Tensor]:
    """Output of each layer, one prompt alone, through hooks on transformers' own model."""
    caught: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        caught.append((output[0] if isinstance(output, tuple) else output)[0].clone())

    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    handles = [layer.register_forward_hook(keep) for layer in layers]
    model(input_ids=torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return caught


def test_probes_are_the_hidden_states_of_a_plain_pass(
    architecture: str, tiny_lms: dict[str, Any], plain_models: dict[str, Any]
) -> None:
    lm = tiny_lms[architecture]
    prompts = encoded(lm)
    found = read_trunk(lm, prompts, PROBES).probes
    assert [tuple(x.shape) for x in found] == [(4, 48)] * 3
    for row, tokens in enumerate(prompts):
        states = plain_states(plain_models[architecture], tokens)
        assert torch.allclose(found[1][row], states[2][-1], atol=1e-3)
        assert torch.allclose(found[2][row], states[2][-1], atol=1e-3)
        assert torch.allclose(found[0][row], states[1][lm.lead :].mean(0), atol=1e-3)


def test_states_of_replies_are_those_of_a_plain_pass(
    architecture: str, tiny_lms: dict[str, Any], plain_models: dict[str, Any]
) -> None:
    lm = tiny_lms[architecture]
    first, second = encoded(lm)[:2]
    groups = [Group(first, ((5, 6, 7), (8, 9)), (0, 2)), Group(second, ((7,),), (1,))]
    rows = {0: (first, (5, 6, 7)), 1: (second, (7,)), 2: (first, (8, 9))}
    for depth, layer in ((0.0, 0), (1.0, 2)):
        found = dict(reply_states(lm, groups, depth=depth, budget=512))
        assert set(found) == set(rows)
        for row, (prompt, reply) in rows.items():
            plain = plain_states(plain_models[architecture], (*prompt, *reply))[layer]
            assert torch.allclose(found[row], plain[len(prompt) :], atol=1e-3)


def test_the_batch_does_not_change_what_is_read(tiny_lm: Any) -> None:
    prompts = encoded(tiny_lm)
    whole = read_trunk(tiny_lm, prompts, PROBES[1:]).probes
    small = read_trunk(tiny_lm, prompts, PROBES[1:], budget=32).probes
    alone = [torch.cat(x) for x in zip(*(read_trunk(tiny_lm, [p], PROBES[1:]).probes for p in prompts), strict=True)]
    for one, two, three in zip(whole, small, alone, strict=True):
        assert torch.allclose(one, two, atol=1e-4)
        assert torch.allclose(one, three, atol=1e-4)


def test_watched_layers_show_their_inputs_at_the_last_token(tiny_lm: Any, plain_models: dict[str, Any]) -> None:
    prompts = encoded(tiny_lm)
    watch = {
        p: m
        for p, m in tiny_lm.model.named_modules()
        if p.endswith(("1.mlp.up_proj", "1.mlp.gate_proj", "1.mlp.down_proj"))
    }
    assert len(watch) == 3
    found = read_trunk(tiny_lm, prompts, PROBES, watch=watch)
    assert set(found.inputs) == set(watch)
    by_name = {p.rsplit(".", 1)[-1]: x for p, x in found.inputs.items()}
    assert by_name["up_proj"] is by_name["gate_proj"]  # fed by the same tensor
    assert by_name["down_proj"].shape == (4, 96)
    model, caught = plain_models["llama"], {}
    (name,) = [p for p in watch if p.endswith("up_proj")]
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: caught.update(x=args[0][0].clone()))
    with torch.no_grad():
        for row, tokens in enumerate(prompts):
            model(input_ids=torch.tensor([tokens]))
            assert torch.allclose(by_name["up_proj"][row], caught["x"][-1], atol=1e-3)
    handle.remove()


def test_the_pass_stops_at_the_deepest_probe_and_leaves_no_hook(tiny_lm: Any) -> None:
    layers = next(m for m in tiny_lm.body.modules() if isinstance(m, torch.nn.ModuleList))
    reached: list[int] = []
    handle = layers[2].register_forward_hook(lambda *_: reached.append(2))
    read_trunk(tiny_lm, encoded(tiny_lm), (Probe(0.3, "last"),))
    assert reached == []
    read_trunk(tiny_lm, encoded(tiny_lm), (Probe(0.3, "last"),), watch={"l": layers[2]})
    assert reached
    handle.remove()
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in layers)


def test_hooks_go_when_reading_fails(tiny_lm: Any) -> None:
    layers = next(m for m in tiny_lm.body.modules() if isinstance(m, torch.nn.ModuleList))
    with pytest.raises((IndexError, RuntimeError)):
        read_trunk(tiny_lm, [(5, 10_000_000)], PROBES)
    assert all(not layer._forward_hooks for layer in layers)
