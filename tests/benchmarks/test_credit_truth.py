"""The benchmark of true credit: what it measures is right where the answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest_plugins = ["tests.tiny_world"]

HERE = Path(__file__).parents[2] / "benchmarks"
TRUTH_BT = torch.tensor([[3.0, -1.0, 0.0, 2.0], [0.5, 0.0, -2.0, 1.0]])


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    import credit_truth

    return credit_truth


def test_deletion_is_one_for_the_truth_and_below_zero_for_its_opposite(bench: Any) -> None:
    assert bench.deleted(TRUTH_BT, TRUTH_BT) == pytest.approx(1.0)
    assert bench.deleted(5.0 * TRUTH_BT, TRUTH_BT) == pytest.approx(1.0)
    assert bench.deleted(-TRUTH_BT, TRUTH_BT) < -0.5


def test_a_head_learns_the_sums_of_others(bench: Any) -> None:
    """Sums that are linear in the features, with more features than replies: told on rows that it has not seen."""
    random = np.random.default_rng(0)
    base_NK = random.normal(size=(300, 6))
    x_NF = np.concatenate([base_NK, base_NK @ random.normal(size=(6, 400))], axis=1).astype(np.float32)
    y_N = base_NK @ np.array([1.0, -2.0, 0.5, 0.0, 3.0, 1.0]) + 4.0
    reward, unseen = bench.linear_head(x_NF[:200], y_N[:200])
    assert unseen > 0.95
    said = reward(torch.from_numpy(x_NF[200:]), torch.zeros(100))
    assert np.corrcoef(said.numpy(), y_N[200:])[0, 1] > 0.95
    assert float(said.mean()) == pytest.approx(float(y_N[200:].mean()), abs=1.0)
    _, chance = bench.linear_head(x_NF[:200], random.permutation(y_N[:200]))
    assert chance < 0.3


def test_the_table_has_a_line_a_method(bench: Any) -> None:
    rows = [
        {"seed": s, "method": m, "correlation": c, "lacking": None, "deletion": 0.5, "seconds": 0.25}
        for s, m, c in ((0, "prefix", 0.25), (1, "prefix", 0.75), (0, "uniform", None))
    ]
    lines = bench.shown(rows).splitlines()
    assert lines[2:] == [
        "| prefix | 2 | +0.50 (+0.25, +0.75) | - | +0.50 (+0.50, +0.50) | 0.250 |",
        "| uniform | 1 | - | - | +0.50 | 0.250 |",
    ]


def test_tokens_and_words_earn_what_was_set(bench: Any, tiny_lm: Any) -> None:
    from types import SimpleNamespace

    replies = [SimpleNamespace(tokens=(5, 5, 9)), SimpleNamespace(tokens=(5, 7))]
    worth = bench.prices(replies, seed=3)
    first, second, third = torch.randn(3, generator=torch.Generator().manual_seed(3)).tolist()
    assert worth(replies[0]) == [first, first, second] and worth(replies[1]) == [first, third]
    assert worth(SimpleNamespace(tokens=(8,))) == [0.0]
    pytest.importorskip("vaderSentiment", reason="VADER is not installed")
    reply = SimpleNamespace(tokens=tiny_lm.encode_reply("a happy lamp")[:-1])
    found = bench.valences(tiny_lm)(reply)
    assert len(found) == len(reply.tokens) and sum(found) == pytest.approx(2.7 / 4)


def test_a_critics_contributions_are_complete_and_its_attention_is_weighed_by_the_reward(
    bench: Any, tiny_lm: Any
) -> None:
    from types import SimpleNamespace

    words = ("old", "new", "warm", "cold")
    texts = [f"The {w} lamp {i}." for i in range(10) for w in words]
    replies = [SimpleNamespace(text=t, tokens=tiny_lm.encode_reply(t)[:-1]) for t in texts]
    others = [((1,), r, float("warm" in r.text or "new" in r.text)) for r in replies]
    own = [replies[0], replies[4]]  # of one length, as the benchmark's are
    given = bench.Task(tiny_lm, own, [(1,)] * 2, torch.zeros(2, 1), lambda x, _: x, 0.0, 0.0, others)
    passages = [bench.Passage(r.text) for r in own]
    scores, lacking = bench.by_critic("contribution", given, passages)
    assert lacking < 1e-6 and scores.shape == (2, len(own[0].tokens))
    weighed, none = bench.by_critic("attention", given, passages)
    assert none is None and weighed.sum() == pytest.approx(0.0, abs=1e-4), "above and below the mean reward"
