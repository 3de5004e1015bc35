"""Several judges as one: by hand, on a planted panel, and as a file."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tutelage.config import Judge
from tutelage.errors import InputError, ModelError
from tutelage.feedback.asking import Opinion
from tutelage.feedback.fused_judge import FusedJudge, fit_panel, fusion_file, open_fused
from tutelage.feedback.fusion import Fusion
from tutelage.feedback.model_judge import Pair
from tutelage.records import Generation, Message, PreferencePair, Prompt, SamplerSettings

PROMPT = Prompt("p", (Message("user", "Which?"),))


class Liking:
    """Log-odds from the quality it sees in a text; None where the text says so."""

    def __init__(self, name, see):
        self.name, self.version, self.see = name, f"{name}-1", see

    def compare(self, pairs):
        told = []
        for pair in pairs:
            a, b = self.see(pair.first), self.see(pair.second)
            told.append(Opinion(None, "abstains: unread") if None in (a, b) else Opinion(a - b, "seen"))
        return told

    def judge(self, prompts, generations_PG):
        raise NotImplementedError


def quality(text):
    return float(text.split()[0])


CERTAIN = Fusion(np.array([1.0, 0.5]), np.zeros((2, 2)), np.array([2.0, 1.0]), 50)


def test_by_hand():
    """Scales 2 and 1, weights 1 and .5: log-odds 2 and 1 become 2/2 * 1 + 1/1 * .5 = 1.5."""
    panel = FusedJudge("f", [Liking("a", quality), Liking("b", lambda t: quality(t) / 2)], CERTAIN)
    (opinion,) = panel.compare([Pair(PROMPT, "3 x", "1 y")])
    assert opinion.value == pytest.approx(1.5)
    assert opinion.evidence == {"a": 2.0, "b": 1.0, "deviation": 0.0}


def test_an_abstention_adds_nothing_and_all_abstaining_is_one():
    silent = Liking("b", lambda _: None)
    (opinion,) = FusedJudge("f", [Liking("a", quality), silent], CERTAIN).compare([Pair(PROMPT, "3", "1")])
    assert opinion.value == pytest.approx(1.0) and opinion.evidence["b"] is None
    (opinion,) = FusedJudge("f", [silent, silent], CERTAIN).compare([Pair(PROMPT, "3", "1")])
    assert opinion.value is None and "unread" in opinion.reason


def test_uncertain_weights_pull_towards_one_half():
    wide = Fusion(CERTAIN.weight_J, np.eye(2), CERTAIN.scale_J, 5)
    members = [Liking("a", quality), Liking("b", quality)]
    pair = [Pair(PROMPT, "3", "1")]
    sure, unsure = (FusedJudge("f", members, fusion).compare(pair)[0].value for fusion in (CERTAIN, wide))
    assert 0 < unsure < sure


def test_replies_of_a_group_meet_in_a_ring():
    texts = ("3 best", "2", "1 worst")
    group = [
        Generation(f"g{i}", "p", i, t, (1,), (-1.0,), True, SamplerSettings(), "start", 0) for i, t in enumerate(texts)
    ]
    ((best, middle, worst),) = FusedJudge("f", [Liking("a", quality), Liking("b", quality)], CERTAIN).judge(
        [PROMPT], [group]
    )
    assert best.value > middle.value > worst.value and middle.value == pytest.approx(0.5)
    assert best.value == pytest.approx(1 - worst.value)


def planted(seed, count=400):
    """Three judges that see the truth through noise of their own; people see it plainly."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(count, 2))
    seen = {}
    pairs = []
    for n in range(count):
        texts = [f"{n} {side}" for side in "ab"]
        for side, text in enumerate(texts):
            seen[text] = truth[n, side] + rng.normal(size=3) * np.array([1.2, 1.2, 1.2])
        better = int(truth[n, 1] > truth[n, 0])
        pairs.append(PreferencePair(PROMPT, texts[better], texts[1 - better]))
    members = [Liking(f"j{j}", lambda t, j=j: float(seen[t][j])) for j in range(3)]
    return members, pairs


@pytest.mark.parametrize("seed", range(3))
def test_fifty_labels_beat_each_member_on_unseen_pairs(seed):
    members, pairs = planted(seed, 1500)
    fusion, measured = fit_panel(members, pairs, labels=50)
    assert fusion.labels == 50 and measured["pairs"] == 1450
    assert set(measured["accuracy"]) == {"fusion", "j0", "j1", "j2"}
    assert all(low > 0 for _, low, _ in measured["beats"].values()), measured


def test_labels_decide_what_is_learned():
    """The same judges with people's preferences turned: every weight changes its sign."""
    members, pairs = planted(7)
    turned = [PreferencePair(p.prompt, p.rejected, p.chosen) for p in pairs]
    straight, _ = fit_panel(members, pairs, labels=300)
    against, measured = fit_panel(members, turned, labels=300)
    assert (straight.weight_J > 0).all() and (against.weight_J < 0).all()
    assert measured["accuracy"]["fusion"][0] > 0.7 > 0.5 > measured["accuracy"]["j0"][0]


def test_bad_input():
    members, pairs = planted(0, 20)
    with pytest.raises(InputError, match="at least two"):
        fit_panel(members[:1], pairs, labels=5)
    with pytest.raises(InputError, match="1 to 20"):
        fit_panel(members, pairs, labels=21)
    even = [PreferencePair(p.prompt, p.chosen, p.rejected, (2.0, 2.0)) for p in pairs]
    with pytest.raises(InputError, match="1 to 0"):
        fit_panel(members, even, labels=5)


def test_a_file_brings_the_same_panel_back_and_refuses_another_member(tmp_path):
    specs = [Judge(name="a", kind="my:a"), Judge(name="b", kind="my:b")]
    members = [Liking("a", quality), Liking("b", lambda t: quality(t) ** 2)]
    panel = FusedJudge("f", members, CERTAIN)
    file = tmp_path / "panel.json"
    file.write_text(fusion_file(specs, members, CERTAIN, {"pairs": 0}))
    by_name = {m.name: m for m in members}
    spec = Judge(name="f", kind="fusion", model=str(file))
    again = open_fused(spec, lambda judge: by_name[judge.name])
    pair = [Pair(PROMPT, "3", "1")]
    assert again.version == panel.version and again.compare(pair) == panel.compare(pair)
    by_name["b"].version = "b-2"
    with pytest.raises(ModelError, match="'b'"):
        open_fused(spec, lambda judge: by_name[judge.name])


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"format": "other"}', None])
def test_what_is_no_fusion_is_said_so(tmp_path, broken):
    members = [Liking("a", quality), Liking("b", quality)]
    body = json.loads(fusion_file([Judge(name="a", kind="m:a"), Judge(name="b", kind="m:b")], members, CERTAIN, {}))
    body["weight"] = [1.0]
    file = tmp_path / "panel.json"
    file.write_text(json.dumps(body) if broken is None else broken)
    with pytest.raises(ModelError, match="judge fuse"):
        open_fused(Judge(name="f", kind="fusion", model=str(file)), lambda _: members[0])


def test_the_probability_is_the_logistic_of_the_value():
    (opinion,) = FusedJudge("f", [Liking("a", quality)] * 2, CERTAIN).compare([Pair(PROMPT, "2", "1")])
    assert f"{1 / (1 + math.exp(-opinion.value)):.0%}" in opinion.reason
