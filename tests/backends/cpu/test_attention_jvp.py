"""Attention with tangents on the CPU: every instruction set, any strides, rotation, scales of either sign, memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from comparison import assert_close
from tolerances import OPERATION
from torch import Tensor
from torch.func import jvp

from pvdm_fast import ops, use_backend
from pvdm_fast.analysis.cases import rotation
from pvdm_fast.backends import choice
from pvdm_fast.backends.cpu import axial_attention, segment_attention
from pvdm_fast.backends.extensions import extension
from pvdm_fast.backends.reference import axial_attention as axial_reference
from pvdm_fast.backends.reference import segment_attention as segment_reference

if reason := choice.unavailable("cpu"):
    pytest.skip(reason, allow_module_level=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=list(extension("_cpu").isas()))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    module = extension("_cpu")
    before = module.isa()
    module.set_isa(request.param)
    yield request.param
    module.set_isa(before)


def wide(*values: object) -> list[object]:
    return [v.double() if isinstance(v, Tensor) else v for v in values]


def assert_all_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for what, a, e in zip(("out", "lse", "tangent"), actual, expected, strict=True):
        assert_close(a, e, OPERATION[torch.float32 if what == "lse" else dtype], what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (2, 3), (17, 40), (49, 16), (129, 1), (300, 33), (257, 256)])
@pytest.mark.parametrize("scale", [0.2, -0.3])
def test_segments(isa: str, dtype: torch.dtype, tokens: int, width: int, scale: float) -> None:
    qkv, tangent = (torch.randn(2, tokens, 3, 2, width).to(dtype) for _ in range(2))
    tangent = tangent.transpose(0, 1).contiguous().transpose(0, 1)
    for offsets in ([0, tokens], sorted({0, tokens // 3, tokens // 2, tokens})):
        actual = segment_attention.jvp(qkv, tangent, offsets, scale)
        assert_all_close(actual, segment_reference.jvp(*wide(qkv, tangent, offsets, scale)), dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", ["time", "space"])
@pytest.mark.parametrize("rotated", [False, True])
def test_lattices(isa: str, axis: str, rotated: bool) -> None:
    """The tangent has other strides than qkv: one axis is expanded, and rows aren't dense."""
    qkv = torch.randn(2, 5, 3, 7, 3, 2, 20)
    tangent = torch.randn(2, 5, 3, 1, 3, 2, 40)[..., ::2].expand(qkv.shape)
    sin, cos = rotation(5 if axis == "time" else 21, 20) if rotated else (None, None)
    arguments = (qkv, tangent, sin, cos, axis, 0.25)
    assert_all_close(axial_attention.jvp(*arguments), axial_reference.jvp(*wide(*arguments)), torch.float32)  # type: ignore[arg-type]


def test_public_functions_take_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """jvp of both operations, by automatic choice and by name."""
    calls = []
    for module in (segment_attention, axial_attention):
        kernel = module.jvp
        monkeypatch.setattr(module, "jvp", lambda *a, kernel=kernel: calls.append(1) or kernel(*a))
    x = torch.randn(1, 6, 3, 2, 8)
    jvp(ops.segment_attention, (x,), (x,))
    with use_backend("cpu"):
        jvp(lambda x: ops.axial_attention(x, "time"), (x.view(1, 6, 1, 1, 3, 2, 8),), (x.view(1, 6, 1, 1, 3, 2, 8),))
    assert len(calls) == 2


@pytest.mark.slow
def test_memory_grows_with_the_tokens_alone() -> None:
    """With 8192 tokens, scores would be 256 MiB, twice. Queries, keys, values and results are 4 MiB."""
    code = """
import resource, torch
from torch.func import jvp
from pvdm_fast import ops
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
small, x = torch.randn(1, 64, 3, 1, 16), torch.randn(1, 8192, 3, 1, 16)
jvp(ops.segment_attention, (small,), (small,))
before = peak()
jvp(ops.segment_attention, (x,), (x,))
assert peak() - before < 32, (before, peak())
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
