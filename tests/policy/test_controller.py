"""The controller: what it can choose, what it keeps, how it draws, and what a learner must re-score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tutelage.engines.local import LocalCompleter
from tutelage.engines.packing import Group
from tutelage.engines.sampling import Menu, shape_rows
from tutelage.errors import InputError, ModelError, RecipeError, TrainingError
from tutelage.policy.controller import (
    Assigned,
    Controller,
    ControllerLearner,
    Grid,
    Setting,
    Steered,
    menu_of,
    score_steered,
)
from tutelage.records import Generation, Message, Prompt, SamplerSettings

PROMPTS = [Prompt(f"p{n}", (Message("user", t),)) for n, t in enumerate(("What is the capital?", "Who?", "名前は"))]
GRID = Grid((0.0, 0.5, 1.0), (0, 5), (("no-a", "a"),))
SHORT = SamplerSettings(max_new_tokens=9)


def preferring(action: int, *, per_token: bool = False, size: int = 48, grid: Grid = GRID) -> Controller:
    """A controller whose likeliest choice is that setting, whatever it reads."""
    found = Controller(grid, size, per_token=per_token)
    with torch.no_grad():
        found.outer.bias.copy_(3.0 * found.parts_AF[action])
    return found


def generate(
    lm: Any, steering: Any, *, samples: int = 1, rows: int = 4, settings: SamplerSettings = SHORT, **more: Any
):
    completer = LocalCompleter(lm, rows=rows, prefill_budget=more.pop("budget", 64))
    return completer.generate(
        PROMPTS, samples=samples, settings=settings, seed=3, version="v", steering=steering, **more
    )


def flat(table: list[list[Generation]]) -> list[Generation]:
    return [g for group in table for g in group]


# -- what can be chosen -----------------------------------------------------------------------------


def test_a_grid_has_every_setting_once_and_greedy_without_top_k() -> None:
    assert GRID.settings == (
        Setting(0.0), Setting(0.0, 0, "no-a"),
        Setting(0.5), Setting(0.5, 0, "no-a"), Setting(0.5, 5), Setting(0.5, 5, "no-a"),
        Setting(1.0), Setting(1.0, 0, "no-a"), Setting(1.0, 5), Setting(1.0, 5, "no-a"),
    )  # fmt: skip
    assert str(Setting(0.5, 5, "no-a")) == "temperature 0.5, top-k 5, mask no-a"
    parts = GRID.parts_AF
    assert parts.shape == (10, 7)  # three temperatures, two top-k, none and one mask
    assert parts.sum(1).tolist() == [2.0, 2.0, *[3.0] * 8]
    assert parts[5].tolist() == [0, 1, 0, 0, 1, 0, 1]
    assert Grid((0.0, 1.0)).parts_AF.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_a_mask_bars_the_tokens_its_pattern_is_found_in_and_no_control_token(tiny_lm: Any) -> None:
    menu = menu_of(Grid((1.0,), (0,), (("no-a", "a"), ("letters", "[a-z<|]"))), tiny_lm)
    assert not menu.barred_MV[0].any()
    texts = [tiny_lm.tokenizer.decode([t]) for t in range(300)]
    special = {0, 1, 2}  # padding, and the marks of a turn's begin and end
    assert {texts[t] for t in special} == {"<|pad|>", "<|im_start|>", "<|im_end|>"}
    assert menu.barred_MV[1].tolist() == ["a" in text and t not in special for t, text in enumerate(texts)]
    assert not menu.barred_MV[2, sorted(special)].any()
    assert int(menu.barred_MV[2].sum()) > int(menu.barred_MV[1].sum()) > 10
    assert (menu.mask_A.tolist(), menu.temperature_A.tolist()) == ([0, 1, 2], [1.0] * 3)


@pytest.mark.parametrize("pattern", ["no such text at all", "(?s)."])
def test_a_mask_that_bars_nothing_or_everything_is_refused(tiny_lm: Any, pattern: str) -> None:
    with pytest.raises(RecipeError, match=r"'odd' bars \d+ of \d+ tokens") as caught:
        menu_of(Grid((1.0,), (0,), (("odd", pattern),)), tiny_lm)
    assert "controller.masks" in caught.value.fix


OPENED = Grid((0.0, 1.0), (0,), (("no-a", "a"),), ("I don't", "Could you tell"))


def test_openings_are_settings_of_their_own_and_their_tokens_the_models(tiny_lm: Any) -> None:
    assert len(OPENED.settings) == 12 and OPENED.parts_AF.shape == (12, 2 + 2 + 3)
    assert str(OPENED.settings[1]) == "temperature 0, opening 'I don't'"
    menu = menu_of(OPENED, tiny_lm)
    for setting, tokens in zip(OPENED.settings, menu.openings, strict=True):
        assert tiny_lm.tokenizer.decode(tokens) == setting.opening
    assert menu_of(GRID, tiny_lm).openings == ()


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_replies_begin_as_the_setting_says_and_go_on_as_the_model_would(tiny_lms: dict[str, Any], kind: str) -> None:
    lm = tiny_lms[kind]
    menu = menu_of(OPENED, lm)
    steering = Assigned(menu, range(len(menu)))
    replies = flat(generate(lm, steering, samples=len(menu), settings=SamplerSettings(max_new_tokens=24)))
    for reply in replies:
        opening = menu.openings[reply.sample]
        assert reply.tokens[: len(opening)] == opening
        assert reply.logps[: len(opening)] == (0.0,) * len(opening)
        assert all(x < 0.0 for x in reply.logps[len(opening) :])
        assert reply.text.startswith(OPENED.settings[reply.sample].opening)
    # After its opening a greedy reply is what the model says when the opening is part of what it was given.
    greedy = SamplerSettings(0.0, max_new_tokens=24 - len(menu.openings[1]))
    after = LocalCompleter(lm, rows=4).generate(
        PROMPTS, samples=1, settings=greedy, seed=0, version="v", opening=[OPENED.openings[0]] * len(PROMPTS)
    )
    begun = [r.tokens[len(menu.openings[1]) :] for r in replies if r.sample == 1]
    assert begun == [group[0].tokens for group in after]


def test_a_rescore_knows_that_openings_were_not_drawn(tiny_lm: Any) -> None:
    menu = menu_of(OPENED, tiny_lm)
    steering = Assigned(menu, range(len(menu)))
    table = generate(tiny_lm, steering, samples=len(menu), settings=SamplerSettings(max_new_tokens=24))
    replies = flat(table)
    rows = iter(range(len(replies)))
    groups = [
        Group(tiny_lm.encode(p), tuple(r.tokens for r in group), tuple(next(rows) for _ in group))
        for p, group in zip(PROMPTS, table, strict=True)
    ]
    again = score_steered(tiny_lm, groups, [[r.sample] for r in replies], menu)
    for row, reply in enumerate(replies):
        assert np.allclose(again[row, : len(reply.logps)].tolist(), reply.logps, atol=1e-4)


# -- the network ------------------------------------------------------------------------------------


def test_it_starts_without_a_preference_and_learns_one_that_all_settings_with_a_part_share() -> None:
    controller = Controller(GRID, 6, seed=1)
    states = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(controller(states).exp(), torch.full((5, 10), 0.1), atol=1e-6)
    controller.outer.bias.data[2] = 1.0  # of temperature 1
    odds = controller(states)[0]
    assert torch.allclose(odds[6:], odds[6:7].expand(4), atol=1e-6)
    assert (odds[6] - odds[0]).item() == pytest.approx(1.0, abs=1e-5)


def test_states_are_scaled_by_what_was_measured() -> None:
    random = torch.Generator().manual_seed(2)
    states = torch.randn(400, 5, generator=random) * torch.tensor([1.0, 100.0, 0.01, 3.0, 0.0]) + 7.0
    controller, plain = Controller(GRID, 5, seed=3), Controller(GRID, 5, seed=3)
    for one in (controller, plain):
        one.outer.weight.data.copy_(torch.randn(7, 32, generator=torch.Generator().manual_seed(4)))
    controller.fit(states)
    scaled = (states - states.mean(0)) / states.std(0, correction=0).clamp_min(1e-3)
    scaled[:, 4] = 0.0  # what never varies is not blown up
    assert torch.allclose(controller(states), plain(scaled), atol=1e-3)
    assert torch.isfinite(controller(states)).all()


def test_width_and_seed_make_another_network() -> None:
    one, other, wide = (Controller(GRID, 4, seed=s, width=w) for s, w in ((0, 32), (1, 32), (0, 8)))
    assert not torch.equal(one.inner.weight, other.inner.weight)
    assert wide.inner.weight.shape == (8, 4)
    assert torch.equal(one.inner.weight, Controller(GRID, 4, seed=0).inner.weight)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    controller = preferring(7, per_token=True, size=6)
    controller.depth = 0.5
    controller.fit(torch.randn(30, 6, generator=torch.Generator().manual_seed(1)))
    path = tmp_path / "controller.safetensors"
    controller.save(path)
    again = Controller.load(path)
    states = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    assert torch.equal(again(states), controller(states))
    assert (again.grid, again.per_token, again.width, again.depth) == (GRID, True, 32, 0.5)
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first


@pytest.mark.parametrize("content", [b"", b"nonsense", None, "other"])
def test_what_is_no_controller_is_refused(tmp_path: Path, content: bytes | str | None) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    if content == "other":
        save_file({"a": torch.zeros(2)}, str(path))
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(ModelError, match="is no controller"):
        Controller.load(path)


# -- how it chooses ---------------------------------------------------------------------------------


def plain_menu(count: int) -> Menu:
    zeros = torch.zeros(count, dtype=torch.long)
    return Menu(torch.linspace(0, 1, count), zeros, zeros, torch.zeros(1, 4, dtype=torch.bool))


def test_choices_are_drawn_from_its_probabilities_and_the_likeliest_is_the_argmax() -> None:
    grid = Grid((0.0, 0.5, 1.0))
    controller = Controller(grid, 3)
    controller.outer.bias.data.copy_(torch.tensor([0.5, 0.3, 0.2]).log())
    n = 10_000
    states, uniform = torch.zeros(n, 3), (torch.arange(n) + 0.5) / n
    drawn = Steered(controller, plain_menu(3)).choose(states, uniform, range(n))
    counts = np.bincount(drawn.numpy(), minlength=3)
    assert np.abs(counts - [5000, 3000, 2000]).max() <= 2
    random = torch.rand(n, generator=torch.Generator().manual_seed(0))
    some = Steered(controller, plain_menu(3)).choose(states, random, range(n))
    assert chisquare(np.bincount(some.numpy(), minlength=3), [5000, 3000, 2000]).pvalue > 0.01
    best = Steered(controller, plain_menu(3), likeliest=True).choose(states, uniform, range(n))
    assert set(best.tolist()) == {0}


def test_a_controller_for_another_model_is_refused(tiny_lm: Any) -> None:
    with pytest.raises(ModelError, match="states of 20 numbers, the model's have 48"):
        generate(tiny_lm, Steered(Controller(GRID, 20), menu_of(GRID, tiny_lm)))


# -- in the engine ----------------------------------------------------------------------------------


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("action", [0, 2, 4])
def test_one_setting_for_all_is_what_the_engine_does_with_it_unsteered(
    tiny_lm: Any, action: int, per_token: bool
) -> None:
    menu = menu_of(GRID, tiny_lm)
    table = generate(tiny_lm, Assigned(menu, [action], per_token=per_token), samples=2)
    plain = generate(tiny_lm, None, samples=2, settings=menu.settings(action, 9))
    for mine, theirs in zip(flat(table), flat(plain), strict=True):
        assert mine.tokens == theirs.tokens
        assert np.allclose(mine.logps, theirs.logps, atol=1e-5)


def test_settings_choices_and_ids_of_replies_say_how_they_were_drawn(tiny_lm: Any) -> None:
    menu = menu_of(GRID, tiny_lm)
    steering = Assigned(menu, range(len(menu)))
    replies = flat(generate(tiny_lm, steering, samples=len(menu)))
    assert len({r.id for r in replies}) == len(replies) == len(steering.traces) == 30
    for reply in replies:
        trace, setting = steering.traces[reply.id], GRID.settings[reply.sample]
        assert trace.actions_T.tolist() == [reply.sample]
        assert (reply.settings.temperature, reply.settings.top_k) == (setting.temperature, setting.top_k)
        if setting.mask:
            assert not menu.barred_MV[1][list(reply.tokens)].any()
    barred = [menu.barred_MV[1][list(r.tokens)].any() for r in replies if not GRID.settings[r.sample].mask]
    assert any(barred)  # the mask made a difference
    twins = [generate(tiny_lm, Assigned(menu, [a]))[0][0].id for a in (2, 3)]
    assert twins[0] != twins[1]  # the same settings but for the mask


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("depth", "number"), [(1.0, -1), (0.34, 2)])
def test_what_is_read_is_the_models_own_state_at_that_depth(
    tiny_lms: dict[str, Any], plain_models: dict[str, Any], kind: str, per_token: bool, depth: float, number: int
) -> None:
    """Of three layers a third is the layer of number 1, whose output transformers lists third."""
    lm = tiny_lms[kind]
    steering = Assigned(menu_of(GRID, lm), [2, 6], per_token=per_token, depth=depth)
    table = generate(lm, steering, samples=2, rows=3)
    for prompt, group in zip(PROMPTS, table, strict=True):
        for reply in group:
            ids = lm.encode(prompt)
            out = plain_models[kind](torch.tensor([ids + reply.tokens]), output_hidden_states=True)
            wanted = out.hidden_states[number][0, len(ids) - 1 : -1].detach()
            trace = steering.traces[reply.id]
            assert trace.states_TD.shape == ((len(reply.tokens) if per_token else 1), 48)
            assert torch.allclose(trace.states_TD, wanted[: len(trace.states_TD)], atol=1e-4)


@pytest.mark.parametrize("per_token", [False, True])
def test_choices_do_not_depend_on_what_shares_the_batch(tiny_lm: Any, per_token: bool) -> None:
    controller = preferring(4, per_token=per_token)
    found = []
    for rows, budget in ((3, 64), (1, 40), (32, 512)):
        steering = Steered(controller, menu_of(GRID, tiny_lm))
        replies = flat(generate(tiny_lm, steering, samples=3, rows=rows, budget=budget))
        found.append([(r.id, r.tokens, steering.traces[r.id].actions_T.tolist()) for r in replies])
    assert found[0] == found[1] == found[2]
    used = {a for _, _, actions in found[0] for a in actions}
    assert len(used) > 2
    lengths = {len(actions) == len(tokens) for _, tokens, actions in found[0]}
    assert lengths == ({True} if per_token else {False})


@pytest.mark.parametrize("more", [{"settings": SamplerSettings(0.5, max_new_tokens=9)}, {"greedy_first": True}])
def test_two_masters_are_refused(tiny_lm: Any, more: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="both say how"):
        generate(tiny_lm, Assigned(menu_of(GRID, tiny_lm), [0]), **more)


@pytest.mark.parametrize("per_token", [False, True])
def test_a_rescore_under_the_same_settings_gives_the_recorded_log_probs(tiny_lm: Any, per_token: bool) -> None:
    menu = menu_of(GRID, tiny_lm)
    steering = Steered(Controller(GRID, 48, per_token=per_token), menu)  # without a preference: all settings occur
    table = generate(tiny_lm, steering, samples=6)
    replies = flat(table)
    actions = [steering.traces[r.id].actions_T.tolist() for r in replies]
    assert {a for row in actions for a in row} >= ({*range(10)} if per_token else {0, 1, 2})
    groups = [
        Group(tiny_lm.encode(p), tuple(g.tokens for g in group), tuple(range(6 * n, 6 * n + 6)))
        for n, (p, group) in enumerate(zip(PROMPTS, table, strict=True))
    ]
    with torch.no_grad():
        logp_BT = score_steered(tiny_lm, groups, actions, menu, budget=100)
    for row, reply in enumerate(replies):
        assert np.allclose(logp_BT[row, : len(reply.tokens)], reply.logps, atol=1e-5)
        assert not logp_BT[row, len(reply.tokens) :].any()


def test_a_rescore_carries_a_gradient_through_mask_and_truncation() -> None:
    """What is barred or cut gets none; the rest that of the renormalised softmax."""
    grid = Menu(
        torch.tensor([0.5]), torch.tensor([2]), torch.tensor([1]), torch.tensor([[False] * 4, [True, *[False] * 3]])
    )
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().requires_grad_()
    logp = shape_rows(logits, grid, torch.tensor([0])).log_softmax(-1)[0, 1]
    (found,) = torch.autograd.grad(logp, logits)
    # log .8, of p = (.8, .2) at temperature 1/2: 2 (1 - .8), 2 (-.2).
    assert found[0].tolist() == pytest.approx([0.0, 0.4, -0.4, 0.0], abs=1e-6)


# -- the optimiser ----------------------------------------------------------------------------------


def losses(controller: Controller) -> torch.Tensor:
    states = torch.randn(6, 5, generator=torch.Generator().manual_seed(9))
    return -controller(states)[:, 3].mean()


def test_an_optimiser_that_was_saved_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    through = ControllerLearner(Controller(GRID, 5), learning_rate=0.05)
    for _ in range(6):
        through.step(losses(through.controller))
    first = ControllerLearner(Controller(GRID, 5), learning_rate=0.05)
    first.save(tmp_path / "empty.safetensors")
    first.load(tmp_path / "empty.safetensors")  # before any step there is nothing to keep
    for _ in range(3):
        first.step(losses(first.controller))
    first.controller.save(tmp_path / "c.safetensors")
    first.save(tmp_path / "o.safetensors")
    second = ControllerLearner(Controller.load(tmp_path / "c.safetensors"), learning_rate=0.05)
    second.load(tmp_path / "o.safetensors")
    for _ in range(3):
        second.step(losses(second.controller))
    for mine, theirs in zip(second.controller.parameters(), through.controller.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(factor: float) -> None:
    learner = ControllerLearner(Controller(GRID, 5), learning_rate=0.05)
    before = [p.clone() for p in learner.controller.parameters()]
    with pytest.raises(TrainingError, match="not finite"):
        learner.step(losses(learner.controller) * factor)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.controller.parameters(), strict=True))
