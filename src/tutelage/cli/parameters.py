"""What all commands share: the application, common parameters, printing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from tutelage import __version__

__all__ = [
    "MODEL_HELP", "Json", "Longest", "Model", "Newest", "Prompts", "RecipeName", "Runs", "Set", "Values", "app",
    "help_", "show",
]  # fmt: skip

_EPILOGUE = """
Exit codes: 0 done, 2 wrong use, 3 a gate rejected, 4 a judge was refused, 5 budget spent,
130 interrupted and resumable.
"""

app = App(
    name="tutelage",
    version=__version__,
    help="Teach a language model with feedback from AI, prove that it got better, and see why.",
    help_epilogue=_EPILOGUE,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # `main` says how to go on
)


def help_(text: str, **more: Any) -> Parameter:
    """What --help says of a parameter."""
    return Parameter(help=text, **more)


MODEL_HELP = "embedded name, Hugging Face directory, GGUF file or hub name"
RecipeName = Annotated[str, help_("built-in name or TOML file")]
Model = Annotated[str | None, help_(MODEL_HELP)]
Prompts = Annotated[str | None, help_("training prompts as JSONL, CSV or Parquet")]
Values = Annotated[str | None, help_("constitution: TOML or Markdown file of principles")]
Longest = Annotated[int, help_("longest reply, in tokens")]
Newest = Annotated[str | None, help_("run (default: the newest)")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="print JSON for machines")]
Runs = Annotated[Path, Parameter(name="--runs", help="folder that holds runs")]
Set = Annotated[
    list[str] | None,
    Parameter(name="--set", negative="", help="override a key of the recipe: key=value; repeatable"),
]


def show(value: Any, as_json: bool, lines: Callable[[], Sequence[str]]) -> None:
    """Print for machines or for people."""
    if as_json:
        print(json.dumps(value, indent=2, ensure_ascii=False, default=str))
    else:
        print("\n".join(lines()))
