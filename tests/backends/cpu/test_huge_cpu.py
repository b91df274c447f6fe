"""More than 2^31 elements in one tensor: addresses don't wrap. Run it with `-m huge`, up to 14 GB of memory at a time.

Results are compared with the float64 reference on slices: the first, the one around element 2^31, and the last.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import psutil
import pytest
import torch
from comparison import assert_close
from tolerances import OPERATION
from torch import Tensor

from pvdm_fast.backends import extensions
from pvdm_fast.backends.cpu import add_layer_norm, geglu, plane_norm, triplane_expand, triplane_slice
from pvdm_fast.backends.reference import add_layer_norm as add_layer_norm_reference
from pvdm_fast.backends.reference import geglu as geglu_reference
from pvdm_fast.backends.reference import plane_norm as norm_reference
from pvdm_fast.backends.reference import triplane_expand as expand_reference
from pvdm_fast.backends.reference import triplane_slice as slice_reference
from pvdm_fast.layout import PlaneLayout, TriplaneLayout

pytestmark = [
    pytest.mark.huge,
    pytest.mark.skipif(extensions.availability("cpu") is not None, reason=str(extensions.availability("cpu"))),
    pytest.mark.skipif(
        psutil.virtual_memory().available < 15e9, reason="less than 15 GB of memory are free: run on a larger machine"
    ),
]
LIMIT = 2**31
CHANNELS = 1024
BFLOAT16 = OPERATION[torch.bfloat16]


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    gc.collect()


def pattern(*shape: int) -> Tensor:
    """bfloat16 numbers whose period isn't near a power of two, so an address that is off by 2^31 or 2^32 reads
    other numbers."""
    period = torch.randn(1_000_003, dtype=torch.float32).bfloat16()
    out = torch.empty(shape, dtype=torch.bfloat16)
    flat = out.view(-1)
    for start in range(0, flat.numel(), len(period)):
        stop = min(start + len(period), flat.numel())
        flat[start:stop] = period[: stop - start]
    return out


def places(units: int, elements: int) -> list[slice]:
    """Slices of an axis of `units` of `elements` elements each: at the start, around element 2^31, at the end."""
    middle = LIMIT // elements
    assert units * elements > LIMIT and 2 < middle < units - 2
    return [slice(0, 3), slice(middle - 2, middle + 2), slice(units - 3, units)]


def check(actual: Tensor, expected: Tensor, what: str) -> None:
    assert_close(actual, expected, BFLOAT16, what)


def test_geglu() -> None:
    rows = LIMIT // (2 * CHANNELS) + 5
    x = pattern(rows, 2 * CHANNELS)
    out = geglu.forward(x)
    dx = geglu.backward(out, x)
    for at in places(rows, 2 * CHANNELS):
        check(out[at], geglu_reference.forward(x[at].double()), "output")
        check(dx[at], geglu_reference.backward(out[at].double(), x[at].double()), "gradient")


def test_add_layer_norm() -> None:
    rows = LIMIT // CHANNELS + 5
    x, weight, bias = pattern(rows, CHANNELS), 1 + 0.1 * torch.randn(CHANNELS), torch.randn(CHANNELS)
    _, normed, mean, rstd = add_layer_norm.forward(x, None, weight, bias, 1e-5)
    dx, _, dbias = add_layer_norm.backward(normed, None, x, weight, mean, rstd)
    wide = weight.double(), bias.double()
    for at in places(rows, CHANNELS):
        exact = add_layer_norm_reference.forward(x[at].double(), None, *wide, 1e-5)
        check(normed[at], exact[1], "output")
        statistics = mean[at].double(), rstd[at].double()
        gradients = add_layer_norm_reference.backward(normed[at].double(), None, x[at].double(), wide[0], *statistics)
        check(dx[at], gradients[0], "gradient")
    check(dbias, sum(part.double().sum(0) for part in normed.split(rows // 64)), "gradient of bias")


def test_plane_norm() -> None:
    """261 planes of 8.3 M elements, with element 2^31 inside the last. Each plane has its own statistics."""
    layout = PlaneLayout(((63, 128),) * 261)
    x, weight, bias = pattern(1, layout.num_tokens, CHANNELS), torch.randn(CHANNELS), torch.randn(CHANNELS)
    y, mean, rstd = plane_norm.forward(x, weight, bias, None, layout.sizes, 32, 1e-5, True, 0)
    dx = plane_norm.backward(y, x, weight, bias, None, mean, rstd, layout.sizes, 32, True, 0)[0]
    wide, options = (weight.double(), bias.double(), None), ([63, 128], 32)
    assert layout.offsets[260] * CHANNELS < LIMIT < layout.offsets[261] * CHANNELS
    for plane in (0, 259, 260):
        at = slice(layout.offsets[plane], layout.offsets[plane + 1])
        part = x[:, at].double()
        exact, *statistics = norm_reference.forward(part, *wide, *options, 1e-5, True, 0)
        check(y[:, at], exact, "output")
        del exact
        statistics = [s.double() for s in statistics]
        grad = y[:, at].double()
        check(dx[:, at], norm_reference.backward(grad, part, *wide, *statistics, *options, True, 0)[0], "gradient")


def test_triplane_expand() -> None:
    layout = TriplaneLayout(33, 255, 256)
    planes = torch.randn(1, layout.num_tokens, 4).bfloat16()
    weight, bias = torch.randn(3, CHANNELS, 4), torch.randn(3, CHANNELS)
    sizes = (layout.time, layout.height, layout.width)
    out = triplane_expand.forward(planes, weight, bias, *sizes)
    dplanes, _, dbias = triplane_expand.backward(out, planes, weight, *sizes)
    xy, yt, xt = layout.split(planes)
    lattice, (dxy, dyt, dxt) = out.view(*sizes, CHANNELS), layout.split(dplanes)
    w = weight.double()
    for at in places(layout.num_lattice_tokens, CHANNELS):
        for token in range(at.start, at.stop):
            t, h, x = token // (255 * 256), token // 256 % 255, token % 256
            point = torch.cat((xy[:, h, x], yt[:, t, x], xt[:, t, h])).double()[None]
            check(out[:, token], expand_reference.forward(point, w, bias.double(), 1, 1, 1)[:, 0], "output")
            check(dxy[0, h, x], lattice[:, h, x].double().sum(0) @ w[0], "gradient of xy")
            check(dyt[0, t, x], lattice[t, :, x].double().sum(0) @ w[1], "gradient of yt")
            check(dxt[0, t, h], lattice[t, h].double().sum(0) @ w[2], "gradient of xt")
    total = sum(frame.float().sum((0, 1), dtype=torch.float64) for frame in lattice)
    for plane in range(3):
        assert_close(dbias[plane], total, 1e-4, "gradient of bias")


@pytest.mark.parametrize("plane", ["xy", "xt"])
def test_triplane_slice(plane: str) -> None:
    layout = TriplaneLayout(33, 255, 256)
    sizes, length = (layout.time, layout.height, layout.width), 33 if plane == "xy" else 256
    token, positions = torch.randn(CHANNELS), torch.randn(length + 1, CHANNELS)
    x = pattern(1, layout.num_lattice_tokens, CHANNELS)
    out = triplane_slice.forward(x, token, positions, plane, *sizes)
    lattice = x.view(*sizes, CHANNELS).movedim(0 if plane == "xy" else 2, 2).flatten(0, 1)  # (places, length, C)
    one = (length, 1, 1) if plane == "xy" else (1, 1, length)
    for at in places(out.shape[1], (length + 1) * CHANNELS):
        for place in range(at.start, at.stop):
            exact = slice_reference.forward(
                lattice[None, place].double(), token.double(), positions.double(), plane, *one
            )
            check(out[:, place], exact[:, 0], "output")
    expected = [(index, out[0, index, :-1].clone()) for at in places(out.shape[1], (length + 1) * CHANNELS)
                for index in range(at.start, at.stop)]  # fmt: skip
    del x, lattice
    dx, dtoken, _ = triplane_slice.backward(out, token, positions, plane, *sizes)
    lattice = dx.view(*sizes, CHANNELS).movedim(0 if plane == "xy" else 2, 2).flatten(0, 1)
    assert all(torch.equal(lattice[place], values) for place, values in expected)
    assert_close(dtoken, out[0, :, -1].double().sum(0), 1e-4, "gradient of token")
