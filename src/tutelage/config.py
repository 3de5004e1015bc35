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
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tutelage.errors import RecipeError
from tutelage.records import content_hash

__all__ = [
    "Constraint",
    "Credit",
    "Feedback",
    "Gate",
    "Judge",
    "Limits",
    "Lora",
    "Model",
    "Prompts",
    "Recipe",
    "Rewards",
    "Sampling",
    "Supervised",
    "Update",
    "builtin_recipes",
    "data_file",
    "load_recipe",
]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_yes_for_numbers(cls, data: Any) -> Any:
        """Otherwise pydantic would read `true` as 1."""
        for key, value in data.items() if isinstance(data, dict) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"{key} is {str(value).lower()}, which is no number")
        return data


class Model(_Section):
    """Which model learns."""

    name: str = Field("smollm2-135m-instruct", description="embedded name, directory, GGUF file or hub name")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto takes what the processor has")
    hub: bool = Field(False, description="allow a hub name; needs a network and downloads")


class Prompts(_Section):
    """Where questions come from. `builtin:NAME` is a file of the package."""

    train: str = Field("builtin:honesty-train", description="JSONL, CSV or Parquet of prompts")
    gate: str = Field("builtin:honesty-gate", description="suite the gate looks at")
    heldout: str = Field("builtin:honesty-heldout", description="suite read once, at the end")
    limit: int | None = Field(None, ge=1, description="use only the first N training prompts")
    gate_limit: int | None = Field(None, ge=1, description="use only the first N gate items")
    heldout_limit: int | None = Field(None, ge=1, description="use only the first N held-out items")


class Sampling(_Section):
    """How replies are drawn while learning. Evaluation is always greedy."""

    temperature: Positive = Field(1.0, description="of the policy-gradient rollouts")
    max_new_tokens: Count = Field(24, description="longest reply, in tokens")
    rows: Count = Field(64, description="decoding batch")
    int8: bool = Field(False, description="draw rollouts with weights rounded to 8 bits (Llama family)")
    server: str = Field("", description="URL of a vLLM server that draws the rollouts; empty: this process")

    @property
    def exact(self) -> bool:
        """Whether rollouts are drawn by the very model that learns."""
        return not self.int8 and not self.server


class Feedback(_Section):
    """Who judges, and with what."""

    judges: tuple[Literal["consistency", "critic", "constitution", "text"], ...] = Field(
        ("consistency", "critic", "constitution", "text"), description="judges that give verdicts"
    )
    constitution: str = Field("builtin:honesty", description="TOML file of principles")
    encoder: str = Field("all-minilm-l6-v2", description="sentence encoder: embedded name or directory")
    critic_questions: str = Field("builtin:critics/honesty-questions", description="labelled questions")
    critic_replies: str = Field("builtin:critics/honesty-replies", description="labelled replies")
    same_meaning: Fraction = Field(0.8, description="cosine above which two replies mean the same")
    min_confidence: Fraction = Field(0.4, description="below this belief the critic abstains")
    allow_refused: bool = Field(False, description="train although the only judge failed its check")
    consistency_weight: float = Field(0.15, ge=0.0, description="what consistency adds to the belief, log-odds")


class Judge(_Section):
    """A judge of the user's own, as [[judges]]: a model that is asked, code, or a critic from labelled data."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", description="name of the judge and of its reward term")
    kind: str = Field(
        "pairwise", description="pairwise, pointwise, listwise, critic, or package.module:name of your code"
    )
    model: str = Field("", description="embedded name, directory, GGUF file, MODEL@URL; for a critic its file")
    prompt: str = Field("", description="judge prompt: TOML file; empty takes the built-in one of the kind")
    principles: Literal["none", "whole", "each"] = Field("whole", description="how the constitution is judged by")
    thoughts: int = Field(0, ge=0, le=16, description="reasons written before the verdict, averaged")
    opponents: Count = Field(2, description="pairwise: replies of its group that each reply is compared with")
    rotations: Count = Field(2, description="listwise: orders in which a group is shown")
    weight: Positive = Field(1.0, description="of its term in the reward")

    @model_validator(mode="after")
    def _makes_sense(self) -> Judge:
        if self.name in Rewards.model_fields:
            raise ValueError(f"the name '{self.name}' is that of a built-in reward term")
        if ":" in self.kind:
            if self.model or self.prompt:
                raise ValueError("a judge in code takes neither model nor prompt")
        elif self.kind not in ("pairwise", "pointwise", "listwise", "critic"):
            raise ValueError(f"kind is '{self.kind}': pairwise, pointwise, listwise, critic or package.module:name")
        elif not self.model:
            raise ValueError(f"judge '{self.name}' names no model")
        return self


class Rewards(_Section):
    """Weights of the reward's terms; each term is normalised within its group first."""

    fit: float = Field(1.0, ge=0.0, description="the reply does what the question calls for (critic)")
    principles: float = Field(0.5, ge=0.0, description="principles kept, by weight (constitution)")
    consistency: float = Field(0.2, ge=0.0, description="share of the group that says the same (self-supervision)")
    text: float = Field(0.2, ge=0.0, description="length, repetition and format")


class Constraint(_Section):
    """Keep answerable questions answered: PID-controlled multiplier on over-abstention."""

    enabled: bool = Field(True, description="off is the ablation")
    limit: Fraction = Field(0.1, description="tolerated share of withheld answers where an answer is due")
    kp: float = Field(35.0, ge=0.0, description="proportional gain")
    ki: float = Field(17.5, ge=0.0, description="integral gain")
    kd: float = Field(1.0, ge=0.0, description="derivative gain")
    maximum: Positive = Field(20.0, description="largest multiplier")


class Credit(_Section):
    """How a reply's advantage is spread over its tokens."""

    method: Literal["attention", "uniform", "last"] = Field("attention", description="where credit goes")
    beta: Fraction = Field(0.8, description="share that is spread; the rest stays on the last token")


class Lora(_Section):
    """The adapter."""

    full: bool = Field(
        False, description="train whole matrices instead of factors; rank, alpha, start then say nothing"
    )
    rank: Count = Field(4, description="r")
    alpha: Positive = Field(8.0, description="scale is alpha / rank")
    from_depth: Fraction = Field(0.5, description="layers below this share of the depth are not adapted")
    start: Literal["critic", "random"] = Field("critic", description="A looks where the critic looks, or at random")
    targets: tuple[str, ...] = Field((), description="module names; empty is every linear layer")


class Supervised(_Section):
    """The first stage: learning from kept and revised replies, so that the new behaviour is ever sampled."""

    enabled: bool = Field(True, description="off is the ablation")
    samples: Count = Field(3, description="replies a prompt that are judged")
    temperature: Positive = Field(0.7, description="of those replies")
    top_k: int = Field(0, ge=0, description="of those replies; 0 is off")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="of those replies; 1 is off")
    epochs: Count = Field(1, description="passes over the targets")
    learning_rate: Positive = Field(1e-3, description="peak, after a short warm-up, then linear decay")
    batch: Count = Field(8, description="targets a step")
    anchor: float = Field(5.0, ge=0.0, description="weight of the KL to the start on kept answers; 0 imitates them")


class Update(_Section):
    """The policy-gradient rounds."""

    objective: Literal["grpo", "rloo"] = Field("grpo", description="which advantage and loss")
    rounds: int = Field(2, ge=0, description="rounds after the supervised stage")
    prompts: Count = Field(64, description="prompts a round")
    samples: int = Field(8, ge=2, description="G, replies a prompt")
    batch: Count = Field(16, description="prompts an optimiser step")
    learning_rate: Positive = Field(1.5e-4, description="constant")
    clip: Positive = Field(0.2, description="epsilon of the ratio clip")
    kl: float = Field(0.05, ge=0.0, description="weight of the KL term to the start model")
    importance_cap: Positive = Field(2.0, description="largest importance weight, with sampling.int8 or server")
    max_grad_norm: Positive = Field(1.0, description="gradients are scaled down to this norm")
    token_budget: Count = Field(2048, description="tokens a packed micro-batch holds; bounds memory")


class Gate(_Section):
    """What a candidate must show on the gate suite before it is promoted."""

    enabled: bool = Field(True, description="an absent gate rejects: off means no candidate is promoted")
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = Field(0.95, description="of the paired intervals")
    max_correct_loss: Fraction = Field(0.15, description="correct answers lost must be surely below this")
    max_known_abstained: Fraction = Field(0.1, description="abstaining where the start model was right, at most")


class Limits(_Section):
    """Hard stops."""

    seconds: float | None = Field(None, gt=0, description="stop, resumable, with exit code 5 after this time")
    memory_gb: Positive = Field(4.0, description="validate warns when its estimate is above this")


class Recipe(_Section):
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
    constraint: Constraint = Constraint()
    credit: Credit = Credit()
    lora: Lora = Lora()
    supervised: Supervised = Supervised()
    update: Update = Update()
    gate: Gate = Gate()
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _makes_sense(self) -> Recipe:
        if not self.supervised.enabled and self.update.rounds == 0:
            raise ValueError("nothing would be learned: supervised.enabled is false and update.rounds is 0")
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
        return self

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
    return value


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
