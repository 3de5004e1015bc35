"""Mixing adapters on their products: by hand, by algebra, and against PEFT where it does the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tutelage.errors import InputError, ModelError
from tutelage.policy.lora import attach
from tutelage.policy.merging import Gates, dare, mix, put_on, ties, truncate
from tutelage.policy.saved import Factors, SavedAdapter

IDS = torch.tensor([[5, 9, 14, 30, 7, 22, 41], [8, 6, 50, 51, 52, 9, 3]])


def made(name: str, seed: int, rank: int = 2, paths: str = "pq", base: str = "m") -> SavedAdapter:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        path: Factors(torch.randn(6, rank, generator=generator), 0.3 * torch.randn(rank, 5, generator=generator))
        for path in paths
    }
    return SavedAdapter(name, base, layers)


def dense_sum(parts: list[SavedAdapter], weights: list[float]) -> dict[str, torch.Tensor]:
    paths = {p for part in parts for p in part.layers}
    return {
        path: sum(
            (w * p.layers[path].dense() for p, w in zip(parts, weights, strict=True) if path in p.layers),
            torch.zeros(6, 5),
        )
        for path in paths
    }


def close(got: SavedAdapter, wanted: dict[str, torch.Tensor], tolerance: float = 1e-5) -> bool:
    assert set(got.layers) == set(wanted)
    return all(torch.allclose(f.dense(), wanted[p], atol=tolerance) for p, f in got.layers.items())


def entry(*values: float) -> torch.Tensor:
    return torch.tensor([list(values)])


# -- sum and soup -----------------------------------------------------------------------------------


def test_the_sum_by_hand() -> None:
    """2 * [[1], [2]] [[3, 4]] - [[1], [1]] [[1, 0]] = [[5, 8], [11, 16]], factors side by side."""
    one = SavedAdapter("one", "m", {"p": Factors(torch.tensor([[1.0], [2.0]]), entry(3.0, 4.0))})
    two = SavedAdapter("two", "m", {"p": Factors(torch.tensor([[1.0], [1.0]]), entry(1.0, 0.0))})
    got = mix("both", [one, two], [2.0, -1.0])
    assert got.adapter.layers["p"].dense().tolist() == [[5.0, 8.0], [11.0, 16.0]]
    assert got.adapter.layers["p"].a_RI.tolist() == [[3.0, 4.0], [1.0, 0.0]]
    assert (got.slices, got.shares, got.error, got.adapter.rank) == (((0, 1), (1, 2)), (2.0, -1.0), 0.0, 2)
    soup = mix("both", [one, two], [3.0, 1.0], "soup")
    assert soup.shares == (0.75, 0.25)
    assert soup.adapter.layers["p"].dense().tolist() == [[2.5, 3.0], [4.75, 6.0]]


@settings(max_examples=30)
@given(seed=st.integers(0, 999), ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_side_by_side_is_the_sum_of_the_products(seed: int, ranks: list[int], data: Any) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 2).map(float), min_size=len(ranks), max_size=len(ranks)))
    layers = data.draw(st.lists(st.sampled_from(["p", "q", "pq"]), min_size=len(ranks), max_size=len(ranks)))
    parts = [made(f"m{k}", seed + k, r, paths) for k, (r, paths) in enumerate(zip(ranks, layers, strict=True))]
    got, cut = mix("x", parts, weights), mix("x", parts, weights, rank=sum(ranks))
    for path, (b, a) in got.adapter.layers.items():
        wanted = sum(
            w * (p.layers[path].b_OR.double() @ p.layers[path].a_RI.double())
            for p, w in zip(parts, weights, strict=True)
            if path in p.layers
        )
        assert float((b.double() @ a.double() - wanted).abs().max()) < 1e-6
        assert torch.allclose(cut.adapter.layers[path].dense().double(), wanted, atol=1e-4)
    assert set(got.adapter.layers) == {path for p in parts for path in p.layers}
    assert cut.error < 1e-6


@pytest.mark.parametrize(("method", "rank"), [("sum", None), ("sum", 2), ("soup", None), ("soup", 2), ("ties", 2)])
def test_half_of_an_adapter_twice_is_that_adapter(method: Any, rank: int | None) -> None:
    one = made("one", 1)
    got = mix("x", [one, one], [0.5, 0.5], method, rank=rank, density=1.0)
    assert close(got.adapter, {p: f.dense() for p, f in one.layers.items()})


def test_summing_factors_would_not_give_that_and_would_mix_what_nobody_trained() -> None:
    one, other = made("one", 1), made("other", 2)
    (b1, a1), (b2, a2) = one.layers["p"], other.layers["p"]
    by_factors = (0.7 * b1 + 0.7 * b1) @ (0.7 * a1 + 0.7 * a1)
    assert torch.allclose(by_factors, 1.96 * (b1 @ a1), atol=1e-5)  # 1.4 was asked for
    assert close(mix("x", [one, one], [0.7, 0.7]).adapter, dense_sum([one, one], [0.7, 0.7]))
    crossed = (b1 + b2) @ (a1 + a2) - (b1 @ a1 + b2 @ a2)
    assert float(crossed.norm()) > 0.5


def test_the_rank_is_kept_and_what_is_lost_is_told() -> None:
    """Singular values 3 and 4 apart: keeping one loses 3 of 5."""
    change = Factors(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.eye(2))
    for form in (change, change.dense()):
        kept, lost, size = truncate(form, 1)
        assert torch.allclose(kept.dense(), torch.tensor([[0.0, 0.0], [0.0, 4.0]]), atol=1e-6)
        assert (lost, size) == (pytest.approx(3.0), pytest.approx(5.0))
        assert truncate(form, 3)[0].rank == 3 and truncate(form, 3)[1] == 0.0
    got = mix("x", [SavedAdapter("a", "m", {"p": change})], [1.0], rank=1)
    assert got.error == pytest.approx(0.6) and got.adapter.rank == 1 and got.slices == ()


@settings(max_examples=25)
@given(seed=st.integers(0, 999), rank=st.integers(1, 5))
def test_no_product_of_that_rank_is_nearer(seed: int, rank: int) -> None:
    """Against the SVD of the written-out matrix, and the error against the distance itself."""
    change = made("a", seed, 4).layers["p"]
    kept, lost, _ = truncate(change, rank)
    u, s, vh = torch.linalg.svd(change.dense(), full_matrices=False)
    assert torch.allclose(kept.dense(), (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-4)
    assert lost == pytest.approx(float((change.dense() - kept.dense()).norm()), abs=1e-4)


# -- TIES and DARE ----------------------------------------------------------------------------------


def test_ties_by_hand() -> None:
    """Trim the smallest of four; mass decides signs + - +; the mean is over those that agree."""
    one, two = entry(4.0, -3.0, 0.1, 2.0), entry(-1.0, -5.0, 3.0, 0.5)
    got = ties([one, two], [1.0, 1.0], density=0.75)
    assert got.tolist() == [[4.0, -4.0, 3.0, 2.0]]
    assert ties([one, two], [1.0, 1.0], density=0.75, scale=0.5).tolist() == [[2.0, -2.0, 1.5, 1.0]]
    assert ties([one, two], [1.0, 1.0], density=0.25).tolist() == [[4.0, -5.0, 0.0, 0.0]]


def test_weights_decide_the_sign_and_count_in_the_mean() -> None:
    """6 * -1 outweighs 4; in the second, (1 * -3 + 6 * -5) / 7."""
    got = ties([entry(4.0, -3.0), entry(-1.0, -5.0)], [1.0, 6.0], density=1.0)
    assert got[0].tolist() == pytest.approx([-1.0, -33 / 7])
    assert torch.allclose(ties([entry(4.0), entry(-1.0)], [1.0, -1.0], density=1.0), entry(2.5))


def test_where_both_signs_weigh_the_same_the_matrix_decides() -> None:
    up = ties([entry(1.0, 2.0, 3.0), entry(-1.0, 2.0, 3.0)], [1.0, 1.0], density=1.0)
    down = ties([entry(1.0, -2.0, -3.0), entry(-1.0, -2.0, -3.0)], [1.0, 1.0], density=1.0)
    assert up.tolist() == [[1.0, 2.0, 3.0]] and down.tolist() == [[-1.0, -2.0, -3.0]]


def test_ties_resolves_the_planted_conflict_where_a_sum_loses_the_trait() -> None:
    """Three traits on entries of their own, a fourth with -0.8 on the first's: the first keeps its 1."""
    traits = [torch.zeros(4, 4) for _ in range(4)]
    for k in range(4):
        traits[k][k, k] = 1.0
    traits[3][0, 0] = -0.8
    got = ties(traits, [1.0] * 4, density=2 / 16)
    assert torch.equal(got, torch.eye(4))
    assert sum(traits)[0, 0] == pytest.approx(0.2)
    parts = [SavedAdapter(str(k), "m", {"p": Factors(t, torch.eye(4))}) for k, t in enumerate(traits)]
    mixed = mix("x", parts, [1.0] * 4, "ties", density=2 / 16, rank=4)
    assert torch.allclose(mixed.adapter.layers["p"].dense(), torch.eye(4), atol=1e-6)


@settings(max_examples=30)
@given(seed=st.integers(0, 999), density=st.sampled_from([0.1, 0.3, 0.5, 0.9]), count=st.integers(1, 4))
def test_ties_is_pefts_where_the_weights_are_equal(seed: int, density: float, count: int) -> None:
    theirs = pytest.importorskip("peft.utils.merge_utils")
    generator = torch.Generator().manual_seed(seed)
    changes = [torch.randn(6, 5, generator=generator) for _ in range(count)]
    wanted = theirs.ties(changes, torch.ones(count), density)
    assert torch.allclose(ties(changes, [1.0] * count, density=density), wanted, atol=1e-6)


def test_dare_keeps_the_mean_and_drops_its_share() -> None:
    change = torch.full((200, 200), 2.0)
    got = dare(change, 0.75, torch.Generator().manual_seed(0))
    assert set(got.unique().tolist()) == {0.0, 8.0}
    assert float((got == 0).float().mean()) == pytest.approx(0.75, abs=0.01)
    assert float(got.mean()) == pytest.approx(2.0, abs=0.1)
    assert torch.equal(dare(change, 0.0, torch.Generator()), change)


def test_every_option_changes_the_mix_and_the_seed_fixes_it() -> None:
    parts = [made("one", 1), made("two", 2)]

    def of(method: Any = "ties", **options: Any) -> torch.Tensor:
        return mix("x", parts, [1.0, 1.0], method, **options).adapter.layers["p"].dense()

    assert not torch.allclose(of(density=0.2), of(density=0.9))
    assert torch.allclose(of(scale=2.0), 2.0 * of(), atol=1e-5)
    assert torch.equal(of("dare", seed=3), of("dare", seed=3))
    assert not torch.allclose(of("dare", seed=3), of("dare", seed=4))
    assert not torch.allclose(of("dare", drop=0.1), of("dare", drop=0.9))
    assert torch.allclose(of("dare", drop=0.0), of("sum"), atol=1e-4)
    assert mix("x", parts, [1.0, 1.0], "ties").adapter.rank == 4
    assert mix("x", parts, [1.0, 1.0], "ties", rank=1).error > 0.1


# -- what is refused --------------------------------------------------------------------------------


def test_another_base_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'one' belongs to m, 'two' to n") as caught:
        mix("x", [made("one", 1), made("two", 2, base="n")], [1.0, 1.0])
    assert caught.value.fix


def test_other_shapes_are_refused() -> None:
    odd = SavedAdapter("odd", "m", {"p": Factors(torch.ones(7, 1), torch.ones(1, 5))})
    with pytest.raises(ModelError, match=r"shape \(7, 5\)"):
        mix("x", [made("one", 1), odd], [1.0, 1.0])


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ([1.0], {}), ([1.0, 0.0], {}), ([1.0, float("nan")], {}), ([2.0, -1.0], {"method": "soup"}),
        ([1.0, 1.0], {"rank": 0}), ([1.0, 1.0], {"density": 0.0}), ([1.0, 1.0], {"drop": 1.0}),
    ],
)  # fmt: skip
def test_numbers_without_sense_are_refused(weights: list[float], options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        mix("x", [made("one", 1), made("two", 2)], weights, **options)


# -- on a model -------------------------------------------------------------------------------------


def trained(lm: Any, folder: Path, seed: int, **changes: Any) -> SavedAdapter:
    """An adapter with numbers in it, saved."""
    model = copy.deepcopy(lm.model)
    adapter = attach(model, **({"rank": 2, "alpha": 6.0, "seed": seed, "model_name": "tiny"} | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_b.copy_(0.05 * torch.randn(layer.lora_b.shape, generator=generator))
    adapter.save(folder)
    return SavedAdapter.read(folder)


@pytest.fixture
def two(tiny_lm: Any, tmp_path: Path) -> list[SavedAdapter]:
    """Of different rank, scale, and layers."""
    return [
        trained(tiny_lm, tmp_path / "one", 1),
        trained(tiny_lm, tmp_path / "two", 2, rank=3, alpha=3.0, targets=["q_proj", "down_proj"], first_layer=1),
    ]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def plain(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def test_gates_switch_parts_and_layers_and_leave_the_mix_whole(load_tiny: Callable[[], Any], two: Any) -> None:
    got = mix("both", two, [1.0, 0.5])
    lm, alone, start = load_tiny(), load_tiny(), load_tiny()
    adapter = put_on(lm.model, got.adapter)
    put_on(alone.model, two[0])
    gates = Gates(adapter, dict(zip(["one", "two"], got.slices, strict=True)))
    whole = logits(lm.model)
    with gates.only({"one"}):
        assert torch.allclose(logits(lm.model), logits(alone.model), atol=1e-4)
    with gates.only(set()):
        assert torch.equal(logits(lm.model), logits(start.model))
    with gates.only(paths=[]):
        assert torch.equal(logits(lm.model), logits(start.model))
    with gates.only(paths=[p for p in adapter.layers if ".0." in p]):
        assert (logits(lm.model) - whole).abs().max() > 1e-3
    assert torch.equal(logits(lm.model), whole)
    with pytest.raises(InputError, match="three"), gates.only({"three"}):
        pass


def test_a_mix_loads_in_peft_and_equals_what_it_makes_by_cat_and_by_svd(
    tiny_dirs: dict[str, Path], load_tiny: Callable[[], Any], two: list[SavedAdapter], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    got, cut = mix("both", two, [1.0, 0.5]), mix("cut", two, [1.0, 0.5], rank=2)
    for name, adapter in (("both", got.adapter), ("cut", cut.adapter)):
        adapter.save(tmp_path / name)
    theirs = peft.PeftModel.from_pretrained(plain(tiny_dirs["llama"]), two[0].source, adapter_name="one")
    theirs.load_adapter(two[1].source, adapter_name="two")
    theirs.add_weighted_adapter(["one", "two"], [1.0, 0.5], "their_cat", combination_type="cat")
    theirs.add_weighted_adapter(["one", "two"], [1.0, 0.5], "their_svd", combination_type="svd", svd_rank=2)
    theirs.load_adapter(tmp_path / "both", adapter_name="our_cat")
    theirs.load_adapter(tmp_path / "cut", adapter_name="our_svd")
    out = {}
    for name in ("one", "their_cat", "our_cat", "their_svd", "our_svd"):
        theirs.set_adapter(name)
        out[name] = logits(theirs)
    assert torch.allclose(out["our_cat"], out["their_cat"], atol=2e-4)
    assert torch.allclose(out["our_svd"], out["their_svd"], atol=2e-4)
    assert (out["their_svd"] - out["their_cat"]).abs().max() > 1e-2 < (out["one"] - out["their_cat"]).abs().max()
    lm = load_tiny()
    put_on(lm.model, SavedAdapter.read(tmp_path / "both"))
    assert torch.allclose(logits(lm.model), out["their_cat"], atol=2e-4)


# -- files ------------------------------------------------------------------------------------------


def test_patterns_and_rank_stabilised_scaling_are_read_as_peft_reads_them(
    tiny_dirs: dict[str, Path], load_tiny: Callable[[], Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["q_proj", "up_proj", "o_proj"], use_rslora=True,
        rank_pattern={"layers.1.mlp.up_proj": 4}, alpha_pattern={"o_proj": 3}, init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = peft.get_peft_model(plain(tiny_dirs["llama"]), config)
    theirs.save_pretrained(tmp_path / "theirs")
    saved = SavedAdapter.read(tmp_path / "theirs")
    assert saved.rank == 4
    lm = load_tiny()
    put_on(lm.model, saved)
    assert torch.allclose(logits(lm.model), logits(theirs), atol=2e-4)


def test_reading_what_was_saved_gives_it_back(tmp_path: Path) -> None:
    ragged = SavedAdapter("x", "m", {**made("a", 1, 2, "p").layers, **made("b", 2, 3, "q").layers})
    ragged.save(tmp_path / "x")
    back = SavedAdapter.read(tmp_path / "x")
    assert (back.name, back.base, back.rank, len(back.digest)) == ("x", "m", 3, 64)
    assert all(torch.equal(back.layers[p].dense(), f.dense()) for p, f in ragged.layers.items())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias all"), ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"r": 7}, "rank 7"), ({"r": None}, "cannot be read"),
    ],
)  # fmt: skip
def test_more_than_a_plain_lora_is_refused(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    made("a", 1).save(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(ModelError) as caught:
        SavedAdapter.read(tmp_path)
    assert words in str(caught.value)


def test_other_tensors_and_missing_or_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no adapter"):
        SavedAdapter.read(tmp_path)
    made("a", 1).save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({"base_model.model.e.lora_embedding_A": torch.ones(2, 2)}, str(file))
    with pytest.raises(ModelError, match="lora_embedding_A"):
        SavedAdapter.read(tmp_path)
    save_file({"base_model.model.e.lora_A.weight": torch.ones(2, 2)}, str(file))
    with pytest.raises(ModelError, match="cannot be read"):
        SavedAdapter.read(tmp_path)
    file.write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="cannot be read"):
        SavedAdapter.read(tmp_path)
