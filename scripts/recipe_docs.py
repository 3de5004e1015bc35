"""Write docs/recipe.md and recipes/honesty.toml from the recipe's definition in tutelage.config.

    python scripts/recipe_docs.py           write both files
    python scripts/recipe_docs.py --check   exit 1, naming the files, if one of them is not current

Keys, defaults, bounds and meanings come from `Recipe`, so that neither file can say anything else than
the code does. The tests fail until this script has been run after a change of the recipe.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit

from tutelage.config import Recipe, load_recipe

__all__ = ["commented_recipe", "files", "main", "reference"]

ROOT = Path(__file__).resolve().parent.parent

# What a table of keys cannot say. By section; a section that does not exist is refused.
_NOTES: Mapping[str, str] = {
    "model": "What can be loaded is said in [Getting started](getting-started.md#your-own-model).",
    "prompts": (
        "Anything else is a path. The formats are in [Getting started](getting-started.md#your-own-prompts), "
        "the built-in files in [Questions](questions.md)."
    ),
    "sampling": (
        "The rounds draw from the whole tempered distribution, so that the sampler's log-probabilities are those "
        "the update works with."
    ),
    "feedback": "See [Judges](judges.md) and [Constitution](constitution.md).",
    "rewards": (
        "See [Rewards](rewards.md). A weight of 0 takes a term out. `text` alone does not train: a reply without "
        "any of the other three terms has no reward."
    ),
    "constraint": "See [Constraint](constraint.md).",
    "credit": "See [Credit](credit.md). With `last`, `beta` has no effect.",
    "lora": "Why A starts where the critic looks is said in [a design note](../design/002-critic-aligned-adapter.md).",
    "supervised": "See [Supervised](objectives/supervised.md).",
    "demonstrations": "See [Demonstrations](demonstrations.md). Without a `file` there is no such stage.",
    "pairs": "See [Pairs from a file](pairs.md).",
    "update": "See [Policy gradient](policy-gradient.md): every objective, its advantage and its page.",
    "objective": "Which objective reads which key: [Policy gradient](policy-gradient.md#objectives).",
    "controller": (
        "See [Controller](controller.md). While it is on, the sections `constraint`, `credit`, `lora`, `supervised` "
        "and `update` teach nothing."
    ),
    "gate": "See [Gate](gate.md).",
    "limits": (
        "`seconds` is looked at before each unit of work, so a run may go over it by one unit. `memory_gb` changes "
        "nothing but a warning of `tutelage validate`."
    ),
}

# Where sections that may stand any number of times are explained.
_LISTS: Mapping[str, str] = {
    "judges": "[Judges](judges.md)",
    "constraints": "[Costs of your own](constraint.md#costs-of-your-own)",
    "tiers": "[Tiers](constraint.md#tiers)",
}

_INTRODUCTION = """\
# The recipe: every key, its default and its meaning

<!-- Written by scripts/recipe_docs.py from tutelage.config.Recipe. Change that, then run the script. -->

A recipe is the one file that says what a run does. It is TOML. A key that is left out has its default, and an
unknown key is an error that names the nearest known one. The same keys can be set on the command line:

```sh
tutelage run honesty --set update.rounds=2 --set credit.method=uniform
tutelage validate my-recipe.toml --set seed=7
```

`tutelage validate --json` prints the resolved recipe under `keys`. A run keeps its own in `recipe.toml`.

A recipe may be as short as this:

```toml
name = "mine"
seed = 7

[prompts]
train = "my-questions.jsonl"

[update]
rounds = 2
```

`recipes/` holds [the built-in recipe in full](../recipes/honesty.toml) and variants of it, among them
[RLOO instead of GRPO](../recipes/rloo.toml), [PPO](../recipes/ppo.toml), [DAPO](../recipes/dapo.toml) and
[uniform credit](../recipes/uniform-credit.toml).
"""


def _sections() -> Iterator[tuple[str, str, list[tuple[str, Mapping[str, Any]]]]]:
    """(section, its docstring, its (key, JSON schema) pairs); the first section, "", is the top level."""
    schema = Recipe.model_json_schema()
    inner = {k: v for k, v in schema["properties"].items() if "$ref" in v}
    listed = {k for k, v in schema["properties"].items() if "$ref" in v.get("items", {})}
    top = [(k, v) for k, v in schema["properties"].items() if k not in inner and k not in listed]
    yield "", str(schema["description"]), top
    for name, link in inner.items():
        section = schema["$defs"][link["$ref"].rpartition("/")[2]]
        yield name, str(section["description"]), list(section["properties"].items())


def _lists() -> Iterator[tuple[str, str, list[tuple[str, Mapping[str, Any]]]]]:
    """The same of what may stand any number of times: [[judges]]."""
    schema = Recipe.model_json_schema()
    for name, field in schema["properties"].items():
        link = field.get("items", {}).get("$ref")
        if link:
            one = schema["$defs"][link.rpartition("/")[2]]
            yield name, str(one["description"]), list(one["properties"].items())


def _allowed(field: Mapping[str, Any]) -> str:
    """Accepted values in words, from a field's JSON schema."""
    if "anyOf" in field:
        kinds = [k for k in field["anyOf"] if k.get("type") != "null"]
        return " or ".join(_allowed(k) for k in kinds) + ", or left out"
    if "enum" in field:
        return "one of " + ", ".join(field["enum"])
    kind = field.get("type")
    if kind == "array":
        return "list; " + _allowed(field["items"]).replace("one of", "any of")
    if kind == "boolean":
        return "true or false"
    if kind == "string":
        return "text"
    low, above = field.get("minimum"), field.get("exclusiveMinimum")
    high, below = field.get("maximum"), field.get("exclusiveMaximum")
    bounds = [
        *([f"at least {low:g}"] if low is not None else [f"above {above:g}"] if above is not None else []),
        *([f"at most {high:g}"] if high is not None else [f"below {below:g}"] if below is not None else []),
    ]
    return ", ".join([{"integer": "whole number"}.get(str(kind), "number"), *bounds])


def _toml(value: Any) -> str:
    return str(tomlkit.item(list(value) if isinstance(value, tuple) else value).as_string())


def _default(key: str, recipe: Recipe) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def reference() -> str:
    """The text of docs/recipe.md."""
    parts, defaults = [_INTRODUCTION], Recipe()
    unknown = set(_NOTES) - {name for name, _, _ in _sections()}
    if unknown:
        raise KeyError(f"notes on sections that no recipe has: {', '.join(sorted(unknown))}")
    for section, about, fields in _sections():
        parts.append(f"## `[{section}]`\n" if section else "## Top level\n")
        parts.append(f"{about}\n")
        if section in _NOTES:
            parts.append(f"{_NOTES[section]}\n")
        rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
        for key, field in fields:
            value = _default(f"{section}.{key}" if section else key, defaults)
            shown = "not set" if value is None else f"`{_toml(value)}`"
            rows.append(f"| `{key}` | {shown} | {_allowed(field)} | {field['description']} |")
        parts.append("\n".join(rows) + "\n")
    for name, about, fields in _lists():
        parts.append(f"## `[[{name}]]`\n\n{about}\n\nAny number of them; none is the default. See {_LISTS[name]}.\n")
        rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
        for key, field in fields:
            value = field.get("default")
            shown = "must be given" if "default" not in field else "not set" if value is None else f"`{_toml(value)}`"
            rows.append(f"| `{key}` | {shown} | {_allowed(field)} | {field['description']} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def commented_recipe() -> str:
    """The text of recipes/honesty.toml: the built-in recipe with every key, its meaning and its bounds."""
    recipe = load_recipe("honesty")
    lines = [
        "# The built-in recipe with every key spelled out; it loads equal to `tutelage run honesty`.",
        "# Copy it and change what you need: what you leave out keeps its default.",
        "# Written by scripts/recipe_docs.py; docs/recipe.md has the same keys with links.",
    ]
    for section, about, fields in _sections():
        lines += ["", f"# {about.splitlines()[0]}", f"[{section}]"] if section else [""]
        for key, field in fields:
            value = _default(f"{section}.{key}" if section else key, recipe)
            lines.append(f"# {field['description']} ({_allowed(field)})")
            lines.append(f"# {key} is not set" if value is None else f"{key} = {_toml(value)}")
    for name, about, _ in _lists():
        lines += [
            "",
            f"# {about.splitlines()[0]}",
            f"# [[{name}]] may stand here any number of times; docs/recipe.md has its keys",
        ]
    return "\n".join(lines) + "\n"


def files() -> dict[str, str]:
    """What the script writes: text by path within the repository."""
    return {"docs/recipe.md": reference(), "recipes/honesty.toml": commented_recipe()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, or check them; returns the exit code."""
    parser = argparse.ArgumentParser(description="docs/recipe.md and recipes/honesty.toml from the recipe's definition")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is old")
    parser.add_argument("--folder", type=Path, default=ROOT, help="the repository")
    options = parser.parse_args(arguments)
    stale = []
    for name, text in files().items():
        path: Path = options.folder / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
    for name in stale:
        print(f"{name} is not current; run: python scripts/recipe_docs.py" if options.check else f"{name} written")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
