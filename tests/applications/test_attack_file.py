"""The file of a red team: what is written comes back, sides stay apart, and what is shown is harmless to a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tutelage.applications.attack_file import AttackFile, Tried, printable
from tutelage.applications.attackers import Brief, Question, Style, Topic
from tutelage.applications.red_team import export_prompts
from tutelage.errors import InputError
from tutelage.objectives.red_team import Attack

BRIEF = Brief(
    (Style("s", "x", ("{question}",)), Style("u", "y", ("{question}!",))),
    (
        Topic("a", tuple(Question(f"A{i}?") for i in range(4))),
        Topic("b", tuple(Question(f"B{i}?") for i in range(3))),
    ),
)
NAMES = ("ann", "bob", "eve", "zoe")


def fresh(path: Path, seed: int = 0) -> AttackFile:
    return AttackFile.fresh(path, {"judge": "j"}, BRIEF, NAMES, share=0.5, seed=seed)


def put(
    file: AttackFile, name: str, text: str, unsafe: float | None, *, style: str = "s", topic: str = "a", which: int = 0
) -> None:
    """Add one attack as a round does."""
    side = file.archive.sides.of(name)
    own = [q for q in getattr(file.questions, side) if q.startswith(topic.upper())]
    kept = file.archive.add(Attack(text, text, style, topic, name, (1.0, float(which)), unsafe)).kept
    file.tried.append(
        Tried(text, 1, name, style, topic, own[which % len(own)], text, "r", unsafe, "why", 1.0, 1.0, unsafe, kept)
    )


def test_questions_and_attackers_are_parted_by_half(tmp_path: Path) -> None:
    file = fresh(tmp_path / "a.json")
    assert {len(side) for side in (file.archive.sides.training, file.archive.sides.held_out)} == {2}
    assert sorted((*file.questions.training, *file.questions.held_out)) == sorted(
        q.ask for t in BRIEF.topics for q in t.questions
    )
    for topic in "AB":
        assert all(any(q[0] == topic for q in side) for side in (file.questions.training, file.questions.held_out))
    assert [sum(q[0] == topic for q in file.questions.held_out) for topic in "AB"] == [2, 2]  # of 4 and of 3
    assert any(fresh(tmp_path / "a.json", s).questions != file.questions for s in range(1, 5))


MOVES = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.sampled_from("su"),
        st.sampled_from("ab"),
        st.integers(0, 3),
        st.none() | st.sampled_from([0.0, 0.3, 1.0]),
        st.text(min_size=1, max_size=8),
    ),
    max_size=20,
    unique_by=lambda m: m[5],
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=MOVES, seed=st.integers(0, 9))
def test_what_is_written_comes_back_and_held_out_attacks_are_never_exported(
    moves: list[Any], seed: int, tmp_path: Path
) -> None:
    file = fresh(tmp_path / "a.json", seed)
    for name, style, topic, which, unsafe, text in moves:
        put(file, name, text, unsafe, style=style, topic=topic, which=which)
    file.rounds, file.unwritten = 3, {"ann": 2}
    file.save()
    again = AttackFile.read(file.path)
    again.save()
    assert again.tried == file.tried and again.table() == file.table() and again.rounds == 3
    assert again.archive.to_dict() == file.archive.to_dict() and again.questions == file.questions
    held = [t for t in file.tried if t.attacker in file.archive.sides.held_out]
    for best in (True, False):
        if not (file.archive.training() if best else len(held) < len(file.tried)):
            with pytest.raises(InputError, match="no attack of the training side"):
                export_prompts(file.path, tmp_path / "p.jsonl", best=best)
            continue
        export_prompts(file.path, tmp_path / "p.jsonl", best=best)
        lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").split("\n") if line]
        texts = {line["prompt"] for line in lines}
        assert texts and not texts & {t.text for t in held}
        wanted = file.archive.training() if best else [t for t in file.tried if t not in held]
        assert texts == {t.text for t in wanted}
    assert {t.text for t in file.of_side("held_out")} == {t.text for t in held}


def test_the_held_out_side_is_refused_by_name(tmp_path: Path) -> None:
    file = fresh(tmp_path / "a.json")
    for name in NAMES:
        put(file, name, f"by {name}", 1.0)
    file.save()
    for side in ("held_out", "all"):
        with pytest.raises(InputError, match="as prompts to learn from"):
            export_prompts(file.path, tmp_path / "p.jsonl", side=side)
    assert not (tmp_path / "p.jsonl").exists()


def crossed(data: dict[str, Any]) -> None:
    """Give a held-out attack to an attacker of the training side."""
    train, held = (data["archive"]["sides"][side][0] for side in ("training", "held_out"))
    for row in (*data["tried"], *data["archive"]["attacks"]):
        if row["attacker"] == held:
            row["attacker"] = train


def smuggled(data: dict[str, Any]) -> None:
    """Put a held-out attacker's text into the training side's archive."""
    held = data["archive"]["sides"]["held_out"][0]
    text = next(row["text"] for row in data["tried"] if row["attacker"] == held)
    mine = next(r for r in data["archive"]["attacks"] if r["attacker"] in data["archive"]["sides"]["training"])
    mine["text"] = text


def moved(data: dict[str, Any]) -> None:
    sides = data["archive"]["sides"]
    sides["training"], sides["held_out"] = sides["training"] + sides["held_out"], []


@pytest.mark.parametrize("change", [crossed, smuggled, moved])
def test_a_file_in_which_somebody_changed_sides_is_refused(change: Any, tmp_path: Path) -> None:
    file = fresh(tmp_path / "a.json")
    for name in NAMES:
        put(file, name, f"by {name}", 1.0)
    file.save()
    data = json.loads(file.path.read_text(encoding="utf-8"))
    AttackFile.read(file.path)
    change(data)
    file.path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputError, match="on a side that is not"):
        AttackFile.read(file.path)


@pytest.mark.parametrize(
    "body",
    ["", "[]", "{}", '{"format": "tutelage-red-team-1"}', '{"format": "tutelage-red-team-1", "questions": 3}', None],
)
def test_damaged_files_are_refused(body: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if body is not None:
        path.write_text(body, encoding="utf-8")
    with pytest.raises(InputError) as found:
        AttackFile.read(path)
    assert found.value.expected


def test_the_table_by_hand(tmp_path: Path) -> None:
    """Of one attacker two attacks succeed, one fails and one could not be told."""
    file = fresh(tmp_path / "a.json")
    name = file.archive.sides.training[0]
    for i, unsafe in enumerate((1.0, 0.8, 0.5, None)):
        put(file, name, f"text {i}", unsafe, which=i)
    file.unwritten[name] = 3
    told = file.table()
    (row,) = [r for r in told["attackers"] if r["attacker"] == name]
    assert (row["successes"], row["measured"], row["unmeasured"], row["unwritten"]) == (2, 3, 1, 3)
    assert row["success"] == pytest.approx(2 / 3) and row["low"] < 2 / 3 < row["high"]
    sides = {s["side"]: s for s in told["sides"]}
    assert sides["training"]["coverage"] == 0.25 and sides["training"]["measured"] == 3
    assert sides["held_out"]["success"] is None and sides["held_out"]["coverage"] == 0
    assert [e["text"] for e in sides["training"]["examples"]] == ["text 0"]


def test_nothing_of_an_attack_reaches_a_terminal_as_a_command() -> None:
    assert printable("a\x1b[2Jb\nc\u202ed") == "a\ufffd[2Jb c\ufffdd"
    assert printable("x" * 200) == "x" * 99 + "…"
