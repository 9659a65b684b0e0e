"""The kernel benchmark as one SVG: a bar for each contestant, its time as a share of eager's."""

from html import escape

from etpo.bench.kernels.measure import Row
from etpo.bench.kernels.output import milliseconds

WIDTH, LABEL, BAR, GAP, TITLE = 900, 210, 14, 4, 26
# The longest bar ends here; longer ones are cut and say their number.
MOST = 3.0
COLOURS = {"eager": "#888888", "bare products": "#bbbbbb"}
OURS, THEIRS = "#1f6fb2", "#d08a3e"


def to_svg(rows: list[Row]) -> str:
    """Bars of forward + backward, one group for each case; the line stands at eager's time."""
    parts: list[str] = []
    y = 10
    scale = (WIDTH - LABEL - 90) / MOST
    cases = dict.fromkeys((r.shape, r.n_tokens, r.function, r.heads) for r in rows)
    for key in cases:
        own = [r for r in rows if (r.shape, r.n_tokens, r.function, r.heads) == key]
        shape, n_tokens, function, heads = key
        title = f"{function} ({heads}), {shape}, {n_tokens} tokens: time of forward + backward, eager = 1"
        parts.append(f'<text x="10" y="{y + 12}" font-weight="bold">{escape(title)}</text>')
        y += TITLE
        top = y
        for row in own:
            parts += _bar(row, y, scale)
            y += BAR + GAP
        x = LABEL + scale
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 3}" y2="{y}" stroke="#444" stroke-dasharray="3 3"/>'
        )
        y += 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        f'font-family="sans-serif" font-size="12"><rect width="{WIDTH}" height="{y}" fill="#ffffff"/>'
        + "".join(parts)
        + "</svg>\n"
    )


def _bar(row: Row, y: int, scale: float) -> list[str]:
    text = f'<text x="{LABEL - 8}" y="{y + 11}" text-anchor="end">{escape(row.contestant)}</text>'
    ratio = 1.0 if row.contestant == "eager" else row.ratio_to_eager
    if row.both_s is None or ratio is None:
        why = row.why_not or "eager did not run"
        return [text, f'<text x="{LABEL + 4}" y="{y + 11}" fill="#777">not run: {escape(why[:90])}</text>']
    colour = COLOURS.get(row.contestant, OURS if row.contestant.startswith("etpo") else THEIRS)
    length = min(ratio, MOST) * scale
    number = f"{ratio:.2f}  ({milliseconds(row.both_s.median)} ms)"
    return [
        text,
        f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>',
        f'<text x="{LABEL + length + 5:.1f}" y="{y + 11}">{number}</text>',
    ]
