"""The recipe: the one file that says what a run does. Data only; imports no torch.

Every knob exists once, has a vetted default, and an unknown key is an error that names the nearest
known one. `Recipe.model_json_schema()` serves editors.
"""

from __future__ import annotations

import difflib
import importlib.resources
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import BaseModel, Field, ValidationError, model_validator

from tutelage.config.constraints import TERMS_OF, CostConstraint, Tier, check_constraints, check_tiers
from tutelage.config.controller import Controller
from tutelage.config.objectives import BASELINES, OBJECTIVES, Objective, ObjectiveName
from tutelage.config.pairs import PAIR_OBJECTIVES, Pairs
from tutelage.config.section import Section
from tutelage.config.sections import (
    JUDGE_KINDS,
    Constraint,
    Credit,
    Demonstrations,
    Feedback,
    Gate,
    Judge,
    Limits,
    Lora,
    Model,
    Prompts,
    Rewards,
    Sampling,
    Supervised,
    Update,
)
from tutelage.errors import RecipeError
from tutelage.records import content_hash

__all__ = [
    "JUDGE_KINDS",
    "OBJECTIVES",
    "Constraint",
    "Controller",
    "CostConstraint",
    "Credit",
    "Demonstrations",
    "Feedback",
    "Gate",
    "Judge",
    "Limits",
    "Lora",
    "Model",
    "Objective",
    "Pairs",
    "Prompts",
    "Recipe",
    "Rewards",
    "Sampling",
    "Supervised",
    "Tier",
    "Update",
    "builtin_recipes",
    "data_file",
    "load_recipe",
]


class Recipe(Section):
    """Everything a run does."""

    name: str = Field("honesty", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the recipe")
    title: str = Field("", description="one line for people")
    seed: int = Field(0, ge=0, lt=2**31, description="same seed, same weights")
    model: Model = Model()
    prompts: Prompts = Prompts()
    sampling: Sampling = Sampling()
    feedback: Feedback = Feedback()
    judges: tuple[Judge, ...] = Field((), description="judges of your own, beside those of [feedback]")
    rewards: Rewards = Rewards()
    tiers: tuple[Tier, ...] = Field((), description="ranks of rewards, the most important first")
    constraint: Constraint = Constraint()
    constraints: tuple[CostConstraint, ...] = Field((), description="costs under limits, beside that of [constraint]")
    credit: Credit = Credit()
    lora: Lora = Lora()
    supervised: Supervised = Supervised()
    demonstrations: Demonstrations = Demonstrations()
    pairs: Pairs = Pairs()
    update: Update = Update()
    objective: Objective = Objective()
    controller: Controller = Controller()
    gate: Gate = Gate()
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _makes_sense(self) -> Recipe:
        if self.controller.enabled and not self.sampling.exact:
            raise ValueError("controller.enabled needs sampling in this process: neither sampling.int8 nor a server")
        u = self.update
        shown = bool(self.demonstrations.file)
        if not (self.controller.enabled or self.supervised.enabled or shown or self.pairs.file or u.rounds):
            raise ValueError(
                "nothing would be learned: supervised.enabled is false, demonstrations.file and pairs.file are empty, "
                "update.rounds is 0"
            )
        if self.controller.enabled and (shown or self.pairs.file):
            which = "demonstrations.file" if shown else "pairs.file"
            raise ValueError(f"a controller steers the model as it is: leave {which} out")
        if self.gate.evidence == "pairs" and not (self.pairs.file and self.pairs.heldout):
            raise ValueError("gate.evidence = pairs needs pairs.file and pairs.heldout above 0")
        if self.pair_objective == "kto" and self.pairs.against == "own":
            raise ValueError("pairs.against = own compares two replies, and kto learns from single ones")
        if self.supervised.adapter and not self.supervised.enabled:
            raise ValueError("supervised.adapter stands in for the supervised stage, and supervised.enabled is false")
        if self.supervised.adapter and self.controller.enabled:
            raise ValueError("a controller steers the model as it is: leave supervised.adapter out")
        if self.update.rounds and not any(self.rewards.model_dump().values()):
            raise ValueError("all weights in [rewards] are 0: the rounds would have nothing to learn from")
        if self.sampling.server and self.sampling.int8:
            raise ValueError("sampling.int8 and sampling.server exclude each other: a server has its own precision")
        if self.sampling.server and self.sampling.temperature != 1.0:
            raise ValueError("sampling.server needs sampling.temperature = 1: servers report log-probs at 1")
        if self.sampling.server and self.lora.full:
            raise ValueError("sampling.server and lora.full exclude each other: a server loads adapters, not weights")
        if not self.feedback.judges and not self.judges:
            raise ValueError("feedback.judges is empty: without a verdict nothing can be learned")
        names = [j.name for j in self.judges]
        if len(set(names)) < len(names):
            raise ValueError("two [[judges]] have the same name")
        if any(j.kind == "discriminator" for j in self.judges) and (self.controller.enabled or not self.update.rounds):
            raise ValueError("a discriminator is only defined against a policy in training: it needs update.rounds")
        u = self.update
        if u.importance in ("mask", "geometric") and u.importance_low >= u.importance_cap:
            raise ValueError(f"update.importance = {u.importance} needs importance_low below importance_cap")
        check_constraints(
            self.constraints, self.judges, [t for t, by in TERMS_OF.items() if by in self.feedback.judges]
        )
        check_tiers(self.tiers, self.weights)
        if self.controller.enabled and (self.constraints or self.tiers):
            raise ValueError("a controller learns from one reward: leave [[constraints]] and [[tiers]] out")
        if not self.update.rounds and (self.constraints or self.tiers):
            raise ValueError("[[constraints]] and [[tiers]] are read by rounds only, and update.rounds is 0")
        self._objective_reads_its_options()
        _ = self.critic_of_credit
        return self

    def _objective_reads_its_options(self) -> None:
        """A key that nothing reads would be believed to do something."""
        name, kind = self.update.objective, OBJECTIVES[self.update.objective]
        given = [key for key, value in self.objective.model_dump().items() if value is not None]
        paired = OBJECTIVES[self.pair_objective].options if self.pairs.file else ()
        # How a round's replies become pairs says nothing of pairs from a file.
        paired = tuple(key for key in paired if not key.startswith("pair"))
        unread = [key for key in given if key not in (*kind.options, *paired)]
        if unread:
            own = ", ".join(f"objective.{key}" for key in kind.options) or "none"
            raise ValueError(f"objective.{unread[0]} is not read by update.objective = {name}, which reads {own}")
        if self.objective.baseline not in (None, *BASELINES.get(name, ())):
            known = ", ".join(BASELINES[name])
            raise ValueError(f"objective.baseline is '{self.objective.baseline}': {name} has {known}")
        if self.objective.decay is not None and self.objective.baseline != "moving":
            raise ValueError("objective.decay is read only with objective.baseline = moving")
        if not kind.clips and self.update.clip != Update.model_fields["clip"].default:
            own = " and ".join(f"objective.{k}" for k in kind.options if k.startswith(("clip", "cap"))) or "nothing"
            raise ValueError(f"update.clip is not read by update.objective = {name}; it clips by {own}")

        if "exo-pair" in (name, self.pair_objective) and self.objective.smoothing == 0.0:
            raise ValueError("objective.smoothing is 0: exo-pair needs a share above 0, or its loss is infinite")
        if kind.family != "gradient" and self.credit != Credit():
            how = "whole replies" if kind.family == "preference" else "marked tokens"
            raise ValueError(f"[credit] is not read by update.objective = {name}, which learns from {how}")
        if name == "ppo" and self.credit.discount < 1.0:
            raise ValueError("credit.discount is not read by update.objective = ppo, whose value head looks ahead")
        if not kind.charges and self.update.kl != Update.model_fields["kl"].default:
            own = "objective.beta" if "beta" in kind.options else "nothing"
            raise ValueError(f"update.kl is not read by update.objective = {name}; {own} holds it to the start")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term in the reward; a judge of [[judges]] whose value is a cost has none."""
        costs = {c.judge for c in self.constraints if not c.reward}
        own = {j.name: 0.0 if j.name in costs else j.weight for j in self.judges}
        return self.rewards.model_dump() | own

    @property
    def critic_of_credit(self) -> str:
        """Name of the judge whose reward credit explains; empty where it explains none."""
        how, critics = self.credit, [j.name for j in self.judges if j.kind == "critic"]
        if not how.explains:
            return ""
        if how.judge and how.judge not in critics:
            raise ValueError(f"credit.judge is '{how.judge}': the critics of [[judges]] are {critics}")
        if not how.judge and len(critics) != 1:
            raise ValueError(
                f"credit.method = {how.method} explains the reward of one critic on the {how.reads} (tutelage critic "
                f"train FILE --features {how.reads}); [[judges]] has {len(critics)} of kind = critic: "
                + ("name one in credit.judge" if critics else "add one")
            )
        return how.judge or critics[0]

    @property
    def pair_objective(self) -> ObjectiveName:
        """What learns from the pairs of a file."""
        rounds = self.update.objective
        return self.pairs.objective or (rounds if rounds in PAIR_OBJECTIVES else "dpo")

    @property
    def hash(self) -> str:
        """Content hash of the resolved recipe."""
        return content_hash(self.model_dump(mode="json"))

    def to_toml(self) -> str:
        """The resolved recipe as TOML, with every default spelled out."""
        return tomlkit.dumps(_without_none(self.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def data_file(name: str, *, suffix: str) -> Path:
    """Path of a file of the package, or of the user.

    `builtin:honesty-train` with suffix `questions/.jsonl` style folders is resolved by the caller's
    `suffix`, for example ``("questions/", ".jsonl")`` joined as ``"questions/*.jsonl"``.
    """
    if not name.startswith("builtin:"):
        return Path(name).expanduser()
    folder = importlib.resources.files("tutelage") / "data"
    path = Path(str(folder)) / suffix.replace("*", name.removeprefix("builtin:"))
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*" + path.suffix))
        raise RecipeError(
            f"there is no built-in file '{name}'",
            expected=", ".join(f"builtin:{k}" for k in known) or "a path",
            fix="check the spelling, or give a path",
        )
    return path


def builtin_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    folder = Path(str(importlib.resources.files("tutelage") / "data" / "recipes"))
    return {p.stem: p for p in sorted(folder.glob("*.toml"))}


def load_recipe(source: str | Path, overrides: Sequence[str] = (), **known: str | None) -> Recipe:
    """Read a recipe by file or built-in name and apply `key=value` overrides.

    Args:
        source: A TOML file, or the name of a built-in recipe.
        overrides: Dotted assignments such as ``update.rounds=2``; values are TOML.
        known: `model`, `prompts` and `constitution` as given on the command line, or None.

    Raises:
        RecipeError: Missing file, broken TOML, unknown key, wrong type or senseless combination.
    """
    data = _read(source)
    shortcuts = {
        "model": ("model", "name"),
        "prompts": ("prompts", "train"),
        "constitution": ("feedback", "constitution"),
    }
    for key, value in known.items():
        if value is not None:
            section, field = shortcuts[key]
            if not isinstance(data.setdefault(section, {}), dict):
                raise RecipeError(
                    f"'{section}' in {source} is no section", expected=f"[{section}] with {known_keys_hint(section)}"
                )
            data[section][field] = value
    for text in overrides:
        _assign(data, text)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _explain(error, str(source)) from error


def _read(source: str | Path) -> dict[str, Any]:
    builtin = builtin_recipes()
    path = builtin.get(str(source), Path(source).expanduser())
    if not path.is_file():
        near = difflib.get_close_matches(str(source), builtin, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "check the path"
        raise RecipeError(
            f"there is no recipe file or built-in recipe '{source}'",
            expected="a .toml file, or one of: " + ", ".join(builtin),
            fix=hint,
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 text (byte {error.start})", expected="UTF-8", fix="save the file as UTF-8"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}", expected="TOML", fix="mend that line") from error
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read: {error.strerror}",
            expected="a readable file",
            fix="check its permissions",
        ) from error


def _assign(data: dict[str, Any], text: str) -> None:
    key, sign, raw = text.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"'{text}' is not an assignment", expected="key=value", fix="for example update.rounds=2")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw  # a bare word is a string: quoting it in a shell is a nuisance
    node = data
    *path, last = key.strip().split(".")
    for part in path:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise RecipeError(f"'{key}' goes below '{part}', which is no section", expected=known_keys_hint(part))
        node = child
    node[last] = value


def known_keys_hint(section: str) -> str:
    """The keys of a section, for messages."""
    field = Recipe.model_fields.get(section)
    kind = field.annotation if field else None
    names: Iterable[str] = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else ()
    return ", ".join(f"{section}.{name}" for name in names) or ", ".join(Recipe.model_fields)


def all_keys() -> Mapping[str, Any]:
    """Every dotted key of a recipe with its default."""
    found: dict[str, Any] = {}
    for name, value in Recipe().model_dump().items():
        if isinstance(value, dict):
            found.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            found[name] = value
    return found


def _explain(error: ValidationError, source: str) -> RecipeError:
    """The first complaint of pydantic, in our words, with the nearest known key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        names = [*all_keys(), *Recipe.model_fields]
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.4)
        last = key.rsplit(".", 1)[-1]
        near = near or [n for n in names if n.rsplit(".", 1)[-1] == last][:1]
        return RecipeError(
            f"unknown key '{key}' in {source}{more}",
            expected=known_keys_hint(key.split(".")[0]),
            fix=f"did you mean '{near[0]}'?" if near else "remove it",
        )
    got = first.get("input")
    shown = "" if isinstance(got, dict) else f", got {got!r}"
    return RecipeError(
        f"'{key or 'recipe'}' in {source}: {first['msg']}{shown}{more}",
        expected="see `tutelage validate --help` or the recipe's documentation",
        fix=f"change {key}" if key else "change the recipe",
    )
