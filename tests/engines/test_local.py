"""The in-process engine against transformers' own generation and the learner's own scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tutelage.engines.local import LocalCompleter
from tutelage.engines.packing import Group
from tutelage.engines.sampling import shape_logits
from tutelage.errors import InputError
from tutelage.policy.learner import score
from tutelage.records import Generation, Message, Prompt, SamplerSettings

QUESTIONS = (
    "What is the capital?",
    "Who?",
    "Tell me when the thing asked about was built.",
    "名前は何ですか",
    "a b c",
)
PROMPTS = [Prompt(f"p{n}", (Message("user", text),)) for n, text in enumerate(QUESTIONS)]
GREEDY = SamplerSettings(temperature=0.0, max_new_tokens=12)
PLAIN = SamplerSettings(max_new_tokens=10)


def generate(
    lm: Any,
    settings: SamplerSettings,
    *,
    samples: int = 1,
    rows: int = 3,
    budget: int = 64,
    seed: int = 7,
    prompts: Sequence[Prompt] = PROMPTS,
    **more: Any,
) -> list[list[Generation]]:
    completer = LocalCompleter(lm, rows=rows, prefill_budget=budget)
    return completer.generate(prompts, samples=samples, settings=settings, seed=seed, version="v", **more)


def flat(table: list[list[Generation]]) -> list[Generation]:
    return [g for group in table for g in group]


def test_greedy_equals_generation_by_transformers(
    architecture: str, tiny_lms: dict[str, Any], plain_models: dict[str, Any]
) -> None:
    lm = tiny_lms[architecture]
    for prompt, (reply,) in zip(PROMPTS, generate(lm, GREEDY), strict=True):
        ids = lm.encode(prompt)
        theirs = plain_models[architecture].generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=GREEDY.max_new_tokens
        )
        assert list(reply.tokens) == theirs[0, len(ids) :].tolist()
        assert reply.text == lm.tokenizer.decode(reply.tokens, skip_special_tokens=True).strip()


def test_recorded_log_probs_equal_a_rescore(architecture: str, tiny_lms: dict[str, Any]) -> None:
    lm = tiny_lms[architecture]
    table = generate(lm, PLAIN, samples=4)
    groups = [
        Group(lm.encode(p), tuple(g.tokens for g in replies), tuple(range(4 * n, 4 * n + 4)))
        for n, (p, replies) in enumerate(zip(PROMPTS, table, strict=True))
    ]
    scores = score(lm, groups, budget=100)
    for row, reply in enumerate(flat(table)):
        assert int(scores.keep_BT[row].sum()) == len(reply.tokens)
        assert np.allclose(scores.logp_BT[row, : len(reply.tokens)], reply.logps, atol=1e-4)


def test_log_probs_of_shaped_draws_are_those_of_the_shaped_distribution(tiny_lm: Any, plain_models: Any) -> None:
    settings = SamplerSettings(temperature=0.6, top_k=20, top_p=0.9, max_new_tokens=8)
    for prompt, replies in zip(PROMPTS, generate(tiny_lm, settings, samples=2), strict=True):
        ids = tiny_lm.encode(prompt)
        for reply in replies:
            logits = plain_models["llama"](torch.tensor([ids + reply.tokens])).logits[0, len(ids) - 1 : -1]
            table = shape_logits(logits.detach(), settings).log_softmax(-1)
            wanted = table.gather(1, torch.tensor(reply.tokens)[:, None])[:, 0]
            assert np.allclose(wanted, reply.logps, atol=1e-4)


@pytest.mark.parametrize(("rows", "budget"), [(1, 512), (2, 40), (5, 100), (64, 512)])
def test_the_same_seed_gives_the_same_text_whatever_shares_the_batch(tiny_lm: Any, rows: int, budget: int) -> None:
    reference = flat(generate(tiny_lm, PLAIN, samples=3, rows=8, budget=256))
    again = flat(generate(tiny_lm, PLAIN, samples=3, rows=rows, budget=budget))
    assert [(g.id, g.prompt_id, g.sample, g.tokens) for g in again] == [
        (g.id, g.prompt_id, g.sample, g.tokens) for g in reference
    ]
    for one, other in zip(again, reference, strict=True):
        assert np.allclose(one.logps, other.logps, atol=1e-4)


def test_a_prompt_gets_the_same_replies_alone_and_after_other_work(tiny_lm: Any) -> None:
    """Keys and values left in memory by earlier calls must not leak into later ones."""
    completer = LocalCompleter(tiny_lm, rows=4)

    def ask(prompts: Sequence[Prompt], seed: int) -> list[tuple[int, ...]]:
        table = completer.generate(prompts, samples=2, settings=PLAIN, seed=seed, version="v")
        return [g.tokens for g in flat(table)]

    alone = ask(PROMPTS[2:3], 1)
    ask(PROMPTS, 2)
    assert ask(PROMPTS[2:3], 1) == alone


def test_seeds_and_samples_differ_and_ids_are_unique(tiny_lm: Any) -> None:
    one, two = flat(generate(tiny_lm, PLAIN, samples=4)), flat(generate(tiny_lm, PLAIN, samples=4, seed=8))
    assert len({g.id for g in one + two}) == 40
    assert len({g.tokens for g in one}) > 15
    assert [g.tokens for g in one] != [g.tokens for g in two]
    assert {(g.seed, g.policy_version, g.settings) for g in one} == {(7, "v", PLAIN)}


def test_first_tokens_follow_the_models_distribution(tiny_lm: Any, plain_models: Any) -> None:
    n = 3000
    settings = SamplerSettings(max_new_tokens=1)
    replies = flat(generate(tiny_lm, settings, samples=n, rows=256, prompts=PROMPTS[:1]))
    p = plain_models["llama"](torch.tensor([tiny_lm.encode(PROMPTS[0])])).logits[0, -1].double().softmax(-1)
    p = p.detach().numpy()
    counts = np.bincount([g.tokens[0] for g in replies], minlength=len(p))
    big = p * n > 8
    observed, wanted = [*counts[big], counts[~big].sum()], [*(n * p[big]), n * p[~big].sum()]
    assert chisquare(observed, wanted).pvalue > 0.001


def test_a_reply_ends_at_any_stop_token_and_only_there(load_tiny: Callable[..., Any], plain_models: Any) -> None:
    lm = load_tiny()
    ids = lm.encode(PROMPTS[0])
    free = flat(generate(lm, GREEDY))[0]
    stop = free.tokens[3]
    lm.model.generation_config.eos_token_id = [2, stop]
    assert lm.stop_tokens == {2, stop}
    replies = flat(generate(lm, GREEDY)) + flat(generate(lm, SamplerSettings(max_new_tokens=40), samples=12, rows=5))
    theirs = plain_models["llama"].generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=12, eos_token_id=[2, stop]
    )
    assert list(replies[0].tokens) == theirs[0, len(ids) :].tolist()
    assert replies[0].finished
    assert {g.finished for g in replies} == {True, False}
    for reply in replies:
        assert reply.finished == (reply.tokens[-1] in lm.stop_tokens)
        assert not lm.stop_tokens & set(reply.tokens[:-1])
        assert len(reply.tokens) == len(reply.logps) <= reply.settings.max_new_tokens
        assert reply.finished or len(reply.tokens) == reply.settings.max_new_tokens


def test_a_prompt_must_leave_room_for_the_reply(tiny_lm: Any) -> None:
    length = len(tiny_lm.encode(PROMPTS[0]))
    room = tiny_lm.context - length
    fits = SamplerSettings(temperature=0.0, max_new_tokens=room)
    (reply,) = flat(generate(tiny_lm, fits, prompts=PROMPTS[:1]))
    assert len(reply.tokens) == room or reply.finished
    with pytest.raises(InputError, match="'p0'") as caught:
        generate(tiny_lm, SamplerSettings(max_new_tokens=room + 1), prompts=PROMPTS[:1])
    assert str(tiny_lm.context) in caught.value.expected


def test_an_opening_takes_room_too(tiny_lm: Any) -> None:
    room = tiny_lm.context - len(tiny_lm.encode(PROMPTS[0]))
    with pytest.raises(InputError):
        generate(tiny_lm, SamplerSettings(max_new_tokens=room), prompts=PROMPTS[:1], opening=["I don't know"])


def test_sliding_window_bounds_the_context(tiny_lms: dict[str, Any]) -> None:
    assert tiny_lms["mistral"].context == 128
    assert tiny_lms["llama"].context == 160


def test_a_reply_goes_on_from_its_opening(tiny_lm: Any, plain_models: Any) -> None:
    openings = ["I don't know", "", "Could you tell me", "", ""]
    table = generate(tiny_lm, GREEDY, opening=openings)
    plain = generate(tiny_lm, GREEDY)
    for n, (prompt, lead, (reply,)) in enumerate(zip(PROMPTS, openings, table, strict=True)):
        if not lead:
            assert reply.tokens == plain[n][0].tokens
            continue
        assert reply.text.startswith(lead)
        ids = tiny_lm.encode(prompt) + tuple(tiny_lm.tokenizer(lead, add_special_tokens=False)["input_ids"])
        theirs = plain_models["llama"].generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)
        assert list(reply.tokens) == theirs[0, len(ids) :].tolist()
        assert reply.id != plain[n][0].id


def test_progress_counts_every_reply_and_nothing_asked_is_nothing_given(tiny_lm: Any) -> None:
    counted: list[int] = []
    generate(tiny_lm, PLAIN, samples=3, progress=counted.append)
    assert sum(counted) == 15
    assert generate(tiny_lm, PLAIN, prompts=[]) == []


def test_greedy_first_takes_the_likeliest_reply_and_leaves_the_others_as_they_were(tiny_lm: Any) -> None:
    plain, mixed = generate(tiny_lm, PLAIN, samples=3), generate(tiny_lm, PLAIN, samples=3, greedy_first=True)
    best = generate(tiny_lm, SamplerSettings(temperature=0.0, max_new_tokens=10))
    for sampled, some, (likeliest,) in zip(plain, mixed, best, strict=True):
        assert some[0].tokens == likeliest.tokens
        assert np.allclose(some[0].logps, likeliest.logps, atol=1e-5)
        assert some[0].settings.temperature == 0.0
        assert [g.tokens for g in some[1:]] == [g.tokens for g in sampled[1:]]


def test_ids_tell_replies_of_other_settings_apart(tiny_lm: Any) -> None:
    """One id, one text: the ledger refers to replies by id."""
    tables = [generate(tiny_lm, s) for s in (PLAIN, GREEDY, SamplerSettings(temperature=0.5, max_new_tokens=10))]
    texts: dict[str, set[tuple[int, ...]]] = {}
    for reply in (g for table in tables for g in flat(table)):
        texts.setdefault(reply.id, set()).add(reply.tokens)
    assert all(len(found) == 1 for found in texts.values())
