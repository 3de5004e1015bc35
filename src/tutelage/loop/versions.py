"""Runs by name, and the model of any of their versions, ready for use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.errors import StoreError
from tutelage.store.runs import Run

if TYPE_CHECKING:
    from tutelage.config import Recipe
    from tutelage.engines.load import LanguageModel
    from tutelage.policy.full import FullWeights
    from tutelage.policy.lora import Adapter

__all__ = ["adapter_of", "latest", "load_for_use", "open_run"]


def adapter_of(recipe: Recipe, lm: LanguageModel, *, seed: int) -> Adapter | FullWeights:
    """Attach what a recipe trains; it changes nothing until it is trained or loaded."""
    from tutelage.policy.full import attach_full
    from tutelage.policy.lora import attach

    first = round(recipe.lora.from_depth * lm.layers)
    if recipe.lora.full:
        return attach_full(lm.model, targets=recipe.lora.targets, first_layer=first, model_name=recipe.model.name)
    return attach(
        lm.model,
        rank=recipe.lora.rank,
        alpha=recipe.lora.alpha,
        seed=seed,
        targets=recipe.lora.targets,
        first_layer=first,
        model_name=recipe.model.name,
    )


def open_run(name: str | None, root: Path) -> Path:
    """Folder of a run by name, by path, or the newest.

    Raises:
        StoreError: There is none.
    """
    from tutelage.store.runs import list_runs

    if name is None:
        found = list_runs(root)
        if not found:
            raise StoreError(f"there is no run in {root}", expected="a folder of runs", fix="start one: tutelage run")
        return found[0]
    for path in (root / name, Path(name)):
        if (path / "recipe.toml").is_file():
            return path
    raise StoreError(f"there is no run '{name}' in {root}", expected="a name that `tutelage runs` lists")


def load_for_use(
    spec: str, *, runs: str | Path = "runs", version: str | None = None, dtype: str | None = None
) -> LanguageModel:
    """A model for use: a run's promoted (or named) version, a model directory, a GGUF file, the embedded one.

    Args:
        spec: A model, or a run by name or path.
        runs: Folder that holds runs.
        version: Checkpoint of the run, or "start"; default: the promoted one, else the candidate.
        dtype: Precision; default: the run's own, or what the processor has.
    """
    from tutelage.engines.load import load_model

    folder = next((p for p in (Path(runs) / spec, Path(spec)) if (p / "recipe.toml").is_file()), None)
    if folder is None:
        return load_model(spec, dtype=dtype or "auto")
    opened = Run.open(folder, write=False)
    recipe = opened.recipe
    lm = load_model(
        recipe.model.name, device=recipe.model.device, dtype=dtype or recipe.model.dtype, hub=recipe.model.hub
    )
    chosen = version or latest(opened)
    if chosen != "start":
        adapter_of(recipe, lm, seed=0).load(opened.verify_checkpoint(chosen))
    lm.name = f"{opened.name}@{chosen}" + _doubt(opened, chosen)
    opened.close()
    return lm


def _doubt(opened: Run, version: str) -> str:
    """What must be said beside the name of a version that the gate did not let pass."""
    summary = opened.summary() or {}
    refused = summary.get("decision") == "rejected" and version == summary.get("candidate")
    return " (rejected by the gate)" if refused else ""


def latest(opened: Run) -> str:
    """The candidate version of a finished run, the last checkpoint of an unfinished one."""
    if opened.recipe.controller.enabled:
        return "start"  # its checkpoints hold the controller; the model's weights are the start's
    summary = opened.summary()
    if summary is not None:
        return str(summary["candidate"])
    units = opened.ledger.units()
    return str(units[-1]["version"]) if units else "start"
