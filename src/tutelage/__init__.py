"""Teach a language model with feedback from AI: generate, judge, reward, credit, update, gate, report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.api import attack, evaluate, export, measure_attacks, run

__version__ = "0.1.0"
__all__ = ["__version__", "attack", "evaluate", "export", "measure_attacks", "run"]


def __getattr__(name: str) -> Any:
    """Load the heavy parts only when they are used, so that `import tutelage` stays quick."""
    if name in __all__:
        from tutelage import api

        return getattr(api, name)
    raise AttributeError(f"module 'tutelage' has no attribute '{name}'")
