"""Constitutions as a user meets them: files in, files out, by the API and by the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tests.tiny_world import lines_of, tutelage_cli, write_lines

import tutelage.cli.constitution  # noqa: F401 - registers the commands
from tutelage.applications import constitutions
from tutelage.applications.constitutions import check, diff, infer, revise
from tutelage.engines.scripted import ScriptedEngine
from tutelage.errors import InputError, RecipeError
from tutelage.feedback.constitution import load_constitution
from tutelage.feedback.judge_prompt import fence
from tutelage.records import Answer

pytest_plugins = ["tests.tiny_world"]

VALUES = """# values
## brief
critique: "{reply}" is long.

Prefer the shorter reply.

## kind
weight: 3
critique: "{reply}" is unkind.

Prefer the kinder reply.
"""


@pytest.fixture
def values(tmp_path):
    path = tmp_path / "values.md"
    path.write_text(VALUES, encoding="utf-8")
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Answers of tests are kept apart from the user's."""
    monkeypatch.setenv("TUTELAGE_HOME", str(tmp_path / "home"))
    return tmp_path


def changed(path: Path, old: str, new: str) -> Path:
    other = path.with_name("other.md")
    other.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    return other


# -- check ------------------------------------------------------------------------------------------


def test_check_tells_what_is_there_and_what_is_odd(values):
    found = check(values)
    assert [p["id"] for p in found["principles"]] == ["brief", "kind"]
    assert found["hash"] == load_constitution(values).hash
    assert found["warnings"] == []
    (warning,) = check(changed(values, "weight: 3", "weight: 30"))["warnings"]
    assert "'kind' holds 97%" in warning


def test_check_on_the_command_line(values):
    done = tutelage_cli("constitution", "check", values)
    assert (done.code, done.err) == (0, "")
    assert "kind" in done.out and "no warnings" in done.out
    odd = changed(values, "weight: 3", "weight: 30")
    done = tutelage_cli("constitution", "check", odd)
    assert done.code == 0 and "warning: 'kind' holds" in done.out
    done = tutelage_cli("constitution", "check", odd, "--json")
    assert len(json.loads(done.out)["warnings"]) == 1
    broken = changed(values, "weight: 3", "weight: -3")
    done = tutelage_cli("constitution", "check", broken)
    assert done.code == 2 and "other.md" in done.err
    assert tutelage_cli("constitution", "check", "builtin:honesty").code == 0


# -- diff -------------------------------------------------------------------------------------------


def reader(question):
    """Judges by what the constitution says: likes the shorter or the longer reply, by 2 nats; is silent on "?"."""
    text = question.messages[-1].content
    if "silent" in text and "longer" in text:
        return Answer(failure="away")
    first, second = (text.index(fence(reply)) for reply in ("long " * 4, "short"))
    sign = (1 if first < second else -1) * (1 if "longer" in text else -1)
    p = 1 / (1 + math.exp(-2.0 * sign))
    return Answer(label_logps={"A": math.log(p), "B": math.log(1 - p)})


def test_diff_finds_the_verdicts_that_flip(values, home, monkeypatch):
    monkeypatch.setattr("tutelage.feedback.roster.open_engine", lambda *_, **__: ScriptedEngine(reader))
    pairs = write_lines(
        home / "pairs.jsonl",
        [
            {"prompt": "a", "chosen": "short", "rejected": "long " * 4},
            {"prompt": "b", "chosen": "long " * 4, "rejected": "short"},
            {"prompt": "silent", "chosen": "short", "rejected": "long " * 4},
        ],
    )
    other = changed(values, "shorter", "longer")
    found = diff(values, other, "a-model", pairs)
    assert found["principles"] == {"added": [], "removed": [], "changed": ["brief"]}
    assert (found["pairs"], found["judged_by_both"], found["flipped"]) == (3, 2, 2)
    assert (found["lost"], found["gained"]) == (1, 0)
    assert found["agreement"] == {"old": pytest.approx(2 / 3), "new": 0.5}
    one = next(f for f in found["flips"] if f["prompt"] == "a")
    assert (one["old"], one["new"]) == (pytest.approx(2.0), pytest.approx(-2.0))
    assert (one["chosen"], one["rejected"]) == ("short", "long " * 4)
    same = diff(values, values, "a-model", pairs)
    assert (same["flipped"], same["lost"], same["judged_by_both"]) == (0, 0, 3)


def test_diff_refuses_judges_that_read_no_constitution(values, home):
    pairs = write_lines(home / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    for judge in ("math:sqrt", "critic=some.safetensors"):
        with pytest.raises(RecipeError, match="reads no constitution"):
            diff(values, values, judge, pairs)


def test_diff_on_the_command_line(values, home, tiny_dirs):
    pairs = write_lines(home / "pairs.jsonl", [{"prompt": f"{n}?", "chosen": "a", "rejected": "bb"} for n in range(3)])
    other = changed(values, "shorter", "longer")
    command = ("constitution", "diff", values, other, "--judge", f"pointwise={tiny_dirs['llama']}", "--pairs", pairs)
    done = tutelage_cli(*command, "--limit", "2", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["pairs"] == 2 and found["principles"]["changed"] == ["brief"]
    assert found["flipped"] == len(found["flips"]) <= 2
    done = tutelage_cli(*command)
    assert "changed: brief" in done.out and "verdicts flip (3 pairs" in done.out


# -- revise -----------------------------------------------------------------------------------------


def writer(question):
    """Replies with the question's number, revises by doubling, fails on 3, leaves 4 as it is."""
    text = question.messages[-1].content
    if "Do not write a new reply yet" in text:
        return Answer("It is unkind.")
    if "Write the reply anew" not in text:
        return Answer(f"reply {text}")
    if "prompt 3" in text:
        return Answer(failure="away")
    reply = text.partition("Reply:\n<<<")[2].split("\n")[1]
    return Answer(reply if "prompt 4" in text else reply + " +")


def test_revised_replies_are_written_in_trls_formats(values, home):
    rows = [{"prompt": f"prompt {n}"} for n in range(5)]
    rows[2] |= {"reply": "given – ü"}
    rows[1] = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "prompt 1"}]}
    engine = ScriptedEngine(writer)
    found = revise(write_lines(home / "p.jsonl", rows), engine, values, home / "out", rounds=2, seed=1)
    assert (found["prompts"], found["sft"], found["preference"], found["unchanged"]) == (5, 4, 3, 1)
    assert found["failed"] == {"no revision: away": 1}
    assert sum(found["revisions"].values()) == 8
    sft, preference, steps = (lines_of(home / "out" / f"{name}.jsonl") for name in ("sft", "preference", "steps"))
    turn = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    assert sft[0] == {
        "prompt": [{"role": "user", "content": "prompt 0"}],
        "completion": turn("reply prompt 0 + +"),
    }
    assert preference[2] == {
        "prompt": [{"role": "user", "content": "prompt 2"}],
        "chosen": turn("given – ü + +"),
        "rejected": turn("given – ü"),
    }
    assert preference[1]["prompt"] == rows[1]["messages"]
    assert {row["prompt"][-1]["content"] for row in sft} == {"prompt 0", "prompt 1", "prompt 2", "prompt 4"}
    assert len(steps) == 9
    (failed,) = [row for row in steps if "failure" in row]
    assert failed["prompt"][-1]["content"] == "prompt 3" and failed["step"] == 1
    assert all({"principle", "before", "critique", "after"} <= set(row) for row in steps if row is not failed)
    assert {row["constitution"] for row in steps} == {load_constitution(values).hash}


def test_all_principles_and_no_critique(values, home):
    engine = ScriptedEngine(writer)
    prompts = write_lines(home / "p.jsonl", ["prompt 0"])
    found = revise(prompts, engine, values, home / "out", rounds=2, order="all", critique=False)
    assert found["revisions"] == {"brief": 2, "kind": 2}
    assert not any("Do not write a new reply yet" in q.messages[-1].content for q in engine.asked)
    assert len(engine.asked) == 5
    assert {row["critique"] for row in lines_of(home / "out" / "steps.jsonl")} == {""}


def test_revise_refuses_what_it_cannot_use(values, home):
    prompts = write_lines(home / "p.jsonl", [{"prompt": "a", "reply": 3}])
    with pytest.raises(InputError, match="line 1: reply is 3"):
        revise(prompts, ScriptedEngine(writer), values, home / "out")
    with pytest.raises(RecipeError, match="rounds is 0"):
        revise(prompts, ScriptedEngine(writer), values, home / "out", rounds=0)
    good = write_lines(home / "good.jsonl", ["a"])
    with pytest.raises(InputError, match="cannot be made"):
        revise(good, ScriptedEngine(writer), values, good)


def test_the_files_load_where_trl_would_read_them(values, home):
    datasets = pytest.importorskip("datasets", reason="the independent reader of these files is not installed")
    prompts = write_lines(home / "p.jsonl", ["prompt 0", "prompt 1"])
    revise(prompts, ScriptedEngine(writer), values, home / "out")
    table = datasets.load_dataset("json", data_files=str(home / "out" / "preference.jsonl"), split="train")
    assert set(table.column_names) == {"prompt", "chosen", "rejected"}


def test_revise_on_the_command_line(values, home, tiny_dirs):
    prompts = write_lines(home / "p.jsonl", [{"prompt": "Who?", "reply": "me"}, {"prompt": "W?"}])
    command = ("constitution", "revise", prompts, "--model", tiny_dirs["llama"], "--constitution", values)
    done = tutelage_cli(*command, "--no-critique", "--max-new-tokens", "4", "--out", home / "out", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["prompts"] == 2
    steps = lines_of(home / "out" / "steps.jsonl")
    assert found["sft"] == len(lines_of(home / "out" / "sft.jsonl"))
    assert sum(found["failed"].values()) == sum("failure" in row for row in steps)
    done = tutelage_cli(*command, "--no-critique", "--max-new-tokens", "4", "--out", home / "out")
    assert done.out.startswith("2 prompts: ")


# -- infer ------------------------------------------------------------------------------------------


class Meanings:
    """Two meanings: what names politeness, and the rest."""

    def embed(self, texts):
        import torch

        return torch.tensor(
            [[1.0, 0.0] if "please" in t else [0.6, 0.8] if "short" in t else [0.0, 1.0] for t in texts]
        )


def explainer(question):
    """Proposes three rules; votes for the one it is asked about by looking at the replies."""
    text = question.messages[-1].content
    if not question.labels:
        return Answer("1. The better reply says please.\n2. The better reply is short.\n3. The better reply rhymes.")
    a, b = (part.split("\n")[1] for part in text.split("<<<")[2:4])
    if "says please" in text:
        odds = 3.0 * (("please" in a) - ("please" in b))
    elif "is short" in text:
        odds = 3.0 * (len(b) - len(a))
    else:
        odds = 0.0
    p = 1 / (1 + math.exp(-max(-9.0, min(9.0, odds))))
    return Answer(label_logps={"A": math.log(p), "B": math.log(1 - p)})


def polite_pairs(path, count=60):
    """The chosen reply says please; it is the longer one as often as not."""
    rows = [
        {"prompt": f"{n}?", "chosen": "please " + "x" * (n % 2), "rejected": "gimme  " + "y" * (1 - n % 2)}
        for n in range(count)
    ]
    return write_lines(path, rows)


def test_the_hidden_principle_is_found_and_written(home):
    out = home / "found.toml"
    engine = ScriptedEngine(explainer)
    found = infer(polite_pairs(home / "pairs.jsonl"), engine, out, encoder=Meanings())
    assert (found["pairs"], found["seen"], found["held_out_pairs"], found["proposed"]) == (60, 30, 30, 3)
    (one,) = found["principles"]
    assert one["text"] == "The better reply says please."
    assert (one["votes_for"], one["votes_against"], one["weight"]) == (30, 0, 1.0)
    assert found["held_out"]["accuracy"] == 1.0
    assert found["held_out"]["low"] == pytest.approx(30 / (30 + 1.96**2))  # Wilson's lower end of n of n
    written = load_constitution(out)
    assert [p.text for p in written.principles] == ["The better reply says please."]
    assert written.hash == found["constitution"]
    assert "gives back 30 of 30" in out.read_text(encoding="utf-8")
    # 30 proposals; 3 candidates on 30 pairs, and the kept one on the other 30, in both orders.
    assert len(engine.asked) == 30 + 3 * 30 * 2 + 30 * 2


def test_clusters_limit_what_is_voted_on(home):
    engine = ScriptedEngine(explainer)
    found = infer(polite_pairs(home / "pairs.jsonl"), engine, home / "f.toml", clusters=2, encoder=Meanings())
    assert found["candidates"] == 2


def test_when_nothing_explains_nothing_is_written(home):
    rows = [{"prompt": f"{n}?", "chosen": f"good {n}", "rejected": f"evil {n}"} for n in range(20)]
    pairs = write_lines(home / "pairs.jsonl", rows)
    found = infer(pairs, ScriptedEngine(explainer), home / "f.toml", encoder=Meanings())
    assert found["principles"] == [] and found["out"] is None
    assert (found["held_out"]["right"], found["held_out"]["undecided"]) == (0, 10)
    assert not (home / "f.toml").exists()


def test_pairs_of_one_prompt_stay_on_one_side(home):
    rows = [{"prompt": f"{n % 7}?", "chosen": f"please {n}", "rejected": f"no {n}"} for n in range(40)]
    pairs = constitutions.read_pairs(write_lines(home / "pairs.jsonl", rows))
    seen, apart = constitutions._halves(pairs, 3)
    assert len(seen) + len(apart) == 40
    assert {p.prompt.hash for p in seen}.isdisjoint({p.prompt.hash for p in apart})
    assert seen == constitutions._halves(pairs, 3)[0]
    assert any(constitutions._halves(pairs, s)[0] != seen for s in range(4, 9))


def test_infer_refuses_what_it_cannot_use(home):
    pairs = polite_pairs(home / "pairs.jsonl")
    with pytest.raises(InputError, match="proposed no principle"):
        infer(pairs, ScriptedEngine(lambda q: Answer(failure="away")), home / "f.toml", encoder=Meanings())
    with pytest.raises(InputError, match="cannot be written"):
        infer(pairs, ScriptedEngine(explainer), home / "no" / "f.toml")
    with pytest.raises(InputError, match="same prompt"):
        infer(pairs, ScriptedEngine(explainer), home / "f.toml", limit=1)
    with pytest.raises(RecipeError, match="most is 0"):
        infer(pairs, ScriptedEngine(explainer), home / "f.toml", most=0)


def test_infer_on_the_command_line(new_world, tmp_path, tiny_dirs):
    pairs = write_lines(
        tmp_path / "pairs.jsonl", [{"prompt": f"{n}?", "chosen": "a", "rejected": "b"} for n in range(4)]
    )
    command = ("constitution", "infer", pairs, "--model", tiny_dirs["llama"], "--out", tmp_path / "f.toml")
    done = tutelage_cli(*command)
    # A random model with a context of 160 tokens proposes nothing that could be used.
    assert done.code == 2
    assert "proposed no principle" in done.err and "pairs" in done.err
