"""Critics of texts: rows, features, heads, calibration, files, verdicts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold

from tutelage.engines.features import Probe
from tutelage.errors import InputError, ModelError
from tutelage.feedback.critic_data import (
    Passage,
    Reader,
    families,
    read_labelled_passages,
    read_pairs,
    read_passages,
)
from tutelage.feedback.critic_heads import Linear, Pool, centred, measure, measure_pairs
from tutelage.feedback.critic_training import train_critic
from tutelage.feedback.heads import quality
from tutelage.feedback.text_critic import CriticJudge, TextCritic, _said
from tutelage.records import Generation, Message, Prompt, SamplerSettings

pytest_plugins = ["tests.tiny_world"]

ASKED = (Message("user", "What is it?"),)
WARM = ("thank you, kind friend", "what a lovely day", "glad to help you", "gern geschehen", "谢谢你的帮助")
RUDE = ("shut up, you fool", "you awful idiot", "I hate you, fool", "halt den Mund, Idiot", "闭嘴你这个傻瓜")


def texts(count: int = 60) -> list[tuple[str, str]]:
    """Kind and rude sentences, no two alike; the words tell them apart."""
    return [(f"{(WARM, RUDE)[n % 2][n // 2 % 5]}, number {n}", ("fine", "Toxic")[n % 2]) for n in range(count)]


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def toxic_file(folder: Path, count: int = 60) -> Path:
    return write(folder / "toxic.jsonl", [{"text": t, "label": label} for t, label in texts(count)])


@pytest.fixture(scope="module")
def words() -> Reader:
    return Reader("words")


@pytest.fixture(scope="module")
def trained(words: Reader, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextCritic, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("critic")
    out = folder / "critic.safetensors"
    report = train_critic(toxic_file(folder), out, kind="toxicity", reader=words)
    return TextCritic.load(out), report, out


# ---- rows ------------------------------------------------------------------------------------


def test_rows_of_every_shape_and_format_say_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": "What is it?", "response": "une pomme\u2028ou 何", "label": n % 2} for n in range(3)]
    (tmp_path / "a.csv").write_text(
        "prompt,response,label\n" + "".join(f'{r["prompt"]},"{r["response"]}",{r["label"]}\n' for r in rows),
        encoding="utf-8",
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [read_labelled_passages(p) for p in (write(tmp_path / "a.jsonl", rows), *tmp_path.glob("a.[cp]*"))]
    assert len(found) == 3 and found[0] == found[1] == found[2]
    assert found[0].passages[0] == Passage("une pomme\u2028ou 何", ASKED)
    assert found[0].labels == ("0", "1", "0")


def test_claims_follow_their_evidence_and_prompts_may_be_dialogues(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = [
        {"claim": "It is red.", "evidence": "A rose is red.", "label": "supports"},
        {"prompt": turns, "response": "d", "label": "refutes"},
        {"text": "alone", "label": True},
    ]
    found = read_labelled_passages(write(tmp_path / "a.jsonl", rows))
    assert found.passages[0] == Passage("It is red.", (Message("user", "A rose is red."),))
    assert [m.role for m in found.passages[1].context] == ["user", "assistant", "user"]
    assert found.passages[2] == Passage("alone")
    assert found.labels[2] == "True"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "no JSON"),
        ("[1]", "list"),
        ({"label": "x"}, "columns label"),
        ({"text": "a"}, "no label"),
        ({"text": "a", "label": " "}, "no label"),
        ({"text": "a", "label": ["x"]}, "no label"),
        ({"text": 3, "label": "x"}, "'text'"),
        ({"text": "  ", "label": "x"}, "'text'"),
        ({"response": "a", "label": "x"}, "'prompt'"),
        ({"response": "a", "prompt": [{"role": "user"}], "label": "x"}, "role or content"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, says: str) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a", "label": "x"}, "", row])
    with pytest.raises(InputError) as caught:
        read_labelled_passages(path)
    assert "a.jsonl line 3" in str(caught.value) and says in str(caught.value)


def test_pairs_need_two_different_replies(tmp_path: Path) -> None:
    good = {"prompt": "What is it?", "chosen": "a", "rejected": "b"}
    pairs = read_pairs(write(tmp_path / "a.jsonl", [good]))
    assert (pairs.chosen, pairs.rejected) == ((Passage("a", ASKED),), (Passage("b", ASKED),))
    for bad, says in (({**good, "rejected": "a"}, "itself"), ({"prompt": "p", "chosen": "a"}, "'rejected'")):
        with pytest.raises(InputError, match=says):
            read_pairs(write(tmp_path / "a.jsonl", [good, bad]))


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes("é".encode("latin-1"))
    (tmp_path / "no.parquet").write_bytes(b"PAR0")
    (tmp_path / "a.txt").write_text("x")
    for name in ("latin.jsonl", "no.parquet", "a.txt", "missing.csv"):
        with pytest.raises(InputError, match=name):
            read_labelled_passages(tmp_path / name)


def test_relatives_share_a_text_or_a_context() -> None:
    one, two = (Message("user", "one"),), (Message("user", "two"),)
    rows = [Passage("a", one), Passage("b", one), Passage("b", two), Passage("c"), Passage("d"), Passage("c")]
    got = families([*rows, *(Passage(str(n)) for n in range(9))])
    assert len({*got[:3]}) == 1
    assert got[3] == got[5]
    assert len(set(got.tolist())) == 12
    # One prompt for everything parts nobody: only equal rows are kept together.
    got = families([Passage(t, one) for t in "abcab"])
    assert got.tolist() == [0, 1, 2, 0, 1]


# ---- features --------------------------------------------------------------------------------


def test_the_trunk_is_read_over_the_text_alone_and_as_if_alone(tiny_lm: Any, plain_models: dict[str, Any]) -> None:
    passages = [
        Passage("Paris é 何", ASKED),
        Passage("alone"),
        Passage("I do not know.", ASKED),
        Passage("", (Message("user", "other"),)),
        Passage("alone again, longer than the pack"),
    ]
    got = read_passages(tiny_lm, passages, [Probe(0.34, "mean"), Probe(0.34, "last")], budget=60)
    for row, passage in zip(got, passages, strict=True):
        before = tiny_lm.encode(Prompt("", passage.context)) if passage.context else (tiny_lm.end_token,)
        tokens = torch.tensor([[*before, *tiny_lm.encode_reply(passage.text)]])
        with torch.no_grad():
            states = plain_models["llama"](tokens, output_hidden_states=True).hidden_states[2][0, len(before) :]
        expected = torch.cat([states.mean(0), states[-1]])
        assert torch.allclose(torch.from_numpy(row), expected, atol=1e-4)


def test_long_texts_keep_their_beginning_and_long_contexts_their_end(tiny_lm: Any) -> None:
    """The context of the tiny model is 160 tokens, of which text and prompt get 80 each."""
    probes = [Probe(0.9, "mean")]
    start, far = "b" * 79, "z" * 40
    asked = [(Message("user", f"{lead}{'c' * 100}"),) for lead in ("x", "y")]
    got = read_passages(
        tiny_lm,
        [Passage(start), Passage(start + far), Passage("k" + start), Passage("r", asked[0]), Passage("r", asked[1])],
        probes,
    )
    assert np.allclose(got[0], got[1], atol=1e-4)
    assert not np.allclose(got[0], got[2], atol=1e-2)
    assert np.allclose(got[3], got[4], atol=1e-4)


def test_a_source_needs_its_models() -> None:
    for source, missing in (("trunk", "trunk"), ("both", "trunk"), ("encoder", "encoder")):
        with pytest.raises(ModelError, match=missing):
            Reader(source)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="feet"):
        Reader("feet")  # type: ignore[arg-type]


def test_contexts_are_read_only_when_wanted(words: Reader) -> None:
    rows = [Passage("yes", ASKED), Passage("yes", (Message("user", "Wo?"),))]
    blind, seeing = (words.read(rows, contextual=c)["words"].toarray() for c in (False, True))
    assert np.array_equal(blind[0], blind[1])
    assert not np.array_equal(seeing[0], seeing[1])
    assert words.read(rows, contextual=True)["length"].tolist() == [[math.log(4)]] * 2


# ---- heads and calibration -------------------------------------------------------------------


def test_the_pool_of_one_head_is_temperature_scaling() -> None:
    """Two labels at log-odds +-2, right three times in four: the temperature makes that ln 3."""
    logits = centred(np.full((8, 1), 2.0))
    pool = Pool.fit(logits[None], np.array([1, 1, 1, 0, 1, 1, 1, 0]), bias=False)
    assert pool.weight_H == pytest.approx([math.log(3) / 2], abs=1e-4)
    assert pool.probability(pool.logits(logits[None]))[0] == pytest.approx([0.25, 0.75], abs=1e-4)
    three = np.tile(np.log([0.8, 0.1, 0.1]), (10, 1))
    pool = Pool.fit(three[None], np.array([0] * 6 + [1, 1, 2, 2]), bias=False)
    # 0.8^w / (0.8^w + 2 0.1^w) = 0.6 at 8^w = 3.
    assert pool.weight_H == pytest.approx([math.log(3) / math.log(8)], abs=1e-4)
    assert pool.probability(pool.logits(three[None]))[0] == pytest.approx([0.6, 0.2, 0.2], abs=1e-4)


def test_with_a_bias_it_is_the_logistic_regression_on_the_heads() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 400)
    odds = np.stack([2.0 * labels + random.normal(size=400) * s for s in (1.0, 3.0)], axis=1)
    pool = Pool.fit(np.stack([centred(odds[:, [n]]) for n in (0, 1)]), labels, bias=True)
    oracle = LogisticRegression(C=1e9, tol=1e-8).fit(odds, labels)
    assert pool.weight_H == pytest.approx(oracle.coef_[0], abs=1e-3)
    assert pool.bias_L[1] - pool.bias_L[0] == pytest.approx(oracle.intercept_[0], abs=1e-3)


def test_a_head_against_its_meaning_is_silenced() -> None:
    labels = np.array([0, 1] * 20)
    good = centred((2.0 * labels - 1)[:, None] + np.linspace(-2, 2, 40)[:, None])
    pool = Pool.fit(np.stack([good, -good]), labels, bias=False)
    assert pool.weight_H[0] > 0.5 and pool.weight_H[1] == 0.0


def test_isotonic_steps_are_the_shares_seen() -> None:
    """At each of two scores the probability is the share of label 1, whatever the scores were."""
    odds = np.array([[-1.0]] * 5 + [[3.0]] * 4)
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 0, 1])
    pool = Pool.fit(centred(odds)[None], labels, bias=True, isotonic=True)
    assert pool.probability(pool.logits(centred(odds)[None]))[[0, 5], 1] == pytest.approx([0.2, 0.75], abs=1e-6)
    between = pool.probability(pool.logits(centred(np.linspace(-4, 6, 30)[:, None])[None]))[:, 1]
    assert (np.diff(between) >= 0).all()


@given(st.integers(2, 4), st.integers(1, 3), st.integers(0, 50))
def test_pooled_probabilities_are_probabilities_and_no_worse_than_guessing(labels: int, heads: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(heads, 60, labels)) * 5
    truth = np.arange(60) % labels
    pool = Pool.fit(logits, truth, bias=True)
    said = pool.probability(pool.logits(logits))
    assert said.shape == (60, labels) and np.allclose(said.sum(1), 1.0) and (said >= 0).all()
    assert (pool.weight_H >= 0).all() and pool.bias_L.sum() == pytest.approx(0, abs=1e-9)
    assert -np.log(said[np.arange(60), truth]).mean() <= math.log(labels) + 1e-6


def test_figures_by_hand() -> None:
    said = np.array([0.9, 0.8, 0.3, 0.4])
    truth = np.array([1, 0, 0, 1])
    got = measure(np.stack([1 - said, said], axis=1), truth, positive=1, resamples=50)
    assert got["accuracy"][0] == 0.5
    assert got["auroc"][0] == 0.75  # of the four pairs only (0.4, 0.8) is the wrong way round
    assert got["kappa"][0] == 0.0  # half right, half expected
    assert got["brier"][0] == pytest.approx(2 * (0.01 + 0.64 + 0.09 + 0.36) / 4)
    # Bins of the top label: 0.9 right; 0.8 wrong; 0.7 right; 0.6 wrong.
    assert got["ece"][0] == pytest.approx((0.1 + 0.8 + 0.3 + 0.6) / 4)
    assert all(low <= value <= high for value, low, high in got.values())


def test_figures_agree_with_scikit_learn() -> None:
    random = np.random.default_rng(0)
    said = softmax(random.normal(size=(300, 3)).round(1), axis=1)
    truth = np.where(random.random(300) < 0.5, said.argmax(1), random.integers(0, 3, 300))
    got = measure(said, truth, positive=2, resamples=100)
    assert got["auroc"][0] == pytest.approx(roc_auc_score(truth == 2, said[:, 2]))
    assert got["kappa"][0] == pytest.approx(cohen_kappa_score(truth, said.argmax(1)))
    for name, value in quality(said, truth).items():
        assert got[name][0] == pytest.approx(value)
    # The interval of a share is about the binomial one.
    share, low, high = got["accuracy"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / 300), rel=0.25)
    assert "auroc" not in measure(said, np.zeros(300, int), positive=2, resamples=100)


def test_intervals_widen_when_rows_belong_together() -> None:
    """Every row ten times over: as relatives they count once."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 60)
    odds = truth + random.normal(size=60)
    rows = np.repeat(np.arange(60), 10)
    said = np.stack([expit(-odds), expit(odds)], axis=1)

    def width(figures: dict[str, tuple[float, float, float]]) -> float:
        return figures["auroc"][2] - figures["auroc"][1]

    single = measure(said, truth, positive=1, resamples=300)
    related = measure(said[rows], truth[rows], positive=1, families_N=rows, resamples=300)
    loose = measure(said[rows], truth[rows], positive=1, resamples=300)
    assert width(related) == pytest.approx(width(single), rel=0.2)
    assert width(loose) < width(single) / 2


def test_bradley_terry_on_two_replies_is_the_logarithm_of_the_odds() -> None:
    """One feature, x_a - x_b = 1; a is preferred 30 times, b 10 times: the reward differs by ln 3."""
    difference = np.array([[1.0]] * 30 + [[-1.0]] * 10)
    folds = [(np.arange(40), np.arange(40))] * 2
    head, unseen = Linear.fit_pairs(sparse.csr_matrix(difference), folds, np.zeros(40))
    # The penalty at the loosest of the strengths hardly holds 80 rows.
    assert head.weight_MFL[0, 0, 0] == pytest.approx(math.log(3), abs=0.02)
    assert softmax(unseen, axis=1)[0, 1] == pytest.approx(0.75, abs=0.005)
    assert (head.bias_ML == 0).all()


def test_a_linear_head_agrees_with_scikit_learn_and_never_votes_on_what_it_saw() -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=(90, 5)) * [1, 10, 100, 0.1, 1] + 40
    y = ((x - 40) @ [1, 0.1, 0, 3, -1] + random.normal(size=90) > 0).astype(int)
    folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(x, y))
    head, unseen = Linear.fit(x, y, folds)
    assert head.weight_MFL.shape == (5, 5, 1)
    z = (x - x.mean(0)) / x.std(0)
    for member, (seen, left) in enumerate(folds):
        model = LogisticRegression(C=1e-2, max_iter=1000).fit(z[seen], y[seen])
        assert head.logits(x)[member, :, 1] * 2 == pytest.approx(model.decision_function(z), abs=1e-3)
        assert np.array_equal(unseen[left], head.logits(x[left])[member])
    # Noise that is learned by heart in the fitted folds is not seen in the others.
    noise = random.normal(size=(200, 400))
    guess = random.integers(0, 2, 200)
    _, unseen = Linear.fit(noise, guess, list(StratifiedKFold(5, shuffle=True, random_state=0).split(noise, guess)))
    assert roc_auc_score(guess, unseen[:, 1]) < 0.65


def planted_pairs(count: int = 400, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    """Texts with a true quality, a feature that is length, and raters who like both."""
    random = np.random.default_rng(seed)
    quality, length = random.normal(size=(2, 2 * count))
    odds = 1.5 * (quality[:count] - quality[count:]) + 2.0 * (length[:count] - length[count:])
    swap = random.random(count) > expit(odds)
    first, second = np.arange(count), np.arange(count) + count
    rows = np.where(swap, second, first), np.where(swap, first, second)
    trunk = np.stack([quality + 0.1 * random.normal(size=2 * count), length, quality + length], axis=1)
    sides = [{"trunk": trunk[r], "length": length[r][:, None], "truth": quality[r]} for r in rows]
    return sides[0], sides[1], np.arange(count)


@pytest.mark.parametrize("kind", ["labels", "pairs"])
def test_sparse_rows_are_fitted_in_the_space_they_span_with_the_same_weights(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(60, 90)) * (rng.random((60, 90)) < 0.1)
    dense[7], dense[11] = dense[3], 0.0  # rows that add no direction
    x_NF = sparse.csr_matrix(dense.astype(np.float32))
    labels_N = (dense[:, :5].sum(1) + rng.normal(size=60) > 0).astype(int)
    rows = np.arange(60)
    folds = [(rows[rows % 3 != k], rows[rows % 3 == k]) for k in range(3)]
    found = []
    for most in (70, 0):  # with as many columns as rows, and with all
        monkeypatch.setattr("tutelage.feedback.critic_heads._MOST_ROWS", most)
        if kind == "labels":
            head, unseen = Linear.fit(x_NF, labels_N, folds)
        else:
            head, unseen = Linear.fit_pairs(x_NF, folds, rng.normal(size=60) * 0.0)
        found.append((head.weight_MFL, head.bias_ML, unseen))
    for few, all_columns in zip(*found, strict=True):
        assert np.allclose(few, all_columns, atol=2e-3), np.abs(few - all_columns).max()
    assert np.abs(found[0][0]).max() > 0.05


def test_length_is_taken_out_of_the_reward_and_quality_is_left() -> None:
    chosen, rejected, kin = planted_pairs()
    fresh = planted_pairs(seed=1)
    correlation, kept = {}, {}
    for disentangle in (True, False):
        critic = TextCritic.fit_pairs(chosen, rejected, kin, source="trunk", disentangle=disentangle)
        one, other = (critic.score_features(side).log_odds_N for side in fresh[:2])
        figures = critic.measure_pairs(fresh[0], fresh[1], kin)
        correlation[disentangle] = figures["length_correlation"][0]
        kept[disentangle] = float(np.corrcoef(one - other, fresh[0]["truth"] - fresh[1]["truth"])[0, 1])
    assert correlation[False] > 0.7
    assert abs(correlation[True]) < 0.1
    assert kept[True] > 0.95 > kept[False]


def test_rewards_of_a_preference_are_centred_and_swapping_turns_the_sign() -> None:
    chosen, rejected, kin = planted_pairs()
    critic = TextCritic.fit_pairs(chosen, rejected, kin, source="trunk")
    rewards = [critic.score_features(side) for side in (chosen, rejected)]
    assert np.concatenate([r.log_odds_N for r in rewards]).mean() == pytest.approx(0.0, abs=1e-6)
    assert rewards[0].probability_NL[:, 1] == pytest.approx(expit(rewards[0].log_odds_N))
    one, other = rewards[0].log_odds_N, rewards[1].log_odds_N
    got = measure_pairs(one - other, np.ones(len(kin)), kin)
    assert got["accuracy"][0] == pytest.approx(np.mean(one > other))
    turned = measure_pairs(other - one, np.ones(len(kin)), kin)
    assert turned["accuracy"][0] == pytest.approx(1 - got["accuracy"][0])
    assert turned["length_correlation"][0] == pytest.approx(-got["length_correlation"][0])
    # What it says of pairs it had not seen: as often right as it claims.
    fresh = planted_pairs(1500, seed=2)
    assert critic.measure_pairs(*fresh)["ece"][0] < 0.05


def test_three_labels_and_a_useless_block() -> None:
    random = np.random.default_rng(0)
    y = np.arange(240) % 3
    features = {
        "trunk": random.normal(size=(240, 8)),
        "words": sparse.csr_matrix(np.eye(3)[y] + 2 * random.random((240, 3))),
    }
    features["encoder"] = random.normal(size=(240, 4))
    critic = TextCritic.fit(
        features, y, np.arange(240), kind="sincerity", labels=("a", "b", "sincere"), positive=2, source="both",
        contextual=False,
    )  # fmt: skip
    names = list(critic.heads)
    assert names == ["trunk.linear", "trunk.committee", "encoder.linear", "encoder.committee", "words.linear"]
    loud = [
        np.std(pool_weight * _said(critic.heads[name], features[name.split(".")[0]]))
        for name, pool_weight in zip(names, critic.pool.weight_H, strict=True)
    ]
    assert names[int(np.argmax(loud))] == "words.linear"
    scores = critic.score_features(features)
    assert scores.probability_NL.sum(1) == pytest.approx(1.0)
    share = scores.probability_NL[:, 2]
    assert scores.log_odds_N == pytest.approx(np.log(share / (1 - share)))
    assert critic.measure(features, y, np.arange(240))["accuracy"][0] > 0.7


# ---- training, files, use --------------------------------------------------------------------


def test_a_critic_is_trained_measured_and_read_back(
    trained: tuple[TextCritic, dict[str, Any], Path], words: Reader
) -> None:
    critic, report, out = trained
    assert json.loads(json.dumps(report))["labels"] == ["Toxic", "fine"]
    assert critic.labels[critic.positive] == "Toxic" and not critic.contextual
    assert report["rows"] == 60 and 10 <= report["held_out"] <= 14
    assert report["quality"]["auroc"][0] > 0.9
    assert critic.quality == {name: tuple(figure) for name, figure in report["quality"].items()}
    assert critic.version == report["version"]
    rows = [Passage("you fool"), Passage("thank you, friend")]
    assert critic.score(rows, words).probability_NL[:, critic.positive] @ [1, -1] > 0.3
    critic.save(out.with_name("again.safetensors"))
    again = TextCritic.load(out.with_name("again.safetensors"))
    assert again.version == critic.version
    assert np.array_equal(again.score(rows, words).log_odds_N, critic.score(rows, words).log_odds_N)


def test_costs_are_positive_where_harm_is_likely(
    trained: tuple[TextCritic, dict[str, Any], Path], words: Reader
) -> None:
    critic = trained[0]
    rows = [Passage("shut up, you fool"), Passage("what a lovely day, friend")]
    cost = critic.cost(rows, words)
    assert cost[0] > 0 > cost[1]
    assert critic.reward(rows, words).tolist() == (-cost).tolist()
    kind = dataclasses.replace(critic, kind="coherence")
    assert kind.reward(rows, words).tolist() == cost.tolist()
    with pytest.raises(InputError, match="coherence"):
        kind.cost(rows, words)


def generation(name: str, text: str) -> Generation:
    return Generation(name, "p", 0, text, (), (), True, SamplerSettings(), "v", 0)


def test_the_judge_prefers_the_kind_reply_and_abstains_when_its_ensemble_is_at_odds(
    trained: tuple[TextCritic, dict[str, Any], Path], words: Reader
) -> None:
    critic = trained[0]
    prompts = [Prompt("p", ASKED), Prompt("q", ASKED)]
    replies = [[generation("g1", "you awful idiot"), generation("g2", "glad to help you")], [generation("g3", "")]]
    sure = CriticJudge(critic, words, most_spread=1.0).judge(prompts, replies)
    assert [[v.subject for v in group] for group in sure] == [["g1", "g2"], ["g3"]]
    rude, kind = sure[0]
    assert rude.value is not None and kind.value is not None and rude.value < 0.5 < kind.value
    assert rude.value == pytest.approx(1 - rude.evidence["probability"]["Toxic"])
    assert rude.evidence["log_odds"] > 0
    assert (rude.judge, rude.judge_version, rude.prompt_hash) == ("critic:toxicity", critic.version, prompts[0].hash)
    unsure = CriticJudge(critic, words, most_spread=-1.0).judge(prompts, replies)
    assert all(v.value is None and "at odds" in v.reason for group in unsure for v in group)
    assert CriticJudge(critic, words).judge(prompts, [[], []]) == [[], []]


def test_pairs_become_a_judge_of_single_replies(tmp_path: Path, words: Reader) -> None:
    rows = [
        {"prompt": f"question {n}", "chosen": f"{WARM[n % 5]} {n}", "rejected": f"{RUDE[n // 5 % 5]} {n}"}
        for n in range(60)
    ]
    report = train_critic(
        write(tmp_path / "p.jsonl", rows), tmp_path / "c.safetensors", kind="preference", reader=words
    )
    assert report["quality"]["accuracy"][0] > 0.9
    critic = TextCritic.load(tmp_path / "c.safetensors")
    replies = [[generation("g1", "you fool"), generation("g2", "lovely, thank you")]]
    judge = CriticJudge(critic, words, most_spread=1.0)
    worse, better = judge.judge([Prompt("p", ASKED)], replies)[0]
    assert worse.value is not None and better.value is not None and worse.value < better.value


@pytest.mark.parametrize(
    ("count", "options", "says"),
    [
        (60, {"kind": "beauty"}, "beauty"),
        (60, {"kind": "safety"}, "'unsafe'"),
        (60, {"kind": "toxicity", "positive": "bad"}, "'bad'"),
        (12, {"kind": "toxicity"}, "unrelated texts"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tmp_path: Path, words: Reader, count: int, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        train_critic(toxic_file(tmp_path, count), tmp_path / "c.safetensors", reader=words, **options)
    assert not (tmp_path / "c.safetensors").exists()


def test_another_trunk_or_source_is_refused(
    tmp_path: Path, tiny_lm: Any, load_tiny: Callable[..., Any], words: Reader
) -> None:
    out = tmp_path / "c.safetensors"
    reader = Reader("trunk", tiny_lm)
    train_critic(toxic_file(tmp_path, 40), out, kind="toxicity", reader=reader)
    critic = TextCritic.load(out)
    assert len(critic.score([Passage("fool")], Reader("trunk", load_tiny("llama"))).spread_N) == 1
    changed = load_tiny("llama")
    with torch.no_grad():
        next(changed.model.parameters()).mul_(1.01)
    for other in (Reader("trunk", changed), Reader("trunk", load_tiny("qwen2"))):
        with pytest.raises(ModelError, match="another trunk"):
            critic.score([Passage("fool")], other)
        with pytest.raises(ModelError, match="another trunk"):
            CriticJudge(critic, other)
    with pytest.raises(ModelError, match="'words'"):
        critic.score([Passage("fool")], words)


def test_what_does_not_fit_into_the_trunk_is_left_unjudged(tmp_path: Path, tiny_lm: Any) -> None:
    rows = [{"prompt": f"{n}?", "response": text, "label": label} for n, (text, label) in enumerate(texts(40))]
    reader = Reader("trunk", tiny_lm)
    train_critic(write(tmp_path / "a.jsonl", rows), tmp_path / "c", kind="toxicity", reader=reader)
    judge = CriticJudge(TextCritic.load(tmp_path / "c"), reader, most_spread=1.0)
    long = Prompt("p", (Message("user", "\u4f55" * 200),))
    replies = [[generation("g1", "you fool"), generation("g2", "thanks")], [generation("g3", "thanks")]]
    (one, two), (three,) = judge.judge([long, Prompt("q", ASKED)], replies)
    assert one.value is None and two.value is None and "160 tokens" in one.reason
    assert three.value is not None


def test_a_missing_or_foreign_file_is_no_critic(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "foreign.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name in ("missing", "foreign", "broken"):
        with pytest.raises(ModelError, match=name):
            TextCritic.load(tmp_path / f"{name}.safetensors")


def test_the_encoder_tells_rude_from_kind_in_words_it_never_saw(tmp_path: Path, tiny_home: Path) -> None:
    reader = Reader.open("encoder")
    train_critic(toxic_file(tmp_path), tmp_path / "c.safetensors", kind="toxicity", reader=reader)
    critic = TextCritic.load(tmp_path / "c.safetensors")
    cost = critic.cost([Passage("You are such a moron."), Passage("I am grateful for your support.")], reader)
    assert cost[0] > cost[1]
    assert set(critic.marks) == {"encoder"}
    critic.marks["encoder"] = -critic.marks["encoder"]
    with pytest.raises(ModelError, match="another encoder"):
        critic.check(reader)
