"""What servers say is read strictly: the sum worked by hand, and nothing but an answer passes."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.engines.replies import Malformed, Reply, complaint, read_reply

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def token(text: str, probability: float, *top: tuple[str, float]) -> dict[str, Any]:
    listed = [{"token": t, "logprob": math.log(p)} for t, p in top]
    return {"token": text, "logprob": math.log(probability), "top_logprobs": listed}


def reply(*tokens: dict[str, Any], content: str = "A", **changes: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    if tokens:
        choice["logprobs"] = {"content": list(tokens)}
    return {"choices": [choice | changes], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}


def read(found: object, labels: tuple[str, ...] = ("A", "B")) -> Reply:
    return read_reply(json.dumps(found).encode(), labels)


def probabilities(found: Reply) -> dict[str, float] | None:
    return None if found.label_logps is None else {k: math.exp(v) for k, v in found.label_logps.items()}


def test_ways_to_write_a_label_are_added_up():
    """A: 0.5 + 0.1 + 0.05; B: 0.2. The rest went to other words, and what was drawn is listed only once."""
    first = token("A", 0.5, ("A", 0.5), (" B", 0.2), ("**A", 0.1), ("(A)", 0.05), ("An", 0.05), ("\n", 0.01))
    found = read(reply(first))
    assert probabilities(found) == pytest.approx({"A": 0.65, "B": 0.2})
    assert found.logps == pytest.approx((math.log(0.5),))
    assert (found.text, found.tokens_in, found.tokens_out, found.declined) == ("A", 9, 2, "")


def test_what_was_drawn_counts_where_it_is_not_listed_and_once_where_it_is_listed_twice():
    assert probabilities(read(reply(token("A", 0.5, ("B", 0.3))))) == pytest.approx({"A": 0.5, "B": 0.3})
    twice = token("A", 0.4, ("A", 0.4), ("A", 0.4), ("B", 0.2))
    assert probabilities(read(reply(twice))) == pytest.approx({"A": 0.4, "B": 0.2})


def test_a_label_behind_emphasis_counts_with_the_way_there():
    """0.3 A at once, or 0.6 stars and then 0.75 A or 0.25 B: A 0.3 + 0.45, B 0.15."""
    first = token("**", 0.6, ("**", 0.6), ("A", 0.3))
    second = token("A", 0.75, ("A", 0.75), ("B", 0.25))
    third = token("B", 0.99, ("B", 0.99))
    found = read(reply(first, second, third, content="**A B"))
    assert probabilities(found) == pytest.approx({"A": 0.75, "B": 0.15})
    assert len(found.logps) == 3


def test_without_a_listed_label_there_is_only_text():
    found = read(reply(token("The", 0.9, ("The", 0.9), ("I", 0.05)), content="The first, A."))
    assert found.label_logps is None
    assert found.text == "The first, A."
    one = read(reply(token("B", 0.9)))
    assert one.label_logps is not None and one.label_logps["A"] == pytest.approx(math.log(0.1))
    assert read(reply(content="B")).label_logps is None
    assert read(reply(token("A", 0.9)), labels=()).label_logps is None, "a question for text has no labels"


@pytest.mark.parametrize("tokens", [None, {}, {"content": None}, {"content": []}])
def test_servers_without_log_probabilities(tokens: object):
    found = read(reply(logprobs=tokens))
    assert (found.text, found.logps, found.label_logps) == ("A", (), None)


def test_a_certain_token_may_come_out_a_little_above_one():
    found = reply(token("A", 1.0, ("A", 1.0)))
    for place in (found["choices"][0]["logprobs"]["content"][0],):
        place["logprob"] = place["top_logprobs"][0]["logprob"] = 0.0004
    assert read(found).label_logps == {"A": 0.0, "B": pytest.approx(math.log(1e-6))}
    assert read(found).logps == (0.0,)


@pytest.mark.parametrize("value", [0.01, math.nan, math.inf, -math.inf, "-0.1", None, True, -(10**400), [], 1e999])
def test_a_log_probability_is_a_finite_number_that_is_not_above_zero(value: object):
    for where in ("drawn", "listed"):
        found = reply(token("A", 0.5, ("B", 0.2)))
        place = found["choices"][0]["logprobs"]["content"][0]
        (place if where == "drawn" else place["top_logprobs"][0])["logprob"] = value
        with pytest.raises(Malformed):
            read(found)


def test_probabilities_do_not_exceed_one():
    with pytest.raises(Malformed, match="more than one"):
        read(reply(token("A", 0.6, ("A", 0.6), ("B", 0.6))))


def test_who_declines_says_nothing_else_and_is_paid():
    filtered = read(reply(token("A", 0.5), finish_reason="content_filter"))
    assert filtered == Reply("", declined="a content filter stopped the answer", tokens_in=9, tokens_out=2)
    refused = read(reply(message={"content": None, "refusal": "I cannot\n judge " + "that " * 100}))
    assert refused.declined.startswith("the model refused: I cannot judge that")
    assert len(refused.declined) < 400
    assert refused.text == "" and refused.label_logps is None


@pytest.mark.parametrize("usage", [None, 3, {}, {"prompt_tokens": -1}, {"prompt_tokens": 1.5}, {"prompt_tokens": True}])
def test_nonsense_about_tokens_counts_as_not_said(usage: object):
    found = read(reply() | {"usage": usage})
    assert (found.text, found.tokens_in) == ("A", None)


@given(
    path=st.sampled_from(
        [
            ("choices",), ("choices", 0), ("choices", 0, "message"), ("choices", 0, "finish_reason"),
            ("choices", 0, "message", "content"), ("choices", 0, "message", "refusal"), ("choices", 0, "logprobs"),
            ("choices", 0, "logprobs", "content"), ("choices", 0, "logprobs", "content", 0),
            ("choices", 0, "logprobs", "content", 0, "token"), ("choices", 0, "logprobs", "content", 0, "logprob"),
            ("choices", 0, "logprobs", "content", 0, "top_logprobs"),
            ("choices", 0, "logprobs", "content", 0, "top_logprobs", 0),
            ("choices", 0, "logprobs", "content", 0, "top_logprobs", 0, "logprob"), ("usage",), ("error",),
        ]
    ),
    value=JSON,
)  # fmt: skip
def test_any_value_in_any_place_is_read_right_or_refused(path: tuple[Any, ...], value: object):
    """Whatever is changed, labels hold no more than probability one, and no text is other than what stood there."""
    found = copy.deepcopy(reply(token("A", 0.5, ("A", 0.5), ("B", 0.3))))
    place = found
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    try:
        heard = read(found)
    except Malformed:
        return
    if heard.declined:
        assert (heard.text, heard.label_logps) == ("", None)
        return
    assert heard.text == str(found["choices"][0]["message"]["content"]).strip()
    if heard.label_logps is not None:
        assert set(heard.label_logps) == {"A", "B"}
        assert math.fsum(math.exp(x) for x in heard.label_logps.values()) <= 1.01


@given(JSON)
def test_any_json_is_read_or_refused(value: object):
    with pytest.raises(Malformed):
        read(value)


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_and_still_complained_about(body: bytes):
    with pytest.raises(Malformed):
        read_reply(body, "AB")
    assert len(complaint(body)) <= 310


@given(st.integers(0, 400))
def test_a_body_cut_anywhere_is_refused(length: int):
    body = json.dumps(reply(token("A", 0.5, ("A", 0.5), ("B", 0.3)))).encode()
    assert len(body) > 300
    with pytest.raises(Malformed):
        read_reply(body[: min(length, len(body) - 1)], "AB")


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b'{"error": {"message": "no such model", "code": 404}}', "no such model"),
        (b'{"error": "no"}', "no"),
        (b'{"object": "error", "message": "busy"}', "busy"),
        (b'{"detail": [{"loc": "x"}]}', '[{"loc": "x"}]'),
        (b"<html>\n Bad \xff gateway", "<html> Bad \ufffd gateway"),
        (b"", ""),
        (b'{"error": {"message": "\\ud83d"}}', "?"),
    ],
)
def test_a_servers_own_words_are_found(body: bytes, wanted: str):
    assert complaint(body) == wanted
