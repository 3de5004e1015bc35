"""Credit as a critic's head explains its reward: by hand, on a real trunk, and through a run."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny_world import World, cut_in_second_round, tutelage_cli, write_lines

from tutelage.credit.faithfulness import additive_truth, correlation
from tutelage.errors import ModelError, RecipeError
from tutelage.feedback import critic_reward
from tutelage.feedback.critic_data import Passage
from tutelage.loop.crediting import spread_credit
from tutelage.loop.explaining import Explained, explain, onto
from tutelage.policy.learner import Scores
from tutelage.records import Reward

pytest_plugins = ["tests.tiny_world"]

METHODS = ("prefix", "integrated-gradients", "gradient-input")
TEXTS = ["The lamp is old.", "I don't know.", ""]


# -- explaining --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bent(tiny_lm: Any) -> Callable[..., torch.Tensor]:
    """A head on the trunk's features that is not linear."""
    weight_F = 0.3 * torch.randn(4 * tiny_lm.head_VD.shape[1], generator=torch.Generator().manual_seed(1))
    return lambda features_NF, length_N: torch.tanh(features_NF @ weight_F) + 0.1 * length_N


@pytest.mark.parametrize("method", METHODS)
def test_scores_sum_to_the_change_or_say_what_is_missing(method: Any, tiny_lm: Any, bent: Any) -> None:
    found = explain(method, tiny_lm, [Passage(t) for t in TEXTS], bent, contextual=False, steps=128, budget=60)
    for text, one in zip(TEXTS, found, strict=True):
        assert one.tokens == tiny_lm.encode_reply(text)[:-1] and len(one.scores) == len(one.tokens)
        assert one.defect == pytest.approx(abs(one.change - sum(one.scores)), abs=1e-9)
    if method != "gradient-input":
        assert max(one.defect for one in found) < 0.02
    assert found[2].change == pytest.approx(0.0, abs=1e-6)
    assert len({round(s, 5) for s in found[0].scores}) > 3


def test_more_steps_leave_less_missing(tiny_lm: Any, bent: Any) -> None:
    missing = [
        sum(
            one.defect
            for one in explain("integrated-gradients", tiny_lm, [Passage(TEXTS[0])], bent, contextual=False, steps=n)
        )
        for n in (1, 64)
    ]
    assert missing[1] < missing[0] / 3


def test_texts_read_together_are_read_as_if_alone(tiny_lm: Any, bent: Any) -> None:
    shown = [Passage(t) for t in TEXTS]
    for method in METHODS:
        together = explain(method, tiny_lm, shown, bent, contextual=False, budget=500)  # type: ignore[arg-type]
        for passage, one in zip(shown, together, strict=True):
            (alone,) = explain(method, tiny_lm, [passage], bent, contextual=False, budget=1)  # type: ignore[arg-type]
            assert alone.scores == pytest.approx(one.scores, abs=1e-4)


class Bag:
    """A trunk whose states say which letter stands there, and nothing of what came before."""

    end_token, context, lead, device = 0, 100, 0, torch.device("cpu")

    def encode_reply(self, text: str) -> tuple[int, ...]:
        return (*(ord(c) - ord("a") + 1 for c in text), 0)

    def decode(self, tokens: tuple[int, ...]) -> str:
        return "".join(chr(ord("a") + t - 1) for t in tokens)

    def hidden(self, tokens_BT: torch.Tensor, position_BT: torch.Tensor) -> None:
        assert position_BT.shape == tokens_BT.shape
        self.states_TD = torch.eye(4)[tokens_BT[0]]

    @contextlib.contextmanager
    def listened(self, probes: Any) -> Iterator[Callable[[Callable[[], object]], list[torch.Tensor]]]:
        yield lambda forward: [(forward(), self.states_TD)[1] for _ in probes]


def test_a_head_that_adds_up_is_explained_by_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """a earns 1, b -2, c 0.5. The reward of a, ab, abc is 1, -1, -0.5, of nothing 0: told from means of states."""
    monkeypatch.setattr(critic_reward, "listened", Bag.listened)
    worth_V = torch.tensor([0.0, 1.0, -2.0, 0.5])

    def total(features_NF: torch.Tensor, length_N: torch.Tensor) -> torch.Tensor:
        counted_N = length_N.expm1() + 1  # letters, and the end
        return features_NF[:, :4] @ worth_V * counted_N

    lm: Any = Bag()
    found = explain("prefix", lm, [Passage("abc"), Passage("cab"), Passage("")], total, contextual=False)
    assert [one.scores for one in found] == [
        pytest.approx([1.0, -2.0, 0.5], abs=1e-5), pytest.approx([0.5, 1.0, -2.0], abs=1e-5), (),
    ]  # fmt: skip
    assert [one.change for one in found] == pytest.approx([-0.5, -0.5, 0.0], abs=1e-5)
    truth_BT = additive_truth(torch.tensor([[1, 2, 3]]), worth_V, torch.ones(1, 3))
    assert correlation(torch.tensor([found[0].scores]), truth_BT, torch.ones(1, 3)) == pytest.approx(1.0)


# -- onto the policy's tokens ------------------------------------------------------------------------


def test_the_same_tokens_keep_their_scores(tiny_lm: Any) -> None:
    tokens = tiny_lm.encode_reply(TEXTS[0])
    scores = tuple(0.5 * n for n in range(len(tokens) - 1))
    one = Explained(tokens[:-1], scores, 0.0, 0.0)
    assert onto(tiny_lm, one, tokens) == ([*scores, 0.0], False)
    assert onto(tiny_lm, one, tokens[:-1]) == ([*scores], False)


def test_other_tokens_get_what_lies_on_their_characters(tiny_lm: Any) -> None:
    """Drawn letter by letter behind a space; read as the tokenizer cuts it."""
    text = "capital"
    read = tiny_lm.encode_reply(text)[:-1]
    assert len(read) < len(text)
    letters = [tiny_lm.encode_reply(c)[0] for c in " " + text]
    scores = tuple(float(n + 1) for n in range(len(read)))
    values, moved = onto(tiny_lm, Explained(read, scores, 0.0, 0.0), (*letters, tiny_lm.end_token))
    assert moved and len(values) == len(letters) + 1
    assert sum(values) == pytest.approx(sum(scores))
    assert values[0] == 0.0 and values[-1] == 0.0
    width = len(tiny_lm.decode(read[:1]))
    assert values[1 : 1 + width] == pytest.approx([1.0 / width] * width)


def test_nothing_drawn_or_nothing_read(tiny_lm: Any) -> None:
    assert onto(tiny_lm, Explained((), (), 0.0, 0.0), (tiny_lm.end_token,)) == ([0.0], False)
    assert onto(tiny_lm, Explained((5,), (1.0,), 0.0, 0.0), (tiny_lm.end_token,)) == ([0.0], True)


# -- through a run -----------------------------------------------------------------------------------


NOUNS = ("train", "garden", "letter", "river", "window", "song", "market", "bridge", "lamp", "story")


@pytest.fixture(scope="module")
def critics(tmp_path_factory: pytest.TempPathFactory, tiny_dirs: dict[str, Path]) -> dict[str, Path]:
    """By name: on the tiny Llama's trunk, on another's, on words, and on the tiny Llama's tokens."""
    folder = tmp_path_factory.mktemp("critics")
    rows = [
        {"prompt": f"Tell me about the {n} number {i}.", "response": f"The {n} is {w} {i}.", "label": label}
        for i in range(3) for n in NOUNS for w, label in (("stupid", "toxic"), ("old", "fine"))
    ]  # fmt: skip
    data = write_lines(folder / "rows.jsonl", rows)
    found = {}
    for name, features, model in (
        ("own", "trunk", "llama"), ("other", "trunk", "qwen2"), ("words", "words", "llama"),
        ("tokens", "tokens", "llama"),
    ):  # fmt: skip
        found[name] = folder / f"{name}.safetensors"
        done = tutelage_cli(
            "critic", "train", data, "--kind", "toxicity", "--features", features, "--model", tiny_dirs[model],
            "--out", found[name],
        )  # fmt: skip
        assert done.code == 0, done.err
    return found


def with_critics(world: World, **critics: Path) -> World:
    judges = [f'\n[[judges]]\nname = "{name}"\nkind = "critic"\nmodel = "{file}"\n' for name, file in critics.items()]
    world.recipe.write_text(world.recipe.read_text(encoding="utf-8") + "".join(judges), encoding="utf-8")
    return world


def play(world: World, *settings: str, name: str = "one") -> World:
    words = ("update.rounds=1", "prompts.gate_limit=3", "prompts.heldout_limit=3", *settings)
    done = world.play(*[w for s in words for w in ("--set", s)], name=name)
    assert done.code == 3, done.err
    return world


def credits(world: World, name: str) -> dict[str, list[float]]:
    return {row["generation_id"]: row["credit"] for row in world.rows("credits", name)}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_spreads_credit_as_its_critic_explains(
    method: str, new_world: Callable[..., World], critics: dict[str, Path]
) -> None:
    few = ["credit.steps=3"] if method == "integrated-gradients" else []
    world = play(with_critics(new_world(), rude=critics["own"]), f"credit.method={method}", *few)
    rows = world.rows("credits")
    said = {v["subject"]: v["value"] for v in world.rows("verdicts", judge="rude")}
    assert rows and {row["method"] for row in rows} <= {method, "uniform"}
    for row in rows:
        assert sum(row["credit"]) == pytest.approx(row["advantage"], abs=1e-4)
        assert (row["method"] == "uniform") == (said[row["generation_id"]] is None)
    (metrics,) = [m["values"] for m in world.rows("metrics") if m["stage"] == "credit"]
    assert metrics["abstained"] == sum(row["method"] == "uniform" for row in rows)
    assert metrics["explained"] > 0
    if method == "prefix":
        assert metrics["defect"] < 1e-3
    signs = [{math.copysign(1, c) for c in row["credit"][:-1] if abs(c) > 1e-6} for row in rows]
    assert any(len(s) == 2 for s in signs), "a reply's tokens are praised and blamed"
    report = next((world.runs / "one").glob("report.html")).read_text(encoding="utf-8")
    assert method in report


@pytest.mark.parametrize("method", ["attention", "contribution"])
def test_a_run_follows_its_critics_attention(
    method: str, new_world: Callable[..., World], critics: dict[str, Path]
) -> None:
    world = with_critics(new_world(), rude=critics["tokens"])
    settings = (f"credit.method={method}", "credit.judge=rude", "credit.rest=spread")
    rows = play(world, *settings).rows("credits")
    said = {v["subject"]: v["value"] for v in world.rows("verdicts", judge="rude")}
    for row in rows:
        assert sum(row["credit"]) == pytest.approx(row["advantage"], abs=1e-4)
        assert (row["method"] == "uniform") == (said[row["generation_id"]] is None)
        if method == "attention":  # no sign of its own
            assert all(c * row["advantage"] >= -1e-6 for c in row["credit"])
    (metrics,) = [m["values"] for m in world.rows("metrics", stage="credit")]
    assert metrics["explained"] > 0 and metrics.get("defect", 0.0) < 1e-5
    whole = credits(world, "one")
    for n, other in enumerate(("credit.beta=0.3", "credit.drop_sinks=all")):
        assert credits(play(world, *settings, other, name=f"o{n}"), f"o{n}") != whole, other
    assert credits(play(world, *settings, "credit.discount=0", name="o2"), "o2") == whole
    if method == "attention":
        assert credits(play(world, *settings[::2], name="own"), "own") != whole, "that of the model itself"
    assert rows and world.weights("one") != world.weights("o2"), "a discount changes what is learned"


def test_options_change_the_credit(new_world: Callable[..., World], critics: dict[str, Path]) -> None:
    world = with_critics(new_world(), rude=critics["own"], again=critics["own"])
    common = ("credit.judge=rude", "credit.method=prefix")
    base = credits(play(world, *common), "one")
    for n, other in enumerate(("credit.rest=spread", "credit.beta=0.3", "credit.drop_sinks=all")):
        assert credits(play(world, *common, other, name=f"o{n}"), f"o{n}") != base, other
    slow = ("credit.judge=rude", "credit.method=integrated-gradients")
    few, many = (credits(play(world, *slow, f"credit.steps={n}", name=f"s{n}"), f"s{n}") for n in (1, 4))
    assert few != many


def test_a_run_decomposes_its_own_rewards(new_world: Callable[..., World]) -> None:
    """Credit sums to the advantage; what was learned is kept: cut in the second round and resumed, in the same bits."""
    world = new_world()
    settings = ("credit.method=decomposed", "credit.rest=spread", "credit.discount=0", "update.rounds=2")
    play(world, *settings, name="whole")
    rows = world.rows("credits", "whole")
    assert rows and {row["method"] for row in rows} <= {"decomposed", "uniform"}
    for row in rows:
        assert sum(row["credit"]) == pytest.approx(row["advantage"], abs=1e-4)
    first, second = (m["values"] for m in world.rows("metrics", "whole", stage="credit"))
    assert 0 < first["learned_from"] < second["learned_from"] and 0.0 <= second["foretold"] <= 1.0
    assert any(min(row["credit"]) < 0 < max(row["credit"]) for row in rows)
    words = (*settings, "prompts.gate_limit=3", "prompts.heldout_limit=3")
    with cut_in_second_round():
        assert world.play(*[w for s in words for w in ("--set", s)], name="cut").code == 130
    assert world.resume(name="cut").code == 3
    assert world.weights("cut") == world.weights("whole") and credits(world, "cut") == credits(world, "whole")


def test_options_change_the_decomposed_credit(new_world: Callable[..., World]) -> None:
    world = new_world()
    base = credits(play(world, "credit.method=decomposed"), "one")
    others = ("credit.rest=spread", "credit.beta=0.3", "credit.drop_sinks=all", "credit.depth=0.9")
    for n, other in enumerate(others):
        assert credits(play(world, "credit.method=decomposed", other, name=f"o{n}"), f"o{n}") != base, other


def test_the_named_judge_is_the_one_that_is_explained(
    new_world: Callable[..., World], critics: dict[str, Path], tmp_path: Path
) -> None:
    world = with_critics(new_world(), rude=critics["own"], plain=critics["words"])
    assert play(world, "credit.method=prefix", "credit.judge=rude").rows("credits")
    done = world.play("--set", "credit.method=prefix", "--set", "credit.judge=plain", name="two")
    assert done.code == 2 and "'plain', which reads 'words'" in done.err and "--features trunk" in done.err
    done = world.play("--set", "credit.judge=rude", name="two")
    assert done.code == 2 and "'rude', which reads 'trunk'" in done.err and "--features tokens" in done.err
    assert not (world.runs / "two").exists()


def test_a_critic_of_another_trunk_is_refused(world: World, critics: dict[str, Path]) -> None:
    done = with_critics(world, rude=critics["other"]).play("--set", "credit.method=prefix")
    assert done.code == 2 and "another trunk" in done.err


@pytest.mark.parametrize(
    ("judges", "settings", "says"),
    [
        ((), ("credit.method=prefix",), "[[judges]] has 0 of kind = critic: add one"),
        (("a", "b"), ("credit.method=prefix",), "has 2 of kind = critic: name one in credit.judge"),
        (("a",), ("credit.method=prefix", "credit.judge=c"), "the critics of [[judges]] are ['a']"),
        (("a",), ("credit.judge=a", "credit.method=uniform"), "credit.judge is not read by credit.method = uniform"),
        (("a",), ("credit.judge=b",), "the critics of [[judges]] are ['a']"),
        ((), ("credit.method=contribution",), "--features tokens); [[judges]] has 0"),
        (("a",), ("credit.method=prefix", "credit.steps=4"), "credit.steps is not read by credit.method = prefix"),
        ((), ("credit.method=uniform", "credit.drop_sinks=all"), "credit.drop_sinks is not read"),
        ((), ("credit.method=last", "credit.rest=spread"), "credit.rest is not read by credit.method = last"),
        ((), ("credit.method=last", "credit.beta=0.5"), "credit.beta is not read by credit.method = last"),
        ((), ("credit.discount=0.5",), 'set credit.rest = "spread"'),
        ((), ("credit.depth=0.5",), "credit.depth is not read by credit.method = attention"),
        ((), ("credit.method=decomposed", "credit.beta=1", "credit.discount=0"), 'set credit.rest = "spread"'),
        (("a",), ("credit.method=prefix", "credit.beta=1", "credit.discount=0"), 'set credit.rest = "spread"'),
        ((), ("update.objective=ppo", "credit.discount=0.5", "credit.beta=1"), "credit.discount is not read by"),
    ],
)
def test_recipes_that_make_no_sense(
    judges: tuple[str, ...], settings: tuple[str, ...], says: str, world: World, tmp_path: Path
) -> None:
    with_critics(world, **{name: tmp_path / f"{name}.safetensors" for name in judges})
    with pytest.raises(RecipeError) as told:
        world.load(*settings)
    assert says in str(told.value)


def test_a_missing_critic_is_told_by_validate(world: World, tmp_path: Path) -> None:
    with_critics(world, rude=tmp_path / "gone.safetensors")
    done = tutelage_cli("validate", world.recipe, "--set", "credit.method=prefix")
    assert done.code == 2 and "gone.safetensors" in done.err


def test_validate_counts_the_time(world: World, critics: dict[str, Path]) -> None:
    with_critics(world, rude=critics["own"])
    seconds = []
    for words in (("prefix",), ("gradient-input",), ("integrated-gradients", "--set", "credit.steps=200")):
        done = tutelage_cli(
            "validate",
            world.recipe,
            "--json",
            "--set",
            "update.rounds=50",
            "--set",
            f"credit.method={words[0]}",
            *words[1:],
        )
        assert done.code == 0, done.err
        seconds.append(json.loads(done.out)["estimated_seconds_by_unit"]["rounds"])
    assert seconds[2] > 3 * max(seconds[:2])


def test_an_abstention_falls_back_and_is_counted(tiny_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: two replies explained, one abstained on, one group without a difference."""
    import tutelage.loop.crediting as module

    asked: list[str] = []

    def told(_method: str, _lm: Any, shown: list[Passage], *_: Any, **__: Any) -> list[Explained]:
        asked.extend(p.text for p in shown)
        return [Explained((7, 8), (1.0, -0.5 - n), 0.5 - n, 0.5 - n) for n in range(len(shown))]

    monkeypatch.setattr(module, "explain", told)
    monkeypatch.setattr(module, "reward_of_critic", lambda critic: critic)
    critic = object.__new__(module.ComparingCritic)
    critic.name = "rude"
    critic.judging = SimpleNamespace(critic=SimpleNamespace(contextual=True), reader=SimpleNamespace(lm=tiny_lm))
    recipe = SimpleNamespace(
        credit=SimpleNamespace(method="prefix", reads="trunk", beta=1.0, rest="last", steps=1, drop_sinks="none"),
        critic_of_credit="rude", update=SimpleNamespace(token_budget=100),
    )  # fmt: skip
    progress = SimpleNamespace(stage=lambda *_: None, advance=lambda *_: None)
    bench: Any = SimpleNamespace(recipe=recipe, judges=[critic], lm=tiny_lm, progress=progress)
    replies: Any = [[SimpleNamespace(id=f"{p}{g}", text=f"{p}{g}", tokens=(7, 8)) for g in range(3)] for p in range(2)]
    prompts: Any = [SimpleNamespace(messages=()) for _ in range(2)]
    rewards = [[Reward(r.id, 0.0, {}, {"rude": None if r.id == "02" else 0.5}, {}) for r in group] for group in replies]
    kept: dict[str, Any] = {"credit": {}, "metrics": {}}
    unit: Any = SimpleNamespace(
        name="round-1", note=lambda *_: None,
        credit=lambda name, method, advantage, values: kept["credit"].update({name: (method, values)}),
        metrics=lambda number, stage, values: kept["metrics"].update({(number, stage): values}),
    )  # fmt: skip
    scores = Scores(torch.zeros(6, 2), torch.ones(6, 2), torch.zeros(6, 1), torch.zeros(2, 1), None)
    advantage_PG = torch.tensor([[1.0, -1.0, 2.0], [0.0, 0.0, 0.0]])
    credit_BT = spread_credit(bench, prompts, advantage_PG, rewards, scores, replies, unit, 4)
    # Slope 2 of advantages 1 and -1 over rewards 0.5 and -0.5: 2 x (1, -0.5) = (2, -1); 2 x (1, -1.5) = (2, -3).
    assert credit_BT.tolist() == [[2.0, -1.0], [2.0, -3.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert asked == ["00", "01"]
    assert {name: method for name, (method, _) in kept["credit"].items()}["02"] == "uniform"
    numbers = kept["metrics"][4, "credit"]
    assert (numbers["explained"], numbers["abstained"], numbers["groups_flat"], numbers["groups_capped"]) == (
        2,
        1,
        0,
        0,
    )


def test_a_critic_that_reads_other_things_cannot_be_asked() -> None:
    from tutelage.feedback.critic_reward import reward_of_critic

    with pytest.raises(ModelError):
        reward_of_critic(SimpleNamespace(source="both"))  # type: ignore[arg-type]
