"""The documentation is checked like code: nothing in it may be stale, broken, or more than the code does."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import json
import re
import shlex
import shutil
import sqlite3
import tomllib
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cyclopts import CycloptsError

import tutelage
from tutelage.cli import app
from tutelage.config import (
    CostConstraint,
    Credit,
    Feedback,
    Judge,
    Recipe,
    Tier,
    Update,
    all_keys,
    data_file,
    load_recipe,
)
from tutelage.errors import InputError, RecipeError, TutelageError
from tutelage.feedback.constitution import load_constitution
from tutelage.loop.evaluate import METRICS, share
from tutelage.loop.outcomes import outcome
from tutelage.records import Message, Prompt, SuiteItem
from tutelage.store.ledger import Ledger
from tutelage.store.prompts import read_prompts, read_suite

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
READMES = (ROOT / "README.md", ROOT / "README.zh.md")
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "design").glob("*.md")])
FENCE = re.compile(r"^(?P<mark>`{3,}) *(?P<lang>[\w-]*)[^\n]*\n(?P<body>.*?)^(?P=mark) *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+(?:\([^()\s]*\))?)\)")


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(source: str, *languages: str) -> list[str]:
    """Fenced blocks in one of the languages."""
    return [m["body"] for m in FENCE.finditer(source) if m["lang"] in languages]


def prose(source: str) -> str:
    """Everything but the fenced blocks."""
    return FENCE.sub("", source)


def cases(*languages: str) -> list[Any]:
    """Every such block of every page, named after its page and number."""
    found = [(page, n, body) for page in PAGES for n, body in enumerate(blocks(text(page), *languages), 1)]
    assert found, f"no page has a block in {languages}"
    return [pytest.param(body, id=f"{label(page)}-{n}") for page, n, body in found]


# -- links ------------------------------------------------------------------------------------------


def anchor(heading: str) -> str:
    """The name that Markdown viewers give a heading: links as their text, no punctuation, hyphens."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(source: str) -> set[str]:
    return {anchor(m[1]) for m in re.finditer(r"^#{1,6} +(.+?)(?: +#+)?$", prose(source), re.MULTILINE)}


def internal_links(source: str) -> list[str]:
    """Targets of links and pictures within the repository."""
    outside = re.compile(r"[a-z][a-z+.-]*:|//", re.IGNORECASE)
    without_code = re.sub(r"`[^`\n]*`", "", prose(source))
    return [link for link in LINK.findall(without_code) if not outside.match(link)]


def broken(page: Path, source: str) -> list[str]:
    found = []
    for link in internal_links(source):
        name, _, place = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if name and not target.exists():
            found.append(f"{link}: no such file")
        elif place and place not in anchors(text(target) if name else source):
            found.append(f"{link}: no such heading")
    return found


def test_broken_links_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    (tmp_path / "b.md").write_text("# One `two`: three\n```sh\n# no heading\n```\n", encoding="utf-8")
    good = "[x](b.md#one-two-three) ![y](b.md) [z](https://a.org/b) `[no](link)`\n\n## Here\n[w](#here)\n"
    assert broken(page, good) == []
    assert broken(page, good + "[x](c.md)") == ["c.md: no such file"]
    assert broken(page, good + "[x](b.md#no-heading)") == ["b.md#no-heading: no such heading"]
    assert broken(page, good + "![x](p.png) [y](#there)") == ["p.png: no such file", "#there: no such heading"]


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_internal_links_resolve(page: Path) -> None:
    assert broken(page, text(page)) == []


def test_the_index_lists_every_page() -> None:
    index = DOCS / "index.md"
    listed = {(DOCS / link.partition("#")[0]).resolve() for link in internal_links(text(index))}
    wanted = {p for p in PAGES if p.is_relative_to(DOCS) or (p.parent.name == "design" and p.name[0].isdigit())}
    assert sorted(label(p) for p in wanted - listed - {index}) == []


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_pages_begin_with_one_title(page: Path) -> None:
    titles = re.findall(r"^# .+", prose(text(page)), re.MULTILINE)
    assert len(titles) == 1
    assert text(page).startswith("# ")


# -- blocks of code ---------------------------------------------------------------------------------


def read_toml(body: str, folder: Path) -> None:
    """Load a block as what it is: a constitution or a recipe."""
    path = folder / "block.toml"
    path.write_text(body, encoding="utf-8")
    if "principles" in tomllib.loads(body):
        load_constitution(path)
    else:
        load_recipe(path)


def test_wrong_toml_is_seen(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"update\.round"):
        read_toml("[update]\nround = 2\n", tmp_path)
    with pytest.raises(InputError, match="lacks 'text'"):
        read_toml('[[principles]]\nid = "a"\nscope = "any"\n', tmp_path)


@pytest.mark.parametrize("body", cases("toml"))
def test_toml_blocks_are_recipes_or_constitutions(body: str, tmp_path: Path) -> None:
    read_toml(body, tmp_path)


@pytest.mark.parametrize("body", cases("jsonl"))
def test_jsonl_blocks_can_be_read(body: str, tmp_path: Path) -> None:
    path = tmp_path / "block.jsonl"
    path.write_text(body, encoding="utf-8")
    assert len(read_prompts(path)) == len(body.splitlines())
    if '"kind"' in body:
        assert len(read_suite(path)) == len(body.splitlines())


def wrong_calls(source: str) -> list[str]:
    """Imports of the package that fail, and calls of its functions with arguments they do not take."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tutelage"):
            module = importlib.import_module(str(node.module))
            found += [f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)]
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if getattr(node.func.value, "id", "") != "tutelage":
            continue
        function = getattr(tutelage, node.func.attr, None)
        if function is None:
            found.append(f"tutelage.{node.func.attr}")
            continue
        given = {k.arg: None for k in node.keywords if k.arg}
        try:
            inspect.signature(function).bind(*node.args, **given)
        except TypeError as error:
            found.append(f"tutelage.{node.func.attr}: {error}")
    return found


def test_wrong_calls_are_seen() -> None:
    assert wrong_calls("import tutelage\ntutelage.run('honesty', name='a')") == []
    assert wrong_calls("import tutelage\ntutelage.runn()") == ["tutelage.runn"]
    assert len(wrong_calls("import tutelage\ntutelage.run(rounds=2)\ntutelage.evaluate('a')")) == 2
    assert wrong_calls("from tutelage.config import load_recipes") == ["tutelage.config.load_recipes"]


@pytest.mark.parametrize("body", cases("python"))
def test_python_blocks_compile_and_call_what_there_is(body: str) -> None:
    compile(body, "block", "exec")
    assert wrong_calls(body) == []


def fields_of(module: Path, name: str) -> set[str]:
    """Annotated names of a class, read and not imported: some modules bring torch, which takes seconds."""
    classes = [n for n in ast.walk(ast.parse(text(module))) if isinstance(n, ast.ClassDef) and n.name == name]
    assert classes, f"{module} has no class {name}"
    return {n.target.id for n in classes[0].body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def test_attributes_named_on_the_python_page_exist() -> None:
    package = Path(tutelage.__file__).parent
    shown = {
        "result": fields_of(package / "loop" / "improve.py", "Result"),
        "measured": fields_of(package / "api.py", "Measured"),
        "error": set(vars(TutelageError("a", expected="b", fix="c"))) | {"exit_code"},
    }
    source = "\n".join(blocks(text(DOCS / "python.md"), "python"))
    for variable, known in shown.items():
        named = set(re.findall(rf"\b{variable}\.(\w+)", source))
        assert named and named <= known, variable


# -- commands ---------------------------------------------------------------------------------------


def commands(source: str) -> Iterator[list[str]]:
    """Words of each `tutelage ...` in shell blocks and in inline code."""
    for body in blocks(source, "sh", "bash", "console"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and words[0].rpartition("/")[2] == "tutelage":
                yield words[1:]
    for code in re.findall(r"`tutelage( [^`\n]*)?`", prose(source)):
        yield shlex.split(code)


def parse(words: list[str]) -> None:
    """Let the command line's own parser read them. A command's bare name need not have its arguments."""
    if len(words) == 1 and words[0] in set(app):
        return
    app.parse_args(words, exit_on_error=False, print_error=False)
    load_recipe("honesty", [b for a, b in itertools.pairwise(words) if a == "--set"])


def test_commands_are_found_and_wrong_ones_seen() -> None:
    source = "`tutelage run --name a`\n```sh\n.venv/bin/tutelage runs # all\n$ tutelage fetch\nmake x\n```\n"
    assert list(commands(source)) == [["runs"], ["fetch"], ["run", "--name", "a"]]
    for wrong in (["walk"], ["run", "--round", "2"], ["evaluate", "a", "--limit", "3"], ["export", "a"]):
        with pytest.raises(CycloptsError):
            parse(wrong)
    with pytest.raises(RecipeError):
        parse(["run", "--set", "update.round=2"])


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_commands_parse(page: Path) -> None:
    for words in commands(text(page)):
        parse(words)


def test_recipes_named_in_commands_exist() -> None:
    named = {w for page in PAGES for words in commands(text(page)) for w in words if w.startswith("recipes/")}
    assert {"recipes/rloo.toml", "recipes/uniform-credit.toml"} <= named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_make_targets_named_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", text(ROOT / "Makefile"), re.MULTILINE))
    named = {t for page in PAGES for t in re.findall(r"(?:^ *|`)make ([a-z]+)", text(page), re.MULTILINE)}
    assert {"demo", "test"} <= named <= targets


# -- generated files and recipes --------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_docs", ROOT / "scripts" / "recipe_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_files_are_current(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails after a wanted change of the recipe: python scripts/recipe_docs.py."""
    assert script.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", ["docs/recipe.md", "recipes/honesty.toml"])
def test_a_stale_file_is_noticed_and_writing_settles_it(name: str, script: ModuleType, tmp_path: Path) -> None:
    folder = ["--folder", str(tmp_path)]
    assert script.main([*folder, "--check"]) == 1, "a missing file is not current"
    assert script.main(folder) == 0
    assert script.main([*folder, "--check"]) == 0
    (tmp_path / name).write_text(text(tmp_path / name).replace("0.2", "0.3", 1), encoding="utf-8")
    assert script.main([*folder, "--check"]) == 1
    shutil.rmtree(tmp_path / "docs")
    assert script.main(folder) == 0
    assert script.main([*folder, "--check"]) == 0


LISTS = ("judges", "constraints", "tiers")


def test_the_recipe_page_has_every_key_with_its_default() -> None:
    page = text(DOCS / "recipe.md")
    sections = dict(zip(*[iter(re.split(r"^## (.+)$", page, flags=re.MULTILINE)[1:])] * 2, strict=True))
    assert {f"`[[{name}]]`" for name in LISTS} < set(sections)  # tables of their own, and none by default
    for key, default in all_keys().items():
        if key in LISTS:
            continue
        section, _, name = key.rpartition(".")
        row = re.search(rf"^\| `{name}` \| (.+?) \|", sections[f"`[{section}]`" if section else "Top level"], re.M)
        assert row, f"{key} is not on the page"
        shown = None if row[1] == "not set" else tomllib.loads(f"v = {row[1].strip('`')}")["v"]
        assert shown == (list(default) if isinstance(default, tuple) else default)


def test_the_commented_recipe_is_the_built_in_one_with_all_keys() -> None:
    path = ROOT / "recipes" / "honesty.toml"
    assert load_recipe(path) == load_recipe("honesty")
    assert load_recipe(path).hash == load_recipe("honesty").hash
    data = tomllib.loads(text(path))
    for key, default in all_keys().items():
        if key in LISTS:  # an empty list here would forbid [[judges]] further down
            continue
        section, _, name = key.rpartition(".")
        assert default is None or name in (data[section] if section else data), key
        assert f"\n{name} = " in text(path) or f"\n# {name} is not set" in text(path)


VARIANTS: dict[str, dict[str, Any]] = {
    "demonstrations": {
        "supervised.enabled": False,
        "demonstrations.file": "my-replies.jsonl",
        "demonstrations.weight": 0.003,
        "update.rounds": 0,
    },
    "imitation": {
        "feedback.judges": ("text",),
        "judges": (Judge(name="plain", kind="discriminator", demonstrations="builtin:plain").model_dump(),),
        "constraint.enabled": False,
        "lora.start": "random",
        "supervised.enabled": False,
        "update.rounds": 8,
        "update.learning_rate": 0.001,
    },
    "two-costs": {
        "rewards.text": 0.0,
        "judges": (Judge(name="given", kind="tutelage.feedback.rules:figures_given").model_dump(),),
        "constraints": (
            CostConstraint(name="figures", judge="given", limit=0.1).model_dump(),
            CostConstraint(name="form", judge="text", per="prompt", threshold=0.2, limit=0.05).model_dump(),
        ),
    },
    "tiers": {
        "tiers": (
            Tier(terms=("fit", "principles"), target=0.5, tolerance=0.1).model_dump(),
            Tier(terms=("consistency", "text")).model_dump(),
        ),
    },
    "rloo": {"update.objective": "rloo"},
    "uniform-credit": {"credit.method": "uniform"},
    "decomposed-credit": {"credit.method": "decomposed", "credit.discount": 0.0, "credit.rest": "spread"},
    "attention-credit": {
        "credit.judge": "liked",
        "credit.discount": 0.0,
        "credit.rest": "spread",
        "judges": (Judge(name="liked", kind="critic", model="liked.safetensors", weight=0.5).model_dump(),),
    },
    "prefix-credit": {
        "credit.method": "prefix",
        "credit.drop_sinks": "first",
        "judges": (Judge(name="liked", kind="critic", model="liked.safetensors", weight=0.5).model_dump(),),
    },
    "reinforce": {"update.objective": "reinforce"},
    "dr-grpo": {"update.objective": "dr-grpo"},
    "dapo": {"update.objective": "dapo", "update.kl": 0.0},
    "reinforce-plus-plus": {"update.objective": "reinforce-plus-plus"},
    "gspo": {"update.objective": "gspo"},
    "cispo-cap": {"update.objective": "cispo-cap"},
    "cispo-clamp": {"update.objective": "cispo-clamp"},
    "ppo": {"update.objective": "ppo"},
    "aot": {"update.objective": "aot", "update.token_budget": 8192},
    "pairs": {
        "supervised.enabled": False,
        "pairs.file": "builtin:pairs",
        "update.rounds": 0,
        "gate.evidence": "pairs",
    },
    "spin": {
        "supervised.enabled": False,
        "pairs.file": "builtin:pairs",
        "update.rounds": 0,
        "gate.evidence": "pairs",
        "pairs.against": "own",
        "pairs.epochs": 2,
        "sampling.max_new_tokens": 64,
    },
    **{
        name: {"update.objective": name}
        for name in (
            "xpo",
            "nash",
            "dpo",
            "robust-dpo",
            "ipo",
            "ipo-per-token",
            "exo-pair",
            "simpo",
            "orpo",
            "kto",
            "unlikelihood",
        )
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_in_what_it_says_and_nothing_else(name: str) -> None:
    changed, base = (load_recipe(r).model_dump() for r in (ROOT / "recipes" / f"{name}.toml", "honesty"))
    found = {}
    for key in all_keys():
        section, _, last = key.rpartition(".")
        mine, theirs = (d[section][last] if section else d[last] for d in (changed, base))
        if mine != theirs and key not in ("name", "title"):
            found[key] = mine
    assert found == VARIANTS[name]
    assert changed["name"] == name


def test_every_recipe_file_is_known_here() -> None:
    assert {p.stem for p in (ROOT / "recipes").glob("*.toml")} == {"honesty", *VARIANTS}


# -- pages that list what the code has --------------------------------------------------------------


def test_every_objective_judge_and_credit_method_has_its_place() -> None:
    objectives = typing.get_args(Update.model_fields["objective"].annotation)
    for name in (*objectives, "supervised"):
        page = "ipo" if name == "ipo-per-token" else name  # two readings of one paper
        assert (DOCS / "objectives" / f"{page}.md").is_file()
    judges = typing.get_args(typing.get_args(Feedback.model_fields["judges"].annotation)[0])
    assert len(judges) == 4
    for judge in judges:
        assert re.search(rf"^\| `{judge}` \|", text(DOCS / "judges.md"), re.MULTILINE)
        assert f"## {judge.capitalize()}\n" in text(DOCS / "judges.md")
    for method in typing.get_args(Credit.model_fields["method"].annotation):
        assert re.search(rf"^\| `{method}` \|", text(DOCS / "credit.md"), re.MULTILINE)


def test_objective_pages_have_all_parts() -> None:
    for page in (DOCS / "objectives").glob("*.md"):
        parts = re.findall(r"^## (.+)$", prose(text(page)), re.MULTILINE)
        wanted = ["Mathematics", "Difference from the nearest neighbour", "Assumption, and what breaks it"]
        assert [p for p in parts if p in (*wanted, "Source", "Recipe")] == [*wanted, "Source", "Recipe"]


def test_recipe_keys_named_in_the_docs_exist() -> None:
    sections = "|".join(name for name in Recipe.model_fields if name not in ("name", "title", "seed"))
    known = {*all_keys(), "recipe.toml", "supervised.md", "update.rounds", "gate.md", "credit.md", "pairs.jsonl"}
    for page in PAGES:
        named = set(re.findall(rf"`((?:{sections})\.[a-z_]+)(?: ?= ?[^`]*)?`", prose(text(page))))
        assert sorted(named - known) == [], label(page)


def test_the_metrics_are_all_defined() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \| .* questions", text(DOCS / "evaluation.md"), re.MULTILINE))
    assert rows == {*METRICS, "abstained_known"}


def test_the_ledgers_tables_and_columns_are_listed(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.db").close()
    db = sqlite3.connect(tmp_path / "ledger.db")
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    real = {t: [row[1] for row in db.execute(f"PRAGMA table_info({t})") if row[1] != "unit"] for t in tables}
    db.close()
    part = text(DOCS / "files.md").partition("## Ledger")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (.+) \|$", part, re.MULTILINE)
    assert {name: re.findall(r"`(\w+)`", columns) for name, columns in rows} == real


def test_exit_codes_are_those_of_the_errors() -> None:
    rows = re.findall(r"^\| (\d+) \|", text(DOCS / "files.md"), re.MULTILINE)
    kinds, waiting = set(), [TutelageError]
    while waiting:
        kind = waiting.pop()
        kinds.add(kind.exit_code)
        waiting += kind.__subclasses__()
    assert sorted(map(int, rows)) == sorted({0, *kinds})


# -- numbers ----------------------------------------------------------------------------------------


def test_the_counts_of_the_data_are_true() -> None:
    page = text(DOCS / "questions.md")
    for name in ("train", "gate", "heldout"):
        items = read_suite(data_file(f"builtin:honesty-{name}", suffix="questions/*.jsonl"))
        kinds, forms = Counter(i.kind for i in items), Counter(i.form for i in items)
        cells = [len(items), kinds["answerable"], kinds["unanswerable"], kinds["ambiguous"]]
        cells += [forms["plain"], forms["malformed"]]
        row = re.search(rf"^\| `questions/honesty-{name}\.jsonl` \|[^|]*\|(.+)\|$", page, re.MULTILINE)
        assert row and [int(c) for c in row[1].split("|")] == cells
    for name in ("questions", "replies"):
        lines = text(data_file(f"builtin:critics/honesty-{name}", suffix="*.jsonl")).splitlines()
        labels = Counter(json.loads(line)["label"] for line in lines)
        row = re.search(rf"^\| `critics/honesty-{name}\.jsonl` \| (\d+) \| (.+) \|$", page, re.MULTILINE)
        assert row and int(row[1]) == len(lines)
        assert {k: int(n) for n, k in re.findall(r"(\d+) (\w+)", row[2])} == labels


def test_the_accuracy_of_the_rules_has_its_intervals() -> None:
    rows = re.findall(
        r"\| (\d+) of (\d+) \| ([\d.]+)% \| ([\d.]+)% to ([\d.]+)% \|", text(DOCS / "evaluation.md")
    )  # fmt: skip
    assert len(rows) == 3
    for hits, n, *shown in rows:
        assert [f"{100 * x:.1f}" for x in share(int(hits), int(n)) if x is not None] == shown
    expected = {"answers": "wrong", "abstains": "abstained", "asks_back": "asked_back"}
    item = SuiteItem(Prompt("q", (Message("user", "?"),)), "unanswerable")
    lines = text(data_file("builtin:critics/honesty-replies", suffix="*.jsonl")).splitlines()
    labelled = [json.loads(line) for line in lines]
    right = sum(outcome(item, row["text"]) == expected[row["label"]] for row in labelled)
    assert (str(right), str(len(labelled))) == rows[0][:2]


# -- the two front pages ----------------------------------------------------------------------------


@pytest.mark.parametrize("page", READMES, ids=label)
def test_the_results_have_their_place(page: Path) -> None:
    lines = text(page).splitlines()
    assert [line for line in lines if "results:" in line] == ["<!-- results:begin -->", "<!-- results:end -->"]


def test_both_front_pages_say_the_same() -> None:
    """As far as a program can tell: the same code, the same links, as many headings and bullets."""
    first, second = (re.sub("<!-- results:begin.*results:end -->", "", text(p), flags=re.DOTALL) for p in READMES)
    for language in ("sh", "toml", "python", "jsonl"):
        assert blocks(first, language) == blocks(second, language)
    links = [sorted(set(internal_links(s)) - {p.name for p in READMES}) for s in (first, second)]
    assert links[0] == links[1]
    for start in ("## ", "- ", "**", "```"):
        counts = [len(re.findall(f"^{re.escape(start)}", s, re.MULTILINE)) for s in (first, second)]
        assert counts[0] == counts[1], start


def test_the_changelog_has_the_version_of_the_package() -> None:
    newest = re.search(r"^## \[([\d.]+)\]", text(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert newest and newest[1] == tutelage.__version__
