"""Judges by rule, ready to be named in a recipe: `kind = "tutelage.feedback.rules:figures_given"`."""

from __future__ import annotations

import re

__all__ = ["figures_given"]

# Digits with what joins them: 1,200 and 3.5 and 1969-07-20 are one figure each.
_FIGURE = re.compile(r"\d+(?:[.,:/\u2013-]\d+)*")


def figures_given(prompt: str, reply: str) -> float:
    """Share of a reply's figures that its prompt gives; 1 where it has none.

    A year, count or price that nobody gave is the part of an invented answer that is most readily believed. It says
    nothing of whether a figure is right: as a reward it forbids to count, as a cost under a limit it bounds how often
    the policy takes the risk. Figures in words are not seen.
    """
    given = set(_FIGURE.findall(prompt))
    found = _FIGURE.findall(reply)
    return sum(figure in given for figure in found) / len(found) if found else 1.0
