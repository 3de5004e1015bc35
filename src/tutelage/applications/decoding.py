"""Decode with several models at once: a weighted product, or a base pushed away from an anti-expert."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from tutelage.applications.modules import read
from tutelage.config import data_file
from tutelage.engines.load import LanguageModel, load_model
from tutelage.engines.local import LocalCompleter
from tutelage.engines.voices import Blend, against_anti_expert, product
from tutelage.errors import InputError
from tutelage.loop.evaluate import Answers, evaluate
from tutelage.loop.versions import load_for_use
from tutelage.policy.merging import put_on
from tutelage.records import Generation, Progress, Prompt, SamplerSettings
from tutelage.store.prompts import read_suite
from tutelage.store.runs import check_folder, write_atomic

__all__ = ["Decoding", "decode", "measure", "open_blend"]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Which models speak, and how their logits become one distribution.

    Args:
        base: A model, or a run as RUN or RUN@VERSION.
        others: Companions of a weighted product, each like `base` or an adapter's folder for the base.
        weights: Of the companions; the base has what is left of 1.
        anti_expert: Instead of companions: whom the base is pushed away from.
        expert: Whom it is pushed towards; empty takes the base itself.
        alpha: Strength of the push.
        top_p: Mass of the base's tokens that may be drawn at all, with an anti-expert.
    """

    base: str
    others: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    anti_expert: str = ""
    expert: str = ""
    alpha: float = 1.0
    top_p: float = 0.9

    def check(self) -> None:
        """Refuse what makes no sense, before any model is loaded.

        Raises:
            InputError: Nobody or both kinds of companion, or weights that do not fit.
        """
        if bool(self.others) == bool(self.anti_expert):
            raise InputError(
                "companions and an anti-expert" if self.others else "a base alone",
                expected="companions with weights, or an anti-expert",
                fix="give --with RUN --weight 0.5, or --anti-expert RUN",
            )
        if self.expert and not self.anti_expert:
            raise InputError("an expert without an anti-expert", expected="both, or the anti-expert alone")
        if len(self.weights) != len(self.others):
            raise InputError(f"{len(self.others)} companions and {len(self.weights)} weights", expected="one each")
        left = 1.0 - math.fsum(self.weights)
        if self.others and not (all(w > 0.0 for w in self.weights) and left > -1e-9):
            raise InputError(
                f"weights {', '.join(f'{w:g}' for w in self.weights)}",
                expected="each above 0, together at most 1; the base has what is left",
                fix="divide them by their sum",
            )
        if not (0.0 <= self.alpha < math.inf and 0.0 < self.top_p <= 1.0):
            raise InputError(f"alpha {self.alpha}, top-p {self.top_p}", expected="alpha of 0 or more, top-p in (0, 1]")


def open_blend(how: Decoding, *, runs: Path) -> tuple[LanguageModel, Blend]:
    """Load every model; each keeps its own copy of its weights.

    Raises:
        TutelageError: A model cannot be read, or their vocabularies differ.
    """
    how.check()
    base = _model(how.base, "", runs, None)
    dtype = str(base.dtype).removeprefix("torch.")
    if how.anti_expert:
        anti, *toward = (_model(spec, how.base, runs, dtype) for spec in (how.anti_expert, how.expert) if spec)
        blend = against_anti_expert(anti, toward[0] if toward else None, alpha=how.alpha, top_p=how.top_p)
    else:
        own = max(0.0, 1.0 - math.fsum(how.weights))
        blend = product([_model(spec, how.base, runs, dtype) for spec in how.others], [own, *how.weights])
    blend.check(base)
    return base, blend


def _model(spec: str, base: str, runs: Path, dtype: str | None) -> LanguageModel:
    if base and (Path(spec).expanduser() / "adapter_config.json").is_file():
        lm = load_model(base, dtype=dtype or "auto")
        put_on(lm.model, read(spec, runs))
        lm.name = Path(spec).name
        return lm
    name, _, version = spec.partition("@")
    return load_for_use(name, runs=runs, version=version or None, dtype=dtype)


def decode(
    how: Decoding,
    prompts: Sequence[Prompt],
    *,
    runs: Path,
    out: Path | None = None,
    settings: SamplerSettings,
    seed: int = 0,
    progress: Progress,
) -> list[Generation]:
    """One reply a prompt; with `out`, JSONL of prompts, replies and the log-probability of each under the blend.

    Raises:
        TutelageError: A model cannot be read, or `out` not written.
    """
    check_folder(out)
    base, blend = open_blend(how, runs=runs)
    progress.stage("decode", len(prompts), "replies")
    table = LocalCompleter(base, blend=blend).generate(
        prompts, samples=1, settings=settings, seed=seed, version=_named(base, blend), progress=progress.advance
    )
    replies = [group[0] for group in table]
    if out is not None:
        rows = (
            {"id": p.id, "prompt": p.text, "reply": r.text, "logp": math.fsum(r.logps), "tokens": len(r.tokens)}
            for p, r in zip(prompts, replies, strict=True)
        )
        write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return replies


def _named(base: LanguageModel, blend: Blend) -> str:
    return " with ".join((base.name, *(lm.name for lm in blend.others)))


def measure(
    how: Decoding, suite: str, *, runs: Path, limit: int | None = None, max_new_tokens: int = 32, progress: Progress
) -> tuple[Answers, Answers]:
    """Greedy replies to a suite, of the base alone and of the blend.

    Raises:
        TutelageError: A model or the suite cannot be read.
    """
    path = data_file(suite, suffix="questions/*.jsonl")
    items = read_suite(path, limit=limit)
    base, blend = open_blend(how, runs=runs)

    def answers(name: str, used: Blend | None) -> Answers:
        progress.stage(f"{path.stem}: {name}", len(items), "answers")
        engine = LocalCompleter(base, blend=used)
        return evaluate(
            engine, items, suite=path.stem, version=name, max_new_tokens=max_new_tokens, progress=progress.advance
        )

    return answers(base.name, None), answers(_named(base, blend), blend)
