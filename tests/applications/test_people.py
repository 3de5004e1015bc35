"""People's labels through the command line: from a run's replies to verdicts in its ledger, and to other trainers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from tests.tiny_world import lines_of, tutelage_cli, write_lines

pytest_plugins = ["tests.tiny_world"]


@pytest.fixture
def runs(played, tmp_path):
    shutil.copytree(played.runs, tmp_path / "runs")
    return tmp_path / "runs"


def test_from_a_runs_replies_to_verdicts_in_its_ledger(runs, tmp_path, child_env):
    tasks, labels = tmp_path / "tasks.jsonl", tmp_path / "labels.jsonl"
    done = tutelage_cli("people", "tasks", "one", "--runs", runs, "--out", tasks, "--count", "3", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["tasks"] == 3 == len(lines_of(tasks))
    words = ["people", "label", tasks, "--labels", labels, "--annotator", "ada", "--json"]
    asked = subprocess.run(
        [sys.executable, "-m", "tutelage.cli", *map(str, words)],
        input="1\n2\ns\n", capture_output=True, text=True, env=child_env, check=False,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    assert len(lines_of(labels)) == 3
    kept = tutelage_cli("people", "keep", "one", "--runs", runs, "--tasks", tasks, "--labels", labels, "--json")
    assert kept.code == 0, kept.err
    assert json.loads(kept.out) == {"unit": "people-1", "verdicts": 3, "of_other_prompts": 0}
    from tutelage.store.ledger import Ledger

    ledger = Ledger(runs / "one" / "ledger.db", readonly=True)
    verdicts = ledger.rows("verdicts", judge="human:ada")
    replies = {g["id"] for g in ledger.rows("generations")}
    ledger.close()
    assert sorted(v["value"] is None for v in verdicts) == [False, False, True]
    assert all(set(v["shown"]) <= replies for v in verdicts if v["shown"])


def test_votes_come_in_and_go_out_as_preferences(tmp_path):
    rows = [
        {"prompt": "Why?", "chosen": "because", "rejected": "no", "votes": ["chosen", "chosen", "rejected"]},
        {"prompt": "How?", "chosen": "so", "rejected": "not so", "votes": ["tie", "rejected"]},
    ]
    tasks, labels, out = tmp_path / "t.jsonl", tmp_path / "l.jsonl", tmp_path / "o.jsonl"
    done = tutelage_cli(
        "people", "import", write_lines(tmp_path / "v.jsonl", rows), "--tasks", tasks, "--labels", labels, "--json"
    )
    assert done.code == 0, done.err
    assert json.loads(done.out) == {"tasks": 2, "labels": 5, "left_out": []}
    handed = tutelage_cli("people", "export", tasks, "--labels", labels, "--out", out, "--form", "preference", "--json")
    assert handed.code == 0, handed.err
    first, second = lines_of(out)
    assert first["chosen"][-1]["content"] == "because" and second["chosen"][-1]["content"] == "not so"
    assert 0.5 < first["probability"] < 1
    again = tutelage_cli("people", "import", tmp_path / "v.jsonl", "--tasks", tasks, "--labels", labels)
    assert again.code == 2 and "is there already" in again.err


def test_labels_of_other_prompts_are_refused(runs, tmp_path):
    row = {"prompt": "Nobody asked this", "chosen": "a", "rejected": "b"}
    tasks, labels = tmp_path / "t.jsonl", tmp_path / "l.jsonl"
    assert (
        tutelage_cli(
            "people", "import", write_lines(tmp_path / "v.jsonl", [row]), "--tasks", tasks, "--labels", labels
        ).code
        == 0
    )
    done = tutelage_cli("people", "keep", "one", "--runs", runs, "--tasks", tasks, "--labels", labels)
    assert done.code == 2 and "none of the 1 labels" in done.err
