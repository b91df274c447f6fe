"""Training records as curves: one SVG per measured value."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

LEFT_OUT = ("stage", "step", "seconds", "learning_rate", "gradient_norm")
MAX_POINTS = 400


def curves(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(title, SVG element) of every value in the records of metrics.jsonl, such as ("autoencoder: loss", ...)."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for record in records:
        for key, value in record.items():
            if key not in LEFT_OUT and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault((record["stage"], key), []).append((record["step"], value))
    return [
        (f"{stage}: {key.replace('_', ' ')}", _svg(np.array(points, dtype=float), key))
        for (stage, key), points in found.items()
    ]


def thinned(points: np.ndarray) -> np.ndarray:
    """Points (n, 2), averaged in groups of neighbours so that at most MAX_POINTS are left."""
    group = -(-len(points) // MAX_POINTS)
    edges = np.arange(0, len(points), group)
    counts = np.diff([*edges, len(points)])
    return np.add.reduceat(points, edges) / counts[:, None]


def _svg(points: np.ndarray, key: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    steps, values = thinned(points).T
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure = Figure(figsize=(4.6, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, values, marker="." if len(points) < 30 else "", linewidth=1.2)
        axes.set(xlabel="step", yscale="log" if "loss" in key and values.min() > 0 else "linear")
        axes.grid(alpha=0.3, which="both")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
