"""Asking what somebody values: from a file or a run, by a person or a judge, to weights in a recipe."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_world import World, lines_of, tutelage_cli, write_lines

from tutelage.applications.value_bank import read_bank
from tutelage.applications.values import Asker, ask_judge, foretold, show, write_recipe
from tutelage.config import load_recipe
from tutelage.errors import InputError, RecipeError
from tutelage.feedback.asking import Opinion
from tutelage.feedback.human import Label, read_labels
from tutelage.loop.bench import Silent
from tutelage.objectives.cooperative import choose_batch
from tutelage.objectives.inverse import fit_choices
from tutelage.objectives.values import ValuePosterior
from tutelage.rewards.compose import normalise
from tutelage.studio.labelling import hold, shown_order

pytest_plugins = ["tests.tiny_world"]

TRUE = np.array([2.0, -1.0, 0.5])
NAMES = ("fit", "principles", "text")


def candidates(folder: Path, prompts: int = 20, replies: int = 3, seed: int = 0) -> Path:
    draw = np.random.default_rng(seed)
    rows = [
        {
            "prompt": f"Question {p}?",
            "candidates": [f"reply {p}-{r}" for r in range(replies)],
            "features": [dict(zip(NAMES, map(float, draw.normal(size=3)), strict=True)) for _ in range(replies)],
        }
        for p in range(prompts)
    ]
    return write_lines(folder / "candidates.jsonl", rows)


# ---- the bank ----


def test_scores_are_divided_by_their_deviation_within_prompts(tmp_path: Path) -> None:
    """a: 1, 3 about 2 and 10, 10 about 10: squares 2 over 2 degrees, so 1. b never differs: 1 by convention."""
    rows = [
        {"prompt": "A?", "candidates": ["x", "y"], "features": [{"a": 1, "b": 5}, {"a": 3, "b": 5}]},
        {"prompt": "B?", "response": "x", "features": {"a": 10, "b": 5}},
        {"prompt": "B?", "response": "y", "features": {"a": 10, "b": 5}},
        {"prompt": "B?", "response": "z", "features": {"a": None, "b": 5}},
    ]
    bank = read_bank(write_lines(tmp_path / "c.jsonl", rows))
    assert bank.names == ("a", "b") and bank.scale_K.tolist() == [1.0, 1.0]
    ((first, second),) = [task.candidates for task in bank.tasks]
    assert (first, second) == ("x", "y")
    assert (bank.first_NK.tolist(), bank.second_NK.tolist()) == ([[1.0, 5.0]], [[3.0, 5.0]])
    assert bank.left_out == 3  # equal scores, and two with a missing one
    twice = [{**r, "features": [{"a": 2, "b": 5}, {"a": 6, "b": 5}]} if "candidates" in r else r for r in rows]
    assert read_bank(write_lines(tmp_path / "d.jsonl", twice)).scale_K.tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "A?", "candidates": ["x", "x"], "features": [{}, {}]}, "replies that differ"),
        ({"prompt": "A?", "candidates": ["x", "y"], "features": [{"a": 1}]}, "score each of 2"),
        ({"prompt": "A?", "candidates": ["x", "y"], "features": [{"a": True}, {"a": 1}]}, "score of 'a' is True"),
        ({"prompt": "A?", "response": "x", "features": {"a": "good"}}, "score of 'a' is 'good'"),
        ({"prompt": "A?", "response": "x", "features": {}}, "scores no value"),
        ({"prompt": "A?", "response": "x", "features": {"a": 1}}, "holds no question"),
        ({"candidates": ["x", "y"], "features": [{"a": 1}, {"a": 2}]}, "no prompt"),
    ],
)
def test_what_cannot_be_asked_is_refused(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        read_bank(write_lines(tmp_path / "c.jsonl", [row]))


# ---- what is asked ----


def label(task: str, answer: Any, **more: Any) -> Label:
    return Label(task, "pair", "ada", answer, (0, 1), **more)


def test_the_next_question_is_the_one_that_tells_most(tmp_path: Path) -> None:
    bank = read_bank(candidates(tmp_path))
    asker = Asker(bank, tmp_path / "v.json", annotator="ada")
    done: dict[str, Label] = {}
    for n in range(6):
        task = asker.next(done)
        assert task is not None
        open_N = np.array([one.id not in done for one in bank.tasks])
        delta_NK = np.where(open_N[:, None], bank.first_NK - bank.second_NK, np.nan)
        if n == 0:  # later the set that outliers are found in is smaller there
            assert bank.tasks[choose_batch(asker.posterior(done), delta_NK, 1)[0]] == task
        done[task.id] = label(task.id, n % 2)
    assert len(asker.posterior(done)) == 6


@settings(max_examples=20)
@given(answers=st.lists(st.sampled_from([0, 1, "tie", "both_bad", "skip"]), min_size=1, max_size=8))
def test_the_posterior_is_what_the_answers_say(answers: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("values")
    bank = read_bank(candidates(folder, prompts=4))
    asker = Asker(bank, folder / "v.json", annotator="ada")
    plain = ValuePosterior(NAMES)
    done = {}
    for n, answer in enumerate(answers):
        done[bank.tasks[n].id] = label(bank.tasks[n].id, answer)
        share = {0: 1.0, 1: 0.0, "skip": None}.get(answer, 0.5)
        plain.compare(bank.first_NK[n], bank.second_NK[n], share)
    asker.keep(done)
    got = ValuePosterior.load(folder / "v.json")
    assert got.to_dict() == plain.to_dict() and got.skipped == answers.count("skip")
    assert np.array_equal(got.mean_K, plain.mean_K)


def test_a_judge_that_is_hardly_sure_weighs_little(tmp_path: Path) -> None:
    bank = read_bank(candidates(tmp_path))
    asker, first = Asker(bank, tmp_path / "v.json", annotator="ada"), bank.tasks[0].id
    sure, unsure = (asker.posterior({first: label(first, 0, log_odds=v)}).mean_K for v in (5.0, 0.2))
    assert np.linalg.norm(unsure) < 0.2 * np.linalg.norm(sure)


class Person:
    """Answers by their values, with the noise that the model of answers assumes; sees what the terminal shows."""

    def __init__(self, asker: Asker, weights: np.ndarray, seed: int) -> None:
        self.asker, self.weights, self.draw = asker, weights, np.random.default_rng(seed)
        self.row = {task.id: n for n, task in enumerate(asker.bank.tasks)}
        self.now: Any = None

    def choose(self, done: Any) -> Any:
        self.now = self.asker.next(done)
        return self.now

    def first_wins(self) -> bool:
        n = self.row[self.now.id]
        margin = (self.asker.bank.first_NK[n] - self.asker.bank.second_NK[n]) @ self.weights
        return bool(self.draw.random() < 1 / (1 + math.exp(-margin)))

    def readline(self) -> bytes:
        if self.now is None:
            return b"q\n"
        order = shown_order(self.now, annotator="ada", seed=0)
        return b"%d\n" % (1 + order.index(0 if self.first_wins() else 1))


@pytest.mark.parametrize("how", ["bald", "random"])
def test_a_person_at_the_terminal_is_understood(how: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = read_bank(candidates(tmp_path, prompts=40))
    asker = Asker(bank, tmp_path / "v.json", annotator="ada", questions=60, how=how)
    person = Person(asker, TRUE, 1)
    monkeypatch.setattr(sys, "stdin", type("Pipe", (), {"buffer": person, "isatty": lambda _: False})())
    told = hold(bank.tasks, asker.labels, annotator="ada", choose=person.choose, kept=asker.keep, goal=60)
    assert told["labelled"] == 60
    found = show(asker.path)
    assert (found["answers"], found["unanswered"]) == (60, 0)
    mean = {one["value"]: one["weight"] for one in found["values"]}
    true = TRUE * bank.scale_K
    assert np.corrcoef([mean[n] for n in NAMES], true)[0, 1] > 0.9
    assert "fit: more of it is better" in found["words"][0]


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    data = "".join(line + "\n" for line in lines).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_the_command_undoes_resumes_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = candidates(tmp_path), tmp_path / "ada.json"
    words = ("values", "ask", file, "--out", out, "--annotator", "ada", "--questions", "4", "--json")
    typed(monkeypatch, "1", "2", "u", "s", "q")
    assert tutelage_cli(*words).code == 0
    first = json.loads(out.read_text(encoding="utf-8"))
    assert (len(first["answers"]), first["skipped"]) == (1, 1)

    class Gone(io.BytesIO):
        """The person presses ctrl-c at the second question."""

        def readline(self, *_: Any) -> bytes:
            line = super().readline()
            if not line:
                raise KeyboardInterrupt
            return line

    monkeypatch.setattr(sys, "stdin", type("Pipe", (), {"buffer": Gone(b"1\n"), "isatty": lambda _: False})())
    assert tutelage_cli(*words).code == 0
    assert len(ValuePosterior.load(out)) == 2
    typed(monkeypatch, "1", "x")  # the fourth is the last; any key ends
    assert tutelage_cli(*words).code == 0
    kept = read_labels(tmp_path / "ada.labels.jsonl")
    assert len(kept) == 4 and len({one.task for one in kept}) == 4
    typed(monkeypatch)
    assert tutelage_cli(*words).code == 0 and len(read_labels(tmp_path / "ada.labels.jsonl")) == 4
    shown = json.loads(tutelage_cli("values", "show", out, "--json").out)
    assert (shown["annotator"], shown["answers"], shown["unanswered"]) == ("ada", 3, 1)
    other = tutelage_cli(*words[:5], "--annotator", "bob")
    assert other.code == 2 and "holds answers of ada" in other.err


@pytest.mark.parametrize("more", [(), ("--annotator", "ada", "--judge", "a.gguf")])
def test_one_and_only_one_answers(more: tuple[str, ...], tmp_path: Path) -> None:
    done = tutelage_cli("values", "ask", candidates(tmp_path), "--out", tmp_path / "v.json", *more)
    assert done.code == 2 and "--annotator NAME or --judge SPEC" in done.err


# ---- choices that are there already ----


def chosen(folder: Path, weights: np.ndarray, prompts: int = 60, seed: int = 0) -> Path:
    """Candidates of which somebody with these weights chose one, with the noise that the model of choices assumes."""
    draw = np.random.default_rng(seed)
    rows = lines_of(candidates(folder, prompts=prompts, replies=4, seed=seed))
    for row in rows:
        worth = np.array([list(one.values()) for one in row["features"]]) @ weights
        row["chosen"] = int((worth + draw.gumbel(size=4)).argmax())
    return write_lines(folder / "chosen.jsonl", rows)


def test_choices_are_read_and_those_that_say_nothing_are_counted(tmp_path: Path) -> None:
    """Three lines with a choice: among two that are scored, of one without a score, and of one with nothing beside it."""
    rows = [
        {"prompt": "A?", "candidates": ["x", "y", "z"], "features": [{"a": 1}, {"a": None}, {"a": 3}], "chosen": 2},
        {"prompt": "B?", "candidates": ["x", "y"], "features": [{"a": 1}, {}], "chosen": 1},
        {"prompt": "C?", "candidates": ["x", "y"], "features": [{"a": 1}, {}], "chosen": 0},
        {"prompt": "D?", "candidates": ["x", "y"], "features": [{"a": 1}, {"a": 2}], "chosen": None},
    ]
    bank = read_bank(write_lines(tmp_path / "c.jsonl", rows))
    ((phi_CK, place),) = bank.choices
    # 1, 3 and 1, 2 about their means: 2 + 1/2 over two degrees
    assert phi_CK.ravel().tolist() == pytest.approx([1 / math.sqrt(1.25), 3 / math.sqrt(1.25)]) and place == 1
    assert bank.choiceless == 2 and [len(table) for table in bank.options] == [2, 2]
    asker = Asker(bank, tmp_path / "v.json", annotator="ada")
    plain = ValuePosterior(("a",))
    plain.demonstrate(phi_CK, 1)
    assert asker.posterior({}).mean_K.tolist() == plain.mean_K.tolist() and asker.posterior({}).skipped == 2


@pytest.mark.parametrize("place", [-1, 2, 0.0, True, "x"])
def test_a_choice_of_what_is_not_there_is_refused(place: Any, tmp_path: Path) -> None:
    row = {"prompt": "A?", "candidates": ["x", "y"], "features": [{"a": 1}, {"a": 2}], "chosen": place}
    with pytest.raises(InputError, match="line 1: `chosen` is "):
        read_bank(write_lines(tmp_path / "c.jsonl", [row]))


def test_what_choices_say_is_the_fit_by_maximum_entropy(tmp_path: Path) -> None:
    """The mode is an independent fit's; unseen choices are foretold; a question asked next goes on from there."""
    file, out = chosen(tmp_path, TRUE), tmp_path / "ada.json"
    done = tutelage_cli("values", "learn", file, "--out", out, "--annotator", "ada", "--json")
    assert done.code == 0, done.err
    told, bank = json.loads(done.out), read_bank(file)
    phi_PCK = np.stack([phi for phi, _ in bank.choices])
    share_PC = np.eye(4)[[place for _, place in bank.choices]]
    assert ValuePosterior.load(out).mode_K == pytest.approx(fit_choices(phi_PCK, share_PC).weights_K, abs=1e-4)
    assert (told["choices"], told["answers"], told["annotator"]) == (60, 60, "ada")
    assert told["foretold"]["chance"] == 0.25 and told["foretold"]["right"] > 0.5
    mean = {one["value"]: one["weight"] for one in told["values"]}
    assert np.corrcoef([mean[n] for n in NAMES], TRUE * bank.scale_K)[0, 1] > 0.95
    words = tutelage_cli("values", "learn", file, "--out", out, "--annotator", "ada").out
    assert "of 60 choices" in words and "by guessing 25%" in words


def test_choices_by_chance_foretell_nothing(tmp_path: Path) -> None:
    told = foretold(read_bank(chosen(tmp_path, np.zeros(3), prompts=200)))
    assert told is not None and abs(told["right"] - told["chance"]) < 0.1
    assert foretold(read_bank(chosen(tmp_path, TRUE, prompts=1))) is None


def test_answers_add_to_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = chosen(tmp_path, TRUE, prompts=10), tmp_path / "ada.json"
    typed(monkeypatch, "1", "2", "q")
    assert tutelage_cli("values", "ask", file, "--out", out, "--annotator", "ada").code == 0
    assert len(ValuePosterior.load(out)) == 12
    assert tutelage_cli("values", "learn", file, "--out", out, "--annotator", "ada").code == 0
    assert len(ValuePosterior.load(out)) == 12  # what was answered stays
    other = tutelage_cli("values", "learn", file, "--out", out, "--annotator", "bob")
    assert other.code == 2 and "holds answers of ada" in other.err


def test_learning_from_no_choice_is_refused(tmp_path: Path) -> None:
    done = tutelage_cli("values", "learn", candidates(tmp_path), "--out", tmp_path / "v.json", "--annotator", "ada")
    assert done.code == 2 and "holds no choice" in done.err and not (tmp_path / "v.json").exists()


# ---- asking only what is worth it ----


def test_evoi_asks_while_it_betters_what_is_picked(tmp_path: Path) -> None:
    bank = read_bank(candidates(tmp_path, prompts=30))
    found: dict[float, int] = {}
    for cost in (0.0, 0.01, 0.05, 100.0):
        asker = Asker(bank, tmp_path / "v.json", annotator="ada", questions=60, how="evoi", cost=cost)
        person, done = Person(asker, TRUE, 1), dict[str, Label]()
        while (task := person.choose(done)) is not None:
            done[task.id] = label(task.id, 0 if person.first_wins() else 1)
        assert asker.gain is not None and (len(done) == 60 or asker.gain <= cost)
        found[cost] = len(done)
    assert found[100.0] == 0 < found[0.05] < found[0.01] < found[0.0] == 60


def test_a_question_that_is_not_worth_it_ends_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "1", "1")
    words = ("values", "ask", candidates(tmp_path), "--out", tmp_path / "v.json", "--annotator", "ada")
    done = tutelage_cli(*words, "--choose", "evoi", "--cost", "50")
    assert done.code == 0 and "no question is worth asking" in done.out
    shown = json.loads(tutelage_cli(*words, "--choose", "evoi", "--cost", "50", "--json").out)
    assert 0.0 < shown["gain"] < 50.0 and shown["answers"] == 0
    refused = tutelage_cli(*words, "--cost", "0.1")
    assert refused.code == 2 and "choose by evoi" in refused.err


# ---- a judge answers ----


def test_a_judge_answers_and_its_abstentions_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Likes longer replies, abstains on every prompt whose number ends in 3."""
    (tmp_path / "longer.py").write_text(
        "def likes(prompt, first, second):\n    return None if '3?' in prompt else (len(first) - len(second)) / 10\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [
        {"prompt": f"Q{p}?", "candidates": ["x" * n for n in (5, 15, 30)],
         "features": [{"length": n, "charm": (n * 7 + p) % 11} for n in (5, 15, 30)]}
        for p in range(10)
    ]  # fmt: skip
    file, out = write_lines(tmp_path / "c.jsonl", rows), tmp_path / "v.json"
    done = tutelage_cli("values", "ask", file, "--out", out, "--judge", "longer:likes", "--questions", "30", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    asked = len(lines_of(tmp_path / "v.labels.jsonl"))  # a pair far from all others is not asked about
    assert found["unanswered"] == 3 and 27 <= asked <= 30 and found["answers"] == asked - 3
    assert found["values"][0]["value"] == "length" and found["values"][0]["low"] > 0
    assert found["annotator"].startswith("judge:likes@")
    for one in lines_of(tmp_path / "v.labels.jsonl"):
        assert (one["answer"] == "skip") == (one["log_odds"] is None)
    again = tutelage_cli("values", "ask", file, "--out", out, "--judge", "longer:likes", "--questions", "30", "--json")
    assert json.loads(again.out)["session"]["new"] == 0


def test_a_judge_that_says_nothing_changes_nothing(tmp_path: Path) -> None:
    class Silence:
        name, version = "silence", "0" * 16

        def compare(self, pairs: list[Any]) -> list[Opinion]:
            return [Opinion(None, "abstains") for _ in pairs]

    asker = Asker(read_bank(candidates(tmp_path)), tmp_path / "v.json", annotator="judge:silence", questions=5)
    told = ask_judge(asker, Silence(), Silent())  # type: ignore[arg-type]
    assert told["new"] == 5
    found = show(asker.path)
    assert (found["answers"], found["unanswered"]) == (0, 5)
    assert all(one["weight"] == 0.0 for one in found["values"])
    with pytest.raises(InputError, match="holds no answer"):
        write_recipe(asker.path, tmp_path / "r.toml")


# ---- into a recipe ----


def answered(folder: Path, names: tuple[str, ...], weights: list[float]) -> Path:
    found = ValuePosterior(names)
    for k, weight in enumerate(weights):
        better, worse = np.eye(len(names))[k], np.zeros(len(names))
        for _ in range(round(abs(weight))):
            found.compare(better, worse, 1.0 if weight > 0 else 0.0)
    found.save(folder / "v.json")
    return folder / "v.json"


def test_weights_found_stand_in_the_recipe(tmp_path: Path) -> None:
    """fit is liked, principles not, text a little; consistency was not asked about and keeps its 0.2."""
    path = answered(tmp_path, NAMES, [8, -8, 2])
    told = write_recipe(path, tmp_path / "ada.toml")
    made = load_recipe(tmp_path / "ada.toml")
    assert made.rewards.principles == 0.0 and made.rewards.consistency == 0.2
    assert made.rewards.fit + made.rewards.text == pytest.approx(1.7, abs=1e-3)  # 1 + 0.5 + 0.2 as before
    mean = ValuePosterior.load(path).mean_K
    assert made.rewards.fit / made.rewards.text == pytest.approx(mean[0] / mean[2], rel=0.01)
    assert (told["disliked"], told["unclear"]) == (["principles"], ["text"])
    done = tutelage_cli("values", "recipe", path, "--out", tmp_path / "again.toml")
    assert done.code == 0 and "which a recipe cannot say" in done.out
    assert load_recipe(tmp_path / "again.toml") == made


def test_judges_get_weights_and_a_disliked_one_is_left_out(tmp_path: Path) -> None:
    base = tmp_path / "base.toml"
    base.write_text(
        'name = "mine"\n' + "".join(f'[[judges]]\nname = "{n}"\nkind = "my.{n}:judge"\n' for n in ("warm", "curt")),
        encoding="utf-8",
    )
    write_recipe(answered(tmp_path, ("warm", "curt"), [6, -6]), tmp_path / "r.toml", recipe=str(base))
    (judge,) = load_recipe(tmp_path / "r.toml").judges
    assert (judge.name, judge.weight) == ("warm", 2.0)
    with pytest.raises(RecipeError, match="no value has a weight above 0"):
        write_recipe(answered(tmp_path, ("fit",), [-3]), tmp_path / "r.toml")
    with pytest.raises(RecipeError, match="'charm' is a value, and no term"):
        write_recipe(answered(tmp_path, ("charm",), [3]), tmp_path / "r.toml")


def test_a_runs_replies_become_questions(played: World, tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    done = tutelage_cli("values", "candidates", "one", "--runs", played.runs, "--out", out, "--json")
    assert done.code == 0, done.err
    told, rows = json.loads(done.out), lines_of(out)
    assert told["prompts"] == len(rows) > 0 and {"fit", "text"} <= set(told["values"])
    raw = {r["generation_id"]: r["raw"] for r in played.rows("rewards")}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for g in played.rows("generations"):
        if g["unit"].startswith("round"):
            groups.setdefault((g["unit"], g["prompt_id"]), []).append(g)
    wanted = [normalise([raw[g["id"]]["text"] for g in group]) for group in groups.values()]
    texts = [[g["text"] for g in group] for group in groups.values()]
    for row in rows:
        assert any(
            row["features"][0]["text"] == scores[group.index(row["candidates"][0])]
            for scores, group in zip(wanted, texts, strict=True)
            if set(row["candidates"]) <= set(group)
        )
    if any(len({str(f) for f in r["features"]}) > 1 for r in rows):
        assert len(read_bank(out).tasks) > 0
