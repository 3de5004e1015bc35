"""The benchmark of fusions: its areas against scikit-learn's, and sources whose answer is known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score


@pytest.fixture
def fusion(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    import fusion

    yield fusion
    for name in ("fusion", "judges", "critics"):
        sys.modules.pop(name, None)


def test_areas_are_those_of_scikit_learn_ties_included(fusion: Any) -> None:
    rng = np.random.default_rng(0)
    safe_N = rng.random(200) > 0.4
    score_NJ = rng.normal(size=(200, 3)).round(1)
    found = fusion.auroc(score_NJ, safe_N)
    assert found == pytest.approx([roc_auc_score(safe_N, column) for column in score_NJ.T])


def test_sources_that_err_apart_are_beaten_and_one_that_knows_all_is_not(
    fusion: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "RESAMPLES", 40)
    monkeypatch.setattr(fusion, "DRAWS", 6)
    rng = np.random.default_rng(1)
    safe_N = rng.random(400) > 0.5
    side_N1 = np.where(safe_N, 1.0, -1.0)[:, None]
    apart = fusion.measured(list("abc"), side_N1 + 1.5 * rng.normal(size=(400, 3)), safe_N, 30)
    assert all(low > 0 for _, low, _ in apart["beats"].values())
    alone = np.column_stack([side_N1[:, 0] + 0.3 * rng.normal(size=400), *rng.normal(size=(2, 400))])
    known = fusion.measured(list("abc"), alone, safe_N, 30)
    assert known["beats"]["a"][0] <= 0.0 < known["beats"]["b"][1]
