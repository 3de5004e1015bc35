"""The merged adapter against PEFT's LoRA: outputs, gradients, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cosine_similarity

from tutelage.errors import ModelError
from tutelage.policy.lora import Adapter, LoraLinear, attach
from tutelage.policy.merged import dither, round_down

IDS = torch.tensor([[5, 9, 14, 30, 7, 22, 41], [8, 6, 50, 51, 52, 9, 3]])
RANK, ALPHA = 3, 12.0


def filled(adapter: Adapter, seed: int = 0) -> Adapter:
    """Give B numbers, as training would."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_b.copy_(0.1 * torch.randn(layer.lora_b.shape, generator=random))
    adapter.merge()
    return adapter


def put(lm: Any, **changes: Any) -> Adapter:
    return attach(lm.model, **({"rank": RANK, "alpha": ALPHA, "seed": 1, "model_name": lm.name} | changes))


def plain(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def peft_twin(folder: Path, adapter: Adapter) -> Any:
    """PEFT's own model with the same factors."""
    config = peft.LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.target_names), lora_dropout=0.0
    )
    twin = peft.get_peft_model(plain(folder), config)
    state = {name.replace(".weight", ".default.weight"): value for name, value in adapter.state().items()}
    strange = twin.load_state_dict(state, strict=False).unexpected_keys
    assert not strange
    assert sum("lora_" in name for name, _ in twin.named_parameters()) == len(state)
    return twin


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max())


def test_outputs_and_gradients_equal_pefts(
    architecture: str, load_tiny: Callable[[str], Any], tiny_dirs: dict[str, Path]
) -> None:
    """dA, dB of every layer and dX at the bottom, for a loss that reaches everything."""
    lm = load_tiny(architecture)
    adapter = filled(put(lm))
    twin = peft_twin(tiny_dirs[architecture], adapter)
    weight = torch.randn(2, 7, 300, generator=torch.Generator().manual_seed(2))
    grads, outs = [], []
    for model in (lm.model, twin):
        x = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
        out = model(inputs_embeds=x, use_cache=False).logits
        (out.log_softmax(-1) * weight).sum().backward()
        outs.append(out)
        grads.append(x.grad)
    assert gap(*outs) < 1e-4
    pairs = [("dX", *grads)]
    theirs = dict(twin.named_parameters())
    for path, layer in adapter.layers.items():
        pairs.append((f"{path} dA", layer.lora_a.grad, theirs[f"base_model.model.{path}.lora_A.default.weight"].grad))
        pairs.append((f"{path} dB", layer.lora_b.grad, theirs[f"base_model.model.{path}.lora_B.default.weight"].grad))
    for name, ours, wanted in pairs:
        assert gap(ours, wanted) < 1e-4 * max(1.0, float(wanted.abs().max())), name
        assert cosine_similarity(ours.flatten(), wanted.flatten(), dim=0) > 0.9999, name
    frozen = [n for n, p in lm.model.named_parameters() if p.grad is not None and "lora_" not in n]
    assert not frozen


def test_one_layer_by_hand() -> None:
    """W = [[1, 2]], A = [[1, -1]], B = [[3]], s = 2/1: W + s B A = [[7, -4]]."""
    base = nn.Linear(2, 1)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0]]))
        base.bias.copy_(torch.tensor([0.5]))
    holder = nn.Sequential(base)
    adapter = attach(holder, rank=1, alpha=2.0, seed=0)
    (layer,) = adapter.layers.values()
    with torch.no_grad():
        layer.lora_a.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_b.copy_(torch.tensor([[3.0]]))
    adapter.merge()
    assert layer.merged.tolist() == [[7.0, -4.0]]
    x = torch.tensor([[2.0, 1.0]], requires_grad=True)
    y = holder(x)
    assert y.item() == 7 * 2 - 4 * 1 + 0.5
    (5.0 * y).sum().backward()  # dY = 5
    assert x.grad is not None and layer.lora_a.grad is not None and layer.lora_b.grad is not None
    assert x.grad.tolist() == [[35.0, -20.0]]  # dY (W + s B A)
    assert layer.lora_a.grad.tolist() == [[60.0, 30.0]]  # s B^T dY X = 2 * 3 * 5 * (2, 1)
    assert layer.lora_b.grad.tolist() == [[10.0]]  # s dY (A X) = 2 * 5 * (2 - 1)


def test_a_new_adapter_changes_nothing_and_its_seed_decides_it(load_tiny: Callable[[str], Any]) -> None:
    lm, same, other = load_tiny("llama"), load_tiny("llama"), load_tiny("llama")
    with torch.no_grad():
        before = lm.model(IDS).logits
        one, two, three = put(lm), put(same), put(other, seed=2)
        assert torch.equal(lm.model(IDS).logits, before)
    for name, value in one.state().items():
        assert torch.equal(value, two.state()[name])
        if "lora_A" in name:
            assert not torch.equal(value, three.state()[name])
            bound = value.shape[1] ** -0.5  # Kaiming, a = sqrt 5: uniform within 1 / sqrt(inputs)
            assert 0.8 * bound < float(value.abs().max()) <= bound
        else:
            assert not value.any()


def test_off_is_the_start_model_to_the_bit(load_tiny: Callable[[str], Any], tiny_lm: Any) -> None:
    lm = load_tiny("llama")
    adapter = filled(put(lm))
    with torch.no_grad():
        start, adapted = tiny_lm.model(IDS).logits, lm.model(IDS).logits
        assert gap(start, adapted) > 0.1
        with adapter.off():
            assert torch.equal(lm.model(IDS).logits, start)
            with adapter.off():
                pass
            assert torch.equal(lm.model(IDS).logits, start)
        assert torch.equal(lm.model(IDS).logits, adapted)
        with pytest.raises(KeyError), adapter.off():
            raise KeyError
        assert torch.equal(lm.model(IDS).logits, adapted)


def test_cleared_it_is_the_start_model_to_the_bit(load_tiny: Callable[[str], Any], tiny_lm: Any) -> None:
    lm = load_tiny("llama")
    adapter = filled(put(lm))
    adapter.clear()
    with torch.no_grad():
        assert torch.equal(lm.model(IDS, use_cache=False).logits, tiny_lm.model(IDS, use_cache=False).logits)


def test_the_file_loads_in_peft_with_equal_logits(
    architecture: str, load_tiny: Callable[[str], Any], tiny_dirs: dict[str, Path], tmp_path: Path
) -> None:
    lm = load_tiny(architecture)
    filled(put(lm)).save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain(tiny_dirs[architecture]), tmp_path)
    with torch.no_grad():
        assert gap(lm.model(IDS).logits, theirs(IDS).logits) < 1e-4
        with theirs.disable_adapter():
            assert gap(lm.model(IDS).logits, theirs(IDS).logits) > 0.01


def test_pefts_file_loads_here(load_tiny: Callable[[str], Any], tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    source = filled(put(load_tiny("llama")), seed=4)
    twin = peft_twin(tiny_dirs["llama"], source)
    twin.save_pretrained(tmp_path)
    lm = load_tiny("llama")
    put(lm, seed=9).load(tmp_path)
    with torch.no_grad():
        assert gap(lm.model(IDS).logits, twin(IDS).logits) < 1e-4


@pytest.mark.parametrize(
    "changes", [{"rank": 2}, {"targets": ["q_proj"]}, {"targets": ["q_proj", "down_proj"], "rank": 4}]
)
def test_factors_that_do_not_fit_are_refused_and_nothing_changes(
    changes: dict[str, Any], load_tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    filled(put(load_tiny("llama"), **changes)).save(tmp_path)
    adapter = filled(put(load_tiny("llama")), seed=5)
    before = adapter.state()
    with pytest.raises(ModelError, match="does not fit"):
        adapter.load(tmp_path)
    assert all(torch.equal(before[name], value) for name, value in adapter.state().items())


def test_a_folder_without_an_adapter_is_refused(load_tiny: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no adapter"):
        put(load_tiny("llama")).load(tmp_path)


def test_a_damaged_adapter_file_is_refused(load_tiny: Callable[[str], Any], tmp_path: Path) -> None:
    adapter = put(load_tiny("llama"))
    adapter.save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError):
        adapter.load(tmp_path)


def test_another_alpha_is_not_taken_over_in_silence(load_tiny: Callable[[str], Any], tmp_path: Path) -> None:
    """The scale is alpha / rank: factors trained at another alpha are another model."""
    source = load_tiny("llama")
    filled(put(source, alpha=6.0)).save(tmp_path)
    lm = load_tiny("llama")
    adapter = put(lm)
    try:
        adapter.load(tmp_path)
    except ModelError as error:
        assert "alpha" in str(error)  # noqa: PT017 (refusing and honouring it are both right)
        return
    with torch.no_grad():
        distance = gap(lm.model(IDS).logits, source.model(IDS).logits)
    assert distance < 1e-4


def test_only_the_targets_are_adapted(load_tiny: Callable[[str], Any]) -> None:
    model = load_tiny("llama").model
    adapter = attach(model, rank=2, alpha=4.0, seed=0, targets=["q_proj", "up_proj"])
    adapted = {path for path, module in model.named_modules() if isinstance(module, LoraLinear)}
    assert adapted == set(adapter.layers) and len(adapted) == 2 * 3
    assert {path.rsplit(".", 1)[-1] for path in adapted} == {"q_proj", "up_proj"}
    assert adapter.target_names == ("q_proj", "up_proj")
    assert len(adapter.parameters()) == 12
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter.parameters()}


def test_by_default_every_linear_layer_but_the_head(architecture: str, load_tiny: Callable[[str], Any]) -> None:
    model = load_tiny(architecture).model
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = {path for path in linears if model.get_submodule(path) is model.get_output_embeddings()}
    assert len(head) == 1
    assert set(put(type("Named", (), {"model": model, "name": "m"})).layers) == linears - head


def test_an_unknown_target_names_the_key_and_what_there_is(load_tiny: Callable[[str], Any]) -> None:
    with pytest.raises(ModelError) as caught:
        put(load_tiny("llama"), targets=["qproj"])
    assert "qproj" in str(caught.value)
    assert "q_proj" in caught.value.expected
    assert "lora.targets" in caught.value.fix  # the recipe's key


def test_a_bfloat16_weight_is_merged_in_float32() -> None:
    random = torch.Generator().manual_seed(0)
    base = nn.Linear(16, 8, bias=False).to(torch.bfloat16)
    adapter = filled(attach(nn.Sequential(base), rank=2, alpha=2.0, seed=0))
    (layer,) = adapter.layers.values()
    wanted = base.weight.float() + layer.lora_b @ layer.lora_a
    assert layer.lora_a.dtype == torch.float32
    assert (layer.merged.float() - wanted).abs().max() <= 2.0**-8 * wanted.abs().max() * 2  # one last bit
    x = torch.randn(3, 16, generator=random).bfloat16()
    assert adapter.layers["0"](x).dtype == torch.bfloat16


def test_peft_adapts_the_same_layers(
    load_tiny: Callable[[str], Any], tiny_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """Also where some layers of a name are left out."""
    adapter = put(load_tiny("llama"), targets=["v_proj", "down_proj"], first_layer=1)
    assert sorted(adapter.layers) == sorted(
        f"model.layers.{n}.{name}" for n in (1, 2) for name in ("self_attn.v_proj", "mlp.down_proj")
    )
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    theirs = peft.PeftModel.from_pretrained(plain(tiny_dirs["llama"]), tmp_path)
    names = {n.split(".lora_")[0] for n, _ in theirs.named_parameters() if "lora_" in n}
    assert names == {f"base_model.model.{path}" for path in adapter.layers}


def test_aimed_rows_look_where_they_are_told_and_change_no_output(load_tiny: Callable[[str], Any]) -> None:
    lm = load_tiny("llama")
    adapter = put(lm)
    with torch.no_grad():
        before, path = lm.model(IDS).logits, "model.layers.1.self_attn.q_proj"
        rest = adapter.layers[path].lora_a[2:].clone()
        adapter.aim({path: torch.eye(48)[:2], "no.such.layer": torch.eye(48)})
        assert torch.equal(adapter.layers[path].lora_a[:2], torch.eye(48)[:2])
        assert torch.equal(adapter.layers[path].lora_a[2:], rest)
        assert torch.equal(lm.model(IDS).logits, before)
        adapter.aim({path: torch.eye(48)})  # more rows than the rank: the first ones count
        assert torch.equal(adapter.layers[path].lora_a, torch.eye(48)[:RANK])


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.8])
def test_a_change_below_the_last_bit_of_bfloat16_arrives_as_a_share_of_the_weights(share: float) -> None:
    """Weights of 1 to 2 have a last bit of 2^-7. Plain rounding would give nothing below 0.5 and all above."""
    weights = (1.0 + torch.arange(64 * 64) % 128 / 128).to(torch.bfloat16).view(64, 64)
    wide = weights.float() + share / 128
    round_down(wide.view(-1).view(torch.int32), dither(wide.device))
    moved = (wide - weights.float()) * 128
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert moved.mean().item() == pytest.approx(share, abs=0.002)
    rows = moved.mean(1)  # what a product of one row with ones sees
    assert (rows - share).abs().max() < 0.05
    assert torch.equal(wide.to(torch.bfloat16).float(), wide)  # nothing is left to round


@given(st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=30))
def test_what_bfloat16_holds_stays_and_rounding_never_moves_by_a_whole_bit(values: list[float]) -> None:
    held = torch.tensor(values).to(torch.bfloat16).float()
    for wide in (held.clone(), torch.tensor(values)):
        before = wide.clone()
        round_down(wide.view(torch.int32), dither(wide.device))
        assert ((wide - before).abs() <= before.abs() * 2.0**-7 + 1e-38).all()
    same = held.clone()
    round_down(same.view(torch.int32), dither(same.device))
    assert torch.equal(same, held)


def test_a_small_first_step_moves_a_bfloat16_layer() -> None:
    """A change of a hundredth of the weights' last bits: the merged layer's output moves by it, in sum."""
    torch.manual_seed(0)
    base = torch.nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        base.weight.copy_(torch.rand(256, 256) * 0.05 + 0.07)
    before = base.weight.detach().float().clone()
    lm = torch.nn.Sequential(base)
    adapter = attach(lm, rank=4, alpha=4, seed=0, first_layer=0)
    (layer,) = adapter.layers.values()
    with torch.no_grad():
        layer.lora_a.fill_(0.01)
        layer.lora_b.fill_(0.0002)  # 4 * 0.01 * 0.0002 = 8e-6, where a last bit is 2^-11 = 4.9e-4
    adapter.merge()
    change = (layer.merged.float() - before).mean().item()
    assert change == pytest.approx(8e-6, rel=0.05)


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 4}}, {"use_dora": True}])
def test_an_adapter_scaled_otherwise_is_refused_not_misread(
    change: dict[str, Any], load_tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    adapter = filled(put(load_tiny("llama")))
    adapter.save(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(ModelError, match=next(iter(change))):
        put(load_tiny("llama")).load(tmp_path)
