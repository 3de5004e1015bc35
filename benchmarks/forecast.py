"""What `tutelage validate` foretells beside what a run takes, for models of several sizes and kinds.

    python benchmarks/forecast.py
    python benchmarks/forecast.py --only "360M;gpt-neox" --json

The embedded model, and models with random weights in the shapes of SHAPES with its tokenizer. Each plays a small
honesty run (no critic; supervised stage and rounds as the recipe has them) in a process of its own, right after its
forecast. Models with random weights never end a reply, so their forecast is told that replies are as long as they
may be; that of the embedded model takes the lengths that `validate` takes. Peak memory is the process's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from duel import peak_memory

EMBEDDED = "smollm2-135m-instruct"
SHAPES: dict[str, dict[str, Any]] = {
    "30M": {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 12, "num_attention_heads": 5,
            "num_key_value_heads": 5},
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
             "num_key_value_heads": 5},
    "500M wide": {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 12, "num_attention_heads": 12,
                  "num_key_value_heads": 2},
    "gpt-neox": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}  # fmt: skip
SMALL = [
    'feedback.judges=["consistency","constitution","text"]', 'lora.start="random"', "constraint.enabled=false",
    "update.prompts=32", "prompts.limit=96", "prompts.gate_limit=64", "prompts.heldout_limit=128",
]  # fmt: skip


def build(shape: dict[str, Any], folder: Path) -> None:
    """A model directory with random weights of this shape, and the embedded model's tokenizer."""
    import torch
    import transformers

    from tutelage.engines.load import describe

    source = Path(describe(EMBEDDED, hub=False))
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder / file.name)
    config = transformers.AutoConfig.from_pretrained(source)
    if "num_key_value_heads" in shape:
        made = transformers.LlamaConfig(**{**config.to_dict(), **shape, "head_dim": None})
    else:
        kept = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
        made = transformers.GPTNeoXConfig(**shape, **{key: getattr(config, key) for key in kept})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(folder)


def tell(model: str) -> dict[str, Any]:
    """The forecast."""
    from tutelage.config import load_recipe
    from tutelage.studio.forecast import forecast

    told = forecast(load_recipe("honesty", recipe_of(model)), length=None if model == EMBEDDED else 1.0)
    return {"foretold_seconds": told["estimated_seconds"], "foretold_bytes": told["estimated_memory_bytes"]}


def play(model: str) -> dict[str, Any]:
    """The run, from loading the model to its report."""
    import tutelage
    from tutelage.studio.console import PlainProgress

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as runs, PlainProgress() as progress:
        tutelage.run("honesty", overrides=recipe_of(model), name="forecast", runs=runs, progress=progress)
    return {"seconds": time.perf_counter() - began, "bytes": peak_memory()}


def recipe_of(model: str) -> list[str]:
    """Overrides of the honesty recipe."""
    return [*SMALL, f'model.name="{model}"']


def alone(what: str, model: str, threads: int) -> dict[str, Any]:
    """One of the two in a process of its own, so that its memory is its own."""
    command = [sys.executable, __file__, "--what", what, "--model", model]
    surroundings = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=surroundings, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"parted by ;: {EMBEDDED}; {'; '.join(SHAPES)}")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=("tell", "play"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.what:
        print(json.dumps({"tell": tell, "play": play}[given.what](given.model)))
        return
    rows = []
    for name in given.only.split(";") if given.only else (EMBEDDED, *SHAPES):
        with tempfile.TemporaryDirectory() as scratch:
            model = name
            if name in SHAPES:
                model = str(Path(scratch) / name.replace(" ", "-"))
                build(SHAPES[name], Path(model))
            row = {"model": name} | alone("tell", model, given.threads) | alone("play", model, given.threads)
        row["time_ratio"] = row["foretold_seconds"] / row["seconds"]
        row["memory_ratio"] = row["foretold_bytes"] / row["bytes"]
        rows.append(row)
        if not given.json:
            print(
                f"{name}: foretold {row['foretold_seconds']:.0f} s, took {row['seconds']:.0f} s "
                f"({row['time_ratio']:.2f}); foretold {row['foretold_bytes'] / 1e9:.2f} GB, "
                f"took {row['bytes'] / 1e9:.2f} GB ({row['memory_ratio']:.2f})",
                flush=True,
            )
    if given.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
