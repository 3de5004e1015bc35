"""Learning from a file of compared replies: the stage in runs, its labels, its measures, its gate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
import torch
from tests.tiny_world import World, write_lines

from tutelage.config import OBJECTIVES, Gate, Pairs, Recipe
from tutelage.config.pairs import PairObjective
from tutelage.engines import weights
from tutelage.engines.batch import Batch
from tutelage.engines.load import load_model
from tutelage.errors import NothingToLearn
from tutelage.feedback.comparisons import Compared, read_comparisons
from tutelage.loop.agreement import agreement_of, agreements, compare_pairs
from tutelage.loop.bench import Silent, Workbench
from tutelage.loop.choice import choose
from tutelage.loop.evaluate import Answers
from tutelage.loop.gates import preference_gate
from tutelage.loop.offline import begin_pairs, lay, learn_pairs, split
from tutelage.loop.pairing import Row, apart, pair_groups
from tutelage.policy.lora import attach
from tutelage.records import Evidence, Message, Prompt
from tutelage.store.ledger import Unit

pytest_plugins = ["tests.tiny_world"]

ALONE = ("supervised.enabled=false", "update.rounds=0", "prompts.gate_limit=6", "prompts.heldout_limit=6",
         "pairs.learning_rate=0.02", "pairs.batch=4", "pairs.heldout=0.3")  # fmt: skip


def pairs_file(folder: Path, rows: int = 14) -> Path:
    """Every pair prefers the reply that begins with Yes; some with votes, one a tie, one that nobody answers."""
    lines: list[dict[str, Any]] = [
        {"prompt": f"Is {n} a number?", "chosen": f"Yes, {n}.", "rejected": f"No {n * n}"} for n in range(rows)
    ]
    for n, votes in enumerate((["chosen"] * 3, ["chosen", "rejected", "chosen"], ["chosen", "chosen", "tie"])):
        lines[n]["votes"] = votes
    lines[3]["votes"] = ["chosen", "rejected"]
    lines[4]["votes"] = ["skip"]
    lines[5]["votes"] = [4, 1]
    for n in (6, 7, 8, 9):
        lines[n]["chosen"] = "Yes, " * 30
    return write_lines(folder / "pairs.jsonl", lines)


@pytest.fixture
def play(new_world: Callable[..., World], tmp_path: Path) -> Callable[..., World]:
    file = pairs_file(tmp_path)

    def played(*more: str, name: str = "one", code: int = 3, alone: bool = True) -> World:
        world = new_world(name=f"world-{abs(hash(more))}")
        settings = (f"pairs.file={file}", *(ALONE if alone else ()), *more)
        done = world.play(*[w for s in settings for w in ("--set", s)], name=name)
        assert done.code == code, done.err
        return world

    return played


def steps(world: World, stage: str) -> list[dict[str, float]]:
    return [m["values"] for m in world.rows("metrics") if m["stage"] == stage]


def test_a_run_learns_from_pairs_alone(play: Callable[..., World]) -> None:
    world = play("pairs.epochs=2")
    assert [u["name"] for u in world.rows("units")] == ["start", "pairs-0", "pairs-1", "pairs-2", "final"]
    assert [u["version"] for u in world.rows("units")] == ["start", "start", "p1", "p2", "p2"]
    (note,) = world.rows("notes", topic="pairs")
    assert {k: note["body"][k] for k in ("pairs", "ties", "same", "long", "silent", "prior_pairs")} == {
        "pairs": 13, "ties": 1, "same": 0, "long": 0, "silent": 1, "prior_pairs": 5,
    }  # fmt: skip
    first, last = steps(world, "offline-heldout")
    assert first["reward"] == 0.5 and first["margin"] == 0.0 and first["kl_to_start"] == pytest.approx(0.0, abs=1e-6)
    assert last["margin"] > 0 and last["kl_to_start"] > 0 and last["reward"] > 0.5
    updates = steps(world, "offline")
    assert len(updates) == 2 * 3 and updates[0]["loss"] == pytest.approx(math.log(2))
    summary = json.loads((world.runs / "one" / "summary.json").read_text(encoding="utf-8"))
    assert [e["metric"] for e in summary["evaluation"][:3]] == ["pairs_reward", "pairs_likelihood", "pairs_per_token"]
    assert summary["kl_to_start"] == last["kl_to_start"] and summary["candidate"] == "p2"
    page = (world.runs / "one" / "report.html").read_text(encoding="utf-8")
    assert "Held-out pairs" in page and "Moved towards the better reply" in page
    # Every figure recomputes from the rows that the ledger keeps.
    kept = {r["body"]["pass"]: r["body"]["rows"] for r in world.rows("notes", topic="heldout_pairs")}
    assert agreements(kept[2])["margin"] == last["margin"]
    assert compare_pairs(kept[0], kept[2])[0].after == last["reward"] == summary["evaluation"][0]["after"]
    trained = {p["hash"] for p in world.rows("prompts", split="pairs")}
    assert trained and not trained & {p["hash"] for p in world.rows("prompts", split="pairs-heldout")}


def test_a_resumed_stage_ends_with_the_same_weights(play: Callable[..., World], monkeypatch: Any) -> None:
    """Broken off between two passes: moments, schedule and order are those of an undisturbed run."""
    from tutelage.loop import improve

    stop = "pairs-2"
    whole = play("pairs.epochs=2", "update.rounds=1")
    inner = improve.timed

    def break_off(run: Any, name: str, stage: str, **more: Any) -> Any:
        if name == stop:
            raise KeyboardInterrupt
        return inner(run, name, stage, **more)

    with monkeypatch.context() as patch:
        patch.setattr(improve, "timed", break_off)
        other = play("pairs.epochs=2", "update.rounds=1", "title=broken", code=130)
    assert stop not in [u["name"] for u in other.rows("units")]
    assert other.resume().code == 3
    assert set(whole.weights()) == {"p1", "p2", "r1"}
    assert other.weights() == whole.weights()


def test_the_stage_comes_after_the_supervised_one_and_before_the_rounds(play: Callable[..., World]) -> None:
    world = play("update.rounds=1", "prompts.gate_limit=6", alone=False)
    names = [u["name"] for u in world.rows("units")]
    assert names == ["start", "supervised", "pairs-0", "pairs-1", "round-1", "final"]
    assert set(world.weights()) == {"r0", "p1", "r1"}


def learner_of(lm: Any, tmp_path: Path) -> Callable[..., tuple[dict[str, torch.Tensor], Unit]]:
    """Plays the stage by itself; what was trained, and the unit of the last pass."""
    adapter = attach(lm.model, rank=2, alpha=8.0, seed=1)
    start = {k: v.clone() for k, v in adapter.state().items()}

    def played(options: dict[str, Any] | None = None, **pairs: Any) -> tuple[dict[str, torch.Tensor], Unit]:
        adapter.load_state(start, where="start")
        made = {"file": pairs_file(tmp_path), "learning_rate": 0.02, "batch": 4, "heldout": 0.3, **pairs}
        recipe = Recipe.model_validate(
            {"pairs": {k: str(v) if k == "file" else v for k, v in made.items()}, "objective": options or {},
             "sampling": {"max_new_tokens": 8}}
        )  # fmt: skip
        bench = Workbench(cast(Any, SimpleNamespace(recipe=recipe)), lm, adapter, cast(Any, None), Silent())
        offline = lay(bench, read_comparisons(Path(recipe.pairs.file), limit=recipe.pairs.limit))
        begin_pairs(bench, offline, Unit("pairs-0", "pairs"))
        for epoch in range(1, recipe.pairs.epochs + 1):
            unit = Unit(f"pairs-{epoch}", "pairs")
            learn_pairs(bench, offline, unit, epoch)
        return {k: v.clone() for k, v in adapter.state().items()}, unit

    return played


@pytest.fixture
def learned(load_tiny: Callable[[str], Any], tmp_path: Path) -> Callable[..., tuple[dict[str, torch.Tensor], Unit]]:
    """The stage on a tiny model."""
    return learner_of(load_tiny("llama"), tmp_path)


@pytest.mark.skipif(not weights.have(weights.EMBEDDED_POLICY), reason="needs the embedded model: run `tutelage fetch`")
def test_the_embedded_model_learns_what_generalises(tmp_path: Path) -> None:
    """Every pair prefers the reply that begins with Yes, so the pairs held out do as well."""
    _, unit = learner_of(load_model(weights.EMBEDDED_POLICY), tmp_path)(learning_rate=1e-3, epochs=2, longest=80)
    (after,) = values(unit, "offline-heldout")
    assert after["reward"] == 1.0 and after["margin"] > 1.0 and 0 < after["kl_to_start"] < 2.0


def values(unit: Unit, stage: str) -> list[dict[str, float]]:
    return [json.loads(row[3]) for row in unit.rows["metrics"] if row[2] == stage]


def test_every_objective_of_the_family_learns(learned: Any) -> None:
    assert get_args(PairObjective) == tuple(n for n, k in OBJECTIVES.items() if k.family == "preference" and n != "xpo")
    ends: list[dict[str, torch.Tensor]] = []
    for name in get_args(PairObjective):
        state, unit = learned(objective=name)
        updates = values(unit, "offline")
        assert updates and all(math.isfinite(v) for step in updates for v in step.values())
        assert ("z0" in updates[0]) == (name == "kto")
        assert values(unit, "offline-heldout")[-1]["kl_to_start"] > 0
        assert not any(all(torch.equal(state[k], end[k]) for k in state) for end in ends)
        ends.append(state)


OTHERS: dict[str, Any] = {
    "labels": "hard", "objective": "ipo", "against": "own", "epochs": 2, "batch": 3, "learning_rate": 0.01,
    "limit": 9, "heldout": 0.1, "longest": 100,
}  # fmt: skip


def test_every_key_changes_what_is_learned(learned: Any, tmp_path: Path) -> None:
    assert {*OTHERS, "file"} == set(Pairs.model_fields)
    other = tmp_path / "other"
    other.mkdir()
    base, _ = learned()
    again, _ = learned()
    assert all(torch.equal(v, again[k]) for k, v in base.items())
    for key, value in {**OTHERS, "file": pairs_file(other, 12)}.items():
        changed, _ = learned(**{key: value})
        assert not all(torch.equal(v, changed[k]) for k, v in base.items()), key
    options, _ = learned({"beta": 2.0})
    assert not all(torch.equal(v, options[k]) for k, v in base.items())


def test_own_replies_take_the_place_of_the_rejected(learned: Any) -> None:
    _, unit = learned(against="own", heldout=0.0)
    assert len(unit.rows["generations"]) == 12  # of 13 pairs one is a tie, which names no better reply
    assert values(unit, "offline")[0]["margin"] == pytest.approx(0.0, abs=1e-5)  # the reference is the policy itself


def test_a_gate_that_looks_at_pairs(play: Callable[..., World]) -> None:
    world = play("gate.evidence=pairs", "pairs.epochs=4", "pairs.heldout=0.6", "gate.max_correct_loss=1.0", code=0)
    (decision,) = world.rows("decisions")
    assert decision["gate"] == "preference" and decision["accepted"]


def answers(*outcomes: str) -> Answers:
    from tutelage.records import SuiteItem

    items = tuple(
        SuiteItem(Prompt(str(i), (Message("user", "?"),)), "answerable", ("x",)) for i in range(len(outcomes))
    )
    return Answers("s", "v", items, ("",) * len(outcomes), outcomes)  # type: ignore[arg-type]


def test_the_preference_gate_rejects_without_evidence() -> None:
    good = answers(*["correct"] * 40)
    grown = Evidence("pairs", "pairs_reward", 0.5, 0.7, 0.1, 0.3, 100)
    assert preference_gate([grown], good, good, Gate()).accepted
    assert not preference_gate([grown], good, good, Gate(enabled=False)).accepted
    assert "no pair" in preference_gate([], good, good, Gate()).reason
    unsure = Evidence("pairs", "pairs_reward", 0.5, 0.55, -0.05, 0.15, 100)
    assert "did not surely grow" in preference_gate([unsure], good, good, Gate()).reason
    assert "correct answers" in preference_gate([grown], good, answers(*["wrong"] * 40), Gate()).reason


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("pairs.epochs=2",), "pairs.epochs is not read without pairs.file"),
        (("gate.evidence=pairs",), "gate.evidence"),
        (("pairs.file=nowhere.jsonl",), "nowhere.jsonl"),
        (("pairs.file=FILE", "pairs.objective=kto", "pairs.against=own"), "kto learns from single ones"),
        (("pairs.file=FILE", "pairs.objective=xpo"), "pairs.objective"),
        (("pairs.file=FILE", "objective.gamma=1.0"), "objective.gamma is not read"),
        (("pairs.file=FILE", "objective.pair_tie=1.0"), "objective.pair_tie is not read"),
        (("pairs.file=FILE", "controller.enabled=true"), "leave pairs.file out"),
        (("pairs.file=FILE", "pairs.objective=exo-pair", "objective.smoothing=0.0"), "objective.smoothing"),
        (("supervised.enabled=false", "update.rounds=0"), "nothing would be learned"),
    ],
)
def test_what_makes_no_sense_is_refused(world: World, tmp_path: Path, settings: tuple[str, ...], said: str) -> None:
    file = str(pairs_file(tmp_path))
    done = world.play(*[w for s in settings for w in ("--set", s.replace("FILE", file))])
    assert done.code == 2 and said in done.err and not (world.runs / "one").exists()


def test_pairs_that_are_all_too_long_stop_the_stage(learned: Any) -> None:
    with pytest.raises(NothingToLearn, match="'long': 13"):
        learned(longest=3)


def test_questions_of_a_suite_are_not_learned_from(world: World, tmp_path: Path) -> None:
    asked = json.loads((world.folder / "gate.jsonl").read_text(encoding="utf-8").splitlines()[0])["prompt"]
    file = write_lines(tmp_path / "p.jsonl", [{"prompt": asked, "chosen": "a", "rejected": "b"}])
    done = world.play("--set", f"pairs.file={file}")
    assert done.code == 2 and "held out" in done.err


# ---- by hand -------------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    #      prompt  label  tokens    now           start
    row = ["q", 0.9, 2, 4, -6.0, -8.0, -7.0, -8.5]
    # -6 > -8; a token -3 < -2; gains 1 and 0.5
    assert agreement_of(row) == {"likelihood": 1.0, "per_token": 0.0, "reward": 1.0, "margin": 0.5}
    turned = ["q", 0.1, 2, 4, -6.0, -8.0, -7.0, -8.5]
    assert agreement_of(turned) == {"likelihood": 0.0, "per_token": 1.0, "reward": 0.0, "margin": -0.5}
    assert agreement_of(["q", 0.5, *row[2:]]) is None
    still = ["q", 0.9, 2, 4, -6.0, -8.0, -6.0, -8.0]
    assert agreements([row, turned, still, ["q", 0.5, *row[2:]]]) == pytest.approx(
        {"likelihood": 2 / 3, "per_token": 1 / 3, "reward": 0.5, "margin": 0.0, "sided": 3.0}
    )
    assert agreements([]) == {"sided": 0.0}
    reward = compare_pairs([still, still], [row, row])[0]
    assert (reward.before, reward.after, reward.low, reward.high, reward.n) == (0.5, 1.0, 0.5, 0.5, 2)
    assert compare_pairs([], [])[0].after is None


def test_pairs_of_one_prompt_are_held_out_together() -> None:
    def one(text: str) -> Compared:
        return Compared(Prompt("p", (Message("user", text),)), "a", "b")

    pairs = [one(str(n % 10)) for n in range(40)]
    out = split(pairs, 0.3, seed=5)
    assert len(out) == 3 and out == split(pairs[::-1], 0.3, seed=5) and out != split(pairs, 0.3, seed=6)
    assert split(pairs, 0.0, seed=5) == set()


def test_a_pair_as_two_single_replies() -> None:
    (group,) = apart((1,), Row((2, 3)), Row((4,)), 0.75).groups
    assert group.advantage == ((0.5, 0.5), (-0.5,)) and group.completions == ((2, 3), (4,))
    assert apart((1,), Row((2,)), Row((4,)), 0.5).groups == ()
    assert apart((1,), Row(()), Row((4,)), 1.0).counts["empty"] == 1


def test_match_reproduces_the_share_of_votes() -> None:
    """One prompt, two replies of one token, 7 of 10 votes: the policy's odds against the start's become 7 to 3."""
    recipe = Recipe.model_validate(
        {"pairs": {"file": "x", "objective": "dpo"}, "objective": {"beta": 0.5, "mode": "match"}}
    )
    loss = choose(recipe, recipe.pair_objective).loss
    (group,) = pair_groups((1,), (Row((2,)), Row((3,))), [(0, 1, 0.7)]).groups
    label_BT = torch.tensor(group.advantage)
    start = torch.tensor([0.2, -0.3, 1.0])
    logits = start.clone().requires_grad_(True)
    ref_BT = start.log_softmax(0)[:2, None]
    steps = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14)

    def closure() -> torch.Tensor:
        steps.zero_grad()
        logp_BT = logits.log_softmax(0)[:2, None]
        ones = torch.ones_like(ref_BT)
        value = loss(Batch(logp_BT, ones, ref_BT, ref_BT, label_BT, 2, 2, 0 * ones, 0 * ones)).value
        value.backward()  # type: ignore[no-untyped-call]
        return value

    steps.step(closure)  # type: ignore[no-untyped-call]
    gain = (logits.log_softmax(0)[:2] - ref_BT[:, 0]).detach()
    assert torch.sigmoid(0.5 * (gain[0] - gain[1])).item() == pytest.approx(0.7, abs=1e-4)


def test_the_stage_takes_the_rounds_objective_where_that_learns_from_pairs() -> None:
    def of(update: str, own: str | None = None) -> str:
        return Recipe.model_validate(
            {"update": {"objective": update}, "pairs": {"file": "x", "objective": own}}
        ).pair_objective

    assert [of("grpo"), of("ipo"), of("xpo"), of("ipo", "kto")] == ["dpo", "ipo", "dpo", "kto"]
