"""Text terms: what can be said of a reply without any model. Higher is better, in [0, 1]."""

from __future__ import annotations

import re

from tutelage.records import Generation, Verdict

__all__ = ["format_term", "length_term", "repetition_term", "text_verdict"]


def length_term(tokens: int, *, finished: bool, limit: int) -> float:
    """1 for a reply that ends by itself, falling with its length beyond half the limit; 0 when cut off."""
    if not finished:
        return 0.0
    over = max(0.0, tokens - limit / 2) / (limit / 2)
    return max(0.0, 1.0 - over)


def repetition_term(tokens: tuple[int, ...], *, n: int = 3) -> float:
    """Share of distinct n-grams of tokens; 1 for a reply too short to repeat itself.

    Works on tokens, not words, so it holds for scripts without spaces.
    """
    grams = [tokens[i : i + n] for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def format_term(text: str) -> float:
    """0 for an empty reply, half off for stray markup, code fences or role names, else 1."""
    if not text.strip():
        return 0.0
    stray = re.search(r"```|<\|?[a-z/][^>]{0,40}>|^\s*(user|assistant|system)\s*:|\bdef \w+\(", text, re.IGNORECASE)
    return 0.5 if stray else 1.0


def text_verdict(reply: Generation, prompt_hash: str) -> Verdict:
    """The text terms as a verdict of the judge `text`: their mean, with each as evidence."""
    parts = {
        "length": length_term(len(reply.tokens), finished=reply.finished, limit=reply.settings.max_new_tokens),
        "repetition": repetition_term(reply.tokens),
        "format": format_term(reply.text),
    }
    reason = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
    value = sum(parts.values()) / len(parts)
    return Verdict("text", "text-1", reply.id, prompt_hash, value, reason, parts)
