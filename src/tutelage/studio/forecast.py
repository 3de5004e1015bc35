"""What a recipe will do, before it does it: counts, an estimate of time and of memory.

Time comes from a few layers of the recipe's model, timed here and now by `probe`; the number of texts
from the recipe; their length from the prompts, and for replies from what runs have shown.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutelage.config import Recipe
from tutelage.errors import ModelError
from tutelage.feedback.comparisons import Compared
from tutelage.studio.probe import Speeds, measure

__all__ = ["forecast", "forecast_lines"]

# Mean length of a reply, as a share of the most it may have: of the start model, and of one that has been taught.
_LENGTH = {"start": 0.9, "taught": 0.75}
_PROGRAM = 1.15e9  # bytes: Python, torch, tokenizer, encoder, the critic's features
_KEPT = 1.4  # bytes taken for a byte that is kept for the backward pass: what lies between is lost
_START = 8.0  # seconds: imports and weights
_ATTENDED = 0.2  # of the layers, where critics read tokens: token_states.DEPTH, which would bring in torch
_SECONDS_A_VERDICT = 0.004  # seconds: embedding a reply and reading it, with the embedded encoder on one core
_SIGNS_A_TOKEN = 4.0  # characters, in English
_SECONDS_A_LABEL = 0.005  # seconds: a labelled question's share of training the critic's heads


def forecast(recipe: Recipe, *, length: float | None = None) -> dict[str, Any]:
    """Counts, seconds and bytes that a run of `recipe` is expected to take.

    Args:
        recipe: What would be run.
        length: Mean length of replies as a share of `sampling.max_new_tokens`; None takes what runs have shown.

    Raises:
        InputError, RecipeError, ModelError: A file or the model is missing or broken.
    """
    from tutelage.applications.truthfulness import demonstrations_of, inputs, labelled, pairs_of

    train, gate, heldout, constitution = inputs(recipe)
    shape = _shape(recipe)
    s, u = recipe.supervised, recipe.update
    prompts = min(u.prompts, len(train))
    looked = len(train) * s.samples if s.enabled and not s.adapter else 0
    rolled = u.rounds * prompts * u.samples
    d, shown = recipe.demonstrations, len(demonstrations_of(recipe))
    rounds, steps = (
        u.rounds,
        (-(-len(train) // s.batch) * s.epochs if s.enabled else 0)
        + -(-shown // d.batch) * d.epochs
        + u.rounds * -(-prompts // u.batch),
    )
    found = pairs_of(recipe, gate, heldout)
    pairs = _Compared.of(found.pairs if found else (), recipe)
    steps += pairs.steps
    c = recipe.controller
    if c.enabled:
        prompts = min(c.prompts, len(train))
        looked = min(c.grid_prompts or len(train), len(train)) * c.choices * c.grid_samples
        rolled = c.rounds * prompts * c.samples + 2 * c.measure_samples * (len(gate) + len(heldout))
        rounds, steps = c.rounds, c.rounds * c.epochs * -(-prompts // c.batch)
    every = [*train, *(item.prompt for item in (*gate, *heldout))]
    speeds = measure(recipe, every[:: max(1, len(every) // 200)])
    labels = len(labelled(recipe)[0])
    work = _Work(recipe, speeds, length)
    seconds = _seconds(work, train=len(train), gate=len(gate), heldout=len(heldout), shown=shown)
    if pairs.count:
        seconds["pairs"] = pairs.seconds(work)
    critic = work.forward(labels * speeds.prompt) + labels * _SECONDS_A_LABEL if labels else 0.0
    memory = _memory(shape, recipe, speeds)
    return {
        "recipe": recipe.name,
        "recipe_hash": recipe.hash,
        "model": recipe.model.name,
        "training_prompts": len(train),
        "gate_items": len(gate),
        "heldout_items": len(heldout),
        "pairs": pairs.count,
        "principles": len(constitution.principles),
        "judges": list(recipe.feedback.judges),
        "replies_judged": looked + rolled,
        "rounds": rounds,
        "optimiser_steps": steps,
        "estimated_seconds": round(sum(seconds.values())),
        "estimated_seconds_by_unit": {k: round(v, 1) for k, v in seconds.items()},
        "estimated_seconds_first_time": round(critic),  # besides: a trained critic is kept
        "estimated_memory_bytes": int(memory),
        "warnings": _warnings(recipe, memory),
        "keys": recipe.model_dump(mode="json"),
    }


def _seconds(work: _Work, *, train: int, gate: int, heldout: int, shown: int) -> dict[str, float]:
    """Seconds by the units of a run."""
    if work.recipe.controller.enabled:
        return _seconds_of_a_controller(work, train=train, measured=gate + heldout)
    recipe, own = work.recipe, work.speeds.prompt
    s, u = recipe.supervised, recipe.update
    fresh, taught = work.lengths["start"], work.lengths["taught"]
    prompts = min(u.prompts, train)
    start = _START + work.generate(gate, 1, fresh)
    supervised = 0.0
    if s.enabled and not s.adapter:
        supervised = work.generate(train, s.samples, fresh) + work.generate(train // 2, 1, taught)
        supervised += work.forward(train * own) + train * (s.samples + 0.5) * _SECONDS_A_VERDICT
        supervised += s.epochs * work.learn(train, s.batch, own + taught, anchored=s.anchor > 0)
    d = recipe.demonstrations
    demonstrated = d.epochs * work.learn(shown, d.batch, own + taught) if shown else 0.0
    demonstrated += work.forward(2 * shown * (own + taught)) if shown else 0.0
    rolled = prompts * u.samples
    one = work.generate(prompts, u.samples, taught) + rolled * _SECONDS_A_VERDICT
    one += work.forward(2 * prompts * own + rolled * taught) + work.learn(prompts, u.batch, own + u.samples * taught)
    one += work.explain(prompts, rolled, taught)
    final = work.generate(gate + heldout, 1, taught) + work.generate(heldout, 1, fresh)
    found = {"start": start, "supervised": supervised, "demonstrations": demonstrated}
    found |= {"rounds": u.rounds * one, "final": final}
    return {unit: value for unit, value in found.items() if value}


def _seconds_of_a_controller(work: _Work, *, train: int, measured: int) -> dict[str, float]:
    """The same where the model stays frozen; the steps of the network itself take no time worth counting."""
    c, length = work.recipe.controller, work.lengths["start"]

    def judged(prompts: int, samples: int) -> float:
        return work.generate(prompts, samples, length) + prompts * samples * _SECONDS_A_VERDICT

    looked = min(c.grid_prompts or train, train)
    read = work.forward((train + measured) * work.speeds.prompt)
    return {
        "grid": _START + judged(looked, c.choices * c.grid_samples) + read,
        "rounds": c.rounds * judged(min(c.prompts, train), c.samples),
        "final": 2 * judged(measured, c.measure_samples),
    }


@dataclasses.dataclass(frozen=True)
class _Compared:
    """A file's pairs: how many, tokens of one with its prompt, and optimiser steps on them."""

    count: int
    tokens: float
    steps: int

    @classmethod
    def of(cls, pairs: Sequence[Compared], recipe: Recipe) -> _Compared:
        if not pairs:
            return cls(0, 0.0, 0)
        how = recipe.pairs
        signs = sum(sum(len(m.content) for m in p.prompt.messages) + len(p.first) + len(p.second) for p in pairs)
        steps = how.epochs * max(1, -(-round(len(pairs) * (1 - how.heldout)) // how.batch))
        return cls(len(pairs), signs / len(pairs) / _SIGNS_A_TOKEN, steps)

    def seconds(self, work: _Work) -> float:
        """Reference and steps of every pass, and held-out pairs under both models, before and after."""
        how = work.recipe.pairs
        trained = round(self.count * (1 - how.heldout))
        measured = work.forward(4 * (self.count - trained) * self.tokens)
        return measured + how.epochs * (
            work.forward(trained * self.tokens) + work.learn(trained, how.batch, self.tokens)
        )


class _Work:
    """Seconds of a run's kinds of work on the whole model."""

    def __init__(self, recipe: Recipe, speeds: Speeds, length: float | None = None) -> None:
        self.recipe, self.speeds = recipe, speeds
        shares = _LENGTH if length is None else dict.fromkeys(_LENGTH, length)
        self.lengths = {kind: share * recipe.sampling.max_new_tokens for kind, share in shares.items()}
        self.learned = speeds.layers - round(recipe.lora.from_depth * speeds.layers)

    def generate(self, prompts: int, samples: int, length: float) -> float:
        """Replies of a mean `length` to each of `prompts`, in a batch that is refilled until none is left."""
        if not prompts * samples:
            return 0.0
        s = self.speeds
        rows = min(self.recipe.sampling.rows, prompts * samples)
        full = max(0.0, prompts * samples / rows - 0.5) * length
        # At the end the batch empties, while the longest replies go on.
        return s.begin(s.layers, prompts) + full * s.decode(s.layers, rows) + length * s.decode(s.layers, rows / 2)

    def forward(self, tokens: float) -> float:
        """A pass without gradients over that many tokens, in packs."""
        packs = max(1.0, tokens / self.recipe.update.token_budget)
        return packs * self.speeds.forward(self.speeds.layers, tokens / packs)

    def explain(self, prompts: int, replies: int, length: float) -> float:
        """What a critic's head takes to explain its reward of each reply.

        By prefixes a reply of T tokens is a pass over 2T; a prompt stands once for its replies. By gradients each reply
        goes with its prompt alone, forward and back (twice forward's work) at every point, and forward three times
        more: both ends of the path, and the reward itself. Decomposed rewards read the replies twice, to their depth;
        a critic with attention of its own reads them once.
        """
        how = self.recipe.credit
        if not (how.signed or how.explains) or not replies:
            return 0.0
        if how.method == "decomposed":
            return (
                2
                * max(how.depth, 1.0 / self.speeds.layers)
                * self.forward(prompts * self.speeds.prompt + replies * length)
            )
        if how.reads == "tokens":
            return _ATTENDED * self.forward(prompts * self.speeds.prompt + replies * length)
        if how.method == "prefix":
            return self.forward(prompts * self.speeds.prompt + 2 * replies * length)
        points = how.steps if how.method == "integrated-gradients" else 1
        alone = self.speeds.lead + self.speeds.prompt + length
        return self.forward((3 * points + 3) * replies * alone)

    def learn(self, prompts: int, batch: int, tokens: float, *, anchored: bool = False) -> float:
        """Optimiser steps on all prompts, each with `tokens` of its own."""
        s = self.speeds
        steps = -(-prompts // batch)
        size = s.lead + tokens * prompts / steps
        packs = max(1.0, size / self.recipe.update.token_budget)
        one = packs * (s.learn(self.learned, size / packs) + s.forward.of_layers(s.layers - self.learned, size / packs))
        return steps * (one + (self.forward(size) if anchored else 0.0))


def _warnings(recipe: Recipe, memory: float) -> list[str]:
    found = []
    if memory > recipe.limits.memory_gb * 1e9:
        found.append(f"memory may reach {memory / 1e9:.1f} GB, above limits.memory_gb = {recipe.limits.memory_gb}")
    if not recipe.gate.enabled:
        found.append("the gate is off: nothing will be promoted")
    taught = recipe.supervised.enabled or recipe.demonstrations.file or recipe.controller.enabled
    if not taught and recipe.update.rounds:
        found.append("without a supervised stage, replies that are never sampled cannot be learned")
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
            # Numbers a token: keys and values; and what the backward pass needs (two inputs of a norm, query,
            # key, value, their mixture, and both inner tables).
            "memory": layers * 2 * shared * hidden,
            "kept": layers * ((4 + 2 * shared) * hidden + 2 * inner),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"config.json of {recipe.model.name} cannot be read ({error})",
            expected="the config of a causal language model",
            fix="check the model directory",
        ) from error


def _memory(shape: dict[str, float], recipe: Recipe, speeds: Speeds) -> float:
    """Bytes at the peak: program, weights and their merged copies, and the larger of sampling's and learning's own."""
    from tutelage.engines.load import choose_device, choose_dtype

    width = 4 if "32" in str(choose_dtype(recipe.model.dtype, choose_device(recipe.model.device))) else 2
    learned = 1.0 - recipe.lora.from_depth
    weights = width * (shape["parameters"] + shape["body"] * learned)
    if recipe.lora.full:  # a change, its gradient and two moments in float32
        weights += 16 * shape["body"] * learned
    reach = speeds.lead + speeds.prompt + recipe.sampling.max_new_tokens
    rows = recipe.sampling.rows
    packed = width * shape["parameters"] if width == 2 else 0.0
    sampling = packed + rows * width * (shape["memory"] * reach + 2 * shape["vocab"])
    trained = 0.0 if recipe.controller.enabled else learned
    activations = _KEPT * recipe.update.token_budget * width * trained * shape["kept"]
    return _PROGRAM + weights + max(sampling, activations + 2 * 256 * shape["vocab"] * width)


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
        *([f"  pairs: {found['pairs']} compared in {found['keys']['pairs']['file']}"] if found["pairs"] else []),
        f"  learning: {found['optimiser_steps']} optimiser steps, {found['rounds']} policy-gradient rounds",
        (
            f"  estimated time {minutes:.1f} minutes, memory {found['estimated_memory_bytes'] / 1e9:.1f} GB, "
            "on this machine as it is now"
        ),
        *(
            [f"  and {found['estimated_seconds_first_time'] / 60:.1f} minutes the first time, to train the critic"]
            if found["estimated_seconds_first_time"]
            else []
        ),
    ]
    lines += [f"  warning: {w}" for w in found["warnings"]]
    return [*lines, "the recipe is valid"]
