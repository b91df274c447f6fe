"""A measurement as one JSON row, and rows as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import floors, machine
from benchmarks.measure import Prepared, Timings
from benchmarks.memory import Weight
from benchmarks.registry import Case, Setting

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
BUSY = 0.2  # cores that other programs may use before a row is marked
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def make_row(
    case: Case,
    setting: Setting,
    prepared: Prepared,
    direction: str,
    timings: Timings,
    *,
    errors: Mapping[str, Mapping[str, float]],
    served: Mapping[str, str],
    weights: Mapping[str, Weight],
    left_out: Sequence[str] = (),
) -> Row:
    """Everything known about one measurement. Seconds are medians with quartiles, ratios are baseline / ours by round.

    "busy" tells how many cores other programs kept busy meanwhile.

    Args:
        errors: of each runner against the truth. served: the backend that really ran, by operation. weights: memory by
            runner, for directions that save something. left_out: why runners are missing.
    """
    needed = prepared.work(direction)
    floor = floors.floor(needed, setting.dtype, setting.device)
    ours = timings.median("ours")
    rivals = [name for name in timings.seconds if name != "ours"]
    return {
        "time": machine.now(),
        "case": case.name,
        "kind": case.kind,
        "direction": direction,
        "size": setting.size,
        "shape": prepared.shape,
        "dtype": SHORT[setting.dtype],
        "device": setting.device,
        "rounds": len(timings.seconds["ours"]),
        "seconds": {name: [*_ordered(timings.spread(name), timings.median(name))] for name in timings.seconds},
        "ratio": {name: list(timings.ratio(name)) for name in rivals},
        "floor": {
            "flops": needed.flops,
            "bytes": needed.bytes,
            "seconds": floor.seconds,
            "bound": floor.bound,
            "flops_per_second": floor.flops_per_second,
            "bytes_per_second": floor.bytes_per_second,
            "share": floor.seconds / ours,
        },
        "saved": {name: weight.saved for name, weight in weights.items()},
        "peak": {name: weight.peak for name, weight in weights.items()},
        "errors": {name: dict(found) for name, found in errors.items()},
        "backends": dict(served),
        "left_out": list(left_out),
        "busy": timings.others,
        "machine": machine.facts(),
    }


def _ordered(spread: tuple[float, float], median: float) -> tuple[float, float, float]:
    return spread[0], median, spread[1]


def path(device: str) -> Path:
    """The file of this machine's rows."""
    return RESULTS / f"{machine.name(device)}.jsonl"


def scaling_path(device: str) -> Path:
    """The file of this machine's rows of `benchmarks.scaling`."""
    return RESULTS / f"{machine.name(device)}.scaling.jsonl"


def call_path(device: str) -> Path:
    """The file of this machine's rows of `benchmarks.call`."""
    return RESULTS / f"{machine.name(device)}.call.jsonl"


def all_paths() -> list[Path]:
    """The files of every machine's rows of cases: MACHINE.jsonl, not MACHINE.scaling.jsonl and the like."""
    return sorted(path for path in RESULTS.glob("*.jsonl") if "." not in path.stem)


def peaks_path(device: str) -> Path:
    return RESULTS / f"{machine.name(device)}.peaks.json"


def append(row: Row, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with to.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(source: Path) -> list[Row]:
    return [json.loads(line) for line in source.read_text().splitlines()] if source.exists() else []


def key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("size", "case", "direction", "dtype", "device", "shape"))


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each measurement, in the order in which measurements first appeared."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        found[key(row)] = row
    return list(found.values())


def milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def mebibytes(size: int) -> str:
    value = size / 2**20
    return f"{value / 1024:.2f} GiB" if value >= 1024 else f"{value:.0f} MiB" if value >= 10 else f"{value:.2f} MiB"


COLUMNS = (
    "case", "direction", "dtype", "shape", "ours ms", "eager ms", "ratio", "spread", "vs SDPA", "vs compiled",
    "vs fp32 eager", "floor", "bound by", "saved ours", "saved eager", "backend",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """One line of a table. "-" means that it doesn't exist or didn't fit in memory."""

    def ratio(name: str) -> str:
        return f"{row['ratio'][name][1]:.2f}x" if name in row["ratio"] else "-"

    def saved(name: str) -> str:
        return mebibytes(row["saved"][name]) if row["saved"].get(name) else "-"

    seconds, eager = row["seconds"], row["ratio"].get("eager")
    spread = f"{eager[0]:.2f}-{eager[2]:.2f}" if eager else "-"
    served = sorted(set(row["backends"].values()))
    return [
        row["case"],
        row["direction"],
        row["dtype"],
        row["shape"],
        milliseconds(seconds["ours"][1]),
        milliseconds(seconds["eager"][1]) if "eager" in seconds else "-",
        ratio("eager"),
        spread,
        ratio("sdpa"),
        ratio("compiled"),
        ratio("eager fp32"),
        _share(row),
        row["floor"]["bound"],
        saved("ours"),
        saved("eager"),
        "+".join(served),
    ]


def doubtful(row: Row) -> bool:
    """Whether other programs were at work, which also shows in a time below its floor."""
    return row["busy"] > BUSY or row["floor"]["share"] > 1


def _share(row: Row) -> str:
    return f"{100 * row['floor']['share']:.0f} %{' !' if doubtful(row) else ''}"


def markdown(rows: Sequence[Row]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# For a terminal of 100 columns: the columns that fit, and how wide they are.
TERMINAL = {
    "": 6, "case": 31, "direction": 8, "dtype": 4, "ours ms": 7, "eager ms": 8, "ratio": 6, "floor": 7, "bound by": 10,
}  # fmt: skip
WIDTH = 100
DOUBTFUL = f"!: other programs kept more than {BUSY} cores busy, or the time is below its floor: measure again"


def line(row: Row | None = None) -> str:
    """A row for a terminal, or the heading; cases that lost against eager are marked, and doubtful shares of floors."""
    found = dict(zip(COLUMNS, COLUMNS if row is None else cells(row), strict=True))
    lost = row is not None and row["ratio"].get("eager", [1, 1, 1])[1] < 1
    found[""] = "slower" if lost else ""
    return " ".join(found[name][:width].ljust(width) for name, width in TERMINAL.items()).rstrip()


def aligned(rows: Sequence[Row]) -> str:
    """The table for a terminal; what doesn't fit is in the stored rows and in the pages."""
    lines = [line(), *map(line, rows)]
    return "\n".join([*lines, DOUBTFUL] if any(map(doubtful, rows)) else lines)
