"""Dialogues spoilt on purpose: what is spoilt how, by hand, and what always holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_world import tutelage_cli, write_lines

from tutelage.errors import InputError
from tutelage.feedback.critic_data import Passage, families, read_labelled_passages
from tutelage.feedback.perturbation import KINDS, perturb, perturb_file
from tutelage.records import Message


def dialogue(*turns: str) -> Passage:
    roles = ("user", "assistant")
    return Passage(turns[-1], tuple(Message(roles[n % 2], turn) for n, turn in enumerate(turns[:-1])))


TEA = dialogue("How do I make tea?", "Boil water.", "And then?", "Pour it over the leaves. Wait. Drink.")
BIKE = dialogue("My bike squeaks.", "Oil the chain.")


def spoilt(rows: list, passage: Passage) -> dict[str, str]:
    return {row.kind: row.passage.text for row in rows if row.passage.context == passage.context}


def test_by_hand() -> None:
    rows = perturb([TEA, BIKE, TEA])
    assert spoilt(rows, TEA) == {
        "kept": TEA.text,
        "exchanged": "Oil the chain.",
        "earlier": "Boil water.",
        "echo": "And then?",
        "torn": "Drink. Wait. Pour it over the leaves.",
    }
    assert spoilt(rows, BIKE) == {"kept": BIKE.text, "exchanged": TEA.text, "echo": "My bike squeaks."}
    assert [row.coherent for row in rows] == [row.kind == "kept" for row in rows]


def test_scripts_without_spaces_have_sentences() -> None:
    tea = dialogue("怎么泡茶？", "烧水。放茶叶。等三分钟。")
    assert spoilt(perturb([tea, BIKE], ["torn"]), tea)["torn"] == "等三分钟。 放茶叶。 烧水。"


def test_a_lonely_dialogue_and_unknown_kinds_are_refused() -> None:
    with pytest.raises(InputError, match="at least two"):
        perturb([TEA, TEA])
    with pytest.raises(InputError, match="0 dialogues"):
        perturb([Passage("no context")])
    with pytest.raises(InputError, match="exchanged"):
        perturb([TEA, BIKE], ["upside-down"])  # type: ignore[list-item]


words = st.text("abc ", min_size=1, max_size=6).filter(str.strip)


@given(st.lists(st.lists(words, min_size=2, max_size=5).map(lambda turns: dialogue(*turns)), max_size=12), st.randoms())
def test_what_always_holds(dialogues: list[Passage], dice) -> None:
    try:
        rows = perturb(dialogues)
    except InputError:
        return
    mixed = list(dialogues)
    dice.shuffle(mixed)
    assert perturb(mixed) == rows, "the order of the file means nothing"
    kept = {(r.passage.context, r.passage.text.strip()) for r in rows if r.coherent}
    assert {r.passage for r in rows if r.coherent} == set(dialogues)
    given_away = [r.passage.text for r in rows if r.kind == "exchanged"]
    assert len(given_away) % 2 == 0
    for row in rows:
        if row.kind == "exchanged":
            assert any(row.passage.text.strip() == text and row.passage.context != c for c, text in kept)


def test_no_family_spans_the_file() -> None:
    many = [dialogue(f"question {n}?", f"answer {n}.") for n in range(40)]
    rows = perturb(many, ["exchanged"])
    sizes = [list(families([r.passage for r in rows])).count(n) for n in set(families([r.passage for r in rows]))]
    assert set(sizes) == {4}, "two dialogues, each as it is and with the other's reply"


def test_a_critic_reads_the_file(tmp_path: Path) -> None:
    out = tmp_path / "coherence.jsonl"
    found = perturb_file([TEA, BIKE], out)
    assert found["rows"] == 8 and found["kinds"] == {"kept": 2, "exchanged": 2, "earlier": 1, "echo": 2, "torn": 1}
    rows = read_labelled_passages(out)
    assert sorted(rows.labels) == ["coherent"] * 2 + ["incoherent"] * 6
    assert {json.loads(line)["kind"] for line in out.read_text(encoding="utf-8").splitlines()} == {"kept", *KINDS}
    with pytest.raises(InputError, match="cannot be written"):
        perturb_file([TEA, BIKE], tmp_path / "no" / "folder.jsonl")


def test_from_dialogues_to_a_critic_that_tells_an_echo(tmp_path: Path) -> None:
    subjects = ("river", "castle", "engine", "garden", "violin", "market", "glacier", "harbour", "library", "bridge")
    rows: list[dict] = [
        {"prompt": f"What of the {s} in the year {n}?", "response": f"It was the pride of the town: the {s}, year {n}."}
        for n in range(4) for s in subjects
    ]  # fmt: skip
    rows[0] = {"messages": [{"role": "user", "content": rows[0]["prompt"]},
                            {"role": "assistant", "content": rows[0]["response"]}]}  # fmt: skip
    dialogues = write_lines(tmp_path / "dialogues.jsonl", rows)
    out, critic = tmp_path / "rows.jsonl", tmp_path / "coherence.safetensors"
    done = tutelage_cli("critic", "perturb", dialogues, "--out", out, "--kind", "echo", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["kinds"] == {"kept": 40, "echo": 40}
    done = tutelage_cli("critic", "train", out, "--kind", "coherence", "--features", "words", "--out", critic, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["quality"]["accuracy"][0] > 0.9


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "alone"}, "prompt and response"),
        ({"prompt": "a", "response": " "}, "no text under 'response'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "ends with a turn of 'user'"),
    ],
)
def test_rows_that_are_no_dialogues_are_named(row: dict, says: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "d.jsonl", [{"prompt": "a", "response": "b"}, row])
    done = tutelage_cli("critic", "perturb", file, "--out", tmp_path / "o.jsonl")
    assert done.code == 2 and "d.jsonl line 2" in done.err and says in done.err
