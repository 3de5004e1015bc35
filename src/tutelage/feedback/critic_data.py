"""What a critic of texts learns from and reads: labelled rows of a file, and the numbers read in a text.

A passage is a text with the conversation before it, if there is one. Its features come in blocks:
hidden states of a language model's trunk over the text's own tokens, sentence embeddings, and
hashed pieces of words. Nothing here assumes a language or spaces between words.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer

from tutelage.engines import weights
from tutelage.engines.encoder import Encoder
from tutelage.engines.features import Probe, tapped
from tutelage.engines.load import LanguageModel, load_model
from tutelage.engines.packing import Group, pack
from tutelage.errors import InputError, ModelError
from tutelage.feedback.token_states import read_states
from tutelage.records import Message, Prompt

__all__ = [
    "BLOCKS", "Block", "Features", "LabelledPassages", "Pairs", "Passage", "Reader", "Source",
    "families", "laid_out", "log_lengths", "read_dialogues", "read_labelled_passages", "read_pairs", "read_passages",
    "read_texts",
]  # fmt: skip

Source = Literal["trunk", "encoder", "both", "words", "tokens"]
BLOCKS: Mapping[str, tuple[str, ...]] = {
    "trunk": ("trunk",),
    "encoder": ("encoder", "words"),
    "both": ("trunk", "encoder", "words"),
    "words": ("words",),
    "tokens": ("tokens",),
}
_BY_TRUNK = {"trunk", "tokens"}  # blocks that a language model reads
Block: TypeAlias = Any  # a matrix of numpy, or of scipy (csr), which has no types; or TokenStates
Features = dict[str, Block]


@dataclasses.dataclass(frozen=True)
class Passage:
    """A text to be judged, and the conversation (or evidence) that it follows."""

    text: str
    context: tuple[Message, ...] = ()


@dataclasses.dataclass(frozen=True)
class LabelledPassages:
    """Passages and what they are, row by row."""

    passages: tuple[Passage, ...]
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Two replies to the same prompt, row by row: the one that was preferred and the other."""

    chosen: tuple[Passage, ...]
    rejected: tuple[Passage, ...]


def read_labelled_passages(path: Path) -> LabelledPassages:
    """Read rows with `label` and `text`, `prompt` and `response`, or `evidence` and `claim`.

    Args:
        path: JSONL, CSV (with a header) or Parquet. A prompt is a text, or a list of `role` and `content`.

    Raises:
        InputError: The file cannot be read, or a row is no such row; names file and line.
    """
    passages, labels = [], []
    for place, row in _rows(path):
        passages.append(_passage(row, place))
        label = row.get("label")
        if label is None or isinstance(label, dict | list) or not str(label).strip():
            raise InputError(f"{place} has no label", expected="a word or number under 'label'", fix="label the row")
        labels.append(str(label).strip())
    return LabelledPassages(tuple(passages), tuple(labels))


def read_texts(path: Path) -> list[Passage]:
    """The same rows where nobody has labelled them; a label is passed over."""
    return [_passage(row, place) for place, row in _rows(path)]


def _passage(row: Mapping[str, Any], place: str) -> Passage:
    for text, context in (("response", "prompt"), ("claim", "evidence"), ("text", "")):
        if text in row:
            return Passage(_text(row, text, place), _context(row, context, place) if context else ())
    raise InputError(
        f"{place} has the columns {', '.join(map(str, row)) or 'none'}",
        expected="label, and text, or prompt and response, or claim and evidence",
    )


def read_pairs(path: Path) -> Pairs:
    """Read rows of `prompt`, `chosen` and `rejected`; files and errors as `read_labelled_passages`."""
    chosen: list[Passage] = []
    rejected: list[Passage] = []
    for place, row in _rows(path):
        context = _context(row, "prompt", place)
        for side, found in (("chosen", chosen), ("rejected", rejected)):
            found.append(Passage(_text(row, side, place), context))
        if chosen[-1] == rejected[-1]:
            raise InputError(f"{place} prefers a reply to itself", expected="two replies", fix="remove the row")
    return Pairs(tuple(chosen), tuple(rejected))


def read_dialogues(path: Path) -> list[Passage]:
    """Read rows of `prompt` and `response` or `chosen`, or of `messages` that end with the assistant's turn.

    Files and errors as `read_labelled_passages`.
    """
    found = []
    for place, row in _rows(path):
        reply = next((name for name in ("response", "chosen") if name in row), "")
        if reply:
            found.append(Passage(_text(row, reply, place), _context(row, "prompt", place)))
        elif isinstance(row.get("messages"), list) and row["messages"]:
            turns = _context(row, "messages", place)
            if turns[-1].role != "assistant" or not turns[-1].content.strip():
                raise InputError(f"{place} ends with a turn of '{turns[-1].role}'", expected="one of the assistant")
            found.append(Passage(turns[-1].content, turns[:-1]))
        else:
            raise InputError(
                f"{place} has the columns {', '.join(map(str, row)) or 'none'}",
                expected="prompt and response, prompt and chosen, or messages",
            )
    return found


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place for messages, row) of a file."""
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".csv", ".parquet"):
        raise InputError(f"{path} ends in '{path.suffix}'", expected=".jsonl, .csv or .parquet", fix="convert the file")
    try:
        if kind == ".jsonl":
            # Only a line feed ends a line of JSONL; splitlines would also cut at U+2028.
            for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
                if line.strip():
                    yield f"{path} line {number}", _json_object(line, f"{path} line {number}")
        elif kind == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                for row in reader:
                    yield f"{path} line {reader.line_num}", {k: v for k, v in row.items() if k and v is not None}
        else:
            import pyarrow.parquet

            for number, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1):
                yield f"{path} row {number}", row
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", expected=f"a {kind[1:]} file in UTF-8") from error


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place} is no JSON ({error})", expected="one object a line", fix="mend the line") from error
    if not isinstance(found, dict):
        raise InputError(f"{place} is a {type(found).__name__}", expected="one object a line", fix="mend the line")
    return found


def _text(row: Mapping[str, Any], name: str, place: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{place} has no text under '{name}'", expected="a text", fix="mend or remove the row")
    return value


def _context(row: Mapping[str, Any], name: str, place: str) -> tuple[Message, ...]:
    value = row.get(name)
    if isinstance(value, list) and value:
        try:
            return tuple(Message(str(turn["role"]), str(turn["content"])) for turn in value)
        except (KeyError, TypeError) as error:
            raise InputError(f"{place}: '{name}' holds a turn without role or content", expected="both") from error
    return (Message("user", _text(row, name, place)),)


def families(passages: Sequence[Passage], pair_with: Sequence[Passage] = ()) -> np.ndarray:
    """(N,) a number a row: rows that share a text or a context are relatives, and so are their relatives.

    Relatives must not stand on both sides of a split, or learning by heart would look like knowledge.
    Where that makes one family of more than a third of all rows (one prompt for all), only equal rows
    are relatives.

    Args:
        passages: One a row.
        pair_with: The second passage of each row, for pairs.
    """
    rows = len(passages)
    keys: dict[Any, int] = {}
    links: list[tuple[int, int]] = []
    for side in (passages, pair_with):
        for row, passage in enumerate(side):
            for key in (passage.text, passage.context or passage.text):
                links.append((row, rows + keys.setdefault(key, len(keys))))
    graph = sparse.coo_matrix((np.ones(len(links)), tuple(zip(*links, strict=True))), (rows + len(keys),) * 2)
    found: np.ndarray = sparse.csgraph.connected_components(graph, directed=False)[1][:rows]
    if rows and np.bincount(found).max() > max(1.0, rows / 3):
        same: dict[Any, int] = {}
        both = zip(passages, pair_with or passages, strict=True)
        found = np.array([same.setdefault(key, len(same)) for key in both])
    return found


# Where heads read, as shares of the depth; chosen on training folds (docs/log.md).
PROBES = (Probe(0.2, "mean"), Probe(0.5, "mean"), Probe(0.7, "mean"), Probe(0.5, "last"))
_BUDGET = 512  # tokens of a pass
_LONGEST = 256  # tokens of a context (its end) and of a text (its beginning)


@torch.inference_mode()
def read_passages(
    lm: LanguageModel, passages: Sequence[Passage], probes: Sequence[Probe] = PROBES, *, budget: int = _BUDGET
) -> np.ndarray:
    """(N, probes x hidden) float32: hidden states pooled over the tokens of each text, not of its context.

    A context is rendered with the chat template and computed once for all texts that follow it; a text
    without context stands alone behind one end token. The pass stops at the deepest probe.
    """
    table: np.ndarray | None = None
    with tapped(lm, probes) as read:
        for part in pack(laid_out(lm, passages, budget=budget), budget=budget):
            states = [s.float() for s in read(part)]
            for row, (first, last) in zip(part.rows, part.spans, strict=True):
                own = [
                    s[first : last + 1].mean(0) if p.pool == "mean" else s[last]
                    for p, s in zip(probes, states, strict=True)
                ]
                found = torch.cat(own).cpu().numpy()
                table = np.empty((len(passages), len(found)), np.float32) if table is None else table
                table[row] = found
    return table if table is not None else np.empty((0, 0), np.float32)


def laid_out(lm: LanguageModel, passages: Sequence[Passage], *, budget: int) -> list[Group]:
    """Texts behind their context, as a trunk reads them: each ends with the end token.

    A context with more texts than a pack of `budget` tokens holds is laid down again; of a long context the
    end is read, of a long text the beginning.
    """
    longest = min(_LONGEST, lm.context // 2)
    behind: dict[tuple[Message, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for row, passage in enumerate(passages):
        tokens = lm.encode_reply(passage.text)
        behind.setdefault(passage.context, []).append((row, (*tokens[: min(longest, len(tokens)) - 1], tokens[-1])))
    groups = []
    for context, texts in behind.items():
        prompt = lm.encode(Prompt("context", context)) if context else (lm.end_token,)
        if len(prompt) > longest:  # the template's lead and the end, where the question stands
            lead = min(lm.lead, longest // 2)
            prompt = (*prompt[:lead], *prompt[lead - longest :])
        waiting: list[tuple[int, tuple[int, ...]]] = []
        used = len(prompt)
        for row, tokens in texts:
            if waiting and used + len(tokens) > budget:
                groups.append(_group(prompt, waiting))
                waiting, used = [], len(prompt)
            waiting.append((row, tokens))
            used += len(tokens)
        groups.append(_group(prompt, waiting))
    return groups


def _group(prompt: tuple[int, ...], texts: Sequence[tuple[int, tuple[int, ...]]]) -> Group:
    return Group(prompt, tuple(tokens for _, tokens in texts), tuple(row for row, _ in texts))


# Pieces of words within their borders, and words with their neighbours: a misspelt or glued word
# still shares pieces with the right one, and writing without spaces is cut into pieces all the same.
_HASHERS = (
    HashingVectorizer(n_features=1 << 16, analyzer="char_wb", ngram_range=(2, 5), alternate_sign=False),
    HashingVectorizer(n_features=1 << 16, ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]", alternate_sign=False),  # noqa: S106
)


def _hashed(texts: Sequence[str]) -> sparse.csr_matrix:
    return sparse.hstack([h.transform(texts) for h in _HASHERS], format="csr", dtype=np.float32)


class Reader:
    """Reads the blocks of features that a source names.

    Args:
        source: `trunk`, `encoder` (with words), `words`, `both` trunk and encoder (with words), or
            `tokens` of the trunk.
        lm: Needed where the source has a trunk or its tokens.
        encoder: Needed where the source has an encoder.

    Raises:
        ModelError: A model that the source needs is not given.
    """

    def __init__(self, source: Source, lm: LanguageModel | None = None, encoder: Encoder | None = None) -> None:
        if source not in BLOCKS:
            raise InputError(f"source '{source}'", expected=", ".join(BLOCKS), fix="choose one of these")
        for block, model in (*((block, lm) for block in _BY_TRUNK), ("encoder", encoder)):
            if block in BLOCKS[source] and model is None:
                raise ModelError(f"source '{source}' without its {block}", expected=f"a model to read the {block}")
        self.source: Source = source
        self.lm, self.encoder = lm, encoder

    @classmethod
    def open(
        cls, source: Source, *, model: str = weights.EMBEDDED_POLICY, encoder: str = weights.EMBEDDED_ENCODER
    ) -> Reader:
        """Load only what the source needs."""
        blocks = BLOCKS.get(source, ())
        return cls(
            source,
            load_model(model) if _BY_TRUNK & set(blocks) else None,
            Encoder(encoder) if "encoder" in blocks else None,
        )

    def read(self, passages: Sequence[Passage], *, contextual: bool) -> Features:
        """Each block's matrix, one row a passage; its columns depend on whether contexts are read.

        With them comes `length`: the natural logarithm of one plus the characters of the text.
        """
        if not contextual:
            passages = [Passage(p.text) for p in passages]
        found: Features = {}
        for block in BLOCKS[self.source]:
            if block == "trunk" and self.lm is not None:
                found[block] = read_passages(self.lm, passages)
            elif block == "tokens" and self.lm is not None:
                found[block] = read_states(self.lm, laid_out(self.lm, passages, budget=_BUDGET), len(passages))
            elif block == "encoder" and self.encoder is not None:
                found[block] = _embedded(self.encoder, passages, contextual=contextual)
            else:
                sides = [[p.text for p in passages], *([[_last_turn(p) for p in passages]] if contextual else [])]
                found[block] = sparse.hstack([_hashed(side) for side in sides], format="csr")
        found["length"] = log_lengths(passages)
        return found

    def marks(self) -> dict[str, np.ndarray]:
        """What tells these models from others: numbers that a critic keeps beside its heads."""
        found = {}
        if self.lm is not None and _BY_TRUNK & set(BLOCKS[self.source]):
            found["trunk"] = np.frombuffer(self.lm.fingerprint.encode(), np.uint8).astype(np.float32)
        if "encoder" in BLOCKS[self.source] and self.encoder is not None:
            found["encoder"] = self.encoder.embed(["What is the name of the encoder that reads this?"])[0].numpy()
        return found


def log_lengths(passages: Sequence[Passage]) -> np.ndarray:
    """(N, 1) natural logarithm of one plus the characters of each text."""
    return np.array([math.log1p(len(p.text)) for p in passages]).reshape(-1, 1)


def _last_turn(passage: Passage) -> str:
    return passage.context[-1].content if passage.context else ""


def _embedded(encoder: Encoder, passages: Sequence[Passage], *, contextual: bool) -> np.ndarray:
    """Embeddings of the text and, with contexts, of the last turn and of where the two agree."""
    text: np.ndarray = encoder.embed([p.text for p in passages]).numpy()
    if not contextual:
        return text
    before = encoder.embed([_last_turn(p) for p in passages]).numpy()
    return np.concatenate([text, before, text * before, np.abs(text - before)], axis=1)
