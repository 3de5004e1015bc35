"""What is measured of a model under attack: shares and differences by hand, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny_world import World, tutelage_cli, write_lines

from tutelage.applications.attack_file import Tried
from tutelage.applications.defence import resistance, restraint, under_pressure
from tutelage.applications.red_team import kept_for_measuring
from tutelage.loop.evaluate import Answers, paired_difference, share
from tutelage.records import Message, Prompt, SuiteItem
from tutelage.store.prompts import read_prompts

pytest_plugins = ["tests.tiny_world"]


def tried(name: str, attacker: str, question: str) -> Tried:
    return Tried(name, 1, attacker, "s", "t", question, name, "", 1.0, "", 1.0, 1.0, 1.0, True)


ATTACKS = [tried("1", "ann", "A?"), tried("2", "ann", "A?"), tried("3", "bob", "B?"), tried("4", "bob", "B?")]


def test_one_model_alone() -> None:
    total, ann, bob = resistance(ATTACKS, [1.0, 0.5, None, 0.9])
    assert (total["attacker"], total["measured"], total["unmeasured"]) == (None, 3, 1)
    assert (total["success"], total["low"], total["high"]) == share(2, 3)
    assert ann["success"] == 0.5 and bob["success"] == 1.0 and bob["unmeasured"] == 1
    assert "difference" not in total and "by_question" not in total


def test_two_models_on_the_attacks_on_which_both_were_judged() -> None:
    """Both attacks of question A fall, the one of B that is known stays: -1 and 0, -0.5 in the mean of questions."""
    total, ann, bob = resistance(ATTACKS, [0.0, 0.2, None, 0.9], [1.0, 1.0, 1.0, 0.6])
    assert (total["measured"], total["unmeasured"]) == (3, 1)
    assert total["before"] == 1.0 and total["success"] == pytest.approx(1 / 3)
    wanted = paired_difference([True] * 3, [False, False, True])
    assert (total["difference"], total["difference_low"], total["difference_high"]) == wanted
    assert total["by_question"] == {"questions": 2, "difference": -0.5, "low": -1.0, "high": 0.0}
    assert ann["difference"] == -1.0 and bob["difference"] == 0.0 and "by_question" not in ann
    unknown_before = resistance(ATTACKS, [1.0] * 4, [1.0, None, 1.0, 1.0])[0]
    assert (unknown_before["measured"], unknown_before["unmeasured"], unknown_before["before"]) == (3, 1, 1.0)
    nothing = resistance(ATTACKS, [None] * 4, [1.0] * 4)[0]
    assert nothing["success"] is None and nothing["unmeasured"] == 4 and "difference" not in nothing


def answers(*outcomes: str) -> Answers:
    items = tuple(
        SuiteItem(Prompt(str(i), (Message("user", "?"),)), "answerable", ("x",)) for i in range(len(outcomes))
    )
    return Answers("s", "v", items, ("",) * len(outcomes), outcomes)  # type: ignore[arg-type]


def test_what_it_costs_on_harmless_questions() -> None:
    before = answers("correct", "correct", "wrong", "abstained")
    after = answers("correct", "asked_back", "abstained", "abstained")
    rows = {r["metric"]: r for r in restraint(after, before)}
    assert (rows["refused"]["share"], rows["refused"]["before"], rows["refused"]["difference"]) == (0.75, 0.25, 0.5)
    assert (rows["correct"]["share"], rows["correct"]["before"], rows["correct"]["difference"]) == (0.25, 0.5, -0.25)
    assert rows["changed"]["share"] == 0.5 and rows["changed"]["n"] == 4
    assert rows["refused_known"]["share"] == 0.5 and rows["refused_known"]["n"] == 2
    alone = restraint(after)
    assert [r["metric"] for r in alone] == ["refused", "correct"] and "difference" not in alone[0]


def test_harmless_questions_are_pressed_by_attackers_in_turn() -> None:
    items = [
        SuiteItem(Prompt(f"q{i}", (Message("system", "Be."), Message("user", f"Is {i} even?"))), "answerable", ("yes",))
        for i in range(3)
    ]
    found = under_pressure(items, ("model", "prefix", "many-shot"))
    assert [i.prompt.id for i in found] == ["q0-prefix", "q1-many-shot", "q2-prefix"]
    for n, (item, before) in enumerate(zip(found, items, strict=True)):
        assert f"Is {n} even?" in item.prompt.text and item.prompt.text != before.prompt.text
        assert item.prompt.messages[0] == before.prompt.messages[0] and item.references == ("yes",)
    assert found == under_pressure(items, ("model", "prefix", "many-shot"))
    assert under_pressure(items, ("model",)) == [] and restraint(answers())[0]["share"] is None


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def attacked(played: World, tmp_path: Path) -> Path:
    """The start model of a run, attacked."""
    topics = tmp_path / "topics.toml"
    topics.write_text(
        '[[styles]]\nname = "plain"\nsays = "x"\nframes = ["{question}"]\n[[topics]]\nname = "a"\n'
        'questions = ["Who is Zed?", "Who is Yor?", "Who is Xan?", "Who is Wim?"]\n',
        encoding="utf-8",
    )
    model = played.load().model.name
    done = tutelage_cli(
        "redteam", "attack", model, "--archive", tmp_path / "a.json", "--topics", topics, "--attacker-model", model,
        "--max-new-tokens", "6", "--attacks", "8", "--rounds", "1", "--attackers", "typo", "--attackers", "encoding",
    )  # fmt: skip
    assert done.code == 0, done.err
    return tmp_path / "a.json"


def test_a_run_against_its_start(played: World, attacked: Path, tmp_path: Path) -> None:
    words = ("--archive", attacked, "--runs", played.runs, "--limit", "3", "--max-new-tokens", "6")
    out = tmp_path / "m.json"
    done = tutelage_cli("redteam", "measure", "one", "--against", "start", *words, "--out", out, "--json")
    assert done.code == 0, done.err
    told, kept = json.loads(done.out), json.loads(out.read_text(encoding="utf-8"))
    assert told["model"].startswith("one@r2") and told["against"] == "one@start" and told["side"] == "held_out"
    assert {k: kept[k] for k in told} == told
    data = json.loads(attacked.read_text(encoding="utf-8"))
    held = data["archive"]["sides"]["held_out"]
    assert {row["attacker"] for row in kept["attack_replies"]} == set(held)
    assert len(kept["attack_replies"]) == sum(t["attacker"] in held for t in data["tried"])
    attacked_before = {t["id"]: t["reply"] for t in data["tried"]}  # the start model was attacked, greedily
    assert [row["before"]["reply"] for row in kept["attack_replies"]] == [
        attacked_before[row["id"]] for row in kept["attack_replies"]
    ]
    asked = {p.id: p for p in read_prompts(Path(str(data_train())))}
    assert len(kept["benign_replies"]) == 3
    pressed = [row["id"].rpartition("-") for row in kept["benign_pressed_replies"]]
    assert {name for _, _, name in pressed} == set(held) and {r["n"] for r in told["benign_pressed"]} >= {len(pressed)}
    assert [of for of, _, _ in pressed] == [row["id"] for row in kept["benign_replies"]]
    assert all(kept_for_measuring(asked[row["id"]]) for row in kept["benign_replies"])
    alone = tutelage_cli("redteam", "measure", "one", *words, "--side", "training", "--attacks", "best")
    assert alone.code == 0 and "training attackers, best of each cell" in alone.out and "refused" in alone.out
    assert "before" not in alone.out and "not measured" not in alone.out.split("harmless")[1]


def data_train() -> Path:
    from tests.tiny_world import DATA

    return DATA / "questions" / "honesty-train.jsonl"


def test_what_cannot_be_measured_is_refused(played: World, attacked: Path, tmp_path: Path) -> None:
    model = played.load().model.name
    strict = write_lines(tmp_path / "s.jsonl", [{"prompt": "Who?", "kind": "unanswerable", "references": []}])
    (tmp_path / "quiet_judge.py").write_text("def quiet(prompt, reply):\n    return None\n", encoding="utf-8")
    for words, code, said in (
        (("--archive", tmp_path / "no.json"), 2, "no.json"),
        (("--archive", attacked, "--benign", strict), 2, "kept for measuring"),
        (("--archive", attacked, "--out", tmp_path / "no" / "m.json"), 2, "folder that exists"),
        (("--archive", attacked, "--judge", "quiet_judge:quiet"), 4, "no verdict on any"),
        (("--archive", attacked, "--against", "start"), 2, "there is no run"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(tmp_path))
            done = tutelage_cli("redteam", "measure", model, "--limit", "1", "--max-new-tokens", "4", *words)
        assert done.code == code and said in done.err, (words, done.err)
