"""GGUF judges: the embedded model run by llama.cpp says what the same weights say in process."""

from __future__ import annotations

import math

import pytest

from tutelage.engines import weights
from tutelage.engines.llamacpp import LlamaCppEngine
from tutelage.errors import ModelError
from tutelage.records import Message, Question

pytest.importorskip("xllamacpp", reason="needs the extra 'gguf'")


@pytest.fixture(scope="module")
def engine():
    file = weights.gguf_of(weights.EMBEDDED_POLICY)
    if file is None:
        pytest.skip("needs the embedded GGUF file: run `tutelage fetch`")
    return LlamaCppEngine(file, context=512, threads=1)


def asked(text, **more):
    return Question((Message("user", text),), **more)


PARIS = asked("Is Paris the capital of France? Answer Yes or No.", labels=("Yes", "No"), opening="The answer is")


def test_labels_are_read_after_the_opening(engine):
    (answer,) = engine.ask([PARIS])
    assert not answer.failure
    assert set(answer.label_logps) == {"Yes", "No"}
    assert 0 < sum(map(math.exp, answer.label_logps.values())) <= 1 + 1e-6
    assert answer.cost.tokens > 10 and answer.cost.seconds > 0


def test_the_same_weights_in_process_agree(engine):
    """llama.cpp multiplies 4-bit weights, we their 16-bit copies: near, not equal."""
    from tutelage.engines.answering import LocalEngine
    from tutelage.engines.load import load_model

    local = LocalEngine(load_model(weights.EMBEDDED_POLICY, device="cpu", dtype="float32"))
    questions = [PARIS, asked("Is ice hot? Answer Yes or No.", labels=("Yes", "No"), opening="The answer is")]
    for here, there in zip(local.ask(questions), engine.ask(questions), strict=True):
        gap = (here.label_logps["Yes"] - here.label_logps["No"]) - (there.label_logps["Yes"] - there.label_logps["No"])
        assert abs(gap) < 0.5


def test_texts_come_without_the_opening_and_repeat_themselves(engine):
    question = asked("Name a colour.", opening="A colour is", max_new_tokens=6)
    first, second = engine.ask([question, question])
    assert first.text and not first.text.startswith("A colour is")
    assert first.text == second.text
    assert all(x <= 0 for x in first.logps)


def test_a_schema_is_kept_to(engine):
    import json

    schema = {
        "type": "object",
        "properties": {"verdict": {"type": "string", "enum": ["A", "B"]}},
        "required": ["verdict"],
    }
    (answer,) = engine.ask([asked("Say A or B as JSON.", schema=schema, max_new_tokens=24)])
    assert json.loads(answer.text)["verdict"] in ("A", "B")


def test_a_question_that_does_not_fit_fails_alone(engine):
    long, short = engine.ask([asked("word " * 2000, labels=("Yes", "No")), PARIS])
    assert long.failure and long.label_logps is None
    assert not short.failure


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        LlamaCppEngine(tmp_path / "none.gguf")
    (tmp_path / "a.gguf").write_bytes(b"PK")
    with pytest.raises(ModelError, match="is no GGUF"):
        LlamaCppEngine(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ModelError, match="cannot load"):
        LlamaCppEngine(tmp_path / "b.gguf")
