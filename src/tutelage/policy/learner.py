"""One optimiser step over packed trees. It knows neither models' names nor which objective runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from tutelage.engines.attention import AttentionPlan, attention_plan
from tutelage.engines.batch import Batch, Objective
from tutelage.engines.load import LanguageModel
from tutelage.engines.packing import Group, Pack, pack
from tutelage.errors import TrainingError
from tutelage.policy.merged import MergedLayers
from tutelage.policy.values import ValueHead
from tutelage.policy.vocabulary import drift, logps, logps_and_totals

__all__ = ["Learner", "Scores", "TrainGroup", "padded", "score"]


def _hidden(lm: LanguageModel, part: Pack, plan: AttentionPlan) -> torch.Tensor:
    with attention_plan(plan):
        hidden: torch.Tensor = lm.hidden(part.tokens_T[None], part.position_T[None])[0]
    return hidden


@dataclasses.dataclass
class Scores:
    """What one frozen pass over prompts and completions gives.

    Args:
        logp_BT: Log-probabilities of the completions' tokens, zero beyond a row's length.
        keep_BT: 1.0 within a row's length.
        reply_BD: Mean final hidden state over each completion.
        prompt_PD: Final hidden state at the last token of each group's prompt.
        attention_BT: Last layer's attention of a completion's last token over its own tokens,
            averaged over heads (zero elsewhere), or None when not asked for.
        value_BT: What a value head expects before each token, or None without one.
        total_BT: Logsumexp of the logits that each token was chosen from, or None when not asked for.
    """

    logp_BT: torch.Tensor
    keep_BT: torch.Tensor
    reply_BD: torch.Tensor
    prompt_PD: torch.Tensor
    attention_BT: torch.Tensor | None
    value_BT: torch.Tensor | None = None
    total_BT: torch.Tensor | None = None


@torch.no_grad()
def score(
    lm: LanguageModel,
    groups: Sequence[Group],
    *,
    budget: int,
    attention: bool = False,
    temperature: float = 1.0,
    values: ValueHead | None = None,
    totals: bool = False,
) -> Scores:
    """Log-probabilities, features and attention of completions, each prompt computed once.

    Rows are numbered by the groups' `rows`, which must be 0..B-1. `temperature` divides the logits,
    so that a tempered sampler's log-probs are met. `values` reads the same states; `totals` asks for `total_BT`.
    """
    rows = sum(len(g.rows) for g in groups)
    width = max((len(c) for g in groups for c in g.completions), default=1)
    logp_BT = torch.zeros(rows, width)
    keep_BT = torch.zeros(rows, width)
    weight_BT = torch.zeros(rows, width) if attention else None
    value_BT = torch.zeros(rows, width) if values is not None else None
    total_BT = torch.zeros(rows, width) if totals else None
    features = lm.head_VD.shape[1]
    reply_BD = torch.zeros(rows, features)
    prompts: list[torch.Tensor] = []
    for part in pack(groups, budget=budget):
        plan = AttentionPlan(tree=part.tree.to(lm.device))
        if attention and part.spans:
            plan.mask_TT = part.mask_TT.to(lm.device)
            plan.record_rows_N = torch.tensor([last for _, last in part.spans], device=lm.device)
            plan.record_layer = lm.layers - 1
        hidden = _hidden(lm, part, plan)
        prompts.append(hidden[list(part.prompt_end)].float().cpu())
        if not part.spans:
            continue
        source = hidden[part.source_N.to(lm.device)] / temperature
        target = part.target_N.to(lm.device)
        if total_BT is not None:
            flat, sums = logps_and_totals(source, lm.head_VD, target)
            total_BT[part.row_N, part.column_N] = sums.cpu()
        else:
            flat = logps(source, lm.head_VD, target)
        logp_BT[part.row_N, part.column_N] = flat.cpu()
        if values is not None and value_BT is not None:
            value_BT[part.row_N, part.column_N] = values(source).cpu()
        keep_BT[part.row_N, part.column_N] = 1.0
        for n, (row, (first, last)) in enumerate(zip(part.rows, part.spans, strict=True)):
            reply_BD[row] = hidden[first : last + 1].float().mean(0).cpu()
            if weight_BT is not None and plan.recorded_NT is not None:
                weight_BT[row, : last + 1 - first] = plan.recorded_NT[n, first : last + 1].cpu()
    prompt_PD = torch.cat(prompts) if prompts else torch.zeros(0, features)
    return Scores(logp_BT, keep_BT, reply_BD, prompt_PD, weight_BT, value_BT, total_BT)


@dataclasses.dataclass(frozen=True)
class TrainGroup:
    """A prompt with the completions that train: their tokens and, row by row, what the batch needs.

    `anchor`, where given, weighs each token's divergence from the start model. `old_value` and
    `returns` are given, both or neither, for a learner with a value head.
    """

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    advantage: tuple[tuple[float, ...], ...]
    old_logp: tuple[tuple[float, ...], ...]
    ref_logp: tuple[tuple[float, ...], ...]
    anchor: tuple[tuple[float, ...], ...] = ()
    old_value: tuple[tuple[float, ...], ...] = ()
    returns: tuple[tuple[float, ...], ...] = ()


class Learner:
    """Adam on an adapter's factors or on whole weights, with micro-batches sized by tokens.

    Args:
        lm: The model that carries `adapter`.
        adapter: What is trained.
        learning_rate: Peak rate; the caller may scale it per step.
        budget: Tokens a packed micro-batch may hold: bounds the memory of activations.
        max_grad_norm: Gradients are scaled down to this norm.
        weight_decay: AdamW's decoupled decay.
        betas: AdamW's; the second is below its usual 0.999 since runs have few steps.
        values: A value head to train beside the adapter, on groups that hold returns.
        value_learning_rate: The head's own rate; its gradients are scaled down on their own, too.
    """

    def __init__(
        self,
        lm: LanguageModel,
        adapter: MergedLayers,
        *,
        learning_rate: float,
        budget: int = 1024,
        max_grad_norm: float = 1.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        values: ValueHead | None = None,
        value_learning_rate: float = 1e-3,
    ) -> None:
        self.lm, self.adapter, self.budget, self.values = lm, adapter, budget, values
        self.learning_rate, self.max_grad_norm = learning_rate, max_grad_norm
        parts: list[dict[str, Any]] = [{"params": adapter.parameters(), "lr": learning_rate}]
        if values is not None:
            parts.append({"params": list(values.parameters()), "lr": value_learning_rate, "weight_decay": 0.0})
        self._rates = [float(part["lr"]) for part in parts]
        self.optimizer = torch.optim.AdamW(parts, lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def step(
        self,
        groups: Sequence[TrainGroup],
        objective: Objective,
        *,
        scale: float = 1.0,
        temperature: float = 1.0,
    ) -> dict[str, float]:
        """One optimiser step on `groups`; merges what was learned afterwards.

        Args:
            groups: All that the step learns from.
            objective: Turns log-probabilities into a loss.
            scale: Factor on the learning rate (schedules).
            temperature: Divides the logits, as the sampler of the replies did.

        Returns:
            Metrics of the objective, averaged over the step's tokens, `grad_norm`, and
            `value_grad_norm` when a value head learned.

        Raises:
            TrainingError: The loss or a gradient is not finite. Factors and value head keep their old values.
        """
        rows = sum(len(g.completions) for g in groups)
        tokens = sum(len(c) for g in groups for c in g.completions)
        tables = _tables(groups)
        named = _numbered(groups)
        totals = bool(getattr(objective, "wants_totals", False))
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        with torch.enable_grad():
            for part in pack(named, budget=self.budget):
                batch = self._batch(part, tables, rows, tokens, temperature, totals)
                loss = objective(batch)
                if not torch.isfinite(loss.value):
                    raise TrainingError(
                        f"the loss of {objective.name} is {float(loss.value.detach())}",
                        expected="a finite number",
                        fix="lower update.learning_rate; the last version is kept",
                    )
                loss.value.backward()  # type: ignore[no-untyped-call]
                for key, value in loss.sums.items():
                    sums[key] = sums.get(key, 0.0) + value
                sums["loss"] = sums.get("loss", 0.0) + float(loss.value.detach())
        return self._apply(sums, tokens, objective.name, scale)

    def _apply(self, sums: dict[str, float], tokens: int, name: str, scale: float) -> dict[str, float]:
        norms = {"grad_norm": float(torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), self.max_grad_norm))}
        if self.values is not None and self.values.bias.grad is not None:
            found = torch.nn.utils.clip_grad_norm_(self.values.parameters(), self.max_grad_norm)
            norms["value_grad_norm"] = float(found)
        if not all(math.isfinite(norm) for norm in norms.values()):
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"the gradient of {name} is not finite",
                expected="finite numbers",
                fix="lower update.learning_rate; the last version is kept",
            )
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * scale
        self.optimizer.step()
        self.adapter.merge()
        counted = sums.pop("tokens", float(tokens))
        whole = sums.pop("loss", 0.0)
        return {k: v / max(counted, 1.0) for k, v in sums.items()} | {"loss": whole} | norms

    def _batch(
        self,
        part: Pack,
        tables: dict[str, torch.Tensor],
        rows: int,
        tokens: int,
        temperature: float,
        totals: bool,
    ) -> Batch:
        device, lm = self.lm.device, self.lm
        plan = AttentionPlan(tree=part.tree.to(device))
        first = part.rows[0]  # rows of a pack are consecutive, since groups keep their order
        cut = {k: v[first : first + len(part.rows)].to(device) for k, v in tables.items()}
        row, column = part.row_N.to(device) - first, part.column_N.to(device)
        source = part.source_N.to(device)
        hidden = _hidden(lm, part, plan)[source] / temperature
        total = None
        if totals:
            flat, sums = logps_and_totals(hidden, lm.head_VD, part.target_N.to(device))
            total = torch.zeros_like(cut["keep"]).index_put((row, column), sums)
        else:
            flat = logps(hidden, lm.head_VD, part.target_N.to(device))
        logp = torch.zeros_like(cut["keep"]).index_put((row, column), flat)
        divergence = torch.zeros_like(logp)
        held = cut["anchor"][row, column] > 0
        if bool(held.any()):
            with torch.no_grad(), self.adapter.off():
                start = _hidden(lm, part, plan)[source[held]] / temperature
            divergence = divergence.index_put((row[held], column[held]), drift(hidden[held], lm.head_VD, start))
        value = None
        if self.values is not None and "returns" in cut:
            value = torch.zeros_like(logp).index_put((row, column), self.values(hidden))
        return Batch(
            logp, cut["keep"], cut["old"], cut["ref"], cut["advantage"], rows, tokens, cut["anchor"], divergence,
            value, cut.get("old_value"), cut.get("returns"), total,
        )  # fmt: skip


def _numbered(groups: Sequence[TrainGroup]) -> list[Group]:
    named, row = [], 0
    for g in groups:
        named.append(Group(g.prompt, g.completions, tuple(range(row, row + len(g.completions)))))
        row += len(g.completions)
    return named


def padded(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """(rows, longest) float32 table, zero beyond a row's end."""
    width = max(map(len, rows))
    return torch.tensor([[*r, *([0.0] * (width - len(r)))] for r in rows], dtype=torch.float32)


def _tables(groups: Sequence[TrainGroup]) -> dict[str, torch.Tensor]:
    tables = {
        "keep": padded([(1.0,) * len(c) for g in groups for c in g.completions]),
        "advantage": padded([r for g in groups for r in g.advantage]),
        "old": padded([r for g in groups for r in g.old_logp]),
        "ref": padded([r for g in groups for r in g.ref_logp]),
        "anchor": padded([r for g in groups for r in g.anchor or [(0.0,) * len(c) for c in g.completions]]),
    }
    if any(g.returns for g in groups):
        tables["old_value"] = padded([r for g in groups for r in g.old_value])
        tables["returns"] = padded([r for g in groups for r in g.returns])
    return tables
