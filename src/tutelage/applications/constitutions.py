"""Constitutions outside of a run: checked, compared by what flips, used to revise, and found from preferences."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomlkit

from tutelage.applications.judging import answers_file, parse_judge
from tutelage.config import Judge, data_file
from tutelage.engines.answers import CachedEngine
from tutelage.engines.choose import open_engine
from tutelage.engines.encoder import Encoder
from tutelage.errors import InputError, RecipeError
from tutelage.feedback.asking import Opinion, settle
from tutelage.feedback.constitution import Constitution, load_constitution
from tutelage.feedback.constitution_lint import lint
from tutelage.feedback.inverse import (
    Kept,
    Reconstruction,
    ballot,
    inverse_words,
    propose,
    reconstruct,
    representatives,
    select,
    vote,
)
from tutelage.feedback.judge_prompt import JudgePrompt, load_judge_prompt
from tutelage.feedback.model_judge import Pair
from tutelage.feedback.revision import Order, Revised, choose_principles, revision_words
from tutelage.feedback.revision import revise as revising
from tutelage.feedback.roster import open_judge
from tutelage.records import Engine, Message, PreferencePair, Prompt, content_hash
from tutelage.store.pairs import read_pairs
from tutelage.store.prompts import json_rows, read_prompts
from tutelage.store.runs import check_folder, write_atomic

__all__ = ["check", "diff", "infer", "revise"]

_PROPOSALS = 3  # principles proposed a pair


def check(path: str | Path) -> dict[str, Any]:
    """Read a constitution and say what is likely wrong with it.

    Returns:
        name, hash, principles (id, weight, scope, wants) and warnings.

    Raises:
        InputError: It cannot be read.
    """
    found = _constitution(path)
    keys = ("id", "weight", "scope", "wants")
    principles = [{key: getattr(p, key) for key in keys} for p in found.principles]
    return {"name": found.name, "hash": found.hash, "principles": principles, "warnings": lint(found)}


def diff(
    old: str | Path, new: str | Path, judge: str | Judge, pairs: str | Path, *, limit: int | None = None
) -> dict[str, Any]:
    """Which verdicts flip between two constitutions: the same judge compares the same pairs by each.

    Args:
        old: Constitution.
        new: Another version of it.
        judge: A judge of models that reads constitutions, as on the command line.
        pairs: JSONL lines {"prompt", "chosen", "rejected"}, or `builtin:pairs`.
        limit: Only the first N pairs.

    Returns:
        `principles` that were added, removed or changed (by id); counts of pairs, flips, verdicts lost and
        gained (by abstention); `agreement` with the people's choice, old and new; `flips`, each with its
        texts and both values (log-odds in nats that the chosen reply is better), the largest change first.

    Raises:
        TutelageError: A file or the judge cannot be used, or the judge reads no constitution.
    """
    spec = parse_judge(judge) if isinstance(judge, str) else judge
    if spec.kind not in ("pairwise", "pointwise", "listwise") or spec.principles == "none":
        raise RecipeError(
            f"the judge '{spec.name}' reads no constitution",
            expected="a model that is asked: [pairwise=|pointwise=|listwise=]MODEL",
            fix="name another judge, and do not switch its principles off",
        )
    items = read_pairs(data_file(str(pairs), suffix="judges/*.jsonl"), limit=limit)
    versions = [_constitution(path) for path in (old, new)]
    shown = [Pair(p.prompt, p.chosen, p.rejected) for p in items]
    # One after the other, so that only one model at a time is in memory.
    told = [open_judge(spec, version, answers=answers_file()).compare(shown) for version in versions]
    known = [(p, a, b) for p, a, b in zip(items, *told, strict=True) if a.value is not None and b.value is not None]
    flips = [(p, a, b) for p, a, b in known if _side(a) != _side(b)]
    flips.sort(key=lambda row: -abs((row[2].value or 0.0) - (row[1].value or 0.0)))
    return {
        "old": {"name": versions[0].name, "hash": versions[0].hash},
        "new": {"name": versions[1].name, "hash": versions[1].hash},
        "judge": spec.name,
        "principles": _changes(*versions),
        "pairs": len(items),
        "judged_by_both": len(known),
        "flipped": len(flips),
        "lost": sum(a.value is not None and b.value is None for a, b in zip(*told, strict=True)),
        "gained": sum(a.value is None and b.value is not None for a, b in zip(*told, strict=True)),
        "agreement": {key: _agreement(opinions) for key, opinions in zip(("old", "new"), told, strict=True)},
        "flips": [
            {
                "prompt": p.prompt.text, "chosen": p.chosen, "rejected": p.rejected,
                "old": a.value, "new": b.value, "old_reason": a.reason, "new_reason": b.reason,
            }
            for p, a, b in flips
        ],
    }  # fmt: skip


def _side(opinion: Opinion) -> int:
    return int(np.sign(opinion.value or 0.0))


def _agreement(opinions: Sequence[Opinion]) -> float | None:
    """Share of the verdicts that are for the chosen reply; a tie counts half."""
    sides = [_side(o) for o in opinions if o.value is not None]
    return sum((s + 1) / 2 for s in sides) / len(sides) if sides else None


def _changes(old: Constitution, new: Constitution) -> dict[str, list[str]]:
    before, after = ({p.id: p for p in version.principles} for version in (old, new))
    return {
        "added": [i for i in after if i not in before],
        "removed": [i for i in before if i not in after],
        "changed": [i for i in after if i in before and after[i] != before[i]],
    }


def revise(
    prompts: str | Path,
    model: str | Engine,
    constitution: str | Path,
    out: str | Path,
    *,
    rounds: int = 1,
    order: Order = "random",
    critique: bool = True,
    longest: int = 256,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Replies revised under a constitution, as files to train on.

    Writes into `out`: `sft.jsonl` (prompt, completion: the last revision), `preference.jsonl` (prompt, chosen:
    the last revision, rejected: the first reply; only where they differ), both as conversations in the formats
    of TRL, and `steps.jsonl` (each revision with its principle and critique, and each failure with its reason).

    Args:
        prompts: File of prompts. In JSONL a `reply` is what is revised; without one the model replies first.
        model: As of a judge, or an engine.
        constitution: Where the principles come from.
        out: Folder; made when it is not there.
        rounds: Revisions of each reply (with `order="all"`, times the number of principles).
        order: `random` draws a principle for each round by weight, `all` takes all in turn.
        critique: Ask for a critique before each revision.
        longest: Tokens a reply may take.
        limit: Only the first N prompts.
        seed: Of the draw.

    Returns:
        Counts: prompts, sft, preference, unchanged, failed (by reason) and revisions by principle.

    Raises:
        TutelageError: A file or the model cannot be used.
    """
    if rounds < 1:
        raise RecipeError(f"rounds is {rounds}", expected="1 or more")
    values, words = _constitution(constitution), revision_words()
    rows = _with_replies(Path(prompts).expanduser(), limit)
    engine = _engine(model)
    chains = [
        revising(
            words, prompt, choose_principles(values, prompt, rounds=rounds, order=order, seed=seed),
            reply=reply, critique=critique, longest=longest,
        )
        for prompt, reply in rows
    ]  # fmt: skip
    found = settle(engine, chains)
    origin = {"constitution": values.hash, "words": words.hash, "engine": engine.version}
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}", expected="a folder to write into") from error
    done = [(r, r.final) for r in found if r.final is not None]
    differ = [(r, final) for r, final in done if final != r.first.strip()]
    _write(folder / "sft.jsonl", [{"prompt": _turns(r), "completion": _turn(final)} for r, final in done])
    _write(
        folder / "preference.jsonl",
        [{"prompt": _turns(r), "chosen": _turn(final), "rejected": _turn(r.first)} for r, final in differ],
    )
    _write(folder / "steps.jsonl", [row | origin for r in found for row in _step_rows(r)])
    return {
        "prompts": len(found),
        "sft": len(done),
        "preference": len(differ),
        "unchanged": len(done) - len(differ),
        "failed": dict(Counter(r.failure for r in found if r.failure)),
        "revisions": dict(Counter(s.principle for r in found for s in r.steps)),
        **origin,
    }


def _with_replies(path: Path, limit: int | None) -> list[tuple[Prompt, str]]:
    """Prompts, each with the reply that its line brings, or an empty one."""
    prompts = read_prompts(path, limit=limit)
    if path.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        return [(p, "") for p in prompts]
    replies = []
    for number, fields in itertools.islice(json_rows(path), limit):
        reply = fields.get("reply")
        if reply is not None and not isinstance(reply, str):
            raise InputError(f"{path}, line {number}: reply is {reply!r:.80}", expected="a text", fix="or leave it out")
        replies.append(reply or "")
    return list(zip(prompts, replies, strict=True))


def _turns(revised: Revised) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in revised.prompt.messages]


def _turn(text: str) -> list[dict[str, str]]:
    return [dataclasses.asdict(Message("assistant", text))]


def _step_rows(revised: Revised) -> Iterator[dict[str, Any]]:
    lead = {"prompt_id": revised.prompt.id, "prompt": _turns(revised)}
    for number, step in enumerate(revised.steps, 1):
        yield {**lead, "step": number, **dataclasses.asdict(step)}
    if revised.failure:
        yield {**lead, "step": len(revised.steps) + 1, "failure": revised.failure}


def infer(
    pairs: str | Path,
    model: str | Engine,
    out: str | Path,
    *,
    clusters: int = 20,
    most: int = 5,
    limit: int | None = None,
    seed: int = 0,
    encoder: Encoder | None = None,
) -> dict[str, Any]:
    """Principles from preferences, written as a constitution, and what they explain on pairs kept apart.

    Half of the prompts serve to find principles; on the other half the kept ones reconstruct the preferences.

    Args:
        pairs: JSONL lines {"prompt", "chosen", "rejected"}, or `builtin:pairs`.
        model: Proposes and votes; as of a judge, or an engine.
        out: TOML file to write; nothing is written when no principle is kept.
        clusters: Principles that are voted on, one of each cluster of those proposed.
        most: Principles to keep.
        limit: Only the first N pairs.
        seed: Of the division into halves.
        encoder: For the meanings of principles; None takes the embedded one.

    Returns:
        Counts, the kept `principles` with their votes, `fitted` and `held_out` (right, wrong, undecided and
        accuracy with its 95% interval).

    Raises:
        TutelageError: A file or the model cannot be used, or there are too few pairs.
    """
    if clusters < 1 or most < 1:
        raise RecipeError(f"clusters is {clusters} and most is {most}", expected="1 or more of each")
    path = Path(out).expanduser()
    check_folder(path)
    items = read_pairs(data_file(str(pairs), suffix="judges/*.jsonl"), limit=limit)
    seen, kept_apart = _halves(items, seed)
    engine, words, voting = _engine(model), inverse_words(), load_judge_prompt("builtin:inverse-vote")
    proposed = settle(engine, [propose(words, p, count=_PROPOSALS) for p in seen])
    texts = list(dict.fromkeys(text for found in proposed for text in found))
    if not texts:
        raise InputError(
            f"the model '{engine.name}' proposed no principle for any of {len(seen)} pairs",
            expected="a model that answers in lines of text",
            fix="try a larger model",
        )
    vectors_ND = (encoder or Encoder()).embed(texts).numpy()
    candidates = [texts[i] for i in representatives(vectors_ND, clusters=clusters)]
    votes_MN = _votes(engine, voting, candidates, seen)
    kept = select(votes_MN, most=most)
    weights = [k.weight for k in kept]
    fitted = reconstruct(weights, votes_MN[[k.row for k in kept]])
    held_out = reconstruct(weights, _votes(engine, voting, [candidates[k.row] for k in kept], kept_apart))
    principles = _named(kept, candidates)
    figures = {
        "pairs": len(items), "seen": len(seen), "held_out_pairs": len(kept_apart), "proposed": len(texts),
        "pairs_without_proposals": sum(not found for found in proposed), "candidates": len(candidates),
        "unread_votes": float(np.isnan(votes_MN).mean()), "principles": principles,
        "fitted": _figures(fitted), "held_out": _figures(held_out), "engine": engine.version,
        "words": content_hash([words.hash, voting.hash]), "out": str(path) if kept else None,
    }  # fmt: skip
    if kept:
        write_atomic(path, _toml(path.stem, principles, held_out))
        figures["constitution"] = load_constitution(path).hash
    return figures


def _votes(
    engine: Engine, words: JudgePrompt, principles: Sequence[str], pairs: Sequence[PreferencePair]
) -> np.ndarray:
    """Votes of M principles on N pairs, as `select` takes them."""
    told = settle(engine, [vote(words, text, pair) for text in principles for pair in pairs])
    return np.array([ballot(o) for o in told]).reshape(len(principles), len(pairs))


def _halves(pairs: Sequence[PreferencePair], seed: int) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Pairs to learn from and pairs kept apart; those of one prompt stay together."""
    prompts = sorted({p.prompt.hash for p in pairs})
    if len(prompts) < 2:
        raise InputError(
            "all pairs have the same prompt", expected="pairs of two prompts or more", fix="half of them are kept apart"
        )
    random.Random(seed).shuffle(prompts)  # noqa: S311 - a division, not a secret
    first = set(prompts[: math.ceil(len(prompts) / 2)])
    return [p for p in pairs if p.prompt.hash in first], [p for p in pairs if p.prompt.hash not in first]


def _named(kept: Sequence[Kept], candidates: Sequence[str]) -> list[dict[str, Any]]:
    mean = math.fsum(k.weight for k in kept) / max(len(kept), 1)
    return [
        {
            "id": f"principle-{n}", "text": candidates[k.row], "weight": max(round(k.weight / mean, 3), 0.001),
            "votes_for": k.votes_for, "votes_against": k.votes_against,
        }
        for n, k in enumerate(kept, 1)
    ]  # fmt: skip


def _figures(found: Reconstruction) -> dict[str, Any]:
    value, low, high = found.accuracy
    return {
        "right": found.right, "wrong": found.wrong, "undecided": found.undecided, "accuracy": value, "low": low,
        "high": high,
    }  # fmt: skip


def _toml(name: str, principles: Sequence[dict[str, Any]], held_out: Reconstruction) -> str:
    document = tomlkit.document()
    total = held_out.right + held_out.wrong + held_out.undecided
    document.add(tomlkit.comment(f"Found from preferences; gives back {held_out.right} of {total} that it never saw."))
    document.add("name", tomlkit.item(name))
    entries = tomlkit.aot()
    for p in principles:
        entry = tomlkit.table()
        entry.update({key: p[key] for key in ("id", "text", "weight")})
        entry.add(tomlkit.comment(f"{p['votes_for']} votes for, {p['votes_against']} against"))
        entries.append(entry)
    document.add("principles", entries)
    return tomlkit.dumps(document)


def _constitution(path: str | Path) -> Constitution:
    return load_constitution(data_file(str(path), suffix="constitutions/*.toml"))


def _engine(model: str | Engine) -> Engine:
    """A model by its spec, with its answers kept; an engine is taken as it is."""
    if not isinstance(model, str):
        return model
    return CachedEngine(open_engine(Judge(name="writer", kind="pairwise", model=model)), answers_file())


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
