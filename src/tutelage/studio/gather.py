"""What the report shows, read from a run's folder. Counts and shares only; nothing is measured anew.

A section without data says so: `gaps` holds, by section, what is missing and why that may be.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.records import Kind
from tutelage.store.ledger import Ledger
from tutelage.store.runs import Run
from tutelage.studio import samples
from tutelage.studio.figures import Measure, curves, gate_shares, measures, share_bars, thin
from tutelage.studio.page import Caps, Comparison, DecisionView, JudgeRow, Principle, ReportData
from tutelage.studio.samples import Card, Text, balanced, clip, order_key, tally
from tutelage.studio.triggers import blamed

__all__ = ["gather"]

Rows = Sequence[Mapping[str, Any]]
_KINDS: tuple[Kind, ...] = ("answerable", "unanswerable", "ambiguous")
_KNOWN_NOTES = {
    "constitution", "critic", "judges", "watched", "pieces", "self_view", "failures", "heldout_pairs", "triggers",
}  # fmt: skip


def gather(run: Run, caps: Caps | None = None) -> ReportData:
    """Read a run, finished or not.

    Raises:
        StoreError: The ledger cannot be read.
    """
    caps = caps or Caps()
    ledger, summary = run.ledger, run.summary() or {}
    units, notes, rows = ledger.units(), _notes(ledger), ledger.rows
    versions = {u["name"]: u["version"] for u in units}
    metrics, decisions = rows("metrics"), rows("decisions")
    prompts = {p["id"]: _conversation(p["messages"]) for p in rows("prompts")}
    generations, shown_cards, cards_total = _judged(run, units, prompts, caps)
    credits, pieces = rows("credits"), _merged(notes.get("pieces", []))
    judged, rewards, all_targets = rows("verdicts"), rows("rewards"), rows("targets")
    own = _first_replies(generations, {t["unit"] for t in all_targets})
    numbers, measured_by = _measures(summary, decisions)
    suites = _suites(run)
    comparison = _comparison(suites, _versions(summary, units, decisions), caps)
    if not any(m["stage"] == "gate" for m in metrics):
        metrics += gate_shares(suites[1])
    limit = run.recipe.constraint.limit if run.recipe.constraint.enabled else None
    heat = samples.heat_replies(credits, generations, prompts, pieces, caps.heat, caps.characters)
    constitution = _last_mapping(notes, "constitution")
    found = ReportData(
        run=run.name,
        title=run.recipe.title or run.recipe.name,
        model=str(summary.get("model") or run.recipe.model.name),
        state=str(summary.get("decision") or "unfinished"),
        principles=_principles(constitution, caps),
        constitution=(str(constitution.get("name", "")), str(constitution.get("hash", ""))),
        measures=numbers,
        measured_by=measured_by,
        comparison=comparison,
        curves=tuple(curves(metrics, versions, limit, caps.points)),
        judges=_judges(judged, caps),
        cards=tuple(shown_cards),
        cards_total=cards_total,
        heat=tuple(heat),
        heat_total=len(credits),
        blamed=tuple(blamed(notes.get("triggers", []), caps.heat, caps.characters)),
        decisions=_decisions(decisions, caps),
        decisions_total=len(decisions),
        targets=tuple(samples.targets(all_targets, prompts, own, caps.targets, caps.characters)),
        target_counts=tuple(tally(all_targets, "origin", "principle")[: caps.lines]),
        self_view=_self_view(_last_mapping(notes, "self_view"), caps),
        failures=tuple(clip(f, caps.characters) for f in _flat(notes.get("failures", []))[: caps.lines]),
        losses=_losses(metrics, judged, rewards, decisions),
        units=tuple(units[i] for i in thin(len(units), max(2, caps.lines))),
        facts=_facts(summary, units, run),
        hashes=_hashes(run, summary, constitution, judged)[: caps.lines],
        critic=tuple((k, float(v)) for k, v in _last_mapping(notes, "critic").items() if isinstance(v, int | float)),
        checks=_checks(notes.get("judges", []), caps),
        notes=_other_notes(notes, caps),
        recipe=run.recipe.to_toml(),
        caps=caps,
        gaps={},
    )
    return dataclasses.replace(found, gaps=_gaps(found, bool(credits), bool(pieces)))


# ---------------------------------------------------------------- notes


def _notes(ledger: Ledger) -> dict[str, list[Any]]:
    """Bodies by topic, in the order they were kept."""
    found: dict[str, list[Any]] = {}
    for note in ledger.rows("notes"):
        found.setdefault(note["topic"], []).append(note["body"])
    return found


def _checks(bodies: Sequence[Any], caps: Caps) -> tuple[tuple[str, str, Text], ...]:
    """Name, outcome of the check and why, of the run's own judges."""
    rows = [j for body in bodies if isinstance(body, list) for j in body if isinstance(j, Mapping)]
    return tuple(
        (str(j.get("name", "")), str(j.get("outcome", "")),
         clip("; ".join(map(str, j.get("why") or [])), 2 * caps.characters))
        for j in rows[: caps.lines]
    )  # fmt: skip


def _last_mapping(notes: Mapping[str, list[Any]], topic: str) -> Mapping[str, Any]:
    """The newest note of a topic that is a mapping, or an empty one."""
    return next((b for b in reversed(notes.get(topic, [])) if isinstance(b, Mapping)), {})


def _merged(bodies: Sequence[Any]) -> dict[str, Any]:
    """All mappings of a topic as one, later ones winning."""
    return {k: v for body in bodies if isinstance(body, Mapping) for k, v in body.items()}


def _flat(bodies: Sequence[Any]) -> list[Any]:
    """Notes that are lists, joined; a note that is a single text counts as one entry."""
    return [entry for body in bodies for entry in (body if isinstance(body, list) else [body])]


def _other_notes(notes: Mapping[str, list[Any]], caps: Caps) -> tuple[tuple[str, Text], ...]:
    found = []
    for topic, bodies in notes.items():
        if topic not in _KNOWN_NOTES:
            groups = samples.figures_of(bodies[-1], caps.lines)
            lines = [f"{group} {name} {value}".strip() for group, entries in groups for name, value in entries]
            found.append((topic, clip("\n".join(lines), 2 * caps.characters)))
    return tuple(found[: caps.lines])


def _principles(note: Mapping[str, Any], caps: Caps) -> tuple[Principle, ...]:
    entries = note.get("principles")
    return tuple(
        Principle(str(p.get("id", "")), clip(p.get("text", ""), caps.characters), str(p.get("scope", "")),
                  str(p.get("wants", "")), p.get("weight"))
        for p in (entries if isinstance(entries, list) else [])[: caps.lines]
        if isinstance(p, Mapping)
    )  # fmt: skip


def _self_view(note: Mapping[str, Any], caps: Caps) -> tuple[tuple[Text, Text, Text], ...]:
    entries = note.get("questions")
    keys = ("question", "reply_before", "reply_after")
    return tuple(
        (clip(q.get(keys[0], ""), caps.characters), clip(q.get(keys[1], ""), caps.characters),
         clip(q.get(keys[2], ""), caps.characters))
        for q in (entries if isinstance(entries, list) else [])[: caps.lines]
        if isinstance(q, Mapping)
    )  # fmt: skip


# ---------------------------------------------------------------- replies and judges


def _conversation(messages: Sequence[Mapping[str, str]]) -> str:
    """A single turn as it is; several with who spoke."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)


def _judged(
    run: Run, units: Rows, prompts: Mapping[str, str], caps: Caps
) -> tuple[dict[str, Mapping[str, Any]], list[Card], int]:
    """All replies without their tokens, the cards to show, and how many replies were judged.

    One unit at a time, so that a long run's verdicts are never all cards at once.
    """
    kept: dict[str, Mapping[str, Any]] = {}
    best: list[Card] = []
    total = 0
    for unit in units:
        name = unit["name"]
        mine = [
            {k: g[k] for k in ("id", "unit", "prompt_id", "text", "finished", "policy_version")}
            for g in run.ledger.rows("generations", unit=name)
        ]
        kept |= {g["id"]: g for g in mine}
        made = samples.cards(
            mine, prompts, run.ledger.rows("verdicts", unit=name), run.ledger.rows("rewards", unit=name),
            run.recipe.rewards.model_dump(), caps.characters,
        )  # fmt: skip
        total += len(made)
        first: dict[tuple[str, str], Card] = {}  # replies to one prompt are alike: one a prompt says enough
        for card in sorted(made, key=_card_rank):
            first.setdefault((card.prompt.shown, card.group), card)
        best += balanced(first.values(), lambda c: c.group, _card_rank, caps.cards)
    chosen = balanced(best, lambda c: (c.unit, c.group), _card_rank, caps.cards)
    return kept, sorted(chosen, key=_card_rank), total


def _card_rank(card: Card) -> tuple[float, int, str]:
    """Disagreement first, then abstentions; the rest by hash."""
    return (-(card.spread if card.spread is not None else -1.0), -card.abstained, order_key(card.id))


def _first_replies(generations: Mapping[str, Mapping[str, Any]], units: set[str]) -> dict[str, str]:
    """What the model itself had said to each prompt, in the units that chose targets."""
    found: dict[str, str] = {}
    for row in generations.values():
        if row["unit"] in units:
            found.setdefault(row["prompt_id"], row["text"])
    return found


def _judges(verdicts: Rows, caps: Caps) -> tuple[JudgeRow, ...]:
    by_judge: dict[str, list[Mapping[str, Any]]] = {}
    for v in verdicts:
        by_judge.setdefault(v["judge"], []).append(v)
    found = []
    for name, mine in list(by_judge.items())[: caps.lines]:
        silent = [_bare(v["reason"]) for v in mine if v["value"] is None]
        reasons = tuple((clip(r, caps.characters), n) for r, n in Counter(silent).most_common(4))
        versions = tuple(sorted({v["judge_version"] for v in mine if v["judge_version"]}))
        found.append(JudgeRow(name, len(mine) - len(silent), len(silent), versions, reasons))
    return tuple(found)


# ---------------------------------------------------------------- evidence


def _measures(summary: Mapping[str, Any], decisions: Rows) -> tuple[tuple[Measure, ...], str]:
    """The run's evaluation; before it exists, what the last gate saw. Second: where they come from."""
    if summary.get("evaluation"):
        return measures(summary["evaluation"]), "the run\u2019s final evaluation"
    seen = next((d for d in reversed(decisions) if d["evidence"]), None)
    if seen is None:
        return (), ""
    return measures(seen["evidence"]), f"the gate\u2019s last look (candidate {seen['candidate']})"


def _suites(run: Run) -> tuple[Rows, Rows]:
    """Outcomes on the held-out suite and on the gate's: named as in the recipe, else as usual."""
    by_suite: dict[str, list[Mapping[str, Any]]] = {}
    for row in run.ledger.rows("outcomes"):
        by_suite.setdefault(row["suite"], []).append(row)

    def find(source: str, ending: str) -> Rows:
        name = Path(source.removeprefix("builtin:")).stem
        usual = next((s for s in by_suite if s.endswith(ending)), "")
        return by_suite.get(name) or by_suite.get(usual, [])

    return find(run.recipe.prompts.heldout, "-heldout"), find(run.recipe.prompts.gate, "-gate")


def _versions(summary: Mapping[str, Any], units: Rows, decisions: Rows) -> list[str]:
    """Versions that “after” may mean, the likeliest first."""
    named = [str(summary.get("candidate", ""))]
    return named + [u["version"] for u in reversed(units)] + [d["candidate"] for d in reversed(decisions)]


def _comparison(suites: Sequence[Rows], likely: Sequence[str], caps: Caps) -> Comparison | None:
    """Replies of the start and the last version to the same questions: held-out, else the gate's."""
    for outcomes, stand_in in zip(suites, (False, True), strict=True):
        versions = list(dict.fromkeys(o["version"] for o in outcomes))
        if len(versions) < 2:
            continue
        before = "start" if "start" in versions else versions[0]
        after = next((v for v in [*likely, *reversed(versions)] if v in versions and v != before), versions[-1])
        every = samples.pairs(outcomes, before, after, caps.characters)
        kinds = [*_KINDS, *sorted({p.kind for p in every} - set(_KINDS))]
        shown = balanced(
            sorted(every, key=lambda p: ("worse", "better", "same").index(p.change)),
            lambda p: (p.change, p.kind), lambda p: order_key(p.item), caps.pairs,
        )  # fmt: skip
        changes = tuple((k, dict(Counter(p.change for p in every if p.kind == k))) for k in kinds)
        return Comparison(
            outcomes[0]["suite"], before, after, stand_in, tuple(share_bars(outcomes, kinds, before, after)),
            tuple(c for c in changes if c[1]), tuple(shown), len(every),
        )  # fmt: skip
    return None


def _bare(reason: str) -> str:
    """A reason without the verdict or abstention that it starts with: the page says that beside it."""
    return re.sub("^(abstains|rejected|promoted): ", "", str(reason))


def _decisions(rows: Rows, caps: Caps) -> tuple[DecisionView, ...]:
    return tuple(
        DecisionView(d["unit"], d["gate"], d["candidate"], d["baseline"], bool(d["accepted"]),
                     clip(_bare(d["reason"]), 2 * caps.characters), measures(d["evidence"]))
        for d in rows[-caps.lines :]
    )  # fmt: skip


def _losses(metrics: Rows, verdicts: Rows, rewards: Rows, decisions: Rows) -> tuple[tuple[str, int], ...]:
    """What yielded nothing, counted from ledger rows."""

    def total(key: str) -> int:
        return round(math.fsum(m["values"].get(key, 0) for m in metrics if m["stage"] == "rollout"))

    return (
        ("verdicts in which a judge abstained", sum(v["value"] is None for v in verdicts)),
        ("verdicts in all", len(verdicts)),
        ("replies whose reward is missing", sum(r["total"] is None for r in rewards)),
        ("rewards in all", len(rewards)),
        ("dead groups (all replies got the same reward)", total("dead_groups")),
        ("missing rewards reported while sampling", total("missing_rewards")),
        ("candidates that a gate refused", sum(not d["accepted"] for d in decisions)),
    )


def _facts(summary: Mapping[str, Any], units: Rows, run: Run) -> tuple[tuple[str, str | float | int | None, str], ...]:
    """(name, value, unit) of the run's size and cost."""
    timed: tuple[str, Any, str] = ("Run time", summary.get("seconds"), "seconds")
    if timed[1] is None:
        timed = ("Run time of the finished units", math.fsum(u["seconds"] for u in units), "seconds")
    return (
        timed,
        ("Peak memory", summary.get("peak_memory_bytes"), "bytes"),
        ("Replies generated", summary.get("completions"), ""),
        ("Tokens generated", summary.get("tokens_generated"), ""),
        ("Rounds", summary.get("rounds"), ""),
        ("Version handed over", summary.get("version"), ""),
        ("KL to the start at the end, nats a token", summary.get("kl_to_start"), "figure"),
        ("Seed", run.recipe.seed, ""),
        ("Last unit finished", units[-1]["finished_at"] if units else None, ""),
    )


def _hashes(
    run: Run, summary: Mapping[str, Any], constitution: Mapping[str, Any], verdicts: Rows
) -> tuple[tuple[str, str], ...]:
    found = [("recipe", run.recipe.hash)]
    if summary.get("recipe_hash") not in (None, run.recipe.hash):
        found.append(("recipe, as the summary states it (differs)", str(summary["recipe_hash"])))
    if constitution.get("hash"):
        found.append(("constitution", str(constitution["hash"])))
    seen = dict.fromkeys((v["judge"], v["judge_version"]) for v in verdicts if v["judge_version"])
    return (*found, *((f"judge {judge}", version) for judge, version in seen))


def _gaps(data: ReportData, credits: bool, pieces: bool) -> dict[str, str]:
    """What is missing, by section."""
    early = " The run ended before this was written." if data.state == "unfinished" else ""
    why = {
        "constitution": (data.principles, "the ledger holds no note of the constitution."),
        "measures": (data.measures, "neither a final evaluation nor a gate\u2019s evidence was written."),
        "pairs": (data.comparison, "no suite was answered by two versions, so there is nothing to compare."),
        "curves": (data.curves, "the ledger holds no metrics."),
        "verdicts": (data.cards, "the ledger holds no verdicts on replies."),
        "decisions": (data.decisions, "no gate has decided anything."),
        "targets": (
            data.targets,
            "the ledger holds no targets; the supervised stage did not run or is not done.",
        ),
        "self_view": (data.self_view, "nobody asked the model about itself."),
    }
    found = {key: text + early for key, (there, text) in why.items() if not there}
    if not data.heat:
        reason = (
            "the ledger holds no credit." if not credits else "credit is there, but no readable tokens that fit it."
        )
        found["credit"] = reason + (early if not credits and not pieces else "")
    return found
