"""Critics through the command line: trained on a file, checked as a judge, and part of a recipe."""

from __future__ import annotations

import json

import pytest
from tests.tiny_world import tutelage_cli, write_lines

pytest_plugins = ["tests.tiny_world"]

SUBJECTS = ("train", "garden", "letter", "river", "window", "song", "market", "bridge", "lamp", "story")


@pytest.fixture
def pairs(tmp_path):
    rows = [
        {"prompt": f"Tell me about the {s} number {i}.", "chosen": f"The {s} is old and I thank you for asking {i}.",
         "rejected": f"The {s} is stupid and so are you {i}." + " Go away now, do." * (i % 3)}
        for i in range(6) for s in SUBJECTS
    ]  # fmt: skip
    return write_lines(tmp_path / "pairs.jsonl", rows)


def test_a_critic_of_words_learns_judges_and_is_checked(pairs, tmp_path, world):
    file = tmp_path / "liked.safetensors"
    done = tutelage_cli(
        "critic", "train", pairs, "--kind", "preference", "--features", "words", "--out", file, "--json"
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["held_out"] > 0 and found["quality"]["accuracy"][0] > 0.9
    checked = tutelage_cli("judge", "check", "--judge", f"critic={file}", "--pairs", pairs, "--no-injections", "--json")
    (row,) = json.loads(checked.out)
    assert row["accuracy"][0] > 0.9 and row["flips"][0] is None and row["outcome"] == "pass"

    recipe = world.recipe.read_text(encoding="utf-8")
    judge = f'\n[[judges]]\nname = "liked"\nkind = "critic"\nmodel = "{file}"\n'
    world.recipe.write_text(recipe + judge, encoding="utf-8")
    played = world.play("--set", "update.rounds=1")
    assert played.code == 3, played.err
    verdicts = world.rows("verdicts", judge="liked")
    assert verdicts and {v["judge_version"] for v in verdicts} == {found["version"]}
    assert all("liked" in r["terms"] for r in world.rows("rewards"))

    notes = [n["body"] for n in world.rows("notes", topic="triggers")]
    assert {n["judge"] for n in notes} == {"liked", "fit"} and "round-1" in {n["unit"] for n in notes}
    replies = {g["id"]: g["text"] for g in world.rows("generations")}
    suites = {n["suite"] for n in notes if n["unit"] == "final"}
    assert len(suites) == 2 and {n["suite"] for n in notes if n["unit"] != "final"} == {""}
    answers = [r for r in world.rows("outcomes") if r["version"] != "start"]
    assert {r["suite"] for r in answers} == suites
    replies |= {r["item"]: r["reply"] for r in answers}
    for note in notes:
        assert 0 < len(note["replies"]) <= 4
        for row in note["replies"]:
            assert replies[row["id"]] == row["text"]
            assert all(row["text"][p["start"] : p["end"]] == p["text"] and p["score"] < 0 for p in row["places"])
    assert "Trigger words" in next(world.runs.glob("*/report.html")).read_text(encoding="utf-8")


def test_a_file_that_is_no_critic_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    done = tutelage_cli("judge", "check", "--judge", f"critic={tmp_path / 'x.safetensors'}")
    assert done.code == 2 and "x.safetensors" in done.err


def test_too_few_labels_are_refused(tmp_path):
    few = write_lines(tmp_path / "few.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    done = tutelage_cli("critic", "train", few, "--kind", "preference", "--features", "words", "--out", tmp_path / "o")
    assert done.code == 2 and "few.jsonl" in done.err
