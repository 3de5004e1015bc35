"""One attention function for every transformers model, so that one forward serves trees and rollouts.

transformers lets an attention implementation be registered by name. Ours, `tutelage`, looks at the
`AttentionPlan` that is active and does one of three things per layer:

- no plan: scaled dot-product attention with the mask that came in;
- a plan with a `tree` or its `mask_TT`: packed-tree attention, where many texts lie in one row and each token sees
  only its ancestors; keys and values can be captured, and the last layer's attention of chosen
  rows recorded (the credit stage needs it);
- a plan with a `KeyValueMemory`: one decoding step, with keys and values written in place into
  preallocated memory.

Because keys arrive here after position encoding, it holds for any architecture whose layers go
through transformers' attention interface (Llama, Qwen2, Mistral, GPT-NeoX and others).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tutelage.engines.tree import Tree, tree_attention
from tutelage.errors import ModelError

__all__ = ["AttentionPlan", "KeyValueMemory", "attention_plan", "install", "step_bias"]

NAME = "tutelage"


@dataclasses.dataclass
class KeyValueMemory:
    """Preallocated keys and values of a decoding batch.

    One tensor a layer: `values` (rows, kv_heads, capacity, head_dim), and `keys` turned, (rows, kv_heads,
    head_dim, capacity), since the product with queries would otherwise turn all of them at every step.
    """

    rows: int
    capacity: int
    keys: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    values: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    def _take(self, index: int, like: torch.Tensor) -> None:
        if index not in self.keys:
            heads, width = like.shape[-3], like.shape[-1]
            self.keys[index] = like.new_zeros(self.rows, heads, width, self.capacity)
            self.values[index] = like.new_zeros(self.rows, heads, self.capacity, width)

    def fill(self, index: int, row: int, key_HTD: torch.Tensor, value_HTD: torch.Tensor) -> None:
        """Begin a row with the T positions of a text, each (kv_heads, T, head_dim)."""
        self._take(index, key_HTD)
        length = key_HTD.shape[1]
        self.keys[index][row, :, :, :length] = key_HTD.transpose(1, 2)
        self.values[index][row, :, :length] = value_HTD

    def write(self, index: int, slots_B: torch.Tensor, key_BHD: torch.Tensor, value_BHD: torch.Tensor) -> None:
        """One more position in each of the rows 0..B-1, at that row's slot."""
        self._take(index, key_BHD[:, :, None])
        rows_B = torch.arange(len(slots_B), device=slots_B.device)
        self.keys[index][rows_B, :, :, slots_B] = key_BHD
        self.values[index][rows_B, :, slots_B] = value_BHD

    def move(self, source: int, target: int, length: int) -> None:
        """Overwrite row `target` with the first `length` positions of row `source`."""
        for key, value in zip(self.keys.values(), self.values.values(), strict=True):
            key[target, :, :, :length] = key[source, :, :, :length]
            value[target, :, :length] = value[source, :, :length]

    def attend(self, index: int, query_BHD: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
        """Each row's queries over its own keys: (B, heads * head_dim).

        Args:
            index: Layer.
            query_BHD: (B, heads, head_dim).
            bias: `step_bias` of these rows.
            scale: Factor on the scores.
        """
        count, heads, width = query_BHD.shape
        shared, reach = bias.shape[0] // count, bias.shape[2]
        # The queries that share a key-value head become its rows: no repeated keys in memory.
        query = query_BHD.reshape(count * shared, heads // shared, width)
        keys, values = self.keys[index].flatten(0, 1), self.values[index].flatten(0, 1)
        scores = torch.baddbmm(bias, query, keys[: count * shared, :, :reach], alpha=scale)
        return torch.bmm(scores.softmax(-1), values[: count * shared, :reach]).reshape(count, heads * width)


def step_bias(slots_B: torch.Tensor, reach: int, shared: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to a decoding step's scores: -inf behind each row's slot; (B * kv_heads, 1, reach)."""
    hidden = torch.arange(reach, device=slots_B.device)[None] > slots_B[:, None]
    bias = torch.zeros(len(slots_B), reach, dtype=dtype, device=slots_B.device).masked_fill_(hidden, float("-inf"))
    return bias.repeat_interleave(shared, 0)[:, None]


@dataclasses.dataclass
class AttentionPlan:
    """What the attention function should do during one forward pass.

    Args:
        mask_TT: True where the row token may see the column token (packed tree).
        tree: The same tree by its parts, which attends faster; `mask_TT` is then needed only to record.
        capture: Keep keys and values of every layer in `captured` (layer -> (k, v), batch dropped).
        record_rows_N: Token indices whose last-layer attention, averaged over heads, goes to
            `recorded_NT`.
        memory: Decoding memory; then `slots_B` says at which position each of the rows 0..B-1 gets its new
            token; it looks at what lies before, all below `reach`.
    """

    mask_TT: torch.Tensor | None = None
    tree: Tree | None = None
    capture: bool = False
    captured: dict[int, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)
    record_rows_N: torch.Tensor | None = None
    record_layer: int = -1
    recorded_NT: torch.Tensor | None = None
    memory: KeyValueMemory | None = None
    slots_B: torch.Tensor | None = None
    reach: int = 0
    bias: torch.Tensor | None = None  # of a decoding step; made by the first layer for all


_active: list[AttentionPlan] = []


@contextlib.contextmanager
def attention_plan(plan: AttentionPlan) -> Iterator[AttentionPlan]:
    """Make `plan` the active one for the forward passes inside the block."""
    _active.append(plan)
    try:
        yield plan
    finally:
        _active.pop()


def _spread(kv: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, kv_heads, T, D) -> (B, heads, T, D), each key-value head serving heads/kv_heads queries."""
    groups = heads // kv.shape[1]
    return kv if groups == 1 else kv.repeat_interleave(groups, dim=1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    heads = query.shape[1]
    return F.scaled_dot_product_attention(
        query,
        _spread(key, heads),
        _spread(value, heads),
        attn_mask=mask,
        is_causal=mask is None and query.shape[2] > 1,
        scale=scaling,
    )


def _record(plan: AttentionPlan, query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> None:
    rows = plan.record_rows_N
    assert rows is not None and plan.mask_TT is not None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    scores = query[0, :, rows].float() @ _spread(key, query.shape[1])[0].float().transpose(1, 2) * scale
    scores = scores.masked_fill(~plan.mask_TT[rows], float("-inf"))
    plan.recorded_NT = scores.softmax(-1).mean(0)


def _decode(
    plan: AttentionPlan,
    index: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    assert plan.memory is not None and plan.slots_B is not None
    plan.memory.write(index, plan.slots_B, key[:, :, 0], value[:, :, 0])
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if plan.bias is None:
        plan.bias = step_bias(plan.slots_B, plan.reach, key.shape[1], query.dtype)
    return plan.memory.attend(index, query[:, :, 0], plan.bias, scale).view(query.shape)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **extra: object,
) -> tuple[torch.Tensor, None]:
    strange = [name for name in ("softcap", "s_aux", "position_bias") if extra.get(name) is not None]
    if strange:  # leaving these out would change the model in silence
        raise ModelError(
            f"this model changes its attention logits by {strange[0]}, which the engine does not compute",
            expected="plain scaled dot-product attention",
            fix="choose another model",
        )
    index = int(getattr(module, "layer_idx", 0))
    plan = _active[-1] if _active else None
    if plan is not None and plan.memory is not None:
        out = _decode(plan, index, query, key, value, scaling)
    elif plan is not None and (plan.tree is not None or plan.mask_TT is not None):
        if plan.tree is not None:
            by_token = (x[0].transpose(0, 1) for x in (query, key, value))
            out = tree_attention(plan.tree, *by_token, scaling=scaling).transpose(0, 1)[None]
        else:
            assert plan.mask_TT is not None
            out = _attend(query, key, value, plan.mask_TT[None, None], scaling)
        if plan.capture:
            plan.captured[index] = (key[0].detach(), value[0].detach())
        if plan.record_rows_N is not None and index == plan.record_layer:
            with torch.no_grad():
                _record(plan, query.detach(), key.detach(), scaling)
    else:
        if attention_mask is not None:
            attention_mask = attention_mask[..., : key.shape[2]]
        out = _attend(query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def install() -> str:
    """Register the attention function with transformers and return its name."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # without one, a padding mask would be dropped
    return NAME
