"""A discriminator in a recipe: what it says in the ledger, what each key does, resume, and where it has no place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tomlkit
import torch
from safetensors.torch import load_file
from tests.tiny_world import DATA, World, cut_in_second_round, lines_of, tutelage_cli, write_lines

from tutelage.config import Judge, Recipe
from tutelage.engines import weights
from tutelage.errors import InputError, RecipeError
from tutelage.feedback.roster import judge_of, open_judge
from tutelage.loop.imitating import Lens, demonstrations_for

pytest_plugins = ["tests.tiny_world"]

SHOWN = [{"prompt": f"What comes after {n}?", "response": f"After {n} comes {n + 1}."} for n in range(12)]


def words(*settings: str) -> list[str]:
    return [w for s in settings for w in ("--set", s)]


def with_discriminator(world: World, **keys: Any) -> World:
    file = write_lines(world.folder / "shown.jsonl", SHOWN)
    recipe = tomlkit.parse(world.recipe.read_text(encoding="utf-8"))
    recipe["judges"] = [{"name": "like", "kind": "discriminator", "demonstrations": str(file)} | keys]
    world.recipe.write_text(tomlkit.dumps(recipe), encoding="utf-8")
    return world


ALONE = ('feedback.judges=["text"]', "supervised.enabled=false", "lora.start=random", "constraint.enabled=false",
         "prompts.gate_limit=3", "prompts.heldout_limit=3")  # fmt: skip


# ---- directions --------------------------------------------------------------------------------


def test_directions_by_hand() -> None:
    """Each class weighs a half: the middle lies between (3, 1, 0) and (1, 1, 0), however many rows are alike.

    The first feature deviates by 1 and the others not at all, so there is one direction, the first axis.
    """
    lens = Lens.fit(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]]).repeat(7, 1))
    assert lens.middle_F.tolist() == pytest.approx([2.0, 1.0, 0.0]) and lens.scale_F.tolist() == pytest.approx(
        [1, 1, 1]
    )
    assert lens.axis_FK.abs().flatten().tolist() == pytest.approx([1.0, 0.0, 0.0])
    looked = lens.look(torch.tensor([[3.0, 1.0, 0.0], [2.0, 9.0, 9.0], [1.0, 1.0, 5.0]]))[:, 0]
    assert (looked * looked[0].sign()).tolist() == pytest.approx([1.0, 0.0, -1.0])


def test_directions_are_few_orthonormal_and_blind_to_units() -> None:
    random = torch.Generator().manual_seed(0)
    one, other = torch.randn(20, 30, generator=random), torch.randn(50, 30, generator=random)
    lens = Lens.fit(one, other, most=5)
    assert torch.allclose(lens.axis_FK.T @ lens.axis_FK, torch.eye(5, dtype=torch.float64), atol=1e-9)
    units = torch.logspace(-3, 3, 30)
    scaled = Lens.fit(one * units, other * units, most=5)
    assert torch.allclose(scaled.look(one * units).abs(), lens.look(one).abs(), atol=1e-4)


# ---- a run -------------------------------------------------------------------------------------


def test_a_run_notes_accuracy_and_rewards(world: World) -> None:
    with_discriminator(world)
    done = world.play(*words(*ALONE))
    assert done.code == 3, done.err
    rounds = [m["values"] for m in world.rows("metrics", stage="discriminator")]
    first, second = rounds
    assert first["accuracy_like"] == 0.5 and "accuracy_heldout_like" not in first
    assert first["learned_like"] == 1.0 and first["steps_like"] >= 1 and first["accuracy_after_like"] > 0.6
    assert 0.0 <= second["accuracy_heldout_like"] <= 1.0
    assert (second["learned_like"] == 0.0) == (second["accuracy_like"] >= 0.8) == (second["steps_like"] == 0)
    assert [r["replay_like"] for r in rounds] == [24.0, 48.0]  # 8 prompts with 3 replies, twice
    verdicts = world.rows("verdicts", judge="like")
    assert len(verdicts) == 48
    for v in verdicts:
        logit = v["evidence"]["logit"]
        assert v["value"] == pytest.approx(max(-5.0, min(5.0, logit)), abs=1e-4)
        assert ("demonstrations" in v["reason"].split(":")[0]) == (logit > 0) and f"{logit:+.2f}" in v["reason"]
    told = {v["subject"]: v["value"] for v in verdicts}
    assert all(r["raw"]["like"] == told[r["generation_id"]] for r in world.rows("rewards"))
    by_round = {v["unit"]: v["evidence"]["accuracy"] for v in verdicts}
    assert by_round == {
        f"round-{n}": pytest.approx(r["accuracy_after_like"], abs=1e-4) for n, r in enumerate(rounds, 1)
    }
    (note,) = world.rows("notes", topic="judges")
    assert "only defined against the policy" in note["body"][0]["why"][0]


def test_it_abstains_where_it_has_met_no_policy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the supervised stage, on anchors, and in a second look at a run; in `best` it is as the checkpoint left it."""
    anchors = write_lines(world.folder / "anchors.jsonl", [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}])
    with_discriminator(world)
    done = world.play(*words("update.rounds=2", f"feedback.anchors={anchors}"))
    assert done.code == 3, done.err
    early = world.rows("verdicts", judge="like", unit="supervised")
    assert early and all(v["value"] is None and "has met no reply" in v["reason"] for v in early)
    assert all(v["value"] is not None for v in world.rows("verdicts", judge="like", unit="round-1"))
    (drift,) = world.rows("metrics", stage="drift")
    assert drift["values"]["level_like"] == 0.0  # an abstention is no residual
    again = tutelage_cli("rejudge", "one", "--runs", world.runs)
    assert again.code == 0, again.err
    (unit,) = [u["name"] for u in world.rows("units") if u["stage"] == "rejudge"]
    late = world.rows("verdicts", judge="like", unit=unit)
    assert late and all(v["value"] is None for v in late)
    out = world.folder / "best.jsonl"
    best = tutelage_cli("best", world.folder / "train.jsonl", "--run", "one", "--runs", world.runs, "--out", out,
                        "--n", "2", "--limit", "2")  # fmt: skip
    assert best.code == 0, best.err
    said = [v for row in lines_of(out) for r in row["replies"] for v in r["verdicts"] if v["judge"] == "like"]
    assert len(said) == 4 and all(v["value"] is not None for v in said)


def test_cut_and_resumed_it_ends_in_the_same_bits(world: World) -> None:
    with_discriminator(world)
    resumed_like_whole(world, *ALONE, "update.rounds=3")


def resumed_like_whole(world: World, *settings: str) -> None:
    """A run that stops in the middle of its second round, after the discriminator has learned in it, and goes on."""
    assert world.play(*words(*settings), name="whole").code == 3
    with cut_in_second_round():
        assert world.play(*words(*settings), name="cut").code == 130
    assert world.resume(name="cut").code == 3
    assert world.weights("cut") == world.weights("whole")
    for table, where in (("verdicts", {"judge": "like"}), ("metrics", {"stage": "discriminator"})):
        rows = [
            [{k: v for k, v in r.items() if k != "cost"} for r in world.rows(table, n, **where)]
            for n in ("whole", "cut")
        ]
        assert rows[0] == rows[1] and rows[0]
    last = sorted((world.runs / "whole" / "checkpoints").glob("r*"))[-1].name
    for name in ("discriminator-like", "lens-like"):
        kept = [load_file(world.runs / n / "checkpoints" / last / f"{name}.safetensors") for n in ("whole", "cut")]
        assert kept[0].keys() == kept[1].keys()
        assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


def test_every_key_does_something(world: World) -> None:
    with_discriminator(world)
    other = write_lines(world.folder / "other.jsonl", SHOWN[:9])
    base = (*ALONE, "update.rounds=2")

    def verdicts(name: str) -> list[float | None]:
        return [v["value"] for v in world.rows("verdicts", name, judge="like")]

    assert world.play(*words(*base), name="base").code == 3
    for key, value in (("demonstrations", str(other)), ("form", "gail"), ("accuracy_high", 1.0), ("replay", 0)):
        with_discriminator(world, **{key: value})
        done = world.play(*words(*base), name=key)
        assert done.code == 3, done.err
        if key == "replay":  # it stops learning too soon here for old replies to matter
            assert {m["values"]["replay_like"] for m in world.rows("metrics", key, stage="discriminator")} == {0.0}
        else:
            assert verdicts(key) != verdicts("base"), key
        if key == "form":
            assert all(v is not None and v >= 0.0 for v in verdicts(key))
    with_discriminator(world, accuracy_low=1.0, accuracy_high=1.0)
    steps = words(*base, "update.rounds=1")
    assert world.play(*steps, name="low").code in (0, 3)
    (figures,) = [m["values"] for m in world.rows("metrics", "low", stage="discriminator")]
    blind = figures["accuracy_after_like"] < 1.0
    assert all((v["value"] is None) == blind for v in world.rows("verdicts", "low", judge="like"))


def test_below_its_band_it_abstains() -> None:
    """By hand: 55% told rightly is below 0.6, and a missing figure is no good figure."""
    from types import SimpleNamespace

    from tutelage.loop.imitating import ImitationJudge

    spec = Judge(name="like", kind="discriminator", demonstrations="a")
    for tells, silent in ((0.55, True), (0.6, False), (0.9, False), (math.nan, True)):
        one: Any = SimpleNamespace(_critic=object(), _tells=tells, spec=spec)
        why = ImitationJudge._silent(one)
        assert bool(why) == silent and (not silent or "accuracy_low = 0.6" in why)


# ---- what cannot be ----------------------------------------------------------------------------


def test_bad_files_are_refused_before_anything_is_made(world: World) -> None:
    held = lines_of(world.folder / "heldout.jsonl")[0]["prompt"]
    files: dict[str, tuple[list[Any] | None, str]] = {
        "nowhere.jsonl": (None, "does not exist"),
        "reply.jsonl": ([*SHOWN, {"prompt": "Why?"}], "line 13"),
        "few.jsonl": (SHOWN[:7], "holds 7 demonstrations"),
        "held.jsonl": ([*SHOWN, {"prompt": held, "response": "So."}], "held out"),
    }
    for name, (rows, said) in files.items():
        if rows is not None:
            write_lines(world.folder / name, rows)
        with_discriminator(world, demonstrations=str(world.folder / name))
        done = world.play(*words(*ALONE))
        assert done.code == 2 and said in done.err, done.err
        assert not (world.runs / "one").exists()


def test_a_recipe_that_makes_no_sense_is_refused() -> None:
    like = {"name": "like", "kind": "discriminator", "demonstrations": "a.jsonl"}
    wrong = {
        "neither model nor prompt": like | {"model": "m"},
        "names no demonstrations": like | {"demonstrations": ""},
        "accuracy_low above": like | {"accuracy_low": 0.9},
        "does not read replay": {"name": "m", "model": "m", "replay": 3},
        "does not read form": {"name": "m", "kind": "a:b", "form": "gail"},
    }
    for said, judge in wrong.items():
        with pytest.raises(ValueError, match=said):
            Judge.model_validate(judge)
    for section in ({"update": {"rounds": 0}}, {"controller": {"enabled": True}}):
        with pytest.raises(ValueError, match="policy in training"):
            Recipe.model_validate({"judges": [like]} | section)
    Recipe.model_validate({"judges": [like]})


def test_outside_of_a_run_there_is_no_discriminator() -> None:
    for refused in (
        lambda: judge_of("discriminator=a.jsonl"),
        lambda: open_judge(Judge(name="like", kind="discriminator", demonstrations="a.jsonl"), None),
    ):
        with pytest.raises(RecipeError, match="no policy in training"):
            refused()
    done = tutelage_cli("judge", "check", "--judge", "discriminator=a.jsonl")
    assert done.code == 2 and "no policy in training" in done.err and "[[judges]]" in done.err


def test_the_file_of_the_package_can_be_used() -> None:
    spec = Judge(name="plain", kind="discriminator", demonstrations="builtin:plain")
    shown = demonstrations_for(spec)
    assert len(shown) == 40 and len({d.prompt.text for d in shown}) == 40
    suites = {r["prompt"] for n in ("gate", "heldout") for r in lines_of(DATA / "questions" / f"honesty-{n}.jsonl")}
    assert not suites & {d.prompt.text for d in shown}
    with pytest.raises(InputError, match="does not exist"):
        demonstrations_for(spec.model_copy(update={"demonstrations": "nowhere.jsonl"}))


@pytest.mark.skipif(
    not (weights.have(weights.EMBEDDED_ENCODER) and weights.have(weights.EMBEDDED_POLICY)),
    reason="needs the embedded models: run `tutelage fetch`",
)
def test_on_the_embedded_model(world: World) -> None:
    """Two rounds with the package's demonstrations, from the embedded model's own replies."""
    with_discriminator(world, demonstrations="builtin:plain")
    settings = (*ALONE, f"model.name={weights.EMBEDDED_POLICY}", "model.dtype=auto", "update.prompts=3")
    done = world.play(*words(*settings))
    assert done.code in (0, 3), done.err
    first, second = (m["values"] for m in world.rows("metrics", stage="discriminator"))
    assert first["accuracy_after_like"] > 0.75 and second["replay_like"] == 18.0
    values = [v["value"] for v in world.rows("verdicts", judge="like")]
    assert len(values) == 18 and all(-5.0 <= v <= 5.0 for v in values)
    assert all(r["total"] is not None for r in world.rows("rewards"))
