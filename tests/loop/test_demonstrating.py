"""The stage of demonstrations: what it learns, what it says of it, resume, and every key of its section."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_world import World, write_lines

from tutelage.config import Recipe
from tutelage.engines.packing import Group
from tutelage.errors import RecipeError
from tutelage.objectives.inverse import InverseQ, reward_distance, without_shaping
from tutelage.policy.full import attach_full
from tutelage.policy.learner import Learner, TrainGroup, score

pytest_plugins = ["tests.tiny_world"]

SHOWN = [{"prompt": f"What is {n}?", "response": f"It is the number {n}, I think."} for n in ("one", "two", "three")]
QUICK = ("update.rounds=0", "supervised.enabled=false", "prompts.gate_limit=3", "prompts.heldout_limit=3",
         "demonstrations.epochs=3", "demonstrations.batch=2", "demonstrations.learning_rate=0.003")  # fmt: skip


def words(*settings: str) -> list[str]:
    return [w for s in settings for w in ("--set", s)]


@pytest.fixture
def shown(world: World) -> str:
    return f"demonstrations.file={write_lines(world.folder / 'shown.jsonl', SHOWN)}"


def test_a_run_of_demonstrations_alone_learns_them_and_says_so(world: World, shown: str) -> None:
    done = world.play(*words(*QUICK, shown, "demonstrations.weight=0.001"))
    assert done.code == 3, done.err
    assert [u["name"] for u in world.rows("units")] == ["start", "demonstrations", "final"]
    assert list(world.weights()) == ["d0"]
    (note,) = world.rows("notes", topic="demonstrations")
    assert [r["prompt"] for r in note["body"]["replies"]] == ["demo-1", "demo-2", "demo-3"]
    assert all(r["after"]["nll"] < r["before"]["nll"] for r in note["body"]["replies"])
    rows = world.rows("metrics", unit="demonstrations")
    steps, (whole,) = [[m for m in rows if m["stage"] == s] for s in ("demonstrations", "implied")]
    assert [m["step"] for m in steps] == list(range(6))
    assert all({"nll", "penalty", "implied_reward", "loss", "grad_norm"} <= set(m["values"]) for m in steps)
    mean = sum(r["after"]["reward"] for r in note["body"]["replies"]) / 3
    assert whole["values"]["reward_after"] == pytest.approx(mean)
    targets = world.rows("targets")
    assert [(t["text"], t["origin"]) for t in targets] == [(s["response"], "demonstration") for s in SHOWN]
    assert "a reply that the user showed" in (world.runs / "one" / "report.html").read_text(encoding="utf-8")


def test_beside_the_other_stages_and_resumed_it_ends_in_the_same_bits(
    world: World, shown: str, played: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage comes after the supervised one, which it leaves as it was; a cut behind it changes nothing."""
    from tutelage.loop import improve

    settings = words(shown, "update.rounds=1", "demonstrations.weight=0.001")
    assert world.play(*settings, name="whole").code == 3
    assert sorted(world.weights("whole")) == ["d0", "r0", "r1"]
    assert world.weights("whole")["r0"] == played.weights()["r0"]
    real = improve.play_round

    def cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(improve, "play_round", cut)
    assert world.play(*settings, name="cut").code == 130
    monkeypatch.setattr(improve, "play_round", real)
    assert world.resume(name="cut").code == 3
    assert world.weights("cut") == world.weights("whole")


@pytest.mark.parametrize(
    "setting",
    ["file=OTHER", "epochs=2", "batch=3", "learning_rate=0.001", "weight=0.5", "gamma=0.5"],
)
def test_every_key_changes_what_is_learned(setting: str, world: World, shown: str) -> None:
    base = (*QUICK, shown, "demonstrations.weight=0.01")
    key, _, value = setting.partition("=")
    other = str(write_lines(world.folder / "other.jsonl", SHOWN[:2])) if value == "OTHER" else value
    assert world.play(*words(*base), name="base").code == 3
    assert world.play(*words(*base, f"demonstrations.{key}={other}"), name="other").code == 3
    assert world.weights("base")["d0"] != world.weights("other")["d0"]


def test_what_cannot_be_learned_from_is_refused_before_anything_is_made(world: World, shown: str) -> None:
    from tests.tiny_world import lines_of

    held = lines_of(world.folder / "heldout.jsonl")[0]["prompt"]
    files = {
        "nowhere.jsonl": None,
        "empty.jsonl": [{"prompt": "Why?"}],
        "held.jsonl": [{"prompt": held, "response": "So."}],
        "long.jsonl": [SHOWN[0], {"prompt": "Why?", "response": "because " * 200}],
    }
    said = {"nowhere.jsonl": "does not exist", "empty.jsonl": "line 1", "held.jsonl": "held out", "long.jsonl": "demo-2"}
    for name, rows in files.items():
        if rows is not None:
            write_lines(world.folder / name, rows)
        done = world.play(*words(*QUICK, f"demonstrations.file={world.folder / name}"))
        assert done.code == 2 and said[name] in done.err, done.err
        assert not (world.runs / "one").exists()


def test_senseless_sections_are_refused() -> None:
    for section, said in (
        ({"demonstrations": {"weight": 0.1}}, "not read without"),
        ({"demonstrations": {"file": "a"}, "controller": {"enabled": True}}, "leave demonstrations.file out"),
    ):
        with pytest.raises(ValueError, match=said):
            Recipe.model_validate(section)
    Recipe.model_validate(
        {"demonstrations": {"file": "a"}, "supervised": {"enabled": False}, "update": {"rounds": 0}}
    )
    assert issubclass(RecipeError, Exception)


# ---- a reward that is known: all texts of three tokens out of three, and their soft-optimal demonstrator ----

ACTIONS, DEPTH, PROMPT = (20, 30, 40), 3, (5, 6, 7)


def tree() -> tuple[dict[tuple[int, ...], int], np.ndarray]:
    """Number of each text that goes on, and a random reward (state, action)."""
    states = [s for d in range(DEPTH) for s in itertools.product(range(3), repeat=d)]
    return {s: n for n, s in enumerate(states)}, np.random.default_rng(3).normal(size=(len(states), 3))


def demonstrator(numbers: dict[tuple[int, ...], int], reward_SA: np.ndarray) -> np.ndarray:
    """Probabilities (state, action) of the soft-optimal policy; after the third token it ends."""
    value = np.zeros(len(numbers))
    q_SA = np.zeros_like(reward_SA)
    for state in sorted(numbers, key=len, reverse=True):
        for a in range(3):
            after = numbers.get((*state, a))
            q_SA[numbers[state], a] = reward_SA[numbers[state], a] + (0.0 if after is None else value[after])
        value[numbers[state]] = np.logaddexp.reduce(q_SA[numbers[state]])
    return np.exp(q_SA - value[:, None])


def test_the_reward_behind_demonstrations_is_recovered_through_the_learner(load_tiny: Callable[[str], Any]) -> None:
    """Whole weights of a tiny model, 300 texts; what the logits imply against the reward, shaping taken out.

    With the penalty the rewards as they stand are small, too; without it the logits' level is anything.
    """
    numbers, reward_SA = tree()
    policy_SA = demonstrator(numbers, reward_SA)
    draw = np.random.default_rng(0)
    texts: list[tuple[int, ...]] = []
    for _ in range(300):
        text: tuple[int, ...] = ()
        while len(text) < DEPTH:
            text = (*text, int(draw.choice(3, p=policy_SA[numbers[text]])))
        texts.append(text)
    tokens = [tuple(ACTIONS[a] for a in text) for text in texts]
    none = tuple((0.0,) * DEPTH for _ in tokens)
    found = {}
    for weight in (0.0, 0.02):
        lm = load_tiny("llama")
        learner = Learner(lm, attach_full(lm.model), learning_rate=3e-3)
        group = TrainGroup(PROMPT, tuple(tokens), none, none, none)
        for step in range(60):
            learner.step([group], InverseQ(weight), scale=1.0 - step / 60)
        every = list(itertools.product(range(3), repeat=DEPTH))
        with torch.no_grad():
            seen = score(
                lm, [Group(PROMPT, tuple(tuple(ACTIONS[a] for a in t) for t in every), tuple(range(27)))],
                budget=4096, totals=True,
            )  # fmt: skip
        assert seen.total_BT is not None
        after_BT = torch.cat([seen.total_BT[:, 1:], torch.zeros(27, 1)], 1)
        implied_BT = (seen.logp_BT + seen.total_BT - after_BT).numpy()
        implied_SA = np.zeros_like(reward_SA)
        for text, row in zip(every, implied_BT, strict=True):
            for t, a in enumerate(text):
                implied_SA[numbers[text[:t]], a] = row[t]
        state = np.arange(len(numbers)).repeat(3)
        after = [numbers.get((*s, a), -1) for s in numbers for a in range(3)]
        truth, got = (without_shaping(r.ravel(), state, after, gamma=1.0) for r in (reward_SA, implied_SA))
        found[weight] = (np.corrcoef(truth, got)[0, 1], reward_distance(truth, got), np.abs(implied_SA).mean())
    print(found)
    assert found[0.02][0] > 0.9 and found[0.0][0] > 0.9
    assert found[0.02][2] < 0.5 * found[0.0][2]
