"""The report of a run: one offline HTML page that shows what was taught, what it did, and why."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from tutelage.store.runs import Run, write_atomic
from tutelage.studio import charts, wording
from tutelage.studio.gather import gather
from tutelage.studio.page import Caps, ReportData

__all__ = ["SIZE_LIMIT", "render", "write_report"]

SIZE_LIMIT = 1_000_000  # bytes

# Control characters (but tab and line breaks) and lone surrogates have no place in HTML.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def write_report(run: Run) -> Path:
    """Write `report.html` into the run's folder; a page above the size limit shows fewer samples.

    Raises:
        StoreError: The ledger cannot be read, or the folder cannot be written.
    """
    caps = Caps()
    page = render(gather(run, caps))
    while len(page.encode("utf-8")) >= SIZE_LIMIT and caps.smaller() != caps:
        caps = caps.smaller()
        page = render(gather(run, caps))
    path = run.folder / "report.html"
    write_atomic(path, page)
    return path


def render(data: ReportData) -> str:
    """The page. Everything that people or models wrote is escaped; the page loads nothing."""
    page = _environment().get_template("report.html.j2").render(data=data)
    return _UNPRINTABLE.sub("\ufffd", page)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tutelage.studio", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(
        words=wording,
        level_chart=charts.level_chart,
        difference_chart=charts.difference_chart,
        line_chart=charts.line_chart,
        share_chart=charts.share_chart,
    )
    environment.filters.update(
        number=charts.number,
        percent=charts.percent,
        level=charts.level,
        points=charts.points,
        plain=wording.plain,
        duration=_duration,
        size=_size,
    )
    return environment


def _duration(seconds: float) -> str:
    """Seconds as people say them."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"


def _size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
