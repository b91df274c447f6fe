"""`python -m benchmarks.kernel_resources`: what each Triton kernel uses on each GPU family, compiled without a GPU.

Compiles each kernel as the networks launch it, in every configuration for sm80, sm90, sm100, sm120 and gfx942, and
checks it against a budget: no spilled registers, sums that all lanes round alike, and no more shared memory than the
GPU has. 16-bit products must use tensor cores. Kernels bound by memory must use 16-byte loads. It also finds entries of
the configuration tables that no launch uses. The exit code is 1 if something is over its budget. It says nothing about
speed. It takes about half an hour of CPU time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pvdm_fast.analysis import workload
from pvdm_fast.analysis.workload import Call, TensorSpec
from pvdm_fast.backends import choice
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.command import run_command

if TYPE_CHECKING:
    from benchmarks.ahead_of_time import Resources

ARCHITECTURES = ("sm80", "sm90", "sm100", "sm120", "gfx942")
DOCS = Path(__file__).parents[1] / "docs" / "results" / "triton_resources.md"
BEGIN, END = "<!-- kernel resources: begin -->", "<!-- kernel resources: end -->"
# Kernels bound by memory that don't need 16-byte loads, and why.
NARROW: dict[str, str] = {}


def check_process() -> None:
    """Raise UserError if nothing can be compiled here."""
    if find_spec("triton") is None:
        raise UserError("Triton is not installed: pip install triton.")
    if choice.interpreting():
        raise UserError("TRITON_INTERPRET is set, so kernels are not compiled: unset it for this command.")


@cache
def full_size_calls() -> list[Call]:
    """Which operations full-size networks call, in bfloat16. Further layers would make the same calls."""
    return workload.calls("base", torch.bfloat16, batch=2, autoencoder={"depth": 1})


@cache
def other_calls() -> list[Call]:
    """The same in float32, float16 and mixed precision, for the smaller presets, and with heads up to 256 wide."""
    half, single = torch.bfloat16, torch.float32
    full = full_size_calls()
    others = [call.with_dtype(half, dtype) for call in full for dtype in (single, torch.float16)]
    others += workload.calls("base", half, batch=2, mixed=True, autoencoder={"depth": 1})
    sizes: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("tiny", {}, {}),
        ("small", {}, {}),
        ("base", {"num_heads": 4}, {"channels": 1024, "head_dim": 128, "depth": 1}),
        ("base", {"num_heads": 16}, {"channels": 2048, "head_dim": 256, "depth": 1}),
        # heads of 256 channels, with many tokens
        ("tiny", {"model_channels": 1024, "num_heads": 4, "time": 16, "height": 32, "width": 32}, {}),
    ]
    for size, denoiser, autoencoder in sizes:
        found = workload.calls(size, half, batch=2, denoiser=denoiser, autoencoder=autoencoder)
        others += [call.with_dtype(half, dtype) for call in found for dtype in (half, single, torch.float16)]
    return [call for call in dict.fromkeys(others) if call not in full]


def has_float16(call: Call) -> bool:
    return any(isinstance(a, TensorSpec) and a.dtype == torch.float16 for a in call.arguments)


def wanted_calls(architecture: str, quick: bool) -> tuple[list[Call], list[Call]]:
    """What to compile for a GPU family: all of `full_size_calls`, and new configurations of the others.

    float16 uses the same configurations as bfloat16, so it is compiled for the first family only.

    quick: full size in bfloat16, for the first family in float32 too. Of the other calls, only new configurations.
    """
    first, full = architecture == ARCHITECTURES[0], full_size_calls()
    others = [call for call in other_calls() if first or not has_float16(call)]
    if quick:
        return [*full, *(call.with_dtype(torch.bfloat16, torch.float32) for call in full if first)], others
    return [*full, *others], []


def _compile(architecture: str, calls: list[Call], rest: list[Call], variants: bool) -> list[Resources]:
    from benchmarks.ahead_of_time import compile_calls

    return compile_calls(architecture, calls, rest, variants)


def compile_all(
    architectures: Sequence[str], operations: Sequence[str], workers: int, quick: bool, variants: bool
) -> list[Resources]:
    """Compile the calls for each architecture, in separate processes."""
    tasks = []
    for op in operations:
        for architecture in architectures:
            calls, rest = ([call for call in part if call.op == op] for part in wanted_calls(architecture, quick))
            tasks.append((architecture, calls, rest, variants))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return [row for found in pool.map(_compile, *zip(*tasks, strict=True)) for row in found]


def unused_entries(calls: Iterable[Call]) -> list[str]:
    """Entries of the tables that no launch uses on any family. The catch-all entry may be unused."""
    from benchmarks.ahead_of_time import serving_entries
    from pvdm_fast.kernels.configs import ANY, TABLES

    calls = [call for call in calls if call.op in choice.SERVED["triton"]]
    serving = {entry for architecture in ARCHITECTURES for entry in serving_entries(architecture, calls)}
    return [
        f"The table of {name} has an entry for {'/'.join(key)} that no launch uses."
        for name, table in TABLES.items()
        for key in table.entries
        if key[0] in (ANY, *ARCHITECTURES) and key != (ANY, ANY, ANY) and (name, key) not in serving
    ]


def table(rows: Iterable[Resources]) -> list[str]:
    """Lines of Markdown: per kernel and GPU family, the variant with the most registers."""
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


def write_docs(rows: Iterable[Resources], quick: bool = False, path: Path = DOCS) -> None:
    """Put the table between the markers in docs/results/triton_resources.md."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{path} must have the lines {BEGIN} and {END} once each.")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    command = f"python -m benchmarks.kernel_resources {'--quick ' if quick else ''}--write-docs"
    made = f"Made by `{command}` with Triton {version('triton')}."
    path.write_text("\n".join([head + BEGIN, made, "", *table(rows), END + tail]))


class OverBudget(UserError):
    """A kernel uses more than its budget."""

    exit_code = 1


def run(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_resources", description=__doc__)
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/results/triton_resources.md")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--operations", nargs="+", choices=choice.SERVED["triton"], default=choice.SERVED["triton"])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="full size in bfloat16, for sm80 in float32 too; of the rest every configuration once",
    )
    parser.add_argument("--variants", action="store_true", help="also what differs in other constants only (hours)")
    options = parser.parse_args(arguments)
    check_process()
    from benchmarks.ahead_of_time import over_budget

    rows = compile_all(options.architectures, options.operations, options.workers, options.quick, options.variants)
    print("\n".join(table(rows)))
    problems = [problem for row in rows for problem in over_budget(row, NARROW)]
    if set(options.operations) == set(choice.SERVED["triton"]):
        problems += unused_entries([*full_size_calls(), *other_calls()])
    print(f"{len(rows)} compiled kernels")
    if options.write_docs:
        write_docs(rows, options.quick)
    if problems:
        raise OverBudget("\n".join(problems))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
