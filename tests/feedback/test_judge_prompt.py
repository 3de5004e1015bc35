"""Judge prompts as files, and the fence around judged texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.errors import InputError, RecipeError
from tutelage.feedback.judge_prompt import conversation, fence, load_judge_prompt
from tutelage.records import Message, Prompt, content_hash

GOOD = 'kind = "pairwise"\nlabels = ["A", "B"]\nuser = "{prompt} {first} {second}?"\n'


@given(st.text())
def test_a_text_cannot_close_its_fence(text):
    fenced = fence(text)
    mark = fenced[3:15]
    assert fenced == f"<<<{mark}\n{text}\n{mark}>>>"
    assert mark not in text


def test_a_text_that_guesses_its_mark_gets_another():
    # Nobody can write a text that holds its own hash; the loop is for the one who could.
    text = "x"
    assert content_hash(["fence", text], length=12) in fence(text)
    assert fence(text) == fence(text)


@pytest.mark.parametrize("name", ["pairwise", "pointwise", "listwise", "pairwise-json"])
def test_built_in_prompts_share_what_comes_first(name):
    words = load_judge_prompt(f"builtin:{name}")
    order = [words.user.index("{" + hole + "}") for hole in ("rules", "prompt")]
    later = [words.user.index("{" + h + "}") for h in ("first", "reply", "replies") if "{" + h + "}" in words.user]
    assert order == sorted(order) and order[-1] < min(later)


def test_holes_in_a_judged_text_stay_what_they_are():
    words = load_judge_prompt("builtin:pairwise")
    text = words.messages(rules="", prompt="{first}", first="{second}", second="S")[-1].content
    assert "{first}" in text and "{second}" in text


def test_a_dialogue_is_read_turn_by_turn():
    prompt = Prompt("p", (Message("user", "hi"), Message("assistant", "hello"), Message("user", "and?")))
    assert "User: hi\nAssistant: hello\nUser: and?" in conversation(prompt)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("pairwise", "pairs"), "kind"),
        (('"A", "B"', '"A"'), "labels"),
        (('"A", "B"', '"A", "A"'), "labels"),
        (('["A", "B"]', '"AB"'), "labels"),
        (("{second}", ""), "lacks {second}"),
        (("labels", "lables"), "unknown key 'lables'"),
        (("kind", 'output = "xml"\nkind'), "output"),
        (("kind", "least_mass = 2\nkind"), "least_mass"),
        (("kind", "least_mass = true\nkind"), "least_mass"),
        (("kind", "system = 3\nkind"), "must be texts"),
        (('"pairwise"', "pairwise"), "cannot be read"),
    ],
)
def test_a_broken_prompt_is_refused_with_its_place(change, said, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace(*change), encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_judge_prompt(str(path))
    assert said in str(error.value) and "mine.toml" in str(error.value)


def test_a_good_prompt_is_read_and_its_hash_tells_words_apart(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD, encoding="utf-8")
    first = load_judge_prompt(str(path))
    path.write_text(GOOD.replace("?", "!"), encoding="utf-8")
    assert load_judge_prompt(str(path)).hash != first.hash


def test_a_missing_prompt_names_the_known_ones():
    with pytest.raises(RecipeError, match="builtin:listwise"):
        load_judge_prompt("builtin:nothing")
    with pytest.raises(InputError, match="cannot be read"):
        load_judge_prompt("/nowhere/x.toml")
