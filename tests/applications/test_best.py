"""`tutelage best`: what is drawn, what is chosen, what it is expected to bring."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_world import Done, World, tutelage_cli

from tutelage.applications.best import expected_best, kl_bound, pick, summary
from tutelage.records import Reward

pytest_plugins = ["tests.tiny_world"]


def worth(total: float | None, **raw: float | None) -> Reward:
    return Reward("g", total, {}, raw, {})


# ---- by hand -------------------------------------------------------------------------------------


def test_the_bound_by_hand() -> None:
    assert kl_bound(1) == 0.0
    assert kl_bound(2) == pytest.approx(math.log(2) - 0.5)
    assert kl_bound(8) == pytest.approx(1.2044, abs=1e-4)


def test_the_bound_holds_where_the_law_is_known() -> None:
    """Of K equally likely replies the best of n is reply k with probability (k/K)^n - ((k-1)/K)^n."""
    for replies, n in itertools.product((2, 5, 50), (1, 2, 8)):
        law = [(k / replies) ** n - ((k - 1) / replies) ** n for k in range(1, replies + 1)]
        far = sum(p * math.log(p * replies) for p in law if p)
        assert -1e-12 <= far <= kl_bound(n) + 1e-12
    assert far == pytest.approx(kl_bound(8), abs=0.08)  # 50 replies


def test_the_expected_best_by_hand() -> None:
    # of 1, 2 and 4: pairs have the best 2, 4, 4
    assert expected_best([4.0, 1.0, 2.0], 1) == pytest.approx(7 / 3)
    assert expected_best([4.0, 1.0, 2.0], 2) == pytest.approx(10 / 3)
    assert expected_best([4.0, 1.0, 2.0], 3) == 4.0


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=7), st.data())
def test_it_is_the_mean_over_all_subsets(rewards: list[float], data: Any) -> None:
    k = data.draw(st.integers(1, len(rewards)))
    subsets = [max(c) for c in itertools.combinations(rewards, k)]
    assert expected_best(rewards, k) == pytest.approx(sum(subsets) / len(subsets))


def test_a_missing_reward_is_never_chosen() -> None:
    assert pick([worth(None), worth(-2.0), worth(-1.0), worth(-1.0)]) == 2
    assert pick([worth(None), worth(None)]) is None and pick([]) is None


def test_the_summary_by_hand() -> None:
    groups = [
        [worth(1.0, fit=0.8), worth(-1.0, fit=0.2)],
        [worth(0.5, fit=None), worth(None, fit=0.4)],
        [worth(None), worth(None)],
    ]
    found = summary(groups, 2)
    assert (found["prompts"], found["abstained"], found["whole"]) == (3, 1, 1)
    assert [(row["n"], row["reward"]) for row in found["curve"]] == [(1, 0.0), (2, 1.0)]
    assert found["terms"]["fit"] == pytest.approx({"one": 0.5, "best": 0.8, "low": 0.3, "high": 0.3, "n": 1})
    assert summary([[worth(None)]], 1)["curve"] == []


# ---- the command ---------------------------------------------------------------------------------


def best(world: World, out: Path, *words: str) -> Done:
    file = world.folder / "heldout.jsonl"
    number = () if "--n" in words else ("--n", "4")
    return tutelage_cli("best", file, "--runs", world.runs, "--run", "one", "--out", out, *number, *words)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_best_of_a_runs_replies(played: World, tmp_path: Path) -> None:
    done = best(played, tmp_path / "a.jsonl", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["version"], told["n"], told["prompts"], told["abstained"]) == ("r2", 4, 9, 0)
    assert [row["n"] for row in told["curve"]] == [1, 2, 4]
    rows = lines(tmp_path / "a.jsonl")
    for row in rows:
        totals = [r["reward"] for r in row["replies"]]
        assert len(totals) == 4 and row["reward"] == max(totals) == totals[row["chosen"]]
        assert row["reply"] == row["replies"][row["chosen"]]["text"]
        assert {v["judge"] for r in row["replies"] for v in r["verdicts"]} >= {"critic", "text"}
    assert told["curve"][-1]["reward"] == pytest.approx(sum(row["reward"] for row in rows) / 9)
    assert best(played, tmp_path / "b.jsonl").code == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    shown = best(played, tmp_path / "c.jsonl", "--version", "start", "--seed", "3", "--limit", "5").out
    assert "one@start, 5 prompts" in shown and "4 draws: reward" in shown
    assert lines(tmp_path / "c.jsonl")[0]["replies"] != rows[0]["replies"]


def test_without_any_verdict_nothing_is_chosen(played: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tutelage.applications import best as module

    def silent(_: Any, __: Any, replies_PG: Any) -> list[list[Reward]]:
        return [[Reward(r.id, None, {}, {}, {}) for r in group] for group in replies_PG]

    monkeypatch.setattr(module, "reward", silent)
    done = best(played, tmp_path / "a.jsonl", "--limit", "2", "--json")
    assert done.code == 0 and json.loads(done.out)["abstained"] == 2 and json.loads(done.out)["curve"] == []
    assert [(row["reply"], row["reward"], row["chosen"]) for row in lines(tmp_path / "a.jsonl")] == [(None,) * 3] * 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--n", "0"), "n is 0"),
        (("--temperature", "0"), "temperature is 0"),
        (("--version", "r9"), "r9"),
        (("--limit", "0"), "limit is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(played: World, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = best(played, tmp_path / "a.jsonl", *words)
    assert done.code == 2 and said in done.err and not (tmp_path / "a.jsonl").exists()
    assert best(played, tmp_path / "no" / "a.jsonl").code == 2
