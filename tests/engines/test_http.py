"""The engine against real servers on loopback: one that fails in every way, and llama.cpp's own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import math
import pickle
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faulty_server import FAULTS, FINAL, SLOW, FaultyServer, serve, truth

from tutelage.engines.answers import CachedEngine
from tutelage.engines.http import KEY_VARIABLE, HttpEngine, Stopped
from tutelage.engines.limits import Limits, Patience
from tutelage.engines.weights import EMBEDDED_POLICY, cache_dir, have, locate
from tutelage.errors import BudgetSpent, ModelError, RecipeError
from tutelage.records import Answer, Message, Question

SECRET = "sk-Geheim.7/x+y="  # noqa: S105 - made up
HASTY = Patience(tries=5, timeout=1.0, first_wait=0.005, longest_wait=0.05)
CALLS = 10_000
# Faults after which a right answer came, if without log-probabilities, or words without a verdict.
HARMLESS = ("no log-probabilities", "usage nonsense")
WORDS = ("refusal in words", "another language")
REFUSED = ("401", "404", "redirect")


def questions(count: int, start: int = 0) -> list[Question]:
    return [
        Question((Message("system", "Judge."), Message("user", f"哪个更好？ {n}")), "So:", ("A", "B"))
        for n in range(start, start + count)
    ]


def is_true(question: Question, answer: Answer) -> bool:
    """Whether the answer holds exactly what the server computes for the question."""
    wanted = truth(question.messages[-1].content)
    if answer.failure or answer.label_logps is None:
        return False
    return answer.label_logps == pytest.approx(wanted, abs=1e-9)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with serve() as running:
        yield running


# What is asked and what is answered


def test_answers_are_what_the_server_computed(server: FaultyServer):
    asked = questions(40)
    engine = HttpEngine("judge-7b", server.url)
    answers = engine.ask(asked)
    assert all(is_true(q, a) for q, a in zip(asked, answers, strict=True))
    wanted = truth(asked[0].messages[-1].content)
    assert answers[0].text == max(wanted, key=lambda label: wanted[label])
    assert answers[0].cost.tokens == len(asked[0].messages[-1].content) + 1 and answers[0].cost.seconds > 0
    assert engine.tally == {"answered": 40} and engine.spent.calls == 40
    assert engine.ask([]) == []


def test_requests_hold_what_was_asked_and_no_more(server: FaultyServer):
    turns = (Message("system", "Judge."), Message("user", "A or B? \ud83d"))
    engine = HttpEngine("judge", f"{server.url}/v1/chat/completions", extra={"seed": 7, "max_tokens": None})
    engine.ask([Question(turns, "So:", ("A", "B"), temperature=0.9)])
    assert server.body == {
        "model": "judge", "messages": [{"role": "system", "content": "Judge."}, {"role": "user", "content": "A or B? ?"}],
        "temperature": 0.0, "logprobs": True, "top_logprobs": 20, "seed": 7,
    }  # fmt: skip
    schema = {"type": "object", "properties": {"verdict": {"type": "string"}}}
    HttpEngine("judge", server.url).ask([Question(turns, "So:", max_new_tokens=30, temperature=0.7, schema=schema)])
    assert server.body.pop("messages") and server.body == {
        "model": "judge", "max_tokens": 30, "temperature": 0.7,
        "response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema, "strict": True}},
    }  # fmt: skip


def test_an_opening_is_sent_to_servers_that_go_on_from_it(server: FaultyServer):
    HttpEngine("judge", server.url, prefill=True).ask([Question((Message("user", "A or B?"),), "So:", ("A", "B"))])
    assert server.body["messages"][-1] == {"role": "assistant", "content": "So:"}
    assert server.body["continue_final_message"] is True and server.body["add_generation_prompt"] is False


def test_the_version_names_what_decides_the_answers():
    engines = [
        HttpEngine("a", "http://h:1"), HttpEngine("b", "http://h:1"), HttpEngine("a", "http://h:2"),
        HttpEngine("a", "http://h:1", prefill=True), HttpEngine("a", "http://h:1", extra={"seed": 1}),
    ]  # fmt: skip
    assert len({e.version for e in engines}) == len(engines)
    assert HttpEngine("a", "http://h:1/v1/", limits=Limits(parallel=2)).version == engines[0].version


def test_it_can_be_asked_inside_a_running_loop_and_by_threads(server: FaultyServer):
    engine = HttpEngine("judge", server.url, limits=Limits(parallel=3))

    async def notebook() -> list[Answer]:
        return engine.ask(questions(5))

    assert all(is_true(q, a) for q, a in zip(questions(5), asyncio.run(notebook()), strict=True))
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        batches = [questions(30, start=100 * n) for n in range(6)]
        for asked, answers in zip(batches, pool.map(engine.ask, batches), strict=True):
            assert all(is_true(q, a) for q, a in zip(asked, answers, strict=True))
    assert server.most_flying <= 3
    assert engine.spent.calls == server.calls["right"] == 185


# Faults


def test_ten_thousand_calls_of_which_a_third_fails():
    """No crash, no invented score, and every call accounted for."""
    asked = questions(CALLS)
    with serve(rate=0.3, seed=1) as server:
        engine = HttpEngine("judge", server.url, patience=HASTY)
        answers = engine.ask(asked)
        assert len(answers) == len(asked)
        assert len(FAULTS) >= 30 and set(server.calls) == {*FAULTS, "right"}
        assert sum(server.calls.values()) == engine.spent.calls == sum(engine.tally.values())
        failed = [a for a in answers if a.failure]
        assert engine.tally["answered"] + len(failed) == len(asked)
        final = sum(server.calls[name] for name in FINAL)
        assert sum(not a.passing for a in failed) == engine.tally["declined"] + engine.tally["400"] <= final
        assert len(failed) - final < 0.005 * CALLS, "what can pass is asked again"
        # On a machine that is busy, an answer may come too late and count as none.
        late = engine.tally["timeout"] - sum(server.calls[name] for name in SLOW if "MB" not in name)
        assert late >= 0
        for name in ("429", "500", "503", "404"):
            served = sum(n for fault, n in server.calls.items() if fault.startswith(name))
            assert 0 <= served - engine.tally[name] <= late
    for question, answer in zip(asked, answers, strict=True):
        if answer.failure:
            assert (answer.text, answer.logps, answer.label_logps) == ("", (), None)
            assert len(answer.failure) > 3
        elif answer.label_logps is None:
            assert not answer.logps
            wanted = truth(question.messages[-1].content)
            assert len(answer.text) > 20 or answer.text == max(wanted, key=lambda label: wanted[label])
        else:
            assert is_true(question, answer)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone(server: FaultyServer, fault: str):
    """A good answer, then nothing but the fault: a reason, no number, and the number of calls that makes sense."""
    server.hang = 0.3
    patience = Patience(tries=2, timeout=0.2, first_wait=0.001, longest_wait=0.002, outage=3, give_up=0.01)
    engine = HttpEngine("judge", server.url, patience=patience)
    (good,) = engine.ask(questions(1))
    assert not good.failure
    server.script = lambda _: fault
    (answer,) = engine.ask(questions(1, start=1))
    if fault in (*HARMLESS, *WORDS):
        assert not answer.failure and answer.text
        assert (answer.label_logps is None) == (fault != "usage nonsense")
        return
    assert answer.failure and (answer.text, answer.label_logps) == ("", None)
    assert answer.passing == (fault not in FINAL)
    assert ("more than 2 MB" in answer.failure) == ("MB" in fault), "what is too long is not read to its end"
    assert ("no answer within" in answer.failure) == (fault in SLOW and "MB" not in fault), "however it drips"
    assert ("packed" in answer.failure) == ("packed" in fault), "nor unpacked"
    if fault in FINAL:
        assert server.calls[fault] == 1
    elif fault[:3] not in ("429", "502", "503", "504", "529"):  # those are waited for like an outage
        assert server.calls[fault] == 2


def test_a_busy_server_is_asked_less(server: FaultyServer):
    """A server that takes four at once: the engine finds its way down and loses nothing."""
    server.work, server.script = 0.01, lambda _: "429" if server.flying > 4 else ""
    engine = HttpEngine("judge", server.url, patience=Patience(tries=12, first_wait=0.01, longest_wait=0.1))
    asked = questions(300)
    assert all(is_true(q, a) for q, a in zip(asked, engine.ask(asked), strict=True))
    assert 2 <= engine.traffic.concurrency.limit <= 12
    assert 0 < server.calls["429"] < 150


def test_retry_after_is_obeyed(server: FaultyServer):
    faults = iter(["", "429 for a while"])
    server.script = lambda _: next(faults, "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAULTS, "429 for a while", lambda h, _: h.json({}, "429 Busy", "Retry-After: 0.4"))
        engine = HttpEngine("judge", server.url, patience=Patience(first_wait=0.001))
        engine.ask(questions(1))
        engine.ask(questions(1, start=1))
    assert server.times[2] - server.times[1] >= 0.4


def test_calls_a_minute_are_kept(server: FaultyServer):
    """1200 a minute: 120 at once, then 18 a second, so that 150 take at least 1.6 s."""
    engine = HttpEngine("judge", server.url, limits=Limits(calls_per_minute=1200))
    engine.ask(questions(150))
    assert server.times[-1] - server.times[0] >= 30 / ((1200 - 120 + 1) / 60) - 0.05


# Outages


def test_a_total_outage_pauses_the_run_and_it_goes_on_by_itself(monkeypatch: pytest.MonkeyPatch):
    """The server goes away in the middle, nobody listens for a while, and another one comes back to its port.

    Two tries are enough for each question: those that nobody could take do not count.
    """
    monkeypatch.setitem(FAULTS, "goes", lambda h, _: h.json({}, "503 Later", "Connection: close") or False)
    said: list[str] = []
    asked = questions(400)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(serve())
        port = first.server_address[1]
        first.script = lambda _: "goes" if sum(first.calls.values()) > 150 else ""
        patience = Patience(tries=2, first_wait=0.02, longest_wait=0.1)
        engine = HttpEngine("judge", first.url, patience=patience, say=said.append)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(engine.ask, asked)
            while first.calls["goes"] < 3:
                time.sleep(0.001)
            first.shutdown()
            first.server_close()
            time.sleep(0.6)
            assert not running.done()
            calls = engine.spent.calls
            time.sleep(0.5)
            assert engine.spent.calls - calls <= 6, "one call at a time asks whether it is back"
            with serve(port=port) as second:
                answers = running.result(timeout=30)
                assert second.calls["right"] > 0
    assert all(is_true(q, a) for q, a in zip(asked, answers, strict=True))
    assert len(said) == 2
    assert f"127.0.0.1:{port} is away" in said[0] and "waiting" in said[0]
    assert f"127.0.0.1:{port} is back after" in said[1]


def test_an_outage_that_outlasts_patience_fails_what_is_left_and_the_next_batch_tries_again(server: FaultyServer):
    said: list[str] = []
    patience = Patience(first_wait=0.01, longest_wait=0.05, give_up=0.4, outage=5)
    engine = HttpEngine("judge", server.url, patience=patience, say=said.append)
    assert not any(a.failure for a in engine.ask(questions(5)))
    server.script = lambda _: "503"
    started = time.monotonic()
    answers = engine.ask(questions(50, start=5))
    assert 0.3 < time.monotonic() - started < 5
    assert all(a.passing and "was away for" in a.failure for a in answers)
    assert [line.partition(f"{engine.host} ")[2][:7] for line in said] == ["is away", "is away"]
    assert "503: no" in said[0] and "not waiting any longer" in said[1]
    server.script = lambda _: ""
    time.sleep(0.1)
    asked = questions(10, start=99)
    assert all(is_true(q, a) for q, a in zip(asked, engine.ask(asked), strict=True))
    assert "is back" in said[-1]


def test_one_question_that_breaks_the_server_does_not_hold_up_the_others(server: FaultyServer):
    poison = questions(60)[17]
    server.script = lambda body: "500" if body["messages"][-1]["content"] == poison.messages[-1].content else ""
    engine = HttpEngine("judge", server.url, patience=HASTY)
    answers = engine.ask(questions(60))
    assert [i for i, a in enumerate(answers) if a.failure] == [17]
    assert "the last of 5 tries" in answers[17].failure and answers[17].passing
    assert engine.ask([poison])[0].failure, "alone as well"


# Budgets


def test_the_budget_is_a_hard_stop_and_what_was_paid_is_handed_over(server: FaultyServer):
    engine = HttpEngine("judge", server.url, limits=Limits(calls=7))
    asked = questions(20)
    with pytest.raises(BudgetSpent, match="calls: 7 of 7") as caught:
        engine.ask(asked)
    assert sum(server.calls.values()) == engine.spent.calls == 7
    assert isinstance(caught.value, Stopped) and caught.value.exit_code == 5
    kept = [(q, a) for q, a in zip(asked, caught.value.answers, strict=True) if a is not None]
    assert len(kept) == 7 and all(is_true(q, a) for q, a in kept)
    with pytest.raises(BudgetSpent):
        engine.ask(asked[:1])
    assert sum(server.calls.values()) == 7
    assert type(pickle.loads(pickle.dumps(caught.value))) is Stopped  # noqa: S301 - our own


def test_a_call_whose_cost_nobody_knows_counts_as_the_dearest(server: FaultyServer):
    """A refusal is free; half an answer may have cost all that was put aside, which is what the question can take."""
    (asked,) = questions(1)
    read = sum(len(m.content.encode()) + 16 for m in asked.messages) + 32
    for fault, tokens in ("500", 0), ("truncated JSON", read + asked.max_new_tokens):
        faults = iter(["", fault])
        server.script = lambda _, faults=faults: next(faults, "")
        engine = HttpEngine("judge", server.url, patience=HASTY)
        engine.ask([asked])
        (answer,) = engine.ask([asked])
        right = len(asked.messages[-1].content) + 1
        assert answer.cost.tokens == tokens + right
        assert engine.spent.tokens == tokens + 2 * right


def test_money_is_never_overspent_though_calls_fail():
    limits = Limits(money=0.01, price_in=2.0, price_out=8.0, parallel=16)
    with serve(rate=0.3, seed=3) as server:
        engine = HttpEngine("judge", server.url, limits=limits, patience=HASTY)
        with pytest.raises(Stopped, match="money") as caught:
            engine.ask(questions(2000))
        assert sum(server.calls.values()) == engine.spent.calls
    spent = limits.cost(engine.spent)
    assert 0.009 < spent <= 0.01
    told = sum(a.cost.money for a in caught.value.answers if a)
    assert 0.7 * spent < told <= spent * (1 + 1e-9), "answers say what they cost, with their failed tries"


# Servers that cannot be used


@pytest.mark.parametrize("fault", REFUSED)
def test_wrong_key_address_or_model_stop_the_run_at_once(server: FaultyServer, fault: str):
    server.script = lambda _: fault
    engine = HttpEngine("judge", server.url)
    with pytest.raises(ModelError, match=fault if fault != "redirect" else "307") as caught:
        engine.ask(questions(1000))
    assert sum(server.calls.values()) <= 4
    assert server.url.removeprefix("http://") in str(caught.value) and KEY_VARIABLE in str(caught.value)


def test_a_key_that_was_taken_back_stops_the_run_in_the_middle(server: FaultyServer):
    server.script = lambda _: "401" if sum(server.calls.values()) >= 50 else ""
    with pytest.raises(ModelError, match="401"):
        HttpEngine("judge", server.url, patience=HASTY).ask(questions(1000))
    assert server.calls["401"] < 50


def test_requests_that_a_server_does_not_understand_stop_the_run(server: FaultyServer):
    server.script = lambda _: "too long"
    engine = HttpEngine("judge", server.url)
    with pytest.raises(ModelError, match="context length") as caught:
        engine.ask(questions(1000))
    assert "top_logprobs" in str(caught.value) and server.calls["too long"] < 40


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = HttpEngine("judge", f"http://127.0.0.1:{port}", patience=Patience(first_wait=0.01))
    with pytest.raises(ModelError, match=f"127.0.0.1:{port} cannot be reached"):
        engine.ask(questions(10))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "ftp://h/v1",
        "http://",
        f"http://user:{SECRET}@h",
        "http://h/v1?key=x",
        "http://h:x",
        "http://[::1",
    ],
)
def test_addresses_that_are_none_are_refused_and_not_repeated(url: str):
    with pytest.raises(ModelError, match="http://HOST:PORT") as caught:
        HttpEngine("judge", url)
    assert SECRET not in str(caught.value)


def test_extra_fields_must_be_json():
    with pytest.raises(RecipeError, match="extra"):
        HttpEngine("judge", "http://h", extra={"x": {1, 2}})


# The key


def test_the_key_goes_to_its_host_and_nowhere_else(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Not into any object, message, log or file, though the server repeats it and sends us elsewhere with it."""
    monkeypatch.setenv(KEY_VARIABLE, f" {SECRET}\n")
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "another-secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Private: another-secret")
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    with serve() as elsewhere:
        faults = {
            "tells": lambda h, _: h.json({"error": {"message": f"bad key {SECRET}"}}, "500 Oh"),
            "tells and refuses": lambda h, _: h.json({"error": {"message": f"bad key {SECRET}"}}, "400 Bad"),
            "tells in a refusal": lambda h, b: _said(h, b, None, f"no, {SECRET}"),
            "tells in words": lambda h, b: _said(h, b, f"your key is {SECRET}", None),
            "sends away": lambda h, _: h.reply("308 There", b"", f"Location: {elsewhere.url}/v1/chat/completions"),
        }  # fmt: skip
        for name, fault in faults.items():
            monkeypatch.setitem(FAULTS, name, fault)
        patience = Patience(tries=2, first_wait=0.001, outage=3, give_up=0.01)
        engine = CachedEngine(HttpEngine("judge", server.url, patience=patience, say=said.append), tmp_path / "a.db")
        answers = engine.ask(questions(3))
        for number, name in enumerate(faults):
            server.script = lambda _, name=name: name
            with contextlib.suppress(ModelError):
                answers += engine.ask(questions(2, start=10 * number + 10))
        with pytest.raises(ModelError) as refused:
            HttpEngine("judge", server.url).ask(questions(1))
        assert sum(elsewhere.calls.values()) == 0
    engine.close()
    assert server.keys == {f"Bearer {SECRET}"}
    assert "another-secret" not in str(server.headers)
    assert not any(name.startswith(("x-", "openai-")) for name in server.headers)
    assert sum("[key]" in a.failure + a.text for a in answers) >= 6
    inside = [repr(engine.engine), str(vars(engine.engine)), str(vars(engine.engine.traffic)), str(refused.value)]
    text = "\n".join([*inside, *map(repr, answers), *said, caplog.text, refused.getrepr().__str__()])
    assert len(caplog.records) > 50, "what is searched is not empty"
    assert SECRET not in text
    assert all(SECRET.encode() not in path.read_bytes() for path in tmp_path.iterdir())


def _said(handler: Any, body: Any, content: str | None, refusal: str | None) -> None:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    handler.json({"choices": [{"index": 0, "finish_reason": "stop", "message": message}]})


def test_a_key_can_be_bound_to_one_host(server: FaultyServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    monkeypatch.setenv("MY_KEY_HOST", "api.example.org")
    with pytest.raises(ModelError, match=r"for api.example.org, not for 127.0.0.1") as caught:
        HttpEngine("judge", server.url, key_variable="MY_KEY")
    assert SECRET not in str(caught.value)
    for host in ("127.0.0.1", server.url.removeprefix("http://")):
        monkeypatch.setenv("MY_KEY_HOST", host)
        assert not HttpEngine("judge", server.url, key_variable="MY_KEY").ask(questions(1))[0].failure
    assert server.keys == {f"Bearer {SECRET}"}
    HttpEngine("judge", server.url).ask(questions(1))
    assert server.keys == {f"Bearer {SECRET}", None}, "without a key none is sent"
    monkeypatch.setenv("MY_KEY", "two words")
    with pytest.raises(ModelError, match="MY_KEY") as caught:
        HttpEngine("judge", server.url, key_variable="MY_KEY")
    assert "two words" not in str(caught.value)


def test_no_proxy_reads_a_key_over_http(server: FaultyServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    with serve() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert not HttpEngine("judge", server.url).ask(questions(1))[0].failure
        assert sum(proxy.calls.values()) == 0


# llama.cpp


def _gguf() -> Path | None:
    folders = [locate(EMBEDDED_POLICY)] if have(EMBEDDED_POLICY) else []
    return next((f for d in [*folders, cache_dir() / "judges"] for f in sorted(d.glob("*.gguf"))), None)


@pytest.fixture(scope="module")
def llama() -> Iterator[tuple[Any, str]]:
    """llama.cpp's server on loopback, in this process, with a key."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="the prebuilt llama.cpp is not installed")
    file = _gguf()
    if file is None:
        pytest.skip("no GGUF file of a chat model is here")
    params = xllamacpp.CommonParams()
    params.model.path, params.api_keys = str(file), [SECRET]
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.cpuparams.n_threads = 1024, 2, 0, 1
    params.warmup, params.verbosity = False, -1
    server = xllamacpp.Server(params)
    yield server, server.listening_address
    del server


def test_llama_cpp_answers_as_it_does_in_process(llama: tuple[Any, str], monkeypatch: pytest.MonkeyPatch):
    """Labels' probabilities are those of the tokens that llama.cpp lists when it is called directly."""
    server, url = llama
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    turns = (Message("user", "Which is better? 1: yes. 2: no. Answer with 1 or 2 only."),)
    asked = [Question(turns, "", ("1", "2")), Question(turns, "The better one is", ("1", "2"))]
    plain, begun = HttpEngine("any", url, prefill=True).ask(asked)
    assert not plain.failure and not begun.failure
    sent = [{"role": "user", "content": turns[0].content}]
    for answer, messages in (plain, sent), (begun, [*sent, {"role": "assistant", "content": "The better one is"}]):
        direct = server.handle_chat_completions(
            {"messages": messages, "max_tokens": 8, "temperature": 0.0, "logprobs": True, "top_logprobs": 20}
        )
        places = direct["choices"][0]["logprobs"]["content"]
        reached, wanted = 1.0, dict.fromkeys("12", 0.0)
        for place in places:
            for top in place["top_logprobs"]:
                word = "".join(c for c in top["token"] if c.isalnum())
                if word in wanted:
                    wanted[word] += reached * math.exp(top["logprob"])
            if any(c.isalnum() for c in place["token"]):
                break
            reached *= math.exp(place["logprob"])
        assert answer.label_logps is not None
        assert {k: math.exp(v) for k, v in answer.label_logps.items()} == pytest.approx(wanted, abs=0.01)
        assert answer.cost.tokens == direct["usage"]["total_tokens"]
        assert answer.text == direct["choices"][0]["message"]["content"].removeprefix("The better one is").strip()
        assert sum(wanted.values()) > 0.05
    assert plain.label_logps != begun.label_logps


def test_llama_cpp_writes_text_keeps_to_a_schema_and_refuses_a_wrong_key(
    llama: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
):
    _, url = llama
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    engine = HttpEngine("any", url)
    turns = (Message("user", "Which is better? A: yes. B: no."),)
    schema = {
        "type": "object", "properties": {"verdict": {"type": "string", "enum": ["A", "B"]}},
        "required": ["verdict"], "additionalProperties": False,
    }  # fmt: skip
    text, ruled = engine.ask([Question(turns, max_new_tokens=12), Question(turns, max_new_tokens=40, schema=schema)])
    assert text.text and text.label_logps is None
    assert json.loads(ruled.text)["verdict"] in ("A", "B")
    long = Question((Message("user", "word " * 5000),))
    (answer,) = engine.ask([long])
    assert "400" in answer.failure and not answer.passing
    monkeypatch.setenv(KEY_VARIABLE, "wrong")
    with pytest.raises(ModelError, match="401"):
        HttpEngine("any", url).ask([Question(turns)])
