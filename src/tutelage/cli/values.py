"""Commands that find out what somebody values, by asking as little as possible."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from tutelage.cli.parameters import Json, Newest, RecipeName, Runs, Values, app, help_, show
from tutelage.errors import InputError

__all__ = ["ask", "candidates", "learn", "recipe_", "show_", "values"]

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
        Literal["bald", "evoi", "random"],
        help_(
            "the question that tells most about the values (bald), that betters most which replies are picked, or any"
        ),
    ] = "bald",
    cost: Annotated[float, help_("of a question, with evoi: none is asked that betters a prompt's pick by less")] = 0.0,
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
        tutelage values ask candidates.jsonl --out ada.json --annotator ada --choose evoi --cost 0.002
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
    rules: dict[str, Any] = {"questions": questions, "how": choose, "cost": cost, "prior": prior, "seed": seed}
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
            kept=asker.keep, aside=as_json,
        )  # fmt: skip
    found = application.show(out)
    body = {"file": str(out), "session": told, "pairs": len(bank.tasks), "left_out": bank.left_out, **found}
    if asker.gain is not None:
        body["gain"] = asker.gain
    enough = cost and asker.gain is not None and asker.gain <= cost
    stop = [f"no question is worth asking: the best betters a prompt's pick by {asker.gain:.2g}"] if enough else []
    show(body, as_json, lambda: [*stop, *_lines(found, out)])
    return 0


@values.command
def learn(
    candidates: Annotated[
        Path, help_('JSONL of replies with their scores, and "chosen": the place of the best, from 0')
    ],
    *,
    out: Annotated[Path, help_("file for what is found")],
    annotator: Annotated[str, help_("whose choices these are")],
    prior: Annotated[float, help_("how far weights may be from 0 before anything is known")] = 1.0,
    as_json: Json = False,
) -> int:
    """Learn what somebody values from choices that are there already, by maximum entropy, asking nothing.

    Each choice is held against what the others foretell. `tutelage values ask` with the same files goes on from here.

    Examples to type:
        tutelage values learn chosen.jsonl --out ada.json --annotator ada
    """
    from tutelage.applications import values as application

    bank = application.read_bank(candidates)
    application.learn(bank, out, annotator=annotator, prior=prior)
    found, told = application.show(out), application.foretold(bank, prior=prior)
    body = {"file": str(out), "choices": len(bank.choices), "left_out": bank.choiceless, "foretold": told, **found}
    known = [
        f"  {one['right']:.0%} of {one['choices']} choices are foretold by the others; by guessing {one['chance']:.0%}"
        for one in ([told] if told else [])
    ]
    show(body, as_json, lambda: [*_lines(found, out), *known])
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
