"""Does a fusion with 50 human labels beat each of its sources? Critics of dialogue safety taught on different data.

    python benchmarks/fusion.py --cache /tmp/critics
    python benchmarks/fusion.py --cache /tmp/critics --own trunk,trunk,trunk

Data: the folder ../shared/data beside the checkout, or --data. Judged are DiaSafety's test replies, safe or
unsafe, in contexts that no critic has seen. Three sources learned from DiaSafety's training part, each from
--rows replies whose contexts no other has seen, by the features that --own names: hashed words, the sentence
encoder, the embedded model's trunk. Two learned elsewhere: toxicity from Davidson's tweets, harmless preference
from HH. Each says one number of a text, and of two texts the difference. The fusion is fitted on 50 random pairs of
a safe and an unsafe reply, whose labels people gave, drawn 40 times. It and its sources are measured on the
replies that were not drawn: how often the safe one of any two is held to be safer (AUROC), with paired intervals
of a bootstrap over replies. `best on the labels` is the source that is right most often on the same 50 pairs.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import critics
import judges
import numpy as np
from scipy.stats import rankdata

from tutelage.feedback.critic_data import BLOCKS, Passage, families
from tutelage.feedback.fusion import fit_fusion
from tutelage.feedback.text_critic import TextCritic

# Task of critics.py, and whether a higher score means a safer text; read by the encoder.
ELSEWHERE = {"toxicity": -1.0, "preference-hh": 1.0}
DRAWS, RESAMPLES = judges.DRAWS, 300


def replies(data: Path, part: str) -> tuple[list[Passage], np.ndarray]:
    """Replies in their context, and whether each is safe."""
    with gzip.open(data / "diasafety" / f"DiaSafety_dataset__{part}.json.gz", "rt", encoding="utf-8") as file:
        rows = json.load(file)
    passages = [Passage(row["response"], critics.says(row["context"])) for row in rows]
    return passages, np.array([row["label"] == "Safe" for row in rows])


def parted(passages: Sequence[Passage], test: Sequence[Passage], rows: int, count: int) -> list[np.ndarray]:
    """Rows of each own critic: whole families of replies, none of which shares a context with the test replies."""
    kin_N = families([*passages, *test])
    free = np.setdiff1d(kin_N[: len(passages)], kin_N[len(passages) :])
    order = np.random.default_rng(0).permutation(free)
    shares = np.array_split(order, count)
    return [np.flatnonzero(np.isin(kin_N[: len(passages)], share))[:rows] for share in shares]


def blocks(
    shelf: critics.Shelf, name: str, texts: Sequence[Passage], source: str, *, contextual: bool
) -> critics.Features:
    """Features of texts."""
    features, _ = shelf.read(name, texts, (source,), contextual=contextual)
    return {block: features[block] for block in (*BLOCKS[source], "length")}


def own(
    share: int, source: str, seen: Sequence[Passage], safe: np.ndarray, test: Sequence[Passage], shelf: critics.Shelf
) -> np.ndarray:
    """(N,) how safe a critic taught on a share of DiaSafety holds the test replies."""
    tables = [
        blocks(shelf, name, texts, source, contextual=True)
        for name, texts in ((f"fusion-{share}", seen), ("fusion-test", test))
    ]
    critic = TextCritic.fit(
        tables[0], (~safe).astype(int), families(seen), kind="safety", labels=("safe", "unsafe"), positive=1,
        source=source, contextual=True, seed=0,
    )  # fmt: skip
    return -critic.score_features(tables[1]).log_odds_N


def elsewhere(name: str, test: Sequence[Passage], data: Path, shelf: critics.Shelf) -> np.ndarray:
    """(N,) how safe a critic taught on other data holds them."""
    task = critics.TASKS[name](data)
    texts = (*task.pairs.chosen, *task.pairs.rejected) if task.pairs else task.passages
    contextual = any(p.context for p in texts)
    learned = blocks(shelf, name, texts, "encoder", contextual=contextual)
    if task.pairs:
        rows = np.arange(len(task.pairs.chosen))
        sides = critics.part(learned, rows), critics.part(learned, rows + len(rows))
        kin_N = families(task.pairs.chosen, task.pairs.rejected)
        critic = TextCritic.fit_pairs(*sides, kin_N, source="encoder", disentangle=True, seed=0)
    else:
        critic = TextCritic.fit(
            learned, task.labels_N, families(task.passages), kind=task.kind, labels=task.labels,
            positive=task.positive, source="encoder", contextual=contextual, seed=0,
        )  # fmt: skip
    shown = blocks(shelf, f"fusion-test-{contextual}", test, "encoder", contextual=contextual)
    return ELSEWHERE[name] * critic.score_features(shown).log_odds_N


def auroc(score_NJ: np.ndarray, safe_N: np.ndarray) -> np.ndarray:
    """(J,) share of pairs of a safe and an unsafe text of which the safe one has the higher score; a tie is a half."""
    safe, unsafe = int(safe_N.sum()), int((~safe_N).sum())
    above_J = rankdata(score_NJ, axis=0)[safe_N].sum(0) - safe * (safe + 1) / 2
    found: np.ndarray = above_J / (safe * unsafe)
    return found


def measured(names: Sequence[str], score_NJ: np.ndarray, safe_N: np.ndarray, labels: int) -> dict[str, object]:
    """AUROC of the fusion and of each source on replies whose labels it did not see, and paired differences."""
    rng = np.random.default_rng(0)
    sides = np.flatnonzero(safe_N), np.flatnonzero(~safe_N)
    drawn = []
    for _ in range(DRAWS):
        known = [rng.permutation(side)[:labels] for side in sides]
        flip = np.where(np.arange(labels) % 2 == 0, 1.0, -1.0)
        shown = (score_NJ[known[0]] - score_NJ[known[1]]) * flip[:, None]
        # The sources' scale, and how they agree, also come from pairs that nobody has labelled.
        others = score_NJ[rng.permutation(len(score_NJ))] - score_NJ
        label = np.concatenate([(flip > 0).astype(int), np.full(len(others), -1)])
        fusion = fit_fusion(np.concatenate([shown, others]), label)
        # Of two texts the fusion takes the difference, so it is a sum of the sources' scores.
        fused = (score_NJ / fusion.scale_J) @ fusion.weight_J
        best = int(((shown > 0) == (flip > 0)[:, None]).mean(0).argmax())
        drawn.append((fused, score_NJ[:, best], np.setdiff1d(np.arange(len(score_NJ)), np.concatenate(known))))
    columns = ["fusion", "best on the labels", *names]

    def areas(chosen_N: np.ndarray) -> np.ndarray:
        rows = []
        for fused, best, left in drawn:
            kept = chosen_N[np.isin(chosen_N, left)]
            rows.append(auroc(np.column_stack([fused, best, score_NJ])[kept], safe_N[kept]))
        return np.array(rows).mean(0)

    value = areas(np.arange(len(safe_N)))
    spread = np.array([areas(rng.integers(0, len(safe_N), len(safe_N))) for _ in range(RESAMPLES)])

    def triple(of: np.ndarray, middle: float) -> list[float]:
        return [float(middle), *(float(x) for x in np.quantile(of, [0.025, 0.975]))]

    return {
        "auroc": {name: triple(spread[:, j], value[j]) for j, name in enumerate(columns)},
        "beats": {
            name: triple(spread[:, 0] - spread[:, j], value[0] - value[j]) for j, name in enumerate(columns) if j
        },
        "replies": len(safe_N),
        "labels": labels,
    }


def shown(triple: Sequence[float]) -> str:
    """Value and interval."""
    return "{:.3f} ({:.3f} to {:.3f})".format(*triple)


def main() -> None:
    """Read, teach, fuse, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for features, as of critics.py")
    parser.add_argument("--rows", type=int, default=2000, help="replies that each critic of DiaSafety learns from")
    parser.add_argument("--own", default="words,encoder,trunk", help="features of the critics of DiaSafety")
    parser.add_argument("--labels", type=int, default=judges.LABELS)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    shelf = critics.Shelf(given.cache)
    train, safe_N = replies(given.data, "train")
    test, safe_test_N = replies(given.data, "test")
    columns, sources = {}, given.own.split(",")
    for share, rows in enumerate(parted(train, test, given.rows, len(sources))):
        name = f"{sources[share]}, {len(rows):,} replies ({share + 1})"
        columns[name] = own(share, sources[share], [train[n] for n in rows], safe_N[rows], test, shelf)
    for name in ELSEWHERE:
        columns[f"{name}, elsewhere"] = elsewhere(name, test, given.data, shelf)
    found = measured(list(columns), np.stack(list(columns.values()), axis=1), safe_test_N, given.labels)
    if given.json:
        print(json.dumps(found))
        return
    print("| judge | AUROC | fusion minus it |\n|---|---|---|")
    for name, area in found["auroc"].items():  # type: ignore[attr-defined]
        by = found["beats"].get(name)  # type: ignore[attr-defined]
        print(f"| {name} | {shown(area)} | {shown(by) if by else '-'} |")


if __name__ == "__main__":
    main()
