"""The model that learns, as a whole: the only place where an adapter is written into weights."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from tutelage.engines.load import LanguageModel
from tutelage.policy.merged import Merged

__all__ = ["save_merged"]


def save_merged(lm: LanguageModel, target: Path) -> None:
    """Write weights with all that was learned merged in, config and tokenizer: transformers loads the folder."""
    target.mkdir(parents=True, exist_ok=True)
    layers = {path: m for path, m in lm.model.named_modules() if isinstance(m, Merged)}
    state = {}
    for name, value in lm.model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in layers:
            if leaf not in ("weight", "bias"):  # what the change is made of
                continue
            value = layers[owner].merged if leaf == "weight" else value
        state[name] = value.detach().clone().contiguous()
    head = lm.model.get_output_embeddings()
    if lm.model.config.tie_word_embeddings:
        tied = [n for n, m in lm.model.named_modules() if m is head]
        state = {k: v for k, v in state.items() if k.rpartition(".")[0] not in tied}
    save_file(state, str(target / "model.safetensors"), metadata={"format": "pt"})
    lm.model.config.save_pretrained(str(target))
    if lm.model.generation_config is not None:
        lm.model.generation_config.save_pretrained(str(target))
    lm.tokenizer.save_pretrained(str(target))
