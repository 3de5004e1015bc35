"""Critics of texts from labelled data: heads on frozen features, calibrated, with an ensemble's uncertainty.

A critic of classes (toxicity, safety, factuality, support by evidence, sincerity, coherence) learns
from labels, a critic of preference from pairs; both end as calibrated log-odds of one text, to be
used as a judge, as a reward or as a cost. Every figure that a critic carries was measured on rows
from whose families nothing of it was learned.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from scipy import sparse
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from tutelage.errors import InputError, ModelError
from tutelage.feedback.attentive import Attentive
from tutelage.feedback.critic_data import (
    BLOCKS,
    Block,
    Features,
    Passage,
    Reader,
    Source,
)
from tutelage.feedback.critic_heads import Figure, Linear, Pool, centred, measure, measure_pairs
from tutelage.feedback.heads import Committee
from tutelage.feedback.token_states import TokenStates
from tutelage.records import Cost, Generation, Prompt, Verdict

__all__ = ["COSTS", "DESCRIBED", "FOLDS", "POSITIVE", "CriticJudge", "Scores", "TextCritic", "log_odds"]

# The kinds of critic, each with the label that means what it looks for when none is named.
POSITIVE: Mapping[str, str] = {
    "preference": "chosen",
    "safety": "unsafe",
    "toxicity": "toxic",
    "factuality": "factual",
    "evidence": "supports",
    "sincerity": "sincere",
    "coherence": "coherent",
}
COSTS = ("safety", "toxicity")  # their positive label is harm
FOLDS = 5
DESCRIBED = ("kind", "labels", "positive", "source", "contextual", "quality")
_PREFERENCE = ("rejected", "chosen")
Form: TypeAlias = Linear | Committee | Attentive
_FORMS: Mapping[str, type[Form]] = {"linear": Linear, "committee": Committee, "attention": Attentive}


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a critic says of N texts.

    Args:
        probability_NL: Calibrated probability of each label. Of a critic of preference, label 1 is that
            the text would be preferred to an average one of those learned from.
        spread_N: Standard deviation over the ensemble of the positive label's probability.
        log_odds_N: Of the positive label. Of a critic of preference this is the Bradley-Terry reward:
            the difference between two replies to a prompt is the log-odds that the first is preferred.
    """

    probability_NL: np.ndarray
    spread_N: np.ndarray
    log_odds_N: np.ndarray


@dataclasses.dataclass
class TextCritic:
    """Heads on blocks of features, pooled and calibrated.

    Args:
        kind: A key of `POSITIVE`.
        labels: In the order of the columns.
        positive: Which label is looked for.
        source: Which features it reads.
        contextual: Whether it reads contexts; one that learned without them leaves them out.
        heads: By block and form, as `trunk.linear`.
        pool: Makes calibrated probabilities of what the heads say.
        marks: What tells the models that features come from (`Reader.marks`).
        quality: Figures on rows not learned from: value and 95% interval.
    """

    kind: str
    labels: tuple[str, ...]
    positive: int
    source: Source
    contextual: bool
    heads: dict[str, Form]
    pool: Pool
    marks: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    quality: dict[str, Figure] = dataclasses.field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        features: Features,
        labels_N: np.ndarray,
        families_N: np.ndarray,
        *,
        kind: str,
        labels: Sequence[str],
        positive: int,
        source: Source,
        contextual: bool,
        isotonic: bool = False,
        seed: int = 0,
    ) -> TextCritic:
        """Fit a critic of classes on the blocks that `source` names.

        A linear head a block, and on dense blocks a committee of small networks beside it; on tokens one of
        attention. The pool weighs them by what they say of rows they had not seen.

        Args:
            features: Of N texts.
            labels_N: Indices into `labels`.
            families_N: Rows that must not be parted (`families`).
            kind: As in the class, and so the next four.
            labels: In the order of the columns.
            positive: Which label is looked for.
            source: Which blocks to use.
            contextual: Whether the features are those of texts with their contexts.
            isotonic: Calibrate two labels by isotonic regression after the sigmoid; wants many rows.
            seed: Of the folds and networks.
        """
        splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
        folds = list(splitter.split(labels_N, labels_N, families_N))
        heads: dict[str, Form] = {}
        unseen = []
        for block in BLOCKS[source]:
            x_NF = features[block]
            fitted: dict[str, tuple[Form, np.ndarray]] = {}
            if isinstance(x_NF, TokenStates):
                fitted["attention"] = Attentive.fit(x_NF, labels_N, folds, seed=seed)
            else:
                fitted["linear"] = Linear.fit(x_NF, labels_N, folds)
                if not sparse.issparse(x_NF):
                    committee, vote_NL = Committee.fit(x_NF, labels_N, len(labels), members=FOLDS, seed=seed)
                    fitted["committee"] = committee, _log(vote_NL)
            for form, (head, unseen_NL) in fitted.items():
                heads[f"{block}.{form}"] = head
                unseen.append(unseen_NL)
        pool = Pool.fit(np.stack(unseen), labels_N, bias=len(labels) == 2, isotonic=isotonic)
        return cls(kind, tuple(labels), positive, source, contextual, heads, pool)

    @classmethod
    def fit_pairs(
        cls,
        chosen: Features,
        rejected: Features,
        families_N: np.ndarray,
        *,
        source: Source,
        contextual: bool = True,
        disentangle: bool = True,
        seed: int = 0,
    ) -> TextCritic:
        """Fit a critic of preference on the features of N pairs.

        With `disentangle` length gets a head of its own, fitted along and thrown away, as in ODIN (Chen
        et al. 2024, arXiv:2402.07319). Linear heads need no penalty on the correlation with length:
        regression on it takes out of the reward what is left.
        """
        longer_N = (chosen["length"] - rejected["length"])[:, 0]
        aside_N = longer_N * disentangle
        folds = list(GroupKFold(FOLDS, shuffle=True, random_state=seed).split(longer_N, groups=families_N))
        heads: dict[str, Form] = {}
        unseen = []
        for block in BLOCKS[source]:
            here, there = chosen[block], rejected[block]
            if isinstance(here, TokenStates):
                heads[f"{block}.attention"], unseen_NL = Attentive.fit_pairs(here, there, folds, aside_N, seed=seed)
            else:
                heads[f"{block}.linear"], unseen_NL = Linear.fit_pairs(here - there, folds, aside_N)
            unseen.append(unseen_NL)
        labels_N = np.ones(len(longer_N), np.int64)
        if disentangle:
            draft = Pool.fit(np.stack(unseen), labels_N, bias=False)
            reward_N = 2.0 * draft.logits(np.stack(unseen))[:, 1]
            slope = float(reward_N @ longer_N / max(float(longer_N @ longer_N), 1e-12))
            heads["length.linear"] = Linear(np.full((FOLDS, 1, 1), -slope, np.float32), np.zeros((FOLDS, 1)))
            rest_NL = centred((reward_N - slope * longer_N)[:, None])
            # How far to trust what is left is learned anew.
            scale = Pool.fit(rest_NL[None], labels_N, bias=False).weight_H
            pool = Pool(np.append(draft.weight_H, 1.0) * scale, np.zeros(2))
        else:
            pool = Pool.fit(np.stack(unseen), labels_N, bias=False)
        critic = cls("preference", _PREFERENCE, 1, source, contextual, heads, pool)
        average = np.mean([critic.score_features(side).log_odds_N for side in (chosen, rejected)]) / 2
        critic.pool = dataclasses.replace(pool, bias_L=np.array([average, -average]))
        return critic

    @property
    def sign(self) -> float:
        """1 where the positive label is wanted, -1 where it is harm."""
        return -1.0 if self.kind in COSTS else 1.0

    def logits(self, features: Features) -> np.ndarray:
        """(members, N, labels) pooled logits, centred."""
        return self.pool.logits(np.stack([_said(head, features[n.split(".")[0]]) for n, head in self.heads.items()]))

    def score_features(self, features: Features) -> Scores:
        """Score texts of which the features are already there."""
        logits_MNL = self.logits(features)
        logits_NL = logits_MNL.mean(0)
        return Scores(
            self.pool.probability(logits_NL),
            self.pool.probability(logits_MNL)[..., self.positive].std(0),
            log_odds(logits_NL, self.positive),
        )

    def measure(self, features: Features, labels_N: np.ndarray, families_N: np.ndarray) -> dict[str, Figure]:
        """Figures on rows that it did not learn from (`critic_heads.measure`)."""
        said_NL = self.score_features(features).probability_NL
        return measure(said_NL, labels_N, positive=self.positive, families_N=families_N)

    def measure_pairs(self, chosen: Features, rejected: Features, families_N: np.ndarray) -> dict[str, Figure]:
        """Figures on pairs that it did not learn from (`critic_heads.measure_pairs`)."""
        margin_N = self.score_features(chosen).log_odds_N - self.score_features(rejected).log_odds_N
        return measure_pairs(margin_N, chosen["length"][:, 0] - rejected["length"][:, 0], families_N)

    def score(self, passages: Sequence[Passage], reader: Reader) -> Scores:
        """Read texts and score them.

        Raises:
            ModelError: `reader` reads with other models than the critic learned on.
        """
        self.check(reader)
        return self.score_features(reader.read(passages, contextual=self.contextual))

    def reward(self, passages: Sequence[Passage], reader: Reader) -> np.ndarray:
        """(N,) log-odds of what is wanted: of the positive label, or against it where that is harm."""
        return self.sign * self.score(passages, reader).log_odds_N

    def cost(self, passages: Sequence[Passage], reader: Reader) -> np.ndarray:
        """(N,) log-odds of harm: above zero where it is more likely than not.

        Raises:
            InputError: The critic looks for no harm.
        """
        if self.kind not in COSTS:
            raise InputError(
                f"a critic of {self.kind} as a cost",
                expected=f"one of {' or '.join(COSTS)}",
                fix="use it as a judge or a reward",
            )
        return -self.reward(passages, reader)

    def check(self, reader: Reader) -> None:
        """Raise ModelError unless `reader` reads what the critic learned on."""
        if reader.source != self.source:
            raise ModelError(
                f"features of source '{reader.source}' for a critic on '{self.source}'",
                expected=f"source '{self.source}'",
                fix=f"open the reader with source '{self.source}'",
            )
        for name, mark in reader.marks().items():
            known = self.marks.get(name)
            # An encoder's mark is an embedding, whose last bits differ between machines.
            if known is None or known.shape != mark.shape or np.abs(known - mark).max() > 1e-2:
                raise ModelError(
                    f"a critic that learned on another {name} than this one",
                    expected="the model it was trained with",
                    fix="load that model, or train the critic again with this one",
                )

    @functools.cached_property
    def version(self) -> str:
        """Hash of all that decides what it says."""
        digest = hashlib.sha256(json.dumps([self.kind, self.labels, self.source, self.contextual]).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(name.encode() + tensor.tobytes())
        return digest.hexdigest()[:16]

    def _tensors(self) -> dict[str, np.ndarray]:
        found = {
            f"head.{name}.{f.name}": getattr(head, f.name)
            for name, head in self.heads.items()
            for f in dataclasses.fields(head)
        }
        found |= {f"pool.{f.name}": getattr(self.pool, f.name) for f in dataclasses.fields(Pool)}
        found |= {f"mark.{name}": mark for name, mark in self.marks.items()}
        return {name: np.ascontiguousarray(tensor) for name, tensor in found.items()}

    def save(self, path: Path) -> None:
        """Write everything as one safetensors file."""
        described = {f: getattr(self, f) for f in DESCRIBED} | {"heads": list(self.heads)}
        save_file(self._tensors(), path, metadata={"text_critic": json.dumps(described, ensure_ascii=False)})

    @classmethod
    def load(cls, path: Path) -> TextCritic:
        """Read what `save` wrote.

        Raises:
            ModelError: The file is missing or no such critic.
        """
        try:
            tensors = load_file(path)
            with safe_open(path, framework="numpy") as file:
                described = json.loads((file.metadata() or {})["text_critic"])
            heads: dict[str, Form] = {}
            for name in described.pop("heads"):
                form = _FORMS[name.split(".")[1]]
                heads[name] = form(**{f.name: tensors[f"head.{name}.{f.name}"] for f in dataclasses.fields(form)})
            pool = Pool(**{f.name: tensors[f"pool.{f.name}"] for f in dataclasses.fields(Pool)})
            marks = {name.removeprefix("mark."): t for name, t in tensors.items() if name.startswith("mark.")}
            described["labels"] = tuple(described["labels"])
            described["quality"] = {name: tuple(figure) for name, figure in described["quality"].items()}
            return cls(heads=heads, pool=pool, marks=marks, **described)
        except (OSError, KeyError, ValueError, TypeError, IndexError, SafetensorError) as error:
            raise ModelError(
                f"{path} holds no critic of texts ({error})",
                expected="a file written by `tutelage critic train`",
                fix="train the critic again",
            ) from error


def log_odds(logits_NL: np.ndarray, label: int) -> np.ndarray:
    """(N,) of a label against all others."""
    odds_N: np.ndarray = logits_NL[:, label] - np.logaddexp.reduce(np.delete(logits_NL, label, axis=1), axis=1)
    return odds_N


def _said(head: Form, x_NF: Block) -> np.ndarray:
    """(members, rows, labels) logits of a head."""
    return _log(head.votes(x_NF)) if isinstance(head, Committee) else head.logits(x_NF)


def _log(probability: np.ndarray) -> np.ndarray:
    floored: np.ndarray = np.log(np.maximum(probability, 1e-9))
    return floored


class CriticJudge:
    """A critic as a judge of generations: the probability that a reply is what is wanted.

    The verdict's value is the positive label's probability, or one minus it where that label is harm;
    of a critic of preference, the probability of being preferred to an average text.

    Args:
        critic: The critic.
        reader: Reads with the models that the critic learned on.
        most_spread: Standard deviation over the ensemble above which the judge abstains.

    Raises:
        ModelError: Critic and reader do not belong together.
    """

    def __init__(self, critic: TextCritic, reader: Reader, *, most_spread: float = 0.2) -> None:
        critic.check(reader)
        self.critic, self.reader, self.most_spread = critic, reader, most_spread
        self.name = f"critic:{critic.kind}"

    def judge(self, prompts: Sequence[Prompt], generations_PG: Sequence[Sequence[Generation]]) -> list[list[Verdict]]:
        """One verdict a generation."""
        started = time.perf_counter()
        flat = [(p, g) for p, group in zip(prompts, generations_PG, strict=True) for g in group]
        if not flat:
            return [[] for _ in prompts]
        try:
            scores = self.critic.score([Passage(g.text, p.messages) for p, g in flat], self.reader)
        except InputError as error:  # a prompt that does not fit into the trunk
            if len(prompts) > 1:
                alone = zip(prompts, generations_PG, strict=True)
                return [self.judge([prompt], [group])[0] for prompt, group in alone]
            reason = f"could not be read: {error.got}, expected {error.expected}"
            return [[Verdict(self.name, self.critic.version, g.id, p.hash, None, reason) for p, g in flat]]
        cost = Cost(seconds=(time.perf_counter() - started) / len(flat))
        verdicts = iter([self._verdict(p, g, scores, row, cost) for row, (p, g) in enumerate(flat)])
        return [[next(verdicts) for _ in group] for group in generations_PG]

    def _verdict(self, prompt: Prompt, generation: Generation, scores: Scores, row: int, cost: Cost) -> Verdict:
        critic = self.critic
        # Rounded: the last bits depend on which texts are read together.
        share, spread, odds = (
            round(float(x), 3)
            for x in (scores.probability_NL[row, critic.positive], scores.spread_N[row], scores.log_odds_N[row])
        )
        sought = critic.labels[critic.positive] if critic.kind != "preference" else "better than average"
        value: float | None = round(1.0 - share, 3) if critic.kind in COSTS else share
        reason = f"{sought} with probability {share:.2f}"
        if not spread <= self.most_spread:  # also when it is not a number
            value, reason = None, f"the critic's ensemble is at odds: {reason}, standard deviation {spread:.2f}"
        chances = dict(zip(critic.labels, np.round(scores.probability_NL[row], 3).tolist(), strict=True))
        evidence = {"probability": chances, "spread": spread, "log_odds": odds}
        return Verdict(
            self.name, critic.version, generation.id, prompt.hash, value, reason, evidence=evidence, cost=cost
        )
