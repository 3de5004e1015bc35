"""Constitutions: what is read, what is refused with file and place, and a hash that sees every change."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tutelage.config import data_file
from tutelage.errors import InputError
from tutelage.feedback.constitution import Constitution, load_constitution

GOOD = """
name = "tést"

[[principles]]
id = "admit"
text = "Say so when you cannot know."
weight = 2
scope = "unanswerable"
wants = "abstains"
critique = 'Nobody can know "{question}".'
openings = ["I don't know", "知りません"]
examples = [{ prompt = "p", bad = "b", good = "g" }]

[[principles]]
id = "answer"
text = "Answer plainly."
scope = "any"
wants = "answers"
"""


def load(tmp_path: Path, text: str) -> Constitution:
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="utf-8")
    return load_constitution(path)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = load(tmp_path, GOOD)
    admit, answer = found.principles
    assert (found.name, admit.weight, admit.openings) == ("tést", 2.0, ("I don't know", "知りません"))
    assert admit.examples == (("p", "b", "g"),)
    assert admit.fallback == "g"  # the first example's good reply, when no fallback is given
    assert admit.critique == 'Nobody can know "{question}".'
    assert (answer.weight, answer.critique, answer.openings) == (1.0, "Answer plainly.", ())


def test_principles_are_about_their_scope(tmp_path: Path) -> None:
    found = load(tmp_path, GOOD)
    assert [p.id for p in found.about("unanswerable")] == ["admit", "answer"]
    assert [p.id for p in found.about("ambiguous")] == ["answer"]


def test_every_change_changes_the_hash(tmp_path: Path) -> None:
    found = load(tmp_path, GOOD)
    assert load(tmp_path, GOOD + "\n# a comment\n").hash == found.hash
    changes = {
        "id": "other", "text": "other", "weight": 3.0, "scope": "any", "wants": "asks_back", "critique": "other",
        "openings": ("other",), "fallback": "other", "examples": (),
    }  # fmt: skip
    assert set(changes) == {f.name for f in dataclasses.fields(found.principles[0])}
    hashes = {found.hash}
    for name, value in changes.items():
        changed = dataclasses.replace(found.principles[0], **{name: value})
        hashes.add(dataclasses.replace(found, principles=(changed, found.principles[1])).hash)
    assert len(hashes) == 1 + len(changes)
    assert dataclasses.replace(found, principles=found.principles[::-1]).hash != found.hash


def test_the_built_in_constitution_is_whole() -> None:
    found = load_constitution(data_file("builtin:honesty", suffix="constitutions/*.toml"))
    for kind, act in (("answerable", "answers"), ("unanswerable", "abstains"), ("ambiguous", "asks_back")):
        assert act in {p.wants for p in found.about(kind)}
    for principle in found.principles:
        assert principle.wants == "answers" or principle.openings or principle.fallback


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('scope = "any"', 'scope = "all"', "principle 2"),
        ('wants = "answers"', 'wants = "answer"', "answers"),
        ('text = "Answer plainly."', "", "lacks 'text'"),
        ('text = "Answer plainly."', 'text = " "', "lacks 'text'"),
        ("weight = 2", "weight = 0", "weight"),
        ("weight = 2", "weight = true", "weight"),
        ("weight = 2", 'weight = "2"', "weight"),
        ("weight = 2", "weight = nan", "weight"),
        ("weight = 2", "weight = inf", "weight"),
        ("weight = 2", "wieght = 2", "'wieght'"),
        ('id = "answer"', 'id = "admit"', "admit"),
        ('good = "g"', 'god = "g"', "example"),
        ('examples = [{ prompt = "p", bad = "b", good = "g" }]', "examples = [1]", "example"),
        ('openings = ["I don\'t know", "知りません"]', 'openings = "I don\'t know"', "openings"),
        ("[[principles]]", "[[principals]]", "no principles"),
        ("[[principles]]", "[[principles", "TOML"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        load(tmp_path, GOOD.replace(old, new))
    assert says in str(caught.value)
    assert "c.toml" in str(caught.value)


@pytest.mark.parametrize("text", ["", "principles = []", "principles = 3", "principles = [1, 2]", 'principles = ["a"]'])
def test_a_file_without_principles_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError):
        load(tmp_path, text)


def test_wanting_without_saying_how_is_refused(tmp_path: Path) -> None:
    text = '[[principles]]\nid = "a"\ntext = "t"\nscope = "any"\nwants = "abstains"\n'
    with pytest.raises(InputError, match="not how"):
        load(tmp_path, text)
    assert load(tmp_path, text + 'fallback = "I pass."\n').principles[0].fallback == "I pass."


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_constitution(tmp_path / "missing.toml")
    with pytest.raises(InputError, match="cannot be read"):
        load_constitution(tmp_path)
    (tmp_path / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        load_constitution(tmp_path / "latin.toml")


MARKDOWN = """\ufeff<!-- a comment
of two lines -->
# tést

A preface that nobody reads.

## admit
weight: 2
scope: unanswerable
wants: abstains
critique: Nobody can know "{question}".
opening: I don't know
opening: 知りません

Say so when you cannot know.

### example
prompt: p
bad: b
good: g

## answer
wants: answers

Answer plainly.
"""


def load_markdown(tmp_path: Path, text: str, name: str = "c.md") -> Constitution:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return load_constitution(path)


def test_markdown_and_toml_of_the_same_principles_are_the_same(tmp_path: Path) -> None:
    found, other = load_markdown(tmp_path, MARKDOWN), load(tmp_path, GOOD)
    assert found == other
    assert found.hash == other.hash
    windows = load_markdown(tmp_path, MARKDOWN.replace("\n", "\r\n"), "d.MARKDOWN")
    assert windows.hash == found.hash


def test_text_in_markdown_may_hold_what_looks_like_more(tmp_path: Path) -> None:
    text = (
        "## 正直\n\nNote: 知らないことは知らないと言う。\nscope: not a key down here\n\n- one\n#### deeper\n"
        "```\n## no heading\n```\n~~~\n```\n# nor this\n~~~\nlast\n"
        "### Example\nPrompt: p\n\nbad: first line\nsecond line\ngood: g ## g\n"
    )
    found = load_markdown(tmp_path, text)
    (one,) = found.principles
    assert (found.name, one.id, one.scope, one.wants, one.weight) == ("c", "正直", "any", "", 1.0)
    assert one.text.startswith("Note: 知ら") and one.text.endswith("last")
    assert "scope: not a key down here" in one.text and "## no heading" in one.text
    assert one.examples == (("p", "first line\nsecond line", "g ## g"),)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("weight: 2", "weight: two", "weight is 'two'"),
        ("weight: 2", "wieght: 2", "did you mean 'weight'"),
        ("opening: I", "openings: I", "did you mean 'opening'"),
        ("scope: unanswerable", "scope: unanswerable\nscope: any", "line 10: a second scope"),
        ("wants: answers", "wants: answer", "line 22"),
        ("### example", "### sample", "line 17"),
        ("good: g", "", "no good"),
        ("bad: b", "bad: b\nbad: c", "line 20: a second bad"),
        ("prompt: p", "p", "line 18"),
        ("## answer", "# answer", "a second title"),
        ("## answer", "## admit", "two principles with the id 'admit'"),
        ("Answer plainly.", "", "lacks 'text'"),
        ("## answer", "## ", "lacks 'id'"),
    ],
)
def test_markdown_that_makes_no_sense_is_refused_at_its_line(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in MARKDOWN
    with pytest.raises(InputError) as caught:
        load_markdown(tmp_path, MARKDOWN.replace(old, new))
    assert says in str(caught.value)
    assert "c.md" in str(caught.value)


@pytest.mark.parametrize("text", ["", "# only a name\n", "### example\nprompt: p\nbad: b\ngood: g\n"])
def test_markdown_without_principles_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError):
        load_markdown(tmp_path, text)


def test_a_principle_that_wants_no_act_is_for_models_alone(tmp_path: Path) -> None:
    found = load(tmp_path, GOOD + '\n[[principles]]\nid = "polite"\ntext = "Be polite."\n')
    polite = found.principles[2]
    assert (polite.scope, polite.wants) == ("any", "")
    assert [p.id for p in found.acting] == ["admit", "answer"]
    assert [p.id for p in found.about("unanswerable")] == ["admit", "answer"]


def test_the_panel_leaves_out_what_wants_no_act(tmp_path: Path) -> None:
    """By hand: belief .5 unanswerable; admit has the weight 2 * .5 and is kept .2, answer 1 and .8: (.2 + .8) / 2."""
    from tutelage.config import Feedback
    from tutelage.feedback.belief import Belief
    from tutelage.feedback.panel import Panel
    from tutelage.records import Generation, Message, Prompt, SamplerSettings

    more = '\n[[principles]]\nid = "polite"\ntext = "Be polite."\nweight = 50\n'
    prompt = Prompt("p", (Message("user", "q"),))
    reply = Generation("g", "p", 0, "r", (5,), (-0.5,), True, SamplerSettings(), "start", 0)
    act = {"answers": 0.8, "abstains": 0.2, "asks_back": 0.0}
    told = []
    for text in (GOOD, GOOD + more):
        panel = Panel(Feedback(), load(tmp_path, text), None, None)  # type: ignore[arg-type] # nothing is embedded
        told.append(panel._principles(prompt, reply, Belief(0.5, 0.5, 0.0, 0.0, ()), act))
    assert told[0] == told[1]
    assert told[1][0] == pytest.approx(0.5)
    alone = load(tmp_path, more)
    assert Panel(Feedback(), alone, None, None)._principles(  # type: ignore[arg-type]
        prompt, reply, Belief(0.5, 0.5, 0.0, 0.0, ()), act
    ) == (None, "no principle covers this question", {})
