"""What somebody values, found by asking: the questions, what to ask next, and weights for a recipe.

A question shows two replies to one prompt. Every answer is a label in a file that only grows, and the
posterior follows from the labels that stand: so an answer can be taken back, and nothing is lost. Choices that the
file of candidates holds already count as well.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import expit

from tutelage.applications.judging import answers_file, parse_judge, refuse_untrusted, rollouts
from tutelage.applications.value_bank import Bank, read_bank
from tutelage.config import Recipe, data_file, load_recipe
from tutelage.errors import InputError, RecipeError
from tutelage.feedback.constitution import load_constitution
from tutelage.feedback.human import Label, Task, append_label, now, read_labels
from tutelage.feedback.model_judge import ComparingJudge, Pair
from tutelage.feedback.roster import open_judge
from tutelage.objectives.cooperative import bald, evoi, plausible
from tutelage.objectives.values import ValuePosterior
from tutelage.records import Progress, Prompt, content_hash
from tutelage.rewards.compose import normalise
from tutelage.store.runs import Run, check_folder, write_atomic

__all__ = [
    "Asker", "Bank", "Choose", "ask_judge", "candidates_of_run", "foretold", "learn", "named", "open_one", "read_bank",
    "show", "write_recipe",
]  # fmt: skip

Choose = Literal["bald", "evoi", "random"]

_DRAWS = 500  # of the weights, by which EVOI is worked out
_FOLDS = 5
_FIRST = {0: 1.0, 1: 0.0, "tie": 0.5, "both_bad": 0.5, "skip": None}


class Asker:
    """Chooses questions, and keeps the posterior that follows from the answers.

    Args:
        bank: The questions.
        path: Where the posterior is kept.
        annotator: Whose values these are.
        questions: How many are asked in all, unanswered ones among them.
        how: The question of which the answer tells most about the weights, or betters most which reply is picked of
            each prompt's, or any.
        cost: Of a question to whoever answers, in worth a prompt's pick: with evoi none is asked that does not better
            it by more; 0 asks all.
        prior: Standard deviation of each weight before any answer.
        seed: Of the order in which any are asked, and of draws.

    Raises:
        InputError: The labels beside `path` are another's.
        RecipeError: No question is wanted, or a cost that is not read or makes no sense.
    """

    def __init__(
        self,
        bank: Bank,
        path: Path,
        *,
        annotator: str,
        questions: int = 30,
        how: Choose = "bald",
        cost: float = 0.0,
        prior: float = 1.0,
        seed: int = 0,
    ) -> None:
        if questions < 1:
            raise RecipeError(f"{questions} questions", expected="at least 1", fix="leave it out for 30")
        if not cost >= 0.0 or (cost and how != "evoi"):
            raise RecipeError(
                f"a cost of {cost} with questions chosen by {how}", expected="0 or more, and evoi, which weighs it",
                fix="leave the cost out, or choose by evoi",
            )  # fmt: skip
        check_folder(path)
        self.bank, self.path, self.annotator, self.prior = bank, path, annotator, prior
        self.how, self.cost, self.seed = how, cost, seed
        self.gain: float | None = None  # of the question that evoi chose last, a prompt's pick
        self._options_AK = np.concatenate(bank.options)
        self._starts_D = [0, *itertools.accumulate(len(table) for table in bank.options[:-1])]
        self.labels = path.with_suffix(".labels.jsonl")
        others = {one.annotator for one in read_labels(self.labels)} - {annotator}
        if others:
            raise InputError(
                f"{self.labels} holds answers of {', '.join(sorted(others))}",
                expected=f"those of {annotator} alone: one file is what one person values",
                fix="choose another --out",
            )
        self._row = {task.id: n for n, task in enumerate(bank.tasks)}
        self._delta_NK = bank.first_NK - bank.second_NK
        self._open = plausible(self._delta_NK)
        self.questions = min(questions, int(self._open.sum()))
        order = sorted(range(len(bank.tasks)), key=lambda n: content_hash([seed, bank.tasks[n].id]))
        self._shuffled = [n for n in order if self._open[n]] if how == "random" else None
        self._seen: tuple[str, ValuePosterior] | None = None
        ValuePosterior(bank.names, prior=prior)  # refuses a prior that makes no sense

    def posterior(self, done: Mapping[str, Label]) -> ValuePosterior:
        """What choices and answers say, oldest first; answers to what the file no longer asks do not count."""
        state = content_hash([[one.task, one.answer, one.log_odds] for one in done.values()])
        if self._seen is None or self._seen[0] != state:
            found = ValuePosterior(self.bank.names, prior=self.prior)
            for phi_CK, chosen in self.bank.choices:
                found.demonstrate(phi_CK.tolist(), chosen)
            found.skipped += self.bank.choiceless
            for name, one in done.items():
                row = self._row.get(name)
                if row is not None:
                    found.compare(self.bank.first_NK[row], self.bank.second_NK[row], _share(one))
            self._seen = (state, found)
        return self._seen[1]

    def next(self, done: Mapping[str, Label]) -> Task | None:
        """The question to ask now; None when enough were asked, none is left, or none is worth its cost."""
        if len(done) >= self.questions:
            return None
        if self._shuffled is not None:
            return next((self.bank.tasks[n] for n in self._shuffled if self.bank.tasks[n].id not in done), None)
        rows = np.array([n for n in np.flatnonzero(self._open) if self.bank.tasks[n].id not in done], dtype=int)
        if not len(rows):
            return None
        known = self.posterior(done)
        worth_N = bald(known.mean_K, known.covariance_KK, self._delta_NK[rows])
        if self.how == "evoi":
            draws = known.sample(_DRAWS, np.random.default_rng([self.seed, len(done)]))
            gain_N = evoi(draws, self._delta_NK[rows], self._options_AK, self._starts_D) / len(self._starts_D)
            self.gain = float(gain_N.max())
            if self.cost and self.gain <= self.cost:
                return None
            # Where no single answer changes a pick, several may: then what tells most.
            worth_N = gain_N if self.gain else worth_N
        return self.bank.tasks[int(rows[worth_N.argmax()])]

    def keep(self, done: Mapping[str, Label]) -> None:
        """Write the posterior; the file appears whole or not at all.

        Raises:
            StoreError: It cannot be written.
        """
        scale = dict(zip(self.bank.names, map(float, self.bank.scale_K), strict=True))
        body = self.posterior(done).to_dict() | {"annotator": self.annotator, "scale": scale}
        write_atomic(self.path, json.dumps(body, ensure_ascii=False) + "\n")

    def answered(self) -> dict[str, Label]:
        """The answers so far, by question."""
        return {one.task: one for one in read_labels(self.labels) if one.task in self._row}


def learn(bank: Bank, path: Path, *, annotator: str, prior: float = 1.0) -> None:
    """Write what the choices of a file say, with the answers that stand beside `path`.

    Raises:
        InputError: The file holds no choice.
    """
    if not bank.choices:
        raise InputError(
            f"the file holds no choice ({bank.choiceless} had no scores, or nothing beside them)",
            expected='lines with "chosen": the place of the best candidate, from 0',
            fix="mark choices, or ask: tutelage values ask",
        )
    asker = Asker(bank, path, annotator=annotator, prior=prior)
    asker.keep(asker.answered())


def foretold(bank: Bank, *, prior: float = 1.0) -> dict[str, Any] | None:
    """How well the choices of a file foretell each other: each fifth of them by the weights that the others give.

    Returns:
        `choices`, the share `right` of those whose chosen reply is worth most, and `chance`, what guessing gives; None
        with fewer than two.
    """
    count = len(bank.choices)
    if count < 2:
        return None
    right = 0.0
    for fold in range(min(_FOLDS, count)):
        known = ValuePosterior(bank.names, prior=prior)
        for n, (phi_CK, chosen) in enumerate(bank.choices):
            if n % _FOLDS != fold:
                known.demonstrate(phi_CK.tolist(), chosen)
        for phi_CK, chosen in bank.choices[fold::_FOLDS]:
            best_C = np.isclose(worth_C := phi_CK @ known.mean_K, worth_C.max())
            right += float(best_C[chosen]) / float(best_C.sum())
    chance = sum(1.0 / len(phi_CK) for phi_CK, _ in bank.choices) / count
    return {"choices": count, "right": right / count, "chance": chance}


def _share(one: Label) -> float | None:
    if one.answer == "skip":
        return None
    return _FIRST[one.answer] if one.log_odds is None else float(expit(one.log_odds))


def open_one(spec: str, *, constitution: str | None, progress: Progress) -> ComparingJudge:
    """A judge from a few words, ready to answer.

    Raises:
        JudgeRefused: It failed its check.
        TutelageError: Something it needs is missing.
    """
    rules = load_constitution(data_file(constitution, suffix="constitutions/*.toml")) if constitution else None
    judge = open_judge(parse_judge(spec), rules, answers=answers_file(), say=progress.say)
    refuse_untrusted([judge], others=False, allowed=False)
    return judge


def named(judge: ComparingJudge) -> str:
    """What a judge is called where people answer, too: its version is part of it."""
    return f"judge:{judge.name}@{judge.version[:8]}"


def ask_judge(asker: Asker, judge: ComparingJudge, progress: Progress) -> dict[str, Any]:
    """Let a judge answer instead of a person, question by question; its abstentions are left unanswered.

    Its log-odds are taken as they are: a weak preference weighs less than a strong one.

    Raises:
        StoreError: An answer cannot be kept.
    """
    done = asker.answered()
    before = len(done)
    progress.stage(f"ask {judge.name}", max(asker.questions - before, 0), "questions")
    while (task := asker.next(done)) is not None:
        began = time.monotonic()
        (said,) = judge.compare([Pair(Prompt(task.id, task.messages), *task.candidates)])
        answer: Any = "skip" if said.value is None else "tie" if said.value == 0 else int(said.value < 0)
        seconds = round(time.monotonic() - began, 3)
        one = Label(task.id, "pair", asker.annotator, answer, (0, 1), seconds, now(), said.reason, said.value)
        append_label(asker.labels, one)
        done[task.id] = one
        asker.keep(done)
        progress.advance()
    asker.keep(done)
    return {"labels": str(asker.labels), "labelled": len(done), "new": len(done) - before}


def candidates_of_run(run_folder: Path, out: Path) -> dict[str, Any]:
    """Write the replies of a run's rounds with the terms of their rewards, normalised within their group.

    Raises:
        InputError: The run holds no replies of rounds, or `out` is in no folder.
    """
    check_folder(out)
    opened = Run.open(run_folder, write=False)
    try:
        prompts, replies_PG = rollouts(opened)
        raw = {row["generation_id"]: row["raw"] for row in opened.ledger.rows("rewards")}
    finally:
        opened.close()
    names = list(dict.fromkeys(name for terms in raw.values() for name in terms))
    lines, count = [], 0
    for prompt, replies in zip(prompts, replies_PG, strict=True):
        terms = {name: normalise([raw.get(r.id, {}).get(name) for r in replies]) for name in names}
        # Equal texts have equal scores, unless a judge is not of one mind; the first one stands.
        chosen = {r.text: g for g, r in reversed(list(enumerate(replies))) if r.text.strip()}
        if len(chosen) > 1:
            texts = sorted(chosen, key=lambda text: chosen[text])
            features = [{name: terms[name][chosen[text]] for name in names} for text in texts]
            turns = [dataclasses.asdict(m) for m in prompt.messages]
            lines.append(json.dumps({"prompt": turns, "candidates": texts, "features": features}, ensure_ascii=False))
            count += len(texts)
    if not lines:
        raise InputError("no prompt of the run has two replies that differ", expected="replies to compare")
    write_atomic(out, "\n".join(lines) + "\n")
    return {"file": str(out), "prompts": len(lines), "replies": count, "values": names}


def show(path: Path, *, level: float = 0.9) -> dict[str, Any]:
    """What is believed of somebody's values, and from how much."""
    found, annotator = _load(path)
    limits_K2 = found.interval(level)
    values = [
        {"value": name, "weight": float(mean), "low": float(low), "high": float(high)}
        for name, mean, (low, high) in zip(found.names, found.mean_K, limits_K2, strict=True)
    ]
    values.sort(key=lambda one: -abs(one["weight"]))  # type: ignore[arg-type]
    body = {"annotator": annotator, "answers": len(found), "unanswered": found.skipped, "level": level}
    return body | {"values": values, "words": found.explain(level)}


def _load(path: Path) -> tuple[ValuePosterior, str]:
    found = ValuePosterior.load(path)
    return found, str(json.loads(path.read_text(encoding="utf-8")).get("annotator", ""))


def write_recipe(path: Path, out: Path, *, recipe: str = "honesty") -> dict[str, Any]:
    """Put the weights found into a recipe: of reward terms and of judges that are called like a value.

    Together they weigh what they weighed before, beside the terms that were not asked about. A recipe knows
    no negative weight: a value that is liked less the more there is of it gets 0, and its judge is left out.

    Args:
        path: What `Asker.keep` wrote.
        out: The recipe to write, every key spelled out.
        recipe: Built-in name or file of the recipe to start from.

    Returns:
        file, weights by name, disliked (weights of 0 that would be negative), unclear (intervals that hold 0).

    Raises:
        RecipeError: A value is no term of the recipe, or none is liked.
        InputError: Nothing was answered yet, or `out` is in no folder.
    """
    found, _ = _load(path)
    if not len(found):
        raise InputError(f"{path} holds no answer", expected="at least one", fix="ask: tutelage values ask")
    check_folder(out)
    base = load_recipe(recipe)
    before = base.rewards.model_dump() | {judge.name: judge.weight for judge in base.judges}
    strange = [name for name in found.names if name not in before]
    if strange:
        raise RecipeError(
            f"'{strange[0]}' is a value, and no term of the recipe '{base.name}'",
            expected=f"values among {', '.join(before)}",
            fix="name a recipe whose [[judges]] are called like the values: --recipe FILE",
        )
    liked = {name: max(float(mean), 0.0) for name, mean in zip(found.names, found.mean_K, strict=True)}
    mass, whole = sum(liked.values()), sum(before[name] for name in liked) or 1.0
    if mass <= 0.0:
        raise RecipeError("no value has a weight above 0", expected="at least one that is liked", fix="ask more")
    after = {name: round(weight / mass * whole, 4) for name, weight in liked.items()}
    data = base.model_dump(mode="json")
    data["rewards"] |= {name: weight for name, weight in after.items() if name in data["rewards"]}
    data["judges"] = [
        judge | {"weight": after.get(judge["name"], judge["weight"])}
        for judge in data["judges"]
        if after.get(judge["name"], 1.0) > 0.0
    ]
    made = Recipe.model_validate(data)
    write_atomic(out, made.to_toml())
    low_high = dict(zip(found.names, found.interval(), strict=True))
    unclear = [name for name, (low, high) in low_high.items() if low <= 0.0 <= high]
    disliked = [name for name, mean in zip(found.names, found.mean_K, strict=True) if mean < 0.0]
    return {"file": str(out), "weights": after, "disliked": disliked, "unclear": unclear}
