"""A recipe's judge behind a server: failures stay missing, a spent budget can be resumed, no key is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomlkit
from tests.faulty_server import serve
from tests.tiny_world import World, tutelage_cli, write_lines

from tutelage.engines.http import KEY_VARIABLE

pytest_plugins = ["tests.tiny_world"]

SECRET = "sk-made-up-0123456789"  # noqa: S105 - made up
WORDS = ("--set", "update.rounds=1", "--set", "supervised.enabled=false")


def with_judge(world: World, url: str, **more: object) -> World:
    recipe = tomlkit.parse(world.recipe.read_text(encoding="utf-8"))
    recipe["judges"] = [{"name": "served", "kind": "pairwise", "model": f"m@{url}", **more}]
    recipe["feedback"]["judges"] = ["text"]
    world.recipe.write_text(tomlkit.dumps(recipe), encoding="utf-8")
    return world


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of one test are not those of another."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(tiny_home / "models")
    monkeypatch.setattr("tutelage.applications.judging.cache_dir", lambda: home)


def test_a_failed_verdict_is_missing_and_changes_no_other(new_world, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    with serve() as good:
        clean = with_judge(new_world("clean"), good.url)
        assert clean.play(*WORDS).code == 3
        assert good.keys == {f"Bearer {SECRET}"}
    with serve(rate=0.3, faults={"refusal": 1.0, "filtered": 1.0}) as bad:
        torn = with_judge(new_world("torn"), bad.url)
        done = torn.play(*WORDS)
        assert done.code == 3, done.err
        assert bad.calls["refusal"] + bad.calls["filtered"] > 0
    replies = [{g["id"]: g["text"] for g in w.rows("generations")} for w in (clean, torn)]
    assert replies[0] == replies[1]
    before = {v["subject"]: v for v in clean.rows("verdicts", judge="served")}
    after = {v["subject"]: v for v in torn.rows("verdicts", judge="served")}
    assert before.keys() == after.keys()
    whole = [s for s, v in after.items() if v["value"] is not None and not v["evidence"]["unread"]]
    lost = [s for s, v in after.items() if v["value"] is None]
    assert whole and lost
    assert all(after[s]["value"] == before[s]["value"] for s in whole)
    assert all(after[s]["reason"].startswith("abstains") for s in lost)
    rewards = {r["generation_id"]: r for r in torn.rows("rewards")}
    assert all(rewards[s]["raw"]["served"] is None and rewards[s]["total"] is None for s in lost)
    # Where every reply of a group was judged wholly, its rewards are those of the clean run, to the last bit.
    clean_rewards = {r["generation_id"]: r["total"] for r in clean.rows("rewards")}
    groups: dict[str, list[str]] = {}
    for g in torn.rows("generations"):
        groups.setdefault(g["prompt_id"], []).append(g["id"])
    same = [ids for ids in groups.values() if set(ids) <= set(whole)]
    assert same
    assert all(rewards[i]["total"] == clean_rewards[i] for ids in same for i in ids)
    for folder in (clean.runs, torn.runs):
        for path in folder.rglob("*"):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def test_a_spent_budget_stops_the_run_and_it_goes_on(new_world):
    with serve() as server:
        world = with_judge(new_world(), server.url, max_calls=20, parallel=4)
        first = world.play(*WORDS)
        assert first.code == 5, first.err
        assert server.calls["right"] <= 20
        for _ in range(20):
            done = world.resume()
            if done.code != 5:
                break
        assert done.code == 3, done.err
        verdicts = world.rows("verdicts", judge="served")
        # What was paid for was kept: no question went out twice.
        assert sum(server.calls.values()) == len(server.asked)
        assert verdicts and all(v["value"] is not None for v in verdicts)


def test_a_server_is_checked_as_any_judge_is(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
    pairs = write_lines(tmp_path / "p.jsonl", rows)
    with serve() as server:
        done = tutelage_cli(
            "judge", "check", "--judge", f"m@{server.url}", "--pairs", pairs, "--no-injections", "--json"
        )
        (row,) = json.loads(done.out)
        assert row["abstained"] == 0 and row["tokens_per_1000"] > 0
        assert done.code == 4  # it says what a hash says
        again = tutelage_cli(
            "judge", "check", "--judge", f"m@{server.url}", "--pairs", pairs, "--no-injections", "--json"
        )
        assert server.calls["right"] == 80  # both orders, once
        assert json.loads(again.out)[0]["accuracy"] == row["accuracy"]


def test_nobody_there_is_an_error_before_anything_is_done(new_world):
    world = with_judge(new_world(), "http://127.0.0.1:9")
    done = world.play(*WORDS)
    assert done.code == 2
    assert "127.0.0.1:9" in done.err


def anchored(new_world, server, tmp_path, **more):
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(60)]
    world = with_judge(new_world(), server.url)
    recipe = tomlkit.parse(world.recipe.read_text(encoding="utf-8"))
    recipe["feedback"].update({"anchors": str(write_lines(tmp_path / "anchors.jsonl", rows)), **more})
    world.recipe.write_text(tomlkit.dumps(recipe), encoding="utf-8")
    return world


def rounds(count):
    return ("--set", f"update.rounds={count}", "--set", "supervised.enabled=false")


def test_a_judge_that_stays_the_same_keeps_its_weight(new_world, tmp_path):
    with serve() as server:
        world = anchored(new_world, server, tmp_path)
        assert world.play(*rounds(2)).code == 3
        (drift,) = [m["values"] for m in world.rows("metrics") if m["stage"] == "drift"]
        assert drift == {"level_served": 0.0, "trust_served": 1.0}
        # Anchors are asked anew each time, whatever answers are kept.
        assert max(server.asked.values()) == 2


def test_a_judge_that_was_exchanged_ends_the_run_which_can_go_on(new_world, tmp_path, monkeypatch):
    """The server behind the name answers otherwise from the second round on: it prefers what is shown second."""
    from tests import faulty_server

    true = faulty_server.truth
    with serve() as server:
        world = anchored(new_world, server, tmp_path)
        assert world.play(*rounds(1)).code == 3
    with serve() as server:
        world = anchored(lambda: new_world("other"), server, tmp_path)
        seen = []

        def turned(text, labels="AB"):
            seen.append(text)
            honest = true(text, labels)
            # 120 questions of the first look on the anchors come before anything else.
            late = len(seen) > 120 and "good" in text and "bad" in text
            first = text.find("good") < text.find("bad")
            return {"A": -4.0 if first else -0.2, "B": -0.2 if first else -4.0} if late else honest

        monkeypatch.setattr(faulty_server, "truth", turned)
        done = world.play(*rounds(3))
        assert done.code == 4, done.err
        assert "no longer says" in done.err
        monkeypatch.setattr(faulty_server, "truth", true)
        assert world.resume().code == 3
        levels = [m["values"]["level_served"] for m in world.rows("metrics") if m["stage"] == "drift"]
        assert levels and max(levels) < 1.0


def test_anchors_can_be_looked_at_less_often(new_world, tmp_path):
    with serve() as server:
        world = anchored(new_world, server, tmp_path, anchor_every=2)
        assert world.play(*rounds(3)).code == 3
        assert len([m for m in world.rows("metrics") if m["stage"] == "drift"]) == 1


def test_anchors_that_cannot_be_read_are_refused_first(new_world, tmp_path):
    with serve() as server:
        world = with_judge(new_world(), server.url)
        done = world.play("--set", "feedback.anchors=nowhere.jsonl")
        assert done.code == 2 and "nowhere.jsonl" in done.err
        assert not server.asked
