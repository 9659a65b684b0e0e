"""Small charts as inline SVG: no scripts, no requests; colours come from the page's style sheet by class."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 460, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 24, 24, 36
MOST_POINTS = 250
SMOOTHED_OVER = 7

Points = Sequence[tuple[float, float | None]]
Place = Callable[[float, float], tuple[float, float]]  # (x, y) of the data -> of the drawing


@dataclass(frozen=True)
class Series:
    """One line: (x, y) points, y None where nothing is known; `css` is its colour, `name` its tooltip.

    Attributes:
        band: (low, high) at each point, drawn faintly behind the line; or nothing.
    """

    name: str
    points: Points
    css: str = "a"
    band: Sequence[tuple[float, float]] = ()


def line_chart(
    series: Sequence[Series],
    *,
    unit: str,
    x_label: str = "programs executed",
    smooth: bool = False,
    low: float | None = None,
    high: float | None = None,
    bound: float | None = None,
) -> str:
    """An SVG line chart.

    Args:
        series: lines over one x axis; at least one known point in all.
        unit: of the y axis, written above it.
        smooth: draw the points faintly and their running mean strongly.
        low, high: the y axis reaches at least from `low` to `high`.
        bound: a dashed level line.
    """
    series = [replace(s, points=s.points if s.band else thin_out(s.points)) for s in series]
    known = [(x, y) for s in series for x, y in s.points if y is not None]
    xs, ys = [x for x, _ in known], [y for _, y in known]
    ys += [edge for s in series for pair in s.band for edge in pair]
    ys += [y for y in (low, high, bound) if y is not None]
    x_ticks, y_ticks = ticks(0.0, max(xs)), ticks(min(ys), max(ys))
    x_range, y_range = (0.0, max(xs)), (y_ticks[0], y_ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (
            (x - x_range[0]) / (x_range[1] - x_range[0]),
            (y - y_range[0]) / (y_range[1] - y_range[0]),
        )
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    body = [_axes(x_ticks, y_ticks, at, unit, x_label)]
    if bound is not None:
        (x0, y0), (x1, _) = at(0.0, bound), at(x_range[1], bound)
        body.append(f'<line class="bound" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y0:.1f}"/>')
    body += [_band(one, at) for one in series if one.band]
    for one in series:
        is_smoothed = smooth and sum(y is not None for _, y in one.points) > SMOOTHED_OVER
        body += _polylines(one.points, at, f"line {one.css}" + (" faint" if is_smoothed else ""))
        if is_smoothed:
            body += _polylines(running_mean(one.points), at, f"line {one.css}")
        body += _dots(one, at)
    label = ", ".join(s.name for s in series)
    return _svg(body, label)


def stacked_bars(
    bins: Sequence[tuple[str, dict[str, float]]], kinds: dict[str, str], x_label: str, label: str
) -> str:
    """An SVG chart of shares: one bar a bin, its parts stacked in the order of `kinds`.

    Args:
        bins: (label under the bar, share of each kind); shares of a bin sum to 1 or less.
        kinds: every kind, from the bottom up, with the class that colours it.
        label: what the chart shows, for who does not see it.
    """
    y_ticks = ticks(0.0, max(sum(shares.values()) for _, shares in bins))

    def at(x: float, y: float) -> tuple[float, float]:
        up = y / y_ticks[-1]
        return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    body = [_axes([], y_ticks, at, "%", x_label)]
    width = 1.0 / len(bins)
    for index, (under, shares) in enumerate(bins):
        bottom = 0.0
        for kind, css in kinds.items():
            share = shares.get(kind, 0.0)
            if share > 0:
                left, top = at((index + 0.08) * width, bottom + share)
                right, base = at((index + 0.92) * width, bottom)
                body.append(
                    f'<rect class="{css}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
                    f'height="{base - top:.1f}"><title>{escape(under)}: {escape(kind)} {share:.0%}</title>'
                    "</rect>"
                )
            bottom += share
        x, y = at((index + 0.5) * width, 0.0)
        body.append(
            f'<text class="tick" x="{x:.1f}" y="{y + 14:.1f}" text-anchor="middle">{escape(under)}</text>'
        )
    return _svg(body, label)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at or below `low` to at or above `high`."""
    if not high > low:
        pad = abs(low) * 0.1 or 0.5
        low, high = (low - pad, high + pad) if low else (0.0, 1.0)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    decimals = 2 - math.floor(math.log10(step))
    slack = 1e-3  # of a step: too little to be seen, and −1e-9 in a KL of zero is no reason for one more tick
    first, last = math.floor(low / step + slack), math.ceil(high / step - slack)
    return [round(i * step, decimals) for i in range(first, last + 1)]


def number(value: float, step: float) -> str:
    """A tick's text: as many digits as the ticks' distance needs; thousands with a comma."""
    if value != 0 and (abs(value) >= 1e6 or step < 1e-4):
        digits = 1 + math.ceil(math.log10(max(1.0, abs(value) / step)))
        return f"{value:.{max(3, digits)}g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}".replace("-", "−")


def thin_out(points: Points) -> list[tuple[float, float | None]]:
    """At most `MOST_POINTS` points: means of neighbours, each at its last x."""
    per_bin = -(-len(points) // MOST_POINTS)
    if per_bin <= 1:
        return list(points)
    thin: list[tuple[float, float | None]] = []
    for start in range(0, len(points), per_bin):
        group = points[start : start + per_bin]
        values = [y for _, y in group if y is not None]
        thin.append((group[-1][0], sum(values) / len(values) if values else None))
    return thin


def running_mean(points: Points) -> list[tuple[float, float | None]]:
    """The mean of each known point and its neighbours, `SMOOTHED_OVER` in all, fewer at both ends.

    As many count before as behind, so that the line does not lag.
    """
    known = [(x, y) for x, y in points if y is not None]
    smooth: list[tuple[float, float | None]] = []
    for i, (x, _) in enumerate(known):
        reach = min(SMOOTHED_OVER // 2, i, len(known) - 1 - i)
        values = [y for _, y in known[i - reach : i + reach + 1]]
        smooth.append((x, sum(values) / len(values)))
    return smooth


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float], at: Place, unit: str, x_label: str) -> str:
    parts = [f'<text class="tick" x="4" y="12">{escape(unit)}</text>']
    step = y_ticks[1] - y_ticks[0]
    for y in y_ticks:
        x0, y0 = at(0.0, y)
        text = number(y * 100, step * 100) if unit == "%" else number(y, step)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y0:.1f}" x2="{WIDTH - RIGHT}" y2="{y0:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y0 + 3.5:.1f}" text-anchor="end">{text}</text>')
    base = HEIGHT - BOTTOM
    for x in x_ticks:
        x0, _ = at(x, y_ticks[0])
        if x0 <= WIDTH - RIGHT + 0.5:
            text = number(x, x_ticks[1] - x_ticks[0])
            parts.append(
                f'<text class="tick" x="{x0:.1f}" y="{base + 14}" text-anchor="middle">{text}</text>'
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{base}" x2="{WIDTH - RIGHT}" y2="{base}"/>')
    parts.append(
        f'<text class="tick" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return "".join(parts)


def _band(series: Series, at: Place) -> str:
    """The area between the edges of a series' band."""
    rows = [(x, pair) for (x, _), pair in zip(series.points, series.band, strict=True)]
    edge = [at(x, low) for x, (low, _) in rows] + [at(x, high) for x, (_, high) in reversed(rows)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in edge)
    return f'<polygon class="band {series.css}" points="{points}"/>'


def _polylines(points: Points, at: Place, css: str) -> list[str]:
    """A polyline for each stretch of known points; a lone point is left to its dot."""
    lines: list[str] = []
    stretch: list[str] = []
    for x, y in [*points, (0.0, None)]:
        if y is not None:
            stretch.append("{:.1f},{:.1f}".format(*at(x, y)))
            continue
        if len(stretch) > 1:
            lines.append(f'<polyline class="{css}" points="{" ".join(stretch)}"/>')
        stretch = []
    return lines


def _dots(series: Series, at: Place) -> list[str]:
    """A dot with a tooltip at each known point; seen only where points are few, felt everywhere."""
    known = [(x, y) for x, y in series.points if y is not None]
    css = f"dot {series.css}" + ("" if len(known) <= SMOOTHED_OVER else " unseen")
    dots = []
    for x, y in known:
        cx, cy = at(x, y)
        tip = f"{escape(series.name)} {y:.4g} at {x:,.0f}"
        dots.append(f'<circle class="{css}" cx="{cx:.1f}" cy="{cy:.1f}" r="3"><title>{tip}</title></circle>')
    return dots


def _svg(body: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">'
        + "".join(body)
        + "</svg>"
    )
