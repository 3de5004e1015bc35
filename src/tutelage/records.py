"""Frozen values that cross rooms, and the protocols of what can be swapped. Imports no torch.

Words are those of the design: a judge gives a verdict, a reward is always kept with its terms,
credit is reward per token. Corrections append a new record; nothing is changed in place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

__all__ = [
    "Answer",
    "Cost",
    "Decision",
    "Demonstration",
    "Engine",
    "Evidence",
    "Generation",
    "Judge",
    "Kind",
    "Message",
    "PreferencePair",
    "Progress",
    "Prompt",
    "Question",
    "Reward",
    "SamplerSettings",
    "SuiteItem",
    "Target",
    "Verdict",
    "content_hash",
]

Kind = Literal["answerable", "unanswerable", "ambiguous"]


def content_hash(value: Any, *, length: int = 16) -> str:
    """SHA-256 of the canonical JSON of `value`, shortened to `length` hex digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:length]


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for its next turn. Holds no reference answer, by construction."""

    id: str
    messages: tuple[Message, ...]
    episode: str = ""

    @property
    def text(self) -> str:
        """The last user turn, which is what judges of single questions look at."""
        return self.messages[-1].content

    @property
    def hash(self) -> str:
        """Content hash of the whole conversation."""
        return content_hash([[m.role, m.content] for m in self.messages])


@dataclasses.dataclass(frozen=True, slots=True)
class SuiteItem:
    """One line of an evaluation suite: the only record that knows reference answers."""

    prompt: Prompt
    kind: Kind
    references: tuple[str, ...] = ()
    form: str = "plain"
    group: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two replies to one prompt of which people preferred one.

    Args:
        votes: How many people preferred the chosen and the rejected reply; (1, 0) when nobody counted.
        category: What kind of pair it is, in the words of the file.
        authors: Who wrote the chosen and the rejected reply (a model's name); empty when unknown.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    votes: tuple[float, float] = (1.0, 0.0)
    category: str = ""
    authors: tuple[str, str] = ("", "")


@dataclasses.dataclass(frozen=True, slots=True)
class SamplerSettings:
    """How tokens are drawn. `temperature` 0 means greedy; `top_k` 0 and `top_p` 1 mean off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 24


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """The next turn, as sampled.

    `tokens` has T entries (the end-of-turn token included when it was drawn) and `logps` the
    T natural-log probabilities under the distribution that was really sampled from.
    """

    id: str
    prompt_id: str
    sample: int
    text: str
    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    finished: bool
    settings: SamplerSettings
    policy_version: str
    seed: int


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What a verdict cost: wall seconds, tokens read or written by models, money."""

    seconds: float = 0.0
    tokens: int = 0
    money: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.tokens + other.tokens, self.money + other.money)

    def shared(self, count: int) -> Cost:
        """The share of one of `count` that it was paid for."""
        return Cost(self.seconds / count, self.tokens // count, self.money / count)


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """One judge's opinion of one subject, or its abstention.

    Args:
        judge: Name of the judge.
        judge_version: Hash of what decides its behaviour (weights, prompt, settings).
        subject: Id of the generation or prompt that was judged.
        prompt_hash: Hash of the conversation the subject belongs to.
        value: The opinion, or None for an abstention. A failed verdict is None, never 0.
        reason: Why, in words. For an abstention: why it abstained.
        evidence: Numbers behind the reason, JSON-able.
        spans: (start, end, note) character spans of the judged text.
        raw: Raw text of a model judge.
        order: Order in which candidates were shown, for comparing judges.
    """

    judge: str
    judge_version: str
    subject: str
    prompt_hash: str
    value: float | None
    reason: str
    evidence: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cost: Cost = Cost()
    spans: tuple[tuple[int, int, str], ...] = ()
    raw: str = ""
    order: tuple[str, ...] = ()

    @property
    def abstained(self) -> bool:
        """Whether the judge gave no opinion."""
        return self.value is None


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """What a judge asks a language model.

    Args:
        messages: The conversation; the model's turn comes next.
        opening: How the model's turn begins; it goes on from there. Engines that cannot begin a turn
            for the model (hosted chat) leave it out.
        labels: Words of which one is the answer, told apart by their first letter; empty asks for text.
        max_new_tokens: Longest answer. With labels, how far an engine without log-probabilities may read.
        temperature: 0 is greedy. Labels are always read from the model's own distribution.
        schema: JSON schema (flat object) that the text should follow, for engines that can enforce one.
        draw: Number of the draw, so that two samples of one question are two questions.
    """

    messages: tuple[Message, ...]
    opening: str = ""
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 8
    temperature: float = 0.0
    schema: Mapping[str, Any] | None = None
    draw: int = 0

    @property
    def hash(self) -> str:
        """Content hash: the same question is never asked twice."""
        turns = [[m.role, m.content] for m in self.messages]
        return content_hash(
            [turns, self.opening, self.labels, self.max_new_tokens, self.temperature, self.schema, self.draw], length=32
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What came back for a question, or why nothing did. A failed answer holds no number and no text.

    Args:
        text: What the model said, after the opening.
        logps: Natural-log probability of each token of `text`; empty where the engine gives none.
        label_logps: Natural-log probability of each label as the next thing said, not normalised over
            the labels, or None where the engine gives none. Sums to at most one: what is missing went
            to other tokens.
        failure: Why there is no answer; empty when there is one.
        passing: The failure is the engine's, not the question's: asking again later may help.
        cost: What it took.
    """

    text: str = ""
    logps: tuple[float, ...] = ()
    label_logps: Mapping[str, float] | None = None
    failure: str = ""
    passing: bool = False
    cost: Cost = Cost()


@dataclasses.dataclass(frozen=True, slots=True)
class Reward:
    """The number that is learned from, with the terms that make it up.

    `total` is None when no valid term exists: missing, not zero. `costs` are the constrained
    quantities, which the multiplier (not the total) brings in.
    """

    generation_id: str
    total: float | None
    terms: Mapping[str, float | None]
    raw: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    costs: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Demonstration:
    """A conversation with the reply that the user wants, whole to its end."""

    prompt: Prompt
    reply: str


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A text to imitate, with where it came from."""

    prompt_id: str
    text: str
    origin: Literal["own", "revised", "demonstration"]
    principle: str
    reason: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Evidence:
    """One measured difference that a gate looks at: paired, with its confidence interval."""

    suite: str
    metric: str
    before: float | None
    after: float | None
    low: float | None
    high: float | None
    n: int


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What a gate decided about a candidate version, and the numbers it saw."""

    gate: str
    candidate: str
    baseline: str
    accepted: bool
    reason: str
    evidence: tuple[Evidence, ...] = ()


class Progress(Protocol):
    """What a run tells while it works."""

    def stage(self, name: str, total: int, unit: str) -> None:
        """A stage begins: `total` steps are to come, counted in `unit`."""

    def advance(self, steps: int = 1) -> None:
        """Steps were done."""

    def figures(self, **values: float | str) -> None:
        """The live figures that matter now."""

    def say(self, text: str) -> None:
        """A line worth keeping."""


class Engine(Protocol):
    """A way to run a language model as a judge.

    `version` names whatever decides its answers (weights, server, precision); verdicts carry it and
    cached answers belong to it. `ask` gives one answer a question, in order, and never raises for a
    question that failed: the answer says so.

    Raises (from `ask`):
        BudgetSpent: A limit on calls, tokens or money is reached; answers so far are in the cache.
    """

    name: str
    version: str

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer a question."""


class Judge(Protocol):
    """Whatever gives verdicts on the generations of prompts.

    `judge` receives prompts and, for each, its generations in order, and returns one verdict a
    generation in the same order. It never raises for a failed judgement: it abstains.
    """

    name: str

    def judge(self, prompts: Sequence[Prompt], generations_PG: Sequence[Sequence[Generation]]) -> list[list[Verdict]]:
        """One verdict a generation."""
