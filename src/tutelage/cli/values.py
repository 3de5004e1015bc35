"""Commands that find out what somebody values, by asking as little as possible."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from tutelage.cli.parameters import Json, Newest, RecipeName, Runs, Values, app, help_, show
from tutelage.errors import InputError

__all__ = ["ask", "candidates", "recipe_", "show_", "values"]

values = App(name="values", help="What somebody values: ask about pairs of replies, few and telling ones.")
app.command(values)

Found = Annotated[Path, help_("file that `tutelage values ask` wrote")]


@values.command
def ask(
    candidates: Annotated[Path, help_("JSONL of replies with their scores")],
    *,
    out: Annotated[Path, help_("file for what is found; answers go beside it, and an old one is gone on with")],
    annotator: Annotated[str | None, help_("the person who answers, in this terminal")] = None,
    judge: Annotated[
        str | None, Parameter(name="--judge", help="a judge that answers instead: [KIND=]MODEL or package.module:name")
    ] = None,
    questions: Annotated[int, help_("how many in all, with those of earlier sessions")] = 30,
    choose: Annotated[
        Literal["bald", "random"], help_("the question that tells most about the values, or any, to compare with")
    ] = "bald",
    prior: Annotated[float, help_("how far weights may be from 0 before anything is known")] = 1.0,
    constitution: Values = None,
    seed: Annotated[int, help_("of orders")] = 0,
    as_json: Json = False,
) -> int:
    """Ask a person or a judge which of two replies is better, and learn from each answer what to ask next.

    Lines of the file: {"prompt": "...", "candidates": ["...", "..."], "features": [{"honesty": 0.9}, {"honesty":
    0.2}]}; `tutelage values candidates` writes them from a run. Blind, in random order; ctrl-c loses nothing.

    Examples to type:
        tutelage values ask candidates.jsonl --out ada.json --annotator ada
        tutelage values ask candidates.jsonl --out judge.json --judge judge.gguf --questions 100
    """
    from tutelage.applications import values as application
    from tutelage.studio.console import choose_progress

    if (annotator is None) == (judge is None):
        raise InputError(
            "both a person and a judge were named" if judge else "nobody was named to answer",
            expected="either --annotator NAME or --judge SPEC",
            fix="say who answers",
        )
    bank = application.read_bank(candidates, seed=seed)
    rules: dict[str, Any] = {"questions": questions, "how": choose, "prior": prior, "seed": seed}
    if judge is not None:
        with choose_progress(as_json=as_json) as progress:
            opened = application.open_one(judge, constitution=constitution, progress=progress)
            asker = application.Asker(bank, out, annotator=application.named(opened), **rules)
            told = application.ask_judge(asker, opened, progress)
    else:
        from tutelage.studio.labelling import hold

        asker = application.Asker(bank, out, annotator=str(annotator), **rules)
        asker.keep(asker.answered())
        told = hold(
            bank.tasks, asker.labels, annotator=str(annotator), seed=seed, choose=asker.next, goal=asker.questions,
            kept=asker.keep,
        )  # fmt: skip
    found = application.show(out)
    body = {"file": str(out), "session": told, "pairs": len(bank.tasks), "left_out": bank.left_out, **found}
    show(body, as_json, lambda: _lines(found, out))
    return 0


def _lines(found: dict[str, Any], path: Path) -> list[str]:
    return ["", f"{path}: what {found['annotator']} values", *(f"  {line}" for line in found["words"])]


@values.command(name="show")
def show_(
    file: Found, *, level: Annotated[float, help_("how sure the intervals are")] = 0.9, as_json: Json = False
) -> int:
    """Say what is believed of the values: mean weights, intervals, and how many answers they rest on.

    Examples to type:
        tutelage values show ada.json
    """
    from tutelage.applications.values import show as shown

    found = shown(file, level=level)
    show(found, as_json, lambda: _lines(found, file))
    return 0


@values.command(name="recipe")
def recipe_(
    file: Found,
    *,
    out: Annotated[Path, help_("recipe to write")],
    recipe: RecipeName = "honesty",
    as_json: Json = False,
) -> int:
    """Write a recipe whose reward terms and judges weigh what was found.

    Examples to type:
        tutelage values recipe ada.json --out ada.toml
        tutelage values recipe ada.json --recipe mine.toml --out ada.toml
    """
    from tutelage.applications.values import write_recipe

    found = write_recipe(file, out, recipe=recipe)
    lines = [f"{out}: play it with tutelage run {out}"]
    for name, weight in found["weights"].items():
        doubt = "; less of it is better, which a recipe cannot say" if name in found["disliked"] else ""
        doubt += "; it is not clear which way" if name in found["unclear"] else ""
        lines.append(f"  {name:<24}{weight:.4f}{doubt}")
    show(found, as_json, lambda: lines)
    return 0


@values.command(name="candidates")
def candidates(
    name: Newest = None,
    *,
    out: Annotated[Path, help_("file to write")],
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Write a run's replies with the terms of their rewards, to ask about.

    Examples to type:
        tutelage values candidates honesty-1 --out candidates.jsonl
    """
    from tutelage.applications.values import candidates_of_run
    from tutelage.loop.versions import open_run

    found = candidates_of_run(open_run(name, runs), out)
    shown = f"{found['replies']} replies to {found['prompts']} prompts, scored by {', '.join(found['values'])}"
    show(found, as_json, lambda: [f"{out}: {shown}"])
    return 0
