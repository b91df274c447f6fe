"""``python -m pvdm_fast.tune``: the quickest configuration of every Triton kernel on this GPU, measured and kept.

For each kernel, and each class of shapes that a network size asks of it, every candidate of the kernel's table is timed
on that network's own calls. Those that beat the configuration which comes with the package go to the user's table,
which every later process reads.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pvdm_fast.jobs.command import run_command  # first: a Ctrl-C while the rest is imported is one line

# isort: split
import torch
from torch import Tensor

from pvdm_fast.analysis import workload
from pvdm_fast.analysis.workload import Call
from pvdm_fast.backends import choice
from pvdm_fast.errors import UserError
from pvdm_fast.kernels import configs, launch
from pvdm_fast.kernels.configs import ConfigTable, Key
from pvdm_fast.kernels.launch import Config
from pvdm_fast.models.presets import DENOISER

# What a configuration must gain to be kept: less is within the spread of medians.
GAIN = 0.03
# Results of one kernel under two configurations differ by the order of its sums: at most some roundings of 16 bits.
AGREEMENT = 0.02
# The calls that a class of shapes is timed on: its largest, where the time goes.
CALLS = 3
ASSUMED = "sm90"  # in a dry run without a GPU
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Timer = Callable[[Callable[[], object]], float]


@dataclass
class Task:
    """One entry of one kernel's table: what serves now, what else to try, and on which calls."""

    table: ConfigTable
    key: Key
    calls: list[Call] = field(default_factory=list)

    @property
    def present(self) -> Config:
        return self.table.entries[self.table.entry_of(self.key)]

    @property
    def candidates(self) -> list[Config]:
        """Candidates that are configured as what serves now is: by the same blocks."""
        fitting = [c for c in self.table.candidates if set(c.blocks) == set(self.present.blocks)]
        return [c for i, c in enumerate(fitting) if c != self.present and c not in fitting[:i]]

    def __str__(self) -> str:
        return f"{self.table.name} {'/'.join(self.key)}"


def run_launcher(call: Call, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    results = getattr(choice.implementation("triton", call.op), call.direction)(*inputs)
    return results if isinstance(results, tuple) else (results,)


def size_of(call: Call) -> int:
    """Elements of a call's tensors."""
    return sum(math.prod(t.shape) for t in call.arguments if isinstance(t, workload.TensorSpec))


def plan(calls: Iterable[Call], architecture: str) -> list[Task]:
    """Every entry of a table that serves `calls` on `architecture`, found without running anything."""
    tasks: dict[tuple[str, Key], Task] = {}
    for call in calls:
        with configs.assume(architecture), launch.watch(lambda *launched: None):
            run_launcher(call, call.inputs("meta"))
            asked = {(name, key): table for name, table in configs.TABLES.items() for key in table.asked}
        for (name, key), table in asked.items():
            tasks.setdefault((name, key), Task(table, key)).calls.append(call)
    for task in tasks.values():
        task.calls = sorted(task.calls, key=size_of, reverse=True)[:CALLS]
    return [task for task in tasks.values() if task.candidates]


def measure(task: Task, config: Config, inputs: Sequence[Sequence[Any]], timer: Timer) -> tuple[float, list[Tensor]]:
    """Seconds of all launches of the task's kernel in its calls, and what the calls returned."""
    config = replace(config)  # an object of its own: launches are told apart by it
    task.table.asked[task.key] = config
    times: list[float] = []
    results: list[Tensor] = []

    def watcher(kernel: Any, grid: Any, arguments: Any, used: Config, constants: Any) -> None:
        launch.run(kernel, grid, arguments, used, constants)
        if used is config:
            times.append(timer(lambda: launch.run(kernel, grid, arguments, used, constants)))

    with launch.watch(watcher):
        for call, values in zip(task.calls, inputs, strict=True):
            results += [result.clone() for result in run_launcher(call, values)]
    return sum(times), results


def agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    for a, e in zip(found, expected, strict=True):
        if not torch.equal(a.isfinite(), e.isfinite()):
            return False
        a, e = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (a, e))
        if (a - e).norm() > AGREEMENT * e.norm():
            return False
    return True


def best(task: Task, device: torch.device, timer: Timer, say: Callable[[str], None]) -> Config | None:
    """The candidate that beats what serves now, or None; one that fails, or computes something else, is left out."""
    inputs = [call.inputs(device, lambda storage: storage.normal_(0, 0.1)) for call in task.calls]
    present, expected = measure(task, task.present, inputs, timer)
    chosen, least = None, present * (1 - GAIN)
    for candidate in task.candidates:
        try:
            seconds, results = measure(task, candidate, inputs, timer)
        except Exception as error:  # too much shared memory, or the compiler gave up: Triton has many names for it
            say(f"  {candidate}: left out, {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            continue
        if not agree(results, expected):
            say(f"  {candidate}: left out, its results differ")
        elif seconds < least:
            chosen, least = candidate, seconds
    del task.table.asked[task.key]
    gain = f"{present / least:.2f}x with {chosen}" if chosen else "stays as it is"
    say(f"{task}: {gain} ({1e3 * present:.3f} ms before)")
    return chosen


def write_user_table(found: Iterable[tuple[Task, Config | None]], path: Path) -> None:
    """Put what was found into the user's table, beside what it holds of other entries; a damaged one is replaced."""
    from pvdm_fast.jobs.files import whole_file

    try:
        tables = configs.read_user_table(path)
    except UserError:
        tables = {}
    for task, config in found:
        entries = tables.setdefault(task.table.name, {})
        entries.pop("/".join(task.key), None)
        if config is not None:
            entries["/".join(task.key)] = asdict(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(
            json.dumps({name: entries for name, entries in tables.items() if entries}, indent=1) + "\n"
        )


def make_parser() -> argparse.ArgumentParser:
    from pvdm_fast.jobs import numbers
    from pvdm_fast.jobs.arguments import Parser

    parser = Parser(
        prog="python -m pvdm_fast.tune",
        description="Times every Triton kernel's configurations on this GPU, with the shapes of a network size. What "
        f"beats the package's own by {GAIN:.0%} is kept in {configs.user_table()}, which every later process reads.",
    )
    parser.add_argument("--size", choices=DENOISER, default="base", help="of the networks (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--mixed", action="store_true", help="weights in float32, as in training with autocast")
    parser.add_argument(
        "--batch", type=numbers.BATCH, default=1, metavar="N", help="clips at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--operations", nargs="+", choices=choice.SERVED["triton"], default=choice.SERVED["triton"], metavar="OP",
        help="only these (default: all)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="list what would be timed; needs no GPU")
    return parser


def gpu_timer(function: Callable[[], object]) -> float:
    """Seconds, the median of Triton's own benchmark."""
    from triton.testing import do_bench

    return 1e-3 * float(do_bench(function, return_mode="median"))


def run_tuning(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    device, here = torch.device("cuda"), torch.cuda.is_available()
    if not options.dry_run and (not here or choice.interpreting()):
        reason = "TRITON_INTERPRET is set: unset it" if here else "PyTorch finds none: see python -m pvdm_fast.info"
        raise UserError(f"Kernels are timed on a GPU, but {reason}; --dry-run lists what would be timed.")
    if find_spec("triton") is None:
        raise UserError("Triton is not installed: pip install triton.")
    calls = workload.calls(options.size, DTYPES[options.dtype], options.batch, options.mixed)
    architecture = configs.architecture(device) if here else ASSUMED
    tasks = plan((call for call in calls if call.op in options.operations), architecture)
    if options.dry_run:
        for task in tasks:
            print(f"{task}: {1 + len(task.candidates)} configurations on {', '.join(map(str, task.calls))}")
        print(f"{len(tasks)} entries, {sum(1 + len(task.candidates) for task in tasks)} configurations")
        return
    with configs.assume(architecture):
        found = [(task, best(task, device, gpu_timer, print)) for task in tasks]
    write_user_table(found, configs.user_table())
    print(f"{sum(config is not None for _, config in found)} entries written to {configs.user_table()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(lambda: run_tuning(arguments))


if __name__ == "__main__":
    sys.exit(main())
