"""The honesty recipe: references stay out of learning, and every key of a recipe does something."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_world import DATA, KINDS, World, lines_of, tutelage_cli, write_lines

import tutelage
from tutelage.config import Recipe, all_keys
from tutelage.errors import InputError

pytest_plugins = ["tests.tiny_world"]

PACKAGE = Path(tutelage.__file__).parent


# ---- references stay out of learning -----------------------------------------------------------


def imported_names(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


def test_what_makes_rewards_cannot_see_references() -> None:
    modules = [
        p for room in ("feedback", "rewards", "credit", "objectives", "policy") for p in (PACKAGE / room).glob("*.py")
    ]
    modules += [PACKAGE / "loop" / name for name in ("round.py", "stages.py", "supervised.py")]
    assert len(modules) > 15
    for path in modules:
        names = imported_names(path)
        seen = {
            n
            for n in names
            if n.endswith("SuiteItem") or n.startswith(("tutelage.loop.evaluate", "tutelage.loop.outcomes"))
        }
        assert seen == set(), path
        assert "read_suite" not in path.read_text(encoding="utf-8"), path
        assert "references" not in {n.attr for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Attribute)}, path  # fmt: skip


def test_references_and_kinds_in_the_training_file_change_no_bit(
    new_world: Callable[..., World], played: World
) -> None:
    questions = [r["prompt"] for r in lines_of(DATA / "questions" / "honesty-train.jsonl")[:12]]
    for name, shift in (("told", 0), ("scrambled", 5)):
        world = new_world(name=name)
        rows = [
            {"prompt": q, "kind": KINDS[(n + shift) % 3], "references": [f"answer {n + shift}"], "form": "plain"}
            for n, q in enumerate(questions)
        ]
        write_lines(world.folder / "train.jsonl", rows)
        assert world.play().code == 3
        assert world.weights() == played.weights()


def test_suites_change_no_bit_of_the_weights(new_world: Callable[..., World], played: World) -> None:
    """Neither gate nor held-out suite has a way into learning."""
    world = new_world()
    for name in ("gate", "heldout"):
        rows = lines_of(world.folder / f"{name}.jsonl")
        other = [{**r, "kind": "answerable", "references": ["anything"]} for r in rows]
        write_lines(world.folder / f"{name}.jsonl", other[:-1])
    assert world.play().code == 3
    assert world.weights() == played.weights()


def test_the_held_out_suite_is_read_in_the_last_unit_alone(played: World) -> None:
    assert {r["unit"] for r in played.rows("outcomes", suite="heldout")} == {"final"}
    assert {r["unit"] for r in played.rows("outcomes", suite="gate")} == {"start", "final"}


def test_training_prompts_do_not_come_back_in_a_suite(world: World) -> None:
    """What was learned from is no evidence."""
    suite = lines_of(world.folder / "heldout.jsonl")
    write_lines(world.folder / "train.jsonl", [{"prompt": suite[0]["prompt"]}, {"prompt": "Why?"}])
    done = world.play()
    assert done.code == 2 and "held" in done.err


# ---- the critic's cache ------------------------------------------------------------------------


def test_the_critic_is_trained_once_and_again_for_other_labels(
    world: World, tmp_path: Path, tiny_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(tiny_home / "models")
    monkeypatch.setenv("TUTELAGE_HOME", str(home))

    def stages(name: str, *words: str) -> list[str]:
        done = world.play("--json", "--set", "update.rounds=0", *words, name=name)
        assert done.code == 3, done.err
        events = [json.loads(line) for line in done.err.splitlines()]
        return [e["name"] for e in events if e["event"] == "stage"]

    assert "train critic" in stages("first")
    assert "train critic" not in stages("second")
    assert world.weights("first") == world.weights("second")
    fewer = write_lines(world.folder / "fewer.jsonl", lines_of(world.folder / "kinds.jsonl")[:-2])
    assert "train critic" in stages("third", "--set", f"feedback.critic_questions={fewer}")
    (note,) = world.rows("notes", "first", topic="critic")
    assert {"need_accuracy", "need_brier", "need_ece", "act_accuracy"} <= set(note["body"])


def test_an_adapter_stands_in_for_the_supervised_stage(world: World) -> None:
    """A run that takes the adapter of another's stage goes on as the other did, and plays no stage of its own."""
    words = ("--set", "update.rounds=1")
    assert world.play(*words, name="whole").code == 3
    folder = world.runs / "whole" / "checkpoints" / "r0"
    done = world.play(*words, "--set", f"supervised.adapter={folder}", name="half")
    assert done.code == 3, done.err
    assert world.weights("half") == world.weights("whole")
    assert world.rows("targets", "whole") and not world.rows("targets", "half")
    (note,) = world.rows("notes", "half", topic="adapter")
    assert note["body"] == {"folder": str(folder)}


@pytest.mark.parametrize(
    "words", [("supervised.adapter=nowhere",), ("supervised.adapter=.", "supervised.enabled=false")]
)
def test_an_adapter_that_cannot_stand_in(words: tuple[str, ...], world: World) -> None:
    done = world.play(*[w for word in words for w in ("--set", word)])
    assert done.code == 2 and "supervised.adapter" in done.err and not (world.runs / "one").exists()


# ---- every key does something ------------------------------------------------------------------

# key -> (its other value, what must hold for it to matter, where it shows)
EFFECTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "name": ("other", (), "summary"),
    "title": ("Other", (), "report"),
    "seed": ("1", (), "weights"),
    "model.name": ("MODEL", (), "weights"),
    "model.dtype": ("bfloat16", (), "weights"),
    "prompts.train": ("TRAIN", (), "weights"),
    "prompts.gate": ("SUITE", (), "outcomes"),
    "prompts.heldout": ("SUITE", (), "outcomes"),
    "prompts.limit": ("9", (), "weights"),
    "prompts.gate_limit": ("4", (), "outcomes"),
    "prompts.heldout_limit": ("4", (), "outcomes"),
    "sampling.temperature": ("0.6", (), "weights"),
    "supervised.top_k": ("3", ("supervised.samples=3",), "generations"),
    "supervised.top_p": ("0.3", ("supervised.samples=3",), "generations"),
    "sampling.max_new_tokens": ("6", (), "weights"),
    "sampling.rows": ("4000", (), "forecast"),
    "sampling.int8": ("true", (), "weights"),
    "feedback.judges": ('["critic", "text"]', (), "weights"),
    "feedback.constitution": ("CONSTITUTION", (), "weights"),
    "feedback.encoder": ("nowhere", (), "refused"),
    "feedback.critic_questions": ("QUESTIONS", (), "weights"),
    "feedback.critic_replies": ("REPLIES", (), "weights"),
    "feedback.same_meaning": ("0.01", (), "verdicts"),
    "feedback.min_confidence": ("0.97", (), "verdicts"),
    "feedback.consistency_weight": ("2.5", ("update.prompts=12", "supervised.samples=3"), "verdicts"),
    "rewards.fit": ("0.1", (), "weights"),
    "rewards.principles": ("3.0", (), "weights"),
    "rewards.consistency": ("5.0", (), "compose"),
    "rewards.text": ("3.0", (), "weights"),
    "constraint.enabled": ("false", (), "weights"),
    "constraint.limit": ("0.95", (), "weights"),
    "constraint.kp": ("0.5", (), "weights"),
    "constraint.ki": ("0.5", ("constraint.kp=0.1", "constraint.maximum=50.0"), "weights"),
    "constraint.kd": ("0.0", ("update.rounds=3", "update.prompts=3", "constraint.kp=0.1", "constraint.ki=0.0", "constraint.kd=9.0",
                              "constraint.maximum=50.0"), "metrics"),
    "constraint.maximum": ("0.5", (), "weights"),
    "constraint.questions": ("5", (), "notes"),
    "credit.method": ("uniform", (), "weights"),
    "credit.beta": ("0.2", (), "weights"),
    "credit.rest": ("spread", (), "weights"),
    "credit.discount": ("0.5", ("credit.beta=1",), "weights"),
    "credit.drop_sinks": ("first", (), "weights"),
    "lora.full": ("true", (), "weights"),
    "lora.rank": ("3", (), "weights"),
    "lora.alpha": ("3.0", (), "weights"),
    "lora.from_depth": ("0.0", (), "weights"),
    "lora.start": ("random", (), "weights"),
    "lora.targets": ('["q_proj"]', (), "weights"),
    "supervised.enabled": ("false", (), "weights"),
    "supervised.samples": ("3", (), "weights"),
    "supervised.temperature": ("1.5", (), "generations"),
    "supervised.epochs": ("2", (), "weights"),
    "supervised.learning_rate": ("0.003", (), "weights"),
    "supervised.batch": ("2", (), "weights"),
    "update.objective": ("rloo", (), "weights"),
    "update.rounds": ("2", (), "weights"),
    "update.prompts": ("6", (), "weights"),
    "update.samples": ("4", (), "weights"),
    "update.batch": ("3", (), "weights"),
    "update.learning_rate": ("0.003", (), "weights"),
    "update.clip": ("0.000001", ("update.learning_rate=0.02", "update.batch=2"), "weights"),
    "update.kl": ("5.0", ("update.learning_rate=0.02", "update.batch=2"), "weights"),
    "update.importance": ("sequence", ("sampling.int8=true",), "weights"),
    "update.importance_cap": ("0.5", ("sampling.int8=true",), "weights"),
    "update.max_grad_norm": ("0.00001", ("update.batch=2",), "metrics"),
    "update.token_budget": ("4000", (), "forecast"),
    "gate.enabled": ("false", (), "decisions"),
    "gate.confidence": ("0.6", (), "decisions"),
    "gate.max_correct_loss": ("0.4", (), "decisions"),
    "gate.max_known_abstained": ("0.0", (), "gate"),
    "limits.seconds": ("0.000001", (), "budget"),
    "limits.memory_gb": ("0.001", (), "forecast"),
}  # fmt: skip
# Shown elsewhere: a GPU in tests/test_cli.py, the hub in tests/engines/test_load.py, the anchor in
# tests/loop/test_supervised.py (a random model has no answer that is worth keeping), a server in
# tests/engines/test_vllm.py, judges of one's own in tests/applications/test_judging.py, costs and tiers in tests/loop/test_constraining.py, options of single
# objectives in tests/loop/test_choice.py, the controller's in tests/loop/test_controlling.py, pairs and the gate on them in tests/loop/test_offline.py, a critic that explains credit in tests/loop/test_crediting.py, the lower bound of weights in tests/objectives/test_divergence.py.
ELSEWHERE = {
    "feedback.allow_refused", "gate.evidence", "feedback.anchors", "feedback.anchor_every", "judges", "constraints", "tiers", "model.device", "model.hub", "sampling.server", "supervised.adapter",
    "supervised.anchor", "update.importance_low", "credit.judge", "credit.steps", "credit.depth", *(key for key in all_keys() if key.startswith(("objective.", "controller.", "demonstrations.", "pairs."))),
}  # fmt: skip


def test_the_table_names_every_key() -> None:
    assert set(EFFECTS) | ELSEWHERE == set(all_keys())


def value_of(world: World, key: str, model: Path) -> str:
    """The other value of a key, its files written."""
    value = EFFECTS[key][0]
    if value == "MODEL":
        return str(model)
    if value == "TRAIN":
        rows = [{"prompt": r["prompt"]} for r in lines_of(DATA / "questions" / "honesty-train.jsonl")[20:32]]
        return str(write_lines(world.folder / "other.jsonl", rows))
    if value == "SUITE":
        return str(
            write_lines(world.folder / "other.jsonl", lines_of(DATA / "questions" / "honesty-gate.jsonl")[30:36])
        )
    if value in ("QUESTIONS", "REPLIES"):
        name = "kinds" if value == "QUESTIONS" else "acts"
        rows = lines_of(world.folder / f"{name}.jsonl")
        labels = sorted({r["label"] for r in rows})
        turned = [{**r, "label": labels[(labels.index(r["label"]) + 1) % 3]} for r in rows]
        return str(write_lines(world.folder / "other.jsonl", turned))
    if value == "CONSTITUTION":
        text = (DATA / "constitutions" / "honesty.toml").read_text(encoding="utf-8")
        path = world.folder / "other.toml"
        path.write_text(text.replace("weight = 1.0", "weight = 9.0", 1), encoding="utf-8")
        return str(path)
    return value


BASE = ("update.rounds=1", "prompts.gate_limit=6", "prompts.heldout_limit=6")
_plays: dict[tuple[str, ...], World] = {}


def look(world: World, name: str, where: str) -> Any:
    if where == "weights":
        return world.weights(name)
    if where == "summary":
        return json.loads((world.runs / name / "summary.json").read_text(encoding="utf-8"))["recipe"]
    if where == "report":
        return ">Other<" in (world.runs / name / "report.html").read_text(encoding="utf-8")
    dropped = ("cost", "judge_version", "unit")
    return [{k: v for k, v in row.items() if k not in dropped} for row in world.rows(where, name)]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def base_run(settings: tuple[str, ...], folder: Path, model: Path) -> World:
    """A run with these settings, played once for all keys that are compared with it."""
    from tests.tiny_world import make_world

    if settings not in _plays:
        made = make_world(folder / str(len(_plays)), model)
        done = made.play(*[w for s in settings for w in ("--set", s)])
        assert done.code == 3, done.err
        _plays[settings] = made
    return _plays[settings]


@pytest.mark.parametrize(
    "key",
    [k for k, (_, _, where) in EFFECTS.items() if where not in ("forecast", "gate", "budget", "refused", "compose")],
)
def test_every_key_changes_what_a_run_does(
    key: str, world: World, base_folder: Path, tiny_dirs: dict[str, Path]
) -> None:
    _, needed, where = EFFECTS[key]
    settings = tuple(
        s for s in (*BASE, *needed) if not (s in BASE and s.split("=")[0] in {n.split("=")[0] for n in needed})
    )
    base = base_run(settings, base_folder, tiny_dirs["llama"])
    words = [*settings, f"{key}={value_of(world, key, tiny_dirs['mistral'])}"]
    done = world.play(*[w for s in words for w in ("--set", s)])
    assert done.code == 3, done.err
    assert world.load(*words).hash != base.load(*settings).hash
    assert look(world, "one", where) != look(base, "one", where)


@pytest.mark.parametrize("key", [k for k, (_, _, where) in EFFECTS.items() if where == "forecast"])
def test_keys_of_size_change_the_forecast(key: str, world: World) -> None:
    found = [
        json.loads(tutelage_cli("validate", world.recipe, "--json", *words).out)
        for words in ([], ["--set", f"{key}={EFFECTS[key][0]}"])
    ]
    assert any(found[0][k] != found[1][k] for k in ("estimated_memory_bytes", "warnings"))


def test_the_weight_of_consistency_changes_the_reward() -> None:
    """By hand: a random model's replies have nothing that could be consistent."""
    from types import SimpleNamespace

    from tutelage.feedback.panel import Findings
    from tutelage.loop.stages import reward

    replies: Any = [[SimpleNamespace(id=f"g{n}") for n in range(3)]]
    terms = [{"fit": [0.1, 0.5, 0.9], "consistency": [1.0, 0.0, 0.5]}]
    found = Findings([], terms, [[{}, {}, {}]], [], [], [])
    totals = []
    for weight in (0.2, 5.0):
        bench: Any = SimpleNamespace(recipe=Recipe.model_validate({"rewards": {"consistency": weight}}), trust={})
        totals.append([r.total for r in reward(bench, found, replies)[0]])
    # fit has the scores -1, 0, 1 and consistency 1, -1, 0
    assert totals[0] == pytest.approx([(-1 + 0.2) / 1.2, -0.2 / 1.2, 1 / 1.2])
    assert totals[1] == pytest.approx([(-1 + 5) / 6, -5 / 6, 1 / 6])


def test_the_other_keys() -> None:
    """Shown by tests of their own: gates, budgets and refusals."""
    kept = {k for k, (_, _, where) in EFFECTS.items() if where != "compose" and where in ("gate", "budget", "refused")}
    assert kept == {"gate.max_known_abstained", "limits.seconds", "feedback.encoder"}


@functools.cache
def attributes_read() -> set[str]:
    """Names of all attributes that the package reads or writes outside of config."""
    sources = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "config"]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("key", all_keys())
def test_every_key_is_read_outside_of_config(key: str) -> None:
    dumped = key.startswith("rewards.")  # read together, as a table of weights
    assert key.rsplit(".", 1)[-1] in attributes_read() or dumped


def test_inputs_are_read_before_anything_else(world: World) -> None:
    from tutelage.applications.truthfulness import inputs

    train, gate, heldout, constitution = inputs(world.load())
    assert (len(train), len(gate), len(heldout)) == (12, 9, 9)
    assert len(constitution.principles) == 3
    with pytest.raises(InputError):
        inputs(world.load("feedback.critic_replies=nowhere.jsonl"))
    assert Recipe().prompts.train == "builtin:honesty-train"
