"""Every loss by hand, value and gradient, and against TRL's own arithmetic."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import math
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.loss_batches import F64, LN2, batch, slope

from tutelage.engines.batch import Batch
from tutelage.objectives.policy_gradient import Dapo, DrGrpo, Grpo, Reinforce, ReinforcePlusPlus, Rloo
from tutelage.objectives.ppo import Ppo
from tutelage.objectives.weighted import CispoCap, CispoClamp, Gspo

LN15 = math.log(1.5)
K3 = 0.5 * (1 - LN2)  # beta = 0.5 times k3 of the first token, d = ln 2; its slope is 0.5 * (1 - 2) = -0.5


def three() -> Batch:
    """Ratios 1 and 1.5 with A = 2, and 0.5 with A = -1, log-probs -1.5 + ln ratio; the padding holds rubbish."""
    return batch(
        [[1.0, 1.5], [0.5, 7.0]],
        [[2.0, 2.0], [-1.0, 9.0]],
        gap_BT=[[LN2, 0.0], [0.0, 3.0]],
        keep_BT=[[1.0, 1.0], [1.0, 0.0]],
    )


def with_values(b: Batch, value: list[list[float]], old: list[list[float]], returns: list[list[float]]) -> Batch:
    made = [torch.tensor(x, dtype=F64) for x in (value, old, returns)]
    return dataclasses.replace(b, value_BT=made[0].requires_grad_(True), old_value_BT=made[1], return_BT=made[2])


BY_HAND: list[tuple[Any, float, list[float]]] = [
    # -1/2 [ 2(-1.5) + 2(-1.5 + ln 1.5) - (-1.5 + ln 0.5) - K3 ]; slopes -1/2 (2 + 0.5), -1/2 * 2, -1/2 * -1
    (Reinforce(kl=0.5), -0.5 * (-6 + 2 * LN15 + 1.5 + LN2 - K3), [-1.25, -1.0, 0.5]),
    # gains 2, 1.2 * 2 (clipped), 0.8 * -1 (clipped), over B L_max = 2 * 4
    (DrGrpo(clip=0.2, kl=0.5, longest=4), -(2 + 2.4 - 0.8 - K3) / 8, [-2.5 / 8, 0.0, 0.0]),
    # the upper clip is 1.28, over 3 tokens
    (Dapo(clip=0.2, kl=0.5), -(2 + 2.56 - 0.8 - K3) / 3, [-2.5 / 3, 0.0, 0.0]),
    (Dapo(clip=0.2, kl=0.5, clip_high=0.6), -(2 + 3 - 0.8 - K3) / 3, [-2.5 / 3, -1.0, 0.0]),  # 1.5 * 2 / 3
    (ReinforcePlusPlus(clip=0.2, kl=0.5, kl_estimator="k3"), -(2 + 2.4 - 0.8 - K3) / 3, [-2.5 / 3, 0.0, 0.0]),
    # the divergence is in the reward: nothing of it here
    (ReinforcePlusPlus(clip=0.2, kl=0.5), -(2 + 2.4 - 0.8) / 3, [-2 / 3, 0.0, 0.0]),
    # s = sqrt 1.5 = 1.2247 and 0.5: the first within 1.3, the second below 0.7 and blamed
    (
        Gspo(kl=0.5, clip_low=0.3, clip_high=0.3),
        -0.5 * ((4 * math.sqrt(1.5) - K3) / 2 - 0.7),
        [-0.5 * math.sqrt(1.5) - 0.125, -0.5 * math.sqrt(1.5), 0.0],
    ),
    # weights 1, 1.2, 0.5 beside log pi
    (
        CispoCap(kl=0.5, cap=1.2),
        -(2 * -1.5 + 2.4 * (LN15 - 1.5) - 0.5 * (-1.5 - LN2) - K3) / 3,
        [-2.5 / 3, -0.8, 0.5 / 3],
    ),
    # weights 1, 1.2, 0.8
    (
        CispoClamp(kl=0.5, clip_low=0.2, clip_high=0.2),
        -(2 * -1.5 + 2.4 * (LN15 - 1.5) - 0.8 * (-1.5 - LN2) - K3) / 3,
        [-2.5 / 3, -0.8, 0.8 / 3],
    ),
    # no lower bound by default: 0.5 stays
    (
        CispoClamp(kl=0.5),
        -(2 * -1.5 + 2.4 * (LN15 - 1.5) - 0.5 * (-1.5 - LN2) - K3) / 3,
        [-2.5 / 3, -0.8, 0.5 / 3],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "value", "grad"), BY_HAND, ids=lambda o: getattr(o, "name", ""))
def test_by_hand(objective: Any, value: float, grad: list[float]) -> None:
    got, slopes = slope(objective, three())
    assert got == pytest.approx(value)
    assert [*slopes[0], slopes[1][0]] == pytest.approx(grad)
    assert slopes[1][1] == 0.0


@pytest.mark.parametrize(
    ("estimator", "value", "grad"),
    [
        ("k1-reward", 0.0, 0.0),
        ("k2", 0.5 * LN2**2, -LN2),  # (log pi - log ref)^2 / 2, slope log pi - log ref
        ("k3", 1 - LN2, -1.0),
        # rho k3 with rho 1.5: slope rho (k3 + 1 - e^d) = rho (log pi - log ref)
        ("k3-weighted", 1.5 * (1 - LN2), -1.5 * LN2),
    ],
)
@pytest.mark.parametrize("objective", [b[0] for b in BY_HAND] + [Grpo(), Rloo()], ids=lambda o: o.name)
def test_every_objective_takes_every_estimator(objective: Any, estimator: Any, value: float, grad: float) -> None:
    """One reply of one token, ratio 1.5, d = ln 2: with and without the term, the difference is the term."""
    b = batch([[1.5]], [[1.0]], gap_BT=[[LN2]])
    with_it = slope(dataclasses.replace(objective, kl=0.5, kl_estimator=estimator), b)
    without = slope(dataclasses.replace(objective, kl=0.0, kl_estimator=estimator), b)
    share = 1 / objective.longest if isinstance(objective, DrGrpo) else 1.0
    assert with_it[0] - without[0] == pytest.approx(0.5 * value * share)
    assert with_it[1][0][0] - without[1][0][0] == pytest.approx(0.5 * grad * share)


def test_ppo_by_hand() -> None:
    """Policy as in GRPO's clip: gains 2, 2.4 over two tokens.

    Values 1, 0.5 were 0.5, 0.5; returns 2, 0. First: max((1-2)^2, (0.7-2)^2) = 1.69, clipped, no slope.
    Second: 0.25, slope 2 * 0.5. With weight 0.5: 0.5/(2*2) (1.69 + 0.25) = 0.2425, slope 0.5/(2*2) * 1.
    """
    b = with_values(batch([[1.0, 1.5]], [[2.0, 2.0]]), [[1.0, 0.5]], [[0.5, 0.5]], [[2.0, 0.0]])
    loss = Ppo(clip=0.2, kl=0.5)(b)
    assert float(loss.value.detach()) == pytest.approx(-2.2 + 0.2425)
    logp, value = torch.autograd.grad(loss.value, [b.logp_BT, b.value_BT])  # type: ignore[list-item]
    assert logp[0].tolist() == pytest.approx([-1.0, 0.0])
    assert value[0].tolist() == pytest.approx([0.0, 0.125])
    assert loss.sums["value_error"] == pytest.approx(1.25)
    assert loss.sums["value_clip_fraction"] == 1.0
    with pytest.raises(ValueError, match="values"):
        Ppo()(batch([[1.0]], [[1.0]]))


def test_the_padding_of_values_does_not_count() -> None:
    keep = [[1.0, 1.0], [1.0, 0.0]]
    b = with_values(batch([[1.0, 1.0], [1.0, 1.0]], [[0.0] * 2] * 2, keep_BT=keep), [[0.0] * 2, [0.0, 9.0]], [[0.0] * 2] * 2,
                    [[1.0, 1.0], [1.0, 7.0]])  # fmt: skip
    loss = Ppo()(b)
    assert float(loss.value.detach()) == pytest.approx(0.25)  # 0.5/(2*3) * 3 errors of 1
    (grad,) = torch.autograd.grad(loss.value, [b.value_BT])  # type: ignore[list-item]
    assert grad[1, 1] == 0.0


def test_clipped_tokens_are_counted() -> None:
    assert Dapo(clip=0.2, clip_high=0.6)(three()).sums["clip_fraction"] == 1.0  # 0.5 is below 0.8, 1.5 is inside
    assert Gspo()(three()).sums["clip_fraction"] == 3.0
    assert CispoCap(cap=1.2)(three()).sums["clip_fraction"] == 1.0
    assert CispoClamp(clip_low=0.4)(three()).sums["clip_fraction"] == 2.0
    assert "clip_fraction" not in Reinforce()(three()).sums


@pytest.mark.parametrize("objective", [b[0] for b in BY_HAND], ids=lambda o: o.name)
def test_parts_of_a_step_add_up_to_the_whole(objective: Any) -> None:
    ratio, advantage = [[1.0, 1.3], [0.9, 0.6], [1.1, 1.0]], [[1.0, 0.5], [-1.0, -0.2], [0.3, 0.3]]
    gap = [[0.1, -0.2], [0.3, 0.0], [0.0, 0.4]]
    whole, grad = slope(objective, batch(ratio, advantage, gap_BT=gap))
    parts = [
        slope(objective, batch(ratio[i:j], advantage[i:j], gap_BT=gap[i:j], rows=3, tokens=6))
        for i, j in ((0, 1), (1, 3))
    ]
    assert sum(p[0] for p in parts) == pytest.approx(whole)
    for got, wanted in zip(parts[0][1] + parts[1][1], grad, strict=True):
        assert got == pytest.approx(wanted)


@pytest.mark.parametrize("objective", [b[0] for b in BY_HAND], ids=lambda o: o.name)
def test_a_runaway_ratio_stays_finite(objective: Any) -> None:
    b = batch([[1.0, 1.0]], [[1.0, -1.0]])
    far = dataclasses.replace(b, old_logp_BT=b.old_logp_BT - 500.0, ref_logp_BT=b.ref_logp_BT - 500.0)
    assert math.isfinite(slope(objective, far)[0])


def test_on_policy_gspo_has_the_gradient_of_grpo() -> None:
    b = batch([[1.0, 1.0, 1.0], [1.0] * 3], [[1.0] * 3, [-2.0] * 3], keep_BT=[[1.0] * 3, [1.0, 1.0, 0.0]])
    assert slope(Gspo(kl=0.0), b)[1] == slope(Grpo(kl=0.0), b)[1]


# ---- TRL -------------------------------------------------------------------------------------


@functools.cache
def trls(file: str) -> Any:
    """The `_compute_loss` of a trainer of the installed TRL, without importing all that stands beside it."""
    pytest.importorskip("trl")
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "trainer" / file).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "_compute_loss":
            names: dict[str, Any] = {"torch": torch, "math": math, "nanmin": torch.min, "nanmax": torch.max}
            exec(textwrap.dedent(ast.get_source_segment(source, node) or ""), names)  # noqa: S102
            return names["_compute_loss"]
    raise AssertionError(f"TRL's {file} has no _compute_loss")


def trl_loss(
    b: Batch, file: str = "grpo_trainer.py", *, weight: torch.Tensor | None = None, beta: float = 0.3, **more: Any
) -> Any:
    """TRL's loss of our batch: log-probs are handed over where TRL would ask its model."""
    settings = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
    } | more
    bias = settings.pop("bias", False)
    me = SimpleNamespace(
        **settings,
        beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=bias, delta=None, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (b.logp_BT, torch.zeros_like(b.logp_BT), None),
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x, gather_for_metrics=lambda x: x),
        _metrics={"eval": defaultdict(list)},
        max_completion_length=4, current_gradient_accumulation_steps=1, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, aux_loss_enabled=False, _entropy_bonus_enabled=False,
        use_vllm=weight is not None, vllm_importance_sampling_correction=weight is not None,
    )  # fmt: skip
    empty = torch.zeros(len(b.logp_BT), 0)
    inputs = {
        "prompt_ids": empty, "prompt_mask": empty, "completion_ids": b.logp_BT, "completion_mask": b.keep_BT,
        "advantages": b.advantage_BT[:, 0], "old_per_token_logps": b.old_logp_BT, "ref_per_token_logps": b.ref_logp_BT,
        "num_items_in_batch": b.keep_BT.sum(), "importance_sampling_ratio": weight,
        "old_logps": (b.old_logp_BT * b.keep_BT).sum(-1),
    }  # fmt: skip
    value = trls(file)(me, None, inputs)
    (grad,) = torch.autograd.grad(value, b.logp_BT)
    return value.detach(), grad


def drawn(seed: int) -> Batch:
    """Four replies of up to four tokens, one advantage each, ratios well beyond the clip."""
    random = torch.Generator().manual_seed(seed)
    keep = (torch.arange(4)[None] < torch.tensor([4, 2, 3, 1])[:, None]).to(F64)
    old = torch.rand(4, 4, generator=random, dtype=F64) - 2.0
    logp = (old + 0.3 * torch.randn(4, 4, generator=random, dtype=F64)).requires_grad_(True)
    ref = old + 0.3 * torch.randn(4, 4, generator=random, dtype=F64)
    advantage = torch.randn(4, 1, generator=random, dtype=F64).expand(4, 4)
    return Batch(logp, keep, old, ref, advantage, 4, int(keep.sum()))


TRL: list[tuple[Any, dict[str, Any]]] = [
    (Grpo(0.2, 0.3), {}),
    (Grpo(0.2, 0.3, "k3-weighted"), {"bias": True}),
    (DrGrpo(0.2, 0.3, 4), {"loss_type": "dr_grpo"}),
    (Dapo(0.2, 0.3), {"loss_type": "dapo", "epsilon_high": 0.28}),
    (ReinforcePlusPlus(0.2, 0.3, "k3"), {"loss_type": "dapo"}),
    (CispoCap(0.3, 1.3), {"loss_type": "cispo", "epsilon_high": 1.3}),
    (Gspo(0.3, 0.05, 0.1), {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "settings"), TRL, ids=lambda x: getattr(x, "name", ""))
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_is_trls(objective: Any, settings: dict[str, Any], seed: int) -> None:
    b = drawn(seed)
    value, grad = trl_loss(b, **settings)
    got, slopes = slope(objective, b)
    assert got == pytest.approx(float(value), rel=1e-12)
    assert torch.allclose(torch.tensor(slopes, dtype=F64), grad, atol=1e-14)
    assert float(grad.abs().max()) > 0.01


def test_importance_weights_on_the_advantage_are_trls_on_the_loss() -> None:
    b = drawn(3)
    weight = torch.rand(4, 4, generator=torch.Generator().manual_seed(4), dtype=F64) + 0.5
    value, grad = trl_loss(b, weight=weight)
    got, slopes = slope(Grpo(0.2, 0.3), dataclasses.replace(b, advantage_BT=b.advantage_BT * weight))
    assert got == pytest.approx(float(value), rel=1e-12)
    assert torch.allclose(torch.tensor(slopes, dtype=F64), grad, atol=1e-14)


def test_rloos_gradient_is_trls() -> None:
    b = drawn(5)
    _, grad = trl_loss(b, "rloo_trainer.py")
    _, slopes = slope(Rloo(0.2, 0.0), b)
    assert torch.allclose(torch.tensor(slopes, dtype=F64), grad, atol=1e-14)
