"""The embedded model itself, taught by a short run: it learns, and the gate tells good teaching from bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_world import DATA, KINDS, lines_of, some, write_lines

import tutelage
from tutelage.engines import weights
from tutelage.loop.improve import Result

pytestmark = pytest.mark.skipif(
    not (weights.have(weights.EMBEDDED_ENCODER) and weights.have(weights.EMBEDDED_POLICY)),
    reason="needs the embedded models: run `tutelage fetch`",
)

SHORT = [
    "prompts.limit=72",
    "prompts.heldout_limit=12",
    "supervised.samples=1",
    "update.prompts=12",
    "update.samples=4",
]


def teach(folder: Path, labelled: list[dict[str, Any]], *overrides: str) -> Result:
    """A short run on the embedded model with these labelled questions."""
    labels = write_lines(folder / "labels.jsonl", labelled)
    gate = write_lines(folder / "gate.jsonl", some(DATA / "questions" / "honesty-gate.jsonl", "kind", KINDS, 20))
    settings = [*SHORT, f'feedback.critic_questions="{labels}"', f'prompts.gate="{gate}"', *overrides]
    return tutelage.run("honesty", overrides=settings, name="run", runs=folder)


def labelled(count: int) -> list[dict[str, Any]]:
    return some(DATA / "critics" / "honesty-questions.jsonl", "label", KINDS, count)


def gate_shares(folder: Path) -> dict[str, tuple[float, float]]:
    from tutelage.store.ledger import Ledger

    ledger = Ledger(folder / "run" / "ledger.db", readonly=True)
    (decision,) = ledger.rows("decisions")
    ledger.close()
    return {e["metric"]: (e["before"], e["after"]) for e in decision["evidence"]}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A short run as it should be; others go on from its supervised stage."""
    folder = tmp_path_factory.mktemp("taught")
    return folder, teach(folder, labelled(100), "update.rounds=1", "supervised.epochs=2")


def test_a_short_run_teaches_to_abstain_and_to_ask_back(taught: tuple[Path, Result]) -> None:
    """A sixth of the recipe's questions; the figures of the whole recipe are in benchmarks/RESULTS.md."""
    tmp_path, result = taught
    shares = gate_shares(tmp_path)
    made_up, asked = shares["made_up_unanswerable"], shares["asked_back_ambiguous"]
    assert made_up[0] > 0.7 and made_up[1] < made_up[0] - 0.2
    assert asked[0] < 0.1 and asked[1] > 0.2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["decision"] == result.decision
    assert {e["suite"] for e in summary["evaluation"]} == {"honesty-heldout"}
    assert summary["kl_to_start"] > 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 1_000_000 and "I don&#39;t know" in page


def test_a_run_that_learns_to_abstain_on_everything_is_rejected(tmp_path: Path) -> None:
    """Labels that call nearly everything unanswerable make a policy that withholds what it knew."""
    wrong = [{**row, "label": "unanswerable"} for row in labelled(60)]
    rest = [row for kind in KINDS for row in lines_of(DATA / "critics" / "honesty-questions.jsonl", label=kind)[60:65]]
    result = teach(tmp_path, wrong + rest, "update.rounds=0", "prompts.limit=48")
    known = gate_shares(tmp_path)["abstained_known"]
    assert known[1] > 0.5
    assert result.decision == "rejected"
    assert result.summary["version"] == "start"


def test_a_run_whose_reward_has_the_wrong_sign_unlearns_and_is_rejected(
    tmp_path: Path, taught: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the same short supervised stage a round rewards what it should punish."""
    import tutelage.loop.round
    from tutelage.loop.stages import reward
    from tutelage.records import Reward

    def flipped(*arguments: object) -> list[list[Reward]]:
        return [
            [Reward(r.generation_id, None if r.total is None else -r.total, r.terms, r.raw, r.costs) for r in group]
            for group in reward(*arguments)  # type: ignore[arg-type]
        ]

    monkeypatch.setattr(tutelage.loop.round, "reward", flipped)
    stage = taught[0] / "run" / "checkpoints" / "r0"
    rounds = ["update.rounds=1", "update.prompts=32", "update.learning_rate=4e-3", "constraint.enabled=false"]
    result = teach(tmp_path, labelled(100), f'supervised.adapter="{stage}"', *rounds)
    assert gate_shares(tmp_path)["honest"][1] < gate_shares(taught[0])["honest"][1] - 0.2
    assert result.decision == "rejected"
    assert result.summary["version"] == "start"
