"""Draws the documentation's figures from stored rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Row

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
OURS, EAGER, SDPA, GREY = "#1b6ca8", "#d95f02", "#7570b3", "#666666"


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130})
    return plt


def _cpu(known: dict[str, Any]) -> str:
    return f"{known['cpu']} (family/model {known['cpu_family']}), {known['threads']} threads"


def _where(rows: Sequence[Row]) -> str:
    row = rows[-1]
    known = row["machine"]
    device = known.get("gpu") if row["device"] == "cuda" else _cpu(known)
    return f"{device}, torch {known['torch']}, {row['size']} size"


def _save(plt: Any, figure: Any, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, bbox_inches="tight")
    plt.close(figure)
    return target


def ratio_bars(rows: Sequence[Row], target: Path) -> Path:
    """Time of eager and of SDPA relative to ours, with quartiles: one pair of bars per measurement, and a line at
    1."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 1 + 0.28 * len(rows)))
    for index, row in enumerate(rows):
        for name, colour, shift in (("eager", EAGER, -0.2), ("sdpa", SDPA, 0.2)):
            if name in row["ratio"]:
                low, median, high = row["ratio"][name]
                error = [[max(0.0, median - low)], [max(0.0, high - median)]]
                axes.barh(index + shift, median, 0.38, xerr=error, color=colour, ecolor=GREY, error_kw={"lw": 0.8})
                axes.text(max(median, high) * 1.03, index + shift, f"{median:.2f}", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [f"{row['case']}, {row['direction']}, {row['dtype']}" for row in rows])
    axes.invert_yaxis()
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16, 32]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (EAGER, SDPA)]
    axes.legend(handles, ["eager / ours", "eager with SDPA / ours"], loc="lower right", fontsize=8)
    axes.set_title(f"Right of 1x: ours is faster. {_where(rows)}", fontsize=9)
    return _save(plt, figure, target)


def roofline(rows: Sequence[Row], target: Path) -> Path:
    """FLOP/s against FLOPs per byte, below the measured peaks, for measurements with products."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5))
    dtypes = sorted({row["dtype"] for row in rows})
    for dtype, marker, colour in zip(dtypes, "os^", (OURS, EAGER, SDPA), strict=False):
        found = [row for row in rows if row["dtype"] == dtype and row["floor"]["flops"]]
        if not found:
            continue
        peak = max(row["floor"]["flops_per_second"] for row in found)
        speed = min(row["floor"]["bytes_per_second"] for row in found)
        intensity = [2.0**k for k in range(-3, 13)]
        axes.plot(intensity, [min(peak, x * speed) / 1e9 for x in intensity], color=colour, lw=1)
        axes.scatter(
            [row["floor"]["flops"] / row["floor"]["bytes"] for row in found],
            [row["floor"]["flops"] / row["seconds"]["ours"][1] / 1e9 for row in found],
            marker=marker, color=colour, s=18, label=f"{dtype}, peak {peak / 1e9:.0f} GFLOP/s",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte, at least", ylabel="GFLOP/s of the least arithmetic")
    axes.legend(fontsize=8)
    axes.set_title(f"Roofline (memory at its slowest working set). {_where(rows)}", fontsize=9)
    return _save(plt, figure, target)


def scaling(rows: Sequence[Row], target: Path) -> Path:
    """Time of a training pass and memory saved for it against frames, resolution and batch, for ours and eager."""
    plt = _pyplot()
    axes_names = [axis for axis in ("frames", "resolution", "batch") if any(row["axis"] == axis for row in rows)]
    figure, grid = plt.subplots(2, len(axes_names), figsize=(3.6 * len(axes_names), 6), squeeze=False)
    for column, axis in enumerate(axes_names):
        found = sorted((row for row in rows if row["axis"] == axis), key=lambda row: row["value"])
        for line, (what, scale, label) in enumerate(
            (("seconds", 1.0, "seconds, forward + backward"), ("saved", 2.0**30, "GiB saved for backward"))
        ):
            plot = grid[line][column]
            for name, colour in (("ours", OURS), ("eager", EAGER), ("ours, recomputing", GREY)):
                points = [(row["value"], row[what][name] / scale) for row in found if row[what].get(name)]
                if points:
                    plot.plot(*zip(*points, strict=True), "o-", color=colour, label=name, ms=3)
            plot.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
            values = [row["value"] for row in found]
            plot.set_xticks(values, [str(value) for value in values])
            plot.minorticks_off()
            for row in found:
                if what == "seconds" and "eager" not in row["seconds"]:
                    plot.axvline(row["value"], color=EAGER, ls=":", lw=0.8)
    grid[1][0].legend(fontsize=8)
    known = rows[-1]["machine"]
    figure.suptitle(
        f"{rows[-1]['network']}, {rows[-1]['size']} channels, fp32; {_cpu(known)}. "
        "Dotted: eager would exceed the bound of memory or time.", fontsize=8,
    )  # fmt: skip
    figure.tight_layout()
    return _save(plt, figure, target)
