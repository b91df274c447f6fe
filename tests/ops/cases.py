"""One small case of every operation, in any dtype, at odd and unequal sizes: what the tests run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvdm_fast import TriplaneLayout, ops
from pvdm_fast.layout import PlaneLayout

LAYOUT = TriplaneLayout(3, 5, 7)
EVEN_LAYOUT = TriplaneLayout(2, 4, 6)
BATCH = 2


@dataclass(frozen=True)
class Case:
    """`inputs(dtype)` gives the differentiable tensors by name; `run(**inputs)` the operation's results."""

    op: str
    shapes: dict[str, tuple[int, ...]]
    run: Callable[..., Any]

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: self._draw(name, shape, generator).to(dtype) for name, shape in self.shapes.items()}

    @staticmethod
    def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return 1 + 0.2 * values if name == "weight" and len(shape) == 1 else values


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def leaves(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}


def run_with_gradients(
    case: Case, inputs: dict[str, Tensor], rounded_to: torch.dtype, change: Callable[[Tensor], Tensor] = lambda t: t
) -> dict[str, Tensor]:
    """Results and gradients by name; incoming gradients are the same for every backend, laid out by `change`."""
    inputs = leaves(inputs)
    results = as_tuple(case.run(**inputs))
    generator = torch.Generator().manual_seed(7)
    draws = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(rounded_to) for r in results]
    incoming = [change(draw.to(r)) for draw, r in zip(draws, results, strict=True)]
    gradients = torch.autograd.grad(results, list(inputs.values()), incoming)
    found = {f"output {i}": r.detach() for i, r in enumerate(results)}
    return found | {f"gradient of {n}": g for n, g in zip(inputs, gradients, strict=True)}


def rotation(length: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.linspace(0, 3, length * width).reshape(length, width)
    return angles.sin(), angles.cos()


def _norm(layout: PlaneLayout, **options: Any) -> Callable[..., Tensor]:
    return lambda x, weight, bias, scale_shift=None: ops.plane_norm(
        x, layout, weight, bias, scale_shift=scale_shift, groups=4, **options
    )


def _attention_along(axis: str) -> Callable[..., Tensor]:
    length = LAYOUT.time if axis == "time" else LAYOUT.height * LAYOUT.width
    return lambda qkv: ops.axial_attention(qkv, axis, rotation(length, 8))


N, TOKENS, C = LAYOUT.num_tokens, LAYOUT.num_lattice_tokens, 12
LATTICE = (BATCH, LAYOUT.time, LAYOUT.height, LAYOUT.width)
NORM = {"x": (BATCH, N, C), "weight": (C,), "bias": (C,)}
EVEN_NORM = {**NORM, "x": (BATCH, EVEN_LAYOUT.num_tokens, C)}
FILM = {"scale_shift": (BATCH, 2 * C)}

CASES = {
    "segment_attention-joint": Case(
        "segment_attention", {"qkv": (BATCH, N, 3, 2, 8)}, lambda qkv: ops.segment_attention(qkv)
    ),
    "segment_attention-planes": Case(
        "segment_attention", {"qkv": (BATCH, N, 3, 2, 8)}, lambda qkv: ops.segment_attention(qkv, LAYOUT.offsets)
    ),
    "axial_attention-time": Case("axial_attention", {"qkv": (*LATTICE, 3, 2, 8)}, _attention_along("time")),
    "axial_attention-space": Case("axial_attention", {"qkv": (*LATTICE, 3, 2, 8)}, _attention_along("space")),
    "axial_attention-query": Case(
        "axial_attention",
        {"qkv": (*LATTICE, 2, 2, 8), "query": (BATCH, 1, *LATTICE[2:], 2, 8)},
        lambda qkv, query: ops.axial_attention(qkv, "time", query=query),
    ),
    "plane_norm-planes": Case("plane_norm", NORM, _norm(LAYOUT)),
    "plane_norm-joint": Case("plane_norm", NORM, _norm(PlaneLayout(((LAYOUT.num_tokens, 1),)))),
    "plane_norm-film": Case("plane_norm", {**NORM, **FILM}, _norm(LAYOUT, activation=True)),
    "plane_norm-up": Case("plane_norm", {**NORM, **FILM}, _norm(LAYOUT, activation=True, resample="up")),
    "plane_norm-down": Case("plane_norm", EVEN_NORM, _norm(EVEN_LAYOUT, activation=True, resample="down")),
    "plane_conv": Case(
        "plane_conv",
        {"x": (BATCH, N, 5), "weight": (6, 5, 3, 3), "bias": (6,)},
        lambda x, weight, bias: ops.plane_conv(x, LAYOUT, weight, bias),
    ),
    **{
        f"triplane_slice-{plane}": Case(
            "triplane_slice",
            {"x": (BATCH, TOKENS, C), "token": (C,), "positions": (length + 1, C)},
            lambda x, token, positions, plane=plane: ops.triplane_slice(x, LAYOUT, plane, token, positions),
        )
        for plane, length in (("xy", LAYOUT.time), ("yt", LAYOUT.height), ("xt", LAYOUT.width))
    },
    "triplane_expand": Case(
        "triplane_expand",
        {"planes": (BATCH, N, 4), "weight": (3, C, 4), "bias": (3, C)},
        lambda planes, weight, bias: ops.triplane_expand(planes, LAYOUT, weight, bias),
    ),
    "geglu": Case("geglu", {"x": (BATCH, 9, 2 * C)}, lambda x: ops.geglu(x)),
    "add_layer_norm": Case(
        "add_layer_norm",
        {"x": (BATCH, 9, C), "residual": (BATCH, 9, C), "weight": (C,), "bias": (C,)},
        lambda x, residual, weight, bias: ops.add_layer_norm(x, residual, weight, bias),
    ),
    "add_layer_norm-alone": Case(
        "add_layer_norm",
        {"x": (BATCH, 9, C), "weight": (C,), "bias": (C,)},
        lambda x, weight, bias: ops.add_layer_norm(x, None, weight, bias)[1],
    ),
}
