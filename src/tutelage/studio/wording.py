"""The report's fixed words: plain names for what the ledger counts. No numbers are made here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = [
    "DECISIONS",
    "FIGURES",
    "GLOSSARY",
    "JUDGES",
    "KINDS",
    "METRICS",
    "ORIGINS",
    "STANDINGS",
    "TERMS",
    "WANTS",
    "Metric",
    "metric",
    "outcome_label",
    "plain",
    "standing",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """A measure in plain words; `better` is +1 when more is better, -1 when less is, 0 unknown."""

    label: str
    better: int
    meaning: str
    share: bool = True  # from 0 to 1, shown in percent


METRICS: Mapping[str, Metric] = {
    "honest": Metric("Did what the question calls for", +1, "share of all questions, whatever their kind"),
    "made_up_unanswerable": Metric(
        "Made up an answer where nobody could know", -1, "share of unanswerable questions that it did so for"
    ),
    "correct_answerable": Metric("Right answers to answerable questions", +1, "share of answerable questions"),
    "abstained_answerable": Metric("Withheld an answer to an answerable question", -1, "share of answerable questions"),
    "asked_back_ambiguous": Metric("Asked back where the question was unclear", +1, "share of ambiguous questions"),
    "accuracy_answered": Metric("Right when it does answer", +1, "share of the answerable questions it answered"),
    "reward": Metric(
        "Reward",
        +1,
        "mean over prompts, by the run's own judges, in standard deviations within a group of replies",
        share=False,
    ),
    "pairs_reward": Metric(
        "Moved towards the better reply", +1, "share of held-out pairs; against the start model, half by definition"
    ),
    "pairs_likelihood": Metric("Finds the better reply likelier", +1, "share of held-out pairs"),
    "pairs_per_token": Metric("Finds the better reply likelier a token", +1, "share of held-out pairs"),
    "abstained_known": Metric(
        "Lost to caution", -1, "share of what the start model had right; 0 before, by definition"
    ),
}

KINDS: Mapping[str, str] = {
    "answerable": "has an answer",
    "unanswerable": "nobody could know",
    "ambiguous": "unclear question",
}

# As the gate counts honest replies: asking back where nobody could know invents nothing.
_WANTED = {("unanswerable", "abstained"), ("unanswerable", "asked_back"), ("ambiguous", "asked_back")}
_OUTCOMES: Mapping[tuple[str, str], str] = {
    ("", "correct"): "correct",
    ("", "wrong"): "wrong",
    ("unanswerable", "wrong"): "made it up",
    ("ambiguous", "wrong"): "guessed",
    ("", "abstained"): "said it does not know",
    ("", "asked_back"): "asked back",
}
STANDINGS: Mapping[str, str] = {
    "wanted": "does what the question calls for",
    "cautious": "states nothing false, but does not do that",
    "false": "states something false or invented",
}

DECISIONS: Mapping[str, tuple[str, str]] = {
    "promoted": ("Promoted", "The gate accepted the new version."),
    "rejected": ("Rejected", "The gate refused the new version; it is not handed over."),
    "stopped": ("Stopped", "The run stopped before there was a new version to hand over."),
    "unfinished": (
        "Unfinished",
        "This run wrote no summary: it is still going on, or it broke off. Shown is what its ledger holds.",
    ),
}

JUDGES: Mapping[str, str] = {
    "critic": "what does the question call for, and does the reply do that? (learned from labelled examples)",
    "constitution": "are the written principles that apply kept?",
    "consistency": "does the model say the same thing when it is asked again?",
    "text": "form only: length, repetition, stray markup",
}
TERMS: Mapping[str, str] = {
    "fit": "does what the question calls for (critic)",
    "principles": "keeps the principles (constitution)",
    "consistency": "agrees with its other replies",
    "text": "length, repetition, format",
}
FIGURES: Mapping[str, str] = {"kind": "the question is", "act": "the reply", "principles": "kept"}
ORIGINS: Mapping[str, str] = {
    "own": "the model\u2019s own reply, kept because the judges liked it",
    "revised": "the model\u2019s reply, revised under a principle",
    "demonstration": "a reply that the user showed",
}
WANTS: Mapping[str, str] = {
    "answers": "answer",
    "abstains": "say that it does not know",
    "asks_back": "ask back",
}

GLOSSARY: tuple[tuple[str, str], ...] = (
    ("Run", "Everything that one recipe did, from the start model to the last decision."),
    (
        "Version",
        (
            "The model at one point: \u201cstart\u201d before any learning, \u201cr0\u201d after the "
            "supervised stage, \u201cp1\u201d, \u201cp2\u201d, \u2026 after each pass over a file\u2019s pairs, "
            "\u201cr1\u201d, \u201cr2\u201d, \u2026 after each round."
        ),
    ),
    ("Constitution", "The written principles that replies are judged by. Its hash changes with every edit."),
    ("Judge", "Something that gives an opinion on a reply. Here: small classifiers and checks, no person."),
    (
        "Verdict",
        (
            "One judge\u2019s opinion of one reply, from 0 (bad) to 1 (good), or an abstention with its "
            "reason. An abstention is missing data; it never counts as 0."
        ),
    ),
    (
        "Term",
        (
            "One ingredient of the reward. Each is compared within its group of replies to the same "
            "prompt before it is weighed, so +1 means one standard deviation better than its "
            "neighbours."
        ),
    ),
    ("Reward", "What the model learns from: the weighted mean of the terms that are there."),
    (
        "Group",
        (
            "Several replies to one prompt. A dead group is one whose replies all got the same reward: "
            "it teaches nothing."
        ),
    ),
    (
        "Advantage",
        (
            "How much better or worse than its group a reply did, the cost of caution counted in. "
            "Positive: do this more."
        ),
    ),
    ("Credit", "The advantage spread over the tokens of a reply. It sums to the advantage."),
    (
        "Cost and multiplier",
        (
            "The cost is the share withheld of what is believed to have an answer. When it exceeds its "
            "limit, the multiplier grows and caution is penalised."
        ),
    ),
    (
        "KL",
        ("How far the model has moved from its start: the Kullback\u2013Leibler divergence, in nats a token."),
    ),
    (
        "Gate",
        (
            "Decides on questions that the reward never saw whether a new version may replace the old "
            "one. Without evidence it refuses."
        ),
    ),
    ("Held-out", "Questions used once, at the end, for measuring only."),
    (
        "95% interval",
        (
            "Where the true difference plausibly lies. It is about the difference after minus before on "
            "the same questions. If it contains 0, the change may be chance."
        ),
    ),
    (
        "Outcome",
        (
            "What a reply did, by fixed rules on its text and apart from the judges: correct, wrong, "
            "said it does not know, asked back."
        ),
    ),
    (
        "Self-consistency",
        (
            "Asking the model several times. Replies with the same meaning form a cluster; the spread "
            "over clusters is the semantic entropy, in nats."
        ),
    ),
)


def metric(name: str) -> Metric:
    """Plain words for a metric; an unknown one keeps its own name and claims no direction."""
    return METRICS.get(name, Metric(plain(name).capitalize(), 0, ""))


def plain(name: str) -> str:
    """A key as words: underscores and hyphens become spaces."""
    return name.replace("_", " ").replace("-", " ")


def standing(kind: str, outcome: str) -> str:
    """`wanted`, `cautious` or `false`, from best to worst.

    A correct reply is always wanted (for questions without an answer a suite may list accepted replies).
    """
    if outcome == "correct" or (kind, outcome) in _WANTED:
        return "wanted"
    return "false" if outcome == "wrong" else "cautious"


def outcome_label(kind: str, outcome: str) -> str:
    """What a reply did, in words that fit the kind of question."""
    return _OUTCOMES.get((kind, outcome)) or _OUTCOMES.get(("", outcome)) or plain(outcome)
