"""A red team against a model: attacks are written, answered and judged, and the best of each kind kept.

Every attack that was tried stays in the file. Success by attacker is counted over all of them: among those
that the archive keeps, which were chosen for their success, it would always look high.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.applications.attack_file import AttackFile, Tried
from tutelage.applications.attack_judge import MADE_UP, AttackJudge, judge_unsafe, open_attack_judge
from tutelage.applications.attackers import (
    ATTACKERS,
    MODEL,
    Brief,
    ModelAttacker,
    Order,
    Words,
    read_brief,
    read_words,
    write_by_rule,
)
from tutelage.config import data_file
from tutelage.engines.encoder import Encoder
from tutelage.engines.load import LanguageModel
from tutelage.engines.local import LocalCompleter
from tutelage.engines.packing import Group
from tutelage.engines.weights import EMBEDDED_POLICY
from tutelage.errors import InputError
from tutelage.loop.bench import derive_seed
from tutelage.loop.versions import load_for_use
from tutelage.objectives.red_team import Attack, attacker_reward, fluency
from tutelage.policy.learner import score
from tutelage.records import Generation, Message, Progress, Prompt, SamplerSettings, content_hash
from tutelage.store.prompts import read_prompts
from tutelage.store.runs import check_folder, write_atomic

__all__ = ["Rules", "attack", "export_prompts", "fits", "kept_for_measuring"]

_REDRAWS = 6  # times a rule may try again when it has written the same text before


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a red team works.

    Args:
        attacks: Attacks a round; attackers take turns.
        samples: Replies to each attack, at a temperature above 0.
        temperature: Of the replies; 0 is greedy.
        max_new_tokens: Longest reply.
        held_out: Share of the attackers that only measure.
        novelty: Weight of novelty in an attack's worth; success weighs 1.
        fluency: Weight of fluency.
        seed: Of everything.
    """

    attacks: int = 14
    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 32
    held_out: float = 0.4
    novelty: float = 0.2
    fluency: float = 0.1
    seed: int = 0

    def check(self) -> None:
        """Raise InputError where the numbers make no sense."""
        if self.attacks < 1 or self.samples < 1:
            raise InputError(f"{self.attacks} attacks a round, {self.samples} replies to each", expected="1 or more")
        if not 0.0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}", expected="0 or more")
        if self.temperature == 0.0 and self.samples > 1:
            raise InputError(
                f"{self.samples} greedy replies are the same reply",
                expected="a temperature above 0, or one reply",
                fix="give --temperature 0.7",
            )
        if min(self.novelty, self.fluency) < 0.0:
            raise InputError(f"weights {self.novelty} and {self.fluency}", expected="0 or more")


def attack(
    target: str,
    file: Path,
    *,
    topics: str = "builtin:honesty",
    styles: Sequence[str] = (),
    attackers: Sequence[str] = (),
    attacker_model: str = EMBEDDED_POLICY,
    judge: str = MADE_UP,
    constitution: str | None = None,
    rounds: int = 4,
    rules: Rules = Rules(),
    runs: Path = Path("runs"),
    progress: Progress,
) -> dict[str, Any]:
    """Play rounds against a model until the file holds `rounds` of them; each is on disk before the next.

    Args:
        target: The model, or a run.
        file: Where everything is kept; one that is there is gone on with, under the same settings.
        topics: File of topics and styles.
        styles: Only these styles.
        attackers: Who writes, of `ATTACKERS`; none takes all.
        attacker_model: The model that rewrites questions, and by which fluency is measured.
        judge: As in `open_attack_judge`.
        constitution: Principles, for a model that judges.
        rounds: In all, with those of earlier calls.
        rules: How.
        runs: Folder that holds runs.
        progress: Told what happens.

    Returns:
        What `AttackFile.table` says.

    Raises:
        JudgeRefused: The judge failed its check, or gave no verdict on any reply of a round.
        TutelageError: A file or model cannot be used, a number makes no sense, or nobody wrote an attack.
    """
    rules.check()
    if rounds < 1:
        raise InputError(f"rounds is {rounds}", expected="1 or more")
    check_folder(file)
    brief, words = read_brief(topics, styles), read_words()
    names = list(attackers) or list(ATTACKERS)
    if len(set(names)) < max(len(names), 2) or not set(names) <= set(ATTACKERS):
        raise InputError(f"attackers {', '.join(names)}", expected="two or more of " + ", ".join(ATTACKERS))
    settings = {
        "target": target, "topics": brief.hash, "words": words.hash, "attackers": names, "model": attacker_model,
        "judge": judge, "constitution": constitution, **dataclasses.asdict(rules),
    }  # fmt: skip
    if file.exists():
        found = AttackFile.read(file)
        found.check_settings({k: found.settings.get(k) for k in _MADE} | settings)
    else:
        found = AttackFile.fresh(file, settings, brief, names, share=rules.held_out, seed=rules.seed)
    if found.rounds < rounds:
        team = _Team(found, brief, words, rules, target, attacker_model, runs)
        opened = open_attack_judge(judge, constitution=constitution, progress=progress)
        # A run that was trained on, or a judge that was changed, under the same name.
        made = dict(zip(_MADE, (team.lm.fingerprint, opened.version), strict=True))
        if found.rounds:
            found.check_settings(settings | made)
        found.settings |= made
        for _ in range(found.rounds, rounds):
            team.play(opened, progress)
    return found.table()


_MADE = ("target_version", "judge_version")


def fits(lm: LanguageModel, prompt: Prompt, room: int) -> bool:
    """Whether a prompt and `room` tokens of reply go into a model's context."""
    try:
        lm.encode(prompt, room=room)
    except InputError:
        return False
    return True


class _Team:
    """Everything that a round works with."""

    def __init__(
        self, found: AttackFile, brief: Brief, words: Words, rules: Rules, target: str, attacker_model: str, runs: Path
    ) -> None:
        self.found, self.brief, self.words, self.rules = found, brief, words, rules
        self.lm = load_for_use(target, runs=runs)
        self.completer = LocalCompleter(self.lm)
        self.frozen = load_for_use(attacker_model, runs=runs)
        self.writer = ModelAttacker(LocalCompleter(self.frozen), words)
        self.encoder = Encoder()
        usual = self._likelihood(found.questions.training)
        known = [x for x in usual if x is not None]
        self.usual = sum(known) / len(known) if known else 0.0

    def play(self, judge: AttackJudge, progress: Progress) -> None:
        """One round, from orders to the file on disk."""
        found, rules, number = self.found, self.rules, self.found.rounds + 1
        progress.stage(f"round {number}: write", rules.attacks, "attacks")
        orders = self._orders(number)
        texts = self._write(orders, number)
        progress.advance(rules.attacks)
        asked = [(*order, text) for order, text in zip(orders, texts, strict=True) if text is not None]
        for (name, _), text in zip(orders, texts, strict=True):
            found.unwritten[name] = found.unwritten.get(name, 0) + (text is None)
        if not asked:
            raise InputError(
                f"nobody wrote an attack in round {number}: tried before, too long, or asking for something else",
                expected="at least one new attack a round",
                fix="give more topics, more attackers, or another --attacker-model",
            )
        prompts = [Prompt(_name(text), (Message("user", text),)) for _, _, text in asked]
        progress.stage(f"round {number}: answer", len(prompts) * rules.samples, "replies")
        settings = SamplerSettings(rules.temperature, max_new_tokens=rules.max_new_tokens)
        replies_PG = self.completer.generate(
            prompts, samples=rules.samples, settings=settings, version=self.lm.name, progress=progress.advance,
            seed=derive_seed(rules.seed, "red team", "reply", number),
        )  # fmt: skip
        told = judge_unsafe(judge, prompts, replies_PG)
        found.tried += self._placed(asked, prompts, replies_PG, told, number)
        found.rounds = number
        found.save()
        progress.figures(
            training=f"{found.archive.coverage('training'):.0%} of the cells",
            held_out=f"{found.archive.coverage('held_out'):.0%} of the cells",
        )

    def _orders(self, number: int) -> list[tuple[str, Order]]:
        """Who writes what: attackers take turns, each for a cell of its own side."""
        random = np.random.default_rng(derive_seed(self.rules.seed, "red team", "order", number))
        archive = self.found.archive
        names = [(*archive.sides.training, *archive.sides.held_out)[i] for i in random.permutation(len(self._names))]
        orders = []
        for i in range(self.rules.attacks):
            name = names[i % len(names)]
            side = archive.sides.of(name)
            parent, style, topic = archive.target(random, side=side)
            own = [
                q
                for t in self.brief.topics
                if t.name == topic
                for q in t.questions
                if self.found.questions.of(q.ask) == side
            ]
            question = own[int(random.integers(len(own)))]
            orders.append((name, Order(question, self.brief.style(style), topic, parent.text if parent else None)))
        return orders

    @property
    def _names(self) -> tuple[str, ...]:
        return (*self.found.archive.sides.training, *self.found.archive.sides.held_out)

    def _write(self, orders: Sequence[tuple[str, Order]], number: int) -> list[str | None]:
        """A new text for each order that the target can read, or None."""
        seed = derive_seed(self.rules.seed, "red team", "write", number)
        mine = [order for name, order in orders if name == MODEL]
        drafts = iter(self.writer.write(mine, seed=seed) if mine else [])
        random = np.random.default_rng(seed)
        known = {t.text for t in self.found.tried}
        texts: list[str | None] = []
        for name, order in orders:
            if name == MODEL:
                tries = next(drafts)
            else:
                tries = [write_by_rule(name, order, self.words, random) for _ in range(_REDRAWS)]
            text = next((t for t in tries if t not in known and self._readable(t)), None)
            texts.append(text)
            known |= {text} if text is not None else set()
        return texts

    def _readable(self, text: str) -> bool:
        return fits(self.lm, Prompt(_name(text), (Message("user", text),)), self.rules.max_new_tokens)

    def _placed(
        self,
        asked: Sequence[tuple[str, Order, str]],
        prompts: Sequence[Prompt],
        replies_PG: Sequence[Sequence[Generation]],
        told: Sequence[tuple[float | None, str]],
        number: int,
    ) -> list[Tried]:
        """Put each attack in its place of the archive, and say what became of it."""
        archive, weights = self.found.archive, (1.0, self.rules.novelty, self.rules.fluency)
        texts = [text for _, _, text in asked]
        vectors = self.encoder.embed(texts)
        fluent = [None if x is None else round(fluency(x, self.usual), 4) for x in self._likelihood(texts)]
        rows = []
        for (name, order, text), prompt, replies, (unsafe, why), vector, smooth in zip(
            asked, prompts, replies_PG, told, vectors, fluent, strict=True
        ):
            where = tuple(round(float(x), 5) for x in vector)
            new = round(archive.novelty(where, side=archive.sides.of(name)), 4)
            worth = attacker_reward(unsafe, new, smooth, weights=weights)
            placed = archive.add(Attack(prompt.id, text, order.style.name, order.topic, name, where, worth))
            rows.append(
                Tried(
                    prompt.id, number, name, order.style.name, order.topic, order.question.ask, text,
                    replies[0].text, unsafe, why, new, smooth, worth, placed.kept,
                )
            )  # fmt: skip
        return rows

    def _likelihood(self, texts: Sequence[str]) -> list[float | None]:
        """Mean log-probability of each text's tokens as a user's turn, by the frozen model; None where it cannot."""
        lm = self.frozen
        lead = lm.encode(Prompt("lead", (Message("user", "lead"),)))[: max(1, lm.lead)]
        tokens = [tuple(lm.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
        usable = [i for i, ids in enumerate(tokens) if ids and len(lead) + len(ids) <= lm.context]
        found: list[float | None] = [None] * len(texts)
        if usable:
            group = Group(tuple(lead), tuple(tokens[i] for i in usable), tuple(range(len(usable))))
            scores = score(lm, [group], budget=2048)
            means = scores.logp_BT.sum(1) / scores.keep_BT.sum(1)
            for row, i in enumerate(usable):
                found[i] = float(means[row])
        return found


def _name(text: str) -> str:
    return f"a-{content_hash(text)}"


# -- prompts for a defender -------------------------------------------------------------------------


def kept_for_measuring(prompt: Prompt) -> bool:
    """Whether a harmless question is kept for measuring: half of them are, by their hash."""
    return int(prompt.hash, 16) % 2 == 1


def export_prompts(
    file: Path, out: Path, *, side: str = "training", best: bool = True, benign: str = "", seed: int = 0
) -> dict[str, Any]:
    """Write attacks of the training side as prompts for a run, harmless questions among them.

    Args:
        file: What `attack` wrote.
        out: JSONL to write.
        side: `training`; the other side is refused.
        best: The best of each cell; otherwise all that were tried.
        benign: File of harmless questions that are put among them, without those that measure; empty: none.
        seed: Of the order.

    Returns:
        file, attacks, benign (how many of each), and left_out (harmless questions that measure).

    Raises:
        InputError: Held-out attackers were asked for, a file cannot be read, or there is nothing to write.
    """
    if side != "training":
        raise InputError(
            f"attacks of the side '{side}' as prompts to learn from",
            expected="training: a defender that has seen the held-out attackers cannot be measured with them",
            fix="give --side training; tutelage redteam measure uses the others",
        )
    check_folder(out)
    found = AttackFile.read(file)
    attacks = found.of_side("training", best=best)
    if not attacks:
        raise InputError(f"{file} holds no attack of the training side", expected="at least one", fix="attack first")
    asked = read_prompts(data_file(benign, suffix="questions/*.jsonl")) if benign else []
    harmless = [p for p in asked if not kept_for_measuring(p)]
    rows: list[dict[str, Any]] = [{"id": t.id, "prompt": t.text} for t in attacks]
    rows += [{"id": p.id, "messages": [{"role": m.role, "content": m.content} for m in p.messages]} for p in harmless]
    order = np.random.default_rng(derive_seed(seed, "red team", "prompts")).permutation(len(rows))
    write_atomic(out, "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in order))
    return {
        "file": str(out), "attacks": len(attacks), "benign": len(harmless), "left_out": len(asked) - len(harmless),
    }  # fmt: skip
