"""Full fine-tuning against plain autograd and torch's own AdamW on the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tutelage.errors import ModelError
from tutelage.objectives.supervised import Supervised
from tutelage.policy.full import FullLinear, attach_full
from tutelage.policy.learner import Learner, TrainGroup
from tutelage.policy.model import save_merged

PROMPT, REPLIES = (5, 9, 14), ((30, 7, 22, 41), (8, 6))
ONES = tuple((1.0,) * len(r) for r in REPLIES)
GROUP = TrainGroup(PROMPT, REPLIES, ONES, ONES, ONES)


def plain_steps(folder: Path, steps: int, first_layer: int) -> Any:
    """The same steps by transformers' model, padded rows, and every linear layer's own gradient."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    model.requires_grad_(False)
    trained = [
        module.weight.requires_grad_()
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and path != "lm_head"
        and path != "embed_out"
        and int(path.split("layers.")[1].split(".")[0]) >= first_layer
    ]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        total = torch.zeros(())
        for reply in REPLIES:
            logits = model(torch.tensor([[*PROMPT, *reply]])).logits[0, len(PROMPT) - 1 : -1]
            total = total - logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None]).sum()
        (total / len(REPLIES)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return model


@pytest.mark.parametrize("first_layer", [0, 2])
def test_steps_equal_those_of_plain_autograd(
    first_layer: int, architecture: str, load_tiny: Callable[[str], Any], tiny_dirs: dict[str, Path]
) -> None:
    lm = load_tiny(architecture)
    weights = attach_full(lm.model, first_layer=first_layer)
    learner = Learner(lm, weights, learning_rate=1e-2)
    for _ in range(2):
        learner.step([GROUP], Supervised())
    twin = plain_steps(tiny_dirs[architecture], 2, first_layer)
    ids = torch.tensor([[*PROMPT, *REPLIES[0]]])
    with torch.no_grad():
        assert torch.allclose(lm.model(ids).logits, twin(ids).logits, atol=2e-3)
    moved = [layer.change.abs().max() for layer in weights.layers.values()]
    assert min(moved) > 1e-3, "every matrix is trained"


def test_it_learns_and_the_start_model_stays(load_tiny: Callable[[str], Any]) -> None:
    lm = load_tiny("llama")
    ids = torch.tensor([[*PROMPT, *REPLIES[0]]])
    with torch.no_grad():
        start = lm.model(ids).logits
    weights = attach_full(lm.model)
    learner = Learner(lm, weights, learning_rate=1e-2)
    losses = [learner.step([GROUP], Supervised())["loss"] for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        assert not torch.allclose(lm.model(ids).logits, start, atol=0.1)
        with weights.off():
            assert torch.equal(lm.model(ids).logits, start)
        weights.clear()
        assert torch.equal(lm.model(ids).logits, start)


def test_files_round_trip_and_the_whole_model_exports(load_tiny: Callable[[str], Any], tmp_path: Path) -> None:
    lm = load_tiny("llama")
    weights = attach_full(lm.model, first_layer=1, model_name="tiny")
    Learner(lm, weights, learning_rate=1e-2).step([GROUP], Supervised())
    weights.save(tmp_path / "saved")
    fresh = load_tiny("llama")
    again = attach_full(fresh.model, first_layer=1, model_name="tiny")
    again.load(tmp_path / "saved")
    save_merged(lm, tmp_path / "whole")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    ids = torch.tensor([[*PROMPT, *REPLIES[0]]])
    with torch.no_grad():
        said = lm.model(ids).logits
        assert torch.equal(fresh.model(ids).logits, said)
        assert torch.allclose(exported(ids).logits, said, atol=1e-4)


def test_files_that_do_not_fit_are_refused(load_tiny: Callable[[str], Any], tmp_path: Path) -> None:
    weights = attach_full(load_tiny("llama").model)
    with pytest.raises(ModelError, match="cannot be read"):
        weights.load(tmp_path)
    attach_full(load_tiny("llama").model, first_layer=2).save(tmp_path)
    with pytest.raises(ModelError, match="do not fit"):
        weights.load(tmp_path)
    with pytest.raises(ModelError, match="no linear layer"):
        attach_full(load_tiny("llama").model, targets=["nothing"])


def test_small_steps_are_not_lost_to_bfloat16() -> None:
    """A weight of 1 moves by 2^-12 sixteen times: bfloat16 alone would stay at 1, the sum reaches 1 + 2^-8 rounded."""
    from tutelage.policy.merged import Switch

    base = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(base.weight)
    layer = FullLinear(base, Switch())
    alone = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(32):
        with torch.no_grad():
            layer.change += 2.0**-12
        alone += 2.0**-12
        layer.merge(torch.empty(1), None)
    assert float(alone) == 1.0 and float(layer.merged.detach()) == 1.0 + 2.0**-7
