"""The page in a real browser: filters work, both themes and widths draw, hostile texts do nothing."""

import json
import re
import shutil
import struct
import subprocess
import zlib

import pytest

from tutelage.studio.report import write_report

BROWSER = shutil.which("chromium")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="Debian's chromium is not installed")

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-default-apps", "--disable-extensions", "--hide-scrollbars",
]  # fmt: skip


def browse(folder, *arguments):
    """What the browser prints. Its own profile, so that no other browser is disturbed."""
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


ROWS = 240  # of a picture are decoded: enough to see a page, and quick without a library


def pixels(path):
    """(width, height, first rows, bytes a pixel) of a PNG with 8 bits a channel."""
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    at, data, width, height, kind = 8, b"", 0, 0, 0
    while at < len(raw):
        size, name = struct.unpack(">I4s", raw[at : at + 8])
        body = raw[at + 8 : at + 8 + size]
        if name == b"IHDR":
            width, height, depth, kind = struct.unpack(">IIBB", body[:10])
            assert (depth, kind in (2, 6)) == (8, True)
        data += body if name == b"IDAT" else b""
        at += 12 + size
    step = 4 if kind == 6 else 3
    flat, rows, before = zlib.decompress(data), [], bytearray(width * step)
    for y in range(min(height, ROWS)):
        start = y * (width * step + 1)
        before = unfiltered(flat[start], bytearray(flat[start + 1 : start + 1 + width * step]), before, step)
        rows.append(before)
    return width, height, rows, step


def unfiltered(kind, line, above, step):
    """One row of a PNG with its filter undone (the five filters of the specification)."""
    for i in range(len(line)):
        left, up = line[i - step] if i >= step else 0, above[i]
        corner = above[i - step] if i >= step else 0
        guess = left + up - corner
        near = min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))[2]
        line[i] = (line[i] + (0, left, up, (left + up) // 2, near)[kind]) & 255
    return line


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


@pytest.fixture
def report(story):
    return write_report(story(repeat=2).whole())


def test_filters_appear_and_count(report, profile):
    dom, errors = browse(profile, "--dump-dom", report.as_uri())
    assert "Refused to" not in errors
    assert "Uncaught" not in errors
    assert not re.search(r'class="filters"[^>]* hidden', dom)
    counts = re.findall(r'<output aria-live="polite">([^<]+)</output>', dom)
    assert counts == ["24 of 24", "24 of 24"]


CLICKS = """<script>
  const [pairs, cards] = document.querySelectorAll(".filters");
  function set(bar, name, value) {
    const field = bar.querySelector(name);
    field.value = value;
    field.dispatchEvent(new Event("input", {bubbles: true}));
    field.dispatchEvent(new Event("change", {bubbles: true}));
  }
  const items = s => [...document.querySelectorAll(s + " [data-item]")];
  const seen = list => list.filter(e => e.offsetHeight > 0);
  set(pairs, '[data-filter="change"]', "worse");
  set(cards, '[data-sort]', "total-up");
  const totals = items("#card-list").map(e => e.dataset.total);
  set(cards, '[data-filter="judges"]', "critic");
  set(cards, '[data-filter="abstained"]', "yes");
  const left = seen(items("#card-list"));
  const result = {
    pairs: seen(items("#pair-list")).map(e => e.dataset.change),
    totals: totals,
    silent: left.map(e => e.dataset.silent.split("|")),
    rows: left.map(e => seen([...e.querySelectorAll("[data-judge]")]).map(r => r.dataset.judge)),
    said: [...document.querySelectorAll("output")].map(o => o.textContent),
  };
  set(cards, "[data-search]", "no reply says this");
  result.none = seen(items("#card-list")).length;
  document.body.replaceChildren(JSON.stringify(result));
</script></body>"""


def test_filters_hide_sort_and_search(report, profile):
    # The page cannot be driven from outside, so a copy plays its own user.
    text = report.read_text(encoding="utf-8")
    report.write_text(text.replace("</body>", CLICKS), encoding="utf-8")
    dom, _ = browse(profile, "--dump-dom", report.as_uri())
    found = json.loads(re.search(r"<body>(.*)</body>", dom, re.DOTALL).group(1))
    assert found["pairs"] == ["worse"] * 4
    assert found["silent"]
    assert all("critic" in silent for silent in found["silent"])
    assert all(rows == ["critic"] for rows in found["rows"])
    assert found["said"] == ["4 of 24", f"{len(found['silent'])} of 24"]
    assert found["none"] == 0
    totals = [float(t) for t in found["totals"] if t]
    assert totals == sorted(totals)
    # Replies without a reward stand last, not among the zeros.
    assert found["totals"][len(totals) :] == [""] * (24 - len(totals))
    assert 0 < len(totals) < 24


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (500, False), (500, True)])
def test_the_page_draws(report, profile, tmp_path, width, dark):
    shot = tmp_path / "shot.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    browse(profile, *scheme, f"--window-size={width},900", f"--screenshot={shot}", report.as_uri())
    drawn, height, rows, step = pixels(shot)
    assert (drawn, height) == (width, 900)
    corner = rows[2][2 * step : 2 * step + 3]
    assert (sum(corner) < 120) == dark
    dots = [bytes(row[i * step : i * step + 3]) for row in rows for i in range(width)]
    assert len(set(dots)) > 30
    assert sum(dot != bytes(corner) for dot in dots) > 0.02 * len(dots)


def test_nothing_is_wider_than_a_narrow_window(report, profile):
    probe = "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script></body>"
    report.write_text(report.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    dom, _ = browse(profile, "--dump-dom", "--window-size=500,900", report.as_uri())
    wide, window = re.search(r"<title>(\d+) (\d+)</title>", dom).groups()
    assert int(wide) <= int(window)


def test_hostile_texts_do_nothing_in_a_browser(story, profile):
    evil = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    dom, _ = browse(profile, "--dump-dom", write_report(story(extra=evil).whole()).as_uri())
    assert "<title>honest: report of a run</title>" in dom
    assert dom.count("<script>") == 1
    assert "<img" not in dom
