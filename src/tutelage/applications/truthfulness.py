"""The honesty recipe: abstain where nobody can know, ask back where it is unclear, answer what is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tutelage import __version__
from tutelage.applications.judging import answers_file, refuse_untrusted
from tutelage.config import Judge, Recipe, data_file
from tutelage.engines.encoder import Encoder
from tutelage.engines.load import LanguageModel, load_model
from tutelage.engines.weights import cache_dir
from tutelage.errors import InputError
from tutelage.feedback.comparisons import Comparisons, read_comparisons
from tutelage.feedback.constitution import Constitution, load_constitution
from tutelage.feedback.critic import ACTS, KINDS, Critic, LabelledText, directions, read_labelled, read_questions
from tutelage.feedback.model_judge import ComparingJudge
from tutelage.feedback.panel import Panel
from tutelage.feedback.roster import open_judge
from tutelage.loop.bench import Workbench, derive_seed
from tutelage.loop.crediting import check_credit
from tutelage.loop.demonstrating import check_room
from tutelage.loop.imitating import ImitationJudge, demonstrations_for
from tutelage.loop.improve import Result, improve
from tutelage.loop.versions import adapter_of
from tutelage.policy.full import FullWeights
from tutelage.policy.lora import Adapter
from tutelage.records import Demonstration, PreferencePair, Progress, Prompt, SuiteItem, content_hash
from tutelage.store.demonstrations import read_demonstrations
from tutelage.store.ledger import Unit
from tutelage.store.pairs import read_pairs
from tutelage.store.prompts import read_prompts, read_suite
from tutelage.store.runs import Run

# Labelled questions that the adapter's first directions are solved from: what every layer reads in each
# is held in memory. Whether more would help has not been measured.
_AIMING = 2500

# Counts up when the way a critic is trained changes: an older cached one must not be taken.
_CRITIC_REVISION = 8

__all__ = ["Beginning", "begin", "demonstrations_of", "inputs", "labelled", "play", "principles_note", "set_up"]


def inputs(recipe: Recipe) -> tuple[list[Prompt], list[SuiteItem], list[SuiteItem], Constitution]:
    """Everything a run reads from files, checked before any model is loaded.

    Raises:
        InputError, ModelError, RecipeError: A file is missing or broken; the message names file and line.
    """
    p = recipe.prompts
    train = read_prompts(data_file(p.train, suffix="questions/*.jsonl"), limit=p.limit)
    gate = read_suite(data_file(p.gate, suffix="questions/*.jsonl"), limit=p.gate_limit)
    heldout = read_suite(data_file(p.heldout, suffix="questions/*.jsonl"), limit=p.heldout_limit)
    _apart(train, gate, p.gate)
    _apart(train, heldout, p.heldout)
    constitution = load_constitution(data_file(recipe.feedback.constitution, suffix="constitutions/*.toml"))
    labelled(recipe)
    anchors_of(recipe)
    shown = [one.prompt for one in demonstrations_of(recipe)]
    shown += [one.prompt for j in recipe.judges if j.kind == "discriminator" for one in demonstrations_for(j)]
    _apart(shown, gate, p.gate)
    _apart(shown, heldout, p.heldout)
    pairs_of(recipe, gate, heldout)
    check_credit(recipe)
    if recipe.supervised.adapter and not Path(recipe.supervised.adapter).is_dir():
        raise InputError(
            f"supervised.adapter is {recipe.supervised.adapter}, which is no folder",
            expected="a folder with an adapter, for example runs/NAME/checkpoints/r0",
            fix="check the path, or leave it out to play the stage",
        )
    return train, gate, heldout, constitution


def anchors_of(recipe: Recipe) -> list[PreferencePair]:
    """The pairs to which judges are held; none by default.

    Raises:
        InputError: The file is missing or broken.
    """
    source = recipe.feedback.anchors
    return read_pairs(data_file(source, suffix="judges/*.jsonl")) if source else []


def demonstrations_of(recipe: Recipe) -> list[Demonstration]:
    """What the user shows; nothing by default.

    Raises:
        InputError: The file is missing or broken.
    """
    source = recipe.demonstrations.file
    return read_demonstrations(Path(source).expanduser()) if source else []


def pairs_of(recipe: Recipe, gate: Sequence[SuiteItem], heldout: Sequence[SuiteItem]) -> Comparisons | None:
    """The compared replies that are learned from before the rounds; None by default.

    Raises:
        InputError: The file is missing or broken, or compares replies to a question of a suite.
    """
    how = recipe.pairs
    if not how.file:
        return None
    found = read_comparisons(data_file(how.file, suffix="judges/*.jsonl"), limit=how.limit)
    for suite, name in ((gate, recipe.prompts.gate), (heldout, recipe.prompts.heldout)):
        _apart([pair.prompt for pair in found.pairs], suite, name)
    return found


def _apart(train: Sequence[Prompt], suite: Sequence[SuiteItem], name: str) -> None:
    """What was learned from is no evidence."""
    learned = {prompt.hash for prompt in train}
    both = [item.prompt for item in suite if item.prompt.hash in learned]
    if both:
        raise InputError(
            f"{len(both)} training prompts are also held out in {name}, the first is '{both[0].text[:80]}'",
            expected="suites of questions that are not learned from",
            fix="remove them from the training prompts",
        )


def labelled(recipe: Recipe) -> tuple[list[LabelledText], list[LabelledText]]:
    """The questions and the replies that the recipe's critic learns from; none without a critic.

    Raises:
        InputError: A file is missing or broken.
    """
    f = recipe.feedback
    if "critic" not in f.judges:
        return [], []
    return (
        read_labelled(data_file(f.critic_questions, suffix="*.jsonl"), KINDS),
        read_labelled(data_file(f.critic_replies, suffix="*.jsonl"), ACTS),
    )


def set_up(run: Run, constitution: Constitution, progress: Progress) -> Workbench:
    """Load the models, train the critic, attach the adapter."""
    recipe = run.recipe
    progress.stage("load models", 1, "model")
    m = recipe.model
    lm = load_model(m.name, device=m.device, dtype=m.dtype, hub=m.hub)
    encoder = Encoder(recipe.feedback.encoder)
    progress.advance()
    fingerprint = lm.fingerprint  # of the model alone: an adapter's start depends on the seed
    adapter = adapter_of(recipe, lm, seed=derive_seed(recipe.seed, "adapter"))
    critic = _critic(recipe, lm, fingerprint, adapter, encoder, progress)
    panel = Panel(recipe.feedback, constitution, encoder, critic)
    own = (recipe.model.name, lm, adapter.off)  # a judge that is the policy's start model shares its weights

    def opened(spec: Judge) -> ComparingJudge:
        if spec.kind != "discriminator":
            return open_judge(spec, constitution, answers=answers_file(), own=own, say=progress.say)
        longest, seed = recipe.sampling.max_new_tokens, derive_seed(recipe.seed, "discriminator", spec.name)
        return ImitationJudge(spec, lm, adapter.off, fingerprint=fingerprint, longest=longest, seed=seed)

    judges = [opened(spec) for spec in recipe.judges]
    return Workbench(
        run, lm, adapter, panel, progress, judges, anchors=anchors_of(recipe), demonstrations=demonstrations_of(recipe)
    )


def _critic(
    recipe: Recipe,
    lm: LanguageModel,
    fingerprint: str,
    adapter: Adapter | FullWeights,
    encoder: Encoder,
    progress: Progress,
) -> Critic | None:
    """Train the critic, or take it from the cache, and let the adapter look where it looks."""
    questions, replies = labelled(recipe)
    if not questions:
        return None
    texts = [[r.text, r.label] for r in (*questions, *replies)]
    version = content_hash([fingerprint, str(lm.dtype), sorted(adapter.layers), texts, __version__, _CRITIC_REVISION])
    home = cache_dir() / "critics" / version
    if not (home / "ready").is_file():
        progress.stage("train critic", len(questions), "labelled questions")
        step = -(-len(questions) // _AIMING)
        aiming, others = questions[::step], [q for i, q in enumerate(questions) if i % step]
        with adapter.off():
            reading = read_questions(lm, [q.text for q in aiming], watch=adapter.layers)
            parts = [reading.probes]
            if others:  # deeper layers are not needed of these
                parts.append(read_questions(lm, [q.text for q in others]).probes)
        kinds = np.array([KINDS.index(q.label) for q in aiming])
        aims = {path: rows.clone() for path, rows in directions(reading.inputs, kinds).items()}
        reading.inputs.clear()
        probes = [torch.cat(probe) for probe in zip(*parts, strict=True)]
        critic = Critic.train(probes, encoder, [*aiming, *others], replies, version=version)
        home.mkdir(parents=True, exist_ok=True)
        critic.save(home / "critic.safetensors")
        save_file(aims, home / "aim.safetensors")
        (home / "ready").touch()
        progress.advance(len(questions))
    if recipe.lora.start == "critic":
        adapter.aim(load_file(home / "aim.safetensors"))
    return Critic.load(home / "critic.safetensors")


class Beginning(NamedTuple):
    """What a run starts from: its files, its workbench, and what is known of its judges."""

    train: list[Prompt]
    gate: list[SuiteItem]
    heldout: list[SuiteItem]
    constitution: Constitution
    bench: Workbench
    judges: list[dict[str, Any]]


def begin(run: Run, progress: Progress) -> Beginning:
    """Read, load and check all that a run needs, before any work is done."""
    train, gate, heldout, constitution = inputs(run.recipe)
    bench = set_up(run, constitution, progress)
    content = any(name != "text" for name in run.recipe.feedback.judges)
    known = refuse_untrusted(bench.judges, others=content, allowed=run.recipe.feedback.allow_refused)
    check_room(bench, bench.demonstrations)
    for prompt in [*train, *(item.prompt for item in (*gate, *heldout))]:
        bench.encode(prompt)  # one that is too long is refused
    return Beginning(train, gate, heldout, constitution, bench, known)


def principles_note(constitution: Constitution) -> dict[str, Any]:
    """The constitution as a ledger keeps it."""
    fields = ("id", "text", "weight", "scope", "wants")
    principles = [{k: getattr(p, k) for k in fields} for p in constitution.principles]
    return {"name": constitution.name, "hash": constitution.hash, "principles": principles}


def play(run: Run, progress: Progress) -> Result:
    """Play a new run, or go on with an interrupted one."""
    train, gate, heldout, constitution, bench, known = begin(run, progress)

    def notes(unit: Unit) -> None:
        unit.note("constitution", principles_note(constitution))
        if bench.panel.critic is not None:
            unit.note("critic", bench.panel.critic.quality)
        if known:
            unit.note("judges", known)

    pairs = pairs_of(run.recipe, gate, heldout)
    return improve(bench, train=train, gate=gate, heldout=heldout, pairs=pairs, notes=notes)
