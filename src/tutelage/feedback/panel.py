"""The panel: all judges of a run, one look at a batch, verdicts that explain themselves.

Nobody here sees a reference answer or a suite's kinds: a `Prompt` has no field for them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import logit

from tutelage.config import Feedback
from tutelage.engines.encoder import Encoder
from tutelage.engines.load import LanguageModel
from tutelage.feedback.belief import Belief, consistency_odds, fuse
from tutelage.feedback.consistency import GroupSpread, spread, stock_phrases
from tutelage.feedback.constitution import Constitution, Principle
from tutelage.feedback.critic import ACTS, Critic
from tutelage.feedback.critic_data import Passage
from tutelage.records import Cost, Generation, Prompt, Verdict, content_hash

__all__ = ["Findings", "Panel"]

_EDGE = 1e-6  # odds stay finite
_RIGHT_ACT = (("answerable", "answers"), ("unanswerable", "abstains"), ("ambiguous", "asks_back"))
_BELIEVED = {
    "answerable": "has an answer",
    "unanswerable": "has no knowable answer",
    "ambiguous": "lacks something needed to answer it",
}
_DOES = {"answers": "asserts an answer", "abstains": "says that it does not know", "asks_back": "asks back"}


@dataclasses.dataclass
class Findings:
    """What the panel found in one batch of P prompts with G replies each.

    `terms_PKG[p][k]` are raw term values a reply (None: abstained); `acts_PG` what each reply does;
    `costs_PG` the constrained quantities; `beliefs` what each question is held to call for;
    `blamed` places (start, end) in a reply's text that critics hold against it, by the reply's id.
    """

    verdicts: list[Verdict]
    terms_PKG: list[dict[str, list[float | None]]]
    costs_PG: list[list[dict[str, float]]]
    acts_PG: list[list[dict[str, float]]]
    beliefs: list[Belief | None]
    spreads: list[GroupSpread]
    blamed: dict[str, list[tuple[int, int]]] = dataclasses.field(default_factory=dict)


class Panel:
    """Judges of a run.

    Args:
        settings: Which judges, and their thresholds.
        constitution: Written principles; those that want no act are left to judges that read them.
        encoder: For meanings of replies.
        critic: Learned heads, or None when the critic is not among the judges.
    """

    def __init__(self, settings: Feedback, constitution: Constitution, encoder: Encoder, critic: Critic | None) -> None:
        self.settings, self.constitution = settings, constitution
        self.encoder, self.critic = encoder, critic
        self._needs: dict[str, tuple[list[float], float]] = {}
        self._odds: dict[str, float] = {}

    def prepare(self, lm: LanguageModel, prompts: Sequence[Prompt]) -> None:
        """Read the questions once with the frozen trunk (adapter off is the caller's business)."""
        fresh = [p for p in prompts if p.hash not in self._needs]
        if self.critic is None or not fresh:
            return
        needs, sure = self.critic.needs(lm, [p.text for p in fresh])
        for prompt, row, value in zip(fresh, needs.tolist(), sure.tolist(), strict=True):
            # Rounded: the last bits depend on which questions are read together.
            self._needs[prompt.hash] = ([round(x, 3) for x in row], round(value, 3))

    def listen(self, prompts: Sequence[Prompt], spreads: Sequence[GroupSpread]) -> None:
        """Keep what the start model's own consistency says of the questions (first look counts)."""
        if "consistency" not in self.settings.judges:
            return
        odds = consistency_odds([s.cohesion for s in spreads])
        for prompt, value in zip(prompts, odds, strict=True):
            self._odds.setdefault(prompt.hash, value)

    def belief(self, prompt: Prompt) -> Belief | None:
        """What a question is held to call for."""
        needs = self._needs.get(prompt.hash)
        odds = self._odds.get(prompt.hash)
        row, sure = needs if needs is not None else (None, 0.0)
        return fuse(row, sure, odds, weight=self.settings.consistency_weight)

    def state(self) -> dict[str, Any]:
        """What a resumed run must know of the questions: what was read in them, and heard of them."""
        return {"odds": dict(self._odds), "needs": dict(self._needs)}

    def load(self, state: dict[str, Any]) -> None:
        """Take `state` over."""
        self._odds = dict(state["odds"])
        self._needs = {key: (list(row), float(sure)) for key, (row, sure) in state["needs"].items()}

    def examine(
        self, prompts: Sequence[Prompt], replies_PG: Sequence[Sequence[Generation]], *, first_look: bool
    ) -> Findings:
        """Judge a batch. `first_look` says that the replies are the start model's."""
        started = time.perf_counter()
        flat = [g.text for group in replies_PG for g in group]
        vectors = self.encoder.embed(flat)
        acts = self._acts(flat, vectors)
        sizes = [len(group) for group in replies_PG]
        vectors_P = list(torch.split(vectors, sizes))
        stock = stock_phrases(vectors_P)
        spreads = [
            spread(v, s, [_mean(g.logps) for g in group], same=self.settings.same_meaning)
            for v, s, group in zip(vectors_P, stock, replies_PG, strict=True)
        ]
        if first_look:
            self.listen(prompts, spreads)
        seconds = (time.perf_counter() - started) / max(len(flat), 1)
        found = Findings([], [], [], [], [], spreads)
        row = 0
        for prompt, group, measured in zip(prompts, replies_PG, spreads, strict=True):
            belief = self.belief(prompt)
            found.beliefs.append(belief)
            terms: dict[str, list[float | None]] = {k: [] for k in ("fit", "principles", "consistency")}
            due = belief.answer_due if belief else 0.0
            costs, group_acts = [], []
            for g, reply in enumerate(group):
                act = dict(zip(ACTS, (round(float(x), 4) for x in acts[row]), strict=True))
                row += 1
                verdicts = self._verdicts(prompt, reply, belief, act, measured, g, Cost(seconds))
                for name, verdict in verdicts.items():
                    terms[name].append(verdict.value)
                    found.verdicts.append(verdict)
                costs.append({"over_abstention": due * (1.0 - act["answers"])})
                group_acts.append(act)
            found.terms_PKG.append({k: v for k, v in terms.items() if v})
            found.costs_PG.append(costs)
            found.acts_PG.append(group_acts)
        return found

    def liking(self, passages: Sequence[Passage]) -> list[float]:
        """Log-odds of what each text does being what its question calls for; NaN where the critic abstains.

        Args:
            passages: Texts in their contexts; of a question that was not read (`prepare`) nothing is known.
        """
        found = []
        for passage, act in zip(passages, self.acts([p.text for p in passages]), strict=True):
            value, _ = _fit(self.belief(Prompt("", tuple(passage.context))), act, self.settings.min_confidence)
            found.append(math.nan if value is None else float(logit(min(max(value, _EDGE), 1.0 - _EDGE))))
        return found

    def acts(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """What each text does: probability of each act."""
        table = self._acts(texts, self.encoder.embed(texts))
        return [dict(zip(ACTS, map(float, row), strict=True)) for row in table]

    def _acts(self, texts: Sequence[str], vectors: torch.Tensor) -> np.ndarray:
        if self.critic is not None:
            return self.critic.acts(self.encoder, texts)
        # Without the critic, a reply is compared with the constitution's own wordings.
        models: dict[str, list[str]] = {act: [] for act in ACTS}
        for principle in self.constitution.acting:
            models[principle.wants] += [e[2] for e in principle.examples] + [
                principle.fallback,
                *principle.openings,
            ]
            models["answers" if principle.wants != "answers" else "abstains"] += [e[1] for e in principle.examples]
        near = [
            (vectors @ self.encoder.embed([t for t in models[act] if t]).T).amax(1).numpy()
            if any(models[act])
            else np.full(len(texts), -1.0)
            for act in ACTS
        ]
        odds = np.exp(10.0 * np.stack(near, axis=1))
        result: np.ndarray = odds / odds.sum(1, keepdims=True)
        return result

    def _verdicts(
        self,
        prompt: Prompt,
        reply: Generation,
        belief: Belief | None,
        act: dict[str, float],
        measured: GroupSpread,
        g: int,
        cost: Cost,
    ) -> dict[str, Verdict]:
        made: dict[str, Verdict] = {}
        wanted = self.settings.judges

        def verdict(judge: str, version: str, value: float | None, reason: str, evidence: dict[str, object]) -> Verdict:
            return Verdict(judge, version, reply.id, prompt.hash, value, reason, evidence, cost)

        if "critic" in wanted:
            value, reason = _fit(belief, act, self.settings.min_confidence)
            evidence: dict[str, object] = {"kind": belief.as_dict() if belief else {}, "act": act}
            made["fit"] = verdict("critic", self.critic.version if self.critic else "", value, reason, evidence)
        if "constitution" in wanted:
            value, reason, kept = self._principles(prompt, reply, belief, act)
            made["principles"] = verdict("constitution", self.constitution.hash, value, reason, {"principles": kept})
        if "consistency" in wanted:
            value, reason = _agreement(measured, g, act, belief)
            evidence = {
                "entropy": measured.entropy,
                "cluster": measured.labels[g],
                "agreement": measured.agreement[g],
            }
            version = content_hash(["consistency", self.settings.same_meaning])
            made["consistency"] = verdict("consistency", version, value, reason, evidence)
        return made

    def _principles(
        self, prompt: Prompt, reply: Generation, belief: Belief | None, act: dict[str, float]
    ) -> tuple[float | None, str, dict[str, float]]:
        """Weighted share of principles kept; the reason is the critique of the most broken one."""
        if belief is None:
            return None, "no judge knows which principles this question falls under", {}
        weighed: list[tuple[Principle, float, float]] = [
            (p, p.weight * belief.of(p.scope), act[p.wants]) for p in self.constitution.acting
        ]
        mass = sum(w for _, w, _ in weighed)
        if mass < 1e-9:
            return None, "no principle covers this question", {}
        value = sum(w * kept for _, w, kept in weighed) / mass
        worst, loss = max(((p, w * (1 - k) / mass) for p, w, k in weighed), key=lambda x: x[1])
        if loss < 0.25:
            reason = "keeps the principles that apply"
        else:
            text = worst.critique.replace("{question}", prompt.text).replace("{reply}", reply.text)
            reason = f"breaks '{worst.id}': {text}"
        return value, reason, {p.id: round(k, 4) for p, _, k in weighed}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _fit(belief: Belief | None, act: dict[str, float], least: float) -> tuple[float | None, str]:
    if belief is None:
        return None, "abstains: nothing is known of the question"
    sure = belief.of(belief.kind)
    if sure < least:
        return None, f"abstains: the most likely kind of question, {belief.kind}, has only {sure:.2f}"
    value = sum(belief.of(kind) * act[right] for kind, right in _RIGHT_ACT)
    does = max(act, key=lambda a: act[a])
    return value, (f"the question {_BELIEVED[belief.kind]} ({sure:.2f}); the reply {_DOES[does]} ({act[does]:.2f})")


def _agreement(measured: GroupSpread, g: int, act: dict[str, float], belief: Belief | None) -> tuple[float | None, str]:
    agreement = measured.agreement[g]
    if measured.labels[g] == -1:
        return None, "abstains: a stock phrase that fits any question says nothing about this one"
    if act["answers"] < 0.5:
        return None, "abstains: the reply asserts nothing that could be consistent"
    if agreement is None:
        return None, "abstains: too few replies to compare with"
    if belief is not None and belief.answerable < 0.5:
        return None, "abstains: agreement on a question without an answer is no merit"
    return agreement, f"{agreement:.0%} of the other replies mean the same"
