"""Attention heads: by hand, what they find, and critics on tokens from a file to a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold
from tests.tiny_world import tutelage_cli, write_lines

from tutelage.engines.features import layer_at
from tutelage.errors import ModelError
from tutelage.feedback.attentive import Attentive
from tutelage.feedback.critic_data import Passage, Reader, laid_out
from tutelage.feedback.critic_heads import centred
from tutelage.feedback.text_critic import TextCritic
from tutelage.feedback.token_states import TokenStates, read_states
from tutelage.loop.explaining import attended
from tutelage.records import Message

pytest_plugins = ["tests.tiny_world"]


def ragged(rows: list[Any]) -> TokenStates:
    """Of texts' tables of states."""
    return TokenStates(np.concatenate(rows).astype(np.float16), np.cumsum([len(r) for r in rows]))


def drawn(count: int, seed: int, size: int = 8) -> list[np.ndarray]:
    """Texts of 3 to 12 tokens in so many dimensions."""
    random = np.random.default_rng(seed)
    return [random.normal(size=(random.integers(3, 13), size)) for _ in range(count)]


def folds_of(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(KFold(5, shuffle=True, random_state=0).split(np.arange(count)))


# -- states ------------------------------------------------------------------------------------------


def test_states_are_parted_padded_and_measured() -> None:
    states = ragged([[[1.0], [2.0]], [[3.0]], [[4.0], [5.0], [6.0]]])
    assert len(states) == 3 and states.lengths.tolist() == [2, 1, 3]
    some = states[np.array([2, 0])]
    assert some.state_SF[:, 0].tolist() == [4.0, 5.0, 6.0, 1.0, 2.0] and some.end_N.tolist() == [3, 5]
    table, keep = states.padded(np.array([1, 2]))
    assert table[..., 0].tolist()[1] == [4.0, 5.0, 6.0] and float(table[0, 0, 0]) == 3.0
    assert keep.tolist() == [[True, False, False], [True, True, True]]
    mean, scale = states.moments()
    assert mean[0] == 3.5 and scale[0] == pytest.approx(np.std([1, 2, 3, 4, 5, 6]), abs=1e-5)
    assert [rows.tolist() for rows in states.batches(2)] == [[0, 1], [2]]


def test_states_are_those_of_the_text_alone(tiny_lm: Any, plain_models: dict[str, Any]) -> None:
    """Neither of its context nor of the end token; an empty text has its end token's."""
    asked = (Message("user", "What is it?"),)
    passages = [Passage("The lamp is old.", asked), Passage("Hi", asked), Passage(""), Passage("The lamp is old.")]
    groups = laid_out(tiny_lm, passages, budget=64)
    states = read_states(tiny_lm, groups, len(passages), depth=0.34, budget=64)
    lengths = [max(1, len(tiny_lm.encode_reply(p.text)) - 1) for p in passages]
    assert states.lengths.tolist() == lengths
    layer = layer_at(tiny_lm, 0.34)
    for row, passage in enumerate(passages):
        (group,) = laid_out(tiny_lm, [passage], budget=64)
        tokens = torch.tensor([[*group.prompt, *group.completions[0]]])
        said = plain_models["llama"](input_ids=tokens, output_hidden_states=True).hidden_states[layer + 1][0]
        alone = said[len(group.prompt) : len(group.prompt) + lengths[row]]
        own = states[np.array([row])].state_SF
        np.testing.assert_allclose(own, alone.detach().float().numpy(), atol=2e-2, rtol=2e-2)


# -- the head ----------------------------------------------------------------------------------------


def test_a_score_by_hand() -> None:
    """States 0 and 2, query ln(3)/2: attention 1/4 and 3/4. Reading 4: 3/4 x 8 = 6, with the bias 7."""
    head = Attentive(np.zeros(1), np.ones(1), np.array([[np.log(3) / 2]]), np.array([[[4.0]]]), np.array([[1.0]]))
    states = ragged([[[0.0], [2.0]], [[0.5]]])
    assert head.scores(states)[0, :, 0].tolist() == pytest.approx([7.0, 3.0], abs=1e-5)
    assert head.logits(states)[0].tolist() == [pytest.approx([-3.5, 3.5]), pytest.approx([-1.5, 1.5])]
    (share, brought), (alone, all_of_it) = head.looked(states)
    assert share.tolist() == [pytest.approx([0.25, 0.75])] and brought[0, :, 0].tolist() == pytest.approx([0.0, 6.0])
    assert alone.tolist() == [[1.0]] and all_of_it.tolist() == [[[pytest.approx(2.0)]]]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 100))
def test_what_tokens_brought_and_the_bias_are_the_score(members: int, labels: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    states = ragged(drawn(5, seed))
    shapes = ((8,), (8,), (members, 8), (members, 8, labels), (members, labels))
    head = Attentive(
        *(random.normal(size=s) if n != 1 else random.uniform(0.5, 2, size=s) for n, s in enumerate(shapes))
    )
    scores = head.scores(states)
    for row, (share, brought) in enumerate(head.looked(states)):
        assert share.sum(1) == pytest.approx(np.ones(members), abs=1e-5)
        np.testing.assert_allclose(brought.sum(1) + head.bias_ML, scores[:, row], atol=1e-4)
        (alone,) = head.looked(states[np.array([row])])
        np.testing.assert_allclose(alone[0], share, atol=1e-5)


def test_it_looks_at_the_token_that_decides() -> None:
    """One token in three to twelve says the label, at any place; a mean over tokens would half hide it."""
    texts, random = drawn(400, 0), np.random.default_rng(1)
    labels, places = random.integers(0, 2, 400), [int(random.integers(len(t))) for t in texts]
    for text, label, place in zip(texts, labels, places, strict=True):
        text[place, 0], text[place, 1] = 5.0, 3.0 * (2 * label - 1)
    states = ragged(texts)
    head, unseen = Attentive.fit(states[np.arange(300)], labels[:300], folds_of(300), seed=0)
    rest = states[np.arange(300, 400)]
    assert roc_auc_score(labels[300:], head.logits(rest).mean(0)[:, 1]) > 0.97
    assert roc_auc_score(labels[:300], unseen[:, 1]) > 0.95
    share = np.mean([s.mean(0)[p] for (s, _), p in zip(head.looked(rest), places[300:], strict=True)])
    assert share > 3 * np.mean(1.0 / rest.lengths)
    for member, (_, left) in enumerate(folds_of(300)):
        np.testing.assert_allclose(centred(head.scores(states[left])[member]), unseen[left], atol=1e-4)
    _, guessed = Attentive.fit(states[np.arange(300)], random.permutation(labels[:300]), folds_of(300), seed=0)
    assert roc_auc_score(labels[:300], guessed[:, 1]) < 0.7


def test_three_labels_are_told_apart() -> None:
    texts, random = drawn(300, 2), np.random.default_rng(3)
    labels = random.integers(0, 3, 300)
    for text, label in zip(texts, labels, strict=True):
        text[int(random.integers(len(text))), label] = 6.0
    _, unseen = Attentive.fit(ragged(texts), labels, folds_of(300), seed=0)
    assert unseen.shape == (300, 3) and (unseen.argmax(1) == labels).mean() > 0.85


def test_pairs_prefer_the_token_that_pleases_and_a_nuisance_is_taken_out() -> None:
    """Preferred texts hold a token that pleases, and most are longer; a dimension of every token says which is."""
    random = np.random.default_rng(4)
    sides, longer = [drawn(300, 5), drawn(300, 6)], np.where(random.random(300) < 0.8, 1.0, -1.0)
    for chosen, rejected, sign in zip(*sides, longer, strict=True):
        chosen[int(random.integers(len(chosen))), 0] = 5.0
        chosen[:, 7] += sign
        rejected[:, 7] -= sign
    chosen, rejected = (ragged(side) for side in sides)
    reading = []
    for nuisance in (longer, np.zeros(300)):
        head, unseen = Attentive.fit_pairs(chosen, rejected, folds_of(300), nuisance, seed=0)
        assert (unseen[:, 1] > 0).mean() > 0.8 and head.bias_ML.tolist() == [[0.0]] * 5
        reading.append(head.value_MFL[:, 7, 0].mean() / head.value_MFL[:, 0, 0].mean())
    assert reading[0] < 0.5 * reading[1]


def test_the_same_seed_fits_the_same_head() -> None:
    states, labels = ragged(drawn(80, 0)), np.arange(80) % 2
    one, two, other = (Attentive.fit(states, labels, folds_of(80), seed=s)[0] for s in (0, 0, 1))
    assert np.array_equal(one.query_MF, two.query_MF) and not np.array_equal(one.query_MF, other.query_MF)


# -- critics on tokens -------------------------------------------------------------------------------

NOUNS = ("train", "garden", "letter", "river", "window", "song", "market", "bridge", "lamp", "story")


@pytest.fixture(scope="module")
def rude(tmp_path_factory: pytest.TempPathFactory, tiny_dirs: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("rude")
    rows = [
        {"prompt": f"Tell me about the {n} number {i}.", "response": f"The {n} is {w} {i}.", "label": label}
        for i in range(3) for n in NOUNS for w, label in (("stupid", "toxic"), ("old", "fine"))
    ]  # fmt: skip
    done = tutelage_cli(
        "critic", "train", write_lines(folder / "rows.jsonl", rows), "--kind", "toxicity", "--features", "tokens",
        "--model", tiny_dirs["llama"], "--out", folder / "rude.safetensors",
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder / "rude.safetensors"


def test_a_critic_on_tokens_is_read_back_and_judges(rude: Path, tiny_lm: Any, tmp_path: Path) -> None:
    critic = TextCritic.load(rude)
    assert list(critic.heads) == ["tokens.attention"] and critic.quality["auroc"][0] > 0.9
    critic.save(tmp_path / "again.safetensors")
    assert TextCritic.load(tmp_path / "again.safetensors").version == critic.version
    reader = Reader("tokens", tiny_lm)
    bad, good = critic.reward([Passage("The river is stupid 9."), Passage("The river is old 9.")], reader)
    assert bad < good
    with pytest.raises(ModelError, match="source 'trunk'"):
        critic.reward([Passage("a")], Reader("trunk", tiny_lm))
    assert critic.reward([], reader).shape == (0,)


def test_what_it_attends_to_sums_to_its_reward(rude: Path, tiny_lm: Any) -> None:
    critic, asked = TextCritic.load(rude), (Message("user", "Tell me about the song."),)
    passages = [Passage("The song is stupid.", asked), Passage("The song is old.", asked), Passage("", asked)]
    found = attended(tiny_lm, passages, critic, budget=64)
    rewards = critic.reward(passages, Reader("tokens", tiny_lm))
    for one, passage, reward in zip(found, passages, rewards, strict=True):
        assert one.tokens == tiny_lm.encode_reply(passage.text)[:-1] and len(one.scores) == len(one.tokens)
        assert one.reward == pytest.approx(reward, abs=1e-3)
        if one.tokens:
            assert sum(one.shares) == pytest.approx(1.0, abs=1e-4) and one.defect < 1e-6
    assert sum(found[0].scores) < sum(found[1].scores)
    with pytest.raises(ModelError, match="no attention"):
        attended(tiny_lm, passages, TextCritic("toxicity", ("a", "b"), 1, "trunk", False, {}, critic.pool))


def test_of_three_labels_the_defect_is_told(tiny_lm: Any) -> None:
    """The log-odds of one against two others bend; scores follow their slope."""
    words = (("good", "fine"), ("old", "dull"), ("stupid", "toxic"))
    rows = [(f"The {n} is {w} {i}.", label) for i in range(3) for n in NOUNS for w, label in words]
    labels = ["dull", "fine", "toxic"]
    passages = [Passage(text) for text, _ in rows]
    features = Reader("tokens", tiny_lm).read(passages, contextual=False)
    critic = TextCritic.fit(
        features, np.array([labels.index(x) for _, x in rows]), np.arange(len(rows)), kind="toxicity",
        labels=labels, positive=2, source="tokens", contextual=False,
    )  # fmt: skip
    found = attended(tiny_lm, passages[:3], critic)
    assert [one.reward for one in found] == pytest.approx(
        -critic.score_features({k: v[np.arange(3)] for k, v in features.items()}).log_odds_N, abs=1e-3
    )
    assert found[2].reward < min(found[0].reward, found[1].reward)
    assert 0.0 < found[2].defect < abs(found[2].change)
