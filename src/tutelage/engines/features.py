"""Frozen features of prompts: hidden states of the model's own trunk, read at several depths.

They are what a critic's heads stand on. Middle layers know more about a question than the last,
which already thinks of the next token.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from tutelage.engines.attention import AttentionPlan, attention_plan
from tutelage.engines.load import LanguageModel
from tutelage.engines.packing import Group, Pack, pack
from tutelage.errors import ModelError

__all__ = ["Probe", "Reading", "layer_at", "listened", "overheard", "read_trunk", "reply_states", "tapped"]


@dataclasses.dataclass(frozen=True)
class Probe:
    """Where a head reads: `depth` as a share of the layers, pooled over the prompt or at its end."""

    depth: float
    pool: Literal["mean", "last"]


@dataclasses.dataclass
class Reading:
    """What one pass over prompts gave.

    Args:
        probes: One (prompts, hidden) float32 matrix a probe.
        inputs: What each watched linear layer received, by module path: at the prompt's last token, or
            on average over the prompt's own tokens; layers that read the same share one matrix.
    """

    probes: list[torch.Tensor]
    inputs: dict[str, torch.Tensor]


@torch.inference_mode()
def read_trunk(
    lm: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    probes: Sequence[Probe],
    *,
    watch: Mapping[str, torch.nn.Module] | None = None,
    pooled: Collection[str] = (),
    budget: int = 512,
) -> Reading:
    """Read probes and, with `watch`, the inputs of linear layers, all in one pass.

    A `mean` probe, and a watched layer in `pooled`, pools over the tokens after the template's lead,
    whatever the other prompts share. Without `watch` the pass stops at the deepest probe.
    """
    seen: dict[str, torch.Tensor] = {}
    handles = [module.register_forward_pre_hook(_keep_input(path, seen)) for path, module in (watch or {}).items()]
    rows: list[list[torch.Tensor]] = [[] for _ in probes]
    inputs: dict[tuple[str, bool], torch.Tensor] = {}
    done = 0
    sources: dict[str, tuple[str, bool]] = {}
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        read = stack.enter_context(tapped(lm, probes, stop=not watch))
        for part in pack([Group(p, (), ()) for p in prompts], budget=budget):
            states = read(part)
            sources = sources or {path: (first, path in pooled) for path, first in _twins(seen).items()}
            for path, mean in set(sources.values()):
                pooled_PF = _pool(lm, part, seen[path].reshape(-1, seen[path].shape[-1]), mean=mean)
                # One table from the start: joining parts at the end would hold everything twice.
                table = inputs.setdefault((path, mean), torch.empty(len(prompts), pooled_PF.shape[1]))
                table[done : done + len(pooled_PF)] = pooled_PF
            done += len(part.groups)
            seen.clear()
            for row, probe, states_TD in zip(rows, probes, states, strict=True):
                row.append(_pool(lm, part, states_TD, mean=probe.pool == "mean"))
    return Reading([torch.cat(r).float().cpu() for r in rows], {path: inputs[one] for path, one in sources.items()})


@contextlib.contextmanager
def listened(
    lm: LanguageModel, probes: Sequence[Probe], *, stop: bool = True
) -> Iterator[Callable[[Callable[[], object]], list[torch.Tensor]]]:
    """Gives what runs a forward pass of `lm.body` and answers the states at the depth of each probe.

    Args:
        lm: The model; its layers are listened to while the context lasts.
        probes: Where to read.
        stop: Leave each pass at the deepest probe; layers above are not needed.

    Yields:
        Pass -> one (rows x tokens, hidden) table a probe, in the model's dtype, with gradients where they are on.
    """
    wanted = [layer_at(lm, p.depth) for p in probes]
    with overheard(lm, wanted, stop=stop) as caught:

        def run(forward: Callable[[], object]) -> list[torch.Tensor]:
            with contextlib.suppress(_DeepEnough):
                forward()
            return [caught[index] for index in wanted]

        yield run


def layer_at(lm: LanguageModel, depth: float) -> int:
    """Number of the layer at a share of the layers; what it puts out is what is read at that depth."""
    return min(lm.layers - 1, round(depth * lm.layers))


@contextlib.contextmanager
def overheard(lm: LanguageModel, layers: Sequence[int], *, stop: bool = False) -> Iterator[dict[int, torch.Tensor]]:
    """What these layers put out in the last pass, (tokens, hidden) by number; with `stop` a pass ends at the last."""
    caught: dict[int, torch.Tensor] = {}
    deepest = max(layers) if stop else None
    all_layers = _layers(lm) if layers else []
    handles = [_watch(layer, index, caught, deepest) for index, layer in all_layers if index in set(layers)]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def tapped(
    lm: LanguageModel, probes: Sequence[Probe], *, stop: bool = True
) -> Iterator[Callable[[Pack], list[torch.Tensor]]]:
    """Gives what reads a pack: the states at the depth of each probe, (tokens, hidden); arguments as of `listened`."""
    with listened(lm, probes, stop=stop) as run:

        def read(part: Pack) -> list[torch.Tensor]:
            with attention_plan(AttentionPlan(tree=part.tree.to(lm.device))):
                return run(lambda: lm.hidden(part.tokens_T[None], part.position_T[None]))

        yield read


@torch.no_grad()
def reply_states(
    lm: LanguageModel, groups: Sequence[Group], *, depth: float, budget: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each completion's row and the states of its tokens at a depth, (tokens, hidden) float32; packs of `budget`."""
    with tapped(lm, [Probe(depth, "mean")]) as read:
        for part in pack(groups, budget=budget):
            (states_TD,) = read(part)
            for row, (first, last) in zip(part.rows, part.spans, strict=True):
                yield row, states_TD[first : last + 1].float().cpu()


def _pool(lm: LanguageModel, part: Pack, states_TD: torch.Tensor, *, mean: bool) -> torch.Tensor:
    """One row a prompt: its last token's state, or the mean over its own tokens."""
    if mean:
        return torch.stack([states_TD[own].mean(0) for own in _own_tokens(lm, part)])
    return states_TD[list(part.prompt_end)]


def _own_tokens(lm: LanguageModel, part: Pack) -> list[list[int]]:
    """Where in the pack each prompt's tokens lie, from where the template's lead ends."""
    shared = list(range(lm.lead, part.root))
    return [shared + list(range(a + max(0, lm.lead - part.root), b)) for a, b in part.prompt_spans]


def _twins(seen: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Each path, and the first path that was fed the very same tensor."""
    first: dict[int, str] = {}
    return {path: first.setdefault(tensor.data_ptr(), path) for path, tensor in seen.items()}


def _keep_input(path: str, seen: dict[str, torch.Tensor]) -> Any:
    def keep(_module: Any, args: tuple[Any, ...]) -> None:
        seen[path] = args[0]

    return keep


class _DeepEnough(Exception):
    """Leaves the forward pass early; never seen outside this file."""


def _layers(lm: LanguageModel) -> list[tuple[int, Any]]:
    for module in lm.body.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == lm.layers:
            return list(enumerate(module))
    raise ModelError(
        f"the layers of {lm.name} could not be found",
        expected=f"a list of {lm.layers} modules",
        fix="choose another model",
    )


def _watch(layer: Any, index: int, caught: dict[int, torch.Tensor], deepest: int | None) -> Any:
    def keep(_module: Any, _args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        caught[index] = states.reshape(-1, states.shape[-1])
        if index == deepest:
            raise _DeepEnough

    return layer.register_forward_hook(keep)
