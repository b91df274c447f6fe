"""Sizes at the edges, on every backend that runs here: widths of heads from 8 to 256, one token, no batch at all."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close
from ops.cases import BATCH, CASES, LATTICE, LAYOUT, Case, rotation, run_with_gradients
from tolerances import OPERATION

from pvdm_fast import TriplaneLayout, ops, use_backend
from pvdm_fast.backends import choice
from pvdm_fast.backends.choice import OPERATIONS, SERVED
from pvdm_fast.layout import PlaneLayout

WIDTHS = (8, 16, 24, 32, 40, 64, 80, 128, 256)
KERNELS = [name for name in choice.BACKENDS if name != "reference" and choice.unavailable(name) is None]
ATTENTIONS = {
    "segment": lambda width: Case(
        "segment_attention",
        {"qkv": (BATCH, LAYOUT.num_tokens, 3, 2, width)},
        lambda qkv: ops.segment_attention(qkv, LAYOUT.offsets),
    ),
    "time": lambda width: Case(
        "axial_attention",
        {"qkv": (*LATTICE, 3, 2, width)},
        lambda qkv: ops.axial_attention(qkv, "time", rotation(LAYOUT.time, width)),
    ),
    "space": lambda width: Case(
        "axial_attention",
        {"qkv": (*LATTICE, 3, 2, width)},
        lambda qkv: ops.axial_attention(qkv, "space", rotation(LAYOUT.height * LAYOUT.width, width)),
    ),
    "query": lambda width: Case(
        "axial_attention",
        {"qkv": (*LATTICE, 2, 2, width), "query": (BATCH, 1, *LATTICE[2:], 2, width)},
        lambda qkv, query: ops.axial_attention(qkv, "time", query=query),
    ),
}


def check(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Results and gradients against the float64 reference. Gradients that are zero but for rounding must be small."""
    if case.op not in SERVED[backend]:
        pytest.skip(f"{backend} has no kernel for {case.op}")
    inputs = case.inputs(dtype)
    with use_backend("reference"):
        expected = run_with_gradients(case, {n: t.double() for n, t in inputs.items()}, dtype)
    device = "cuda" if backend == "cuda" or (backend == "triton" and not choice.interpreting()) else "cpu"
    with use_backend(backend):
        actual = run_with_gradients(case, {n: t.to(device) for n, t in inputs.items()}, dtype)
    for what, exact in expected.items():
        if exact.norm() > 1e-9 * exact.numel() ** 0.5:
            assert_close(actual[what].cpu(), exact, OPERATION[dtype], what)
        else:
            assert actual[what].shape == exact.shape
            assert (actual[what].abs() <= 10 * OPERATION[dtype]).all(), what


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_widths_of_heads(kind: str, width: int, dtype: torch.dtype, backend: str) -> None:
    check(ATTENTIONS[kind](width), backend, dtype)


ONE, POINT = TriplaneLayout(1, 1, 1), PlaneLayout(((1, 1),))
ONE_TOKEN = {
    "segment_attention": Case("segment_attention", {"qkv": (1, 1, 3, 2, 8)}, lambda qkv: ops.segment_attention(qkv)),
    "axial_attention, time": Case(
        "axial_attention",
        {"qkv": (1, 1, 1, 1, 3, 2, 8)},
        lambda qkv: ops.axial_attention(qkv, "time", rotation(1, 8)),
    ),
    "axial_attention, space": Case(
        "axial_attention",
        {"qkv": (1, 1, 1, 1, 3, 2, 8)},
        lambda qkv: ops.axial_attention(qkv, "space", rotation(1, 8)),
    ),
    "axial_attention, query": Case(
        "axial_attention",
        {"qkv": (1, 1, 1, 1, 2, 2, 8), "query": (1, 1, 1, 1, 2, 8)},
        lambda qkv, query: ops.axial_attention(qkv, "time", query=query),
    ),
    **{
        f"plane_norm, {resample}": Case(
            "plane_norm",
            {"x": (1, 1, 12), "weight": (12,), "bias": (12,)},
            lambda x, weight, bias, resample=resample: ops.plane_norm(
                x, POINT, weight, bias, groups=4, activation=True, resample=resample
            ),
        )
        for resample in (None, "up")
    },
    "plane_conv": Case(
        "plane_conv",
        {"x": (1, 1, 5), "weight": (6, 5, 3, 3), "bias": (6,)},
        lambda x, weight, bias: ops.plane_conv(x, POINT, weight, bias),
    ),
    "triplane_slice": Case(
        "triplane_slice",
        {"x": (1, 1, 12), "token": (12,), "positions": (2, 12)},
        lambda x, token, positions: ops.triplane_slice(x, ONE, "yt", token, positions),
    ),
    "triplane_expand": Case(
        "triplane_expand",
        {"planes": (1, 3, 4), "weight": (3, 12, 4), "bias": (3, 12)},
        lambda planes, weight, bias: ops.triplane_expand(planes, ONE, weight, bias),
    ),
    "geglu": Case("geglu", {"x": (1, 2)}, ops.geglu),
    "add_layer_norm": Case(
        "add_layer_norm",
        {"x": (12,), "residual": (12,), "weight": (12,), "bias": (12,)},
        lambda x, residual, weight, bias: ops.add_layer_norm(x, residual, weight, bias),
    ),
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ONE_TOKEN)
def test_one_token(name: str, dtype: torch.dtype, backend: str) -> None:
    check(ONE_TOKEN[name], backend, dtype)


def test_one_token_of_every_operation() -> None:
    assert {case.op for case in ONE_TOKEN.values()} == set(OPERATIONS)


@pytest.mark.parametrize("name", CASES)
def test_no_batch_is_refused(name: str) -> None:
    """In one sentence that names the operation and what it got, before any kernel runs."""
    case = CASES[name]
    inputs = {n: t[:0] if len(t) == BATCH and t.dim() > 1 else t for n, t in case.inputs(torch.float32).items()}
    with pytest.raises(ValueError, match=rf"^{case.op}: .*empty.*\(0, "):
        case.run(**inputs)
