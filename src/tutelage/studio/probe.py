"""How fast this machine is with a given model, measured on a few of its layers with random weights.

Every kind of work is timed with one and with three layers, and with a small and a large batch, by the
code that a run uses. Time is close to linear in both, so that four corners tell what the whole model
takes with any batch: no table of machines, and no guess at efficiencies.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tutelage.config import Recipe

if TYPE_CHECKING:
    from tutelage.engines.load import LanguageModel
    from tutelage.policy.merged import MergedLayers
    from tutelage.records import Prompt

__all__ = ["Plane", "Speeds", "measure"]

_LAYERS = (1, 3)
_ROWS = (8, 64)  # rows that decode together
_TOKENS = (192, 1024)  # tokens of a pack
_SIZES = {"decode": _ROWS, "begin": _ROWS, "forward": _TOKENS, "learn": _TOKENS}
_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Plane:
    """Seconds of one kind of work: start + slope * size + layers * (layer_start + layer_slope * size)."""

    start: float
    slope: float
    layer_start: float
    layer_slope: float

    @classmethod
    def through(cls, corners: Sequence[Sequence[float]], layers: Sequence[int], sizes: Sequence[float]) -> Plane:
        """Through `corners[i][j]` seconds with `layers[i]` layers and a batch of `sizes[j]`; no term below zero."""

        def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
            slope = max(0.0, (y[1] - y[0]) / (x[1] - x[0]))
            return max(0.0, y[0] - slope * x[0]), slope

        fixed, per_size = zip(*(line(sizes, row) for row in corners), strict=True)
        start, layer_start = line(layers, fixed)
        slope, layer_slope = line(layers, per_size)
        return cls(start, slope, layer_start, layer_slope)

    def of_layers(self, layers: float, size: float) -> float:
        """What the layers alone take."""
        return layers * (self.layer_start + self.layer_slope * size)

    def __call__(self, layers: float, size: float) -> float:
        """Seconds of one batch of `size` through `layers` layers and the head."""
        return self.start + self.slope * size + self.of_layers(layers, size)


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What was measured, and the texts' lengths.

    Args:
        decode: One decoding step, by rows.
        begin: What a call of the sampler takes before its first step, by prompts.
        forward: Log-probabilities of a pack without gradients, by tokens.
        learn: An optimiser step on one pack with every layer adapted, by tokens.
        lead: Tokens that all prompts begin with.
        prompt: Mean number of a prompt's further tokens.
        layers: Layers of the model.
    """

    decode: Plane
    begin: Plane
    forward: Plane
    learn: Plane
    lead: int
    prompt: float
    layers: int


def measure(recipe: Recipe, prompts: Sequence[Prompt]) -> Speeds:
    """Time the recipe's model on this machine; takes a few seconds.

    Raises:
        ModelError: The model's config or tokenizer cannot be read.
    """
    from tutelage.engines.load import hollow_model
    from tutelage.policy.full import attach_full
    from tutelage.policy.lora import attach

    planes: dict[str, list[list[float]]] = {"decode": [], "begin": [], "forward": [], "learn": []}

    def hollow(layers: int) -> tuple[LanguageModel, int]:
        m = recipe.model
        return hollow_model(m.name, layers=layers, device=m.device, dtype=m.dtype, hub=m.hub)

    models = [hollow(layers) for layers in _LAYERS]
    for lm, _ in models:
        sampled = [_sampling(lm, prompts, rows) for rows in _ROWS]
        planes["begin"].append([begin for begin, _ in sampled])
        planes["decode"].append([step for _, step in sampled])
        planes["forward"].append([_forward(lm, tokens) for tokens in _TOKENS])
        change = attach_full(lm.model) if recipe.lora.full else attach(lm.model, rank=recipe.lora.rank, alpha=1, seed=0)
        planes["learn"].append([_learn(lm, change, tokens) for tokens in _TOKENS])
    lm, whole = models[0]
    lengths = [len(lm.encode(p)) - lm.lead for p in prompts]
    return Speeds(
        **{name: Plane.through(corners, _LAYERS, _SIZES[name]) for name, corners in planes.items()},
        lead=lm.lead,
        prompt=sum(lengths) / max(len(lengths), 1),
        layers=whole,
    )


def _best(work: Callable[[], object]) -> float:
    """The least of some repetitions: what disturbs a measurement only makes it longer."""
    work()
    taken = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _sampling(lm: LanguageModel, prompts: Sequence[Prompt], rows: int) -> tuple[float, float]:
    """Seconds before the first step, and of one step, with `rows` rows of as many prompts."""
    from tutelage.engines.local import LocalCompleter
    from tutelage.records import SamplerSettings

    asked = [dataclasses.replace(prompts[i % len(prompts)], id=str(i)) for i in range(rows)]
    completer = LocalCompleter(lm, rows=rows)

    def draw(tokens: int) -> float:
        how = SamplerSettings(1.0, max_new_tokens=tokens)
        return _best(lambda: completer.generate(asked, samples=1, settings=how, seed=0, version="probe"))

    few, many = draw(2), draw(12)
    step = max(0.0, (many - few) / 10)
    return max(0.0, few - 2 * step), step


def _texts(lm: LanguageModel, tokens: int) -> list[tuple[int, ...]]:
    """Texts of 32 random tokens, as many as make up a pack of `tokens`."""
    dice = random.Random(0)  # noqa: S311
    return [tuple(dice.randrange(lm.head_VD.shape[0]) for _ in range(32)) for _ in range(tokens // 32)]


def _forward(lm: LanguageModel, tokens: int) -> float:
    """Seconds of a pass without gradients: half of each text is a prompt, half is scored."""
    from tutelage.engines.packing import Group
    from tutelage.policy.learner import score

    groups = [Group(t[:16], (t[16:],), (row,)) for row, t in enumerate(_texts(lm, tokens))]
    return _best(lambda: score(lm, groups, budget=2 * tokens))


def _learn(lm: LanguageModel, adapter: MergedLayers, tokens: int) -> float:
    """Seconds of an optimiser step on the same texts."""
    from tutelage.objectives.supervised import Supervised
    from tutelage.policy.learner import Learner, TrainGroup

    same = ((1.0,) * 16,)
    groups = [TrainGroup(t[:16], (t[16:],), same, same, same) for t in _texts(lm, tokens)]
    learner = Learner(lm, adapter, learning_rate=0.0, budget=2 * tokens)
    return _best(lambda: learner.step(groups, Supervised()))
