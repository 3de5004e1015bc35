"""Which module did it: adapters, or groups of layers, as players of a game; and how they get in each other's way.

A module's change of the weights is kept as factors, (b_OR, a_RI) a layer with every scaling included: the change
is their product, and nothing here needs it written out.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from tutelage.credit.shapley import Game, alone, leave_one_out, shapley

__all__ = ["Change", "ModuleCredit", "attribute", "first_order", "inner", "interference", "layer_groups", "norms"]

Change = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
MOST = 6  # modules: 64 evaluations


@dataclasses.dataclass(frozen=True)
class ModuleCredit:
    """What each module brought.

    Args:
        shapley: By module; they sum to `whole` - `empty`.
        leave_one_out: What is lost without it.
        alone: What it brings by itself.
        empty: Value without any module.
        whole: Value with all.
        evaluations: Subsets that were evaluated.
    """

    shapley: dict[str, float]
    leave_one_out: dict[str, float]
    alone: dict[str, float]
    empty: float
    whole: float
    evaluations: int

    @property
    def gap(self) -> float:
        """How far the Shapley values are from summing to the whole; rounding, and nothing else."""
        return math.fsum([*self.shapley.values(), self.empty, -self.whole])


def attribute(names: Sequence[str], value: Callable[[frozenset[str]], float]) -> ModuleCredit:
    """Credit of at most six modules, or groups of layers, from what every subset of them reaches.

    Args:
        names: The modules.
        value: What the model reaches with these modules on and the others off; evaluated once a subset.

    Raises:
        InputError: No modules, more than six, or a value that is no finite number.
    """
    game = Game(names, value, most=MOST)
    credit = shapley(game)
    return ModuleCredit(credit, leave_one_out(game), alone(game), game(()), game(names), game.evaluations)


def inner(one: Change, other: Change) -> float:
    """Frobenius inner product of two changes over the layers that both have."""
    parts = []
    for path in one.keys() & other.keys():
        (b1, a1), (b2, a2) = (tuple(x.double() for x in change[path]) for change in (one, other))
        parts.append(float(((b1.T @ b2) * (a1 @ a2.T)).sum()))
    return math.fsum(parts)


def norms(change: Change) -> dict[str, float]:
    """Frobenius norm of each layer's change."""
    return {path: math.sqrt(max(0.0, inner({path: f}, {path: f}))) for path, f in change.items()}


def interference(changes: Mapping[str, Change]) -> torch.Tensor:
    """Cosines between the modules' changes, (K, K), float64.

    1: they push the same way; -1: one undoes the other; 0: they do not touch, to first order. A module
    that changes nothing has cosine 0 with all.
    """
    rows = list(changes.values())
    size = [math.sqrt(max(0.0, inner(c, c))) for c in rows]
    found = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i, one in enumerate(rows):
        for j, other in enumerate(rows[: i + 1]):
            if size[i] and size[j]:
                found[i, j] = found[j, i] = 1.0 if i == j else inner(one, other) / (size[i] * size[j])
    return found


def first_order(gradient: Mapping[str, torch.Tensor], changes: Mapping[str, Change]) -> dict[str, float]:
    """What each module would change in a reward if the reward were linear: the sum over layers of <dR/dW, dW>.

    Args:
        gradient: dR/dW, (O, I), by layer, at the weights from which the modules start.
        changes: By module; layers without a gradient count for nothing.
    """
    return {
        name: math.fsum(
            float(((b.double().T @ gradient[path].double()) * a.double()).sum())
            for path, (b, a) in change.items()
            if path in gradient
        )
        for name, change in changes.items()
    }


def layer_groups(paths: Collection[str], count: int = MOST) -> dict[str, tuple[str, ...]]:
    """Divide layers into at most `count` groups of neighbours, by number; what has none is a group of its own."""
    if count < 2:
        return {"all layers": tuple(sorted(paths))}
    numbered: dict[int, list[str]] = {}
    rest = []
    for path in sorted(paths):
        found = re.search(r"\.(\d+)\.", f".{path}.")
        if found:
            numbered.setdefault(int(found.group(1)), []).append(path)
        else:
            rest.append(path)
    numbers = sorted(numbered)
    wanted = min(count - bool(rest), len(numbers))
    groups: dict[str, tuple[str, ...]] = {}
    for part in range(wanted):
        own = numbers[part * len(numbers) // wanted : (part + 1) * len(numbers) // wanted]
        name = f"layers {own[0]}-{own[-1]}" if len(own) > 1 else f"layer {own[0]}"
        groups[name] = tuple(path for n in own for path in numbered[n])
    return groups | ({"other layers": tuple(rest)} if rest else {})
