"""`python -m benchmarks.traffic --write-docs`: what our kernels and the release's way launch, and the bytes they move.

Computed, not measured. Both networks run on shapes alone, at full size, and every operation that reaches PyTorch is
counted. For each of this package's operations its Triton launcher runs too, and its launches are watched. The same
rules apply to both sides:

- **Launches.** Each ATen operation that computes or copies is one launch. Views and allocations are none. Some ATen
  operations really launch several kernels (a group norm three), so the release's count is a lower bound. On our side,
  each kernel launch counts as one, and so does each ATen operation in a launcher.
- **Passes.** A forward pass is one of sampling's, without a gradient, after the first: what the first keeps for the
  others (the joined weights of the time embedding's layers) is there.
- **Bytes.** A launch reads each of its tensors once and writes each result once. What a kernel reads again is assumed
  to come from a cache. A tensor expanded by stride 0 counts as what is in memory.
- **Least bytes** (of operations and blocks): inputs, weights, results and their gradients once each, as if everything
  in between stayed in registers. In a backward pass every input counts, even if its gradient doesn't need it.
- **FLOPs.** Only products, as each side computes them. A multiply-add is 2.
- **Least time.** For each operation, the longer of its bytes at memory speed and its FLOPs at the bf16 peak. These are
  summed. Launches are free in this model, so real times exceed it the more, the smaller the operations are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from benchmarks import floors
from benchmarks.cases import all_cases
from benchmarks.measure import Runner
from benchmarks.registry import Case, Setting
from pvdm_fast.analysis.flops import operation_flops, product_flops
from pvdm_fast.analysis.recorder import Recorder, name_of, own_operation
from pvdm_fast.backends import choice
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.command import run_command
from pvdm_fast.nn import copies, planes, recomputed, residual

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results" / "gpu_traffic.md"
MARKER = "traffic"
# Bytes and bf16 FLOPs per second. H100: as measured elsewhere on one. A100: assumed, from its 2.0 TB/s and 312 TFLOP/s.
GPUS = {"H100": (3.0e12, 790e12), "A100": (1.5e12, 260e12)}
ARCHITECTURE = "sm90"  # its configurations decide how many programs, and so partial sums, there are
ALLOCATIONS = ("empty", "new_empty", "lift_fresh", "_unsafe_view", "_local_scalar_dense", "promote_types")
RUNNERS = ("ours", "eager", "sdpa")
WITH_VALUES = ("sampler step",)  # a scheduler reads numbers, so it can't run on shapes alone; it is two denoiser passes


@dataclass(frozen=True)
class Item:
    """One operation: its launches, the bytes they move, the FLOPs of its products."""

    name: str
    launches: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class Total:
    """The sum over a sequence of items. seconds: the least, by GPU."""

    launches: int
    bytes: int
    flops: int
    seconds: dict[str, float]

    @classmethod
    def of(cls, items: Sequence[Item]) -> Total:
        seconds = {
            gpu: sum(max(item.bytes / bandwidth, item.flops / peak) for item in items)
            for gpu, (bandwidth, peak) in GPUS.items()
        }
        return cls(sum(i.launches for i in items), sum(i.bytes for i in items), sum(i.flops for i in items), seconds)


def size_in_memory(tensor: Tensor) -> int:
    """Bytes of the distinct elements of a tensor."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


def distinct_bytes(values: Iterable[Any]) -> int:
    """Bytes of the tensors among `values`. A tensor that appears twice counts once."""
    tensors = {
        (t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.stride()): t
        for t in tree_iter(tuple(values))
        if isinstance(t, Tensor)
    }
    return sum(map(size_in_memory, tensors.values()))


def is_launch(function: Any) -> bool:
    """Whether an operation computes or copies. Views, allocations and PyTorch's internal queries (prim) don't."""
    returns = function._schema.returns
    view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return function.namespace == "aten" and not view and not name_of(function).startswith(ALLOCATIONS)


def is_copy(function: Any, arguments: tuple[Any, ...], result: Any) -> bool:
    """Whether an operation such as `contiguous`, which may give a view, has copied. Inside launchers, below other
    modes, these arrive whole."""
    if name_of(function) not in ("contiguous", "reshape", "to", "flatten"):
        return False
    return result.untyped_storage()._cdata != arguments[0].untyped_storage()._cdata


def aten_item(function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> Item:
    """Reads its arguments and writes its results. What is overwritten unread (copy_, fill_, zero_) is only
    written."""
    name = name_of(function)
    overwrites = name in ("copy_", "fill_", "zero_")
    read = distinct_bytes((arguments[1:] if overwrites else arguments, options))
    return Item(
        name=name,
        launches=1,
        bytes=read + distinct_bytes([result]),
        flops=product_flops(function, arguments, options, result),
    )


class Traffic(Recorder):
    """Collects an Item for every operation that reaches PyTorch while it is active, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[Item] = []

    def note(self, function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        if own := own_operation(function):
            self.items.append(launcher_item(*own, arguments))
        elif is_launch(function) or is_copy(function, arguments, result):
            self.items.append(aten_item(function, arguments, options, result))


def launcher_item(op: str, direction: str, arguments: tuple[Any, ...]) -> Item:
    """What the Triton launcher of an operation launches for these arguments."""
    from pvdm_fast.kernels.launch import watch

    *inputs, _backend = arguments
    moved: list[int] = []
    with Traffic() as glue, watch(lambda kernel, grid, given, *_: moved.append(distinct_bytes(given))):
        getattr(choice.implementation("triton", op), direction)(*inputs)
    return Item(
        name=op if direction == "forward" else f"{op}_{direction}",
        launches=len(moved) + len(glue.items),
        bytes=sum(moved) + sum(item.bytes for item in glue.items),
        flops=operation_flops(op, direction, inputs),
    )


def count(run: Callable[[], object]) -> list[Item]:
    """The items of `run()`. In a FakeTensorMode nothing is computed."""
    with Traffic() as traffic:
        run()
    return traffic.items


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Tensors without values. Everything that depends on the device is chosen as on ARCHITECTURE with Triton.

    Raises:
        UserError: Triton isn't installed.
    """
    if find_spec("triton") is None:
        raise UserError("Triton is not installed, so its launches cannot be counted: pip install triton.")
    from pvdm_fast.kernels import configs

    with ExitStack() as stack:
        stack.enter_context(configs.assume(ARCHITECTURE))
        stack.enter_context(
            patch.object(choice, "serves", lambda backend, op, *_: backend == "triton" and op in choice.SERVED[backend])
        )
        # Tensors here are the CPU's by name, but pieces are those of a GPU, and embeddings share a product as there.
        stack.enter_context(patch.object(recomputed, "PIECE_ON_CPU", recomputed.PIECE))
        stack.enter_context(patch.object(residual, "JOINED", frozenset({"cpu"})))
        stack.enter_context(patch.object(planes, "CHANNELS_LAST", frozenset({"cpu"})))
        stack.enter_context(FakeTensorMode())
        yield


def count_runner(runner: Runner, direction: str) -> Total:
    """What one direction of a runner launches, and the bytes it moves."""
    if direction != "forward":
        runner.gradients = [torch.empty_like(result) for result in runner.run()]
        return Total.of(count(runner.step(direction)))
    with copies.kept():
        runner.infer()
        return Total.of(count(runner.step(direction)))


@dataclass(frozen=True)
class Row:
    """One direction of a case, by runner. floor: the least it needs."""

    case: Case
    direction: str
    shape: str
    totals: dict[str, Total]
    floor: floors.Work


def rows_of(case: Case, setting: Setting) -> list[Row]:
    """Count every direction of a case. "both" only if the case has no separate backward."""
    directions = [d for d in case.directions if d != "both" or "backward" not in case.directions]
    with shapes_alone():
        prepared = case.prepare(replace(setting, shapes_only=True))
        prepared.written = sum(result.nbytes for result in prepared.runners["ours"].infer())
        found = {
            direction: {
                name: count_runner(prepared.runners[name], direction) for name in RUNNERS if name in prepared.runners
            }
            for direction in directions
        }
        return [Row(case, d, prepared.shape, totals, prepared.work(d)) for d, totals in found.items()]


def operations_table(rows: Iterable[Row]) -> list[str]:
    """Lines of Markdown: bytes of single operations and blocks, against the least possible."""
    lines = [
        "| operation | direction | shape | least, MB | ours, MB | eager, MB | eager / ours | launches ours / eager |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ours, eager = row.totals["ours"], row.totals["eager"]
        lines.append(
            f"| {row.case.name} | {row.direction} | {row.shape} | {row.floor.bytes / 1e6:.1f} | "
            f"{ours.bytes / 1e6:.1f} | {eager.bytes / 1e6:.1f} | {eager.bytes / ours.bytes:.1f}× | "
            f"{ours.launches} / {eager.launches} |"
        )
    return lines


def networks_table(rows: Iterable[Row]) -> list[str]:
    """Lines of Markdown: launches, bytes, FLOPs and least times of whole networks."""
    names = {"ours": "ours", "eager": "release's way", "sdpa": "release's way with SDPA"}
    lines = [
        f"| network | direction | computed by | launches | GB moved | TFLOP | {' | '.join(f'{g}, ms' for g in GPUS)} |",
        f"| --- | --- | --- | --- | --- | --- |{' --- |' * len(GPUS)}",
    ]
    for row in rows:
        direction = "forward and backward" if row.direction == "both" else row.direction
        for name, total in row.totals.items():
            times = " | ".join(f"{1e3 * total.seconds[gpu]:.2f}" for gpu in GPUS)
            lines.append(
                f"| {row.case.name} | {direction} | {names[name]} | {total.launches} | {total.bytes / 1e9:.2f} | "
                f"{total.flops / 1e12:.2f} | {times} |"
            )
    return lines


def report(setting: Setting, only: str = "") -> str:
    """The tables, in Markdown, of the cases whose names contain `only`."""
    cases = [case for name, case in all_cases().items() if only in name and name not in WITH_VALUES]
    rows = [row for case in cases for row in rows_of(case, setting)]
    rates = "; ".join(f"{gpu} {b / 1e12:.1f} TB/s and {f / 1e12:.0f} TFLOP/s" for gpu, (b, f) in GPUS.items())
    lines = [
        f"**Computed, not measured**: no GPU has run this. Size {setting.size}, batch {setting.clips}, "
        f"{str(setting.dtype).removeprefix('torch.')}, configurations of {ARCHITECTURE}. Least times assume {rates}, "
        "and nothing for a launch. The rules are in `benchmarks/traffic.py`.",
        "",
        *networks_table(row for row in rows if row.case.kind == "network"),
        "",
        *operations_table(row for row in rows if row.case.kind != "network"),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.traffic",
        description="Count launches, bytes and FLOPs of our kernels and of the release's way. Computed, not measured.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--size", choices=("tiny", "small", "base"), default="base", help="of the networks")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--write-docs", action="store_true", help=f"write the tables to {DOCUMENT.name}")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    text = report(Setting(options.size, torch.bfloat16), options.only)
    print(text)
    if options.write_docs:
        from benchmarks.report import write_section

        write_section(DOCUMENT, MARKER, text)


if __name__ == "__main__":
    sys.exit(main())
