"""test_cpu_build.py runs this under the sanitizers: every CPU kernel and dtype, or attention of the extension _tiles.

Arguments: the extension, the number of threads per kernel, and the instruction sets. Or "race" for the planted race.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

import torch

from pvdm_fast.backends.cpu import (
    add_layer_norm,
    axial_attention,
    geglu,
    plane_conv,
    plane_norm,
    segment_attention,
    triplane_expand,
    triplane_project,
    triplane_slice,
)

if "amx" in sys.argv:
    # Ask for the CPU's own tiles, if it has them. Without the permission only some tile instructions trap.
    ctypes.CDLL(None).syscall(158, 0x1023, 18)  # arch_prctl, ARCH_REQ_XCOMP_PERM, the state of the tiles

spec = importlib.util.spec_from_file_location(Path(sys.argv[1]).name.partition(".")[0], sys.argv[1])
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for launcher in (
    add_layer_norm,
    axial_attention,
    geglu,
    plane_conv,
    plane_norm,
    segment_attention,
    triplane_expand,
    triplane_project,
    triplane_slice,
):
    launcher.extension = lambda name: module


def expand(dtype: torch.dtype) -> None:
    for sizes, channels in (((3, 5, 7), 21), ((2, 3, 4), 64)):
        time, height, width = sizes
        planes = torch.randn(2, height * width + time * (width + height), 3).to(dtype)
        weight = torch.randn(3, channels, 3)
        out = triplane_expand.forward(planes, weight, torch.randn(3, channels), *sizes)
        triplane_expand.backward(out, planes, weight, *sizes)


def norm(dtype: torch.dtype) -> None:
    sizes = [10, 14, 4, 14, 4, 10]
    x, scale_shift = torch.randn(2, 236, 20).to(dtype), torch.randn(2, 40)
    weight, bias = torch.randn(20), torch.randn(20)
    for resample in (-1, 0, 1):
        y, mean, rstd = plane_norm.forward(x, weight, bias, scale_shift, sizes, 4, 1e-5, True, resample)
        plane_norm.backward(y, x, weight, bias, scale_shift, mean, rstd, sizes, 4, True, resample)


def attention(dtype: torch.dtype) -> None:
    for offsets, width in (([0, 17], 12), ([0, 33], 48), ([0, 1, 60, 201], 40), ([0, 150], 7)):
        qkv = torch.randn(1, offsets[-1], 1, 3, width).to(dtype).transpose(2, 3)
        out, lse = segment_attention.forward(qkv, offsets, 0.3)
        segment_attention.backward(out, qkv, out, lse, offsets, 0.3)
    for axis, length in (("time", 9), ("space", 35)):
        qkv, sin = torch.randn(2, 9, 5, 7, 3, 2, 10).to(dtype), torch.randn(length, 10)
        out, lse = axial_attention.forward(qkv, None, sin, sin, axis, 0.3)
        axial_attention.backward(out, qkv, None, sin, sin, out, lse, axis, 0.3)
    qkv, query = torch.randn(2, 9, 5, 7, 2, 2, 10).to(dtype), torch.randn(2, 1, 5, 7, 2, 10).to(dtype)
    out, lse = axial_attention.forward(qkv, query, None, None, "time", 0.3)
    axial_attention.backward(out, qkv, query, None, None, out, lse, "time", 0.3)


def conv(dtype: torch.dtype) -> None:
    sizes = [5, 7, 3, 7, 1, 1]
    for channels, written in ((1, 2), (5, 3), (20, 16)):
        x, weight = torch.randn(2, 57, channels).to(dtype), torch.randn(written, channels, 3, 3).to(dtype)
        out = plane_conv.forward(x, weight, torch.randn(written).to(dtype), sizes)
        plane_conv.backward(out, x, weight, sizes, [True, True])


def rows(dtype: torch.dtype) -> None:
    for channels in (1, 21, 64):
        x, weight = torch.randn(70, 2 * channels).to(dtype), torch.randn(2 * channels)
        geglu.backward(geglu.forward(x), x)
        for residual in (None, x):
            total, normed, mean, rstd = add_layer_norm.forward(x, residual, weight, weight, 1e-5)
            add_layer_norm.backward(normed, residual, x if residual is None else total, weight, mean, rstd)


def sequences(dtype: torch.dtype) -> None:
    for plane, length in (("xy", 3), ("yt", 5), ("xt", 7)):
        token, positions = torch.randn(21), torch.randn(length + 1, 21)
        out = triplane_slice.forward(torch.randn(2, 105, 21).to(dtype), token, positions, plane, 3, 5, 7)
        triplane_slice.backward(out, token, positions, plane, 3, 5, 7)


def project(dtype: torch.dtype) -> None:
    """Two layers; sequences of 4 and 8, some of a tile left over."""
    channels, inner, hidden = 24, 12, 17
    vectors = [torch.randn(2, channels) for _ in range(6)]
    up_bias = torch.randn(2, hidden)
    shapes = (
        (2, 3 * inner, channels),
        (2, channels, inner),
        (2, hidden, channels),
        (2, channels, hidden),
        (3, channels),
    )
    qkv, out, up, down, latent = (0.2 * torch.randn(shape).to(dtype) for shape in shapes)
    layers = (*vectors[:2], qkv, out, *vectors[2:5], up, up_bias, down, vectors[5], latent, torch.randn(3))
    for plane, length in (("xy", 3), ("xt", 7)):
        ends = torch.randn(2, 105, channels).to(dtype), torch.randn(channels), torch.randn(length + 1, channels)
        arguments = (*ends, *layers, plane, 3, 5, 7, 4, 1e-5)
        triplane_project.backward(triplane_project.forward(*arguments), *arguments)


threads = int(sys.argv[2])
if sys.argv[3:] == ["race"]:
    ctypes.CDLL(sys.argv[1]).planted_race(threads)
    sys.exit()
torch.set_num_threads(1)  # PyTorch's own threads aren't under test
torch.get_num_threads = lambda: threads  # launchers ask this
if hasattr(ctypes.CDLL(sys.argv[1]), "no_race"):
    assert ctypes.CDLL(sys.argv[1]).no_race(threads) == 1000
for isa in sys.argv[3:]:
    module.set_isa(isa)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        attention(dtype)
        if spec.name == "_tiles":
            continue
        expand(dtype)
        norm(dtype)
        conv(dtype)
        rows(dtype)
        sequences(dtype)
        project(dtype)
print("clean")
