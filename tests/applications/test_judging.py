"""Judges of the user's own, end to end: in a run, in a check, and in a second look at an old run."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import tomlkit
from tests.tiny_world import DATA, tutelage_cli, write_lines

from tutelage.engines import weights

pytest_plugins = ["tests.tiny_world"]

CODE = """
import zlib
def longest(prompt, reply):
    return len(reply)

def coin(prompt, first, second):
    return 1.0 if zlib.crc32((prompt + first + second).encode()) % 2 else -1.0

def right(prompt, first, second):
    return 3.0 if first.startswith("good") else -3.0

def silent(prompt, reply):
    return None
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "own_judges.py").write_text(CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_judges"
    sys.modules.pop("own_judges", None)


@pytest.fixture
def pairs(tmp_path):
    rows = [
        {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i} " + "x" * (i % 7)} for i in range(60)
    ]
    return write_lines(tmp_path / "pairs.jsonl", rows)


def with_judges(world, *judges, **sections):
    recipe = tomlkit.parse(world.recipe.read_text(encoding="utf-8"))
    recipe["judges"] = list(judges)
    for name, values in sections.items():
        recipe[name].update(values)
    world.recipe.write_text(tomlkit.dumps(recipe), encoding="utf-8")
    return world


def test_a_model_judge_and_code_give_verdicts_and_terms(world, code):
    own = {"name": "self", "kind": "pointwise", "model": world.load().model.name, "weight": 0.5}
    longest = {"name": "longest", "kind": f"{code}:longest"}
    with_judges(world, own, longest)
    done = world.play("--set", "update.rounds=1")
    assert done.code == 3, done.err
    verdicts = world.rows("verdicts", judge="longest")
    replies = {g["id"]: g["text"] for g in world.rows("generations")}
    assert verdicts and all(v["value"] == len(replies[v["subject"]]) for v in verdicts)
    asked = world.rows("verdicts", judge="self")
    assert len(asked) == len(verdicts)
    assert all(v["value"] is None or 0 <= v["value"] <= 1 for v in asked)
    rewards = world.rows("rewards")
    assert all({"self", "longest"} <= set(r["terms"]) for r in rewards)
    by_id = {v["subject"]: v["value"] for v in verdicts}
    assert all(r["raw"]["longest"] == by_id[r["generation_id"]] for r in rewards)
    (note,) = world.rows("notes", topic="judges")
    assert [j["outcome"] for j in note["body"]] == ["unchecked", "unchecked"]


def test_a_judge_changes_what_is_learned(new_world, code):
    plain = new_world("plain")
    judged = with_judges(new_world("judged"), {"name": "longest", "kind": f"{code}:longest", "weight": 9.0})
    for one in (plain, judged):
        assert one.play("--set", "update.rounds=1").code == 3
    assert plain.weights() != judged.weights()


def test_a_judge_that_never_answers_gives_no_reward(world, code):
    with_judges(world, {"name": "silent", "kind": f"{code}:silent"}, feedback={"judges": ["text"]})
    done = world.play("--set", "update.rounds=1", "--set", "supervised.enabled=false")
    assert done.code == 3, done.err
    rewards = world.rows("rewards")
    assert rewards and all(r["total"] is None for r in rewards)
    assert all(v["value"] is None for v in world.rows("verdicts", judge="silent"))


def test_a_check_prints_a_row_a_judge_and_refuses_a_coin(code, pairs, tmp_path, new_world):
    out = tmp_path / "audit.json"
    done = tutelage_cli(
        "judge", "check", "--judge", f"{code}:right", "--judge", f"{code}:longest", "--pairs", pairs,
        "--no-injections", "--out", out, "--json",
    )  # fmt: skip
    right, longest = json.loads(done.out)
    assert done.code == 4
    assert (right["outcome"], right["accuracy"][0], right["n"]) == ("pass", 1.0, 60)
    assert longest["outcome"] == "refuse"
    kept = json.loads(out.read_text(encoding="utf-8"))
    assert len(kept["opinions"]["right"]) == 60
    good = tutelage_cli("judge", "check", "--judge", f"{code}:right", "--pairs", pairs, "--no-injections")
    assert good.code == 0 and "right: pass" in good.out


def test_a_refused_judge_does_not_train_alone(world, code, pairs):
    with_judges(world, {"name": "coin", "kind": f"{code}:coin"}, feedback={"judges": ["text"]})
    assert tutelage_cli("judge", "check", "--judge", f"{code}:coin", "--pairs", pairs, "--no-injections").code == 4
    words = ("--set", "update.rounds=1", "--set", "supervised.enabled=false")
    refused = world.play(*words)
    assert refused.code == 4
    assert "failed its check" in refused.err and "feedback.allow_refused" in refused.err
    assert not (world.runs / "one").exists()
    insisted = world.play(*words, "--set", "feedback.allow_refused=true")
    assert insisted.code == 3, insisted.err
    (note,) = world.rows("notes", topic="judges")
    assert note["body"][0]["outcome"] == "refuse"
    assert "trained all the same" in note["body"][0]["why"][-1]
    page = (world.runs / "one" / "report.html").read_text(encoding="utf-8")
    assert "trained all the same" in page


def test_beside_other_judges_a_refused_one_may_speak(world, code, pairs):
    with_judges(world, {"name": "coin", "kind": f"{code}:coin"})
    tutelage_cli("judge", "check", "--judge", f"{code}:coin", "--pairs", pairs, "--no-injections")
    assert world.play("--set", "update.rounds=1").code == 3


def test_a_fusion_is_fitted_checked_and_teaches(world, code, pairs, tmp_path):
    """`right` is always right and `coin` is a coin: the fusion listens to one of them, alone, in a check and in a run."""
    panel = tmp_path / "panel.json"
    two = ["--judge", f"{code}:right", "--judge", f"{code}:coin"]
    done = tutelage_cli("judge", "fuse", *two, "--pairs", pairs, "--labels", "30", "--out", panel, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["labels"], found["pairs"]) == (30, 30)
    assert found["weights"]["right"] > 5 * abs(found["weights"]["coin"])
    assert found["accuracy"]["fusion"] == [1.0, 1.0, 1.0] and found["beats"]["coin"][1] > 0
    shown = tutelage_cli("judge", "fuse", *two, "--pairs", pairs, "--labels", "30", "--out", panel)
    assert "fitted on 30 labels" in shown.out and "right" in shown.out
    check = tutelage_cli("judge", "check", "--judge", f"fusion={panel}", "--pairs", pairs, "--no-injections", "--json")
    (row,) = json.loads(check.out)
    assert row["accuracy"][0] == 1.0 and check.code == 0
    with_judges(world, {"name": "panel", "kind": "fusion", "model": str(panel)})
    assert world.play("--set", "update.rounds=1").code == 3
    verdicts = world.rows("verdicts", judge="panel")
    assert verdicts and all(0 < v["value"] < 1 and {"against", "log_odds"} <= set(v["evidence"]) for v in verdicts)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--judge", "{code}:right"], "at least two"),
        (["--judge", "{code}:right", "--judge", "{code}:right"], "at least two"),
        (["--judge", "{code}:right", "--judge", "{code}:coin", "--labels", "61"], "61 labels"),
        (["--judge", "{code}:right", "--judge", "{code}:coin", "--labels", "0"], "0 labels"),
    ],
)
def test_a_fusion_that_cannot_be_is_explained(words, said, code, pairs, tmp_path):
    out = tmp_path / "panel.json"
    done = tutelage_cli("judge", "fuse", *(w.format(code=code) for w in words), "--pairs", pairs, "--out", out)
    assert done.code == 2 and said in done.err and "Traceback" not in done.err and not out.exists()


@pytest.mark.skipif(not weights.have(weights.EMBEDDED_ENCODER), reason="needs the embedded encoder: `tutelage fetch`")
def test_stability_is_a_judge_of_a_run(world):
    own = {"name": "stable", "kind": "stability", "model": world.load().model.name}
    with_judges(world, own)
    assert world.play("--set", "update.rounds=1").code == 3
    verdicts = world.rows("verdicts", judge="stable")
    known = [v for v in verdicts if v["value"] is not None]
    assert verdicts and all(0 <= v["value"] <= 1 and v["evidence"]["ways"] for v in known)
    assert all(v["reason"].startswith("abstains") for v in verdicts if v["value"] is None)


def test_an_old_run_is_judged_again_without_generating(played, code, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(played.runs, runs)
    first = tutelage_cli("rejudge", "one", "--runs", runs, "--judge", f"{code}:longest", "--json")
    assert first.code == 0, first.err
    found = json.loads(first.out)
    assert found["unit"] == "rejudge-1"
    assert found["judges"]["longest"]["verdicts"] == found["replies"] > 0
    other = tmp_path / "other.toml"
    text = DATA / "constitutions" / "honesty.toml"
    other.write_text(text.read_text(encoding="utf-8").replace("weight = 1.0", "weight = 9.0", 1), encoding="utf-8")
    second = tutelage_cli("rejudge", "one", "--runs", runs, "--constitution", other, "--json")
    assert second.code == 0, second.err
    again = json.loads(second.out)
    assert again["unit"] == "rejudge-2"
    assert again["judges"]["constitution"]["compared"] > 0
    from tutelage.store.ledger import Ledger

    ledger = Ledger(runs / "one" / "ledger.db", readonly=True)
    units = {g["unit"] for g in ledger.rows("generations")}
    versions = {v["judge_version"] for v in ledger.rows("verdicts", judge="constitution")}
    ledger.close()
    assert not any(u.startswith("rejudge") for u in units)
    assert len(versions) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("judge", "check", "--judge", "nothing-like-this"), "neither"),
        (("judge", "check", "--judge", "pairwise="), "names no model"),
        (("judge", "check", "--judge", "no.such.module:name"), "cannot be imported"),
        (("judge", "check", "--judge", "nowhere.gguf"), "cannot be read"),
        (("judge", "check", "--judge", "own_judges:right", "--pairs", "nowhere.jsonl"), "does not exist"),
        (("judge", "check", "--judge", "own_judges:right", "--pairs", "builtin:nothing"), "builtin:pairs"),
        (("judge", "check", "--judge", "own_judges:right", "--out", "/nowhere/x.json"), "cannot be written"),
        (("judge", "check"), "--judge"),
    ],
)
def test_wrong_use_is_explained(words, said, code, new_world):
    done = tutelage_cli(*words)
    assert done.code == 2
    assert said in done.err


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({"name": "fit", "kind": "a:b"}, "built-in reward term"),
        ({"name": "x", "kind": "pairs", "model": "m"}, "kind is 'pairs'"),
        ({"name": "x", "kind": "pairwise"}, "names no model"),
        ({"name": "x", "kind": "a:b", "model": "m"}, "neither model nor prompt"),
        ({"name": "x", "kind": "a:b", "weight": 0}, "weight"),
        ({"kind": "a:b"}, "name"),
    ],
)
def test_a_senseless_judge_of_a_recipe_is_refused(judge, said, world):
    done = with_judges(world, judge).play()
    assert done.code == 2
    assert said in done.err


def test_two_judges_of_one_name_are_refused(world):
    done = with_judges(world, {"name": "x", "kind": "a:b"}, {"name": "x", "kind": "c:d"}).play()
    assert done.code == 2 and "same name" in done.err
