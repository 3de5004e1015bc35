"""Modules of a linear-Gaussian model, where every effect is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.credit.modules import attribute, first_order, inner, interference, layer_groups, norms
from tutelage.errors import InputError

# y = (W0 + sum dW) x, x ~ N(mean, 1). Three traits touch entries of their own; the fourth undoes 0.8 of the first.
MEAN = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
WANTED = torch.tensor([1.0, 0.5, -1.0, 2.0]).double()  # the reward is WANTED . E[y]


def unit(row: int, column: int) -> torch.Tensor:
    found = torch.zeros(4, 4).double()
    found[row, column] = 1.0
    return found


DENSE = {"short": unit(0, 0), "kind": 0.5 * unit(1, 1), "calm": 2.0 * unit(2, 3), "odd": unit(3, 2) - 0.8 * unit(0, 0)}
CHANGES = {name: {"layer": (dense, torch.eye(4).double())} for name, dense in DENSE.items()}
START = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()


def weight(names: frozenset[str]) -> torch.Tensor:
    return START + sum((DENSE[n] for n in sorted(names)), torch.zeros(4, 4).double())


def reward(names: frozenset[str]) -> float:
    return float(WANTED @ weight(names) @ MEAN)


def test_shapley_finds_the_true_additive_effects() -> None:
    """w_out * change * mean_in: 1 * 1 * 1; 0.5 * 0.5 * -2; -1 * 2 * 3; 2 * 1 * 0.5 - 0.8."""
    truth = {"short": 1.0, "kind": -0.5, "calm": -6.0, "odd": 0.2}
    got = attribute(list(DENSE), reward)
    for found in (
        got.shapley,
        got.leave_one_out,
        got.alone,
        first_order({"layer": torch.outer(WANTED, MEAN)}, CHANGES),
    ):
        assert found == pytest.approx(truth, abs=1e-9)
    assert got.evaluations == 16
    assert abs(got.gap) < 1e-6
    assert got.whole - got.empty == pytest.approx(-5.3)


def test_a_sample_of_the_gaussian_gives_them_too() -> None:
    x = MEAN + torch.randn(5000, 4, generator=torch.Generator().manual_seed(1)).double()
    got = attribute(list(DENSE), lambda names: float((x @ weight(names).T @ WANTED).mean()))
    each = {n: float(WANTED @ d @ x.mean(0)) for n, d in DENSE.items()}
    assert got.shapley == pytest.approx(each, abs=1e-6)
    assert got.shapley == pytest.approx({"short": 1.0, "kind": -0.5, "calm": -6.0, "odd": 0.2}, abs=0.2)


def test_a_squared_loss_is_not_additive_and_shapley_halves_each_interaction() -> None:
    """-|W - T|^2 has pairs -2 <dW_i, dW_j>: short and odd, 1.6 in all, 0.8 each; leave-one-out gives both 1.6."""
    target = torch.zeros(4, 4).double()
    got = attribute(list(DENSE), lambda names: -float((weight(names) - target).square().sum()))
    single = {n: -float(d.square().sum() + 2 * (START * d).sum()) for n, d in DENSE.items()}
    extra = {"short": 0.8, "kind": 0.0, "calm": 0.0, "odd": 0.8}
    assert got.alone == pytest.approx(single)
    assert got.shapley == pytest.approx({n: single[n] + extra[n] for n in DENSE}, abs=1e-6)
    assert got.leave_one_out == pytest.approx({n: single[n] + 2 * extra[n] for n in DENSE})
    assert abs(got.gap) < 1e-6


def test_the_interference_by_hand() -> None:
    """Apart: 0. Short and odd: -0.8 / sqrt(1 + 0.64)."""
    wanted = torch.eye(4).double()
    wanted[0, 3] = wanted[3, 0] = -0.8 / math.sqrt(1.64)
    assert torch.allclose(interference(CHANGES), wanted)
    idle = interference({"a": CHANGES["short"], "idle": {"layer": (torch.zeros(4, 1), torch.ones(1, 4))}, "none": {}})
    assert idle.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_factors_say_what_their_products_would(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def change(paths: str, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {
            p: (torch.randn(5, rank, generator=generator), torch.randn(rank, 7, generator=generator)) for p in paths
        }

    one, other = change("pq", 2), change("qr", 3)
    dense = [{p: (b.double() @ a.double()) for p, (b, a) in c.items()} for c in (one, other)]
    assert inner(one, other) == pytest.approx(float((dense[0]["q"] * dense[1]["q"]).sum()), abs=1e-9)
    assert norms(one) == pytest.approx({p: float(d.norm()) for p, d in dense[0].items()})
    flat = [torch.cat([d.get(p, torch.zeros(5, 7)).flatten() for p in "pqr"]) for d in dense]
    cosine = float(torch.nn.functional.cosine_similarity(*flat, dim=0))
    assert float(interference({"a": one, "b": other})[0, 1]) == pytest.approx(cosine, abs=1e-9)
    gradient = {p: torch.randn(5, 7, generator=generator) for p in "pq"}
    truth = sum(float((gradient[p].double() * dense[0][p]).sum()) for p in "pq")
    assert first_order(gradient, {"a": one})["a"] == pytest.approx(truth, abs=1e-9)


def test_more_than_six_are_refused() -> None:
    with pytest.raises(InputError, match="7 players"):
        attribute(list("abcdefg"), lambda _: 0.0)


def test_layers_in_groups_by_hand() -> None:
    paths = [f"model.layers.{n}.{name}" for n in range(10) for name in ("q", "up")] + ["lead"]
    groups = layer_groups(paths, 4)
    assert {name: len(own) for name, own in groups.items()} == {
        "layers 0-2": 6, "layers 3-5": 6, "layers 6-9": 8, "other layers": 1,
    }  # fmt: skip
    assert sorted(p for own in groups.values() for p in own) == sorted(paths)
    assert list(layer_groups(paths[:4], 6)) == ["layer 0", "layer 1"]
    assert layer_groups(paths, 1) == {"all layers": tuple(sorted(paths))}
    got = attribute(list(groups), lambda on: float(sum(len(groups[g]) for g in on)))
    assert got.shapley == pytest.approx({name: float(len(own)) for name, own in groups.items()})
