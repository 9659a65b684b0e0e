"""Line charts with bands and a legend as one SVG file that needs nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from etpo.engine.report.charts import number, ticks

# Okabe and Ito's colours, which colour-blind people tell apart; past them, the dashes differ.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("", "6 3", "2 3")
WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 34, 44
LEGEND_LINE = 18


@dataclass(frozen=True)
class Line:
    """One line: (x, y) points, and at each x a band (low, high) or none at all."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Panel:
    """One chart; lines of one name have one colour in all panels."""

    title: str
    lines: Sequence[Line]
    x_label: str
    y_label: str
    dots: bool = False


def figure(panels: Sequence[Panel], columns: int = 2) -> str:
    """Panels in rows of `columns`, under them one legend.

    Raises:
        ValueError: no panel, or one without a point.
    """
    if not panels or any(not any(line.points for line in panel.lines) for panel in panels):
        raise ValueError("expected panels with at least one point each")
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    columns = min(columns, len(panels))
    n_rows = -(-len(panels) // columns)
    width, height = columns * WIDTH, n_rows * HEIGHT + LEGEND_LINE * (-(-len(names) // columns)) + 12
    parts = []
    for i, panel in enumerate(panels):
        x, y = i % columns * WIDTH, i // columns * HEIGHT
        parts.append(f'<g transform="translate({x} {y})">{_panel(panel, names)}</g>')
    for i, name in enumerate(names):
        x, y = LEFT + i % columns * WIDTH, n_rows * HEIGHT + LEGEND_LINE * (i // columns) + 10
        parts.append(
            f'<line x1="{x}" y1="{y}" x2="{x + 26}" y2="{y}" {_stroke(names, name)}/>'
            f'<text x="{x + 32}" y="{y + 4}">{escape(name)}</text>'
        )
    label = escape("; ".join(panel.title for panel in panels), quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="12" role="img" aria-label="{label}">'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _panel(panel: Panel, names: Sequence[str]) -> str:
    points = [point for line in panel.lines for point in line.points]
    ys = [y for _, y in points] + [y for line in panel.lines for pair in line.band for y in pair]
    x_ticks = ticks(0.0, max(x for x, _ in points))
    y_ticks = ticks(min(ys), max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = x / x_ticks[-1], (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="16" font-weight="bold">{escape(panel.title)}</text>']
    for y in y_ticks:
        (left, level), (right, _) = at(0.0, y), at(x_ticks[-1], y)
        text = number(y, y_ticks[1] - y_ticks[0])
        parts.append(
            f'<line x1="{left:.1f}" y1="{level:.1f}" x2="{right:.1f}" y2="{level:.1f}" stroke="#dddddd"/>'
            f'<text x="{left - 6:.1f}" y="{level + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for x in x_ticks:
        across, base = at(x, y_ticks[0])
        text = number(x, x_ticks[1] - x_ticks[0])
        parts.append(f'<text x="{across:.1f}" y="{base + 16:.1f}" text-anchor="middle">{text}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{escape(panel.x_label)}</text>'
        f'<text x="4" y="30" fill="#555555">{escape(panel.y_label)}</text>'
    )
    for line in panel.lines:
        colour = COLOURS[names.index(line.name) % len(COLOURS)]
        if line.band:
            upper = [at(x, high) for (x, _), (_, high) in zip(line.points, line.band, strict=True)]
            lower = [at(x, low) for (x, _), (low, _) in zip(line.points, line.band, strict=True)]
            outline = _places([*upper, *reversed(lower)])
            parts.append(f'<polygon points="{outline}" fill="{colour}" fill-opacity="0.15"/>')
        places = [at(x, y) for x, y in line.points]
        parts.append(f'<polyline points="{_places(places)}" fill="none" {_stroke(names, line.name)}/>')
        if panel.dots:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    return "".join(parts)


def _stroke(names: Sequence[str], name: str) -> str:
    index = names.index(name)
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke="{COLOURS[index % len(COLOURS)]}" stroke-width="2"{dashed}'


def _places(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
