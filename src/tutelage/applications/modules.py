"""One adapter a trait: show, mix, isolate, swap, extend, and find out which of them did it.

A mix is an adapter folder like any other, with a `mix.json` beside the weights that says what it is made of.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tutelage.credit import modules as credit
from tutelage.engines.load import LanguageModel
from tutelage.errors import InputError, ModelError, StoreError
from tutelage.loop.versions import latest, open_run
from tutelage.policy import merging
from tutelage.policy.merging import Gates, Method
from tutelage.policy.saved import Factors, SavedAdapter
from tutelage.store.runs import Run, write_atomic

__all__ = ["MANIFEST", "Settings", "attribute", "extend", "isolate", "mix", "read", "show", "swap"]

MANIFEST = "mix.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a mix is made; what each means is said at `merging.mix`."""

    method: Method = "sum"
    rank: int | None = None
    density: float = 0.2
    drop: float = 0.5
    scale: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class _Part:
    adapter: SavedAdapter
    weight: float


def read(spec: str, runs: Path) -> SavedAdapter:
    """An adapter by [NAME=]PLACE, where the place is an adapter's folder, or a run as RUN or RUN@VERSION.

    Raises:
        ModelError, StoreError: There is none, or its files are damaged.
    """
    name, equals, place = spec.partition("=")
    if not equals:
        name, place = "", spec
    folder = Path(place).expanduser()
    if (folder / "adapter_config.json").is_file():
        return SavedAdapter.read(folder, name or None)
    run, _, version = place.partition("@")
    try:
        found = open_run(run, runs)
    except StoreError as error:
        raise ModelError(
            f"'{place}' is neither an adapter's folder nor a run in {runs}",
            expected="a folder with adapter_config.json, a run's name, or RUN@VERSION",
            fix="check the path; `tutelage runs` lists the runs",
        ) from error
    opened = Run.open(found, write=False)
    try:
        checkpoint = opened.verify_checkpoint(version or latest(opened))
        return SavedAdapter.read(checkpoint, name or opened.name)
    finally:
        opened.close()


# -- the manifest -----------------------------------------------------------------------------------


def _manifest(adapter: SavedAdapter) -> dict[str, Any] | None:
    """What a mix is made of, or None for an adapter that is no mix.

    Raises:
        ModelError: The manifest is damaged, or the weights are no longer those that it describes.
    """
    file = Path(adapter.source) / MANIFEST
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known, _ = found["sha256"], [(p["name"], p["weight"], p["share"], p["rows"]) for p in found["parts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is damaged ({error})", expected="what `tutelage modules mix` wrote") from error
    if known != adapter.digest:
        raise ModelError(
            f"the weights beside {file} are not those that it describes",
            expected=f"sha256 {known}",
            fix="mix anew, or remove the manifest to use the folder as an adapter of its own",
        )
    return found


def _parts(adapter: SavedAdapter, manifest: Mapping[str, Any], runs: Path) -> list[_Part]:
    """A mix's parts at their own strength: cut out of it, or read again where they no longer lie apart."""
    rows = manifest["parts"]
    if all(row["rows"] for row in rows):
        return [_Part(_cut_out(adapter, row, at_share=False), float(row["weight"])) for row in rows]
    found = []
    for row in rows:
        part = read(f"{row['name']}={row['source']}", runs)
        if part.digest != row["sha256"]:
            raise ModelError(
                f"{row['source']} has changed since '{adapter.name}' was made",
                expected=f"sha256 {row['sha256']}",
                fix="restore it, or mix anew",
            )
        found.append(_Part(part, float(row["weight"])))
    return found


def _cut_out(mixed: SavedAdapter, row: Mapping[str, Any], *, at_share: bool) -> SavedAdapter:
    first, end = row["rows"]
    layers = {
        path: Factors(b[:, first:end] / (1.0 if at_share else row["share"]), a[first:end])
        for path, (b, a) in mixed.layers.items()
        if b[:, first:end].any() or a[first:end].any()
    }
    return SavedAdapter(str(row["name"]), mixed.base, layers, str(row["sha256"]), str(row["source"]))


def _write(out: Path, parts: Sequence[_Part], settings: Settings) -> dict[str, Any]:
    """Mix, and write adapter and manifest under a temporary name that then becomes the real one."""
    names = [p.adapter.name for p in parts]
    if len(set(names)) < len(names):
        raise InputError(
            f"two parts are called '{next(n for n in names if names.count(n) > 1)}'",
            expected="a name of its own for each",
            fix="name them: NAME=PATH",
        )
    if out.exists():
        raise InputError(f"{out} is there already", expected="a new folder for the mix", fix="choose another name")
    made = merging.mix(out.name, [p.adapter for p in parts], [p.weight for p in parts], **dataclasses.asdict(settings))
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        made.adapter.save(scratch)
        told: dict[str, Any] = {
            **dataclasses.asdict(settings),
            "base_model": made.adapter.base,
            "result_rank": made.adapter.rank,
            "error": made.error,
            "sha256": SavedAdapter.read(scratch).digest,
            "parts": [
                {
                    "name": p.adapter.name, "weight": p.weight, "share": share, "rank": p.adapter.rank,
                    "sha256": p.adapter.digest, "source": p.adapter.source,
                    "rows": list(made.slices[k]) if made.slices else None,
                }
                for k, (p, share) in enumerate(zip(parts, made.shares, strict=True))
            ],
        }  # fmt: skip
        write_atomic(scratch / MANIFEST, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        scratch.replace(out)
    except OSError as error:
        raise StoreError(
            f"{out} cannot be written: {error.strerror or error}",
            expected="a writable folder with space left",
            fix="free space or choose another --out",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {"out": str(out), **told}


# -- the commands -----------------------------------------------------------------------------------


def mix(
    specs: Sequence[str], out: Path, *, weights: Sequence[float] = (), settings: Settings = Settings(), runs: Path
) -> dict[str, Any]:
    """Make one adapter of several; returns its manifest.

    Args:
        specs: Adapters as for `read`.
        out: Folder to write.
        weights: One an adapter; default 1 each.
        settings: How.
        runs: Folder that holds runs.

    Raises:
        InputError, ModelError, StoreError: An adapter cannot be read, or they do not fit together.
    """
    if weights and len(weights) != len(specs):
        raise InputError(
            f"{len(specs)} adapters and {len(weights)} weights", expected="one weight an adapter, or none at all"
        )
    parts = [_Part(read(s, runs), w) for s, w in zip(specs, weights or [1.0] * len(specs), strict=True)]
    return _write(out, parts, settings)


def isolate(spec: str, trait: str, out: Path, *, weight: float = 1.0, runs: Path) -> dict[str, Any]:
    """Take one trait out of a mix whose parts lie side by side, at its own strength times `weight`.

    Raises:
        InputError, ModelError, StoreError: It is no such mix, or has no such trait.
    """
    mixed = read(spec, runs)
    manifest = _made(mixed)
    if not all(row["rows"] for row in manifest["parts"]):
        raise ModelError(
            f"the parts of '{mixed.name}' do not lie apart: method {manifest['method']}, rank {manifest['rank']}",
            expected="a mix by sum or soup without --rank",
            fix=f"use what it was made of: {', '.join(row['source'] for row in manifest['parts'])}",
        )
    parts = _parts(mixed, manifest, runs)
    (found,) = [p for p in parts if p.adapter.name == _one_of(trait, parts, mixed)]
    return _write(out, [_Part(found.adapter, weight)], Settings())


def swap(spec: str, old: str, new: str, out: Path, *, weight: float | None = None, runs: Path) -> dict[str, Any]:
    """Replace one part of a mix by another adapter, at the same weight unless told otherwise.

    Raises:
        InputError, ModelError, StoreError: It is no mix, has no such part, or the adapters do not fit together.
    """
    mixed = read(spec, runs)
    manifest = _made(mixed)
    parts = _parts(mixed, manifest, runs)
    _one_of(old, parts, mixed)
    newcomer = read(new, runs)
    changed = [_Part(newcomer, p.weight if weight is None else weight) if p.adapter.name == old else p for p in parts]
    return _write(out, changed, _settings(manifest))


def extend(spec: str, new: str, out: Path, *, weight: float = 1.0, runs: Path) -> dict[str, Any]:
    """Add one adapter to a mix, by its own method, or to a single adapter, as a sum.

    Raises:
        InputError, ModelError, StoreError: An adapter cannot be read, or they do not fit together.
    """
    first = read(spec, runs)
    manifest = _manifest(first)
    parts = [_Part(first, 1.0)] if manifest is None else _parts(first, manifest, runs)
    return _write(
        out, [*parts, _Part(read(new, runs), weight)], Settings() if manifest is None else _settings(manifest)
    )


def _made(mixed: SavedAdapter) -> dict[str, Any]:
    found = _manifest(mixed)
    if found is None:
        raise ModelError(
            f"{mixed.source} is no mix: it has no {MANIFEST}",
            expected="a folder that `tutelage modules mix` wrote",
            fix="mix adapters first",
        )
    return found


def _one_of(name: str, parts: Sequence[_Part], mixed: SavedAdapter) -> str:
    names = [p.adapter.name for p in parts]
    if name not in names:
        raise InputError(f"'{mixed.name}' has no part '{name}'", expected=f"one of: {', '.join(names)}")
    return name


def _settings(manifest: Mapping[str, Any]) -> Settings:
    return Settings(**{f.name: manifest[f.name] for f in dataclasses.fields(Settings)})


def show(specs: Sequence[str], *, runs: Path) -> dict[str, Any]:
    """Norms by layer, and how the adapters lie to each other; a mix's parts are listed behind it, as MIX/PART.

    Raises:
        InputError, ModelError, StoreError: An adapter cannot be read, or they are of different models.
    """
    if not specs:
        raise InputError("no adapter to show", expected="at least one folder or run")
    shown: dict[str, SavedAdapter] = {}
    mixes = {}
    for spec in specs:
        adapter = read(spec, runs)
        if adapter.name in shown:
            raise InputError(
                f"two adapters are called '{adapter.name}'", expected="different names", fix="name them: NAME=PATH"
            )
        shown[adapter.name] = adapter
        manifest = _manifest(adapter)
        if manifest:
            mixes[adapter.name] = manifest
            for row in manifest["parts"]:
                if row["rows"]:
                    shown[f"{adapter.name}/{row['name']}"] = _cut_out(adapter, row, at_share=True)
    merging.check_same_model(list(shown.values()))
    rows = []
    for name, adapter in shown.items():
        norms = credit.norms(adapter.layers)
        rows.append(
            {
                "name": name, "base_model": adapter.base, "rank": adapter.rank, "layers": len(adapter.layers),
                "norm": math.hypot(*norms.values()), "norms": norms, "by_layer": _by_layer(norms),
                "sha256": adapter.digest, "source": adapter.source, "mix": mixes.get(name),
            }
        )  # fmt: skip
    cosines = credit.interference({name: a.layers for name, a in shown.items()})
    return {"adapters": rows, "interference": cosines.tolist()}


def _by_layer(norms: Mapping[str, float]) -> dict[str, float]:
    """Norm of each transformer layer's change, in the layers' order; "other" is what has no number."""
    groups: dict[str, list[float]] = {}
    for path, value in norms.items():
        number = re.search(r"\.(\d+)\.", f".{path}.")
        groups.setdefault(number[1] if number else "other", []).append(value)
    return {
        k: math.hypot(*groups[k]) for k in sorted(groups, key=lambda k: (k == "other", int(k) if k != "other" else 0))
    }


def attribute(
    lm: LanguageModel,
    spec: str,
    measure: Callable[[LanguageModel], float],
    *,
    by: Literal["parts", "layers"] = "parts",
    runs: Path = Path("runs"),
) -> credit.ModuleCredit:
    """Which parts of a mix, or which layers of an adapter, brought a measured gain.

    The adapter is attached to `lm` for good and left whole; `measure` runs once for each subset.

    Args:
        lm: The base model, without an adapter.
        spec: The mix, or any adapter with by = "layers".
        measure: What the model reaches; it must answer the same whenever it is asked the same.
        by: `parts` of the mix, or `layers` in at most six groups of neighbours.
        runs: Folder that holds runs.

    Raises:
        InputError, ModelError, StoreError: The parts do not lie apart, are more than six, or do not fit the model.
    """
    mixed = read(spec, runs)
    if by == "layers":
        groups = credit.layer_groups(list(mixed.layers))
        gates = Gates(merging.put_on(lm.model, mixed), {mixed.name: (0, mixed.rank)})
    else:
        rows = _made(mixed)["parts"]
        if not all(row["rows"] for row in rows):
            raise ModelError(
                f"the parts of '{mixed.name}' do not lie apart",
                expected="a mix by sum or soup without --rank",
                fix="mix its parts anew without --rank, or attribute by layers",
            )
        groups = {str(row["name"]): () for row in rows}
        gates = Gates(merging.put_on(lm.model, mixed), {str(row["name"]): tuple(row["rows"]) for row in rows})

    def value(on: frozenset[str]) -> float:
        which: dict[str, Any] = {"paths": [p for name in on for p in groups[name]]} if by == "layers" else {"parts": on}
        with gates.only(**which):
            return measure(lm)

    return credit.attribute(list(groups), value)
