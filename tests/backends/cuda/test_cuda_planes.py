"""The CUDA kernels of plane_norm and triplane_slice on the host stand-in: every gradient, three schedules."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from comparison import assert_close
from inputs import DTYPES, poisoned_empty, transposed
from tolerances import NORM_OF_LARGE_MEAN, OPERATION
from torch import Tensor

from pvdm_fast.backends.cuda import plane_norm, triplane_slice
from pvdm_fast.backends.reference import plane_norm as norm_reference
from pvdm_fast.backends.reference import triplane_slice as slice_reference
from pvdm_fast.layout import PlaneLayout, TriplaneLayout

ODD, EVEN = TriplaneLayout(3, 5, 7), TriplaneLayout(4, 6, 10)


def compare(
    device: ModuleType, run: Callable[[], tuple[Tensor, ...]], expected: tuple[Tensor, ...], **names: Any
) -> None:
    """All three schedules give the same bits, and equal the reference."""
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned_empty)
        for order in (0, 1, 2):
            device.set_schedule(order)
            results.append(run())
    device.set_schedule(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), "the order of threads shows"
    for i, (actual, right) in enumerate(zip(results[0], expected, strict=True)):
        assert_close(actual, right, OPERATION[actual.dtype], f"result {i} {names}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("layout", "channels", "groups", "modulated", "activation", "resample", "change"),
    [
        (ODD, 12, 4, False, False, 0, None),
        (PlaneLayout(((71, 1),)), 32, 32, False, False, 0, None),
        (ODD, 64, 8, True, True, 0, transposed),
        (EVEN, 24, 4, True, True, 1, None),
        (EVEN, 40, 8, False, True, -1, None),
        (EVEN, 16, 2, True, False, -1, transposed),
        (PlaneLayout(((9, 11),)), 2304, 32, False, True, 0, None),
    ],
)
def test_plane_norm(
    device: ModuleType,
    dtype: torch.dtype,
    layout: Any,
    channels: int,
    groups: int,
    modulated: bool,
    activation: bool,
    resample: int,
    change: Callable[[Tensor], Tensor] | None,
) -> None:
    change = change or (lambda t: t)
    tokens = layout.num_tokens
    x = change((torch.randn(2, tokens, channels) + 3).to(dtype))
    after = tokens * 4 if resample > 0 else tokens // 4 if resample < 0 else tokens
    grad = change(torch.randn(2, after, channels).to(dtype))
    weight, bias = 1 + 0.2 * torch.randn(channels), torch.randn(channels)
    scale_shift = torch.randn(2, 2 * channels) if modulated else None
    options = (layout.sizes, groups, 1e-5, activation, resample)

    def run() -> tuple[Tensor, ...]:
        y, mean, rstd = plane_norm.forward(x, weight, bias, scale_shift, *options)
        back = plane_norm.backward(grad, x, weight, bias, scale_shift, mean, rstd, *options[:2], *options[3:])
        return y, mean, rstd, *back

    wide = [None if t is None else t.double() for t in (x, weight, bias, scale_shift)]
    y, mean, rstd = norm_reference.forward(*wide, *options)  # type: ignore[arg-type]
    back = norm_reference.backward(grad.double(), *wide, mean, rstd, *options[:2], *options[3:])  # type: ignore[arg-type]
    compare(device, run, (y, mean, rstd, *back))


def test_a_large_mean_costs_no_accuracy(device: ModuleType) -> None:
    x = torch.randn(1, ODD.num_tokens, 16) + 1000
    options = (ODD.sizes, 4, 1e-5, False, 0)
    y, _, _ = plane_norm.forward(x, torch.ones(16), torch.zeros(16), None, *options)
    expected, _, _ = norm_reference.forward(
        x.double(), torch.ones(16).double(), torch.zeros(16).double(), None, *options
    )
    assert_close(y, expected, NORM_OF_LARGE_MEAN, "y")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plane", ["xy", "yt", "xt"])
@pytest.mark.parametrize(("sizes", "channels"), [((3, 5, 7), 12), ((2, 9, 8), 64), ((1, 1, 1), 3)])
@pytest.mark.parametrize("change", [None, transposed])
def test_triplane_slice(
    device: ModuleType,
    dtype: torch.dtype,
    plane: str,
    sizes: tuple[int, int, int],
    channels: int,
    change: Callable[[Tensor], Tensor] | None,
) -> None:
    change = change or (lambda t: t)
    length = sizes[("xy", "yt", "xt").index(plane)]
    lattice = sizes[0] * sizes[1] * sizes[2]
    x = change(torch.randn(2, lattice, channels).to(dtype))
    token, positions = torch.randn(channels), torch.randn(length + 1, channels)
    grad = change(torch.randn(2, lattice // length, length + 1, channels).to(dtype))

    def run() -> tuple[Tensor, ...]:
        out = triplane_slice.forward(x, token, positions, plane, *sizes)
        return out, *triplane_slice.backward(grad, token, positions, plane, *sizes)

    wide = (token.double(), positions.double(), plane, *sizes)
    compare(device, run, (slice_reference.forward(x.double(), *wide), *slice_reference.backward(grad.double(), *wide)))


def test_too_many_planes(device: ModuleType) -> None:
    layout = PlaneLayout(((1, 1),) * 33)
    with pytest.raises(ValueError, match="at most 32 planes"):
        plane_norm.forward(torch.randn(1, 33, 4), torch.ones(4), torch.ones(4), None, layout.sizes, 2, 1e-5, False, 0)
