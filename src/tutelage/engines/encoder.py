"""Sentence embeddings from the embedded MiniLM encoder, or any directory of the same kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from tutelage.engines import weights
from tutelage.errors import ModelError

__all__ = ["Encoder"]

# Always as many rows of the same length, so that every product has the same shape and a text's last
# bits do not depend on its company: a resumed run, whose batches differ, still ends bit-equal.
_ROWS = 8


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
            if not folder.is_dir():  # transformers would look for a hub's model of that name, and download it
                raise OSError(f"{folder} is no directory")
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            self._model = transformers.AutoModel.from_pretrained(
                str(folder), use_safetensors=True, trust_remote_code=False, local_files_only=True
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
        fresh = list(dict.fromkeys(t for t in texts if t not in self._known))
        if fresh:
            tokens = self._tokenizer(fresh, truncation=True, max_length=128)["input_ids"]
            by_length: dict[int, list[int]] = defaultdict(list)
            for index, row in enumerate(tokens):
                by_length[len(row)].append(index)
            for same in by_length.values():
                for start in range(0, len(same), _ROWS):
                    part = same[start : start + _ROWS]
                    filler = [tokens[part[0]]] * (_ROWS - len(part))
                    table = torch.tensor([*(tokens[i] for i in part), *filler])
                    states = self._model(input_ids=table, attention_mask=None).last_hidden_state
                    rows = F.normalize(states.mean(1), dim=-1)
                    self._known |= {fresh[i]: row.clone() for i, row in zip(part, rows, strict=False)}
        return (
            torch.stack([self._known[t] for t in texts])
            if texts
            else torch.zeros(0, int(self._model.config.hidden_size))
        )
