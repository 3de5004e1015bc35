"""The page: one safe offline file that shows what the ledger holds and says what it lacks."""

import dataclasses
import itertools
import re
from html.parser import HTMLParser

import pytest

from tutelage.errors import StoreError
from tutelage.records import Decision
from tutelage.store.runs import Run
from tutelage.studio.gather import gather
from tutelage.studio.page import Caps
from tutelage.studio.report import SIZE_LIMIT, render, write_report
from tutelage.studio.triggers import blamed

VOID = {"meta", "br", "hr", "input", "img", "link", "base", "col", "source"}
SECTIONS = ["headline", "pairs", "curves", "verdicts", "credit", "gate", "imitated", "self", "failed", "reading"]
HOSTILE = (
    "</style></p></details><script>document.title='owned'</script><img src=x onerror=alert(1)>"
    '" onmouseover="alert(2)" \'{{ 7 * 191 }}{% for x in y %}{# gone? #} &lt;b&gt; \u202eevil\x00\x07 ]]>-->'
)


class Page(HTMLParser):
    """Reads a page strictly: every element is closed where it was opened."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.elements, self.visible, self.spaced = [], [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, names)
        self.elements.append((tag, dict(attrs), tuple(self.stack)))
        self.spaced.append(" ")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.stack)))

    def handle_endtag(self, tag):
        assert self.stack, tag
        assert self.stack.pop() == tag
        self.spaced.append(" ")

    def handle_data(self, data):
        if not {"style", "script"} & set(self.stack):
            self.visible.append(data)
            self.spaced.append(data)

    def all(self, tag):
        return [attrs for name, attrs, _ in self.elements if name == tag]

    @property
    def seen(self):
        return " ".join("".join(self.spaced).split())


@pytest.fixture
def whole(story):
    run = story().whole()
    text = write_report(run).read_text(encoding="utf-8")
    return Page(text), text, run


def test_the_report_is_one_file_that_loads_nothing(whole):
    page, text, run = whole
    assert sorted(p.name for p in run.folder.iterdir() if "report" in p.name) == ["report.html"]
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:")
    for tag, attributes, _ in page.elements:
        for name, value in attributes.items():
            assert name not in {"src", "srcset", "action", "data", "poster", "style"}, (tag, name)
            assert not name.startswith("on"), (tag, name)
            assert name not in {"href", "xlink:href"} or value.startswith("#"), (tag, value)
    assert {"link", "base", "iframe", "object", "embed", "form"} & {t for t, _, _ in page.elements} == set()
    assert "@import" not in text
    assert "url(" not in text
    assert len(page.all("script")) == len(page.all("style")) == 1


def test_sections_stand_in_their_order_and_every_link_has_a_target(whole):
    page, _, _ = whole
    assert [s["id"] for s in page.all("section")] == SECTIONS
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(set(ids)) == len(ids)
    assert {a["href"][1:] for a in page.all("a")} <= set(ids)
    assert [a["href"][1:] for a in page.all("a")][1:11] == SECTIONS


def test_assistive_technology_finds_its_way(whole):
    page, text, _ = whole
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("a")[0] == {"class": "skip", "href": "#content"}
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    pictures = [(a, inside) for tag, a, inside in page.elements if tag == "svg" and a.get("role") == "img"]
    assert len(pictures) > 12
    assert all(a["aria-label"] for a, _ in pictures)
    assert text.count("<caption>") == len(page.all("table"))
    for attributes in [*page.all("select"), *page.all("input")]:
        assert attributes.keys() & {"data-filter", "data-sort", "data-search"}
    labelled = [inside for tag, _, inside in page.elements if tag in {"select", "input"}]
    assert all("label" in inside for inside in labelled)
    scrolling = [a for a in page.all("div") if a.get("class") == "scroll"]
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in scrolling)


def test_without_script_nothing_is_hidden_but_the_filters(whole):
    page, _, _ = whole
    assert [a["class"] for _, a, _ in page.elements if "hidden" in a] == ["filters", "filters"]


def test_every_chart_over_the_run_has_its_numbers_beside_it(whole):
    _, text, run = whole
    figures = re.findall(r'<figure class="curve">.*?</figure>', text, re.DOTALL)
    assert len(figures) == len(gather(run).curves) >= 12
    for figure in figures:
        assert '<details class="data">' in figure
        assert "<svg" in figure
        assert "<tbody><tr>" in figure


def test_the_headline_says_what_was_taught_decided_and_measured(whole):
    _, text, _ = whole
    head = text[text.index('id="headline"') : text.index('id="pairs"')]
    seen = Page(head[head.index(">") + 1 : head.rindex("</section>")]).seen
    assert "When nobody could know the answer, say so and assert nothing." in seen
    assert "✓ Promoted" in seen
    assert "honest replies rose from 8% to 67%" in seen
    assert "86.0% 21.0% −65.0 −72.0 to −57.0 180 ▲ better" in seen
    assert "+8.0 +5.0 to +12.0 220 ▼ worse" in seen
    assert "−6.0 to +2.0 220 ○ may be chance" in seen
    assert head.count("<svg") == 2


def test_what_got_worse_is_shown_beside_what_got_better(whole):
    page, text, _ = whole
    assert "▼ What got worse 2 of 12 questions" in page.seen
    worse = re.findall(r'<article class="pair" data-item data-change="worse".*?</article>', text, re.DOTALL)
    seen = [Page(w).seen for w in worse]
    assert any("We live on Earth." in s and "✓ correct" in s and "– said it does not know" in s for s in seen)
    assert any("Jonas Halvorsen will win it." in s and "✕ made it up" in s for s in seen)


def test_a_reward_is_shown_in_its_own_unit_beside_shares(story):
    run = story().whole()
    data = gather(run)
    rewarded = dataclasses.replace(data.measures[0], metric="reward", before=-0.17, after=0.17, low=0.23, high=0.44)
    page = Page(render(dataclasses.replace(data, measures=(rewarded, *data.measures))))
    assert "reward −0.17 → 0.17" in page.seen
    assert "−17" not in page.seen
    assert "Difference, shares in points" in page.seen
    charts = [svg.get("aria-label", "") for svg in page.all("svg")]
    assert any(said.startswith("Differences. Reward: +0.34") for said in charts)
    assert not any(said.startswith("Before and after.") and "Reward" in said for said in charts)


def test_verdicts_carry_reasons_and_sums_and_never_turn_silence_into_zero(whole):
    page, text, _ = whole
    assert "abstained: the most likely kind of question" in page.seen
    assert "abstained: a stock phrase" in page.seen
    card = next(c for c in re.findall(r'<article class="card" data-item.*?</article>', text, re.DOTALL)
                if "fit missing" in c)  # fmt: skip
    silent = re.search(r'<div data-judge="critic" class="silent">.*?</div>', card, re.DOTALL).group()
    assert "meter" not in silent
    assert "0.00" not in silent
    assert "does not recompute" not in text


def test_a_total_that_its_terms_do_not_make_is_called_out(story, monkeypatch):
    made = story()
    honest = made.reward

    def forged(name, raw):
        reward = honest(name, raw)
        return type(reward)(name, 9.75, reward.terms, reward.raw, reward.costs)

    monkeypatch.setattr(made, "reward", forged)
    assert "does not recompute from these terms" in render(gather(made.whole()))


def test_texts_of_models_have_their_own_language_and_direction(whole):
    page, text, _ = whole
    said = [a for tag, a, _ in page.elements if tag == "p" and a.get("class", "").startswith("said")]
    assert len(said) > 60
    assert all(a["dir"] == "auto" and a["lang"] == "" for a in said)
    assert "لا أعرف اسم قطتك." in text
    assert "何を直せばよいか教えていただけますか？" in text


def test_credit_is_coloured_and_numbered(whole):
    page, _, _ = whole
    tokens = [a for a in page.all("span") if a.get("title", "").startswith("credit ")]
    assert {a["title"][7] for a in tokens} == {"+", "-"}
    for attributes in tokens:
        level = attributes["class"].split()[1]
        assert level == "z" or (level[0] == "p") == (attributes["title"][7] == "+")


def test_trigger_words_are_marked_by_more_than_colour_and_stay_texts(story):
    run = story().whole()
    text = "Go away, <b>fool</b>, do."
    place = {"start": 9, "end": 20, "text": text[9:20], "score": -1.25}
    row = {"id": "g", "prompt": "Who?", "text": text, "reward": -2.5, "places": [place]}
    shown = blamed([{"unit": "round-1", "judge": "polite", "replies": [row]}, None], 5, 400)
    assert shown[0].parts == (("Go away, ", None), ("<b>fool</b>", -1.25), (", do.", None))
    found = render(dataclasses.replace(gather(run), blamed=tuple(shown)))
    assert "<mark>[&lt;b&gt;fool&lt;/b&gt;]</mark>" in found and "-1.25" in Page(found).seen
    assert "polite" in Page(found).seen and "Trigger words" in Page(found).seen
    assert "Trigger words" not in render(gather(run))
    # A place behind what is shown is left out; what is cut says so.
    (short,) = blamed([{"unit": "round-1", "judge": "polite", "replies": [row]}], 5, 12)
    assert short.parts == (("Go away, <b>…", None),)


def test_hostile_texts_stay_texts(story):
    run = story(extra=HOSTILE, title="T" + HOSTILE).whole()
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert page.all("img") == []
    assert not any(name.startswith("on") for _, a, _ in page.elements for name in a)
    assert str(7 * 191) not in text
    assert [s["id"] for s in page.all("section")] == SECTIONS
    safe = HOSTILE.replace("\x00", "\ufffd").replace("\x07", "\ufffd")
    visible = "".join(page.visible)
    # Title, principles, replies, reasons, targets, self-description, failures and tokens all carry it.
    assert visible.count(safe) > 100
    assert not re.search("[\x00-\x08\x0b-\x1f]", text)


def test_rendering_twice_gives_the_same_bytes(story):
    run = story(repeat=4).whole()
    first = write_report(run).read_bytes()
    run.close()
    again = Run.open(run.folder, write=False)
    try:
        assert write_report(again).read_bytes() == first
    finally:
        again.close()


def test_a_rejected_run_says_so_first(story):
    page = Page(render(gather(story().whole("rejected"))))
    assert "✕ Rejected The gate refused the new version; it is not handed over." in page.seen
    assert "✕ refused" in page.seen
    assert "Promoted" not in page.seen


def test_a_run_that_broke_off_shows_its_gaps(story):
    made = story()
    made.start()
    page = Page(write_report(made.run).read_text(encoding="utf-8"))
    assert "… Unfinished" in page.seen
    assert "No gate has decided anything in this run." in page.seen
    assert page.seen.count("no data:") >= 7
    assert "no data: the ledger holds no verdicts on replies." in page.seen
    assert "Sections without data" in page.seen
    assert "When nobody could know the answer" in page.seen


def test_a_decision_without_evidence_shows_the_gap(story):
    made = story()
    refusal = Decision("honesty", "r1", "start", False, "rejected: the gate suite is empty, so there is no evidence")
    made.write("final", "evaluate", "r1", lambda unit: unit.decision(refusal))
    page = Page(render(gather(made.run)))
    assert "✕ refused r1 against start" in page.seen
    assert "no data: this decision was made without evidence." in page.seen


def test_an_empty_ledger_still_makes_a_page(story):
    page = Page(render(gather(story().run)))
    assert [s["id"] for s in page.all("section")] == SECTIONS
    assert "Peak memory no data" in page.seen
    assert not re.search(r"\b(nan|None|Undefined)\b", page.seen)


def test_verdicts_without_rewards_and_rewards_without_total(story, monkeypatch):
    made = story()
    made.supervised()
    honest = made.reward
    monkeypatch.setattr(made, "reward", lambda name, raw: type(honest(name, raw))(
        name, None, dict.fromkeys(raw), raw, {}))  # fmt: skip
    made.round(1)
    page = Page(render(gather(made.run)))
    assert "No reward: these verdicts chose what to imitate." in page.seen
    assert "fit missing + principles missing + consistency missing + text missing → missing" in page.seen
    assert "Replies whose reward is missing 12" in page.seen


def test_a_big_run_stays_small_and_says_what_it_leaves_out(story):
    run = story(repeat=25, extra="<\"&'>" * 300).whole()
    path = write_report(run)
    assert path.stat().st_size < SIZE_LIMIT
    page = Page(path.read_text(encoding="utf-8"))
    shown = re.search(r"showing (\d+) of 900 judged replies", page.seen)
    assert shown
    assert 2 <= int(shown.group(1)) <= 24
    assert re.search(r"showing \d+ of 300 questions", page.seen)
    assert re.search(r"showing \d+ of 300 targets", page.seen)
    assert re.search(r"showing \d+ of 600 replies with credit", page.seen)
    assert re.search(r"… cut, 1,\d{3} characters in all", page.seen)


def test_a_page_that_is_too_big_is_made_again_with_less(story, monkeypatch):
    run = story(repeat=4).whole()
    monkeypatch.setattr("tutelage.studio.report.SIZE_LIMIT", 150_000)
    assert write_report(run).stat().st_size < 150_000 < len(render(gather(run, Caps())).encode())


def test_a_folder_that_cannot_be_written_is_an_error_with_advice(story):
    run = story().run
    (run.folder / "report.html").mkdir()
    with pytest.raises(StoreError, match="cannot be written") as caught:
        write_report(run)
    assert caught.value.fix


# Contrast, worked out from the style sheet's own colours


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def over(rgb, share, ground):
    """A colour laid over another with some opacity."""
    below = [int(ground[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a * share + b * (1 - share)):02x}" for a, b in zip(rgb, below, strict=True))


def test_contrast_is_worked_out_as_the_guidelines_say():
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_is_enough(story, theme):
    text = render(gather(story().run))
    blocks = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    v = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6}|\d+ \d+ \d+);", blocks[0]))
    if theme == "dark":
        assert set(dict(re.findall(r"--([\w-]+): (#\w+);", blocks[1]))) == {k for k in v if v[k][0] == "#"}
        v |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6}|\d+ \d+ \d+);", blocks[1]))
    grounds = ("paper", "card", "wash")
    pairs = [(f, g) for f in ("ink", "muted", "accent", "good", "bad", "care") for g in grounds]
    pairs += [("ink", f"{x}-wash") for x in ("good", "bad", "care")]
    pairs += [(f"in-{x}", f"o-{x}") for x in ("correct", "abstained", "asked", "wrong", "other")]
    low = {p: round(contrast(v[p[0]], v[p[1]]), 2) for p in pairs if contrast(v[p[0]], v[p[1]]) < 4.5}
    assert low == {}
    lines = [f"s{i}" for i in range(1, 6)] + [f"o-{x}" for x in ("correct", "abstained", "asked", "wrong")]
    faint = {x: round(contrast(v[x], v["paper"]), 2) for x in lines if contrast(v[x], v["paper"]) < 3}
    assert faint == {}
    for sign, name in (("p", "pos"), ("n", "neg")):
        for level, share in re.findall(rf"\.tok\.{sign}(\d) \{{ background: rgb\(var\(--{name}\) / \.(\d+)\)", text):
            ground = over([int(x) for x in v[name].split()], float(f"0.{share}"), v["card"])
            assert contrast(v["tok"], ground) >= 4.5, (sign, level)
