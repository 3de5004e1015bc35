"""The discriminator against log-ratios that are known, and each of its brakes against being off."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from tutelage.errors import InputError, RecipeError, StoreError
from tutelage.objectives.adversarial import (
    Discriminator,
    DiscriminatorSettings,
    LengthFree,
    airl_reward,
    gail_reward,
)

# Nothing that holds it back: what is left must be the log-ratio.
FREE = DiscriminatorSettings(
    learning_rate=0.1, steps=400, rows=0, smoothing=0.0, noise=0.0, low=0.5, high=1.0, replay=0, penalty=0.0, clip=50.0
)


def rows(share_S: torch.Tensor, count: int = 1000) -> torch.Tensor:
    """One-hot rows of the sequences, each as often as its share says."""
    return torch.eye(len(share_S)).repeat_interleave((share_S * count).round().long(), dim=0)


def alike(features: torch.Tensor) -> torch.Tensor:
    return torch.full((len(features),), 10.0)


def two_policies(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    expert, policy = (0.8 * torch.randn(16, generator=random) for _ in range(2))
    return expert.softmax(-1), policy.softmax(-1)


def clouds(gap: float, count: int = 400, seed: int = 0, width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal features whose first column lies `gap` deviations apart."""
    random = torch.Generator().manual_seed(seed)
    expert, policy = (torch.randn(count, width, generator=random) for _ in range(2))
    expert[:, 0] += gap
    return expert, policy


def fit(settings: DiscriminatorSettings, expert: torch.Tensor, policy: torch.Tensor) -> Discriminator:
    found = Discriminator(expert.shape[1], settings)
    found.update(expert, alike(expert), policy, alike(policy))
    return found


def said(found: Discriminator) -> torch.Tensor:
    return found.logits(torch.eye(found.width), torch.full((found.width,), 10.0))


# ---- two distributions over sixteen sequences ----


@pytest.mark.parametrize("hidden", [0, 8])
def test_the_logit_is_the_log_ratio(hidden: int) -> None:
    p_expert, p_policy = two_policies()
    expert, policy = rows(p_expert), rows(p_policy)
    found = fit(dataclasses.replace(FREE, hidden=hidden, steps=400 if not hidden else 600), expert, policy)
    truth = (expert.mean(0) / policy.mean(0)).log()  # shares after rounding to rows
    assert float((said(found) - truth).abs().max()) < 0.05
    assert float((said(found) - (p_expert / p_policy).log()).abs().max()) < 0.2


def test_smoothing_bends_it_as_the_formula_says() -> None:
    """With labels s and 1 - s the optimum is log[(1-s) p_E + s p_pi] - log[s p_E + (1-s) p_pi]."""
    expert, policy = (rows(p) for p in two_policies())
    found = fit(dataclasses.replace(FREE, smoothing=0.2), expert, policy)
    e, p = expert.mean(0), policy.mean(0)
    assert float((said(found) - ((0.8 * e + 0.2 * p) / (0.2 * e + 0.8 * p)).log()).abs().max()) < 0.05


def test_replay_compares_with_the_mixture_of_past_and_present() -> None:
    """A quarter past: the optimum is log p_E - log(0.75 p_now + 0.25 p_past)."""
    p_expert, p_now = two_policies()
    _, p_past = two_policies(1)
    expert, now, past = (rows(p) for p in (p_expert, p_now, p_past))
    found = Discriminator(16, dataclasses.replace(FREE, replay=10_000, replay_share=0.25))
    found.update(expert, alike(expert), past, alike(past))
    assert len(found.past_MF) == len(past)
    found.update(expert, alike(expert), now, alike(now))
    truth = (expert.mean(0) / (0.75 * now.mean(0) + 0.25 * past.mean(0))).log()
    assert float((said(found) - truth).abs().max()) < 0.05


def test_the_policy_becomes_the_expert() -> None:
    """No KL term: 30 rounds of exponentiated gradient on the clipped reward, from JS 0.1 to below 0.001."""
    p_expert, policy = two_policies()
    found = Discriminator(16, dataclasses.replace(FREE, steps=40, replay=4000, replay_share=0.3, clip=2.0))

    def far(p: torch.Tensor) -> float:
        middle = (p + p_expert) / 2
        return float((p * (p / middle).log()).sum() + (p_expert * (p_expert / middle).log()).sum()) / 2

    start, expert = far(policy), rows(p_expert)
    for _ in range(30):
        drawn = rows(policy)
        found.update(expert, alike(expert), drawn, alike(drawn))
        earned = found.reward(torch.eye(16), torch.full((16,), 10.0))
        policy = (policy.log() + 0.3 * earned).softmax(-1)
    assert start > 0.05
    assert far(policy) < 0.001


def test_logistic_regression_agrees_with_another_implementation() -> None:
    expert, policy = clouds(1.0)
    found = fit(dataclasses.replace(FREE, learning_rate=0.05, steps=600), expert, policy)
    both, label = torch.cat([expert, policy]).numpy(), np.repeat([1, 0], len(expert))
    oracle = LogisticRegression(C=1e6, tol=1e-8).fit(both, label)
    got = found.logits(torch.tensor(both), torch.full((len(both),), 10.0)).numpy()
    assert np.abs(got - oracle.decision_function(both)).max() < 0.01


# ---- rewards ----


def test_rewards_by_hand() -> None:
    """D = 3/4: log(3/4) - log(1/4) = log 3, and -log(1/4) = log 4; clipped at 1."""
    logit = torch.tensor([math.log(3.0), -math.log(3.0), 0.0], dtype=torch.float64)
    assert airl_reward(logit, clip=9.0).tolist() == pytest.approx([math.log(3), -math.log(3), 0.0])
    assert gail_reward(logit, clip=9.0).tolist() == pytest.approx([math.log(4), math.log(4 / 3), math.log(2)])
    assert airl_reward(logit, clip=1.0).tolist() == [1.0, -1.0, 0.0]
    assert gail_reward(logit, clip=1.0).tolist() == pytest.approx([1.0, math.log(4 / 3), math.log(2)])


@settings(max_examples=30)
@given(logit=st.floats(-30, 30))
def test_airl_is_the_difference_of_two_gail_rewards(logit: float) -> None:
    x = torch.tensor([logit], dtype=torch.float64)
    both = gail_reward(x, clip=99.0) - gail_reward(-x, clip=99.0)
    assert float(airl_reward(x, clip=99.0)) == pytest.approx(float(both), abs=1e-9)


def test_settings_choose_formula_and_bound() -> None:
    expert, policy = clouds(1.5)
    by = {
        key: fit(dataclasses.replace(FREE, steps=50, reward=reward, clip=clip), expert, policy).reward(
            policy, alike(policy)
        )
        for key, reward, clip in (("airl", "airl", 50.0), ("gail", "gail", 50.0), ("tight", "airl", 0.5))
    }
    assert float(by["gail"].min()) >= 0.0 > float(by["airl"].min())
    assert float(by["tight"].abs().max()) == 0.5
    assert torch.equal(by["tight"], by["airl"].clamp(-0.5, 0.5))


# ---- the brakes ----


def test_it_rests_while_it_knows_enough_and_says_so() -> None:
    easy, hard = clouds(6.0), clouds(0.0)
    found = Discriminator(3, DiscriminatorSettings(noise=0.0))
    first = found.update(easy[0], alike(easy[0]), easy[1], alike(easy[1]))
    assert first.before == 0.5 and first.state == "blind" and 0 < first.steps < 100
    again = found.update(easy[0], alike(easy[0]), easy[1], alike(easy[1]))
    assert again.state == "saturated" and again.steps == 0 and again.after == again.before >= 0.8
    wakes = found.update(hard[0], alike(hard[0]), hard[1], alike(hard[1]))
    assert wakes.state == "blind" and wakes.steps > 0
    free = Discriminator(3, DiscriminatorSettings(noise=0.0, high=1.0))
    assert [free.update(easy[0], alike(easy[0]), easy[1], alike(easy[1])).steps for _ in range(2)] == [100, 100]


def test_within_the_band_it_is_good_and_trains() -> None:
    found = Discriminator(3, DiscriminatorSettings())
    expert, policy = clouds(1.0)
    found.update(expert, alike(expert), policy, alike(policy))
    fresh = clouds(1.0, seed=1)
    second = found.update(fresh[0], alike(fresh[0]), fresh[1], alike(fresh[1]))
    assert second.state == "good" and second.steps == 100 and 0.6 <= second.before < 0.8


@pytest.mark.parametrize(
    ("key", "value"), [("noise", 1.5), ("penalty", 1.0), ("smoothing", 0.3), ("steps", 5), ("learning_rate", 1e-3)]
)
def test_each_brake_makes_it_less_sure(key: str, value: float) -> None:
    expert, policy = clouds(2.0)
    settings = dataclasses.replace(FREE, rows=64, steps=200)
    plain, braked = (fit(s, expert, policy).logits(expert, alike(expert)).abs().mean() for s in (
        settings, dataclasses.replace(settings, **{key: value})
    ))  # fmt: skip
    assert float(braked) < 0.8 * float(plain)


def test_replay_keeps_the_latest_rows_only() -> None:
    found = Discriminator(1, DiscriminatorSettings(replay=3, steps=1))
    for start in (0.0, 2.0):
        new = torch.tensor([[start], [start + 1]])
        found.update(new + 9, alike(new), new, torch.tensor([start, start + 1]) + 1)
    assert found.past_MF[:, 0].tolist() == [1.0, 2.0, 3.0] and found.past_length_M.tolist() == [2.0, 3.0, 4.0]
    none = Discriminator(1, DiscriminatorSettings(replay=0, steps=1))
    none.update(torch.zeros(2, 1), torch.ones(2), torch.ones(2, 1), torch.ones(2))
    assert len(none.past_MF) == len(none.past_length_M) == 0


# ---- length ----


def test_length_is_taken_out_and_the_attribute_stays() -> None:
    """Column 0 is length itself, 1 its logarithm, 2 an attribute of the expert; experts write longer."""
    random = torch.Generator().manual_seed(0)
    lengths = [20.0 + 40.0 * torch.rand(300, generator=random), 10.0 + 30.0 * torch.rand(300, generator=random)]
    sides = [
        torch.stack([n / 7, n.log1p(), is_expert + 0.1 * torch.randn(300, generator=random)], -1)
        for n, is_expert in zip(lengths, (1.0, 0.0), strict=True)
    ]
    free = LengthFree(3)
    for x, n in zip(sides, lengths, strict=True):
        free.learn(x, n)
    residues = [free.take_out(x, n) for x, n in zip(sides, lengths, strict=True)]
    gaps = residues[0].mean(0) - residues[1].mean(0)
    assert gaps[:2].abs().max() < 1e-3
    assert float(gaps[2]) == pytest.approx(1.0, abs=0.05)
    # Telling the two apart by length alone is easy; by what length leaves over it cannot be done.
    found = Discriminator(1, DiscriminatorSettings())
    seen = found.update(sides[0][:, :1], lengths[0], sides[1][:, :1], lengths[1])
    assert seen.after == pytest.approx(0.5, abs=0.06)
    unaware = Discriminator(1, DiscriminatorSettings())
    assert unaware.update(sides[0][:, :1], alike(sides[0]), sides[1][:, :1], alike(sides[1])).after > 0.65


def test_slopes_are_learned_once_so_that_the_same_text_keeps_its_logit() -> None:
    """The second update brings texts in which length goes the other way, and trains nothing: no logit moves."""
    expert, policy = clouds(6.0, 60)
    length = torch.arange(60) % 13 + 4.0
    expert, policy = (x + torch.stack([length / 9, -length / 5, length], -1) for x in (expert, policy))
    found = Discriminator(3, DiscriminatorSettings(noise=0.0))
    found.update(expert, length, policy, length)
    logits, slopes, was = found.logits(policy, length), found.length_free.cross_LF.clone(), found.digest()
    assert float(slopes.abs().sum()) > 0
    seen = found.update(expert, length, policy, length)
    assert seen.steps == 0
    found.update(expert, length.flip(0), policy - 2 * length[:, None], length)
    assert torch.equal(found.length_free.cross_LF, slopes)
    held = Discriminator(3, DiscriminatorSettings(noise=0.0))
    held.update(expert, length, policy, length)
    assert torch.equal(held.logits(policy, length), logits) and held.digest() == was


def test_accuracy_by_hand() -> None:
    """Experts at 1 and -1, of which one is told rightly; policies at -1, -1, 1: two of three. Zero tells nothing."""
    found = Discriminator(1, dataclasses.replace(FREE, steps=5))
    found.update(torch.ones(4, 1), torch.ones(4), -torch.ones(4, 1), torch.ones(4))
    digest = found.digest()
    rows = torch.tensor([[1.0], [-1.0]]), torch.tensor([[-1.0], [-1.0], [1.0]])
    assert Discriminator(1).accuracy(rows[0], torch.ones(2), rows[1], torch.ones(3)) == 0.5
    got = found.accuracy(rows[0], torch.ones(2), rows[1], torch.ones(3))
    assert got == pytest.approx((1 / 2 + 2 / 3) / 2) and found.digest() == digest
    found.update(torch.ones(4, 1), torch.ones(4), -torch.ones(4, 1), torch.ones(4))
    assert found.digest() != digest


def test_one_length_explains_nothing() -> None:
    """0.07 has no exact mean in binary; its rounding must not be taken for a slope."""
    free, x = LengthFree(2), torch.randn(1001, 2, generator=torch.Generator().manual_seed(0))
    free.learn(x, torch.full((1001,), 7.0))
    assert torch.allclose(free.take_out(x, torch.full((1001,), 7.0)), x)


# ---- missing data, bad input, checkpoints ----


def test_missing_features_are_missing_rewards() -> None:
    expert, policy = clouds(2.0, 50)
    torn = policy.clone()
    torn[:3, 1] = math.nan
    torn[3, 0] = math.inf
    for hidden in (0, 4):
        found = Discriminator(3, DiscriminatorSettings(hidden=hidden))
        seen = found.update(expert, alike(expert), torn, alike(torn))
        assert seen.skipped == 4
        assert found.reward(torn, alike(torn)).isnan().tolist() == [True] * 4 + [False] * 46
    only = Discriminator(3, DiscriminatorSettings())
    only.update(expert, alike(expert), torn[4:], alike(torn[4:]))
    other = Discriminator(3, DiscriminatorSettings())
    other.update(expert, alike(expert), torn, alike(torn))
    assert torch.equal(only.logits(expert, alike(expert)), other.logits(expert, alike(expert)))


def test_bad_input_is_refused() -> None:
    found, good = Discriminator(2), torch.zeros(3, 2)
    with pytest.raises(InputError, match="none of them whole"):
        found.update(good, alike(good), good * math.nan, alike(good))
    for wrong, lengths in ((torch.zeros(3, 4), torch.ones(3)), (good, torch.ones(2)), (torch.zeros(3), torch.ones(3))):
        with pytest.raises(InputError, match="shape"):
            found.logits(wrong, lengths)
    for change in (
        {"hidden": -1}, {"smoothing": 0.5}, {"low": 0.9}, {"high": 1.1}, {"replay_share": 1.0}, {"reward": "wgan"},
        {"clip": 0.0}, {"steps": 0}, {"learning_rate": math.nan},
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=next(iter(change))):
            DiscriminatorSettings(**change)


@pytest.mark.parametrize("hidden", [0, 5])
def test_a_loaded_one_goes_on_as_if_it_had_never_stopped(hidden: int, tmp_path: Path) -> None:
    whole = Discriminator(3, DiscriminatorSettings(hidden=hidden, high=1.0, seed=3, replay=500))
    length = torch.arange(400) % 17 + 3.0
    for seed in (0, 1):
        whole.update(*(x for side in clouds(1.0, seed=seed) for x in (side, length)))
    whole.save(tmp_path / "d.safetensors")
    second = Discriminator.load(tmp_path / "d.safetensors")
    fresh = clouds(1.0, seed=2)
    assert second.settings == whole.settings
    assert torch.equal(second.reward(fresh[0], length), whole.reward(fresh[0], length))
    fits = [d.update(fresh[0], length, fresh[1], length) for d in (whole, second)]
    assert fits[0] == fits[1] and fits[0].steps == 100
    assert torch.equal(second.logits(fresh[1], length), whole.logits(fresh[1], length))


def test_another_seed_draws_other_rows() -> None:
    expert, policy = clouds(1.0)
    got = [fit(DiscriminatorSettings(seed=s), expert, policy).logits(policy, alike(policy)) for s in (0, 0, 1)]
    assert torch.equal(got[0], got[1]) and not torch.equal(got[0], got[2])


def test_what_is_no_discriminator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        Discriminator.load(tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 5)
    with pytest.raises(StoreError, match="cannot be read"):
        Discriminator.load(tmp_path / "torn.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(StoreError, match="no discriminator"):
        Discriminator.load(tmp_path / "other.safetensors")
    with pytest.raises(StoreError, match="cannot be written"):
        Discriminator(1).save(tmp_path / "no" / "such" / "folder")
