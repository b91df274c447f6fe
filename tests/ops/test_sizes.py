"""Extreme sizes on every backend that runs here: heads of 8 to 256 channels, one token, an empty batch."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close
from tolerances import OPERATION

from pvdm_fast import use_backend
from pvdm_fast.analysis import cases
from pvdm_fast.analysis.cases import BATCH, LATTICE, LAYOUT, ONE_TOKEN, SMALL, Case, rotation, run_with_gradients
from pvdm_fast.backends import choice
from pvdm_fast.backends.choice import SERVED

WIDTHS = (8, 24, 64, *(pytest.param(width, marks=pytest.mark.slow) for width in (16, 32, 40, 80, 128, 256)))
KERNELS = [name for name in choice.BACKENDS if name != "reference" and choice.unavailable(name) is None]
SITES = LATTICE[1] * LATTICE[2]
ATTENTIONS = {
    "segment": lambda width: cases.segment_attention(LAYOUT.offsets, 2, width),
    "time": lambda width: cases.axial_attention("time", LATTICE, 2, width, tables=rotation(LAYOUT.time, width)),
    "space": lambda width: cases.axial_attention("space", LATTICE, 2, width, tables=rotation(SITES, width)),
    "query": lambda width: cases.single_query(LATTICE, 2, width),
}


def check(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Results and gradients against the float64 reference. Gradients that are zero except for rounding must be
    small."""
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


@pytest.mark.parametrize(
    ("name", "backend"), [(name, to) for name, case in ONE_TOKEN.items() for to in KERNELS if case.op in SERVED[to]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_token(name: str, dtype: torch.dtype, backend: str) -> None:
    check(ONE_TOKEN[name], backend, dtype)


@pytest.mark.parametrize("name", SMALL)
def test_no_batch_is_refused(name: str) -> None:
    """With one sentence that names the operation and what it got, before any kernel runs."""
    case = SMALL[name]
    inputs = {n: t[:0] if len(t) == BATCH and t.dim() > 1 else t for n, t in case.inputs(torch.float32).items()}
    with pytest.raises(ValueError, match=rf"^{case.op}: .*empty.*\(0, "):
        case.run(**inputs)
