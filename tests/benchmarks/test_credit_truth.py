"""The benchmark of true credit: what it measures is right where the answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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
