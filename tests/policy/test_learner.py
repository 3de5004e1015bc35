"""The optimiser step: exact log-probabilities, exact gradients, nothing lost or invented on the way."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tutelage.engines.attention import AttentionPlan, attention_plan
from tutelage.engines.batch import Batch, Loss
from tutelage.engines.packing import Group
from tutelage.errors import TrainingError
from tutelage.objectives.inverse import InverseQ, inverse_q
from tutelage.objectives.policy_gradient import Grpo, Rloo
from tutelage.objectives.supervised import Supervised
from tutelage.policy.learner import Learner, TrainGroup, score
from tutelage.policy.lora import Adapter, attach

LR = 5e-4


def train_group(prompt: tuple[int, ...], *completions: tuple[int, ...], seed: int = 0) -> TrainGroup:
    random = torch.Generator().manual_seed(seed + len(prompt))

    def rows(scale: float, shift: float) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple((scale * torch.randn(len(c), generator=random) + shift).tolist()) for c in completions)

    return TrainGroup(prompt, completions, rows(1.0, 0.2), rows(0.3, -5.0), rows(0.3, -5.0))


GROUPS = (
    train_group((5, 6, 7, 8, 9), (10, 11, 12, 13), (14, 15), (16, 17, 2)),
    train_group((5, 6, 7, 30), (31, 32, 33, 34, 2), (35, 2)),
    train_group((5, 6, 7, 40, 41, 42, 43), (44,), (45, 46, 47, 48, 49, 50)),
    train_group((5, 6, 7, 51), (52, 53, 2)),
)


@dataclasses.dataclass(frozen=True)
class Weighted:
    """The plainest objective: minus the advantage-weighted log-probabilities, over the step's tokens."""

    name: str = "weighted"

    def __call__(self, batch: Batch) -> Loss:
        value = -(batch.logp_BT * batch.keep_BT * batch.advantage_BT).sum() / batch.tokens_in_step
        return Loss(value, {"tokens": float(batch.keep_BT.sum())})


def fresh(load: Callable[[str], Any], kind: str = "llama", **more: Any) -> tuple[Any, Adapter, Learner]:
    lm = load(kind)
    adapter = attach(lm.model, rank=3, alpha=12.0, seed=1)
    return (
        lm,
        adapter,
        Learner(lm, adapter, **({"learning_rate": LR, "budget": 4096, "max_grad_norm": 1e9} | more)),
    )


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max())


def reference_rows(model: Any, temperature: float = 1.0) -> list[torch.Tensor]:
    """Log-probabilities of each completion's tokens from separate passes of `model`."""
    found = []
    for g in GROUPS:
        for c in g.completions:
            logits = model(torch.tensor([g.prompt + c]), use_cache=False).logits[0, len(g.prompt) - 1 : -1]
            found.append((logits / temperature).log_softmax(-1).gather(1, torch.tensor(c)[:, None])[:, 0])
    return found


def numbered() -> list[Group]:
    groups, row = [], 0
    for g in GROUPS:
        groups.append(Group(g.prompt, g.completions, tuple(range(row, row + len(g.completions)))))
        row += len(g.completions)
    return groups


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("budget", [1, 30, 4096])
@torch.no_grad()
def test_scores_equal_separate_passes(
    architecture: str, budget: int, temperature: float, tiny_lms: dict[str, Any], plain_models: dict[str, Any]
) -> None:
    plain = plain_models[architecture]
    got = score(tiny_lms[architecture], numbered(), budget=budget, attention=True, temperature=temperature)
    assert got.attention_BT is not None
    pairs = [(group, c) for group in GROUPS for c in group.completions]
    for row, (logp, (group, c)) in enumerate(zip(reference_rows(plain, temperature), pairs, strict=True)):
        n = len(c)
        assert gap(got.logp_BT[row, :n], logp) < 1e-4
        assert got.keep_BT[row].tolist() == [1.0] * n + [0.0] * (6 - n)
        assert not got.logp_BT[row, n:].any()
        assert not got.attention_BT[row, n:].any()
        out = plain(torch.tensor([group.prompt + c]), output_attentions=True, output_hidden_states=True)
        states = out.hidden_states[-1][0]
        assert gap(got.reply_BD[row], states[len(group.prompt) :].mean(0)) < 1e-4
        assert gap(got.attention_BT[row, :n], out.attentions[-1][0].mean(0)[-1, len(group.prompt) :]) < 1e-5
        assert gap(got.prompt_PD[GROUPS.index(group)], states[len(group.prompt) - 1]) < 1e-4


def test_one_step_worked_by_hand(load_tiny: Callable[[str], Any]) -> None:
    """Adam's first step moves a weight by lr g / (|g| + 1e-8), whatever g's size.

    B starts at zero, so A's gradient is exactly zero: A stays, and each entry of B moves by lr
    against the sign of its gradient.
    """
    lm, adapter, learner = fresh(load_tiny)
    before = adapter.state()
    metrics = learner.step(GROUPS, Weighted())
    for name, value in adapter.state().items():
        if "lora_A" in name:
            assert torch.equal(value, before[name])
            continue
        layer = adapter.layers[name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")]
        grad = layer.lora_b.grad
        assert grad is not None
        assert gap(value, -LR * grad / (grad.abs() + 1e-8)) < 1e-8
        assert gap(layer.merged, layer.weight + 4.0 * layer.lora_b @ layer.lora_a) < 1e-6  # merged anew: s = 12 / 3
    tokens = sum(len(c) for g in GROUPS for c in g.completions)
    assert tokens == 26
    with torch.no_grad(), adapter.off():
        rows = reference_rows(lm.model)
    flat = [a for g in GROUPS for a in g.advantage]
    wanted = -sum(float((r * torch.tensor(a)).sum()) for r, a in zip(rows, flat, strict=True)) / tokens
    assert metrics["loss"] == pytest.approx(wanted, rel=1e-4)


def test_gradients_are_autograds_through_whole_logits(architecture: str, load_tiny: Callable[[str], Any]) -> None:
    """The factors' gradients from the step against plain autograd on W + s B A, no custom function used."""
    lm, adapter, learner = fresh(load_tiny, architecture)
    twin, factors = plain_twin(lm, adapter)
    metrics = learner.step(GROUPS, Weighted())
    flat = [a for g in GROUPS for a in g.advantage]
    rows = reference_rows(twin)
    loss = -torch.stack([(r * torch.tensor(a)).sum() for r, a in zip(rows, flat, strict=True)]).sum() / 26
    grads = torch.autograd.grad(loss, list(factors.values()))
    norm = torch.stack([g.norm() for g in grads]).norm()
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    for (path, _), grad in zip(factors.items(), grads, strict=True):
        ours = adapter.layers[path].lora_b.grad
        assert ours is not None and gap(ours, grad) < 1e-5 * max(1.0, float(grad.abs().max())), path


def plain_twin(lm: Any, adapter: Adapter) -> tuple[Any, dict[str, torch.Tensor]]:
    """A plain eager model whose adapted layers add s B (A x) in separate steps, and its B factors."""
    twin = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(lm.model.config), attn_implementation="eager")
    state = {k: v for k, v in lm.model.state_dict().items() if "lora_" not in k}
    twin.eval().load_state_dict(state)
    factors = {}
    for path, layer in adapter.layers.items():
        a, b = layer.lora_a.detach().clone(), layer.lora_b.detach().clone().requires_grad_(True)
        factors[path] = b
        twin.get_submodule(path).register_forward_hook(
            lambda _m, inputs, out, a=a, b=b, s=layer.scale: out + s * (inputs[0] @ a.T) @ b.T
        )
    return twin, factors


@dataclasses.dataclass(frozen=True)
class Curious:
    """Wants the totals and does nothing with them."""

    inner: Any
    name: str = "curious"
    wants_totals: bool = True

    def __call__(self, batch: Batch) -> Loss:
        assert batch.total_BT is not None
        return self.inner(dataclasses.replace(batch, total_BT=None))


@pytest.mark.parametrize("weight", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("budget", [16, 4096])
def test_inverse_q_in_chunks_is_the_plain_function_on_whole_logits(
    weight: float, budget: int, architecture: str, load_tiny: Callable[[str], Any]
) -> None:
    """Loss, penalty and implied rewards to 1e-4; the factors' gradients within a cosine of 0.9999."""
    lm, adapter, learner = fresh(load_tiny, architecture, budget=budget)
    learner.step(GROUPS, Weighted())  # so that neither factor is zero
    twin, factors = plain_twin(lm, adapter)
    rows = [(g.prompt, c) for g in GROUPS for c in g.completions]
    width = max(len(c) for _, c in rows)
    logits_BTV = torch.stack([
        torch.nn.functional.pad(
            twin(torch.tensor([p + c]), use_cache=False).logits[0, len(p) - 1 : -1], (0, 0, 0, width - len(c))
        )
        for p, c in rows
    ])  # fmt: skip
    tokens = torch.tensor([[*c, *([0] * (width - len(c)))] for _, c in rows])
    keep = torch.tensor([[1.0] * len(c) + [0.0] * (width - len(c)) for _, c in rows])
    exact = inverse_q(logits_BTV, tokens, keep, weight=weight, gamma=0.9)
    grads = torch.autograd.grad(exact.value, list(factors.values()))
    seen = score(lm, numbered(), budget=budget, totals=True)
    assert seen.total_BT is not None
    got = learner.step(GROUPS, InverseQ(weight, 0.9), scale=0.0)
    assert got["loss"] == pytest.approx(float(exact.value.detach()), abs=1e-4, rel=1e-4)
    assert got["nll"] == pytest.approx(exact.nll, abs=1e-4)
    if weight:
        assert got["penalty"] == pytest.approx(exact.penalty, abs=1e-4, rel=1e-4)
        assert got["implied_reward"] == pytest.approx(float(exact.reward_BT.nanmean()), abs=1e-4, rel=1e-4)
        assert gap(seen.total_BT, logits_BTV.logsumexp(-1) * keep) < 1e-4
    ours = torch.cat([adapter.layers[path].lora_b.grad.flatten() for path in factors])  # type: ignore[union-attr]
    theirs = torch.cat([grad.flatten() for grad in grads])
    assert float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)) > 0.9999
    assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=1e-3)


def test_asking_for_totals_changes_no_bit_of_the_log_probabilities(load_tiny: Callable[[str], Any]) -> None:
    """And without a penalty inverse Q is supervised learning, a mean over tokens instead of rows."""
    lm, adapter, learner = fresh(load_tiny)
    learner.step(GROUPS, Weighted())
    plain, curious = (score(lm, numbered(), budget=64, totals=totals) for totals in (False, True))
    assert torch.equal(plain.logp_BT, curious.logp_BT) and plain.total_BT is None
    steps = []
    ones = tuple(tuple((1.0,) * len(c) for c in g.completions) for g in GROUPS)
    alike = [dataclasses.replace(g, advantage=one) for g, one in zip(GROUPS, ones, strict=True)]
    for objective in (InverseQ(0.0), Curious(InverseQ(0.0)), Supervised()):
        metrics = learner.step(alike, objective, scale=0.0)
        steps.append((metrics, torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])))
    assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-5)
    rows = sum(len(g.completions) for g in GROUPS)
    assert steps[0][0]["nll"] == steps[2][0]["nll"]
    assert steps[0][0]["loss"] * 26 == pytest.approx(steps[2][0]["loss"] * rows, rel=1e-5)
    assert gap(steps[0][1], steps[1][1]) < 1e-5
    assert gap(steps[0][1] * 26, steps[2][1] * rows) < 1e-4


@pytest.mark.parametrize("objective", [Grpo(), Rloo(), Supervised(), Weighted(), InverseQ(0.1)], ids=lambda o: o.name)
def test_the_micro_batch_budget_does_not_change_the_result(objective: Any, load_tiny: Callable[[str], Any]) -> None:
    results, metrics = [], []
    for budget in (32, 4096, 1):
        _, adapter, learner = fresh(load_tiny, budget=budget)
        metrics.append([learner.step(GROUPS, objective) for _ in range(2)][-1])
        results.append(adapter.state())
    for other in (1, 2):
        assert max(gap(results[0][name], results[other][name]) for name in results[0]) < 1e-5
        assert metrics[0] == pytest.approx(metrics[other], rel=1e-3, abs=1e-5)
    assert max(float(v.abs().max()) for n, v in results[0].items() if "lora_B" in n) > LR


def test_the_same_steps_give_the_same_bits(load_tiny: Callable[[str], Any]) -> None:
    ends = []
    for _ in range(2):
        _, adapter, learner = fresh(load_tiny, budget=32)
        for _ in range(3):
            learner.step(GROUPS, Grpo())
        ends.append(adapter.state())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_steps_learn(load_tiny: Callable[[str], Any]) -> None:
    """The log-probability of what is imitated rises, and of what is discouraged falls."""
    _, _, learner = fresh(load_tiny, learning_rate=5e-3)
    wanted = TrainGroup(
        (5, 6, 7), ((10, 11, 2), (20, 21, 2)), ((1.0,) * 3, (-0.2,) * 3), ((0.0,) * 3,) * 2, ((0.0,) * 3,) * 2
    )
    table = [Group(wanted.prompt, wanted.completions, (0, 1))]
    before = score(learner.lm, table, budget=64).logp_BT.sum(-1)
    for _ in range(10):
        learner.step([wanted], Weighted())
    after = score(learner.lm, table, budget=64).logp_BT.sum(-1)
    assert after[0] > before[0] + 3
    assert after[1] < before[1]


def test_an_anchor_adds_the_drift_of_its_tokens_alone(load_tiny: Callable[[str], Any]) -> None:
    """Against whole logits of separate passes, after steps that moved the policy away from its start."""
    lm, adapter, learner = fresh(load_tiny, learning_rate=2e-2)
    for _ in range(3):
        learner.step(GROUPS, Weighted())

    def rows() -> list[torch.Tensor]:
        found = []
        for g in GROUPS:
            for c in g.completions:
                whole = torch.tensor([g.prompt + c])
                causal = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril()
                with attention_plan(AttentionPlan(mask_TT=causal)):
                    body = lm.hidden(whole, torch.arange(whole.shape[1])[None])[0]
                found.append((body[len(g.prompt) - 1 : -1] @ lm.head_VD.T).log_softmax(-1))
        return found

    with torch.no_grad():
        now = rows()
        with adapter.off():
            then = rows()
    exact = [(q.exp() * (q - p)).sum(-1) for p, q in zip(now, then, strict=True)]
    assert max(float(x.max()) for x in exact) > 0.01
    seen: list[Batch] = []

    def listen(batch: Batch) -> Loss:
        seen.append(batch)
        return Supervised()(batch)

    listen.name = "listen"  # type: ignore[attr-defined]
    anchored = [
        dataclasses.replace(g, anchor=tuple((float(r == 0) * 0.5,) * len(c) for r, c in enumerate(g.completions)))
        for g in GROUPS
    ]
    learner.step(anchored, listen, scale=0.0)  # type: ignore[arg-type]
    row = 0
    for g in GROUPS:
        for r, c in enumerate(g.completions):
            drift = torch.cat([b.drift_BT for b in seen if b.drift_BT is not None])[row]
            wanted = exact[row] if r == 0 else torch.zeros(len(c))
            assert gap(drift[: len(c)], wanted) < 1e-4
            assert not drift[len(c) :].any()
            row += 1


def test_an_anchor_pulls_back_to_the_start(load_tiny: Callable[[str], Any]) -> None:
    _, _, learner = fresh(load_tiny, learning_rate=1e-2)
    for _ in range(5):
        learner.step(GROUPS, Weighted())
    held = [
        TrainGroup(g.prompt, g.completions, *(tuple((0.0,) * len(c) for c in g.completions),) * 3,
                   anchor=tuple((1.0,) * len(c) for c in g.completions))
        for g in GROUPS
    ]  # fmt: skip
    drifts = [learner.step(held, Supervised())["drift"] for _ in range(25)]
    assert drifts[0] > 0.01
    assert drifts[-1] < 0.3 * drifts[0]


@dataclasses.dataclass
class Broken:
    """Goes wrong in the second micro-batch of a step, in its loss or in its gradient only."""

    kind: str
    calls: int = 0
    name: str = "broken"

    def __call__(self, batch: Batch) -> Loss:
        self.calls += 1
        value = Weighted()(batch).value
        if self.calls == 2:
            if self.kind == "gradient":  # finite here, infinite slope
                value = value + (value - value.detach()).abs().sqrt()
            else:
                value = value + float(self.kind)  # the gradient alone would look fine
        return Loss(value, {})


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_numbers_gone_wrong_stop_the_step_and_change_nothing(kind: str, load_tiny: Callable[[str], Any]) -> None:
    lm, adapter, learner = fresh(load_tiny, budget=16)
    learner.step(GROUPS, Weighted())
    before, moments = adapter.state(), copy.deepcopy(learner.optimizer.state_dict()["state"])
    with torch.no_grad():
        answer = lm.model(torch.tensor([[5, 6, 7]])).logits
    with pytest.raises(TrainingError, match="broken"):
        learner.step(GROUPS, Broken(kind))
    assert all(torch.equal(before[name], value) for name, value in adapter.state().items())
    for index, state in learner.optimizer.state_dict()["state"].items():
        assert all(torch.equal(moments[index][key], value) for key, value in state.items())
    with torch.no_grad():
        assert torch.equal(lm.model(torch.tensor([[5, 6, 7]])).logits, answer)
    # The next good step is as if the bad one had never been.
    learner.step(GROUPS, Weighted())
    _, twin_adapter, twin = fresh(load_tiny, budget=16)
    for _ in range(2):
        twin.step(GROUPS, Weighted())
    assert all(torch.equal(twin_adapter.state()[name], value) for name, value in adapter.state().items())


def test_gradients_are_scaled_down_to_the_largest_norm(load_tiny: Callable[[str], Any]) -> None:
    _, adapter, learner = fresh(load_tiny, max_grad_norm=1e-3)
    metrics = learner.step(GROUPS, Weighted())
    norm = torch.stack([p.grad.norm() for p in adapter.parameters() if p.grad is not None]).norm()
    assert metrics["grad_norm"] > 0.1
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_a_schedule_scales_the_step(load_tiny: Callable[[str], Any]) -> None:
    moved = {}
    for scale in (0.0, 0.5, 1.0):
        _, adapter, learner = fresh(load_tiny)
        learner.step(GROUPS, Weighted(), scale=scale)
        moved[scale] = torch.cat([v.flatten() for n, v in adapter.state().items() if "lora_B" in n])
    assert not moved[0.0].any()
    assert gap(moved[0.5] * 2, moved[1.0]) < 1e-8


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_on_policy_the_first_steps_ratio_is_one(temperature: float, load_tiny: Callable[[str], Any]) -> None:
    lm, adapter, learner = fresh(load_tiny)
    own = score(lm, numbered(), budget=64, temperature=temperature)
    rows = [tuple(own.logp_BT[b][own.keep_BT[b] > 0].tolist()) for b in range(8)]
    groups, row = [], 0
    for g in GROUPS:
        mine = tuple(rows[row : row + len(g.completions)])
        groups.append(dataclasses.replace(g, old_logp=mine, ref_logp=mine))
        row += len(g.completions)
    first = learner.step(groups, Grpo(), temperature=temperature)
    assert first["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert first["kl_to_start"] == pytest.approx(0.0, abs=1e-5)
    assert first["clip_fraction"] == 0.0
    for _ in range(5):
        later = learner.step(groups, Grpo(), temperature=temperature)
    assert later["kl_to_start"] > 1e-3
    with adapter.off():
        assert gap(score(lm, numbered(), budget=64, temperature=temperature).logp_BT, own.logp_BT) == 0.0


def test_metrics_are_means_over_the_steps_tokens(load_tiny: Callable[[str], Any]) -> None:
    lm, _, learner = fresh(load_tiny, budget=20)
    with torch.no_grad():
        nll = -torch.cat(reference_rows(lm.model)).mean()
    metrics = learner.step(GROUPS, Supervised())
    assert metrics["nll"] == pytest.approx(float(nll), rel=1e-4)


def test_learning_reaches_a_saved_file(load_tiny: Callable[[str], Any], tmp_path: Path) -> None:
    lm, adapter, learner = fresh(load_tiny)
    learner.step(GROUPS, Weighted())
    adapter.save(tmp_path)
    other, twin, _ = fresh(load_tiny)
    twin.load(tmp_path)
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7, 8]])
        assert torch.equal(lm.model(ids).logits, other.model(ids).logits)
