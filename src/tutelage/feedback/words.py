"""What models are asked to write, as files with a hash: several templates under one name."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping

from tutelage.config import data_file
from tutelage.errors import InputError
from tutelage.feedback.judge_prompt import filled
from tutelage.records import Message, content_hash

__all__ = ["Words", "load_words"]


class Words:
    """Templates of user turns, a system turn, and how the answers begin.

    Args:
        texts: By name. `system` is the system turn, NAME a user turn with {holes}, NAME_opening how the
            answer to it begins.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = dict(texts)
        self.hash = content_hash(self._texts)

    def messages(self, name: str, **parts: str) -> tuple[Message, ...]:
        """The conversation that ends with the template `name`, its holes filled in."""
        return filled(self._texts.get("system", ""), self._texts[name], parts)

    def opening(self, name: str) -> str:
        """How the answer begins; may be empty."""
        return self._texts.get(f"{name}_opening", "")


def load_words(name: str, holes: Mapping[str, tuple[str, ...]]) -> Words:
    """Read templates by file or built-in name (`builtin:revision`).

    Args:
        name: TOML file of texts.
        holes: Templates that it must have, and the holes that each must have.

    Raises:
        InputError, RecipeError: There is no such file, or it lacks a template or a hole.
    """
    path = data_file(name, suffix="judges/*.toml")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"the words {path} cannot be read: {error}", expected="a UTF-8 TOML file") from error
    known = {"system", *holes, *(f"{key}_opening" for key in holes)}
    strange = sorted(key for key, value in data.items() if key not in known or not isinstance(value, str))
    if strange:
        raise InputError(f"{path}: '{strange[0]}' is no text known here", expected=", ".join(sorted(known)))
    for key, wanted in holes.items():
        lacking = [hole for hole in wanted if "{" + hole + "}" not in data.get(key, "")]
        if key not in data or lacking:
            what = f"lacks {{{lacking[0]}}} in '{key}'" if lacking else f"lacks '{key}'"
            raise InputError(f"{path} {what}", expected=", ".join(f"{{{hole}}}" for hole in wanted) or "a text")
    return Words(data)
