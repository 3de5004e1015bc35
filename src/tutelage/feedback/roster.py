"""From a recipe or a few words to a judge."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tutelage.config import JUDGE_KINDS, Judge
from tutelage.engines.answers import CachedEngine
from tutelage.engines.choose import Own, open_engine
from tutelage.engines.encoder import Encoder
from tutelage.errors import RecipeError
from tutelage.feedback.constitution import Constitution
from tutelage.feedback.judge_prompt import load_judge_prompt
from tutelage.feedback.judges import Listwise, Pairwise, Pointwise
from tutelage.feedback.model_judge import CodeJudge, ComparingJudge, ModelJudge
from tutelage.feedback.sincerity import SincerityJudge
from tutelage.feedback.stability import StabilityJudge

__all__ = ["judge_of", "open_judge"]

_CODE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


def judge_of(spec: str) -> Judge:
    """A judge in a few words: [KIND=]MODEL, or package.module:name.

    Examples: `smollm2-135m-instruct`, `pointwise=judge.gguf`, `listwise=gpt-x@http://127.0.0.1:8000`,
    `critic=toxicity.safetensors`, `my_judges:polite`.

    Raises:
        ValueError: It makes no sense (pydantic's message says why).
        RecipeError: It is a discriminator.
    """
    if _CODE.match(spec):
        return Judge(name=spec.rpartition(":")[2], kind=spec)
    kind, sign, model = spec.partition("=")
    if not sign or kind not in JUDGE_KINDS:
        kind, model = "pairwise", spec
    if kind == "discriminator":
        raise _no_policy(spec)
    return Judge(name=_name(model if kind == "pairwise" else f"{kind}-{Path(model).name}"), kind=kind, model=model)


def _name(spec: str) -> str:
    bare = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(spec.split("@")[0]).name.removesuffix(".gguf")).strip("-")
    return bare if bare[:1].isalpha() else f"judge-{bare}"


def _no_policy(name: str) -> RecipeError:
    return RecipeError(
        f"'{name}' is a discriminator, and there is no policy in training to tell demonstrations from",
        expected="a judge that can judge texts as they stand",
        fix="put it under [[judges]] of a recipe with update.rounds, and play that with `tutelage run`",
    )


def open_judge(
    spec: Judge,
    constitution: Constitution | None,
    *,
    answers: Path | None = None,
    own: Own | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> ComparingJudge:
    """Load what a judge needs.

    Args:
        spec: The judge.
        constitution: Principles, for judges that are to judge by them.
        answers: File of answers already given; None asks everything anew.
        own: As in `open_engine`.
        say: Hears of a server's outages.

    Raises:
        ModelError, RecipeError, InputError: Something it needs is missing or broken.
    """
    if ":" in spec.kind:
        return CodeJudge(spec.name, spec.kind)
    if spec.kind == "discriminator":
        raise _no_policy(spec.name)
    if spec.kind == "critic":
        from tutelage.feedback.critic_judge import open_critic

        return open_critic(spec.name, Path(spec.model).expanduser(), **({"model": own[0]} if own else {}))
    if spec.kind == "fusion":
        from tutelage.feedback.fused_judge import open_fused

        return open_fused(spec, lambda member: open_judge(member, constitution, answers=answers, own=own, say=say))
    engine = open_engine(spec, own=own, say=say)
    if answers is not None:
        engine = CachedEngine(engine, answers)
    if spec.kind == "sincerity":
        return SincerityJudge(spec.name, engine)
    if spec.kind == "stability":
        return StabilityJudge(
            spec.name, engine, Encoder().embed, paraphrases=spec.paraphrases, words=spec.prompt or "builtin:stability"
        )
    words = load_judge_prompt(spec.prompt or f"builtin:{spec.kind}")
    rules = None if spec.principles == "none" else constitution
    each = spec.principles == "each" and rules is not None
    how: Pairwise | Pointwise | Listwise
    if spec.kind == "listwise":
        how = Listwise(words, rules, each=each, rotations=spec.rotations)
    else:
        how = (Pairwise if spec.kind == "pairwise" else Pointwise)(words, rules, each=each, thoughts=spec.thoughts)
    return ModelJudge(spec.name, how, engine, opponents=spec.opponents)
