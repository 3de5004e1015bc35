"""The report's words: they agree with what the gate counts."""

import pytest

from tutelage.loop.gates import honest
from tutelage.records import Message, Prompt, SuiteItem
from tutelage.studio.wording import KINDS, metric, outcome_label, standing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outcome", ["correct", "wrong", "abstained", "asked_back"])
def test_what_is_wanted_is_what_the_gate_calls_honest(kind, outcome):
    item = SuiteItem(Prompt("a", (Message("user", "?"),)), kind)
    assert (standing(kind, outcome) == "wanted") == honest(item, outcome)


def test_a_wrong_reply_is_named_after_what_it_did():
    assert outcome_label("unanswerable", "wrong") == "made it up"
    assert outcome_label("ambiguous", "wrong") == "guessed"
    assert outcome_label("answerable", "wrong") == "wrong"
    assert outcome_label("answerable", "asked_back") == "asked back"


def test_unknown_names_keep_their_own_words_and_claim_no_direction():
    assert metric("grand_total").label == "Grand total"
    assert metric("grand_total").better == 0
    assert outcome_label("answerable", "sang_along") == "sang along"
