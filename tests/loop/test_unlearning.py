"""Unlikelihood in rounds: which tokens of a reply are marked, and that what is marked becomes rarer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tomlkit
from tests.tiny_world import World, tutelage_cli, write_lines

from tutelage.config import Recipe
from tutelage.loop.choice import Marking, choose
from tutelage.loop.unlearning import token_weights
from tutelage.objectives.unlikelihood import Unlikelihood

pytest_plugins = ["tests.tiny_world"]


def words(*settings: str) -> list[str]:
    return [w for s in settings for w in ("--set", s)]


def reply(lm: Any, text: str) -> Any:
    tokens = lm.encode_reply(text)
    return SimpleNamespace(tokens=tokens, text=lm.decode(tokens))


def test_marks_by_hand(tiny_lm: Any) -> None:
    """a b a b and the end: the second "a b" repeats; a blamed place takes its tokens with it, the rest is kept."""
    one = SimpleNamespace(tokens=(10, 11, 10, 11, 2), text="")
    assert token_weights(tiny_lm, one, (), repeat_n=2, keep=0.3) == [0.3, 0.3, -1.0, -1.0, 0.3]
    assert token_weights(tiny_lm, one, (), repeat_n=3, keep=0.0) == [0.0] * 5
    assert token_weights(tiny_lm, one, (), repeat_n=0, keep=0.0) == [0.0] * 5
    assert token_weights(tiny_lm, one, (), repeat_n=1, keep=0.0) == [0.0, 0.0, -1.0, -1.0, 0.0]


def test_a_blamed_place_marks_its_tokens_wherever_the_text_begins(tiny_lm: Any) -> None:
    """The reply's text is stripped, its tokens are not: " no" before it must not move the place."""
    for lead in ("", "  \n"):
        one = reply(tiny_lm, f"{lead}What is the capital of France?")
        start = one.text.index("capital")
        weights = token_weights(tiny_lm, one, [(start, start + 7)], repeat_n=0, keep=0.5)
        marked = [t for t, w in zip(one.tokens, weights, strict=True) if w < 0]
        assert tiny_lm.tokenizer.decode(marked).strip() == "capital"
        assert set(weights) == {-1.0, 0.5} and weights[-1] == 0.5
    both = reply(tiny_lm, "a b a b")
    weights = token_weights(tiny_lm, both, [(0, 1)], repeat_n=2, keep=0.0)
    assert weights[0] == -1.0 and weights[-2] == -1.0  # a mark by either way is a mark


def test_the_recipe_says_how() -> None:
    def chosen(**options: Any) -> Any:
        return choose(Recipe.model_validate({"update": {"objective": "unlikelihood"}, "objective": options}))

    assert chosen().marking == Marking(4, 0.1) and chosen().loss == Unlikelihood(1.0) and chosen().family == "marks"
    assert chosen(repeat_n=0, keep=2.0, alpha=3.0).marking == Marking(0, 2.0)
    assert chosen(alpha=3.0).loss == Unlikelihood(3.0)
    for section in ({"credit": {"beta": 0.1}}, {"update": {"kl": 0.1}}, {"update": {"clip": 0.1}}):
        wrong = {"update": {"objective": "unlikelihood", **section.pop("update", {})}} | section
        with pytest.raises(ValueError, match="is not read by"):
            Recipe.model_validate(wrong)


QUICK = ("update.objective=unlikelihood", "supervised.enabled=false", "prompts.gate_limit=3", "prompts.heldout_limit=3",
         "prompts.limit=8")  # fmt: skip


def test_what_is_marked_becomes_rarer_in_a_run(world: World) -> None:
    """A random model repeats itself; six rounds on eight questions, and the mass on what it repeats falls."""
    done = world.play(*words(*QUICK, "objective.repeat_n=1", "objective.keep=0", "update.rounds=6",
                             "update.learning_rate=0.01", "update.samples=6"))  # fmt: skip
    assert done.code == 3, done.err
    steps = [m["values"] for m in world.rows("metrics", stage="update")]
    mass = [s["mass_unwanted"] / s["share_unwanted"] for s in steps]
    assert sum(mass[-2:]) < 0.7 * sum(mass[:2]), mass
    assert steps[0]["kl_to_start"] == pytest.approx(0.0, abs=1e-5) and steps[-1]["kl_to_start"] > 0.001
    counts = [m["values"] for m in world.rows("metrics", stage="marks")]
    assert all(c["kept"] == 0 and c["blamed_replies"] == 0 for c in counts)
    assert counts[-1]["marked"] < counts[0]["marked"]
    credits = world.rows("credits", unit="round-1")
    assert {c["method"] for c in credits} == {"marks"}
    assert sum(x < 0 for c in credits for x in c["credit"]) == counts[0]["marked"]
    tokens = {g["id"]: g["tokens"] for g in world.rows("generations", unit="round-1")}
    for c in credits:
        said = tokens[c["generation_id"]]
        assert [x < 0 for x in c["credit"]] == [t in said[:n] for n, t in enumerate(said)]


def test_above_the_mean_the_rest_is_kept(world: World) -> None:
    done = world.play(*words(*QUICK, "objective.keep=0.5", "objective.repeat_n=0", "update.rounds=1"))
    assert done.code == 3, done.err
    (counts,) = [m["values"] for m in world.rows("metrics", stage="marks")]
    assert counts["marked"] == 0 and 0 < counts["kept"] < counts["tokens"]
    for c in world.rows("credits"):
        assert set(c["credit"]) == ({0.5} if c["advantage"] > 0 else {0.0})
    assert {m["values"]["mass_unwanted"] for m in world.rows("metrics", stage="update")} == {0.0}


def test_nothing_marked_and_nothing_kept_ends_the_run(world: World) -> None:
    done = world.play(*words(*QUICK, "objective.keep=0", "objective.repeat_n=0", "update.rounds=1"))
    assert done.code == 3, done.err
    (note,) = world.rows("notes", topic="failures")
    assert "no token is marked" in note["body"][0] and not world.weights()


def test_what_a_critic_blames_is_marked(world: World) -> None:
    """A critic that takes most texts for toxic, as nearly all that it saw were; it reads words alone."""
    rude = [{"text": f"a e i o u n t s {n} is stupid", "label": "toxic"} for n in range(60)]
    kind = [{"text": f"thank you, number {n}", "label": "fine"} for n in range(12)]
    file = world.folder / "rude.safetensors"
    data = write_lines(world.folder / "rows.jsonl", rude + kind)
    done = tutelage_cli("critic", "train", data, "--kind", "toxicity", "--features", "words", "--out", file)
    assert done.code == 0, done.err
    recipe = tomlkit.parse(world.recipe.read_text(encoding="utf-8"))
    recipe["judges"] = [{"name": "rude", "kind": "critic", "model": str(file)}]
    world.recipe.write_text(tomlkit.dumps(recipe), encoding="utf-8")
    done = world.play(*words(*QUICK, "objective.keep=0", "objective.repeat_n=0", "update.rounds=1"))
    assert done.code == 3, done.err
    (counts,) = [m["values"] for m in world.rows("metrics", stage="marks")]
    (note,) = [n for n in world.rows("notes", topic="triggers", unit="round-1") if n["body"]["judge"] == "rude"]
    against = [r for r in note["body"]["replies"] if r["reward"] < 0 and r["places"]]
    assert counts["blamed_replies"] == len(against) > 0 and counts["marked"] > 0
    ids = {r["id"] for r in against}
    assert {c["generation_id"] for c in world.rows("credits") if min(c["credit"]) < 0} == ids
