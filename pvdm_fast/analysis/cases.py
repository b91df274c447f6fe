"""The registry of cases: every operation, with inputs to call it on. Tests, self-test and benchmarks share it.

One function per operation makes a case at given sizes: the shapes of its differentiable tensors, the call, and the
FLOPs of its products. Three tables hold the cases that run everywhere. `SMALL` has odd and unequal sizes that no
kernel's blocks divide. `USUAL` has sizes like the networks', which tensor cores take. `ONE_TOKEN` has the smallest.
Each table must have every operation, and a test checks that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pvdm_fast import ops
from pvdm_fast.layout import PLANE_NAMES, PlaneLayout, TriplaneLayout
from pvdm_fast.ops import costs

BATCH = 2
Draw = Callable[[int, tuple[int, ...]], Tensor]
Tables = tuple[Tensor, Tensor]


def _scaled(name: str, values: Tensor) -> Tensor:
    if name == "weight" and values.dim() == 1:  # of a norm
        return 1 + 0.1 * values
    if name == "weight" and values.dim() == 4:  # of a convolution: the result keeps unit variance
        return values / math.prod(values.shape[1:]) ** 0.5
    return 0.2 * values if name == "scale_shift" else values


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Attributes:
        op: the operation's name.
        shapes: of its differentiable tensors, by name.
        run: calls the operation on them, in that order or by name.
        flops: the fewest FLOPs that the products of a forward pass can take. A multiply-add is 2.
        scaled: makes a tensor as large as a network's, from its name and standard normal numbers.
    """

    op: str
    shapes: Mapping[str, tuple[int, ...]]
    run: Callable[..., Any]
    flops: int = 0
    scaled: Callable[[str, Tensor], Tensor] = _scaled

    def tensors(self, draw: Draw) -> dict[str, Tensor]:
        """The tensors by name, scaled like a network's. draw(index, shape) gives standard normal numbers."""
        return {name: self.scaled(name, draw(i, shape)) for i, (name, shape) in enumerate(self.shapes.items())}

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """The tensors by name, on the CPU, drawn in float64 and rounded to `dtype`."""
        generator = torch.Generator().manual_seed(seed)
        drawn = self.tensors(lambda _, shape: torch.randn(shape, generator=generator, dtype=torch.float64))
        return {name: tensor.to(dtype) for name, tensor in drawn.items()}


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """An operation's results as a tuple, even if there is one."""
    return results if isinstance(results, tuple) else (results,)


def leaves(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values as leaves, to differentiate with respect to."""
    return {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}


def run_with_gradients(
    case: Case,
    inputs: Mapping[str, Tensor],
    rounded_to: torch.dtype,
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Tensor]:
    """Results ("output 0", ...) and gradients ("gradient of x", ...) by name.

    Incoming gradients are random numbers, exact in `rounded_to`, and the same for every backend and dtype. `change`
    gives them another memory layout.
    """
    inputs = leaves(inputs)
    results = as_tuple(case.run(**inputs))
    generator = torch.Generator().manual_seed(7)
    draws = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(rounded_to) for r in results]
    incoming = [change(draw.to(r)) for draw, r in zip(draws, results, strict=True)]
    gradients = torch.autograd.grad(results, list(inputs.values()), incoming)
    found = {f"output {i}": r.detach() for i, r in enumerate(results)}
    return found | {f"gradient of {name}": g for name, g in zip(inputs, gradients, strict=True)}


def rotation(length: int, width: int) -> Tables:
    """Tables of sines and cosines of random angles, each (length, width)."""
    angles = torch.linspace(0, 3, length * width).reshape(length, width)
    return angles.sin(), angles.cos()


def segment_attention(offsets: Sequence[int], heads: int, width: int, batch: int = BATCH) -> Case:
    shapes = {"qkv": (batch, offsets[-1], 3, heads, width)}
    products = sum(
        costs.attention(batch, stop - start, stop - start, heads * width) for start, stop in pairwise(offsets)
    )
    return Case("segment_attention", shapes, lambda qkv: ops.segment_attention(qkv, offsets), products)


def axial_attention(
    axis: str, lattice: tuple[int, int, int], heads: int, width: int, batch: int = BATCH, tables: Tables | None = None
) -> Case:
    """Along "time" or "space". `tables` rotate queries and keys."""
    time, sites = lattice[0], lattice[1] * lattice[2]
    sequences, length = (sites, time) if axis == "time" else (time, sites)

    def run(qkv: Tensor) -> Tensor:
        turned = None if tables is None else (tables[0].to(qkv.device), tables[1].to(qkv.device))
        return ops.axial_attention(qkv, axis, turned)

    products = costs.attention(batch * sequences, length, length, heads * width)
    return Case("axial_attention", {"qkv": (batch, *lattice, 3, heads, width)}, run, products)


def single_query(lattice: tuple[int, int, int], heads: int, width: int, batch: int = BATCH) -> Case:
    """Axial attention along time with one query per sequence."""
    shapes = {"qkv": (batch, *lattice, 2, heads, width), "query": (batch, 1, *lattice[1:], heads, width)}
    products = costs.attention(batch * lattice[1] * lattice[2], 1, lattice[0], heads * width)
    return Case("axial_attention", shapes, lambda qkv, query: ops.axial_attention(qkv, "time", query=query), products)


def plane_norm(
    layout: PlaneLayout,
    channels: int,
    *,
    groups: int = 4,
    modulated: bool = False,
    activation: bool = False,
    resample: str | None = None,
    batch: int = BATCH,
) -> Case:
    shapes: dict[str, tuple[int, ...]]
    shapes = {"x": (batch, layout.num_tokens, channels), "weight": (channels,), "bias": (channels,)}
    if modulated:
        shapes["scale_shift"] = (batch, 2 * channels)

    def run(x: Tensor, weight: Tensor, bias: Tensor, scale_shift: Tensor | None = None) -> Tensor:
        return ops.plane_norm(
            x,
            layout,
            weight,
            bias,
            scale_shift=scale_shift,
            groups=groups,
            activation=activation,
            resample=resample,
        )

    return Case("plane_norm", shapes, run)


def plane_resample(layout: PlaneLayout, channels: int, resample: str, batch: int = BATCH) -> Case:
    shapes = {"x": (batch, layout.num_tokens, channels)}
    return Case("plane_resample", shapes, lambda x: ops.plane_resample(x, layout, resample))


def plane_conv(layout: PlaneLayout, channels: int, outputs: int, batch: int = BATCH, *, residual: bool = False) -> Case:
    shapes: dict[str, tuple[int, ...]]
    shapes = {"x": (batch, layout.num_tokens, channels), "weight": (outputs, channels, 3, 3), "bias": (outputs,)}
    products = costs.conv(batch * layout.num_tokens, channels, outputs)
    if residual:
        shapes["residual"] = (batch, layout.num_tokens, outputs)

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.plane_conv(x, layout, weight, bias, residual)

    return Case("plane_conv", shapes, run, products)


def triplane_slice(layout: TriplaneLayout, plane: str, channels: int, batch: int = BATCH) -> Case:
    length = {"xy": layout.time, "yt": layout.height, "xt": layout.width}[plane]
    shapes: dict[str, tuple[int, ...]]
    shapes = {"x": (batch, layout.num_lattice_tokens, channels), "token": (channels,)}
    shapes["positions"] = (length + 1, channels)

    def run(x: Tensor, token: Tensor, positions: Tensor) -> Tensor:
        return ops.triplane_slice(x, layout, plane, token, positions)

    return Case("triplane_slice", shapes, run)


def triplane_expand(layout: TriplaneLayout, depth: int, channels: int, batch: int = BATCH) -> Case:
    shapes: dict[str, tuple[int, ...]]
    shapes = {"planes": (batch, layout.num_tokens, depth), "weight": (3, channels, depth), "bias": (3, channels)}

    def run(planes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.triplane_expand(planes, layout, weight, bias)

    return Case("triplane_expand", shapes, run, costs.linear(batch * layout.num_tokens, depth, channels))


def geglu(tokens: tuple[int, ...], channels: int) -> Case:
    """channels: those of the result. The input has twice as many."""
    return Case("geglu", {"x": (*tokens, 2 * channels)}, lambda x: ops.geglu(x))


def add_layer_norm(tokens: tuple[int, ...], channels: int, *, residual: bool = True) -> Case:
    x, parameters = (*tokens, channels), {"weight": (channels,), "bias": (channels,)}
    if residual:
        shapes = {"x": x, "residual": x, **parameters}
        return Case(
            "add_layer_norm", shapes, lambda x, residual, weight, bias: ops.add_layer_norm(x, residual, weight, bias)
        )
    return Case(
        "add_layer_norm", {"x": x, **parameters}, lambda x, weight, bias: ops.add_layer_norm(x, None, weight, bias)[1]
    )


LAYOUT, EVEN_LAYOUT = TriplaneLayout(3, 5, 7), TriplaneLayout(2, 4, 6)
LATTICE = (LAYOUT.time, LAYOUT.height, LAYOUT.width)
SMALL = {
    "segment_attention-joint": segment_attention([0, LAYOUT.num_tokens], 2, 8),
    "segment_attention-planes": segment_attention(LAYOUT.offsets, 2, 8),
    "axial_attention-time": axial_attention("time", LATTICE, 2, 8, tables=rotation(3, 8)),
    "axial_attention-space": axial_attention("space", LATTICE, 2, 8, tables=rotation(35, 8)),
    "axial_attention-query": single_query(LATTICE, 2, 8),
    "plane_norm-planes": plane_norm(LAYOUT, 12),
    "plane_norm-joint": plane_norm(PlaneLayout(((LAYOUT.num_tokens, 1),)), 12),
    "plane_norm-film": plane_norm(LAYOUT, 12, modulated=True, activation=True),
    "plane_norm-up": plane_norm(LAYOUT, 12, modulated=True, activation=True, resample="up"),
    "plane_norm-down": plane_norm(EVEN_LAYOUT, 12, activation=True, resample="down"),
    "plane_resample-up": plane_resample(LAYOUT, 5, "up"),
    "plane_resample-down": plane_resample(EVEN_LAYOUT, 5, "down"),
    "plane_conv": plane_conv(LAYOUT, 5, 6),
    "plane_conv-residual": plane_conv(LAYOUT, 5, 6, residual=True),
    **{f"triplane_slice-{plane}": triplane_slice(LAYOUT, plane, 12) for plane in PLANE_NAMES},
    "triplane_expand": triplane_expand(LAYOUT, 4, 12),
    "geglu": geglu((BATCH, 9), 12),
    "add_layer_norm": add_layer_norm((BATCH, 9), 12),
    "add_layer_norm-alone": add_layer_norm((BATCH, 9), 12, residual=False),
}

_EVEN, _CHANNELS = TriplaneLayout(4, 8, 12), 64
_TOKENS = _EVEN.num_tokens
USUAL = {
    "segment_attention-joint": segment_attention([0, _TOKENS], 4, 32),
    "segment_attention-planes": segment_attention(_EVEN.offsets, 1, 64),
    "axial_attention-time": axial_attention("time", (16, 4, 4), 2, 64, batch=1, tables=rotation(16, 64)),
    "axial_attention-space": axial_attention("space", (2, 8, 12), 2, 64, batch=1, tables=rotation(96, 64)),
    "axial_attention-query": single_query((9, 5, 7), 2, 48, batch=1),
    "plane_norm-film": plane_norm(_EVEN, _CHANNELS, modulated=True, activation=True),
    "plane_norm-joint": plane_norm(PlaneLayout(((_TOKENS, 1),)), 128),
    "plane_norm-down": plane_norm(_EVEN, 32, modulated=True, activation=True, resample="down"),
    "plane_resample-up": plane_resample(_EVEN, _CHANNELS, "up"),
    "plane_resample-down": plane_resample(_EVEN, _CHANNELS, "down"),
    "plane_conv": plane_conv(_EVEN, _CHANNELS, _CHANNELS + 1),
    "plane_conv-residual": plane_conv(_EVEN, _CHANNELS, _CHANNELS + 1, residual=True),
    **{f"triplane_slice-{plane}": triplane_slice(_EVEN, plane, _CHANNELS) for plane in PLANE_NAMES},
    "triplane_expand": triplane_expand(_EVEN, 4, _CHANNELS),
    "geglu": geglu((BATCH, _TOKENS), _CHANNELS),
    "add_layer_norm": add_layer_norm((BATCH, _TOKENS), _CHANNELS),
}

_ONE, _POINT = TriplaneLayout(1, 1, 1), PlaneLayout(((1, 1),))
ONE_TOKEN = {
    "segment_attention": segment_attention([0, 1], 2, 8, batch=1),
    "axial_attention-time": axial_attention("time", (1, 1, 1), 2, 8, batch=1, tables=rotation(1, 8)),
    "axial_attention-space": axial_attention("space", (1, 1, 1), 2, 8, batch=1, tables=rotation(1, 8)),
    "axial_attention-query": single_query((1, 1, 1), 2, 8, batch=1),
    "plane_norm": plane_norm(_POINT, 12, activation=True, batch=1),
    "plane_norm-up": plane_norm(_POINT, 12, activation=True, resample="up", batch=1),
    "plane_resample": plane_resample(_POINT, 5, "up", batch=1),
    "plane_conv": plane_conv(_POINT, 5, 6, batch=1),
    "triplane_slice": triplane_slice(_ONE, "yt", 12, batch=1),
    "triplane_expand": triplane_expand(_ONE, 4, 12, batch=1),
    "geglu": geglu((1,), 1),
    "add_layer_norm": add_layer_norm((), 12),
}
