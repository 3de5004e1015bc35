"""Data of the report: every count recomputes from ledger rows, every gap is named."""

from tutelage.records import Decision
from tutelage.studio.gather import gather
from tutelage.studio.page import Caps


def test_counts_recompute_from_the_ledger(story):
    run = story(repeat=3).whole()
    data = gather(run)
    rows = run.ledger.rows
    for bar in data.comparison.bars:
        mine = rows("outcomes", suite="honesty-heldout", version=bar.version, kind=bar.kind)
        assert dict(bar.counts) == {o: n for o in ("correct", "abstained", "asked_back", "wrong")
                                    if (n := sum(r["outcome"] == o for r in mine))}  # fmt: skip
        assert sum(n for _, n in bar.counts) == bar.n == len(mine)
    assert sum(sum(c.values()) for _, c in data.comparison.changes) == data.comparison.total == 36
    for judge in data.judges:
        mine = [v["value"] for v in rows("verdicts", judge=judge.name)]
        assert (judge.given, judge.abstained) == (sum(v is not None for v in mine), mine.count(None))
    losses = dict(data.losses)
    assert losses["verdicts in all"] == len(rows("verdicts")) == 4 * data.cards_total
    assert losses["verdicts in which a judge abstained"] == sum(j.abstained for j in data.judges) > 0
    assert losses["rewards in all"] == len(rows("rewards"))
    # One dead group in each of two rounds.
    assert losses["dead groups (all replies got the same reward)"] == 2
    assert sum(n for _, n in data.target_counts) == len(rows("targets"))
    assert data.heat_total == len(rows("credits"))


def test_what_got_worse_is_never_crowded_out(story):
    data = gather(story(repeat=20).whole(), Caps(pairs=12))
    shown = [p.change for p in data.comparison.shown]
    assert len(shown) == 12
    assert shown.count("worse") >= 3
    assert {p.kind for p in data.comparison.shown} == {"answerable", "unanswerable", "ambiguous"}
    assert data.comparison.total == 240
    few = gather(story(name="few", repeat=2).whole(), Caps(pairs=2))
    assert [p.change for p in few.comparison.shown] == ["worse", "worse"]


def test_disagreement_comes_first_and_units_share_the_cards(story):
    data = gather(story(repeat=20).whole(), Caps(cards=12))
    spreads = [c.spread if c.spread is not None else -1.0 for c in data.cards]
    assert spreads == sorted(spreads, reverse=True)
    assert {c.unit for c in data.cards} == {"supervised", "round-1", "round-2"}
    assert any(c.abstained for c in data.cards)
    assert all(c.recomputes for c in data.cards if c.rewarded)


def test_a_whole_run_has_no_gaps(story):
    data = gather(story().whole())
    assert data.gaps == {}
    assert (data.state, data.comparison.before, data.comparison.after) == ("promoted", "start", "r2")
    assert not data.comparison.stand_in
    assert [d.reason.shown for d in data.decisions] == ["honest replies rose from 8% to 67%"]


def test_a_rejected_candidate_is_still_the_one_compared(story):
    data = gather(story().whole("rejected"))
    assert (data.state, data.decisions[-1].accepted, data.comparison.after) == ("rejected", False, "r2")
    assert dict(data.losses)["candidates that a gate refused"] == 1
    assert ("Version handed over", "start", "") in data.facts


def test_a_run_that_broke_off_shows_the_gate_suite_and_says_so(story):
    made = story()
    made.start()
    made.supervised()
    made.write("round-1", "policy-gradient", "r1", lambda unit: made.outcomes(unit, "honesty-gate", "r1", last=True))
    data = gather(made.run)
    assert data.state == "unfinished"
    assert data.comparison.stand_in
    assert (data.comparison.suite, data.comparison.after) == ("honesty-gate", "r1")
    assert {"measures", "decisions", "credit", "self_view"} <= set(data.gaps)
    assert ("Run time of the finished units", 3 * 41.5, "seconds") in data.facts


def test_before_the_end_the_last_gate_speaks(story):
    made = story()
    made.start()
    evidence = made.evidence()
    made.write("a", "gate", "r1", lambda u: u.decision(Decision("g", "r1", "start", True, "promoted: x", evidence)))
    made.write("b", "gate", "r2", lambda u: u.decision(Decision("g", "r2", "start", False, "rejected: no evidence")))
    data = gather(made.run)
    assert data.measured_by.endswith("(candidate r1)")
    assert len(data.measures) == len(evidence)
    assert data.decisions[1].evidence == ()
    assert data.decisions[1].reason.shown == "no evidence"


def test_a_ledger_without_anything_is_all_gaps(story):
    data = gather(story().run)
    assert set(data.gaps) == {
        "constitution", "measures", "pairs", "curves", "verdicts", "decisions", "targets", "self_view", "credit",
    }  # fmt: skip
    assert all(n == 0 for _, n in data.losses)


def test_a_suite_of_another_name_is_found_by_the_recipe(story, tmp_path):
    made = story(prompts={"heldout": str(tmp_path / "my-suite.jsonl")})

    def fill(unit):
        made.outcomes(unit, "honesty-heldout", "start", last=False)
        made.outcomes(unit, "honesty-heldout", "r1", last=True)
        for version in ("start", "r1"):
            unit.outcome("my-suite", version, "q", "Who?", "answerable", "plain", "Me.", "wrong", "")

    made.write("final", "evaluate", "r1", fill)
    assert (gather(made.run).comparison.suite, gather(made.run).comparison.total) == ("my-suite", 1)


def test_notes_of_a_strange_shape_are_no_data(story):
    made = story()

    def fill(unit):
        unit.note("constitution", ["not", "a", "mapping"])
        unit.note("self_view", {"questions": "none"})
        unit.note("pieces", 7)
        unit.note("failures", "a single line")
        unit.note("critic", {"need_accuracy": "high"})

    made.write("start", "evaluate", "start", fill)
    data = gather(made.run)
    assert {"constitution", "self_view", "credit"} <= set(data.gaps)
    assert [f.shown for f in data.failures] == ["a single line"]
    assert data.critic == ()


def test_smaller_caps_end_somewhere():
    caps, seen = Caps(), 0
    while caps.smaller() != caps:
        caps, seen = caps.smaller(), seen + 1
    assert 5 < seen < 12
    assert min(vars_of(caps)) == max(vars_of(caps)) == 2


def vars_of(caps):
    return [getattr(caps, name) for name in caps.__slots__]
