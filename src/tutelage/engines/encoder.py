"""Sentence embeddings from the embedded MiniLM encoder, or any directory of the same kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from tutelage.engines import weights
from tutelage.errors import ModelError

__all__ = ["Encoder"]


class Encoder:
    """Mean-pooled, unit-length sentence embeddings.

    Args:
        spec: The embedded name, or a directory with a BERT-like encoder in safetensors.

    Raises:
        ModelError: The encoder cannot be loaded.
    """

    def __init__(self, spec: str = weights.EMBEDDED_ENCODER) -> None:
        import transformers

        folder = weights.locate(spec) if spec == weights.EMBEDDED_ENCODER else Path(spec)
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
            self._model = transformers.AutoModel.from_pretrained(
                str(folder), use_safetensors=True, trust_remote_code=False
            ).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"no sentence encoder could be read from {folder}",
                expected="a directory with config.json, tokenizer and model.safetensors",
                fix="run `tutelage fetch`, or check feedback.encoder in the recipe",
            ) from error
        self._known: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """(texts, dimensions) float32 rows of length one; an equal text is computed once.

        A text of control characters or nothing still gets a row.
        """
        # One by one: in a batch the last bits would depend on the company, and a resumed run, whose
        # batches differ, would not end bit-equal. The model is small; the cost is a few milliseconds.
        for text in dict.fromkeys(t for t in texts if t not in self._known):
            tokens = self._tokenizer([text], truncation=True, max_length=128, return_tensors="pt")
            states = self._model(**tokens).last_hidden_state
            self._known[text] = F.normalize(states.mean(1), dim=-1)[0]
        return (
            torch.stack([self._known[t] for t in texts])
            if texts
            else torch.zeros(0, int(self._model.config.hidden_size))
        )
