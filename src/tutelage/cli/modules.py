"""Commands around modules, one adapter a trait: show, mix, isolate, swap, extend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from tutelage.cli.parameters import Json, Runs, app, help_, show

__all__ = ["extend", "isolate", "mix", "modules", "show_", "swap"]

modules = App(name="modules", help="One adapter a trait: show, mix, isolate, swap, extend.")
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
