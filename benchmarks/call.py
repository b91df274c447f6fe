"""`python -m benchmarks.call`: what a call costs: each operation on tiny tensors against PyTorch's own nearest one.

On tensors of a few hundred values the arithmetic takes less than a microsecond, so this is the cost of Python, checks,
the choice of a backend, allocation and autograd. It is the CPU time of one thread, which other processes disturb least.
Ours and PyTorch's are alternated, and the medians of all rounds are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, rows
from benchmarks.report import write_section
from pvdm_fast import ops
from pvdm_fast.layout import PlaneLayout, TriplaneLayout

DOCS = Path(__file__).resolve().parents[1] / "docs" / "results" / "call.md"
HEADER = (
    "| operation | PyTorch's nearest | forward: ours, µs | PyTorch, µs | ratio"
    " | with backward: ours, µs | PyTorch, µs | ratio |"
)


@dataclass(frozen=True)
class Call:
    """One operation: two ways of computing about the same from the same tensors, and what PyTorch's way is."""

    op: str
    nearest: str
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def _pair(qkv: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v)


def _along_time(qkv: Tensor) -> Tensor:
    q, k, v = (part.permute(0, 2, 3, 1, 4) for part in qkv.flatten(2, 3).unbind(3))
    return F.scaled_dot_product_attention(q, k, v)


def calls() -> list[Call]:
    """Every operation that PyTorch has something near to, on planes of 4 x 4, 2 x 4 and 2 x 4 tokens.

    The fused ones are left out: `attention_block`, `feed_forward_block`, `space_attention_heads` and
    `time_attention_block` have no kernel on a CPU, and `triplane_project` stands for a whole transformer.
    """
    layout = TriplaneLayout(2, 4, 4)
    joint = PlaneLayout(((layout.num_tokens, 1),))
    rows_, wide, weight, bias = torch.randn(2, 4, 16), torch.randn(2, 4, 32), torch.ones(16), torch.zeros(16)
    x, scale, shift = torch.randn(1, layout.num_tokens, 32), torch.ones(32), torch.zeros(32)
    qkv, sequences = torch.randn(1, layout.num_tokens, 3, 2, 16), torch.randn(1, 4, 2, 2, 3, 2, 16)
    kernel, level = torch.randn(32, 32, 3, 3), torch.zeros(32)
    lattice, token, positions = torch.randn(1, 32, 32), torch.randn(32), torch.randn(3, 32)
    latent, matrix, offset = torch.randn(1, layout.num_tokens, 4), torch.randn(3, 32, 4), torch.zeros(3, 32)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        pictures = (
            plane.transpose(1, 2).reshape(1, -1, *size)
            for plane, size in zip(x.split([16, 8, 8], 1), ((4, 4), (2, 4), (2, 4)), strict=True)
        )
        return torch.cat([F.conv2d(p, weight, bias, padding=1).flatten(2) for p in pictures], 2).transpose(1, 2)

    def shrink(x: Tensor) -> Tensor:
        pictures = (
            plane.transpose(1, 2).reshape(1, -1, *size)
            for plane, size in zip(x.split([16, 8, 8], 1), ((4, 4), (2, 4), (2, 4)), strict=True)
        )
        return torch.cat([F.avg_pool2d(p, 2).flatten(2) for p in pictures], 2).transpose(1, 2)

    def cut(x: Tensor, token: Tensor, positions: Tensor) -> Tensor:
        sites = x.view(1, 2, 16, 32).transpose(1, 2)
        return torch.cat([sites, token.expand(1, 16, 1, 32)], 2) + positions

    def expand(planes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        xy, yt, xt = (F.linear(p, w, b) for p, w, b in zip(planes.split([16, 8, 8], 1), weight, bias, strict=True))
        return (xy.view(1, 1, 4, 4, 32) + yt.view(1, 2, 1, 4, 32) + xt.view(1, 2, 4, 1, 32)).flatten(1, 3)

    return [
        Call("add_layer_norm", "add, layer_norm", lambda a, b, w, c: ops.add_layer_norm(a, b, w, c)[1],
             lambda a, b, w, c: F.layer_norm(a + b, (16,), w, c), (rows_, rows_ + 1, weight, bias)),
        Call("geglu", "gelu", ops.geglu, F.gelu, (wide,)),
        Call("plane_norm", "group_norm", lambda a, w, c: ops.plane_norm(a, joint, w, c),
             lambda a, w, c: F.group_norm(a.transpose(1, 2), 32, w, c), (x, scale, shift)),
        Call("plane_resample", "three avg_pool2d, cat", lambda a: ops.plane_resample(a, layout, "down"), shrink, (x,)),
        Call("segment_attention", "scaled_dot_product_attention", ops.segment_attention, _pair, (qkv,)),
        Call("axial_attention", "scaled_dot_product_attention", lambda a: ops.axial_attention(a, "time"), _along_time,
             (sequences,)),
        Call("plane_conv", "three conv2d, cat", lambda a, w, c: ops.plane_conv(a, layout, w, c), convolve,
             (x, kernel, level)),
        Call("triplane_slice", "cat, add", lambda a, t, p: ops.triplane_slice(a, layout, "xy", t, p), cut,
             (lattice, token, positions)),
        Call("triplane_expand", "three linear, two adds", lambda a, w, c: ops.triplane_expand(a, layout, w, c), expand,
             (latent, matrix, offset)),
    ]  # fmt: skip


def _step(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], gradient: bool) -> Callable[[], Any]:
    if not gradient:
        return lambda: function(*tensors)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in tensors)
    upstream = torch.ones_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


def _microseconds(step: Callable[[], Any], times: int) -> float:
    start = time.thread_time()
    for _ in range(times):
        step()
    return (time.thread_time() - start) / times * 1e6


def measure(call: Call, rounds: int, times: int) -> list[dict[str, Any]]:
    """Rows of a call: forward without gradients, and forward with backward."""
    found = []
    for direction in ("forward", "both"):
        gradient = direction == "both"
        with torch.set_grad_enabled(gradient):
            steps = {
                "ours": _step(call.ours, call.tensors, gradient),
                "torch": _step(call.theirs, call.tensors, gradient),
            }
            for step in steps.values():
                _microseconds(step, times // 4 + 1)
            taken: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(rounds):
                for name, step in steps.items():
                    taken[name].append(_microseconds(step, times))
        found.append(
            {
                "time": machine.now(),
                "op": call.op,
                "nearest": call.nearest,
                "direction": direction,
                "microseconds": {name: statistics.median(values) for name, values in taken.items()},
                "spread": {name: [min(values), max(values)] for name, values in taken.items()},
                "machine": machine.facts(),
            }
        )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The newest row of each operation and direction, in Markdown."""
    newest = {(row["op"], row["direction"]): row for row in found}
    lines = [HEADER, "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for op in dict.fromkeys(op for op, _ in newest):
        cells = [op, newest[op, "forward"]["nearest"]]
        for direction in ("forward", "both"):
            ours, theirs = (newest[op, direction]["microseconds"][name] for name in ("ours", "torch"))
            cells += [f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.call", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="alternating rounds (default: 9)")
    parser.add_argument("--times", type=int, default=1000, help="calls a round (default: 1000)")
    parser.add_argument("--store", action="store_true", help="append the rows to benchmarks/results, renew the docs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = []
    for call in calls():
        for row in measure(call, options.rounds, options.times):
            found.append(row)
            if options.store:
                rows.append(row, rows.call_path("cpu"))
    print(table(found))
    if options.store:
        where = machine.facts()
        line = (
            f"{where['cpu']} ({where['cpu_family']}), one thread, PyTorch {where['torch']}, commit {where['commit']}."
        )
        write_section(DOCS, "call", f"{line}\n\n{table(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
