"""A controller over decoding: the big model stays frozen, a small network chooses how it is drawn from."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from tutelage.engines.attention import AttentionPlan, attention_plan
from tutelage.engines.load import LanguageModel
from tutelage.engines.packing import Group, pack
from tutelage.engines.sampling import Menu, shape_rows
from tutelage.errors import ModelError, RecipeError, TrainingError
from tutelage.policy.moments import moments_of, take_moments
from tutelage.records import Generation

__all__ = [
    "Assigned", "Controller", "ControllerLearner", "Grid", "Setting", "Steered", "Trace", "menu_of", "score_steered",
]  # fmt: skip

_HEADER = "tutelage_controller"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to draw; an empty mask bars nothing, an empty opening demands nothing."""

    temperature: float
    top_k: int = 0
    mask: str = ""
    opening: str = ""

    def __str__(self) -> str:
        parts = [f"temperature {self.temperature:g}"]
        parts += [f"top-k {self.top_k}"] if self.top_k else []
        parts += [f"mask {self.mask}"] if self.mask else []
        parts += [f"opening '{self.opening}'"] if self.opening else []
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Grid:
    """What can be chosen: every temperature with every top-k, every mask or none, and every opening or none.

    Args:
        temperatures: 0 is greedy.
        top_k: 0 is off. A greedy draw has no use for it, so greedy comes once a mask.
        masks: (name, regular expression) of what a token's text must not hold.
        openings: Texts that a reply must begin with. Only where the choice is made once a reply.
    """

    temperatures: tuple[float, ...]
    top_k: tuple[int, ...] = (0,)
    masks: tuple[tuple[str, str], ...] = ()
    openings: tuple[str, ...] = ()

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The A distinct settings, in a fixed order."""
        names = ("", *(name for name, _ in self.masks))
        every = itertools.product(self.temperatures, self.top_k, names, ("", *self.openings))
        return tuple(dict.fromkeys(Setting(t, k if t else 0, m, o) for t, k, m, o in every))

    @property
    def parts_AF(self) -> torch.Tensor:
        """1.0 where a setting has a temperature, top-k, mask, opening: scores of settings are sums over their parts.

        So what is learned of a temperature holds for all top-k values.
        """
        kinds: list[tuple[str, object]] = [("temperature", t) for t in self.temperatures]
        kinds += [("top_k", k) for k in self.top_k] if len(self.top_k) > 1 else []
        kinds += [("mask", m) for m in ("", *(name for name, _ in self.masks))] if self.masks else []
        kinds += [("opening", o) for o in ("", *self.openings)] if self.openings else []
        rows = [[float(getattr(s, kind) == value) for kind, value in kinds] for s in self.settings]
        table = torch.tensor(rows)
        if len(self.top_k) > 1:  # greedy has no top-k of its own, whatever the list holds
            cold = torch.tensor([s.temperature == 0.0 for s in self.settings])
            table[cold, len(self.temperatures) : len(self.temperatures) + len(self.top_k)] = 0.0
        return table


def menu_of(grid: Grid, lm: LanguageModel) -> Menu:
    """The grid's settings as the sampler reads them, masks as sets of the model's tokens.

    A mask bars a token when its pattern is found in the token's own text. Control tokens have no
    text, so that a reply can always end.

    Raises:
        RecipeError: A mask bars no token, or leaves too little to write with.
    """
    size = lm.head_VD.shape[0]
    settings = grid.settings
    barred_MV = torch.zeros(1 + len(grid.masks), size, dtype=torch.bool)
    if grid.masks:
        known = min(size, len(lm.tokenizer))
        texts = lm.tokenizer.batch_decode([[t] for t in range(known)], skip_special_tokens=True)
        words = torch.tensor([bool(text) and t not in lm.stop_tokens for t, text in enumerate(texts)])
        for m, (name, pattern) in enumerate(grid.masks, 1):
            found = re.compile(pattern)
            barred_MV[m, :known] = torch.tensor([bool(found.search(text)) for text in texts]) & words
            count = int(barred_MV[m].sum())
            if not 0 < count < int(words.sum()):
                raise RecipeError(
                    f"the mask '{name}' bars {count} of {int(words.sum())} tokens of {lm.name}",
                    expected="some tokens, but not all",
                    fix="change its regular expression in controller.masks",
                )
    names = ["", *(name for name, _ in grid.masks)]
    begun = {o: tuple(lm.tokenizer(o, add_special_tokens=False)["input_ids"]) for o in ("", *grid.openings)}
    return Menu(
        torch.tensor([s.temperature for s in settings], device=lm.device),
        torch.tensor([s.top_k for s in settings], device=lm.device),
        torch.tensor([names.index(s.mask) for s in settings], device=lm.device),
        barred_MV.to(lm.device),
        tuple(begun[s.opening] for s in settings) if grid.openings else (),
    )


class Controller(nn.Module):
    """P(setting | hidden state): one inner layer, then a score for each temperature, top-k and mask.

    It starts without a preference. States are scaled by `mean_D` and `scale_D`, which `fit` measures.

    Args:
        grid: What can be chosen.
        size: D, numbers in a hidden state.
        width: Inner units.
        per_token: Choose at every token; else once a reply.
        depth: At what share of the layers the states are read; 1 is the last hidden state.
        seed: Of the inner layer's first weights.
    """

    mean_D: torch.Tensor
    scale_D: torch.Tensor
    parts_AF: torch.Tensor

    def __init__(
        self, grid: Grid, size: int, *, width: int = 32, per_token: bool = False, depth: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.grid, self.size, self.width, self.per_token, self.depth = grid, size, width, per_token, depth
        parts_AF = grid.parts_AF
        self.inner = nn.Linear(size, width)
        self.outer = nn.Linear(width, parts_AF.shape[1])
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.inner.weight.copy_(torch.randn(width, size, generator=random) / size**0.5)
            for zero in (self.inner.bias, self.outer.weight, self.outer.bias):
                zero.zero_()
        self.register_buffer("mean_D", torch.zeros(size))
        self.register_buffer("scale_D", torch.ones(size))
        self.register_buffer("parts_AF", parts_AF, persistent=False)

    def fit(self, states_ND: torch.Tensor) -> None:
        """Measure how states are spread, so that each of their numbers counts alike."""
        wide = states_ND.float().to(self.mean_D.device)
        self.mean_D.copy_(wide.mean(0))
        spread_D = wide.std(0, correction=0)
        # A number that hardly varies says nothing, and must not be blown up.
        self.scale_D.copy_(spread_D.clamp_min(1e-3 * float(spread_D.median()) + 1e-6))

    def forward(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the settings, (N, A), natural logarithm."""
        scaled = (states_ND.float() - self.mean_D) / self.scale_D
        scores_NF = self.outer(F.silu(self.inner(scaled)))
        logp_NA: torch.Tensor = (scores_NF @ self.parts_AF.T).log_softmax(-1)
        return logp_NA

    def save(self, path: Path) -> None:
        """Write weights, and in the header what they choose from."""
        kept = {"grid": dataclasses.asdict(self.grid), "size": self.size, "width": self.width}
        header = json.dumps(kept | {"per_token": self.per_token, "depth": self.depth}, sort_keys=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, str(path), metadata={_HEADER: header})

    @classmethod
    def load(cls, path: Path) -> Controller:
        """Read what `save` wrote.

        Raises:
            ModelError: It is not such a file.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                kept = json.loads((file.metadata() or {})[_HEADER])
            grid = Grid(
                tuple(kept["grid"]["temperatures"]),
                tuple(kept["grid"]["top_k"]),
                tuple((name, pattern) for name, pattern in kept["grid"]["masks"]),
                tuple(kept["grid"].get("openings", ())),
            )
            how = {"width": kept["width"], "per_token": kept["per_token"], "depth": kept.get("depth", 1.0)}
            found = cls(grid, kept["size"], **how)
            found.load_state_dict(load_file(str(path)))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{path} is no controller ({str(error).splitlines()[0]})",
                expected="a controller.safetensors of a run",
                fix="take the file from the checkpoints of a run of the controller recipe",
            ) from error
        return found


@dataclasses.dataclass(frozen=True)
class Trace:
    """The choices behind one reply, and the states they were made on."""

    actions_T: torch.Tensor
    states_TD: torch.Tensor


class Assigned:
    """A steering that looks at nothing: reply g of every prompt is drawn by the g-th of these settings, in turn.

    Args:
        menu: What is chosen from.
        actions: Lines of the menu.
        per_token: Be asked at every token: then `traces` holds all states.
        depth: Where these states are read.
    """

    def __init__(self, menu: Menu, actions: Sequence[int], *, per_token: bool = False, depth: float = 1.0) -> None:
        self.menu, self.actions, self.per_token, self.depth = menu, tuple(actions), per_token, depth
        self.traces: dict[str, Trace] = {}

    def choose(self, states_BD: torch.Tensor, uniform_B: torch.Tensor, sample_B: Sequence[int]) -> torch.Tensor:
        """The setting whose turn it is."""
        return torch.tensor([self.actions[g % len(self.actions)] for g in sample_B], device=states_BD.device)

    def record(self, reply: Generation, actions_T: torch.Tensor, states_TD: torch.Tensor) -> None:
        """Keep it in `traces`."""
        self.traces[reply.id] = Trace(actions_T, states_TD)


class Steered:
    """A steering by a controller.

    Args:
        controller: Chooses.
        menu: Of the controller's grid.
        likeliest: Take the likeliest choice, as evaluation does; else draw one.

    Raises:
        ModelError: The controller reads states of another size.
    """

    def __init__(self, controller: Controller, menu: Menu, *, likeliest: bool = False) -> None:
        self.controller, self.menu, self.likeliest = controller, menu, likeliest
        self.per_token, self.depth = controller.per_token, controller.depth
        self.traces: dict[str, Trace] = {}

    @torch.no_grad()
    def choose(self, states_BD: torch.Tensor, uniform_B: torch.Tensor, sample_B: Sequence[int]) -> torch.Tensor:
        """The likeliest setting a row, or one drawn at the row's own number."""
        if states_BD.shape[1] != self.controller.size:
            raise ModelError(
                f"the controller reads states of {self.controller.size} numbers, the model's have {states_BD.shape[1]}",
                expected="the model that the controller was trained on",
                fix="load that model, or train a controller for this one",
            )
        logp_BA = self.controller(states_BD)
        if self.likeliest:
            best: torch.Tensor = logp_BA.argmax(-1)
            return best
        run_BA = logp_BA.exp().cumsum(-1)
        aim_B1 = uniform_B[:, None] * run_BA[:, -1:] * (1.0 - 1e-6)
        return torch.searchsorted(run_BA, aim_B1, right=True)[:, 0].clamp_(max=run_BA.shape[1] - 1)

    def record(self, reply: Generation, actions_T: torch.Tensor, states_TD: torch.Tensor) -> None:
        """Keep it in `traces`."""
        self.traces[reply.id] = Trace(actions_T, states_TD)


class ControllerLearner:
    """Adam on a controller.

    Args:
        controller: What is trained.
        learning_rate: Constant.
        max_grad_norm: Gradients are scaled down to this norm.
    """

    def __init__(self, controller: Controller, *, learning_rate: float, max_grad_norm: float = 1.0) -> None:
        self.controller, self.max_grad_norm = controller, max_grad_norm
        self.optimizer = torch.optim.Adam(controller.parameters(), lr=learning_rate)

    def step(self, loss: torch.Tensor) -> float:
        """One step down the loss's gradient; returns the gradient's norm.

        Raises:
            TrainingError: Loss or gradient are not finite; the weights keep their old values.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(self.controller.parameters(), self.max_grad_norm))
        if not torch.isfinite(loss) or norm != norm or norm == float("inf"):
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                "the controller's loss or gradient is not finite",
                expected="finite numbers",
                fix="lower controller.learning_rate; the last version is kept",
            )
        self.optimizer.step()
        return norm

    def save(self, path: Path) -> None:
        """Write the optimiser's moments."""
        save_file(moments_of(self.optimizer), str(path))

    def load(self, path: Path) -> None:
        """Take them over."""
        take_moments(self.optimizer, load_file(str(path)))


def score_steered(
    lm: LanguageModel, groups: Sequence[Group], actions_BT: Sequence[Sequence[int]], menu: Menu, *, budget: int = 1024
) -> torch.Tensor:
    """Log-probabilities of replies under the very settings they were drawn by, masks and top-k renormalised.

    What a learner of the model itself would need for its ratios. Greedy choices give the untempered
    log-probability of their token, as the sampler records it.

    Args:
        lm: The model.
        groups: Prompts with replies; rows are numbered 0..B-1.
        actions_BT: Line of the menu a token of each reply; a single one holds for the whole reply.
        menu: What was chosen from.
        budget: Tokens of a packed pass.

    Returns:
        logp_BT, zero beyond a row's length; carries a gradient where grad is enabled.
    """
    rows = sum(len(g.rows) for g in groups)
    width = max((len(c) for g in groups for c in g.completions), default=1)
    logp_BT = torch.zeros(rows, width, device=lm.device)
    for part in pack(groups, budget=budget):
        with attention_plan(AttentionPlan(tree=part.tree.to(lm.device))):
            hidden = lm.hidden(part.tokens_T[None], part.position_T[None])[0]
        chosen = [
            actions_BT[row][column if len(actions_BT[row]) > 1 else 0]
            for row, column in zip(part.row_N.tolist(), part.column_N.tolist(), strict=True)
        ]
        logits = hidden[part.source_N.to(lm.device)] @ lm.head_VD.T
        due = menu.due(chosen, part.column_N.tolist())
        shaped = shape_rows(logits, menu, torch.tensor(chosen, device=lm.device), due)
        flat = shaped.log_softmax(-1).gather(1, part.target_N.to(lm.device)[:, None])[:, 0]
        where = (part.row_N.to(lm.device), part.column_N.to(lm.device))
        logp_BT = logp_BT.index_put(where, flat)
    return logp_BT
