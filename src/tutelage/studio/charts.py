"""Small charts as inline SVG. Every text is escaped; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

from tutelage.studio.figures import Curve, Measure, ShareBar
from tutelage.studio.wording import outcome_label

__all__ = [
    "difference_chart",
    "level",
    "level_chart",
    "line_chart",
    "nice_ticks",
    "number",
    "percent",
    "points",
    "share_chart",
]

_WIDTH = 400  # of the charts that stand two in a row
_SMALL = 300  # of those that stand three in a row; about their size in pixels, so that letters keep theirs


def number(value: float | None) -> str:
    """A figure in three significant digits with a real minus sign; a dash where it is missing."""
    if value is None:
        return "\u2013"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 6)}f}" if abs(value) >= 1e-4 else f"{value:.1e}"
    return text.replace("-", "\u2212")


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent."""
    return "\u2013" if value is None else f"{value * 100:.{digits}f}".replace("-", "\u2212") + "%"


def level(value: float | None, share: bool = True, digits: int = 1) -> str:
    """A measure before or after: a share in percent, else the number with two digits."""
    if share or value is None:
        return percent(value, digits)
    return f"{round(value, 2) or 0.0:.2f}".replace("-", "\u2212")


def points(value: float | None, share: bool = True) -> str:
    """A difference with its sign: of shares in percentage points, else as it is."""
    if value is None:
        return "\u2013"
    digits = 1 if share else 2
    rounded = round(value * 100 if share else value, digits) or 0.0
    return f"{rounded:{'+' if rounded else ''}.{digits}f}".replace("-", "\u2212")


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that span [low, high], by steps of 1, 2 or 5 times a power of ten."""
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, 1e-12):  # alike, as far as a picture can show
        pad = size * 0.1 if size > 1e-12 else 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 1 - math.floor(math.log10(step)))  # 0.30000000000000004 is no name for a tick
    return [round(i * step, digits) for i in range(first, last + 1)]


def _el(tag: str, content: str | Markup = "", **attributes: object) -> Markup:
    """An element; attribute names write `_` for `-`, and `class_` for class."""
    parts = [
        Markup(' {}="{}"').format(k.rstrip("_").replace("_", "-"), f"{v:.1f}" if isinstance(v, float) else v)
        for k, v in attributes.items()
        if v is not None
    ]
    return Markup("<{}{}>{}</{}>").format(tag, Markup("").join(parts), content, tag)


def _svg(width: int, height: int, label: str, parts: Sequence[Markup]) -> Markup:
    """A picture with its text alternative; the data stand in a table beside it."""
    box, inner = f"0 0 {width} {height}", Markup("").join(parts)
    return _el("svg", inner, class_="chart", viewBox=box, role="img", aria_label=label)


def _text(x: float, y: float, text: object, class_: str = "tick", anchor: str = "middle") -> Markup:
    return _el("text", escape(text), x=x, y=y, class_=class_, text_anchor=anchor)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return _el("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


# ---------------------------------------------------------------- before, after and their difference

_ROW, _TOP = 46, 8


def level_chart(rows: Sequence[Measure]) -> Markup:
    """Before (ring) and after (disc) of each measure on a scale from 0 to 100%."""
    left, right, bottom = 12.0, _WIDTH - 16.0, _TOP + _ROW * len(rows)

    def place(share: float) -> float:
        return left + (right - left) * min(max(share, 0.0), 1.0)

    parts = [_line(place(t), _TOP + 16, place(t), bottom, "grid") for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    parts += [_text(place(t), bottom + 15, f"{t:.0%}") for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    parts.append(_text((left + right) / 2, bottom + 31, "share of questions", "axis"))
    spoken = []
    for i, row in enumerate(rows):
        y = _TOP + _ROW * i + 30.0
        parts.append(_text(left, y - 16, row.label, "rowname", "start"))
        parts.append(_line(left, y, right, y, "track"))
        if row.before is not None and row.after is not None:
            parts.append(_line(place(row.before), y, place(row.after), y, f"link {_class(row)}"))
        if row.before is not None:
            parts.append(_el("circle", cx=place(row.before), cy=y, r=5, class_="before"))
        if row.after is not None:
            parts.append(_el("circle", cx=place(row.after), cy=y, r=5.5, class_=f"after {_class(row)}"))
        spoken.append(f"{row.label}: {percent(row.before)} before, {percent(row.after)} after")
    return _svg(_WIDTH, int(bottom) + 38, "Before and after. " + "; ".join(spoken), parts)


def difference_chart(rows: Sequence[Measure]) -> Markup:
    """After minus before of each measure with its interval, around zero.

    The rows share an axis: either all are shares, in percentage points, or none is.
    """
    share = all(row.share for row in rows)
    unit = 100.0 if share else 1.0
    known = [v for r in rows for v in (r.low, r.high, r.difference) if v is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    pad = 0.06 * (high - low) or 0.05
    low, high = low - pad, high + pad
    ticks = [round(t * unit, 6) for t in nice_ticks(low, high, 5) if low <= t <= high]
    left, right, bottom = 12.0, _WIDTH - 12.0, _TOP + _ROW * len(rows)

    def place(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    parts = []
    for t in ticks:
        parts.append(_line(place(t / unit), _TOP + 16, place(t / unit), bottom, "zero" if t == 0 else "grid"))
        parts.append(_text(place(t / unit), bottom + 15, f"{t:+g}".replace("-", "\u2212") if t else "0"))
    axis = "after \u2212 before" + (", percentage points" if share else "")
    parts.append(_text((left + right) / 2, bottom + 31, axis, "axis"))
    spoken = []
    for i, row in enumerate(rows):
        y, kind = _TOP + _ROW * i + 30.0, _class(row)
        parts.append(_text(left, y - 16, row.label, "rowname", "start"))
        if row.low is not None and row.high is not None:
            parts.append(_line(place(row.low), y, place(row.high), y, f"interval {kind}"))
            parts += [_line(place(end), y - 5, place(end), y + 5, f"interval {kind}") for end in (row.low, row.high)]
        if row.difference is not None:
            parts.append(_mark(place(row.difference), y, kind))
        said, least, most = (points(v, share) for v in (row.difference, row.low, row.high))
        spoken.append(f"{row.label}: {said}, 95% from {least} to {most}")
    title = "Differences in percentage points. " if share else "Differences. "
    return _svg(_WIDTH, int(bottom) + 38, title + "; ".join(spoken), parts)


def _class(row: Measure) -> str:
    return row.reading if row.reading in ("better", "worse") else "unclear"


def _mark(x: float, y: float, kind: str) -> Markup:
    """The shape tells what the colour tells: disc better, diamond worse, ring unclear."""
    if kind == "worse":
        return _el("path", d=f"M{x:.1f} {y - 6.5:.1f}l6.5 6.5-6.5 6.5-6.5-6.5z", class_="mark worse")
    return _el("circle", cx=x, cy=y, r=5, class_=f"mark {kind}")


# ---------------------------------------------------------------- lines over a run

_PLOT_LEFT, _PLOT_RIGHT, _PLOT_TOP, _PLOT_BOTTOM, _PLOT_HEIGHT = 40.0, 294.0, 24.0, 150.0, 188


def line_chart(curve: Curve) -> Markup:
    """One or several lines with axes; gaps where a value is missing."""
    known = [v for s in curve.series for v in s.values if v is not None]
    known += [curve.limit] if curve.limit is not None else []
    low, high = (0.0, max([*known, 0.2])) if curve.share else (min(known), max(known))
    low = min(low, 0.0)  # a scale that starts above zero makes small changes look large
    ticks = nice_ticks(low, high)
    count = len(curve.ticks)

    def x(i: int) -> float:
        span = _PLOT_RIGHT - _PLOT_LEFT - 16
        return _PLOT_LEFT + 8 + (span * i / (count - 1) if count > 1 else span / 2)

    def y(value: float) -> float:
        return _PLOT_BOTTOM - (_PLOT_BOTTOM - _PLOT_TOP) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = [_text(4, 13, curve.y_title, "axis", "start")]
    for t in ticks:
        parts.append(_line(_PLOT_LEFT, y(t), _PLOT_RIGHT, y(t), "grid"))
        parts.append(_text(_PLOT_LEFT - 6, y(t) + 4, percent(t, 0) if curve.share else _short(t), "tick", "end"))
    parts += _x_axis(curve, x)
    show = percent if curve.share else number
    spoken = []
    for i, series in enumerate(curve.series):
        parts += _polyline(series.values, x, y, i + 1)
        given = [v for v in series.values if v is not None]
        spoken.append(f"{series.name} from {show(given[0])} to {show(given[-1])}")
    if curve.limit is not None:
        parts.append(_line(_PLOT_LEFT, y(curve.limit), _PLOT_RIGHT, y(curve.limit), "limit"))
        shown = percent(curve.limit, 0) if curve.share else _short(curve.limit)
        parts.append(_text(_PLOT_LEFT + 4, y(curve.limit) + 12, f"limit {shown}", "tick", "start"))
        spoken.append(f"limit {shown}")
    return _svg(
        _SMALL,
        _PLOT_HEIGHT,
        f"{curve.title} over {count} points by {curve.x_title}: " + "; ".join(spoken),
        parts,
    )


def _short(value: float) -> str:
    text = f"{value:.6g}" if abs(value) < 1e5 else f"{value:.1e}"
    return text.replace("-", "\u2212")


def _x_axis(curve: Curve, x: Callable[[int], float]) -> list[Markup]:
    """Names of a few points; thin lines where a new unit of work begins."""
    count = len(curve.ticks)
    parts = [_line(_PLOT_LEFT, _PLOT_BOTTOM, _PLOT_RIGHT, _PLOT_BOTTOM, "base")]
    longest = max(len(t) for t in curve.ticks)
    room = max(2, min(count, 7, int((_PLOT_RIGHT - _PLOT_LEFT) / (7 * min(longest, 12) + 14))))
    wanted = range(0, count, max(1, -(-(count - 1) // (room - 1))))
    for i in wanted:
        parts.append(_text(x(i), _PLOT_BOTTOM + 15, curve.ticks[i][:12]))
    starts = [i for i in range(1, count) if curve.units[i] != curve.units[i - 1]]
    if len(starts) < count - 1 and len(starts) <= 12:
        parts += [_line((x(i) + x(i - 1)) / 2, _PLOT_TOP, (x(i) + x(i - 1)) / 2, _PLOT_BOTTOM, "cut") for i in starts]
    parts.append(_text((_PLOT_LEFT + _PLOT_RIGHT) / 2, _PLOT_BOTTOM + 32, curve.x_title, "axis"))
    return parts


def _polyline(
    values: Sequence[float | None], x: Callable[[int], float], y: Callable[[float], float], place: int
) -> list[Markup]:
    """A line broken at gaps, with dots where there are few points or a point stands alone."""
    parts, path, dots = [], "", []
    for i, value in enumerate(values):
        if value is None:
            continue
        before = i > 0 and values[i - 1] is not None
        after = i + 1 < len(values) and values[i + 1] is not None
        path += f"{'L' if before else 'M'}{x(i):.1f} {y(value):.1f}"
        if len(values) <= 24 or not (before or after):
            dots.append(_el("circle", cx=x(i), cy=y(value), r=2.8, class_=f"dot s{place}"))
    parts.append(_el("path", d=path, class_=f"line s{place}"))
    return parts + dots


# ---------------------------------------------------------------- shares of outcomes


def share_chart(bars: Sequence[ShareBar]) -> Markup:
    """Stacked bars, one a version, whose parts add up to all replies to one kind of question."""
    left, right, row = 48.0, _SMALL - 4.0, 32
    parts, spoken = [], []
    for i, bar in enumerate(bars):
        y, at = 4.0 + row * i, left
        parts.append(_text(left - 8, y + 18, bar.role, "rowname", "end"))
        if not bar.n:
            parts.append(_text(left, y + 18, "no data", "tick", "start"))
        for outcome, count in bar.counts:
            width = (right - left) * count / bar.n
            label = f"{outcome_label(bar.kind, outcome)}: {count} of {bar.n} ({percent(count / bar.n)})"
            known = outcome if outcome in ("correct", "abstained", "asked_back", "wrong") else "other"
            parts.append(
                _el(
                    "rect",
                    _el("title", label),
                    x=at,
                    y=y,
                    width=max(width - 1.0, 0.5),
                    height=26,
                    class_=f"part {known}",
                )
            )
            if width > 34:
                parts.append(_text(at + width / 2, y + 17.5, f"{count / bar.n:.0%}", f"inside {known}"))
            at += width
            spoken.append(f"{bar.role}, {label}")
    bottom = 4 + row * len(bars) - 4
    for t, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        parts.append(_text(left + (right - left) * t, bottom + 13, f"{t:.0%}", "tick", anchor))
    return _svg(_SMALL, bottom + 18, "Shares of outcomes. " + "; ".join(spoken), parts)
