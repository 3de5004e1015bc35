"""Every objective a recipe can name, and every option of each: it is read, and it changes what is learned."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tutelage.config import OBJECTIVES, Recipe, Update
from tutelage.config.objectives import Objective as Options
from tutelage.config.objectives import ObjectiveName
from tutelage.loop.bench import Silent
from tutelage.loop.choice import TABLE, choose
from tutelage.loop.constraining import constraints_of
from tutelage.loop.preferring import prefer
from tutelage.loop.stages import advantages, rescore, teaching, update
from tutelage.loop.unlearning import unlearn
from tutelage.objectives.policy_gradient import Grpo, Rloo
from tutelage.policy.learner import Learner, score
from tutelage.policy.lora import attach
from tutelage.policy.values import ValueHead

NAMES = typing.get_args(ObjectiveName)
# Each estimator in each loss is in tests/objectives/test_losses.py; here two are enough.
OPTIONS = [
    (name, key)
    for name in NAMES
    for key in OBJECTIVES[name].options
    if key != "kl_estimator" or name in ("grpo", "ppo")
]

# Another value than the objective's own; with it, what must hold for it to matter.
OTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "scale": ("none", {}),
    "baseline": ("none", {}),
    "decay": (0.1, {"baseline": "moving"}),
    "kl_estimator": ("k2", {}),
    "clip_low": (0.5, {}),
    "clip_high": (0.9, {}),
    "cap": (1.01, {}),
    "mask_truncated": (False, {}),
    "overlong": (0.9, {}),
    "value_clip": (1e-4, {}),
    "value_weight": (4.0, {}),
    "value_learning_rate": (0.5, {}),
    "discount": (0.3, {}),
    "lam": (0.1, {}),
    "pairs": ("all", {}),
    "pair_temperature": (0.0, {}),
    "pair_tie": (1.5, {}),  # leaves out one pair of the second round
    "beta": (3.0, {}),
    "mode": ("improve", {}),
    "smoothing": (0.3, {}),
    "sft": (2.0, {}),
    "flip": (0.4, {}),
    "alpha": (0.5, {}),
    "gamma": (9.0, {}),
    "weight": (5.0, {}),
    "desirable": (4.0, {}),
    "undesirable": (0.0, {}),
    "repeat_n": (1, {}),
    "keep": (1.0, {}),
}

# Where an objective measures something else by that name: a margin, a single reply's lead.
OWN: dict[tuple[str, str], tuple[Any, dict[str, Any]]] = {
    ("robust-dpo", "cap"): (0.01, {}),
    ("kto", "pair_tie"): (1.0, {}),
    ("xpo", "pair_tie"): (0.3, {}),  # it compares the first reply with the third alone
    ("reinforce-plus-plus", "baseline"): ("group", {}),
}


def test_both_tables_name_the_same_objectives() -> None:
    assert set(NAMES) == set(TABLE) == set(OBJECTIVES) == set(typing.get_args(Update.model_fields["objective"].annotation))  # fmt: skip
    assert {key for kind in OBJECTIVES.values() for key in kind.options} == set(Options.model_fields) == set(OTHER)
    assert all(choose(recipe(name)).loss.name == name for name in NAMES)


def test_the_defaults_are_what_they_were() -> None:
    assert choose(Recipe()).loss == Grpo(0.2, 0.05)
    assert choose(recipe("rloo")).loss == Rloo(0.2, 0.05)


def recipe(name: str, **options: Any) -> Recipe:
    kind = OBJECTIVES[name]  # type: ignore[index]
    more = {"learning_rate": 0.05, "batch": 1, **({"clip": 0.3} if kind.clips else {}), **({"kl": 0.3} if kind.charges else {})}  # fmt: skip
    return Recipe.model_validate(
        {"update": {"objective": name, **(more if options.pop("fast", False) else {})}, "objective": options,
         "constraint": {"enabled": False}, "sampling": {"max_new_tokens": 8}}
    )  # fmt: skip


REPLIES = (((10, 11, 12, 10, 14), (20, 21), (30, 31, 32, 30, 31, 32, 30, 37)), ((40, 41, 42), (43, 44), (45,)))
REWARDS = (
    ((1.0, -0.5, 0.7), (0.2, 0.9, 0.1)),
    ((-1.0, 0.4, None), (0.6, 0.6, -2.0)),
    ((0.3, 0.1, 0.8), (0.0, 1.0, 0.5)),
)


@pytest.fixture(scope="module")
def stage(load_tiny: Callable[[str], Any]) -> Callable[[Recipe], dict[str, torch.Tensor]]:
    """Plays three rounds on given replies and rewards, some steps of which are far off policy."""
    lm = load_tiny("llama")
    adapter = attach(lm.model, rank=2, alpha=8.0, seed=1)
    prompts = ((5, 6, 7), (5, 6, 8, 9))
    start = {k: v.clone() for k, v in adapter.state().items()}

    def play(recipe: Recipe) -> dict[str, torch.Tensor]:
        adapter.load_state(start, where="start")
        choice = choose(recipe)
        values = ValueHead(lm.head_VD.shape[1]) if choice.values else None
        learner = Learner(lm, adapter, learning_rate=recipe.update.learning_rate, values=values,
                          value_learning_rate=choice.values.value_learning_rate if choice.values else 0.0)  # fmt: skip

        def scores(prompts: Any, replies: Any) -> Any:
            rows = itertools.count()
            from tutelage.engines.packing import Group

            groups = [Group(p, tuple(r.tokens for r in g), tuple(next(rows) for _ in g)) for p, g in zip(prompts, replies, strict=True)]  # fmt: skip
            return score(lm, groups, budget=512, values=values)

        bench: Any = SimpleNamespace(
            recipe=recipe, choice=choice, values=values, baselines={}, learner=learner, progress=Silent(),
            encode=lambda prompt: prompt, scores=scores, lm=lm, adapter=adapter, constraints=constraints_of(recipe),
        )  # fmt: skip
        unit: Any = SimpleNamespace(metrics=lambda *_: None, note=lambda *_: None, credit=lambda *_: None)
        first = scores(prompts, [[SimpleNamespace(tokens=t) for t in g] for g in REPLIES])
        logps = [first.logp_BT[b][first.keep_BT[b] > 0].tolist() for b in range(6)]
        rows = iter(logps)
        replies: Any = [
            [SimpleNamespace(id=str(t), tokens=t, text=str(t), finished=len(t) < 8, logps=next(rows)) for t in group]
            for group in REPLIES
        ]
        for number, totals in enumerate(REWARDS):
            rewards: Any = [[SimpleNamespace(total=x) for x in group] for group in totals]
            drawn = rescore(bench, prompts, replies, unit, number)  # type: ignore[arg-type]
            found = advantages(bench, rewards, replies, first, drawn)
            if choice.family == "preference":
                prefer(bench, prompts, replies, rewards, found, first, unit, number)  # type: ignore[arg-type]
                continue
            if choice.family == "marks":
                unlearn(bench, prompts, replies, {}, found, first, unit, number)  # type: ignore[arg-type]
                continue
            trains = teaching(bench, rewards, replies, found)
            credit = found.flatten()[:, None] * first.keep_BT / first.keep_BT.sum(-1, keepdim=True)
            update(bench, prompts, replies, first, drawn, credit, trains, unit, number)  # type: ignore[arg-type]
        head = dict(values.state_dict()) if values else {}
        return {k: v.clone() for k, v in (adapter.state() | head).items()}

    return play


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("name", "key"), OPTIONS)
def test_every_option_changes_what_is_learned(name: str, key: str, stage: Any, plays: dict[str, Any]) -> None:
    value, needed = OWN.get((name, key), OTHER[key])
    base = recipe(name, fast=True, **needed)
    changed = recipe(name, fast=True, **needed, **{key: value})
    if base.hash not in plays:
        plays[base.hash] = stage(base)
    assert all(torch.isfinite(v).all() for v in plays[base.hash].values())
    assert not same(stage(changed), plays[base.hash])


@pytest.fixture(scope="module")
def plays() -> dict[str, Any]:
    return {}


def test_the_objectives_differ(stage: Any, plays: dict[str, Any]) -> None:
    made = [recipe(name, fast=True) for name in NAMES]
    ends = [plays[r.hash] if r.hash in plays else plays.setdefault(r.hash, stage(r)) for r in made]
    for a, b in itertools.combinations(ends, 2):
        assert not same(a, {k: b[k] for k in a if k in b} | {k: v for k, v in a.items() if k not in b})


def test_the_same_rounds_give_the_same_bits(stage: Any, plays: dict[str, Any]) -> None:
    again = recipe("ppo", fast=True)
    assert same(stage(again), plays.setdefault(again.hash, stage(again)))


# ---- what makes no sense is refused --------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_is_not_read_is_refused(name: str) -> None:
    for key, (value, _) in OTHER.items():
        if key not in OBJECTIVES[name].options:
            with pytest.raises(
                ValueError,
                match=rf"objective\.{key} is not read by update\.objective = {name}, which reads objective\.",
            ):
                recipe(name, **{key: value})


def test_the_error_names_what_would_have_been_read(tmp_path: Any) -> None:
    from tutelage.config import load_recipe
    from tutelage.errors import RecipeError

    with pytest.raises(
        RecipeError,
        match=r"objective\.cap is not read by .* grpo, which reads objective\.kl_estimator, objective\.scale",
    ):
        load_recipe("honesty", ["objective.cap=3"])
    assert load_recipe("honesty", ["update.objective=cispo-cap", "objective.cap=3"]).objective.cap == 3.0


@pytest.mark.parametrize(
    ("name", "options"),
    [("reinforce", {"baseline": "group"}), ("reinforce-plus-plus", {"baseline": "moving"}), ("reinforce", {"decay": 0.5}),
     ("gspo", {"clip_low": 0.0}), ("cispo-clamp", {"clip_low": 1.5}), ("ppo", {"lam": 1.1}), ("dapo", {"overlong": True})],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"objective|baseline|decay|clip|lam|overlong"):
        recipe(name, **options)


def test_a_clip_that_is_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"update\.clip is not read by .* gspo; it clips by objective\.clip_low and"):
        Recipe.model_validate({"update": {"objective": "gspo", "clip": 0.3}})
    with pytest.raises(ValueError, match=r"cispo-cap; it clips by objective\.cap"):
        Recipe.model_validate({"update": {"objective": "cispo-cap", "clip": 0.3}})


@pytest.mark.parametrize("importance", ["mask", "geometric"])
def test_a_band_without_room_is_refused(importance: str) -> None:
    with pytest.raises(ValueError, match="importance_low below importance_cap"):
        Recipe.model_validate({"update": {"importance": importance, "importance_low": 2.0}})


def test_a_resolved_recipe_says_the_same(tmp_path: Any) -> None:
    """Keys that are not set stay not set when a run writes its recipe down."""
    from tutelage.config import load_recipe

    made = recipe("gspo", clip_low=0.1)
    path = tmp_path / "r.toml"
    path.write_text(made.to_toml(), encoding="utf-8")
    assert load_recipe(path) == made
    assert dataclasses.asdict(choose(load_recipe(path)).loss) == dataclasses.asdict(choose(made).loss)  # type: ignore[call-overload]
