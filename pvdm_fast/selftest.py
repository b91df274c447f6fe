"""Compares every backend that runs here with the reference, in about a minute: `python -m pvdm_fast.selftest`.

Forward and every gradient of every operation, in float32, bfloat16 and float16, against the float64 reference on the
CPU. What it prints says what was compared where: attach it to a report about a GPU. The exit code is 1 where something
is wrong, 2 where nothing could be compared. On a GPU the first run also compiles Triton's kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pvdm_fast.jobs.command import run_command  # first: a Ctrl-C while the rest is imported is one line

# isort: split
import torch
from torch import Tensor

from pvdm_fast import info, ops
from pvdm_fast.backends import choice
from pvdm_fast.backends.choice import KERNEL_DTYPES, OPERATIONS, use_backend
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.arguments import Parser
from pvdm_fast.layout import PlaneLayout, TriplaneLayout

# Relative 2-norm of the difference. Results are rounded once to their dtype: half a unit in the last place, and in
# float32 the sums of some thousand terms. Attention by tensor cores also rounds what lies between its two products, and
# convolution's gradient is a sum of rounded parts: two or three roundings.
ONCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
THRICE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
ROUNDED_BETWEEN = ("segment_attention", "axial_attention", "plane_conv")


class Failed(UserError):
    """A kernel is wrong here."""

    exit_code = 1


@dataclass(frozen=True)
class Case:
    """Shapes of the differentiable tensors by name, and the operation on them."""

    op: str
    shapes: Mapping[str, tuple[int, ...]]
    run: Callable[..., Any]

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        draws = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in self.shapes.items()}
        return {n: draw.to(dtype) for n, draw in draws.items()}


ODD, EVEN = TriplaneLayout(3, 5, 7), TriplaneLayout(4, 8, 12)
TOKENS, CHANNELS = EVEN.num_tokens, 64


def _norm(layout: PlaneLayout, channels: int, **options: Any) -> Case:
    shapes = {"x": (2, layout.num_tokens, channels), "weight": (channels,), "bias": (channels,)}
    shapes |= {"scale_shift": (2, 2 * channels)} if options else {}
    return Case("plane_norm", shapes, lambda x, **others: ops.plane_norm(x, layout, groups=4, **others, **options))


def _attention(offsets: Sequence[int], heads: int, width: int) -> Case:
    shapes = {"qkv": (2, offsets[-1], 3, heads, width)}
    return Case("segment_attention", shapes, lambda qkv: ops.segment_attention(qkv, offsets))


def _axis(axis: str, lattice: tuple[int, int, int], width: int) -> Case:
    length = lattice[0] if axis == "time" else lattice[1] * lattice[2]
    angles = torch.linspace(0, 3, length * width).reshape(length, width)

    def along(qkv: Tensor) -> Tensor:
        return ops.axial_attention(qkv, axis, (angles.sin().to(qkv.device), angles.cos().to(qkv.device)))

    return Case("axial_attention", {"qkv": (1, *lattice, 3, 2, width)}, along)


def _lattice_cases(layout: TriplaneLayout, channels: int) -> Iterator[Case]:
    x, n = (2, layout.num_lattice_tokens, channels), layout.num_tokens
    for plane, length in (("xy", layout.time), ("yt", layout.height), ("xt", layout.width)):
        shapes = {"x": x, "token": (channels,), "positions": (length + 1, channels)}
        yield Case("triplane_slice", shapes, lambda x, plane=plane, **o: ops.triplane_slice(x, layout, plane, **o))
    shapes = {"planes": (2, n, 4), "weight": (3, channels, 4), "bias": (3, channels)}
    yield Case("triplane_expand", shapes, lambda planes, **o: ops.triplane_expand(planes, layout, **o))
    shapes = {"x": (2, n, channels), "weight": (channels + 1, channels, 3, 3), "bias": (channels + 1,)}
    yield Case("plane_conv", shapes, lambda x, **o: ops.plane_conv(x, layout, **o))
    yield Case("geglu", {"x": (2, n, 2 * channels)}, ops.geglu)
    shapes = {"x": (2, n, channels), "residual": (2, n, channels), "weight": (channels,), "bias": (channels,)}
    yield Case("add_layer_norm", shapes, ops.add_layer_norm)


# Odd sizes that no kernel's blocks divide, and sizes like the networks', which tensor cores take.
CASES = (
    *(_attention(ODD.offsets, 2, 8), _attention([0, TOKENS], 4, 32), _attention(EVEN.offsets, 1, 64)),
    *(_axis("time", (3, 5, 7), 8), _axis("time", (16, 4, 4), 64), _axis("space", (2, 8, 12), 64)),
    Case(
        "axial_attention",
        {"qkv": (1, 9, 5, 7, 2, 2, 48), "query": (1, 1, 5, 7, 2, 48)},
        lambda qkv, query: ops.axial_attention(qkv, "time", query=query),
    ),
    *(_norm(ODD, 12), _norm(EVEN, CHANNELS, activation=True), _norm(PlaneLayout(((TOKENS, 1),)), 128)),
    *(_norm(ODD, 24, activation=True, resample="up"), _norm(EVEN, 32, activation=True, resample="down")),
    *(*_lattice_cases(ODD, 20), *_lattice_cases(EVEN, CHANNELS)),
)


def run(case: Case, inputs: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients, on the CPU; incoming gradients are random numbers of `dtype`."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    results = case.run(**leaves)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(dtype) for r in results]
    gradients = torch.autograd.grad(
        results, list(leaves.values()), [d.to(r) for d, r in zip(draws, results, strict=True)]
    )
    return [tensor.detach().cpu() for tensor in (*results, *gradients)]


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative, in the 2-norm; infinite where a value is not finite or the shape is another."""
    if actual.shape != expected.shape or not torch.isfinite(actual).all():
        return float("inf")
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def compare(op: str, backend: str, dtype: torch.dtype, device: str) -> tuple[float, str]:
    """The worst error of an operation's cases, and what went wrong ("" where all is well)."""
    worst = 0.0
    for case in CASES:
        if case.op != op:
            continue
        inputs = case.inputs(dtype)
        with use_backend("reference"):
            expected = run(case, {name: tensor.double() for name, tensor in inputs.items()}, dtype)
        there = {name: tensor.to(device) for name, tensor in inputs.items()}
        try:
            with use_backend(backend):
                actual, again = run(case, there, dtype), run(case, there, dtype)
        except Exception as problem:  # whatever a kernel or compiler raises is the finding
            return float("inf"), f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
        worst = max(worst, *(error(a, e) for a, e in zip(actual, expected, strict=True)))
        if not all(torch.equal(a, b) for a, b in zip(actual, again, strict=True)):
            return worst, f"a second run gave other bits (shapes {list(case.shapes.values())})"
    return worst, "" if worst <= allowed(op, dtype) else "too far from the reference"


def allowed(op: str, dtype: torch.dtype) -> float:
    return (THRICE if op in ROUNDED_BETWEEN else ONCE)[dtype]


def check(device: str) -> tuple[int, int]:
    """Print a line for each operation, backend and dtype. Returns how many ran, and how many of those failed."""
    ran = failed = 0
    print(f"{'operation':<18}{'backend':<9}{'dtype':<10}{'error':<9}{'allowed':<9}")
    for backend in choice.BACKENDS[1:]:
        if reason := choice.unavailable(backend):
            print(f"{'all':<18}{backend:<9}not run: {reason}")
            continue
        for op in OPERATIONS:
            line = f"{op:<18}{backend:<9}"
            if reason := choice.why_not(backend, op, torch.empty(0, device=device)):
                print(f"{line}not run: {reason}")
                continue
            for dtype in KERNEL_DTYPES:
                worst, problem = compare(op, backend, dtype, device)
                ran, failed = ran + 1, failed + bool(problem)
                name = str(dtype).removeprefix("torch.")
                result = f"{name:<10}{worst:<9.1e}{allowed(op, dtype):<9.1e}"
                print(line + result + (f"FAILED: {problem}" if problem else "ok"), flush=True)
    return ran, failed


def make_parser() -> Parser:
    parser = Parser(prog="python -m pvdm_fast.selftest", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default here: {default}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:

    def test() -> None:
        device = make_parser().parse_args(arguments).device
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("No GPU is available to PyTorch: run with --device cpu, or on a machine with one.")
        print(*info.machine(info.collect()), "", sep="\n")
        # tf32 would hide faults in float32 products.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        ran, failed = check(device)
        if not ran:
            raise UserError(f"No backend but the reference runs on {device}: nothing was compared.")
        if failed:
            raise Failed(f"{failed} of {ran} are wrong.")
        print(f"\nAll {ran} are right.")

    return run_command(test)


if __name__ == "__main__":
    sys.exit(main())
