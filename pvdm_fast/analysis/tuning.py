"""The quickest configuration of every Triton kernel on this GPU: what `python -m pvdm_fast.tune` measures and keeps.

For each kernel, and each class of shapes that a network size asks of it, every candidate of the kernel's table is timed
on that network's own calls. Those that beat the configuration which comes with the package go to the user's table,
which every later process reads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvdm_fast.analysis import workload
from pvdm_fast.analysis.workload import Call
from pvdm_fast.backends import choice
from pvdm_fast.errors import UserError
from pvdm_fast.kernels import configs, launch
from pvdm_fast.kernels.configs import ConfigTable, Key
from pvdm_fast.kernels.launch import Config

# What a configuration must gain to be kept: less is within the spread of medians.
GAIN = 0.03
# Results of one kernel under two configurations differ by the order of its sums: at most some roundings of 16 bits.
AGREEMENT = 0.02
# The calls that a class of shapes is timed on: its largest, where the time goes.
CALLS = 3
ASSUMED = "sm90"  # in a dry run without a GPU
DTYPES = {name: dtype for dtype, name in configs.NAMES.items()}


class Untimed(UserError):
    """Some entries fail on this GPU; the others are measured and kept."""

    exit_code = 1


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
    try:
        inputs = [call.inputs(device, lambda storage: storage.normal_(0, 0.1)) for call in task.calls]
        present, expected = measure(task, task.present, inputs, timer)
        chosen, least = None, present * (1 - GAIN)
        for candidate in task.candidates:
            try:
                seconds, results = measure(task, candidate, inputs, timer)
            except Exception as error:  # too much shared memory, or the compiler gave up: Triton has many names for it
                say(f"  {candidate}: left out, {first_line(error)}")
                continue
            if not agree(results, expected):
                say(f"  {candidate}: left out, its results differ")
            elif seconds < least:
                chosen, least = candidate, seconds
    finally:
        task.table.asked.pop(task.key, None)
    gain = f"{present / least:.2f}x with {chosen}" if chosen else "stays as it is"
    say(f"{task}: {gain} ({1e3 * present:.3f} ms before)")
    return chosen


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@dataclass(frozen=True)
class Found:
    """What came of a task: the configuration to serve instead, or None; and what went wrong ("" for nothing)."""

    task: Task
    config: Config | None = None
    problem: str = ""


def best_of_each(
    tasks: Iterable[Task], device: torch.device, timer: Timer, say: Callable[[str], None]
) -> Iterator[Found]:
    """The best of every task; one that can't be timed as it is says so, and the next goes on.

    Raises:
        UserError: after a fault of the GPU, which takes no more work from this process.
    """
    for task in tasks:
        try:
            found = Found(task, best(task, device, timer, say))
        except Exception as error:  # whatever a kernel, the compiler or the driver raises
            found = Found(task, problem=first_line(error))
            say(f"{task}: stays as it is, it can't be timed: {found.problem}")
        yield found
        if found.problem and device.type == "cuda":
            try:
                torch.cuda.synchronize(device)
            except RuntimeError as error:
                raise UserError(
                    f"the GPU stopped at {task} ({first_line(error)}). What was found before is written: run again "
                    "with --operations to leave this one out."
                ) from error


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


def gpu_timer(function: Callable[[], object]) -> float:
    """Seconds, the median of Triton's own benchmark."""
    from triton.testing import do_bench

    return 1e-3 * float(do_bench(function, return_mode="median"))


def run_tuning(options: argparse.Namespace) -> None:
    """Do what the command line asks for.

    Raises:
        UserError: no GPU or no Triton, an unknown operation, or a table that could not be written afterwards.
    """
    device, here = torch.device("cuda"), torch.cuda.is_available()
    if not options.dry_run and (not here or choice.interpreting()):
        reason = "TRITON_INTERPRET is set: unset it" if here else "PyTorch finds none: see python -m pvdm_fast.info"
        raise UserError(f"Kernels are timed on a GPU, but {reason}; --dry-run lists what would be timed.")
    if find_spec("triton") is None:
        raise UserError("Triton is not installed: pip install triton.")
    known = choice.SERVED["triton"]
    for name in options.operations or ():
        if name not in known:
            raise UserError(f"--operations: Triton has no kernel for {name!r}; it has {', '.join(known)}")
    calls = workload.calls(options.size, DTYPES[options.dtype], options.batch, options.mixed)
    architecture = configs.architecture(device) if here else ASSUMED
    tasks = plan((call for call in calls if call.op in (options.operations or known)), architecture)
    if options.dry_run:
        for task in tasks:
            print(f"{task}: {1 + len(task.candidates)} configurations on {', '.join(map(str, task.calls))}")
        print(f"{len(tasks)} entries, {sum(1 + len(task.candidates) for task in tasks)} configurations")
        return
    path = configs.user_table()
    check_writable(path)
    kept = failed = 0
    with configs.assume(architecture):
        for found in best_of_each(tasks, device, gpu_timer, print):
            if not found.problem:  # written at once: what a run found counts, however it ends
                write_user_table([(found.task, found.config)], path)
            kept, failed = kept + (found.config is not None), failed + bool(found.problem)
    print(f"{kept} entries written to {path}")
    if failed:
        raise Untimed(f"{failed} of {len(tasks)} entries can't be timed on this GPU: they stay as they are.")


def check_writable(path: Path) -> None:
    """Make the table's folder; raises UserError where it cannot be written: found now, not after minutes of timing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path.parent}: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into the folder {path.parent}: name another with XDG_CONFIG_HOME")
