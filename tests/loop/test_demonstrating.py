"""The stage of demonstrations: what it learns, what it says of it, resume, and every key of its section."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_world import World, write_lines

from tutelage.config import Demonstrations, Recipe
from tutelage.engines import weights
from tutelage.engines.load import load_model
from tutelage.engines.packing import Group
from tutelage.objectives.inverse import InverseQ, without_shaping
from tutelage.objectives.supervised import Supervised
from tutelage.policy.full import attach_full
from tutelage.policy.learner import Learner, TrainGroup, score
from tutelage.policy.lora import attach
from tutelage.records import Message, Prompt

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


def test_every_key_changes_what_is_learned(world: World, shown: str) -> None:
    base = (*QUICK, shown, "demonstrations.weight=0.01")
    assert world.play(*words(*base), name="base").code == 3
    other = write_lines(world.folder / "other.jsonl", SHOWN[:2])
    settings = (f"file={other}", "epochs=2", "batch=3", "learning_rate=0.001", "weight=0.5", "gamma=0.5")
    assert {s.partition("=")[0] for s in settings} == set(Demonstrations.model_fields)
    for setting in settings:
        name = setting.partition("=")[0]
        assert world.play(*words(*base, f"demonstrations.{setting}"), name=name).code == 3
        assert world.weights("base")["d0"] != world.weights(name)["d0"], setting


def test_what_cannot_be_learned_from_is_refused_before_anything_is_made(world: World, shown: str) -> None:
    from tests.tiny_world import lines_of

    held = lines_of(world.folder / "heldout.jsonl")[0]["prompt"]
    files = {
        "nowhere.jsonl": None,
        "empty.jsonl": [{"prompt": "Why?"}],
        "held.jsonl": [{"prompt": held, "response": "So."}],
        "long.jsonl": [SHOWN[0], {"prompt": "Why?", "response": "because " * 200}],
    }
    said = {
        "nowhere.jsonl": "does not exist",
        "empty.jsonl": "line 1",
        "held.jsonl": "held out",
        "long.jsonl": "demo-2",
    }
    for name, rows in files.items():
        if rows is not None:
            write_lines(world.folder / name, rows)
        done = world.play(*words(*QUICK, f"demonstrations.file={world.folder / name}"))
        assert done.code == 2 and said[name] in done.err, done.err
        assert not (world.runs / "one").exists()


def test_a_controller_and_demonstrations_exclude_each_other() -> None:
    shown = {"demonstrations": {"file": "a"}}
    with pytest.raises(ValueError, match=r"leave demonstrations\.file out"):
        Recipe.model_validate(shown | {"controller": {"enabled": True}})
    Recipe.model_validate(shown | {"supervised": {"enabled": False}, "update": {"rounds": 0}})


@pytest.mark.skipif(not weights.have(weights.EMBEDDED_POLICY), reason="needs the embedded model: run `tutelage fetch`")
def test_on_the_embedded_model_weight_zero_is_supervised_learning() -> None:
    """The whole vocabulary of 49,152, in float32: a mean over the step's tokens instead of its rows."""
    lm = load_model(weights.EMBEDDED_POLICY, device="cpu", dtype="float32")
    adapter = attach(lm.model, rank=2, alpha=4.0, seed=1, first_layer=28)
    learner = Learner(lm, adapter, learning_rate=1e-3)
    shown = []
    for n, row in enumerate(SHOWN[:2]):
        reply = lm.encode_reply(row["response"])
        ones = ((1.0,) * len(reply),)
        prompt = lm.encode(Prompt(f"p{n}", (Message("user", row["prompt"]),)))
        shown.append(TrainGroup(prompt, (reply,), ones, ones, ones))
    tokens = sum(len(g.completions[0]) for g in shown)
    learner.step(shown, Supervised())
    found = []
    for objective in (InverseQ(0.0), Supervised(), InverseQ(0.001)):
        metrics = learner.step(shown, objective, scale=0.0)
        slope = torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])
        found.append((metrics, slope))
    (mean, ours), (summed, theirs), (pulled, other) = found
    assert mean["nll"] == summed["nll"] and mean["loss"] * tokens == pytest.approx(summed["loss"] * 2, rel=1e-5)
    assert float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)) > 0.99999
    assert pulled["loss"] == pytest.approx(pulled["nll"] + 0.001 * pulled["penalty"], rel=1e-5)
    assert float(torch.nn.functional.cosine_similarity(ours, other, dim=0)) < 0.99999


# ---- a reward that is known: all texts of two tokens out of four, and their soft-optimal demonstrator ----

ACTIONS, DEPTH, PROMPT = (20, 30, 40, 50), 2, (5, 6, 7)
EVERY = list(itertools.product(range(4), repeat=DEPTH))
NUMBERS = {s: n for n, s in enumerate(s for d in range(DEPTH) for s in itertools.product(range(4), repeat=d))}
REWARD_SA = np.random.default_rng(3).normal(size=(len(NUMBERS), 4))


def demonstrator() -> np.ndarray:
    """Probabilities (state, action) of the soft-optimal policy; after the last token it ends."""
    value, q_SA = np.zeros(len(NUMBERS)), np.zeros_like(REWARD_SA)
    for state in sorted(NUMBERS, key=len, reverse=True):
        for a in range(4):
            after = NUMBERS.get((*state, a))
            q_SA[NUMBERS[state], a] = REWARD_SA[NUMBERS[state], a] + (0.0 if after is None else value[after])
        value[NUMBERS[state]] = np.logaddexp.reduce(q_SA[NUMBERS[state]])
    return np.exp(q_SA - value[:, None])


def implied(lm: Any) -> np.ndarray:
    """What the logits imply, (state, action)."""
    tokens = tuple(tuple(ACTIONS[a] for a in text) for text in EVERY)
    seen = score(lm, [Group(PROMPT, tokens, tuple(range(len(EVERY))))], budget=4096, totals=True)
    assert seen.total_BT is not None
    after_BT = torch.cat([seen.total_BT[:, 1:], torch.zeros(len(EVERY), 1)], 1)
    found_SA = np.zeros_like(REWARD_SA)
    for text, row in zip(EVERY, (seen.logp_BT + seen.total_BT - after_BT).tolist(), strict=True):
        for t, a in enumerate(text):
            found_SA[NUMBERS[text[:t]], a] = row[t]
    return found_SA


def test_the_reward_behind_demonstrations_is_recovered_through_the_learner(load_tiny: Callable[[str], Any]) -> None:
    """About a hundred texts in the demonstrator's shares, whole weights of a tiny model; shaping taken out.

    With the penalty the rewards as they stand are small, too; without it the logits' level is anything.
    """
    policy_SA = demonstrator()
    shares = [np.prod([policy_SA[NUMBERS[text[:t]], a] for t, a in enumerate(text)]) for text in EVERY]
    texts = [text for text, share in zip(EVERY, shares, strict=True) for _ in range(max(1, round(100 * share)))]
    none = ((0.0,) * DEPTH,) * len(texts)
    shown = TrainGroup(PROMPT, tuple(tuple(ACTIONS[a] for a in text) for text in texts), none, none, none)
    state = np.arange(len(NUMBERS)).repeat(4)
    after = [NUMBERS.get((*s, a), -1) for s in NUMBERS for a in range(4)]
    bare = lambda r_SA: without_shaping(r_SA.ravel(), state, after, gamma=1.0)  # noqa: E731
    sizes = []
    for weight in (0.0, 0.01):
        lm = load_tiny("llama")
        with torch.no_grad():
            lm.head_VD.mul_(4.0)  # its frozen head could not be sure of anything
        learner = Learner(lm, attach_full(lm.model), learning_rate=1e-2)
        for step in range(60):
            learner.step([shown], InverseQ(weight), scale=1.0 - step / 60)
        implied_SA = implied(lm)
        assert np.corrcoef(bare(REWARD_SA), bare(implied_SA))[0, 1] > 0.9
        sizes.append(np.abs(implied_SA).mean())
    assert sizes[1] < 0.75 * sizes[0]
