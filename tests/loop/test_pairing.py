"""From rewards, opinions and votes to pairs, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from tutelage.engines.batch import Batch
from tutelage.errors import RecipeError, TrainingError
from tutelage.feedback.votes import VotePrior, fit_prior
from tutelage.loop.pairing import (
    Row,
    mismatched,
    pair_groups,
    paired,
    pairs_of_votes,
    single_replies,
    unpaired,
    with_reference,
)
from tutelage.loop.ranking import Pairing, rank_agreement
from tutelage.objectives.pairs import read
from tutelage.objectives.preference import Dpo
from tutelage.objectives.unpaired import Kto
from tutelage.policy.learner import TrainGroup, padded
from tutelage.records import Generation, Message, PreferencePair, Prompt, SamplerSettings

TEXTS = ["a", "b", "c", "d"]
REWARDS = [0.0, 3.0, 1.0, 2.0]  # rank: 1, 3, 2, 0


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def reply(text: str, tokens: tuple[int, ...], logps: tuple[float, ...] = ()) -> Generation:
    given = logps or (-0.5,) * len(tokens)
    return Generation(text, "p", 0, text, tokens, given, True, SamplerSettings(), "start", 0)


def batch_of(groups: tuple[TrainGroup, ...]) -> Batch:
    """What the learner makes of groups, with the reference's log-probabilities for the policy's."""
    flat = [row for g in groups for row in g.ref_logp]
    logp = padded(flat)
    keep = padded([(1.0,) * len(row) for row in flat])
    label = padded([row for g in groups for row in g.advantage])
    return Batch(logp.requires_grad_(True), keep, logp.detach(), logp.detach(), label, len(flat), int(keep.sum()))


# -- which pairs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "wanted"),
    [
        ("best_worst", [(1, 0, s(3.0))]),
        ("neighbours", [(1, 3, s(1.0)), (3, 2, s(1.0)), (2, 0, s(1.0))]),
        ("all", [(1, 3, s(1.0)), (1, 2, s(2.0)), (1, 0, s(3.0)), (3, 2, s(1.0)), (3, 0, s(2.0)), (2, 0, s(1.0))]),
    ],
)
def test_pairs_of_rewards_by_hand(select: str, wanted: list[tuple[int, int, float]]) -> None:
    pairs, counts = Pairing(select).from_rewards(TEXTS, REWARDS)
    assert [p[:2] for p in pairs] == [w[:2] for w in wanted]
    assert [p[2] for p in pairs] == pytest.approx([w[2] for w in wanted])
    assert counts == {"pairs": len(wanted), "ties": 0, "same": 0, "unjudged": 0, "missing": 0}


@pytest.mark.parametrize(("temperature", "p"), [(1.0, s(3.0)), (2.0, s(1.5)), (0.0, 1.0), (1e-9, 1.0), (1e9, 0.5)])
def test_the_temperature_softens_labels(temperature: float, p: float) -> None:
    ((_, _, found),), _ = Pairing(temperature=temperature).from_rewards(TEXTS, REWARDS)
    assert found == pytest.approx(p)


def test_ties_missing_rewards_and_equal_texts_are_left_out_and_counted() -> None:
    texts = ["one  two", "one\ntwo ", "three", "four", "five"]
    rewards = [3.0, 1.0, 2.0, 2.0, None]
    pairs, counts = Pairing("all").from_rewards(texts, rewards)
    # Six pairs of four replies: 0 and 1 are the same text, 2 and 3 tie.
    assert [p[:2] for p in pairs] == [(0, 2), (0, 3), (2, 1), (3, 1)]
    assert counts == {"pairs": 4, "ties": 1, "same": 1, "unjudged": 0, "missing": 1}
    _, wider = Pairing("all", tie=1.0).from_rewards(texts, rewards)
    assert wider == {"pairs": 0, "ties": 5, "same": 1, "unjudged": 0, "missing": 1}
    assert Pairing().from_rewards(texts[:2], [math.nan, 1.0]) == ([], {**counts, "pairs": 0, "ties": 0, "same": 0})


def test_pairs_of_opinions_by_hand() -> None:
    """0 beats 1 with 0.8 one way and 1 - 0.4 the other: 0.7. Mean wins: 0 has 0.7, 2 has 0.5, 1 has 0.4."""
    gone = None
    prefer = [[gone, 0.8, gone], [0.4, gone, 0.5], [gone, 0.5, math.nan]]
    pairs, counts = Pairing("all").from_opinions(["a", "b", "c"], prefer)
    assert [p[:2] for p in pairs] == [(0, 1)] and pairs[0][2] == pytest.approx(0.7)
    assert counts == {"pairs": 1, "ties": 1, "same": 0, "unjudged": 1, "missing": 0}
    ((_, _, cool),), _ = Pairing(temperature=0.5).from_opinions(["a", "b"], [[gone, 0.7], [gone, gone]])
    assert cool == pytest.approx(s(2 * math.log(0.7 / 0.3)))  # log-odds doubled
    ((_, _, hard),), _ = Pairing(temperature=0.0).from_opinions(["a", "b"], [[gone, 0.3], [gone, gone]])
    assert hard == 1.0  # of the better one, which is the second
    lone, counts = Pairing().from_opinions(["a", "b", "c"], [[gone, 0.9, gone], [gone] * 3, [gone] * 3])
    assert len(lone) == 1 and counts["missing"] == 1


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_certain_opinion_stays_certain(p: float) -> None:
    ((first, _, found),), _ = Pairing().from_opinions(["a", "b"], [[None, p], [None, None]])
    assert (first, found) == (0 if p else 1, 1.0)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.sampled_from(["best_worst", "all", "neighbours"]))
def test_rewards_and_the_opinions_they_imply_give_the_same_labels(rewards: list[float], select: str) -> None:
    texts = [str(i) for i in range(len(rewards))]
    prefer = [[s(a - b) for b in rewards] for a in rewards]
    one, _ = Pairing(select).from_rewards(texts, rewards)
    other, _ = Pairing(select, tie=1e-12).from_opinions(texts, prefer)
    known = {(i, j): p for i, j, p in one} | {(j, i): 1 - p for i, j, p in one}
    if len({round(r, 6) for r in rewards}) == len(rewards):
        assert {frozenset(p[:2]) for p in one} == {frozenset(p[:2]) for p in other}
        assert [p for *_, p in other] == pytest.approx([known[i, j] for i, j, _ in other])
        assert all(p >= 0.5 for *_, p in one)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"select": "random"}, "random"), ({"temperature": -1.0}, "temperature"), ({"tie": math.nan}, "tie"), ({"together": 0}, "together")],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Pairing(**options)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TrainingError, match="2 rewards of 4 replies"):
        Pairing().from_rewards(TEXTS, [1.0, 2.0])
    with pytest.raises(TrainingError, match="inf"):
        Pairing().from_rewards(TEXTS[:2], [1.0, math.inf])
    with pytest.raises(TrainingError, match="of 2 replies"):
        Pairing().from_opinions(TEXTS[:2], [[0.5, 0.5]])
    with pytest.raises(TrainingError, match="opinion"):
        Pairing().from_opinions(TEXTS[:2], [[None, 1.5], [None, None]])
    one = [[1, 2]], [[reply("a", (3,)), reply("b", (4,))]]
    with pytest.raises(TrainingError, match="both rewards and opinions"):
        paired(*one, Pairing())
    with pytest.raises(TrainingError, match="both rewards and opinions"):
        paired(*one, Pairing(), rewards_PG=[[1.0, 2.0]], prefer_PGG=[[[0.5] * 2] * 2])
    with pytest.raises(TrainingError, match="1 prompts"):
        paired(*one, Pairing(), rewards_PG=[])
    with pytest.raises(TrainingError, match="1 rows of log-probabilities of 2 replies"):
        paired(*one, Pairing(), rewards_PG=[[1.0, 2.0]], ref_logp_BT=torch.zeros(1, 1))


# -- groups for the learner -----------------------------------------------------------------------


def test_a_round_becomes_groups_that_the_objectives_read_back() -> None:
    prompts = [(1, 2), (3,)]
    replies = [
        [reply("a", (10, 11), (-0.1, -0.2)), reply("b", (12,), (-0.3,)), reply("c", (13, 14, 15))],
        [reply("d", (16,)), reply("e", (17,))],
    ]
    ref = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0], [-4.0, -5.0, -6.0], [-7.0, 0.0, 0.0], [-8.0, 0.0, 0.0]])
    found = paired(
        prompts, replies, Pairing(temperature=2.0), rewards_PG=[[2.0, 0.0, 1.0], [1.0, 1.0]], ref_logp_BT=ref
    )
    (group,) = found.groups
    assert group.prompt == (1, 2) and group.completions == ((10, 11), (12,))
    assert group.old_logp == ((-0.1, -0.2), (-0.3,)) and group.ref_logp == ((-1.0, -2.0), (-3.0,))
    assert group.advantage[0] == pytest.approx((s(1.0), s(1.0))) and group.advantage[1] == pytest.approx((1 - s(1.0),))
    assert found.counts == {"pairs": 1, "ties": 1, "same": 0, "unjudged": 0, "missing": 0, "empty": 0}
    assert float(read(batch_of(found.groups)).label_N) == pytest.approx(s(1.0))
    prefer = [[[None, 0.9, None], [None] * 3, [None] * 3], [[None, 0.2], [None, None]]]
    second = paired(prompts, replies, Pairing(), prefer_PGG=prefer)
    assert read(batch_of(second.groups)).label_N.tolist() == pytest.approx([0.9, 0.8])
    assert second.groups[1].completions == ((17,), (16,)) and second.groups[1].ref_logp == ((0.0,), (0.0,))


def test_pairs_of_one_prompt_share_it_in_groups_of_a_bounded_size() -> None:
    replies = [[reply(t, (i,)) for i, t in enumerate(TEXTS)]]
    for together, sizes in ((4, [8, 4]), (1, [2] * 6), (10, [12])):
        found = paired([(9,)], replies, Pairing("all", together=together), rewards_PG=[REWARDS])
        assert [len(g.completions) for g in found.groups] == sizes
        assert {g.prompt for g in found.groups} == {(9,)}


def test_a_reply_without_tokens_is_left_out_and_counted() -> None:
    found = pair_groups((1,), [Row((2,)), Row(())], [(0, 1, 0.9)])
    assert found.groups == () and found.counts == {"pairs": 0, "empty": 1}


def test_log_probabilities_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TrainingError, match="1 log-probabilities of 2 tokens"):
        pair_groups((1,), [Row((2, 3), (-0.1,)), Row((4,))], [(0, 1, 0.9)])


def test_spin_is_dpo_on_a_persons_reply_against_ones_own() -> None:
    """One prompt, a person's reply of two tokens, and two of the policy's own."""
    rows = [Row((5, 6)), Row((7,), (-0.5,)), Row((8,), (-0.75,))]
    found = pair_groups((1,), rows, [(0, 1, 1.0), (0, 2, 1.0)])
    ((group,), counts) = found.groups, found.counts
    assert counts["pairs"] == 2 and group.completions == ((5, 6), (7,), (5, 6), (8,))
    filled = with_reference(found.groups, torch.tensor([[-1.0, -2.0], [-0.5, 9.0], [-1.0, -2.0], [-0.75, 9.0]]))
    assert filled[0].ref_logp == ((-1.0, -2.0), (-0.5,), (-1.0, -2.0), (-0.75,))
    # At the start of an iteration the policy is its own reference.
    assert float(Dpo()(batch_of(tuple(filled))).value.detach()) == pytest.approx(math.log(2))
    with pytest.raises(TrainingError, match="3 rows"):
        with_reference(found.groups, torch.zeros(3, 2))


# -- single replies -------------------------------------------------------------------------------


def test_single_replies_by_hand() -> None:
    """The mean of 0, 1 and 2 is 1: labels 2 s(-1) - 1, none, and 2 s(1) - 1."""
    rows = [Row((1, 2), (-0.1, -0.2)), Row((3,)), Row((4,)), Row((5,)), Row(())]
    found = single_replies((9,), rows[:4], [0.0, 1.0, 2.0, None])
    (group,) = found.groups
    assert group.completions == ((1, 2), (4,)) and group.old_logp == ((-0.1, -0.2), (0.0,))
    assert group.advantage[0] == pytest.approx((2 * s(-1.0) - 1,) * 2) and group.advantage[1] == pytest.approx(
        (2 * s(1.0) - 1,)
    )
    assert found.counts == {"good": 1, "bad": 1, "ties": 1, "missing": 1, "empty": 0}
    hard = single_replies((9,), rows, [0.0, 1.0, 2.0, 5.0, 1.0], middle=0.5, temperature=0.0, tie=1.5)
    assert hard.groups[0].advantage == ((1.0,),) and hard.counts == {
        "good": 1,
        "bad": 0,
        "ties": 3,
        "missing": 0,
        "empty": 1,
    }
    assert single_replies((9,), rows[:3], [0.1, 0.1, 0.1], temperature=0.0).counts["ties"] == 3
    assert single_replies((9,), rows[:1], [None]).groups == ()


def test_a_rounds_single_replies_are_what_kto_reads() -> None:
    replies = [[reply("a", (1,)), reply("b", (2, 3))], [reply("c", (4,)), reply("d", (5,))]]
    ref = torch.tensor([[-1.0, 0.0], [-2.0, -3.0], [-4.0, 0.0], [-5.0, 0.0]])
    found = unpaired([(7,), (8,)], replies, [[3.0, 1.0], [2.0, 2.0]], temperature=0.0, ref_logp_BT=ref)
    assert [g.prompt for g in found.groups] == [(7,)] and found.groups[0].ref_logp == ((-1.0,), (-2.0, -3.0))
    assert found.counts == {"good": 1, "bad": 1, "ties": 2, "missing": 0, "empty": 0}
    loss = Kto()(batch_of(found.groups))
    assert float(loss.value.detach()) == pytest.approx(0.5) and loss.sums["desirable"] == 1.0


def test_mismatched_replies_stand_after_another_prompt() -> None:
    def group(prompt: tuple[int, ...], *completions: tuple[int, ...]) -> TrainGroup:
        none = tuple((0.0,) * len(c) for c in completions)
        return TrainGroup(prompt, completions, none, none, none)

    laid = mismatched([group((1,), (10,)), group((2,), (20,), (21,)), group((1,), (11,))])
    assert [(g.prompt, g.completions, g.rows) for g in laid] == [
        ((1,), ((20,), (21,)), (0, 1)),
        ((2,), ((10,), (11,)), (2, 3)),
    ]
    assert mismatched([group((1,), (10,)), group((1,), (11,))]) == []


# -- people's votes -------------------------------------------------------------------------------


def voted(chosen: str, rejected: str, first: float, second: float) -> PreferencePair:
    return PreferencePair(Prompt("p", (Message("user", "q"),)), chosen, rejected, (first, second))


def test_votes_become_the_posterior_share() -> None:
    """Three of four votes under Beta(2, 2): (3 + 2)/(4 + 4) = 0.625, and not 0.75."""
    pairs = [voted("yes", "no", 3, 1), voted("a b", "a  b", 1, 0), voted("x", "y", 2, 2), voted("u", "", 1, 0)]
    codes = {"encode": lambda _: (1, 2), "reply": lambda text: tuple(map(ord, text))}
    found = pairs_of_votes(pairs, prior=VotePrior(2.0), **codes)
    (group,) = found.groups
    assert group.prompt == (1, 2) and group.completions == (tuple(map(ord, "yes")), tuple(map(ord, "no")))
    assert group.advantage == ((0.625,) * 3, (0.375,) * 2)
    assert found.counts == {"pairs": 1, "ties": 1, "same": 1, "empty": 1}
    even = pairs_of_votes(pairs, prior=VotePrior(2.0), tie=-1.0, **codes)
    assert [g.advantage[0][0] for g in even.groups] == [0.625, 0.5]
    assert pairs_of_votes(pairs, prior=VotePrior(2.0), tie=0.22, **codes).counts["ties"] == 2
    sure = pairs_of_votes(pairs, prior=fit_prior([(9, 9), (0, 9), (9, 9)]), **codes)
    assert sure.groups[0].advantage[0][0] > 0.65  # people who agree make a vote count for more


# -- CREAM ----------------------------------------------------------------------------------------


def test_rank_agreement_by_hand() -> None:
    """Of three replies two of three pairs are ordered alike: tau 1/3, C 2/3. A tie counts half."""
    assert rank_agreement([[1, 2, 3]], [[1, 3, 2]]) == pytest.approx(2 / 3)
    assert rank_agreement([[1, 2, 3]], [[5, 6, 7]]) == 1.0 and rank_agreement([[1, 2, 3]], [[3, 2, 1]]) == 0.0
    assert rank_agreement([[1, 1]], [[1, 2]]) == 0.5
    assert rank_agreement([[1, 2, 3], [1, 2]], [[1, 3, 2], [1, 2]]) == pytest.approx((2 / 3 + 1) / 2)
    assert rank_agreement([[1, None, 3]], [[2, 1, math.nan]]) is None
    assert rank_agreement([[1, None, 3]], [[2, 9, 4]]) == 1.0


@given(st.permutations(range(6)))
def test_rank_agreement_is_kendalls_tau(order: list[int]) -> None:
    expected = (1 + kendalltau(list(range(6)), order).statistic) / 2
    assert rank_agreement([list(range(6))], [order]) == pytest.approx(expected)


def test_cream_is_label_smoothing_by_the_disagreement() -> None:
    """C L(chosen, rejected) + (1 - C) L(rejected, chosen), with C = 2/3."""
    agreement = rank_agreement([[1, 2, 3]], [[1, 3, 2]])
    assert agreement is not None
    rows = [Row((1,), (), (-1.0,)), Row((2,), (), (-2.0,))]
    there, back = (batch_of(pair_groups((9,), rows, [(0, 1, p)]).groups) for p in (1.0, 0.0))
    shifted = [
        Batch(b.logp_BT + torch.tensor([[3.0], [0.0]]), b.keep_BT, b.old_logp_BT, b.ref_logp_BT, b.advantage_BT, 2, 2)
        for b in (there, back)
    ]
    whole, turned = (float(Dpo()(b).value.detach()) for b in shifted)
    found = float(Dpo(smoothing=1 - agreement)(shifted[0]).value.detach())
    assert found == pytest.approx(agreement * whole + (1 - agreement) * turned)
