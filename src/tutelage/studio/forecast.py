"""What a recipe will do, before it does it: counts, an estimate of time and of memory.

Time comes from operations to be done and from how fast this machine multiplies matrices now
(measured in half a second), with efficiencies seen in runs.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tutelage.config import Recipe
from tutelage.errors import ModelError

__all__ = ["forecast", "forecast_lines"]

# Shares of the measured matrix speed that each kind of work reaches (seen in runs of the honesty recipe).
_EFFICIENCY = {"decode": 0.25, "forward": 0.46, "train": 0.27}
_TOKENS = {"prompt": 18, "reply": 17, "taught_reply": 12}  # typical of the built-in questions
_SYSTEM_TOKENS = 30


def forecast(recipe: Recipe) -> dict[str, Any]:
    """Counts, seconds and bytes that a run of `recipe` is expected to take.

    Raises:
        InputError, RecipeError, ModelError: A file or the model is missing or broken.
    """
    from tutelage.applications.truthfulness import inputs, labelled

    train, gate, heldout, constitution = inputs(recipe)
    shape = _shape(recipe)
    s, u = recipe.supervised, recipe.update
    prompts = min(u.prompts, len(train))
    looked = len(train) * s.samples if s.enabled else 0
    rolled = u.rounds * prompts * u.samples
    reply = min(_TOKENS["reply"], recipe.sampling.max_new_tokens)
    taught = min(_TOKENS["taught_reply"], recipe.sampling.max_new_tokens)
    ask = _TOKENS["prompt"]
    measured = 2 * (len(gate) + len(heldout))
    decode = looked * reply + rolled * taught + measured * (reply + taught) / 2
    forward = (
        len(labelled(recipe)[0]) * ask + (2 * len(train) + measured) * ask + u.rounds * prompts * ask + rolled * taught
    )
    train_tokens = (len(train) * s.epochs * (ask + taught) if s.enabled else 0) + u.rounds * prompts * ask
    train_tokens += rolled * taught
    speed = _speed()
    work = 2.0 * shape["parameters"]
    backward = 1.0 + (1.0 - recipe.lora.from_depth)  # forward, and backward through the adapted layers
    seconds = {
        "decode": decode * work / (speed["narrow"] * _EFFICIENCY["decode"]),
        "forward": forward * work / (speed["wide"] * _EFFICIENCY["forward"]),
        "train": train_tokens * work * backward / (speed["wide"] * _EFFICIENCY["train"]),
        "start": 15.0,
    }
    memory = _memory(shape, recipe)
    return {
        "recipe": recipe.name,
        "recipe_hash": recipe.hash,
        "model": recipe.model.name,
        "training_prompts": len(train),
        "gate_items": len(gate),
        "heldout_items": len(heldout),
        "principles": len(constitution.principles),
        "judges": list(recipe.feedback.judges),
        "replies_judged": looked + rolled,
        "rounds": u.rounds,
        "optimiser_steps": (-(-len(train) // s.batch) * s.epochs if s.enabled else 0)
        + u.rounds * -(-prompts // u.batch),
        "estimated_seconds": round(sum(seconds.values())),
        "estimated_seconds_by_work": {k: round(v) for k, v in seconds.items()},
        "estimated_memory_bytes": int(memory),
        "warnings": _warnings(recipe, memory),
        "keys": recipe.model_dump(mode="json"),
    }


def _warnings(recipe: Recipe, memory: float) -> list[str]:
    found = []
    if memory > recipe.limits.memory_gb * 1e9:
        found.append(f"memory may reach {memory / 1e9:.1f} GB, above limits.memory_gb = {recipe.limits.memory_gb}")
    if not recipe.gate.enabled:
        found.append("the gate is off: nothing will be promoted")
    if not recipe.supervised.enabled:
        found.append("without the supervised stage, replies that are never sampled cannot be learned")
    return found


def _shape(recipe: Recipe) -> dict[str, float]:
    """Parameter counts from the model's config; no weights are loaded."""
    from tutelage.engines.load import describe

    folder = describe(recipe.model.name, hub=recipe.model.hub)
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        hidden = float(config["hidden_size"])
        inner = float(config.get("intermediate_size", 4 * hidden))
        layers = float(config["num_hidden_layers"])
        heads = float(config["num_attention_heads"])
        shared = float(config.get("num_key_value_heads") or heads) / heads
        gates = 3.0 if config.get("hidden_act", "silu") in ("silu", "swish") else 2.0
        body = layers * (hidden * hidden * (2 + 2 * shared) + gates * hidden * inner)
        return {
            "parameters": body + hidden * float(config["vocab_size"]),
            "body": body,
            "vocab": float(config["vocab_size"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"config.json of {recipe.model.name} cannot be read ({error})",
            expected="the config of a causal language model",
            fix="check the model directory",
        ) from error


def _speed() -> dict[str, float]:
    """Operations a second of this machine's matrix product, few rows and many."""
    import torch

    from tutelage.engines.load import choose_device, choose_dtype

    device = choose_device()
    number = choose_dtype("auto", device)
    weight = torch.randn(1536, 576, dtype=number, device=device)
    found = {}
    for name, rows in (("narrow", 64), ("wide", 512)):
        x = torch.randn(rows, 576, dtype=number, device=device)
        for _ in range(3):
            x @ weight.T
        began, turns = time.perf_counter(), 0
        while time.perf_counter() - began < 0.2:
            x @ weight.T
            turns += 1
        found[name] = turns * 2.0 * rows * weight.numel() / (time.perf_counter() - began)
    return found


def _memory(shape: dict[str, float], recipe: Recipe) -> float:
    """Bytes at the peak: program, weights, merged copies, logits and activations of a micro-batch."""
    from tutelage.engines.load import choose_device, choose_dtype

    width = 4 if "32" in str(choose_dtype(recipe.model.dtype, choose_device(recipe.model.device))) else 2
    learned = 1.0 - recipe.lora.from_depth
    merged = shape["body"] * learned
    logits = (2 * 256 + recipe.sampling.rows) * shape["vocab"] * width
    # A learned layer keeps about 42 numbers a token and feature; 30 layers of 576 features have 106 million weights.
    activations = recipe.update.token_budget * 42 * 576 * 30 * width * learned * shape["body"] / 106e6
    return 9e8 + width * (shape["parameters"] + merged) + logits + activations


def forecast_lines(found: dict[str, Any]) -> list[str]:
    """For a terminal."""
    minutes = found["estimated_seconds"] / 60
    lines = [
        f"recipe {found['recipe']} ({found['recipe_hash']}) on {found['model']}",
        (
            f"  prompts: {found['training_prompts']} to learn from, {found['gate_items']} for the gate, "
            f"{found['heldout_items']} held out"
        ),
        (
            f"  judges: {', '.join(found['judges'])}; {found['principles']} principles; "
            f"{found['replies_judged']} replies will be judged"
        ),
        f"  learning: {found['optimiser_steps']} optimiser steps, {found['rounds']} policy-gradient rounds",
        (
            f"  estimated time {minutes:.1f} minutes, memory {found['estimated_memory_bytes'] / 1e9:.1f} GB, "
            "on this machine as it is now"
        ),
    ]
    lines += [f"  warning: {w}" for w in found["warnings"]]
    return [*lines, "the recipe is valid"]
