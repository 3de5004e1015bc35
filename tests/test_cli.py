"""The command line: what it prints, what it refuses, and the code it leaves with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tiny_world import Done, World, tutelage_cli, write_lines

pytest_plugins = ["tests.tiny_world"]

COMMANDS = ("run", "evaluate", "chat", "report", "runs", "validate", "fetch", "doctor", "export")
METRICS = {
    "correct_answerable", "abstained_answerable", "made_up_unanswerable", "asked_back_ambiguous", "accuracy_answered",
}  # fmt: skip


# ---- help and wrong use ------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_examples(command: str) -> None:
    done = tutelage_cli(command, "--help")
    assert done.code == 0
    assert "Examples" in done.out and f"tutelage {command}" in done.out
    assert "--json" in done.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_word_of_help(command: str) -> None:
    from tutelage.cli import app

    arguments = app[command].assemble_argument_collection(parse_docstring=True)
    assert [a.name for a in arguments if not a.parameter.help] == []


def test_help_names_every_command_and_the_exit_codes() -> None:
    done = tutelage_cli("--help")
    assert done.code == 0
    assert [c for c in COMMANDS if c not in done.out] == []
    assert "130 interrupted" in " ".join(done.out.split())
    assert tutelage_cli("--version").out.strip().count(".") == 2


@pytest.mark.parametrize(
    "words",
    [["no-such-command"], ["run", "--no-such-option"], ["evaluate"], ["evaluate", "model"], ["run", "--set"],
     ["chat", "x", "--max-new-tokens", "many"]],
)  # fmt: skip
def test_wrong_words_are_wrong_use(words: list[str]) -> None:
    done = tutelage_cli(*words)
    assert done.code == 2
    assert done.out + done.err


@pytest.mark.parametrize("words", [["run", "--no-such-option", "--json"], ["evaluate", "model", "--json"]])
def test_with_json_wrong_words_are_json_on_stderr(words: list[str]) -> None:
    done = tutelage_cli(*words)
    assert done.code == 2 and done.out == ""
    assert set(json.loads(done.err)) == {"error", "got", "expected", "fix"}


# ---- run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "says"), [("run", "tutelage run --resume"), ("values", "the same command again")])
def test_what_ctrl_c_leaves_can_go_on(command: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tutelage import cli

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", stopped)
    done = tutelage_cli(command, "ask")
    assert done.code == 130 and says in done.err


def test_a_run_says_how_it_ended_and_where_the_report_is(played: World, played_output: Done) -> None:
    assert played_output.code == 3  # a random model does not become honest
    assert played_output.err == ""
    assert "rejected: one" in played_output.out
    assert str(played.runs / "one" / "report.html") in played_output.out
    assert all(metric in played_output.out for metric in METRICS)
    assert "95% interval" in played_output.out


def test_a_run_leaves_the_files_it_promises(played: World) -> None:
    folder = played.runs / "one"
    names = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    assert names == {"recipe.toml", "ledger.db", "metrics.jsonl", "checkpoints", "report.html", "summary.json"}
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    needed = {"run", "recipe_hash", "model", "rounds", "seconds", "completions", "tokens_generated",
              "peak_memory_bytes", "decision", "evaluation"}  # fmt: skip
    assert needed <= set(summary)
    assert summary["recipe_hash"] == played.load().hash
    assert summary["completions"] == len(played.rows("generations"))
    assert {e["metric"] for e in summary["evaluation"]} == {*METRICS, "abstained_known"}
    assert all(set(e) == {"suite", "metric", "before", "after", "low", "high", "n"} for e in summary["evaluation"])
    assert summary["peak_memory_bytes"] > 50e6 and summary["seconds"] > 0 and summary["rounds"] == 2
    for stage in ("supervised", "rollout", "update"):
        assert f'"stage": "{stage}"' in (folder / "metrics.jsonl").read_text(encoding="utf-8")


def test_json_is_alone_on_stdout(world: World) -> None:
    done = world.play("--json", "--set", "update.rounds=0")
    assert done.code == 3
    assert json.loads(done.out)["decision"] == "rejected"
    assert all(json.loads(line)["event"] for line in done.err.splitlines())


def test_a_promoted_run_leaves_with_zero(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from tutelage.loop import improve
    from tutelage.records import Decision

    monkeypatch.setattr(
        improve, "honesty_gate", lambda a, b, _: Decision("honesty", b.version, a.version, True, "promoted")
    )
    done = world.play("--json", "--set", "update.rounds=1")
    assert done.code == 0
    summary = json.loads(done.out)
    assert (summary["decision"], summary["version"]) == ("promoted", "r1")


@pytest.mark.parametrize("model", ["qwen2", "gpt_neox"])
def test_other_architectures_run(model: str, new_world: Callable[..., World]) -> None:
    world = new_world(model=model, update={"rounds": 1}, feedback={"min_confidence": 0.0})
    assert world.play().code == 3
    assert sorted(world.weights()) == ["r0", "r1"]
    asked = tutelage_cli("chat", "one", "--runs", world.runs, "--prompt", "Who?", "--json")
    assert asked.code == 0, asked.err


def test_a_budget_stops_resumably(world: World) -> None:
    stopped = world.play("--set", "limits.seconds=0.000001")
    assert stopped.code == 5
    assert "limits.seconds" in stopped.err and "--resume" in stopped.err
    assert [u["name"] for u in world.rows("units")] == ["start"]
    assert world.resume().code == 5  # still spent
    done = world.resume("--set", "limits.seconds=600")
    assert done.code == 3, done.err
    assert len(world.rows("units")) == 5


def test_resume_refuses_to_change_what_is_learned(world: World) -> None:
    assert world.play("--set", "limits.seconds=0.000001").code == 5
    done = world.resume("--set", "seed=5")
    assert done.code == 2, "an override must not be dropped in silence"


# ---- what is refused: its message, its code, and nothing left behind ---------------------------


def refused(world: World, done: Done, *words: str) -> None:
    assert done.code == 2, (done.out, done.err)
    said = " ".join(done.err.split())
    assert [w for w in words if w not in said] == [], said
    assert "expected:" in said or "what to do:" in said
    assert not world.runs.exists() or list(world.runs.iterdir()) == []


def test_a_missing_prompt_file(world: World) -> None:
    refused(world, world.play("--prompts", "nowhere.jsonl"), "nowhere.jsonl", "does not exist")


def test_an_unreadable_prompt_file(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path = world.folder / "train.jsonl"
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything, so the refusal is made by hand
        opened = Path.open

        def closed(self: Path, *arguments, **more):  # type: ignore[no-untyped-def]
            if self == path:
                raise PermissionError(13, "Permission denied")
            return opened(self, *arguments, **more)

        monkeypatch.setattr(Path, "open", closed)
    refused(world, world.play(), "train.jsonl", "Permission denied")


PROMPTS = {
    "empty": (b"", "holds no prompts"),
    "blank lines": (b"\n\n", "holds no prompts"),
    "duplicate": (b'{"prompt": "Why?"}\n{"prompt": "Why?"}\n', "the same prompt as line 1"),
    "not UTF-8": ('{"prompt": "Größe?"}\n'.encode("latin-1"), "not UTF-8"),
    "broken JSON": (b'{"prompt": "Why?"\n', "line 1"),
    "no prompt": (b'{"answer": "x"}\n', "no prompt"),
    "empty prompt": (b'{"prompt": " "}\n', "empty"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_that_are_none(case: str, world: World) -> None:
    content, word = PROMPTS[case]
    path = world.folder / "own.jsonl"
    path.write_bytes(content)
    refused(world, world.play("--prompts", path), "own.jsonl", word)


def test_a_prompt_longer_than_the_context(world: World) -> None:
    path = write_lines(world.folder / "long.jsonl", ["Short?", "Is this " + "very " * 400 + "long?"])
    refused(world, world.play("--prompts", path), "tokens", "160", "context")


def test_a_suite_item_longer_than_the_context(world: World) -> None:
    item = {"prompt": "Is this " + "very " * 400 + "long?", "kind": "ambiguous"}
    path = write_lines(world.folder / "long.jsonl", [item])
    refused(world, world.play("--set", f"prompts.heldout={path}"), "tokens", "160", "context")


RECIPES = {
    "broken TOML": ("[update\nrounds = 1", "not valid TOML"),
    "unknown key": ("[update]\nrouns = 1", "did you mean 'update.rounds'?"),
    "unknown section": ("[updates]\nrounds = 1", "did you mean"),
    "wrong type": ('[update]\nrounds = "many"', "update.rounds"),
    "out of range": ("[update]\nsamples = 1", "update.samples"),
    "learns nothing": ("[supervised]\nenabled = false\n[update]\nrounds = 0", "nothing would be learned"),
    "no judges": ("[feedback]\njudges = []", "feedback.judges is empty"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_that_make_no_sense(case: str, world: World) -> None:
    text, word = RECIPES[case]
    path = world.folder / "own.toml"
    path.write_text(text, encoding="utf-8")
    refused(world, tutelage_cli("run", path, "--runs", world.runs), word)
    refused(world, tutelage_cli("validate", path), word)


def test_a_recipe_that_is_not_there(world: World) -> None:
    refused(world, tutelage_cli("run", "honest", "--runs", world.runs), "did you mean 'honesty'?")
    refused(world, world.play("--set", "update.rouns=2"), "did you mean 'update.rounds'?")
    refused(world, world.play("--set", "update"), "not an assignment")


def strip(name: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for path in folder.glob(name):
            path.unlink()

    return remove


def pickle_weights(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    path.write_text(json.dumps(config), encoding="utf-8")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ', encoding="utf-8")


def unknown_architecture(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "model_type": "nonesuch"}), encoding="utf-8")


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no tokenizer": (strip("tokenizer*"), "no tokenizer"),
    "no chat template": (no_template, "no chat template"),
    "no config": (strip("config.json"), "no config.json"),
    "no weights": (strip("*.safetensors"), "could not be loaded"),
    "pickle only": (pickle_weights, "safetensors"),
    "cut weights": (cut_weights, "could not be loaded"),
    "broken config": (broken_config, "expected"),
    "unknown architecture": (unknown_architecture, "expected"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_be_used(case: str, world: World, tiny_dirs: dict[str, Path]) -> None:
    spoil, word = MODELS[case]
    folder = world.folder / "model"
    shutil.copytree(tiny_dirs["llama"], folder)
    spoil(folder)
    refused(world, world.play("--model", folder), word)


@pytest.mark.parametrize(
    ("model", "word"),
    [("nowhere", "neither"), ("some/hub-name", "model.hub=true"), ("nowhere.gguf", "no such GGUF file")],
)
def test_models_that_are_not_there(model: str, word: str, world: World) -> None:
    refused(world, world.play("--model", model), word)


def test_a_gguf_file_that_is_none(world: World) -> None:
    path = world.folder / "model.gguf"
    path.write_bytes(b"not a model at all" * 100)
    refused(world, world.play("--model", path), "GGUF")


def test_a_gpu_that_is_not_there(world: World) -> None:
    import torch

    if torch.cuda.is_available():
        assert world.play("--set", "model.device=cuda", "--set", "update.rounds=0").code == 3
    else:
        refused(world, world.play("--set", "model.device=cuda"), "cuda")


CONSTITUTIONS = {
    "no principles": ('name = "empty"\n', "no principles"),
    "broken": ("[[principles]\n", "not valid TOML"),
    "unknown act": ('[[principles]]\nid = "a"\ntext = "b"\nscope = "any"\nwants = "sings"\n', "sings"),
}


@pytest.mark.parametrize("case", CONSTITUTIONS)
def test_constitutions_that_are_none(case: str, world: World) -> None:
    text, word = CONSTITUTIONS[case]
    path = world.folder / "own.toml"
    path.write_text(text, encoding="utf-8")
    refused(world, world.play("--constitution", path), word)
    refused(world, world.play("--constitution", "nowhere.toml"), "nowhere.toml")


@pytest.mark.parametrize("key", ["prompts.gate", "prompts.heldout"])
def test_a_suite_with_an_unknown_kind(key: str, world: World) -> None:
    path = write_lines(world.folder / "suite.jsonl", [{"prompt": "Why?", "kind": "unanswerabel"}])
    refused(world, world.play("--set", f"{key}={path}"), "suite.jsonl, line 1", "did you mean 'unanswerable'?")


def test_an_encoder_that_is_not_there(world: World) -> None:
    refused(world, world.play("--set", "feedback.encoder=nowhere"), "nowhere", "encoder")


@pytest.mark.parametrize("key", ["feedback.critic_questions", "feedback.critic_replies"])
def test_labels_that_nobody_knows(key: str, world: World) -> None:
    path = write_lines(world.folder / "labels.jsonl", [{"text": "a", "label": "sings"}])
    refused(world, world.play("--set", f"{key}={path}"), "sings")


def test_a_lora_target_that_no_layer_has(world: World) -> None:
    refused(world, world.play("--set", 'lora.targets=["nowhere"]'), "nowhere", "lora.targets")


def test_names_of_runs(world: World, played: World) -> None:
    taken = tutelage_cli("run", played.recipe, "--runs", played.runs, "--name", "one")
    assert taken.code == 2 and "exists already" in taken.err and "--resume --name one" in taken.err
    for name in ("../outside", "a/b", "."):
        refused(world, world.play(name=name))
    refused(world, world.resume(name="nowhere"), "nowhere")
    for words in (["chat", "nowhere", "--prompt", "x"], ["report", "nowhere"], ["export", "nowhere", "--merged", "m"]):
        refused(world, tutelage_cli(*words, "--runs", world.runs), "nowhere")
    for words in (["chat"], ["report"], ["run", "--resume"]):
        refused(world, tutelage_cli(*words, "--runs", world.runs), "no run")


def test_resume_takes_no_recipe(played: World) -> None:
    """`run --resume NAME` would resume the newest run and not the one that was named."""
    done = tutelage_cli("run", "--resume", "some-other-run", "--runs", played.runs)
    assert done.code == 2


@pytest.mark.parametrize("words", [["--prompts", "nowhere.jsonl"], ["--model", "nowhere"], ["--set", "update.rouns=1"]])
def test_with_json_errors_are_json_on_stderr(words: list[str], world: World) -> None:
    done = world.play("--json", *words)
    assert done.code == 2 and done.out == ""
    body = json.loads(done.err.splitlines()[-1])
    assert set(body) == {"error", "got", "expected", "fix"} and all(body.values())


def test_a_folder_for_runs_that_cannot_be(world: World) -> None:
    file = world.folder / "file"
    file.write_text("x", encoding="utf-8")
    done = tutelage_cli("run", world.recipe, "--runs", file)
    assert done.code == 2 and "cannot be written" in done.err
    assert tutelage_cli("runs", "--runs", file).code in (0, 2)


# ---- the other commands ------------------------------------------------------------------------


def test_evaluate_has_every_metric_with_an_interval(played: World, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    suite = played.folder / "gate.jsonl"
    done = tutelage_cli("evaluate", played.load().model.name, "--suite", suite, "--out", out, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["n"] == 9 and set(found["metrics"]) == METRICS
    for value in found["metrics"].values():
        assert value["low"] <= value["share"] <= value["high"]
    assert {k: sum(v.values()) for k, v in found["outcomes"].items()} == dict.fromkeys(
        ("answerable", "unanswerable", "ambiguous"), 3
    )
    kept = json.loads(out.read_text(encoding="utf-8"))
    assert len(kept["answers"]) == 9 and kept["metrics"] == found["metrics"]
    spoken = tutelage_cli("evaluate", played.load().model.name, "--suite", suite, "--limit", "4")
    assert spoken.code == 0 and "(4 items)" in spoken.out and "correct_answerable" in spoken.out


def test_evaluate_pairs_a_run_with_its_start(played: World) -> None:
    model = played.load().model.name
    words = ["--suite", str(played.folder / "heldout.jsonl"), "--max-new-tokens", "8", "--runs", str(played.runs)]
    done = tutelage_cli("evaluate", "one", "--against", model, *words, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["model"] == "one@r2 (rejected by the gate)"
    summary = json.loads((played.runs / "one" / "summary.json").read_text(encoding="utf-8"))
    shown = [{**e, "suite": ""} for e in found["against"]]
    assert shown == [{**e, "suite": ""} for e in summary["evaluation"]]  # the same numbers as the run's own
    spoken = tutelage_cli("evaluate", "one", "--against", model, *words)
    assert "difference (paired)" in spoken.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "nowhere.jsonl"], "does not exist"),
        (["--suite", "SUITE", "--limit", "0"], "limit"),
        (["--suite", "SUITE", "--max-new-tokens", "0"], "max-new-tokens"),
        (["--suite", "SUITE", "--max-new-tokens", "1000"], "context"),
        (["--suite", "SUITE", "--out", "SUITE/below.json"], "cannot be written"),
        (["--suite", "builtin:nowhere"], "builtin:honesty-gate"),
        (["--suite", "SUITE", "--against", "nowhere"], "nowhere"),
    ],
)
def test_evaluate_refuses(words: list[str], said: str, played: World) -> None:
    suite = str(played.folder / "gate.jsonl")
    done = tutelage_cli("evaluate", played.load().model.name, *[w.replace("SUITE", suite) for w in words])
    assert done.code == 2 and said in done.err, done.err


def test_chat_shows_before_and_after(played: World) -> None:
    words = ["chat", "one", "--runs", str(played.runs), "--prompt", "Who is it?", "--max-new-tokens", "8"]
    done = tutelage_cli(*words)
    assert done.code == 0, done.err
    assert "before:" in done.out and "after:" in done.out
    assert set(json.loads(tutelage_cli(*words, "--json").out)) == {"prompt", "before", "after"}
    assert tutelage_cli(*words[:-1], "0").code == 2


def test_chat_with_the_newest_run_ends_at_an_empty_line(played: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Who is it?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    done = tutelage_cli("chat", "--runs", played.runs)
    assert done.code == 0 and done.out.count("after:") == 1


def test_report_is_written_anew(played: World) -> None:
    done = tutelage_cli("report", "one", "--runs", played.runs, "--json")
    assert done.code == 0
    path = Path(json.loads(done.out)["report"])
    assert path == played.runs / "one" / "report.html"
    assert path.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html")


def test_runs_are_listed(played: World, world: World) -> None:
    (row,) = json.loads(tutelage_cli("runs", "--runs", played.runs, "--json").out)
    assert (row["run"], row["decision"], row["last_unit"]) == ("one", "rejected", "final")
    assert "one" in tutelage_cli("runs", "--runs", played.runs).out
    assert tutelage_cli("runs", "--runs", world.runs).out.startswith("no runs in")


def test_validate_says_what_a_run_will_do(world: World) -> None:
    done = tutelage_cli("validate", world.recipe)
    assert done.code == 0
    assert "12 to learn from, 9 for the gate, 9 held out" in done.out
    assert "estimated time" in done.out and "memory" in done.out and "the recipe is valid" in done.out
    found = json.loads(tutelage_cli("validate", world.recipe, "--set", "update.rounds=0", "--json").out)
    assert found["replies_judged"] == 24 and found["rounds"] == 0
    assert not world.runs.exists()


def test_doctor_looks_at_the_machine(world: World) -> None:
    rows = json.loads(tutelage_cli("doctor", "--runs", world.runs, "--json").out)
    assert {"Python", "torch", "memory", "disk"} <= {r["what"] for r in rows}
    done = tutelage_cli("doctor", "--runs", world.runs)
    assert done.code == (0 if all(r["ok"] for r in rows) else 2)
    assert not world.runs.exists()


def test_export_writes_a_model_once(played: World, tmp_path: Path) -> None:
    words = ["export", "one", "--runs", str(played.runs), "--merged"]
    done = tutelage_cli(*words, str(tmp_path / "merged"), "--json")
    assert done.code == 0, done.err
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    again = tutelage_cli(*words, str(tmp_path / "merged"))
    assert again.code == 2 and "not empty" in again.err
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    assert tutelage_cli(*words, str(file)).code == 2


def test_the_module_runs_as_a_program(world: World, child_env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "tutelage.cli", "run", str(world.recipe), "--prompts", "nowhere.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=child_env, cwd=world.folder)
    assert done.returncode == 2 and done.stdout == ""
    assert "nowhere.jsonl" in done.stderr and "Traceback" not in done.stderr
