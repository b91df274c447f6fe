"""`python -m benchmarks.report`: alternating runs of ours and its baselines, as stored rows, tables and plots."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import floors, machine, plots, rows
from benchmarks.cases import all_cases
from benchmarks.measure import Disagreement, alternate
from benchmarks.memory import weigh
from benchmarks.registry import SIZES, Case, Setting
from benchmarks.session import DTYPES, DoesNotFit, devices, get_ready
from pvdm_fast.jobs.files import whole_file

PAGES = Path(__file__).resolve().parents[1] / "docs" / "results"
DOCUMENT, SMALL = PAGES / "performance.md", PAGES / "small_sizes.md"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Measure every case against the eager baseline in alternating rounds; store and show the results.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--full", action="store_true", help="the full-size models instead of the small ones")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases whose name contains or matches this")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="only this dtype")
    parser.add_argument("--direction", choices=["forward", "backward", "both"], help="only this direction")
    parser.add_argument("--rounds", type=int, help="alternating rounds; by default what the budget allows; 0: no runs")
    parser.add_argument("--budget", type=float, default=3.0, metavar="S", help="seconds of rounds a measurement")
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="add torch.compile of the eager computation; by default for operations, where it takes 2 to 6 seconds "
        "(blocks: half a minute, networks: minutes)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; by default PyTorch's choice")
    parser.add_argument("--no-store", action="store_true", help="show only: write no rows, peaks or plots")
    parser.add_argument("--write-docs", action="store_true", help="write the tables of every machine to docs/results/")
    return parser


def matching(pattern: str) -> list[Case]:
    """Cases whose name contains the pattern, or matches it as a file name pattern."""
    return [case for name, case in all_cases().items() if pattern in name or fnmatch.fnmatch(name, pattern)]


def compiles(case: Case, options: argparse.Namespace) -> bool:
    """Whether torch.compile of the eager computation is measured too."""
    return case.kind == "operation" if options.compiled is None else bool(options.compiled)


def measure_case(case: Case, setting: Setting, options: argparse.Namespace) -> list[rows.Row]:
    """The rows of a case. If a case disagrees or doesn't fit in memory, prints that and gives none."""
    wanted = [d for d in case.directions if options.direction in (None, d)]
    if not wanted:
        return []
    case = replace(case, directions=tuple(wanted))  # nothing else is checked or measured
    try:
        ready = get_ready(case, setting)
    except (Disagreement, DoesNotFit) as reason:
        print(f"not measured: {case.name} {rows.SHORT[setting.dtype]}: {reason}", file=sys.stderr)
        return []
    found = []
    for direction in wanted:
        peaks = floors.beside(ready.prepared.work(direction), setting.dtype, setting.device)
        timings = alternate(
            ready.prepared.runners,
            direction,
            setting.device,
            budget=options.budget,
            rounds=options.rounds,
            beside=peaks,
        )
        row = ready.row(direction, timings)
        print(rows.line(row), flush=True)
        found.append(row)
    return found


def run(options: argparse.Namespace) -> list[rows.Row]:
    """Measure what is asked for, and store each row as soon as it exists."""
    size = "base" if options.full else "small"
    dtypes = [dtype for dtype in DTYPES if options.dtype in (None, rows.SHORT[dtype])]
    found = []
    for device in devices():
        if not options.no_store:
            floors.load_peaks(rows.peaks_path(device))
        for case in matching(options.only):
            for dtype in dtypes:
                for row in measure_case(case, Setting(size, dtype, device, compiles(case, options)), options):
                    found.append(row)
                    if not options.no_store:
                        rows.append(row, rows.path(device))
                        floors.save_peaks(rows.peaks_path(device))
    return found


def draw(device: str) -> list[Path]:
    """Draw every figure that this machine's stored rows allow."""
    stored = rows.newest(rows.read(rows.path(device)))
    drawn = []
    for size in SIZES:
        found = [row for row in stored if row["size"] == size]
        if found:
            suffix = f"{size}-{machine.name(device)}.png"
            drawn.append(plots.ratio_bars(found, plots.IMAGES / f"ratios-{suffix}"))
            drawn.append(plots.roofline(found, plots.IMAGES / f"roofline-{suffix}"))
    return drawn


def title(row: rows.Row) -> str:
    """The machine of a row, in a few words."""
    known = row["machine"]
    threads = "1 thread" if known["threads"] == 1 else f"{known['threads']} threads"
    return f"{known.get('gpu') or known['cpu']} (family/model {known['cpu_family']}), {threads}"


def description(stored: Sequence[rows.Row]) -> str:
    """One machine, with its measured peaks, as an item of a list."""
    known = stored[-1]["machine"]
    peaks = {row["dtype"]: row["floor"]["flops_per_second"] / 1e9 for row in stored}
    busy = sorted(row["busy"] for row in stored)[len(stored) // 2]
    return (
        f"- **{title(stored[-1])}**. Features: {', '.join(known['flags'])}. Our kernels use {known['isa']}. "
        f"torch {known['torch']} ({known['torch_cpu_capability']}), Python {known['python']}, "
        f"pvdm_fast {known['pvdm_fast']}, commit {known['commit']}, {stored[-1]['time'][:10]}. Measured peaks: "
        f"{', '.join(f'{dtype} GEMM {peak:.0f} GFLOP/s' for dtype, peak in peaks.items())}. Other programs kept "
        f"{busy:.1f} cores busy (median)."
    )


def sections(machines: Sequence[list[rows.Row]]) -> dict[str, str]:
    """Generated text by marker, from the rows of each machine: one table per size and machine, and the list of
    machines."""
    texts = {"machine": "\n".join(description(stored) for stored in machines)}
    for size in SIZES:
        tables = []
        for stored in machines:
            if found := [row for row in stored if row["size"] == size]:
                versions = " and ".join(sorted({row["machine"]["torch"] for row in found}))
                tables.append(f"{title(found[-1])}, torch {versions}:\n\n{rows.markdown(found)}")
        if tables:
            texts[size] = "\n\n".join(tables)
    return texts


def memory_table() -> str:
    """Full-size training passes of one clip: memory found by running shapes only."""
    lines = [
        "| network | computed by | saved for backward | alive at once, weights included |",
        "| --- | --- | --- | --- |",
    ]
    for name in ("autoencoder", "denoiser"):
        for runner, weight in weigh(all_cases()[name], Setting("base"), "both").items():
            sizes = f"{rows.mebibytes(weight.saved)} | {rows.mebibytes(weight.peak)}"
            lines.append(f"| {name} | {runner} | {sizes} |")
    return "\n".join(lines)


def write_between(document: str, marker: str, text: str) -> str:
    """Replace the text between `<!-- marker -->` and `<!-- /marker -->`.

    Raises:
        ValueError: the document doesn't have the markers.
    """
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if start not in document or end not in document:
        raise ValueError(f"The page has no lines {start} and {end} to write between.")
    before, _, rest = document.partition(start)
    return f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}"


def write_section(page: Path, marker: str, text: str) -> None:
    """`write_between` in a file, which is the old one or the whole new one."""
    written = write_between(page.read_text(encoding="utf-8"), marker, text)
    with whole_file(page) as temporary:
        temporary.write_text(written, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.rounds != 0:
        if not matching(options.only):
            print(f"No case matches {options.only!r}. There are: {', '.join(all_cases())}", file=sys.stderr)
            return 2
        found = run(options)
        facts = "\n".join(f"{name}: {value}" for name, value in machine.facts().items())
        print(f"\n{facts}\n\n{rows.aligned(found)}")
        if not options.no_store:
            for device in devices():
                for figure in draw(device):
                    print(f"drawn: {figure.name}")
    if options.write_docs:
        machines = [rows.newest(rows.read(path)) for path in rows.all_paths()]
        if not machines:
            print("There are no stored rows to write: run the report first.", file=sys.stderr)
            return 2
        for marker, content in {**sections(machines), "memory": memory_table()}.items():
            page = SMALL if marker == "small" else DOCUMENT
            write_section(page, marker, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
