"""What each Triton kernel takes on each family of GPUs, compiled without one: `python -m benchmarks.kernel_resources`.

Compiles each kernel as the networks launch it, in every configuration that serves sm80, sm90, sm100, sm120 and gfx942,
and holds it to a budget: no spilled registers, shared memory that the GPU has, tensor cores for 16-bit products,
16-byte loads where memory is the bound. Also finds entries of the configuration tables that no launch uses. Exit code 1
where something is over its budget. Speed is not seen.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pvdm_fast import backends, workload
from pvdm_fast.errors import UserError, run_command
from pvdm_fast.workload import Call

if TYPE_CHECKING:
    from benchmarks.ahead_of_time import Asked, Resources

ARCHITECTURES = ("sm80", "sm90", "sm100", "sm120", "gfx942")
DOCS = Path(__file__).parents[1] / "docs" / "kernels.md"
BEGIN, END = "<!-- kernel resources: begin -->", "<!-- kernel resources: end -->"
# Kernels bound by memory that need no 16-byte loads, and why.
NARROW: dict[str, str] = {}


def check_process() -> None:
    """Raise UserError where nothing can be compiled."""
    if find_spec("triton") is None:
        raise UserError("Triton is not installed: pip install triton.")
    if backends.interpreting():
        raise UserError("TRITON_INTERPRET is set, so kernels are not compiled: unset it for this command.")


def representative_calls() -> list[Call]:
    """What the networks ask for: full size in each dtype and in mixed precision; the smaller sizes in bfloat16."""
    half = torch.bfloat16
    full = workload.calls("base", half, batch=2)
    found = dict.fromkeys(full)
    for dtype in (torch.float32, torch.float16):
        found |= dict.fromkeys(call.with_dtype(half, dtype) for call in full)
    found |= dict.fromkeys(workload.calls("base", half, batch=2, mixed=True))
    for size in ("tiny", "small"):
        found |= dict.fromkeys(workload.calls(size, half, batch=2))
    return list(found)


def _compile(architecture: str, calls: list[Call]) -> tuple[list[Resources], Asked]:
    from benchmarks.ahead_of_time import compile_calls

    return compile_calls(architecture, calls)


def compile_all(
    architectures: Sequence[str], operations: Sequence[str], workers: int
) -> tuple[list[Resources], dict[str, set[str]]]:
    """Compile everything, in processes of its own; the compiled kernels, and the table entries that served."""
    by_operation: dict[str, list[Call]] = {op: [] for op in operations}
    for call in representative_calls():
        if call.op in by_operation:
            by_operation[call.op].append(call)
    tasks = [(architecture, calls) for calls in by_operation.values() for architecture in architectures]
    rows: list[Resources] = []
    served: dict[str, set[str]] = defaultdict(set)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for found, asked in pool.map(_compile, *zip(*tasks, strict=True)):
            rows += found
            for name, entries in asked.items():
                served[name] |= entries
    return rows, served


def unused_entries(served: dict[str, set[str]], architectures: Iterable[str]) -> list[str]:
    """Entries of the tables for `architectures` that no launch uses; the one for everything else may be such."""
    from pvdm_fast.kernels.configs import ANY, TABLES

    for op in backends.SERVED["triton"]:
        backends.implementation("triton", op)
    return [
        f"The table of {name} has an entry for {'/'.join(key)} that no launch uses."
        for name, table in TABLES.items()
        for key in table.entries
        if key[0] in (ANY, *architectures) and key != (ANY, ANY, ANY) and "/".join(key) not in served.get(name, ())
    ]


def table(rows: Iterable[Resources]) -> list[str]:
    """Lines of Markdown: for each kernel and GPU family, the variant that takes most registers."""
    groups: dict[tuple[str, str], list[Resources]] = defaultdict(list)
    for row in rows:
        groups[row.kernel, row.architecture].append(row)
    lines = [
        "| kernel | GPU | variants | registers | shared, KiB | tensor cores | 16-byte loads | most registers with |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kernel, architecture in sorted(groups, key=lambda key: (key[0], ARCHITECTURES.index(key[1]))):
        group = groups[kernel, architecture]
        worst = max(group, key=lambda row: (row.spilled, row.registers))
        cores = "yes" if all(r.tensor_core_instructions for r in group if r.products_16_bit) else "no"
        cores = cores if any(r.products_16_bit for r in group) else ""
        loads = f"{min(r.wide_loads for r in group)}-{max(r.wide_loads for r in group)}"
        lines.append(
            f"| {kernel} | {architecture} | {len(group)} | {worst.registers} | "
            f"{max(r.shared for r in group) / 1024:.1f} | {cores} | {loads} | {worst.dtype}, {worst.config} |"
        )
    return lines


def write_docs(rows: Iterable[Resources], path: Path = DOCS) -> None:
    """Put the table between the markers in docs/kernels.md."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{path} must have the lines {BEGIN} and {END} once each.")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    made = f"Made by `python -m benchmarks.kernel_resources --write-docs` with Triton {version('triton')}."
    path.write_text("\n".join([head + BEGIN, made, "", *table(rows), END + tail]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_resources", description=__doc__)
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/kernels.md")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--operations", nargs="+", choices=backends.OPERATIONS, default=backends.SERVED["triton"])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args(arguments)
    check_process()
    from benchmarks.ahead_of_time import over_budget

    rows, served = compile_all(options.architectures, options.operations, options.workers)
    print("\n".join(table(rows)))
    problems = [problem for row in rows for problem in over_budget(row, NARROW)]
    if set(options.operations) == set(backends.SERVED["triton"]):
        problems += unused_entries(served, options.architectures)
    print(f"\n{len(rows)} compiled kernels, {len(problems)} problems", *problems, sep="\n")
    if options.write_docs:
        write_docs(rows)
    return 1 if problems else 0


if __name__ == "__main__":
    code = 0

    def run() -> None:
        global code
        code = main()

    sys.exit(run_command(run) or code)
