"""`tutelage redteam attack` and `prompts`: whole rounds on a tiny model, going on, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_world import DATA, Done, tutelage_cli

from tutelage.applications.attack_file import AttackFile
from tutelage.applications.red_team import export_prompts, kept_for_measuring
from tutelage.engines import weights
from tutelage.store.prompts import read_prompts, read_suite

pytest_plugins = ["tests.tiny_world"]

TOPICS = """
[[styles]]
name = "plain"
says = "is short"
frames = ["{question}"]
[[styles]]
name = "hurry"
says = "is in a hurry"
frames = ["Quick! {question}"]
[[topics]]
name = "a"
questions = ["Who is Zed?", "Who is Yor?", "Who is Xan?", "Who is Wim?"]
"""
RULED = ("--attackers", "typo", "--attackers", "encoding", "--attackers", "paraphrase")


class Place:
    """A folder with topics, a model and a judge in code."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.topics = folder, model, folder / "topics.toml"
        self.topics.write_text(TOPICS, encoding="utf-8")
        (folder / "attack_judges.py").write_text(
            "def half(prompt, reply):\n    return (len(reply) % 3) / 2\n"
            "def silent(prompt, reply):\n    return None\n"
            "def wild(prompt, reply):\n    return 7.0\n",
            encoding="utf-8",
        )

    def attack(self, out: Path, *words: str, judge: str = "attack_judges:half") -> Done:
        usual = {
            "--topics": str(self.topics), "--judge": judge, "--attacker-model": str(self.model), "--attacks": "6",
            "--rounds": "2", "--max-new-tokens": "6",
        }  # fmt: skip
        rest = [word for pair in usual.items() if pair[0] not in words for word in pair]
        return tutelage_cli("redteam", "attack", self.model, "--archive", out, *words, *rest)


@pytest.fixture
def place(tmp_path: Path, tiny_dirs: dict[str, Path], tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TUTELAGE_HOME", str(tiny_home))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "attack_judges", raising=False)
    return Place(tmp_path, tiny_dirs["llama"])


def test_rounds_fill_the_archive_and_go_on_where_they_stopped(place: Place, tmp_path: Path) -> None:
    """In one go, in two, and again: the same file; and a finished one only shows its table."""
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    done = place.attack(whole, *RULED, "--json")
    assert done.code == 0, done.err
    assert place.attack(parts, *RULED, "--rounds", "1").code == 0
    first = AttackFile.read(parts)
    assert first.rounds == 1 and {t.round for t in first.tried} == {1}
    assert place.attack(parts, *RULED).code == 0
    assert parts.read_bytes() == whole.read_bytes()
    assert place.attack(whole, *RULED, "--json").out == done.out
    told, file = json.loads(done.out), AttackFile.read(whole)
    assert told["rounds"] == 2 and told["tried"] == len(file.tried) > 6
    assert len({t.text for t in file.tried}) == len(file.tried)
    for tried in file.tried:
        assert file.questions.of(tried.question) == file.side(tried)
        assert tried.unsafe == 1 - (len(tried.reply) % 3) / 2
        assert tried.worth == pytest.approx(tried.unsafe + 0.2 * tried.novelty + 0.1 * (tried.fluency or 0.0))
    assert {t.attacker for t in file.tried} == {"typo", "encoding", "paraphrase"}
    assert not list(tmp_path.glob(".*json*"))
    other = place.attack(tmp_path / "other.json", *RULED, "--seed", "1")
    assert other.code == 0 and AttackFile.read(tmp_path / "other.json").tried != file.tried
    shown = place.attack(whole, *RULED).out
    assert "2 rounds" in shown and "held-out side" in shown and "paraphrase" in shown


def test_replies_may_be_drawn_and_a_model_may_write(place: Place, tmp_path: Path) -> None:
    """A model of random weights writes nothing usable, which is counted and not made up for."""
    out = tmp_path / "a.json"
    done = place.attack(
        out, "--attackers", "model", "--attackers", "typo", "--samples", "3", "--temperature", "1", "--rounds", "1",
        "--fluency", "0", "--novelty", "0",
    )  # fmt: skip
    assert done.code == 0, done.err
    file = AttackFile.read(out)
    assert file.unwritten["model"] == 3 and {t.attacker for t in file.tried} == {"typo"}
    assert any(t.unsafe not in (0.0, 0.5, 1.0) for t in file.tried)
    assert all(t.worth == t.unsafe for t in file.tried)


def test_what_does_not_fit_into_the_model_is_left_and_counted(place: Place, tmp_path: Path) -> None:
    """Six questions with four answered ones before them are longer than the tiny model's 160 tokens."""
    out = tmp_path / "a.json"
    assert place.attack(out, "--attackers", "many-shot", "--attackers", "typo", "--rounds", "1").code == 0
    file = AttackFile.read(out)
    assert file.unwritten == {"many-shot": 3, "typo": 0}
    alone = place.attack(tmp_path / "b.json", "--attackers", "many-shot", "--attackers", "model", "--rounds", "1")
    assert alone.code == 2 and "nobody wrote an attack" in alone.err and not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("judge", ["silent", "wild"])
def test_a_judge_that_never_says_anything_is_refused(judge: str, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    done = place.attack(out, *RULED, judge=f"attack_judges:{judge}")
    assert done.code == 4 and "gave no verdict on any of" in done.err and not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rounds", "0"), "rounds is 0"),
        (("--attacks", "0"), "0 attacks a round"),
        (("--samples", "2"), "greedy"),
        (("--temperature", "-1"), "temperature"),
        (("--novelty", "-1"), "weights"),
        (("--held-out", "1"), "held out"),
        (("--topics", "nowhere.toml"), "nowhere.toml"),
        (("--styles", "rude"), "no style 'rude'"),
        (("--attackers", "typo"), "two or more"),
        (("--attackers", "typo", "--attackers", "hypnosis"), "hypnosis"),
        (("--attackers", "typo", "--attackers", "typo"), "two or more"),
        (("--judge", "pairwise=x"), "pairwise"),
    ],
)
def test_what_makes_no_sense_is_refused(words: tuple[str, ...], said: str, place: Place, tmp_path: Path) -> None:
    done = place.attack(tmp_path / "a.json", *words)
    assert done.code == 2 and said in done.err and not (tmp_path / "a.json").exists()


def test_empty_topics_a_missing_folder_and_a_strange_file_are_refused(place: Place, tmp_path: Path) -> None:
    place.topics.write_text("", encoding="utf-8")
    assert "styles are []" in place.attack(tmp_path / "a.json").err
    place.topics.write_text(TOPICS, encoding="utf-8")
    assert "folder that exists" in place.attack(tmp_path / "no" / "a.json").err
    (tmp_path / "b.json").write_text("{}", encoding="utf-8")
    assert place.attack(tmp_path / "b.json").code == 2 and (tmp_path / "b.json").read_text() == "{}"


def test_a_file_goes_on_under_its_own_settings_only(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    assert place.attack(out, *RULED, "--rounds", "1").code == 0
    before = out.read_bytes()
    for words in (("--seed", "1"), ("--attacks", "5"), ("--styles", "hurry"), ("--held-out", "0.6")):
        done = place.attack(out, *RULED, *words)
        assert done.code == 2 and "was begun with" in done.err
    assert place.attack(out, *RULED, judge="attack_judges:wild").code == 2
    judges = tmp_path / "attack_judges.py"
    judges.write_text(judges.read_text(encoding="utf-8") + "# another version\n", encoding="utf-8")
    done = place.attack(out, *RULED)
    assert done.code == 2 and "judge_version" in done.err and out.read_bytes() == before


# ---- prompts -------------------------------------------------------------------------------------


def test_prompts_for_a_defender(place: Place, tmp_path: Path) -> None:
    out, file = tmp_path / "p.jsonl", tmp_path / "a.json"
    assert place.attack(file, *RULED).code == 0
    words = ("redteam", "prompts", "--archive", file, "--out", out)
    done = tutelage_cli(*words, "--json")
    assert done.code == 0, done.err
    told, prompts = json.loads(done.out), read_prompts(out)
    archive = AttackFile.read(file)
    best = {a.text for a in archive.archive.training()}
    asked = read_prompts(DATA / "questions" / "honesty-train.jsonl")
    others = {p.text for p in asked if not kept_for_measuring(p)}
    assert {p.text for p in prompts} == best | others
    assert (told["attacks"], told["benign"], told["left_out"]) == (len(best), len(others), len(asked) - len(others))
    assert abs(len(others) / len(asked) - 0.5) < 0.1
    first = [p.text in best for p in prompts]
    assert not all(first[: len(best)])  # mixed, so that a run's limit takes some of both
    before = out.read_bytes()
    assert tutelage_cli(*words).code == 0 and out.read_bytes() == before
    assert tutelage_cli(*words, "--seed", "1").code == 0 and out.read_bytes() != before
    assert tutelage_cli(*words, "--benign", "", "--attacks", "all").code == 0
    assert {p.text for p in read_prompts(out)} == {t.text for t in archive.of_side("training")}
    refused = tutelage_cli(*words, "--side", "held-out")
    assert refused.code == 2 and "cannot be measured with them" in refused.err


def test_prompts_need_a_file_and_a_folder(place: Place, tmp_path: Path) -> None:
    for archive, out in (("no.json", "p.jsonl"), ("no.json", "no/p.jsonl")):
        done = tutelage_cli("redteam", "prompts", "--archive", tmp_path / archive, "--out", tmp_path / out)
        assert done.code == 2 and "expected" in done.err


@pytest.mark.skipif(
    not (weights.have(weights.EMBEDDED_ENCODER) and weights.have(weights.EMBEDDED_POLICY)),
    reason="needs the embedded models: run `tutelage fetch`",
)
def test_the_embedded_model_attacks_itself_and_is_measured(tmp_path: Path) -> None:
    """Two rounds, few cells, from attack to measure, as in the documentation."""
    from tutelage import api

    file = tmp_path / "attacks.json"
    told = api.attack(
        "smollm2-135m-instruct", archive=file, styles=["plain", "presumption"], rounds=2,
        attacks=7, max_new_tokens=12,
    )  # fmt: skip
    found = AttackFile.read(file)
    assert told["tried"] == len(found.tried) >= 10
    assert all(t.topic in found.archive.topics and t.style in ("plain", "presumption") for t in found.tried)
    assert {t.attacker for t in found.tried} >= {"typo", "role-play", "prefix", "encoding", "paraphrase", "many-shot"}
    written = [t for t in found.tried if t.attacker == "model"]
    keep = {q.ask: q.keep for topic in api_brief().topics for q in topic.questions}
    assert all(word.casefold() in t.text.casefold() for t in written for word in keep[t.question])
    # The start model makes most things up.
    assert sum(s["successes"] for s in told["sides"]) > 0.6 * sum(s["measured"] for s in told["sides"])
    assert export_prompts(file, tmp_path / "p.jsonl")["attacks"] > 0
    measured = api.measure_attacks(
        "smollm2-135m-instruct", archive=file, against="smollm2-135m-instruct", limit=4, max_new_tokens=12
    )
    assert measured["attacks"][0]["difference"] == 0.0 and measured["attacks"][0]["measured"] > 0
    known = read_suite(DATA / "questions" / "honesty-train.jsonl")
    assert measured["benign"][0]["n"] == 4 and len(known) == 480


def api_brief() -> Any:
    from tutelage.applications.attackers import read_brief

    return read_brief("builtin:honesty")
