"""Several costs under limits, and rewards in tiers: by hand, and in runs that a ledger can be read of."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_world import World

from tutelage.config import Recipe
from tutelage.errors import InputError, StoreError
from tutelage.loop.choice import Rewards, choose
from tutelage.loop.constraining import constraints_of, cost_terms, hold, mixed, tiered
from tutelage.objectives.constrained import mix_advantages
from tutelage.records import Reward

pytest_plugins = ["tests.tiny_world"]

JUDGES = [{"name": name, "kind": f"my_judges:{name}"} for name in ("clean", "short")]
TWO = [
    {"name": "dirt", "judge": "clean", "limit": 0.1},
    {"name": "length", "judge": "short", "limit": 0.2, "per": "prompt", "threshold": 0.3},
]


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"judges": JUDGES, "update": {"objective": "rloo"}} | sections)


def estimate(_name: str, table_PG: torch.Tensor) -> torch.Tensor:
    """Advantages of RLOO: a value less the mean of the others of its group."""
    found: torch.Tensor = choose(recipe()).estimate(
        Rewards(table_PG, torch.ones_like(table_PG, dtype=torch.long), None)
    )
    return found


def group(*rows: tuple[float | None, dict[str, float]]) -> list[Reward]:
    return [Reward(f"g{n}", total, {}, {}, costs) for n, (total, costs) in enumerate(rows)]


def test_a_cost_is_what_the_judge_leaves_of_one_and_nothing_where_it_is_silent() -> None:
    terms = {"clean": [0.9, None, 0.0], "short": [1.0, 0.25, None]}
    assert cost_terms(recipe(constraints=TWO), terms, 3) == [
        {"dirt": pytest.approx(0.1), "length": 0.0}, {"length": 0.75}, {"dirt": 1.0},
    ]  # fmt: skip
    assert cost_terms(recipe(constraints=TWO), {}, 2) == [{}, {}]
    assert cost_terms(recipe(), terms, 3) == [{}, {}, {}]
    high = [TWO[0] | {"high": True}, TWO[1]]
    assert cost_terms(recipe(constraints=high), terms, 3) == [
        {"dirt": 0.9, "length": 0.0},
        {"length": 0.75},
        {"dirt": 0.0},
    ]


@pytest.mark.parametrize("value", [-0.5, 1.5])
def test_a_value_that_makes_no_cost_is_refused(value: float) -> None:
    """A cost of -0.5 would turn its advantage round, which is weighed by the group's largest cost."""
    with pytest.raises(InputError, match=f"'clean' says {value}"):
        cost_terms(recipe(constraints=TWO[:1]), {"clean": [1.0, value]}, 2)


def test_multipliers_follow_their_own_costs_and_stay_where_nothing_was_measured() -> None:
    """Dirt: prompts' means 0.5 and 0.3, so 0.4, 0.3 over the limit: 10 * 0.3 + 5 * 0.3 = 4.5.

    Length, threshold 0.3: the first prompt's mean is 0.5, so 0.2 above; the second's is 0.1, so nothing; mean 0.1, which
    is under the limit of 0.2.
    """
    held = constraints_of(recipe(constraints=TWO))
    rewards = [
        group((1.0, {"dirt": 0.4, "length": 0.2}), (2.0, {"dirt": 0.6, "length": 0.8})),
        group((1.0, {"dirt": 0.3, "length": 0.1}), (None, {})),
    ]
    found = hold(held, rewards)
    assert found == {
        "cost_dirt": pytest.approx(0.4), "multiplier_dirt": pytest.approx(4.5), "costless_dirt": 1.0,
        "cost_length": pytest.approx(0.1), "multiplier_length": 0.0, "costless_length": 1.0,
    }  # fmt: skip
    silent = hold(held, [group((1.0, {}), (2.0, {}))])
    assert "cost_dirt" not in silent
    assert (silent["multiplier_dirt"], silent["costless_dirt"]) == (pytest.approx(4.5), 2.0)


def test_the_mixture_of_two_costs_and_the_built_in_one_by_hand() -> None:
    """Costs 0.6, 0, 0.3 less the others' mean: 0.45, -0.45, 0, times the largest, 0.6: 0.27, -0.27, 0.

    Length 0.2, 0.2, 0.2: below its threshold, so nothing. The built-in one: 1, 0, -1 at a multiplier of 1.
    (A - 2 C - 1 O) / (1 + 2 + 3 + 1) with the length's multiplier 3.
    """
    held = constraints_of(recipe(constraints=TWO))
    held.limits["dirt"].multiplier.value, held.limits["length"].multiplier.value = 2.0, 3.0
    rewards = [group(*((1.0, {"dirt": d, "length": 0.2}) for d in (0.6, 0.0, 0.3)))]
    earned, other = torch.tensor([[7.0, 0.0, -7.0]]), torch.tensor([[1.0, 0.0, -1.0]])
    found = mixed(earned, held, rewards, estimate, held={"over_abstention": (other, 1.0)})
    assert found.tolist() == [pytest.approx([(7 - 0.54 - 1) / 7, 0.54 / 7, (-7 + 1) / 7], abs=1e-6)]


@pytest.mark.parametrize("multiplier", [0.0, 0.3, 6.65])
def test_the_built_in_constraint_alone_has_the_bits_that_it_had(multiplier: float) -> None:
    made = torch.Generator().manual_seed(7)
    earned, cost = torch.randn(5, 8, generator=made), torch.randn(5, 8, generator=made)
    rewards = [group(*((1.0, {"over_abstention": 0.5}) for _ in range(8))) for _ in range(5)]
    held = {"over_abstention": (cost, multiplier)}
    found = mixed(earned, constraints_of(recipe()), rewards, estimate, held=held)
    assert torch.equal(found, mix_advantages(earned, cost, multiplier))
    assert torch.equal(mixed(earned, constraints_of(recipe()), rewards, estimate, held={}), earned)


@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(0, 1)), min_size=2, max_size=6), st.integers(0, 5))
def test_a_reply_without_a_cost_is_to_the_others_as_if_it_were_not_there(
    rows: list[tuple[float, float]], hidden: int
) -> None:
    """Itself it keeps its reward's advantage, over the mixture's size."""
    held = constraints_of(recipe(constraints=TWO[:1]))
    held.limits["dirt"].multiplier.value = 2.0
    gone = hidden % len(rows)
    earned = torch.tensor([[r for r, _ in rows]])
    whole = group(*((r, {"dirt": c} if n != gone else {}) for n, (r, c) in enumerate(rows)))
    found = mixed(earned, held, [whole], estimate, held={})
    assert found[0, gone] == pytest.approx(float(earned[0, gone]) / 3, abs=1e-5)
    keep = [n for n in range(len(rows)) if n != gone]
    without = mixed(earned[:, keep], held, [[whole[n] for n in keep]], estimate, held={})
    assert torch.allclose(found[:, keep], without, atol=1e-5)


def test_tiers_by_hand() -> None:
    """The first tier is `clean`, target 0.8, tolerance 0.1; the second `short` and `text`, weights 1 and 0.2.

    The second reply is below 0.7 and the third has no value, so neither hears of the second tier.
    """
    ranks = [{"terms": ["clean"], "target": 0.8, "tolerance": 0.1}, {"terms": ["short", "text"]}]
    weights = {"fit": 0, "principles": 0, "consistency": 0, "text": 0.2}
    how = recipe(tiers=ranks, rewards=weights)
    rewards = [
        [
            Reward(
                "a", 0.0, {"clean": 1.0, "short": 1.0, "text": -1.0}, {"clean": 0.75, "short": 0.5, "text": 0.5}, {}
            ),
            Reward("b", 0.0, {"clean": -1.0, "short": -1.0, "text": None}, {"clean": 0.6, "short": 0.5}, {}),
            Reward("c", 0.0, {"clean": None, "short": 0.0, "text": None}, {"clean": None, "short": 0.5}, {}),
        ]
    ]
    extra = torch.zeros(1, 3)
    found = tiered(how, how.weights, rewards, estimate, extra_PG=extra)
    second = (1.0 - 0.2) / 1.2  # of a; b has -1, c has 0: a less the mean of the others is that plus 0.5
    assert found.tolist() == [pytest.approx([2.0 + second + 0.5, -2.0, 0.0], abs=1e-6)]
    moved = tiered(how, how.weights, rewards, estimate, extra_PG=torch.tensor([[0.0, 1.0, 0.0]]))
    assert (moved - found).tolist() == [pytest.approx([-1.0, 1.0, 0.0])], "charges go with the first tier"


BEST = {"fit": 0, "principles": 0, "consistency": 0, "text": 0.2}


def told(total: float | None, clean: float | None, short: float | None, text: float | None = None) -> Reward:
    """A reply whose normalised and raw values are the same, to keep the sums small."""
    terms = {"clean": clean, "short": short, "text": text}
    return Reward("g", total, terms, terms, {})


def test_without_a_target_later_tiers_compare_the_best_of_the_group_only() -> None:
    """Clean 0.9, 0.85, 0.5 with tolerance 0.1: the first two count as equal, so `short` parts them alone.

    RLOO: clean 0.9 - 0.675, 0.85 - 0.7, 0.5 - 0.875; short of the two 0.2 - 0.6, 0.6 - 0.2. The third's short of 1 is
    heard nowhere.
    """
    how = recipe(tiers=[{"terms": ["clean"], "tolerance": 0.1}, {"terms": ["short", "text"]}], rewards=BEST)
    rewards = [[told(0.0, 0.9, 0.2), told(0.0, 0.85, 0.6), told(0.0, 0.5, 1.0)]]
    found = tiered(how, how.weights, rewards, estimate, extra_PG=torch.zeros(1, 3))
    assert found.tolist() == [pytest.approx([0.225 - 0.4, 0.15 + 0.4, -0.375], abs=1e-6)]


def test_one_best_reply_has_no_one_to_be_compared_with() -> None:
    how = recipe(tiers=[{"terms": ["clean"], "tolerance": 0.1}, {"terms": ["short", "text"]}], rewards=BEST)
    rewards = [[told(0.0, 0.9, 0.2), told(0.0, 0.7, 0.6), told(0.0, None, 0.9)]]
    found = tiered(how, how.weights, rewards, estimate, extra_PG=torch.zeros(1, 3))
    assert found.tolist() == [pytest.approx([0.2, -0.2, 0.0], abs=1e-6)]


def test_a_third_tier_compares_the_best_of_those_that_are_left() -> None:
    """Clean leaves the first three; of them the second and third are best in short; text parts these two.

    The last is best in short and text, and would raise the bar were it still heard.
    """
    how = recipe(tiers=[{"terms": ["clean"]}, {"terms": ["short"]}, {"terms": ["text"]}], rewards=BEST)
    rewards = [[told(0.0, 1.0, 0.0, 1.0), told(0.0, 1.0, 0.5, 0.0), told(0.0, 1.0, 0.5, 0.6), told(0.0, 0.0, 1.0, 1.0)]]
    found = tiered(how, how.weights, rewards, estimate, extra_PG=torch.zeros(1, 4))
    first, third = [1 / 3, 1 / 3, 1 / 3, -1.0], [0.0, -0.6, 0.6, 0.0]
    second = [-0.5, 0.25, 0.25, 0.0]
    assert found.tolist() == [
        pytest.approx([a + b + c for a, b, c in zip(first, second, third, strict=True)], abs=1e-6)
    ]


VERDICT = st.none() | st.sampled_from([0.0, 0.3, 0.35, 0.6, 1.0])


@given(st.lists(st.tuples(VERDICT, VERDICT), min_size=1, max_size=5), st.booleans())
def test_a_reply_without_a_reward_is_to_tiers_as_if_it_were_not_there(
    rows: list[tuple[float | None, float | None]], aimed: bool
) -> None:
    """Even where single terms of it are known, and better than all the others."""
    first = {"terms": ["clean"], "tolerance": 0.1} | ({"target": 0.5} if aimed else {})
    how = recipe(tiers=[first, {"terms": ["short", "text"]}], rewards=BEST)
    there = [told(0.0, clean, short) for clean, short in rows]
    lone = tiered(how, how.weights, [there], estimate, extra_PG=torch.zeros(1, len(rows)))
    more = [[told(None, 1.0, 1.0), *there]]
    found = tiered(how, how.weights, more, estimate, extra_PG=torch.zeros(1, len(rows) + 1))
    assert found[0, 0] == 0.0
    assert torch.allclose(found[:, 1:], lone, atol=1e-6)
    assert not found.isnan().any()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"constraints": [{"name": "dirt", "judge": "cleen"}]}, "there are clean, short, fit"),
        ({"constraints": [TWO[0], TWO[0] | {"judge": "short"}]}, "the same name"),
        (
            {"constraints": [TWO[0] | {"judge": "principles"}], "feedback": {"judges": ["text", "critic"]}},
            "there are clean, short, fit, text",
        ),
        ({"constraints": [{"name": "over_abstention", "judge": "clean"}]}, "that of \\[constraint\\]"),
        ({"constraints": [{"name": "dirt", "judge": "clean", "threshold": 0.2}]}, "per = prompt only"),
        ({"constraints": [{"name": "dirt", "judge": "clean", "limit": 0.0}]}, "greater than 0"),
        ({"constraints": TWO, "controller": {"enabled": True}}, "one reward"),
        ({"constraints": [TWO[0], TWO[1] | {"judge": "clean"}]}, "'dirt' and 'length' are costs of one judge, 'clean'"),
        ({"constraints": [{"name": "form", "judge": "text", "reward": True}]}, "rewards.text says the weight"),
        ({"constraints": TWO[:1], "judges": [JUDGES[0] | {"weight": 2.0}]}, "'clean' has a weight"),
        *(
            ({"constraints": TWO[:1], "judges": [{"name": "clean", "kind": k, "model": "m"}]}, f"kind '{k}'")
            for k in ("pairwise", "listwise", "fusion")
        ),
        (
            {
                "constraints": TWO[:1],
                "judges": [{"name": "clean", "kind": "discriminator", "demonstrations": "builtin:plain"}],
            },
            "kind 'discriminator'",
        ),
        ({"constraints": TWO, "update": {"rounds": 0}}, "update.rounds is 0"),
        (
            {
                "tiers": [{"terms": ["fit", "principles", "consistency", "text"]}, {"terms": ["clean", "short"]}],
                "update": {"rounds": 0},
            },
            "update.rounds is 0",
        ),
        ({"tiers": [{"terms": ["clean"]}, {"terms": ["short"]}]}, "'fit' is in none"),
        ({"tiers": [{"terms": ["clean", "fit"]}, {"terms": ["clean"]}]}, "'clean' is in two"),
        ({"tiers": [{"terms": ["fit", "lean"]}, {"terms": ["clean"]}]}, "names 'lean'"),
        ({"tiers": [{"terms": ["fit", "principles", "consistency", "text", "clean", "short"]}]}, "ranks nothing"),
        (
            {
                "tiers": [{"terms": ["clean"]}, {"terms": ["short", "text"], "target": 0.5}],
                "rewards": {"fit": 0, "principles": 0, "consistency": 0},
            },
            "the last of",
        ),
        (
            {"constraints": TWO[:1], "tiers": [{"terms": ["clean"]}, {"terms": ["short", "fit", "text"]}]},
            "names 'clean', which is no reward",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**sections)


def test_a_judge_whose_value_is_a_cost_is_no_reward() -> None:
    assert recipe(constraints=TWO[:1]).weights["clean"] == 0.0
    assert recipe(constraints=TWO[:1]).weights["short"] == 1.0
    assert recipe(constraints=[{"name": "form", "judge": "text"}]).weights["text"] == 0.2
    heavy = [JUDGES[0] | {"weight": 2.0}]
    both = recipe(judges=heavy, constraints=[TWO[0] | {"reward": True}])
    assert both.weights["clean"] == 2.0


def test_a_checkpoint_of_other_costs_is_refused() -> None:
    kept = constraints_of(recipe(constraints=TWO)).state()
    with pytest.raises(StoreError, match="dirt, length"):
        constraints_of(recipe(constraints=TWO[:1])).load(kept)


LENGTHS = '''
def brief(prompt, reply):
    """1 for a reply of no characters, 0 for one of forty and more; no opinion on a reply that holds an e."""
    return None if "e" in reply else max(0.0, 1.0 - len(reply) / 40)
'''


@pytest.fixture
def costly(new_world: Callable[..., World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world with one cost by code and one by a built-in term."""
    (tmp_path / "brief_judge.py").write_text(LENGTHS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return new_world()


def metrics(world: World, name: str) -> list[dict[str, Any]]:
    return [m["values"] for m in world.rows("metrics", name) if m["stage"] == "rollout"]


COSTS = (
    "--set", 'judges=[{name = "brief", kind = "brief_judge:brief"}]',
    "--set", 'constraints=[{name = "talk", judge = "brief", limit = 0.05}, {name = "form", judge = "text", limit = 0.9}]',
)  # fmt: skip


def test_a_run_keeps_each_cost_in_its_ledger_and_learns_otherwise(costly: World) -> None:
    plain = costly.play("--set", 'judges=[{name = "brief", kind = "brief_judge:brief"}]', name="plain")
    held = costly.play(*COSTS, name="held")
    assert (plain.code, held.code) in {(0, 0), (0, 3), (3, 0), (3, 3)}, held.err
    seen = metrics(costly, "held")
    assert len(seen) == 2
    for number, round_ in enumerate(seen, 1):
        rows = [r for r in costly.rows("rewards", "held") if r["unit"] == f"round-{number}"]
        asked = {g["id"]: g["prompt_id"] for g in costly.rows("generations", "held")}
        talk = defaultdict(list)
        for r in rows:
            assert ("talk" in r["costs"]) == (r["raw"]["brief"] is not None)
            if "talk" in r["costs"]:
                assert r["costs"]["talk"] == pytest.approx(1.0 - r["raw"]["brief"])
                talk[asked[r["generation_id"]]].append(r["costs"]["talk"])
        means = [math.fsum(costs) / len(costs) for costs in talk.values()]
        assert round_["cost_talk"] == pytest.approx(math.fsum(means) / len(means), abs=1e-5)
        assert round_["costless_talk"] == len(rows) - sum(map(len, talk.values())) > 0
        assert all("brief" not in r["terms"] for r in rows), "a cost is no reward"
    assert seen[0]["multiplier_talk"] == pytest.approx(min(10.0, 15 * (seen[0]["cost_talk"] - 0.05)), abs=1e-4)
    assert seen[0]["multiplier_form"] == 0.0
    assert costly.weights("plain") != costly.weights("held")
    report = (costly.runs / "held" / "report.html").read_text(encoding="utf-8")
    assert "Costs under limits" in report
    assert "Costs under limits" not in (costly.runs / "plain" / "report.html").read_text(encoding="utf-8")


def test_a_resumed_run_goes_on_with_its_multipliers(costly: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from tutelage.loop import improve

    assert costly.play(*COSTS, name="whole").code in (0, 3)
    real = improve.play_round

    def cut(bench: Any, prompts: Any, unit: Any, number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt
        real(bench, prompts, unit, number)

    with monkeypatch.context() as patch:
        patch.setattr(improve, "play_round", cut)
        assert costly.play(*COSTS, name="cut").code == 130
    assert costly.resume(name="cut").code in (0, 3)
    assert costly.weights("cut") == costly.weights("whole")
    assert metrics(costly, "cut") == metrics(costly, "whole")


def test_objectives_on_pairs_read_costs_too(costly: World) -> None:
    """Both runs have the same judges with the same part in the reward; only the limit differs."""
    weights = {}
    for limit in (0.01, 0.99):
        cost = f'constraints=[{{name = "talk", judge = "brief", limit = {limit}}}]'
        short = ("--set", "update.objective=dpo", "--set", "update.rounds=1", "--set", cost)
        assert costly.play(*COSTS[:2], *short, name=f"at-{limit}").code in (0, 3)
        weights[limit] = costly.weights(f"at-{limit}")
    assert weights[0.01] != weights[0.99]


def test_tiers_change_what_is_learned(costly: World) -> None:
    ranks = 'tiers=[{terms = ["fit", "principles"], target = 0.99}, {terms = ["text", "consistency"]}]'
    assert costly.play(name="flat").code in (0, 3)
    assert costly.play("--set", ranks, name="ranked").code in (0, 3)
    assert costly.weights("flat") != costly.weights("ranked")


def test_the_recipes_of_this_page_resolve() -> None:
    from tutelage.config import load_recipe

    root = Path(__file__).parents[2] / "recipes"
    assert {c.name for c in load_recipe(root / "two-costs.toml").constraints} == {"figures", "form"}
    assert len(load_recipe(root / "tiers.toml").tiers) == 2
