"""Training records as curves: one SVG per measured value, a loss with its held-out score in the same."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

LEFT_OUT = ("stage", "step", "seconds", "learning_rate", "gradient_norm")
MAX_POINTS = 400


def curves(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(title, SVG element) of every value in the records of metrics.jsonl, such as ("autoencoder: loss", ...).

    The held-out loss is drawn where the loss is.
    """
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for record in records:
        for key, value in record.items():
            if key not in LEFT_OUT and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault((record["stage"], key), []).append((record["step"], value))
    lines: dict[str, dict[str, np.ndarray]] = {}
    for (stage, key), points in found.items():
        place = "loss" if key == "held_out_loss" and (stage, "loss") in found else key
        lines.setdefault(f"{stage}: {place.replace('_', ' ')}", {})[key] = np.array(points, dtype=float)
    return [(title, _svg(shown)) for title, shown in lines.items()]


def thinned(points: np.ndarray) -> np.ndarray:
    """Points (n, 2), averaged in groups of neighbours so that at most MAX_POINTS are left."""
    group = -(-len(points) // MAX_POINTS)
    edges = np.arange(0, len(points), group)
    counts = np.diff([*edges, len(points)])
    return np.add.reduceat(points, edges) / counts[:, None]


def _svg(shown: dict[str, np.ndarray]) -> str:
    """A figure of one or more lines (n, 2): a legend names them where there are several."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    logarithmic = all("loss" in key and points[:, 1].min() > 0 for key, points in shown.items())
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": ",".join(shown)}):
        figure = Figure(figsize=(4.6, 2.8), layout="constrained")
        axes = figure.subplots()
        for key, points in shown.items():
            marker = "." if len(points) < 30 else ""
            axes.plot(*thinned(points).T, marker=marker, linewidth=1.2, label=key.replace("_", " "))
        axes.set(xlabel="step", yscale="log" if logarithmic else "linear")
        axes.grid(alpha=0.3, which="both")
        if len(shown) > 1:
            axes.legend(fontsize=8)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
