"""Values and gradients equal to those of TRL's trainers, whose loss code runs here on made-up log-probabilities."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import types
import warnings
from typing import Any

import pytest
import torch
from tests.pair_batches import F64, pair_batch, rows_batch

from tutelage.engines.batch import Batch
from tutelage.objectives.preference import Aot, Dpo, ExoPair, Ipo, IpoPerToken, RobustDpo
from tutelage.objectives.reference_free import Orpo, SimPo
from tutelage.objectives.unpaired import Kto, mismatched_kl

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

BETA = 0.3


def trainer(module: str, name: str) -> Any:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(pytest.importorskip(module), name)


def pairs() -> Batch:
    """Three pairs of random log-probabilities and lengths, all with a hard label."""
    draw = torch.Generator().manual_seed(3)
    logp, ref = (-2.0 * torch.rand(6, 4, generator=draw, dtype=F64) for _ in range(2))
    for row, length in enumerate((4, 2, 1, 3, 2, 4)):
        logp[row, length:] = ref[row, length:] = math.nan
    return pair_batch(logp.tolist(), ref.tolist(), [1.0, 1.0, 1.0])


class Device:
    device = torch.device("cpu")

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    gather_for_metrics = gather


def outputs(logp_BT: torch.Tensor) -> types.SimpleNamespace:
    none = torch.zeros_like(logp_BT).detach()
    return types.SimpleNamespace(log_probs=logp_BT, entropy=none, mean_logits=none, is_top1=none.bool())


class Model:
    training = True

    def __init__(self, logp_BT: torch.Tensor) -> None:
        self.logp_BT = logp_BT

    def __call__(self, **_: object) -> types.SimpleNamespace:
        return outputs(self.logp_BT)


def after_prompt(keep_BT: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(len(keep_BT), 1), keep_BT], 1).long()


def trainer_state(model: Model, **fields: object) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        model=model, accelerator=Device(), aux_loss_enabled=False, precompute_ref_logps=True, beta=BETA,
        _metrics={"train": collections.defaultdict(list)}, _total_train_tokens=0, _tp_size=1, **fields,
    )  # fmt: skip


def trl_dpo(b: Batch, kinds: dict[str, float], smoothing: float) -> torch.Tensor:
    order = [0, 2, 4, 1, 3, 5]  # it wants all chosen rows, then all rejected ones
    model = Model((b.logp_BT * b.keep_BT)[order])
    state = trainer_state(
        model, ld_alpha=None, f_divergence_type="reverse_kl", label_smoothing=smoothing, loss_types=list(kinds),
        loss_weights=list(kinds.values()), use_weighting=False,
    )  # fmt: skip
    mask, ref_B = after_prompt(b.keep_BT[order]), b.ref_logp_BT.sum(-1)
    inputs = {"completion_mask": mask, "input_ids": mask, "attention_mask": mask}
    inputs |= {"ref_chosen_logps": ref_B[0::2], "ref_rejected_logps": ref_B[1::2]}
    loss: torch.Tensor = trainer("trl.trainer.dpo_trainer", "DPOTrainer")._compute_loss(state, model, inputs, False)
    return loss


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, b: Batch, rel: float = 1e-9) -> None:
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=rel)
    (one,), (other,) = (torch.autograd.grad(x, b.logp_BT, retain_graph=True) for x in (ours, theirs))
    assert other.abs().max() > 1e-3
    assert torch.allclose(one, other, rtol=rel, atol=rel)


@pytest.mark.parametrize(
    ("ours", "kind", "smoothing"),
    [
        (Dpo(BETA), "sigmoid", 0.0),
        (IpoPerToken(BETA), "ipo", 0.0),
        (RobustDpo(BETA, flip=0.2), "robust", 0.2),
        (ExoPair(BETA, smoothing=0.05), "exo_pair", 0.05),
        (Aot(BETA), "aot", 0.0),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_pairs_as_trl_has_them(ours: Any, kind: str, smoothing: float) -> None:
    b = pairs()
    rel = 1e-6 if kind == "exo_pair" else 1e-9  # TRL has this smoothing in single precision
    assert_same(ours(b).value, trl_dpo(b, {kind: 1.0}, smoothing), b, rel)


def test_the_sum_over_tokens_is_not_what_trl_calls_ipo() -> None:
    b = pairs()
    assert float(Ipo(BETA)(b).value.detach()) != pytest.approx(float(trl_dpo(b, {"ipo": 1.0}, 0.0).detach()), rel=0.1)


def test_sft_as_trl_has_it_where_replies_are_equally_long() -> None:
    """TRL takes one mean over all chosen tokens, this project one for each reply: equal lengths, equal means."""
    b = pair_batch([[-1.0, -0.5], [-2.0, -0.1], [-0.7, -0.2], [-3.0, math.nan]], [[-1.0, -1.0]] * 4, [1.0, 1.0])
    b = dataclasses.replace(b, ref_logp_BT=b.ref_logp_BT * b.keep_BT)
    model = Model((b.logp_BT * b.keep_BT)[[0, 2, 1, 3]])
    state = trainer_state(
        model, ld_alpha=None, f_divergence_type="reverse_kl", label_smoothing=0.0, loss_types=["sigmoid", "sft"],
        loss_weights=[1.0, 0.7], use_weighting=False,
    )  # fmt: skip
    mask, ref_B = after_prompt(b.keep_BT[[0, 2, 1, 3]]), b.ref_logp_BT.sum(-1)
    inputs = {"completion_mask": mask, "input_ids": mask, "attention_mask": mask}
    inputs |= {"ref_chosen_logps": ref_B[0::2], "ref_rejected_logps": ref_B[1::2]}
    theirs = trainer("trl.trainer.dpo_trainer", "DPOTrainer")._compute_loss(state, model, inputs, False)
    assert_same(Dpo(BETA, sft=0.7)(b).value, theirs, b)


@pytest.mark.parametrize("shift", [0.3, -2.0])
def test_kto_as_trl_has_it(shift: float) -> None:
    """z0 from mismatched rows that gained, and from ones that lost, where it is clamped at 0."""
    labels = [1.0, -1.0, 1.0, -1.0, -1.0]
    draw = torch.Generator().manual_seed(4)
    logp, ref, other = (-2.0 * torch.rand(5, 3, generator=draw, dtype=F64) for _ in range(3))
    b = rows_batch(logp.tolist(), ref.tolist(), labels)
    ones = torch.ones_like(other)
    z0 = mismatched_kl(other + shift, other, ones)
    assert z0 == pytest.approx(max(0.0, 3 * shift))
    model = Model(b.logp_BT)
    policy_B = (other + shift).sum(-1)
    state = trainer_state(
        model, calculate_KL=True, loss_type="kto", desirable_weight=1.5, undesirable_weight=0.7,
        _compute_kl_logps=lambda *_: policy_B,
    )  # fmt: skip
    mask = after_prompt(b.keep_BT)
    inputs = {"completion_mask": mask, "input_ids": mask, "attention_mask": mask, "ref_KL_logps": other.sum(-1)}
    inputs |= {"label": torch.tensor([x > 0 for x in labels]), "ref_logps": ref.sum(-1)}
    theirs = trainer("trl.trainer.kto_trainer", "KTOTrainer")._compute_loss(state, model, inputs, False)
    assert_same(Kto(BETA, desirable=1.5, undesirable=0.7, z0=z0)(b).value, theirs, b)


def test_simpo_as_trl_has_it() -> None:
    b = pairs()
    mean_B = (b.logp_BT * b.keep_BT).sum(-1) / b.keep_BT.sum(-1)
    cpo = trainer("trl.experimental.cpo.cpo_trainer", "CPOTrainer")
    state = types.SimpleNamespace(
        alpha=0.0, accelerator=Device(), loss_type="simpo", simpo_gamma=0.5, beta=2.0, label_smoothing=0.0
    )
    losses_N, _, _ = cpo.cpo_loss(state, mean_B[0::2], mean_B[1::2])
    assert_same(SimPo(beta=2.0, gamma=0.5)(b).value, losses_N.mean(), b)


def test_orpo_as_trl_has_it() -> None:
    """TRL's pull on the odds is subtracted from its imitation, which here is a mean over the reply's tokens."""
    b = pairs()
    mean_B = (b.logp_BT * b.keep_BT).sum(-1) / b.keep_BT.sum(-1)
    orpo = trainer("trl.experimental.orpo.orpo_trainer", "ORPOTrainer")
    pull_N, *_ = orpo.odds_ratio_loss(
        types.SimpleNamespace(beta=BETA, accelerator=Device()), mean_B[0::2], mean_B[1::2]
    )
    assert_same(Orpo(weight=BETA)(b).value, -mean_B[0::2].mean() - pull_N.mean(), b, rel=1e-5)
