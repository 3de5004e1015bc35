"""Critics from labelled data, measured on rows of which they saw no relative: real data sets, four sources of features.

    python benchmarks/critics.py                              # every task and source, all rows
    python benchmarks/critics.py --task safety --limit 1000   # a quick look
    python benchmarks/critics.py --cache /tmp/critics --json

Data: the folder ../shared/data beside the checkout, or --data. Features are read once a task and kept
under --cache. Tasks: toxicity (hate or offensive against neither) and hate (against the rest) on
Davidson's tweets, a stratified fifth held out; safety on DiaSafety, its own test split; factuality on
HaluEval's general part, a fifth held out; coherence on HH's dialogues, kept and spoilt, a fifth held out, and
each way of spoiling by a critic that never saw it; evidence on FEVER-Symmetric, dev to test; preference on
Anthropic's HH (harmless, half of test) and Open-Instruct's human pairs, in five folds.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gzip
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from tutelage.engines.encoder import Encoder
from tutelage.engines.load import LanguageModel, load_model
from tutelage.feedback.critic_data import BLOCKS, Features, Pairs, Passage, Reader, families
from tutelage.feedback.critic_heads import Figure, measure_pairs
from tutelage.feedback.perturbation import perturb
from tutelage.feedback.text_critic import TextCritic
from tutelage.records import Message

SOURCES = ("words", "encoder", "trunk", "tokens", "both")
FIGURES = ("auroc", "accuracy", "kappa", "brier", "ece", "length_correlation")


@dataclasses.dataclass
class Task:
    """Rows of a data set: labelled passages with the rows to test on, or pairs."""

    kind: str
    labels: tuple[str, ...]
    positive: int
    passages: Sequence[Passage]
    labels_N: np.ndarray
    test_N: np.ndarray | None = None  # True where a row is held out by the data set itself
    pairs: Pairs | None = None
    kind_N: np.ndarray | None = None  # how a row came about; then each kind is measured without having been learned


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a packed JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def says(text: str) -> tuple[Message, ...]:
    """A conversation of one turn."""
    return (Message("user", text),)


def davidson(data: Path, *, positive: Sequence[str], label: str) -> Task:
    """Tweets; class 0 is hate, 1 offensive, 2 neither."""
    with gzip.open(data / "davidson-hate" / "data__labeled_data.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = np.array([int(row["class"] in positive) for row in rows])
    return Task("toxicity", ("other", label), 1, [Passage(row["tweet"]) for row in rows], found)


def diasafety(data: Path) -> Task:
    """Replies in their context, Safe or Unsafe, with the authors' test split."""
    parts = {}
    for part in ("train", "test"):
        with gzip.open(data / "diasafety" / f"DiaSafety_dataset__{part}.json.gz", "rt", encoding="utf-8") as file:
            parts[part] = json.load(file)
    rows = parts["train"] + parts["test"]
    return Task(
        "safety",
        ("safe", "unsafe"),
        1,
        [Passage(row["response"], says(row["context"])) for row in rows],
        np.array([int(row["label"] == "Unsafe") for row in rows]),
        np.arange(len(rows)) >= len(parts["train"]),
    )


def halueval(data: Path) -> Task:
    """Answers of a chat model, judged by people for hallucination."""
    rows = list(lines(data / "halueval" / "data__general_data.json.gz"))
    passages = [Passage(row["chatgpt_response"], says(row["user_query"])) for row in rows]
    factual = np.array([int(row["hallucination"] == "no") for row in rows])
    return Task("factuality", ("invented", "factual"), 1, passages, factual)


def fever(data: Path) -> Task:
    """Claims after their evidence; rows of dev that share either with a row of test are left out."""
    dev, test = (
        list(lines(data / "fever-symmetric" / f"symmetric_v0.2__fever_symmetric_{part}.jsonl.gz"))
        for part in ("dev", "test")
    )
    known = {row[side] for row in test for side in ("claim", "evidence")}
    rows = [row for row in dev if row["claim"] not in known and row["evidence"] not in known]
    held_out = np.arange(len(rows) + len(test)) >= len(rows)
    rows += test
    passages = [Passage(row["claim"], says(row["evidence"])) for row in rows]
    supported = np.array([int(row["label"] == "SUPPORTS") for row in rows])
    return Task("evidence", ("refutes", "supports"), 1, passages, supported, held_out)


def hh(data: Path) -> Task:
    """Dialogues that differ in their last reply."""
    chosen, rejected = [], []
    for row in lines(data / "hh-rlhf" / "harmless-base-test-even.jsonl.gz"):
        one, other = map(last_turn, (row["chosen"], row["rejected"]))
        if one != other:
            chosen.append(one)
            rejected.append(other)
    return paired(chosen, rejected)


def coherence(data: Path) -> Task:
    """HH's dialogues as they are and with their replies spoilt (`tutelage critic perturb`)."""
    rows = perturb(hh(data).pairs.chosen)
    found = np.array([int(row.coherent) for row in rows])
    kinds = np.array([row.kind for row in rows])
    return Task("coherence", ("incoherent", "coherent"), 1, [r.passage for r in rows], found, kind_N=kinds)


def last_turn(transcript: str) -> Passage:
    """The last turn of a transcript after the others."""
    parts = re.split(r"\n\n(Human|Assistant):", transcript)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [Message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    return Passage(turns[-1].content, tuple(turns[:-1]))


def open_instruct(data: Path) -> Task:
    """Pairs of two models' replies, without ties; annotators may differ on a pair."""
    chosen, rejected = [], []
    for row in lines(data / "openinstruct-human" / "annotations.jsonl.gz"):
        sides = [Passage(row[f"completion_{side}"] or "", says(row["prompt"])) for side in ("a", "b")]
        if row["preference"] != "tie" and sides[0] != sides[1]:
            better = 0 if row["preference"].startswith("a") else 1
            chosen.append(sides[better])
            rejected.append(sides[1 - better])
    return paired(chosen, rejected)


def paired(chosen: list[Passage], rejected: list[Passage]) -> Task:
    """A task of pairs."""
    pairs = Pairs(tuple(chosen), tuple(rejected))
    return Task("preference", ("rejected", "chosen"), 1, (), np.ones(len(chosen), np.int64), pairs=pairs)


TASKS = {
    "toxicity": lambda data: davidson(data, positive=("0", "1"), label="toxic"),
    "hate": lambda data: davidson(data, positive=("0",), label="hate"),
    "safety": diasafety,
    "factuality": halueval,
    "evidence": fever,
    "coherence": coherence,
    "preference-hh": hh,
    "preference-open-instruct": open_instruct,
}
SAME_FEATURES = {"hate": "toxicity"}


def some(task: Task, limit: int) -> Task:
    """A random part of the rows, the same every time."""
    count = len(task.labels_N)
    if not limit or limit >= count:
        return task
    rows = np.array(sorted(random.Random(0).sample(range(count), limit)))  # noqa: S311
    passages = [task.passages[n] for n in rows] if task.passages else ()
    pairs = task.pairs and Pairs(*(tuple(side[n] for n in rows) for side in (task.pairs.chosen, task.pairs.rejected)))
    test_N = None if task.test_N is None else task.test_N[rows]
    kind_N = None if task.kind_N is None else task.kind_N[rows]
    return dataclasses.replace(
        task, passages=passages, labels_N=task.labels_N[rows], test_N=test_N, pairs=pairs, kind_N=kind_N
    )


class Shelf:
    """Features of a task, read once, with the seconds that it took a thousand texts."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.models: dict[str, Any] = {}

    def read(
        self, name: str, texts: Sequence[Passage], sources: Sequence[str], *, contextual: bool
    ) -> tuple[Features, dict[str, float]]:
        """The blocks that the sources need, and seconds a thousand texts by source."""
        blocks = {block for source in sources for block in BLOCKS[source]}
        features: Features = {}
        seconds: dict[str, float] = {}
        for source in ("words", *sorted(blocks - {"words"})):  # words come first: with them comes the length
            kept = (
                self.folder / f"{name}-{source}-{len(texts)}.npz"
                if self.folder and source in ("trunk", "encoder")
                else None
            )
            if kept and kept.is_file():
                with np.load(kept) as file:
                    features[source], seconds[source] = file["x"].astype(np.float32), float(file["seconds"])
                continue
            reader = Reader(
                source,
                self.lm if source in ("trunk", "tokens") else None,
                self.encoder if source == "encoder" else None,
            )
            started = time.perf_counter()
            found = reader.read(texts, contextual=contextual)
            seconds[source] = (time.perf_counter() - started) / len(texts) * 1000
            features |= {source: found[source], "length": found["length"]}
            if kept:
                np.savez(kept, x=found[source].astype(np.float32), seconds=seconds[source])
        return features, seconds | {"both": seconds.get("encoder", 0.0) + seconds.get("trunk", 0.0)}

    @property
    def lm(self) -> LanguageModel:
        """The embedded policy."""
        if "lm" not in self.models:
            self.models["lm"] = load_model("smollm2-135m-instruct")
        return self.models["lm"]

    @property
    def encoder(self) -> Encoder:
        """The embedded encoder."""
        if "encoder" not in self.models:
            self.models["encoder"] = Encoder()
        return self.models["encoder"]


def part(features: Features, rows: np.ndarray) -> Features:
    """Some rows of every block."""
    return {block: x[rows] for block, x in features.items()}


def held_out(task: Task, kin_N: np.ndarray, seed: int) -> np.ndarray:
    """(N,) True where a row is only for measuring."""
    if task.test_N is not None:
        return task.test_N
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
    found = np.zeros(len(kin_N), bool)
    found[next(folds.split(task.labels_N, task.labels_N, kin_N))[1]] = True
    return found


def on_labels(task: Task, features: Features, source: str, seed: int) -> dict[str, dict[str, Figure]]:
    """Figures by part of the held-out rows: all, and those of which no context was learned from."""
    kin_N = families(task.passages)
    test_N = held_out(task, kin_N, seed)
    seen, left = np.flatnonzero(~test_N), np.flatnonzero(test_N)
    contextual = any(p.context for p in task.passages)

    def learned(rows: np.ndarray) -> TextCritic:
        return TextCritic.fit(
            part(features, rows), task.labels_N[rows], kin_N[rows], kind=task.kind, labels=task.labels,
            positive=task.positive, source=source, contextual=contextual, seed=seed,
        )  # fmt: skip

    critic = learned(seen)
    found = {"": critic.measure(part(features, left), task.labels_N[left], kin_N[left])}
    if task.kind_N is not None:
        for kind in sorted({*task.kind_N} - {"kept"}):
            rows = left[np.isin(task.kind_N[left], ("kept", kind))]
            other = learned(seen[task.kind_N[seen] != kind])
            found[f"{kind}, not learned"] = other.measure(part(features, rows), task.labels_N[rows], kin_N[rows])
        return found
    known = {task.passages[n].context for n in seen if task.passages[n].context}
    fresh = np.array([n for n in left if task.passages[n].context not in known], np.int64)
    if len(fresh) < len(left):
        found["unseen contexts"] = critic.measure(part(features, fresh), task.labels_N[fresh], kin_N[fresh])
    return found


def on_pairs(task: Task, features: Features, source: str, seed: int) -> dict[str, dict[str, Figure]]:
    """Figures of five critics, each on the fold that it did not learn from; length kept and taken out."""
    kin_N = families(task.pairs.chosen, task.pairs.rejected)
    rows = len(kin_N)
    longer_N = features["length"][:rows, 0] - features["length"][rows:, 0]
    found = {"length alone": measure_pairs(longer_N, longer_N, kin_N)} if source == "words" else {}
    for name, disentangle in (("", True), ("length kept", False)):
        margin_N = np.zeros(rows)
        for seen, left in GroupKFold(5, shuffle=True, random_state=seed).split(kin_N, groups=kin_N):
            sides = (part(features, seen), part(features, seen + rows))
            critic = TextCritic.fit_pairs(*sides, kin_N[seen], source=source, disentangle=disentangle, seed=seed)
            one, other = (critic.score_features(part(features, side)).log_odds_N for side in (left, left + rows))
            margin_N[left] = one - other
        found[name] = measure_pairs(margin_N, longer_N, kin_N)
    return found


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=list(TASKS))
    parser.add_argument("--source", action="append", choices=SOURCES)
    parser.add_argument("--limit", type=int, default=0, help="rows a task; 0 takes all")
    parser.add_argument("--seed", type=int, default=0, help="of split, folds and networks")
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--cache", type=Path, help="folder in which features are kept")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    if chosen.cache:
        chosen.cache.mkdir(parents=True, exist_ok=True)
    shelf = Shelf(chosen.cache)
    if not chosen.json:
        print("| task | features | rows | " + " | ".join(FIGURES) + " | s / 1,000 texts | s to fit |")
        print("|---" * (len(FIGURES) + 5) + "|")
    for name in chosen.task or TASKS:
        task = some(TASKS[name](chosen.data), chosen.limit)
        texts = (*task.pairs.chosen, *task.pairs.rejected) if task.pairs else task.passages
        contextual = any(p.context for p in texts)
        sources = chosen.source or SOURCES
        features, seconds = shelf.read(SAME_FEATURES.get(name, name), texts, sources, contextual=contextual)
        for source in sources:
            started = time.perf_counter()
            wanted = {block: features[block] for block in (*BLOCKS[source], "length")}
            found = (on_pairs if task.pairs else on_labels)(task, wanted, source, chosen.seed)
            spent = time.perf_counter() - started
            for what, figures in found.items():
                row = {
                    "task": f"{name}, {what}" if what else name, "features": source, "rows": len(task.labels_N),
                    "figures": figures, "seconds_per_1000": seconds[source], "seconds_to_fit": spent,
                }  # fmt: skip
                print(json.dumps(row) if chosen.json else line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [
        "{:.3f} [{:.3f}, {:.3f}]".format(*row["figures"][name]) if name in row["figures"] else "" for name in FIGURES
    ]
    ends = [f"{row['seconds_per_1000']:.1f}", f"{row['seconds_to_fit']:.0f}"]
    return "| " + " | ".join([row["task"], row["features"], str(row["rows"]), *cells, *ends]) + " |"


if __name__ == "__main__":
    main()
