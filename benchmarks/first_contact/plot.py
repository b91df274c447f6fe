"""A bar for each measurement: how many times longer a rival takes than ours. An SVG file, without matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.plots import EAGER, OURS, SDPA

RIVALS = {"eager": EAGER, "sdpa": SDPA, "compiled": OURS}
LEFT, WIDTH, LINE, TOP = 330, 520, 11, 46  # pixels
TICKS = (0.25, 0.5, 1, 2, 4, 8, 16)


def ratios(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """The drawing; "" where nothing was measured."""
    bars = [(row, rival) for row in rows for rival in RIVALS if rival in row["ratio"]]
    if not bars:
        return ""
    height = TOP + LINE * len(bars) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 60}" height="{height}" '
        'font-family="sans-serif" font-size="9">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="14" font-size="12">{escape(name)}: right of 1x ours is faster</text>',
    ]
    for index, (rival, colour) in enumerate(RIVALS.items()):
        parts.append(f'<text x="{LEFT + 110 * index}" y="28" fill="{colour}">{rival} / ours</text>')
    for tick in TICKS:
        x, shade = _place(tick), "black" if tick == 1 else "#dddddd"
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{height - 20}" stroke="{shade}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{tick:g}x</text>')
    before = None
    for index, (row, rival) in enumerate(bars):
        parts += _bar(row, rival, TOP + LINE * index, labelled=row is not before)
        before = row
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(row: Mapping[str, Any], rival: str, y: int, labelled: bool) -> list[str]:
    value = row["ratio"][rival]
    start, end = sorted((_place(1), _place(value)))
    width = max(end - start, 0.5)
    drawn = [
        f'<rect x="{start:.1f}" y="{y}" width="{width:.1f}" height="{LINE - 3}" fill="{RIVALS[rival]}"/>',
        f'<text x="{end + 4:.1f}" y="{y + 8}">{value:.2f}</text>',
    ]
    if labelled:
        label = escape(f"{row['case']}, {row['direction']}, {row['precision']}")
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 8}" text-anchor="end">{label}</text>')
    return drawn


def _place(ratio: float) -> float:
    """The position of a ratio on the logarithmic axis, whose ends hold what is beyond them."""
    low, high = math.log(TICKS[0]), math.log(TICKS[-1])
    share = (math.log(max(ratio, 1e-9)) - low) / (high - low)
    return LEFT + WIDTH * min(1.0, max(0.0, share))
