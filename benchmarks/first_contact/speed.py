"""The parts that measure: peaks of the machine, and every case of the benchmarks against its rivals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import floors
from benchmarks.cases import all_cases
from benchmarks.first_contact.context import Context, Wrong, importable
from benchmarks.measure import (
    Disagreement,
    Prepared,
    Runner,
    Timings,
    alternate,
    check_agreement,
    outcome,
    record_backends,
)
from benchmarks.registry import Case, Setting
from pvdm_fast.analysis.agreement import PRECISIONS, tf32, told
from pvdm_fast.analysis.comparison import relative_error

SDPA = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
TF32_ROUNDING = 1e-3  # of products of operands with 11 bits; where eager is as good as exact
BEFORE_A_CASE = 2.0  # seconds that must be left
WORKING_SETS = (64 << 20, 1 << 30)  # in a large cache, and in memory
NEEDS_DIFFUSERS = ("sampler step",)  # its scheduler


def peaks(context: Context) -> None:
    """The best rates of products in every precision, and of memory."""
    for precision in ("bfloat16", "float32", "tf32", "float16"):
        if (precision == "tf32" and context.device == "cpu") or (precision == "float16" and context.dry):
            continue
        with tf32(precision == "tf32"):
            rate = floors.gemm_peak(PRECISIONS[precision], context.device)
        context.add("products", {"precision": precision, "flops_per_second": rate})
        print(f"{precision}: {rate / 1e12:.1f} TFLOP/s")
    for size in WORKING_SETS[:1] if context.dry else WORKING_SETS:
        rate = floors.bandwidth(size, context.device)
        context.add("memory", {"bytes": size, "bytes_per_second": rate})
        print(f"{size >> 20} MiB: {rate / 1e9:.0f} GB/s")


@dataclass(frozen=True)
class Measurement:
    """A case in a precision; compiled: with torch.compile of the eager computation among its rivals."""

    case: Case
    precision: str
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.case.name}, {self.precision}{', with torch.compile' if self.compiled else ''}"


class SeveralInputs(Runner):
    """Takes other values as its inputs before each timing, outside the clock: its own, moved on."""

    def step(self, direction: str) -> Callable[[], object]:
        with torch.no_grad():
            for tensor in self.inputs:
                tensor.copy_(tensor.flatten().roll(997).view_as(tensor))
        return super().step(direction)


def operations(context: Context) -> None:
    """Every operation and block."""
    _measure_all(context, [case for case in all_cases().values() if case.kind != "network"], to_compile=20)


def networks(context: Context) -> None:
    """Every network; the denoiser first."""
    _measure_all(context, [case for case in all_cases().values() if case.kind == "network"], to_compile=90)


def _measure_all(context: Context, cases: Sequence[Case], to_compile: float) -> None:
    """bf16 of all cases first, which is what people train and sample in; torch.compile last, where as many seconds as
    `to_compile` are left for it."""
    if not importable("diffusers"):
        context.keep(not_run=[f"{name}: its scheduler needs diffusers: install it" for name in NEEDS_DIFFUSERS])
        cases = [case for case in cases if case.name not in NEEDS_DIFFUSERS]
    precisions = ["bfloat16"] if context.dry else ["bfloat16", "tf32", "float16", "float32"]
    if context.device == "cpu":
        precisions = [name for name in precisions if name in ("bfloat16", "float32")]
    wanted = [Measurement(case, precision) for precision in precisions for case in cases]
    compiled = [] if context.dry else [Measurement(case, "bfloat16", compiled=True) for case in cases]
    context.keep(planned=len(wanted) + len(compiled))
    # A case has up to three directions, and is set up and compared first.
    budget = 0.02 if context.dry else min(0.5, context.left() / (12 * len(wanted)))
    for one in context.while_time(wanted, least=BEFORE_A_CASE):
        _measure_one(context, one, budget)
    for one in context.while_time(compiled, least=to_compile):
        _measure_one(context, one, budget)
    if problems := context.found.get("problems"):
        raise Wrong(f"{len(problems)} cases failed, the first {problems[0]['case']}: {problems[0]['problem']}")


def _measure_one(context: Context, one: Measurement, budget: float) -> None:
    """Write a case's rows down, or why there are none; only a fault of the GPU ends the part."""
    try:
        rows = measure(one, context, budget)
    except torch.OutOfMemoryError as problem:
        context.add("too_large", {"case": str(one), "problem": told(problem)})
        torch.cuda.empty_cache()
        return
    except Exception as problem:  # of ours or of a rival: said, and the next goes on
        print(f"{one}: {told(problem)}", flush=True)
        if one.compiled:  # ours was measured before: PyTorch's compiler wants one of C++, Python's headers, or more
            context.keep(not_run=[*context.found.get("not_run", []), f"{one}: {told(problem)}"])
        else:
            context.add("problems", {"case": str(one), "problem": told(problem)})
        context.synchronize()
        return
    for row in rows:
        context.add("rows", row)
        times = ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in row["median"].items())
        print(f"{one}, {row['direction']}: {times}", flush=True)


def measure(one: Measurement, context: Context, budget: float) -> list[dict[str, Any]]:
    """A row for each direction of a case: agreement first, then medians of alternating rounds.

    Raises:
        Disagreement: ours computes something else than the baseline.
    """
    case, device = one.case, context.device
    setting = Setting(context.size, PRECISIONS[one.precision], device, one.compiled)
    prepared = case.prepare(setting)
    differentiate = case.directions != ("forward",)
    with tf32(False), record_backends() as served:
        errors = check_agreement(prepared, case.kind, differentiate=differentiate)
    with tf32(one.precision == "tf32"):
        if one.precision == "tf32":
            errors = _tf32_errors(prepared, differentiate)
        runners, left_out = _rivals(prepared, differentiate)
        return [
            _row(one, prepared, direction, alternate(runners, direction, device, budget=budget))
            | {
                "errors": errors,
                "backends": dict(served),
                "left_out": left_out,
                "memory": {name: memory(runner, direction) for name, runner in runners.items()}
                if device == "cuda"
                else {},
            }
            for direction in case.directions
        ]


def _row(one: Measurement, prepared: Prepared, direction: str, timings: Timings) -> dict[str, Any]:
    needed = prepared.work(direction)
    return {
        "case": one.case.name,
        "kind": one.case.kind,
        "direction": direction,
        "precision": one.precision,
        "shape": prepared.shape,
        "rounds": len(timings.seconds["ours"]),
        "median": {name: timings.median(name) for name in timings.seconds},
        "spread": {name: timings.spread(name) for name in timings.seconds},
        "ratio": {name: timings.ratio(name)[1] for name in timings.seconds if name != "ours"},
        "flops": needed.flops,
        "bytes": needed.bytes,
    }


def _rivals(prepared: Prepared, differentiate: bool) -> tuple[dict[str, Runner], list[str]]:
    """What is timed: all runners but the float32 truth, and SDPA by each of its fused kernels; and what doesn't run."""
    found = {name: runner for name, runner in prepared.runners.items() if name != "eager fp32"}
    left_out = []
    for name, backend in SDPA.items():
        if "sdpa" in found:
            runner = replace(found["sdpa"], run=_within(backend, found["sdpa"].run))
            try:
                outcome(runner, differentiate)
                found[name] = runner
            except RuntimeError as problem:  # PyTorch has no kernel of this kind for the dtype, device or width
                left_out.append(f"{name}: {told(problem)}")
    return {name: SeveralInputs(**vars(runner)) for name, runner in found.items()}, left_out


def _within(backend: SDPBackend, run: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    def restricted() -> Sequence[Tensor]:
        with sdpa_kernel(backend):
            return run()

    return restricted


def _tf32_errors(prepared: Prepared, differentiate: bool) -> dict[str, dict[str, float]]:
    """Errors in tf32 against float32 without it; ours may have twice eager's."""
    with tf32(False):
        expected, _ = outcome(prepared.runners["eager"], differentiate)
    errors = {}
    for name in ("ours", "eager"):
        found, _ = outcome(prepared.runners[name], differentiate)
        errors[name] = {key: relative_error(found[key], value) for key, value in expected.items()}
    for key, error in errors["ours"].items():
        allowed = 2 * max(errors["eager"][key], TF32_ROUNDING)
        if not error <= allowed:
            raise Disagreement(f"{key} in tf32: ours differs by {error:.2e} from float32, allowed {allowed:.2e}")
    return errors


def memory(runner: Runner, direction: str) -> int:
    """Bytes of the GPU that one run takes at most, above what stood before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner.step(direction)()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
