"""Commands around modules, one adapter a trait: show, mix, isolate, swap, extend, decode with several."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from tutelage.cli.parameters import MODEL_HELP, Json, Longest, Runs, app, help_, show

if TYPE_CHECKING:
    from tutelage.applications.decoding import Decoding

__all__ = ["decode", "extend", "isolate", "mix", "modules", "show_", "swap"]

modules = App(name="modules", help="One adapter a trait: show, mix, isolate, swap, extend, decode with several.")
app.command(modules)

Place = Annotated[str, help_("[NAME=]adapter folder, RUN or RUN@VERSION")]
Mix = Annotated[str, help_("mix: folder that `tutelage modules mix` wrote")]
Out = Annotated[Path, help_("new adapter folder")]
Weight = Annotated[float, help_("factor on it")]


@modules.command(name="show")
def show_(
    adapter: Place,
    /,
    *others: Place,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Norms by layer, and the cosines between adapters: which traits pull against each other.

    Examples to type:
        tutelage modules show short questions
        tutelage modules show mixed --json
    """
    from tutelage.applications.modules import show as shown

    found = shown([adapter, *others], runs=runs)
    show(found, as_json, lambda: _shown_lines(found))
    return 0


def _shown_lines(found: dict[str, Any]) -> list[str]:
    rows = found["adapters"]
    names = [r["name"] for r in rows]
    wide = max(12, *(len(n) + 2 for n in names))
    lines = [f"{'adapter':<{wide}}{'rank':>6}{'layers':>8}{'norm':>12}"]
    for r in rows:
        lines.append(f"{r['name']:<{wide}}{r['rank']:>6}{r['layers']:>8}{r['norm']:>12.4g}")
        if r["mix"]:
            lines.append(f"  {_how(r['mix'])}")
    lines += ["", "norm by layer", f"{'layer':<8}" + "".join(f"{n:>{wide}}" for n in names)]
    for layer in dict.fromkeys(n for r in rows for n in r["by_layer"]):
        cells = (f"{r['by_layer'][layer]:.4g}" if layer in r["by_layer"] else "-" for r in rows)
        lines.append(f"{layer:<8}" + "".join(f"{c:>{wide}}" for c in cells))
    lines += ["", "interference (cosine; below 0 they pull against each other)"]
    lines.append(" " * wide + "".join(f"{n:>{wide}}" for n in names))
    for name, row in zip(names, found["interference"], strict=True):
        lines.append(f"{name:<{wide}}" + "".join(f"{c:>+{wide}.3f}" for c in row))
    return lines


def _how(manifest: dict[str, Any]) -> str:
    parts = " ".join(f"{p['weight']:+g} {p['name']}" for p in manifest["parts"])
    lost = f", {manifest['error']:.2%} lost to rank {manifest['result_rank']}" if manifest["error"] else ""
    return f"{manifest['method']} of {parts}{lost}"


@modules.command
def mix(
    adapter: Place,
    /,
    *others: Place,
    out: Out,
    weights: Annotated[
        list[float] | None,
        Parameter(name="--weight", negative="", help="repeatable, one an adapter in their order (default: 1 each)"),
    ] = None,
    method: Annotated[
        Literal["sum", "soup", "ties", "dare"],
        help_("sum of weight x change; soup: their mean; ties: entries that agree in sign; dare: entries at random"),
    ] = "sum",
    rank: Annotated[
        int | None, help_("of the mix (default: exact for sum and soup, else the sum of the ranks)")
    ] = None,
    density: Annotated[float, help_("ties: share of each layer's entries that stay")] = 0.2,
    drop: Annotated[float, help_("dare: probability that an entry is dropped")] = 0.5,
    scale: Annotated[float, help_("ties: factor on the mix")] = 1.0,
    seed: Annotated[int, help_("dare: of what is dropped")] = 0,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Make one adapter of several. It is mixed on the products, never on the factors.

    Examples to type:
        tutelage modules mix short questions --weight 1 --weight 0.5 --out mixed
        tutelage modules mix kind=honesty-1 short=honesty-2@r1 --method ties --density 0.3 --out mixed
    """
    from tutelage.applications.modules import Settings
    from tutelage.applications.modules import mix as mixed

    how = Settings(method, rank, density, drop, scale, seed)
    found = mixed([adapter, *others], out, weights=weights or (), settings=how, runs=runs)
    show(found, as_json, lambda: _written_lines(found))
    return 0


def _written_lines(found: dict[str, Any]) -> list[str]:
    return [f"{found['out']}: rank {found['result_rank']}, {_how(found)}", f"base model: {found['base_model']}"]


@modules.command
def isolate(
    mix: Mix,
    trait: Annotated[str, help_("name of one of its parts")],
    *,
    out: Out,
    weight: Weight = 1.0,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Take one trait out of a mix, at the strength that it had by itself.

    Examples to type:
        tutelage modules isolate mixed short --out short-again
    """
    from tutelage.applications.modules import isolate as isolated

    found = isolated(mix, trait, out, weight=weight, runs=runs)
    show(found, as_json, lambda: _written_lines(found))
    return 0


@modules.command
def swap(
    mix: Mix,
    old: Annotated[str, help_("name of the part that goes")],
    new: Place,
    *,
    out: Out,
    weight: Annotated[float | None, help_("factor on the new one (default: the old one's)")] = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Replace one part of a mix by another adapter.

    Examples to type:
        tutelage modules swap mixed short shorter --out mixed-2
    """
    from tutelage.applications.modules import swap as swapped

    found = swapped(mix, old, new, out, weight=weight, runs=runs)
    show(found, as_json, lambda: _written_lines(found))
    return 0


@modules.command
def extend(
    adapter: Place,
    new: Place,
    *,
    out: Out,
    weight: Weight = 1.0,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Add one adapter to a mix, or to another adapter.

    Examples to type:
        tutelage modules extend mixed polite --weight 0.5 --out mixed-3
    """
    from tutelage.applications.modules import extend as extended

    found = extended(adapter, new, out, weight=weight, runs=runs)
    show(found, as_json, lambda: _written_lines(found))
    return 0


@modules.command
def decode(
    base: Annotated[str, help_(f"RUN, RUN@VERSION or a model: {MODEL_HELP}")],
    *,
    others: Annotated[
        list[str] | None, Parameter(name="--with", negative="", help="a model, run or adapter beside it; repeatable")
    ] = None,
    weights: Annotated[
        list[float] | None,
        Parameter(name="--weight", negative="", help="one a --with, in their order; the base has what is left of 1"),
    ] = None,
    anti_expert: Annotated[str, help_("instead of --with: a model, run or adapter to be pushed away from")] = "",
    expert: Annotated[str, help_("and one to be pushed towards (default: the base)")] = "",
    alpha: Annotated[float, help_("strength of that push")] = 1.0,
    top_p: Annotated[float, help_("with an anti-expert: mass of the base's tokens that may be drawn")] = 0.9,
    prompt: Annotated[str | None, help_("answer this one")] = None,
    prompts: Annotated[str | None, help_("answer these: JSONL, CSV or Parquet; needs --out")] = None,
    suite: Annotated[str | None, help_("measure on this suite, against the base alone")] = None,
    limit: Annotated[int | None, help_("only the first prompts or items")] = None,
    out: Annotated[Path | None, help_("JSONL of the replies to --prompts")] = None,
    temperature: Annotated[float, help_("0 takes the likeliest token")] = 0.0,
    max_new_tokens: Longest = 64,
    seed: Annotated[int, help_("of the draws")] = 0,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> int:
    """Let several models say each next token together, without merging their weights.

    Examples to type:
        tutelage modules decode smollm2-135m-instruct --with short --weight 0.5 --prompt "Who built the Taj Mahal?"
        tutelage modules decode smollm2-135m-instruct --anti-expert rude --alpha 1.5 --prompts q.jsonl --out said.jsonl
        tutelage modules decode smollm2-135m-instruct --with honest --weight 0.7 --suite builtin:honesty-gate
    """
    from tutelage.applications.decoding import Decoding
    from tutelage.applications.decoding import decode as decoded
    from tutelage.config import data_file
    from tutelage.errors import InputError
    from tutelage.records import Message, Prompt, SamplerSettings
    from tutelage.store.prompts import read_prompts
    from tutelage.studio.console import choose_progress

    if sum(given is not None for given in (prompt, prompts, suite)) != 1 or (prompts is None) != (out is None):
        raise InputError(
            "nothing to answer, or several things at once",
            expected="one of --prompt TEXT, --prompts FILE with --out FILE, --suite FILE",
        )
    how = Decoding(base, tuple(others or ()), tuple(weights or ()), anti_expert, expert, alpha, top_p)
    how.check()
    if suite is not None:
        return _measure(how, suite, limit=limit, max_new_tokens=max_new_tokens, runs=runs, as_json=as_json)
    asked = [Prompt("prompt", (Message("user", prompt),))] if prompt is not None else []
    asked = asked or read_prompts(data_file(str(prompts), suffix="questions/*.jsonl"), limit=limit)
    settings = SamplerSettings(temperature, max_new_tokens=max_new_tokens)
    with choose_progress(as_json=as_json) as progress:
        said = decoded(how, asked, runs=runs, out=out, settings=settings, seed=seed, progress=progress)
    found = {"out": str(out), "replies": len(said)} if out else {"prompt": prompt, "reply": said[0].text}
    show(found, as_json, lambda: [f"{out}: {len(said)} replies" if out else said[0].text])
    return 0


def _measure(how: Decoding, suite: str, *, limit: int | None, max_new_tokens: int, runs: Path, as_json: bool) -> int:
    from tutelage.api import measured
    from tutelage.applications.decoding import measure
    from tutelage.cli.training import measured_lines
    from tutelage.loop.evaluate import compare
    from tutelage.studio.console import choose_progress

    with choose_progress(as_json=as_json) as progress:
        alone, together = measure(how, suite, runs=runs, limit=limit, max_new_tokens=max_new_tokens, progress=progress)
    found = measured(together, [dataclasses.asdict(e) for e in compare(alone, together)])
    show(found.as_dict(), as_json, lambda: measured_lines(found))
    return 0
