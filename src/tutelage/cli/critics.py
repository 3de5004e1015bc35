"""Commands around critics: judges that are learned from labelled texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App

from tutelage.cli.parameters import Json, app, help_, show

__all__ = ["critic", "mark", "perturb", "train"]

critic = App(name="critic", help="Critics from labelled data.")
app.command(critic)


@critic.command
def train(
    data: Annotated[Path, help_("JSONL, CSV or Parquet of labelled texts or pairs")],
    *,
    out: Annotated[Path, help_("file to write: critic.safetensors")],
    kind: Annotated[
        Literal["preference", "safety", "toxicity", "factuality", "evidence", "sincerity", "coherence"],
        help_("what it looks for"),
    ],
    features: Annotated[
        Literal["trunk", "encoder", "both", "words", "tokens"],
        help_("what it reads: a model's hidden states, embeddings, words; tokens: attention over states"),
    ] = "both",
    positive: Annotated[str | None, help_("label that is looked for (default: the kind's own word)")] = None,
    model: Annotated[str | None, help_("language model whose hidden states are read")] = None,
    isotonic: Annotated[bool, help_("calibrate by isotonic regression", negative="")] = False,
    seed: Annotated[int, help_("of split, folds and networks")] = 0,
    as_json: Json = False,
) -> int:
    """Train a critic on labelled data and measure it on a fifth of the rows that it never saw.

    Rows: {"text" or "prompt" and "response" or "claim" and "evidence", "label"}, or for a preference
    {"prompt", "chosen", "rejected"}. The file serves as a judge: kind = "critic", or --judge critic=FILE.

    Examples to type:
        tutelage critic train toxic.jsonl --kind toxicity --out toxicity.safetensors
        tutelage critic train pairs.jsonl --kind preference --features both --out liked.safetensors
    """
    from tutelage.engines.weights import EMBEDDED_POLICY
    from tutelage.feedback.critic_data import Reader
    from tutelage.feedback.critic_training import train_critic

    reader = Reader.open(features, model=model or EMBEDDED_POLICY)
    found = train_critic(data, out, kind=kind, reader=reader, positive=positive, isotonic=isotonic, seed=seed)
    show(found, as_json, lambda: _critic_lines(found))
    return 0


@critic.command
def perturb(
    dialogues: Annotated[Path, help_("JSONL, CSV or Parquet of dialogues")],
    *,
    out: Annotated[Path, help_("file to write: coherence.jsonl")],
    kind: Annotated[
        list[Literal["exchanged", "earlier", "echo", "torn"]] | None,
        help_("how replies are spoilt, repeatable (default: every way)"),
    ] = None,
    as_json: Json = False,
) -> int:
    """Spoil the replies of dialogues, to train a critic of coherence from what nobody labelled.

    Rows: {"prompt" and "response" or "chosen"} or {"messages"}; a prompt is a text or a list of turns.

    Examples to type:
        tutelage critic perturb dialogues.jsonl --out coherence.jsonl
        tutelage critic train coherence.jsonl --kind coherence --out coherence.safetensors
    """
    from tutelage.feedback.critic_data import read_dialogues
    from tutelage.feedback.perturbation import KINDS, perturb_file

    found = perturb_file(read_dialogues(dialogues), out, kind or KINDS)
    counted = ", ".join(f"{count} {name}" for name, count in found["kinds"].items())
    show(
        found,
        as_json,
        lambda: [f"{found['file']}: {found['rows']} rows from {found['dialogues']} dialogues ({counted})"],
    )
    return 0


@critic.command
def mark(
    file: Annotated[Path, help_("critic: what `critic train` wrote")],
    texts: Annotated[
        Path | None, help_("JSONL, CSV or Parquet of texts, as for training; a label is not needed")
    ] = None,
    *,
    text: Annotated[list[str] | None, help_("a text itself, repeatable")] = None,
    share: Annotated[float, help_("of the blame that the marked words carry")] = 0.5,
    model: Annotated[str | None, help_("language model whose hidden states the critic reads")] = None,
    as_json: Json = False,
) -> int:
    """Mark the words that turn a critic against a text: each is left out in turn, and the text judged again.

    Examples to type:
        tutelage critic mark toxicity.safetensors --text "You are a fool, my friend."
        tutelage critic mark safety.safetensors replies.jsonl --json
    """
    from tutelage.applications.judging import marked
    from tutelage.engines.weights import EMBEDDED_POLICY

    found = marked(file, texts, text or [], share=share, model=model or EMBEDDED_POLICY)
    show(found, as_json, lambda: [line for row in found for line in _marked_lines(row)])
    return 0


def _marked_lines(row: dict[str, Any]) -> list[str]:
    shown, at = "", 0
    for place in sorted(row["places"], key=lambda p: int(p["start"])):
        shown += f"{row['text'][at : place['start']]}[{row['text'][place['start'] : place['end']]}]"
        at = place["end"]
    worst = ", ".join(f"{place['text']} {place['score']:+.2f}" for place in row["places"])
    return [f"{row['reward']:+.2f}  {shown}{row['text'][at:]}", *([f"       {worst}"] if worst else [])]


def _critic_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['file']}: {found['kind']} from {found['rows']} rows, measured on {found['held_out']} unseen"]
    for name, (value, low, high) in found["quality"].items():
        lines.append(f"  {name:<24}{value:.3f}  [{low:.3f}, {high:.3f}]")
    return lines
