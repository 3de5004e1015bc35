"""The benchmark of credit: records add up, and no run is repeated."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("bench_credit", FOLDER / "credit.py")
        module = sys.modules["bench_credit"] = importlib.util.module_from_spec(spec)  # dataclasses look there
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.fixture
def played(bench, monkeypatch) -> list[tuple[str, int]]:
    calls = []

    def run(arm, seed, *, task, level, longest):
        calls.append((arm, seed))
        return {"arm": arm, "seed": seed, "steps": 10 + seed, "reached": True, "curve": [0.9], "kl": 0.1}

    monkeypatch.setattr(bench, "run", run)
    return calls


def call(bench, monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["credit.py", *words])
    bench.main()
    return capsys.readouterr().out


def test_finished_runs_are_written_down_and_not_repeated(bench, played, monkeypatch, capsys, tmp_path) -> None:
    records = str(tmp_path / "deep" / "credit.jsonl")
    call(bench, monkeypatch, capsys, "--records", records, "--first-seed", "3", "--seeds", "1", "--arms", "last")
    assert played == [("last", 3)]
    arms = ("--arms", "last,attention,decomposed@0")
    call(bench, monkeypatch, capsys, "--records", records, "--first-seed", "2", "--seeds", "2", *arms)
    assert played[1:4] == [("last", 2), ("attention", 2), ("decomposed@0", 2)]
    assert played[4:] == [("attention", 3), ("decomposed@0", 3)]
    lines = [json.loads(line) for line in Path(records).read_text(encoding="utf-8").splitlines()]
    assert [(r["arm"], r["seed"]) for r in lines] == played
    shown = call(bench, monkeypatch, capsys, "--records", records, "--table")
    assert len(played) == 6
    assert "| last | 2 | 12.5 (12.25 to 12.75) | 13 | 2/2 | 1.00 (1.00 to 1.00) | 0.10 |" in shown
    assert "| decomposed@0 | 2 |" in shown
    assert "uniform" not in shown
    call(bench, monkeypatch, capsys, "--records", records, "--first-seed", "5", "--seeds", "1", "--arms", "uniform")
    shown = call(bench, monkeypatch, capsys, "--records", records, "--table")
    assert "times fewer than last | times fewer than uniform |" in shown
    # Seed by seed: nothing is said of a seed that only one of them has played.
    assert "| uniform | 1 | 15 | 15 | 1/1 | - | 1.00 | 0.10 |" in shown


def test_other_settings_are_other_runs(bench, played, monkeypatch, capsys, tmp_path) -> None:
    records = str(tmp_path / "credit.jsonl")
    common = ("--records", records, "--seeds", "1", "--arms", "uniform")
    call(bench, monkeypatch, capsys, *common)
    call(bench, monkeypatch, capsys, *common, "--level", "0.7")
    call(bench, monkeypatch, capsys, *common, "--task", "short")
    assert played == [("uniform", 0)] * 3
    found = json.loads(call(bench, monkeypatch, capsys, *common, "--table", "--json", "--level", "0.7"))
    assert [r["level"] for r in found["rows"]] == [0.7]


def test_a_head_explains_what_it_was_told_of_replies(bench, monkeypatch, tiny_lm) -> None:
    """Credit of a step by the head's prefixes sums to the advantages, and tells tokens apart."""
    from types import SimpleNamespace

    import torch

    texts = [["The lamp is old.", "I don't know."], ["It is.", "What of it?"]]
    replies = [[SimpleNamespace(text=t, tokens=tiny_lm.encode_reply(t)[:-1]) for t in group] for group in texts]
    weight_F = torch.randn(4 * tiny_lm.head_VD.shape[1], generator=torch.Generator().manual_seed(0))
    width = max(len(r.tokens) for group in replies for r in group)
    keep_BT = torch.tensor([[float(t < len(r.tokens)) for t in range(width)] for group in replies for r in group])
    advantage_PG = torch.tensor([[1.0, -1.0], [-0.5, 0.5]])
    spread = []
    for sign in (1.0, -1.0):
        way = bench.Way(bench.TASKS["short"], "prefix", 1.0, head=lambda x, _: x @ weight_F)
        found = bench.explained(tiny_lm, way, replies, sign * advantage_PG, keep_BT)
        assert (sign * found).sum(-1).tolist() == pytest.approx([1.0, -1.0, -0.5, 0.5], abs=1e-5)
        assert (found * (1 - keep_BT)).abs().max() == 0
        spread.append([bool(found[row, :3].any()) for row in (0, 2)])
    # Of an advantage and its opposite, the head's reward rises with one.
    assert [a != b for a, b in zip(*spread, strict=True)] == [True, True]


def test_each_word_is_known_to_bring_its_part(bench, tiny_lm) -> None:
    """Two of three words are short: a third each, of which a mean word has two ninths; long ones lack as much."""
    from types import SimpleNamespace

    text = "old lamps burn"
    reply = SimpleNamespace(text=text, tokens=tiny_lm.encode_reply(text)[:-1])
    scores = bench.true_scores(tiny_lm, bench.TASKS["short"], reply, 2 / 3)
    assert sum(scores) == pytest.approx(0.0, abs=1e-9)
    assert max(scores) > 0 > min(scores)
    pytest.importorskip("vaderSentiment", reason="VADER is not installed")
    (good, _), (plain, _), (bad, _) = bench.TASKS["sentiment"].words("happy table horrible", 0.0)
    assert good > plain == 0.0 > bad and bench.TASKS["sentiment"].worth("happy") > 0.5


def test_a_critic_gives_credit_and_where_the_task_says_so_the_reward(bench) -> None:
    from types import SimpleNamespace

    replies = [[SimpleNamespace(text="a big elephant"), SimpleNamespace(text="hippopotamus")]]
    way = bench.Way(bench.TASKS["short"], "attention", 0.0, critic=object())
    assert way.rewards(None, replies).tolist() == [[pytest.approx(2 / 3), 0.0]]
    assert [name for name, task in bench.TASKS.items() if task.judged] == ["critic"]


def test_bad_words_and_lines_are_refused(bench, played, monkeypatch, capsys, tmp_path) -> None:
    for words in (["--arms", "latest"], ["--arms", "last@2"], ["--table"], ["--task", "long"]):
        with pytest.raises(SystemExit):
            call(bench, monkeypatch, capsys, *words)
    torn = tmp_path / "credit.jsonl"
    torn.write_text('{"arm": "la', encoding="utf-8")
    with pytest.raises(SystemExit, match="1 is no run"):
        call(bench, monkeypatch, capsys, "--records", str(torn), "--table")
    assert played == []
