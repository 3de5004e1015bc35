"""`tutelage run controller`: search, rounds, duel and gate on a tiny model; what is kept, and going on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_world import Done, World, make_world, tutelage_cli

from tutelage.applications.controller import beats_the_best_single, load_controlled
from tutelage.config import Gate, load_recipe
from tutelage.errors import StoreError
from tutelage.policy.controller import Controller
from tutelage.records import Evidence, Message, Prompt

pytest_plugins = ["tests.tiny_world"]

SECTION: dict[str, Any] = {
    "enabled": True, "temperatures": [0.0, 0.5, 1.0], "top_k": [0, 5], "masks": ["no-a=a"],
    "rounds": 2, "prompts": 6, "samples": 3, "batch": 3, "measure_samples": 2, "grid_prompts": 8,
}  # fmt: skip
SETTINGS = 10
REQUIRED = (
    "run", "recipe_hash", "model", "rounds", "seconds", "completions", "tokens_generated", "peak_memory_bytes",
    "decision", "evaluation",
)  # fmt: skip


@pytest.fixture(scope="module")
def _ended(
    tmp_path_factory: pytest.TempPathFactory, tiny_dirs: dict[str, Path], tiny_home: Path
) -> Iterator[tuple[World, Done]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUTELAGE_HOME", str(tiny_home))
        made = make_world(tmp_path_factory.mktemp("controller") / "world", tiny_dirs["llama"], controller=SECTION)
        yield made, made.play()


@pytest.fixture
def ended(_ended: tuple[World, Done], tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world in which the run `one` has ended; tests only read it."""
    monkeypatch.setenv("TUTELAGE_HOME", str(tiny_home))
    return _ended[0]


@pytest.fixture
def ended_code(_ended: tuple[World, Done]) -> int:
    """That run's exit code."""
    return _ended[1].code


def summary_of(world: World, name: str = "one") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world.runs / name / "summary.json").read_text(encoding="utf-8"))
    return found


def checkpoints(world: World, name: str = "one") -> dict[str, bytes]:
    found = (world.runs / name / "checkpoints").glob("[!.]*/*.safetensors")
    return {f"{p.parent.name}/{p.name}": p.read_bytes() for p in found}


def notes(world: World, topic: str, name: str = "one") -> dict[str, Any]:
    """Bodies of a topic by unit; what a unit keeps twice is joined."""
    found: dict[str, Any] = {}
    for row in world.rows("notes", name=name, topic=topic):
        body = row["body"]
        found[row["unit"]] = {**found.get(row["unit"], {}), **body} if isinstance(body, dict) else body
    return found


# -- a run ------------------------------------------------------------------------------------------


def test_a_run_ends_with_a_decision_and_its_exit_code(ended: World, ended_code: int) -> None:
    summary = summary_of(ended)
    assert set(REQUIRED) <= set(summary)
    assert ended_code == (0 if summary["decision"] == "promoted" else 3)
    assert summary["decision"] in ("promoted", "rejected")
    assert [(u["name"], u["stage"], u["version"]) for u in ended.rows("units")] == [
        ("grid", "search", "c0"), ("round-1", "policy-gradient", "c1"), ("round-2", "policy-gradient", "c2"),
        ("final", "evaluate", "c2"),
    ]  # fmt: skip
    (decision,) = ended.rows("decisions")
    assert (decision["gate"], decision["candidate"], decision["baseline"]) == ("controller", "c2", "best-single")
    assert bool(decision["accepted"]) == (summary["decision"] == "promoted")
    assert decision["evidence"][0]["suite"] == "gate" and summary["evaluation"][0]["suite"] == "heldout"
    for name in ("recipe.toml", "ledger.db", "metrics.jsonl", "summary.json", "report.html"):
        assert (ended.runs / "one" / name).stat().st_size > 0


def test_the_summary_says_whether_the_controller_beat_the_best_single_setting(ended: World) -> None:
    summary = summary_of(ended)
    told, reward = summary["controller"], summary["evaluation"][0]
    assert (reward["metric"], reward["n"]) == ("reward", 9)
    assert told["beats_best_single"] == (reward["low"] > 0)
    assert reward["low"] <= reward["after"] - reward["before"] <= reward["high"]
    assert [row["replies"] for row in told["grid"]] == [8] * SETTINGS
    best = max(told["grid"], key=lambda row: row["reward"])
    assert told["best_single"] == best["setting"]
    assert sum(told["chosen"].values()) == pytest.approx(1.0)
    time = told["extra_time"]
    assert time["steered_seconds_a_token"] / time["plain_seconds_a_token"] - 1 == pytest.approx(time["extra"])
    assert 0 < time["choosing"] < 1
    assert summary["completions"] == len(ended.rows("generations")) == 8 * 10 + 2 * 6 * 3 + 2 * 9 * 2 * 2
    assert summary["tokens_generated"] == sum(len(g["tokens"]) for g in ended.rows("generations"))


def test_the_search_recomputes_from_the_ledger(ended: World) -> None:
    grid = notes(ended, "grid")["grid"]
    choices, names = notes(ended, "choices")["grid"], notes(ended, "settings")["grid"]
    totals: dict[str, list[float]] = {}
    for row in ended.rows("rewards", unit="grid"):
        totals.setdefault(names[choices[row["generation_id"]][0]], []).append(row["total"])
    assert [g["setting"] for g in grid] == names and len(names) == SETTINGS
    for g in grid:
        assert g["reward"] == pytest.approx(math.fsum(totals[g["setting"]]) / len(totals[g["setting"]]))


def test_every_reply_has_its_choice_in_the_ledger(ended: World) -> None:
    names = notes(ended, "settings")["grid"]
    choices = notes(ended, "choices")
    drawn = set()
    for row in ended.rows("generations"):
        (action,) = choices[row["unit"]][row["id"]]
        said = f"temperature {row['settings']['temperature']:g}"
        said += f", top-k {row['settings']['top_k']}" if row["settings"]["top_k"] else ""
        assert names[action].removesuffix(", mask no-a") == said
        drawn.add(action) if row["unit"] == "round-1" else None
    assert len(drawn) > 3
    assert {r["policy_version"] for r in ended.rows("generations", unit="final")} == {"best-single", "c2"}


def test_evaluation_takes_the_likeliest_choice_and_draws_both_from_the_same_numbers(ended: World) -> None:
    choices = notes(ended, "choices")["final"]
    rows = ended.rows("generations", unit="final")
    mine: dict[str, set[int]] = {}
    for row in rows:
        if row["policy_version"] == "c2":
            mine.setdefault(row["prompt_id"], set()).add(choices[row["id"]][0])
    assert {len(actions) for actions in mine.values()} == {1}  # one prompt, one state, one likeliest choice
    best = {choices[r["id"]][0] for r in rows if r["policy_version"] == "best-single"}
    assert len(best) == 1
    texts = {(r["policy_version"], r["prompt_id"], r["sample"]): r["text"] for r in rows}
    for prompt, actions in mine.items():
        if actions == best:
            assert texts["c2", prompt, 0] == texts["best-single", prompt, 0]


def test_the_report_shows_the_decision(ended: World) -> None:
    page = (ended.runs / "one" / "report.html").read_text(encoding="utf-8")
    assert "best single setting" in page or "beat" in page
    assert summary_of(ended)["controller"]["best_single"] in page


def test_what_was_trained_can_be_used(ended: World) -> None:
    used = load_controlled("one", runs=ended.runs)
    assert summary_of(ended)["decision"] == "rejected" and used.version == "one@c2 (rejected by the gate)"
    prompts = [Prompt("q", (Message("user", "What is the capital of France?"),))]
    (first,), (again,) = used.reply(prompts, max_new_tokens=6), used.reply(prompts, max_new_tokens=6)
    assert first.tokens == again.tokens
    assert used.steering.traces[first.id].actions_T.numel() == 1
    assert load_controlled("one", runs=ended.runs, version="c0").version == "one@c0"
    with pytest.raises(StoreError, match="missing"):
        load_controlled("one", runs=ended.runs, version="c9")


def test_chat_answers_as_the_controller_chooses(ended: World) -> None:
    done = tutelage_cli(
        "chat", "one", "--runs", ended.runs, "--prompt", "Who is Ada?", "--max-new-tokens", "6", "--json"
    )
    told = json.loads(done.out)
    prompt = Prompt("chat", (Message("user", "Who is Ada?"),))
    assert told["after"] == load_controlled("one", runs=ended.runs).reply([prompt], max_new_tokens=6)[0].text
    assert done.code == 0 and told["before"] != told["after"]


def test_export_of_a_controller_is_refused(ended: World, tmp_path: Path) -> None:
    done = tutelage_cli("export", "one", "--runs", ended.runs, "--merged", tmp_path / "merged")
    assert done.code == 2 and "trained a controller" in done.err and not (tmp_path / "merged").exists()


def test_the_models_weights_are_as_they_were(ended: World) -> None:
    assert {name.partition("/")[2] for name in checkpoints(ended)} == {
        "controller.safetensors",
        "optimizer.safetensors",
    }
    assert (summary_of(ended)["candidate"], len(checkpoints(ended))) == ("start", 6)


# -- going on ---------------------------------------------------------------------------------------


def test_a_resumed_run_ends_with_the_same_weights(ended: World, new_world: Callable[..., World]) -> None:
    other = new_world(controller=SECTION)
    assert other.play("--set", "limits.seconds=0.001").code == 5
    assert [u["name"] for u in other.rows("units")] == ["grid"]
    # A round that broke off after its checkpoint was written leaves something behind.
    (other.runs / "one" / "checkpoints" / "c1").mkdir()
    done = other.resume("--set", "limits.seconds=1000")
    assert done.code in (0, 3), done.err
    assert checkpoints(other) == checkpoints(ended)
    keep = ("evaluation", "decision", "completions", "tokens_generated", "rounds")
    assert {k: summary_of(other)[k] for k in keep} == {k: summary_of(ended)[k] for k in keep}
    again = other.resume("--set", "limits.seconds=1000")
    assert again.code == done.code
    assert len(other.rows("units")) == 4


def test_at_every_token_with_latent_preferences(new_world: Callable[..., World]) -> None:
    other = new_world(controller=SECTION | {"scope": "token", "objective": "lpo", "rounds": 1, "masks": []})
    done = other.play()
    assert done.code in (0, 3), done.err
    choices = notes(other, "choices")
    for row in other.rows("generations"):
        once = row["policy_version"] == "best-single"  # a single setting needs no choice at every token
        assert len(choices[row["unit"]][row["id"]]) == (1 if once else len(row["tokens"]))
    mixed = [len(set(actions)) for actions in choices["round-1"].values()]
    assert max(mixed) > 1
    assert Controller.load(other.runs / "one" / "checkpoints" / "c1" / "controller.safetensors").per_token
    told = summary_of(other)["controller"]
    assert (told["scope"], told["objective"]) == ("token", "lpo")
    assert any(m["stage"] == "controller" and "margin" in m["values"] for m in other.rows("metrics"))


def test_without_a_reward_the_run_stops_and_nothing_is_promoted(new_world: Callable[..., World]) -> None:
    other = new_world(controller=SECTION, feedback={"judges": ["text"]})
    done = other.play()
    assert done.code == 3
    assert summary_of(other)["decision"] == "stopped"
    assert other.rows("decisions")[0]["reason"].startswith("rejected: no reply under any setting has a reward")
    with pytest.raises(StoreError, match="no controller"):
        load_controlled("one", runs=other.runs)
    assert other.resume().code == 3


# -- the gate ---------------------------------------------------------------------------------------


def evidence(low: float | None, high: float | None, correct: float | None = 0.0) -> list[Evidence]:
    return [
        Evidence("gate", "reward", -0.1, 0.1, low, high, 40),
        Evidence("gate", "correct_answerable", 0.4, 0.4, correct, 0.1, 40),
    ]


@pytest.mark.parametrize(
    ("found", "rules", "accepted", "reason"),
    [
        (evidence(0.05, 0.3), Gate(), True, "beats the best single setting"),
        (evidence(0.0, 0.3), Gate(), False, "does not surely beat"),
        (evidence(-0.1, 0.3), Gate(), False, "between -0.100 and +0.300, n = 40"),
        (evidence(None, None), Gate(), False, "no prompt of the gate suite"),
        ([], Gate(), False, "no prompt of the gate suite"),
        (evidence(0.05, 0.3), Gate(enabled=False), False, "the gate is off"),
        (evidence(0.05, 0.3, -0.2), Gate(), False, "correct answers may have fallen by more than 15%"),
        (evidence(0.05, 0.3, -0.2), Gate(max_correct_loss=0.25), True, "beats"),
        (evidence(0.05, 0.3, None), Gate(), True, "beats"),
    ],
)
def test_the_gate_rejects_unless_the_controller_surely_wins(
    found: list[Evidence], rules: Gate, accepted: bool, reason: str
) -> None:
    decision = beats_the_best_single(found, rules, "c3")
    assert decision.accepted == accepted
    assert reason in decision.reason
    assert decision.reason.startswith("promoted: " if accepted else "rejected: ")
    assert decision.evidence == tuple(found)


def test_the_built_in_recipe_is_one_of_a_controller() -> None:
    rules = load_recipe("controller").controller
    assert rules.enabled
    assert rules.choices == 6 and rules.openings == ("I don't know", "Could you tell me")
