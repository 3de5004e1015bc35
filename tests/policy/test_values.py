"""The value head: what it reads, what it leaves alone, and that a resumed run is bit-equal."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_world import World

from tutelage.engines.batch import Batch, Loss
from tutelage.engines.packing import Group
from tutelage.errors import StoreError, TrainingError
from tutelage.objectives.ppo import Ppo
from tutelage.policy.learner import Learner, TrainGroup, score
from tutelage.policy.lora import attach
from tutelage.policy.values import ValueHead

pytest_plugins = ["tests.tiny_world"]

TOKENS = ((10, 11, 12), (20, 21))


def group(returns: tuple[tuple[float, ...], ...]) -> TrainGroup:
    none = tuple((0.0,) * len(t) for t in TOKENS)
    olds = tuple((-5.0,) * len(t) for t in TOKENS)
    return TrainGroup((5, 6, 7), TOKENS, none, olds, olds, (), none, returns)


WANTED = ((1.0, 2.0, 3.0), (1.0, 0.5))  # the first token of both is foreseen from one state


def made(load: Callable[[str], Any], **more: Any) -> tuple[Any, Any, ValueHead, Learner]:
    lm = load("llama")
    adapter = attach(lm.model, rank=2, alpha=8.0, seed=1)
    head = ValueHead(lm.head_VD.shape[1])
    return (
        lm,
        adapter,
        head,
        Learner(lm, adapter, learning_rate=1e-3, values=head, **({"value_learning_rate": 0.05} | more)),
    )


@torch.no_grad()
def test_a_fresh_head_expects_nothing_and_any_scale_of_states_reads_the_same() -> None:
    head = ValueHead(4)
    states = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert head(states).tolist() == [0.0]
    with torch.no_grad():
        head.weight_D.copy_(torch.tensor([1.0, 0.0, 0.0, 2.0]))
        head.bias.fill_(0.5)
    # mean 2.5, deviation sqrt(1.25): -1.3416, ..., 1.3416
    assert float(head(states)) == pytest.approx(0.5 - 1.34164 + 2 * 1.34164, abs=1e-4)
    assert float(head(states / 0.7)) == pytest.approx(float(head(states)), abs=1e-4)
    head.clear()
    assert not any(p.any() for p in head.parameters())


def test_the_head_learns_returns_and_teaches_the_states_nothing(load_tiny: Callable[[str], Any]) -> None:
    lm, adapter, head, learner = made(load_tiny)
    before = {k: v.clone() for k, v in adapter.state().items()}
    errors = [learner.step([group(WANTED)], Ppo(kl=0.0, value_clip=100.0))["value_error"] for _ in range(60)]
    assert errors[0] == pytest.approx((1 + 4 + 9 + 1 + 0.25) / 5)
    assert errors[-1] < 0.05 * errors[0]
    assert all(torch.equal(before[k], v) for k, v in adapter.state().items())  # advantages were zero
    rows = [Group((5, 6, 7), TOKENS, (0, 1))]
    read = score(lm, rows, budget=64, values=head).value_BT
    assert read is not None
    assert torch.allclose(read, torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.5, 0.0]]), atol=0.3)
    assert score(lm, rows, budget=64).value_BT is None


def test_the_head_does_not_change_the_policys_step(load_tiny: Callable[[str], Any]) -> None:
    """Its gradients are scaled on their own: the adapter moves bit for bit as without it."""
    ends = []
    for weight in (1e-6, 100.0):
        _, adapter, _, learner = made(load_tiny)
        some = dataclasses.replace(group(WANTED), advantage=((1.0, 1.0, 1.0), (-1.0, -1.0)))
        found = learner.step([some], Ppo(kl=0.0, value_weight=weight))
        assert found["value_grad_norm"] > 0
        ends.append(adapter.state())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


@dataclasses.dataclass
class Broken:
    """Finite in value, with an infinite slope for the head alone."""

    name: str = "broken"

    def __call__(self, batch: Batch) -> Loss:
        assert batch.value_BT is not None
        return Loss((batch.value_BT - batch.value_BT.detach()).abs().sqrt().sum() + 0.0 * batch.logp_BT.sum(), {})


@pytest.mark.parametrize("wrong", ["returns", "slope"])
def test_a_head_gone_wrong_stops_the_step_and_changes_nothing(wrong: str, load_tiny: Callable[[str], Any]) -> None:
    _, adapter, head, learner = made(load_tiny)
    learner.step([group(WANTED)], Ppo())
    kept = copy.deepcopy((adapter.state(), dict(head.state_dict()), learner.optimizer.state_dict()["state"]))
    bad = group(((float("inf"), 0.0, 0.0), (0.0, 0.0))) if wrong == "returns" else group(WANTED)
    with pytest.raises(TrainingError, match="ppo" if wrong == "returns" else "broken"):
        learner.step([bad], Ppo() if wrong == "returns" else Broken())
    now = (adapter.state(), dict(head.state_dict()), learner.optimizer.state_dict()["state"])
    for old, new in zip(kept[:2], now[:2], strict=True):
        assert all(torch.equal(old[k], new[k]) for k in old)
    for index, state in now[2].items():
        assert all(torch.equal(kept[2][index][k], v) for k, v in state.items())


def test_a_saved_head_is_the_same_and_a_wrong_file_is_refused(tmp_path: Path) -> None:
    head, other = ValueHead(4), ValueHead(4)
    with torch.no_grad():
        head.weight_D.normal_()
        head.bias.fill_(0.25)
    head.save(tmp_path)
    other.load(tmp_path)
    assert torch.equal(head.weight_D, other.weight_D) and torch.equal(head.bias, other.bias)
    with pytest.raises(StoreError, match="holds"):
        ValueHead(5).load(tmp_path)
    (tmp_path / "value_head.safetensors").write_bytes(b"no")
    with pytest.raises(StoreError, match="cannot be read"):
        other.load(tmp_path)


def test_a_resumed_ppo_run_is_bit_equal(new_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut right behind the first round: head, its moments and the policy come back as they were."""
    from tutelage.store.runs import Run

    class Cut(BaseException):
        pass

    world = new_world(update={"objective": "ppo", "learning_rate": 0.01})
    assert world.play(name="whole").code == 3
    rewrite = Run.rewrite_metrics

    def cut(self: Run) -> None:
        if self.ledger.units()[-1]["name"] == "round-1":
            raise Cut
        rewrite(self)

    monkeypatch.setattr(Run, "rewrite_metrics", cut)
    from tutelage.cli import app

    with pytest.raises(Cut):
        app(["run", str(world.recipe), "--runs", str(world.runs), "--name", "cut"], result_action="return_value")
    monkeypatch.setattr(Run, "rewrite_metrics", rewrite)
    assert world.resume(name="cut").code == 3
    assert world.weights("cut") == world.weights("whole")
    heads = [
        {
            p.parent.name: p.read_bytes()
            for p in (world.runs / name / "checkpoints").glob("[!.]*/value_head.safetensors")
        }
        for name in ("whole", "cut")
    ]
    assert heads[0] == heads[1] and sorted(heads[0]) == ["r0", "r1", "r2"]
    assert len({heads[0][v] for v in heads[0]}) == 3  # it learned in every round
    update = [m["values"] for m in world.rows("metrics", "whole") if m["stage"] == "update"]
    assert all({"value_error", "value_clip_fraction", "value_grad_norm", "clip_fraction"} <= set(u) for u in update)
