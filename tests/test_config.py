"""The recipe: every key documented and overridable, nonsense refused with the nearest right word."""

from __future__ import annotations

import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from tutelage.config import OBJECTIVES, Recipe, all_keys, builtin_recipes, data_file, load_recipe
from tutelage.errors import RecipeError


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "r.toml"
    path.write_text("", encoding="utf-8")
    return path


def recipe(tmp_path: Path, text: str, *overrides: str, **known: str | None) -> Recipe:
    path = tmp_path / "r.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides, **known)


def fields() -> Iterator[tuple[str, Any]]:
    """(dotted key, pydantic field) of everything a recipe may say."""
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from ((f"{name}.{inner}", f) for inner, f in kind.model_fields.items())
        else:
            yield name, field


FIELDS = dict(fields())


def other_value(key: str) -> str:
    """A valid value, as TOML, that is not the default."""
    field, default = FIELDS[key], all_keys()[key]
    optional = typing.get_origin(field.annotation) in (types.UnionType, typing.Union)
    kinds = typing.get_args(field.annotation) if optional else (field.annotation,)
    kind = next(k for k in kinds if k is not type(None))
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        return f'"{next(c for c in typing.get_args(kind) if c != default)}"'
    special = {
        "controller.temperatures": "[0.0, 0.7]",
        "controller.top_k": "[0, 40]",
        "controller.masks": '["no-digits=[0-9]"]',
        "controller.openings": '["I think"]',
    }
    if key in special:
        return special[key]
    if key == "constraints":
        return '[{name = "form", judge = "text"}]'
    if key == "tiers":
        return '[{terms = ["fit", "principles"]}, {terms = ["text", "consistency"]}]'
    if key == "judges":
        return '[{name = "mine", kind = "my_judges:polite"}]'
    if typing.get_origin(kind) is tuple:
        return '["text"]'
    if kind is bool:
        return str(not default).lower()
    if kind is int:
        return str((default or 1) + 1)
    if kind is float:
        return str(default * 0.9 if default else 0.4)
    assert kind is str
    return '"another"'


def needed(key: str) -> list[str]:
    """What must be set for a key to be accepted: an option belongs to the objectives that read it."""
    section, _, option = key.partition(".")
    if key == "gate.evidence" or (section == "pairs" and option != "file"):
        return ["pairs.file=pairs.jsonl"]
    if key == "credit.discount":
        return ["credit.rest=spread"]
    if key == "credit.depth":
        return ["credit.method=decomposed"]
    if key in ("credit.judge", "credit.steps"):
        critic = 'judges=[{name = "another", kind = "critic", model = "another.safetensors"}]'
        return [critic, "credit.method=integrated-gradients"]
    if section != "objective":
        return []
    name = next(name for name, kind in OBJECTIVES.items() if option in kind.options)
    return [f"update.objective={name}", *(["objective.baseline=moving"] if option == "decay" else [])]


def test_all_keys_are_all_keys() -> None:
    assert set(all_keys()) == set(FIELDS)


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_is_documented_and_can_be_overridden(key: str, empty: Path) -> None:
    assert FIELDS[key].description
    changed = load_recipe(empty, [*needed(key), f"{key}={other_value(key)}"])
    value: Any = changed
    for part in key.split("."):
        value = getattr(value, part)
    assert value != all_keys()[key]
    assert changed.hash != Recipe().hash
    # ... and survives being written out and read back.
    again = empty.with_name("again.toml")
    again.write_text(changed.to_toml(), encoding="utf-8")
    assert load_recipe(again) == changed
    assert load_recipe(again).hash == changed.hash


def test_the_resolved_recipe_spells_out_every_default(empty: Path) -> None:
    text = Recipe().to_toml()
    for key, default in all_keys().items():
        assert default is None or f"\n{key.rsplit('.', 1)[-1]} = " in "\n" + text
    empty.write_text(text, encoding="utf-8")
    assert load_recipe(empty) == Recipe()
    assert load_recipe(empty).hash == Recipe().hash


@given(
    title=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    seed=st.integers(0, 2**31),
    rate=st.floats(1e-8, 10.0),
    targets=st.lists(st.text("abcdefg_.", min_size=1, max_size=8), max_size=3),
)
def test_any_recipe_comes_back_equal(
    tmp_path_factory: pytest.TempPathFactory, title: str, seed: int, rate: float, targets: list[str]
) -> None:
    data = {"title": title, "seed": seed, "update": {"learning_rate": rate}, "lora": {"targets": targets}}
    before = Recipe.model_validate(data)
    path = tmp_path_factory.getbasetemp() / "any-recipe.toml"
    path.write_bytes(before.to_toml().encode("utf-8"))
    after = load_recipe(path)
    assert after == before
    assert after.hash == before.hash


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("[update]\nrouns = 3", "update.rouns", "did you mean 'update.rounds'?"),
        ("[updates]\nrounds = 3", "updates", "did you mean 'update'?"),
        ("learning_rate = 3", "learning_rate", ".learning_rate'?"),
        ('[feedback]\njudge = ["text"]', "feedback.judge", "did you mean 'feedback.judges'?"),
        ("[zzz]\na = 1", "zzz", "remove it"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, text: str, key: str, meant: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, text)
    assert f"'{key}'" in caught.value.got
    assert meant in caught.value.fix
    assert "r.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[update]\nrounds = "three"', "update.rounds"),
        ("[update]\nrounds = 2.5", "update.rounds"),
        ("[update]\nrounds = -1", "update.rounds"),
        ("[update]\nsamples = 1", "update.samples"),
        ("[update]\nlearning_rate = 0", "update.learning_rate"),
        ('[update]\nobjective = "ppo2"', "update.objective"),
        ("[gate]\nconfidence = 1.0", "gate.confidence"),
        ("[credit]\nbeta = 1.5", "credit.beta"),
        ("[supervised]\ntop_p = 0.0", "supervised.top_p"),
        ('[feedback]\njudges = ["oracle"]', "feedback.judges"),
        ('[feedback]\njudges = "text"', "feedback.judges"),
        ('model = "tiny"', "model"),
        ("name = 3", "name"),
        ('name = "../up"', "name"),
        ('name = ""', "name"),
        ("seed = -1", "seed"),
        ('[constraint]\nenabled = "perhaps"', "constraint.enabled"),
        ("[update]\nkl = nan", "update.kl"),
        ("[controller]\ntemperatures = []", "controller.temperatures"),
        ("[controller]\ntemperatures = [0.5, 0.5]", "controller.temperatures"),
        ("[controller]\ntemperatures = [-0.5, 0.5]", "controller.temperatures"),
        ("[controller]\ntop_k = [-1]", "controller.top_k"),
        ('[controller]\nmasks = ["[0-9]"]', "controller.masks"),
        ('[controller]\nmasks = ["digits=["]', "controller.masks"),
        ('[controller]\nmasks = ["a=b", "a=c"]', "controller.masks"),
        ('[controller]\nopenings = [" "]', "controller.openings"),
        ('[controller]\nopenings = ["a", "a"]', "controller.openings"),
        ('[controller]\nscope = "token"\nopenings = ["a"]', "controller"),
        ("[controller]\ntemperatures = [0.7]", "controller"),
        ("[controller]\ntemperatures = [0.0]\ntop_k = [0, 5]", "controller"),
    ],
)
def test_wrong_types_and_ranges_name_the_key(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, text)
    assert f"'{key}" in caught.value.got
    assert caught.value.fix


@pytest.mark.parametrize(
    "override",
    [
        "update.learning_rate=inf",  # no number to learn with
        "constraint.kp=inf",
        "rewards.fit=nan",
        "rewards.fit=-1",  # compose leaves such a term out in silence
        "seed=99999999999999999999999",  # more than a generator or the ledger can hold
        "update.rounds=true",  # a yes is no number
    ],
)
def test_numbers_that_nothing_can_work_with_are_refused(empty: Path, override: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(empty, [override])


@pytest.mark.parametrize(
    "overrides",
    [
        ("supervised.enabled=false", "update.rounds=0"),
        ("feedback.judges=[]",),
        ("controller.enabled=true", "sampling.int8=true"),
        ("controller.enabled=true", "sampling.server=http://127.0.0.1:8000"),
        ("rewards.fit=0", "rewards.principles=0", "rewards.consistency=0", "rewards.text=0"),
    ],
)
def test_a_recipe_that_can_learn_nothing_is_refused(empty: Path, overrides: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError):
        load_recipe(empty, overrides)


def test_more_than_one_mistake_is_counted(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="1 more"):
        recipe(tmp_path, "[update]\nrounds = -1\nsamples = 1")


def test_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"r\.toml is not valid TOML.*line 2"):
        recipe(tmp_path, "seed = 1\n[update\n")
    (tmp_path / "latin.toml").write_bytes(b'title = "\xe9"')
    with pytest.raises(RecipeError, match="not UTF-8 text \\(byte 9\\)"):
        load_recipe(tmp_path / "latin.toml")
    for missing in (tmp_path / "missing.toml", tmp_path, "no-such-recipe"):
        with pytest.raises(RecipeError, match="no recipe file"):
            load_recipe(missing)


# ---- overrides ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("update.rounds=2", "update.rounds", 2),
        (" update.rounds = 2 ", "update.rounds", 2),
        ("lora.alpha=8", "lora.alpha", 8.0),
        ("update.learning_rate=1e-3", "update.learning_rate", 1e-3),
        ("constraint.enabled=false", "constraint.enabled", False),
        ('feedback.judges=["text", "critic"]', "feedback.judges", ("text", "critic")),
        ("update.objective=rloo", "update.objective", "rloo"),  # a bare word needs no quotes
        ('update.objective="rloo"', "update.objective", "rloo"),
        ("model.name=./some dir/m=1.gguf", "model.name", "./some dir/m=1.gguf"),
        ("title=Was ist das? 東京", "title", "Was ist das? 東京"),
    ],
)
def test_overrides_are_toml_or_bare_words(empty: Path, override: str, key: str, value: Any) -> None:
    found: Any = load_recipe(empty, [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_the_last_word_counts_and_the_file_is_below(tmp_path: Path) -> None:
    got = recipe(tmp_path, "[update]\nrounds = 5\nsamples = 4", "update.rounds=6", "update.rounds=7")
    assert (got.update.rounds, got.update.samples) == (7, 4)


@pytest.mark.parametrize(
    "override", ["update.rounds", "=3", "", "update.rounds.deep=1", "update..rounds=1", "update=3"]
)
def test_what_is_no_assignment_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError):
        recipe(tmp_path, "[update]\nrounds = 5", override)


def test_shortcuts_of_the_command_line(tmp_path: Path) -> None:
    got = recipe(tmp_path, '[model]\nname = "a"', model="m", prompts="p.jsonl", constitution="c.toml")
    assert (got.model.name, got.prompts.train, got.feedback.constitution) == ("m", "p.jsonl", "c.toml")
    assert recipe(tmp_path, '[model]\nname = "a"', model=None).model.name == "a"


def test_a_shortcut_into_a_broken_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="model"):
        recipe(tmp_path, 'model = "tiny"', model="m")


# ---- built-in files ----------------------------------------------------------------------------


def test_builtin_recipes_load() -> None:
    for name, path in builtin_recipes().items():
        assert load_recipe(name) == load_recipe(path)


def test_a_built_in_file_is_found_or_the_choice_named(tmp_path: Path) -> None:
    assert data_file("builtin:honesty", suffix="constitutions/*.toml").is_file()
    with pytest.raises(RecipeError, match="honestly") as caught:
        data_file("builtin:honestly", suffix="constitutions/*.toml")
    assert "builtin:honesty" in caught.value.expected
    assert data_file(str(tmp_path / "x.toml"), suffix="constitutions/*.toml") == tmp_path / "x.toml"


def test_defaults_name_files_that_exist() -> None:
    r = Recipe()
    for name, suffix in (
        (r.prompts.train, "questions/*.jsonl"),
        (r.prompts.gate, "questions/*.jsonl"),
        (r.prompts.heldout, "questions/*.jsonl"),
        (r.feedback.constitution, "constitutions/*.toml"),
        (r.feedback.critic_questions, "*.jsonl"),
        (r.feedback.critic_replies, "*.jsonl"),
    ):
        assert data_file(name, suffix=suffix).is_file()


def test_the_schema_serves_editors() -> None:
    schema = Recipe.model_json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False


def test_a_recipe_is_read_without_torch(child_env: dict[str, str]) -> None:
    code = "import sys; from tutelage.config import Recipe; Recipe(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=child_env)
    assert done.stdout == "False\n"


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().update.rounds = 5
