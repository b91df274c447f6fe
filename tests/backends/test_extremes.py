"""Attention with scores of -inf, inf or millions: every native kernel gives what the formula gives."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from comparison import relative_error
from tolerances import ATTENTION_16_BIT
from torch import Tensor

from pvdm_fast.backends import choice

INFINITE = {
    "all -inf": [(slice(None), -1)],
    "the first keys -inf": [(slice(0, 140), -1)],
    "one key -inf": [(slice(3, 4), -1)],
    "one key inf": [(slice(3, 4), 1)],
    "inf and -inf": [(slice(3, 4), 1), (slice(4, 5), -1)],
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def both(op: str, backend: str, inputs: tuple[Any, ...], options: tuple[Any, ...]) -> list[tuple[Tensor, Tensor]]:
    """(computed, float64 reference): output and gradients."""
    found = []
    for name in (backend, "reference"):
        module = choice.implementation(name, op)
        given = tuple(t.double() if name == "reference" and t is not None else t for t in inputs)
        out, lse = module.forward(*given, *options)
        torch.manual_seed(1)
        grad = torch.randn(out.shape).to(inputs[0].dtype).to(out.dtype)
        gradients = module.backward(grad, *given, out, lse, *options)
        found.append((out, *(gradients if isinstance(gradients, tuple) else (gradients,))))
    return list(zip(*found, strict=True))


def check_infinite(backend: str, dtype: torch.dtype, kind: str) -> None:
    """The same numbers are NaN as in the formula: in several blocks of keys, in short sequences, and for a single
    query."""
    for tokens in (17, 300):
        qkv = torch.randn(1, tokens, 3, 2, 16)
        qkv[..., 0, :, 0], qkv[..., 1, :, 0] = 1, 0
        for keys, sign in INFINITE[kind]:
            qkv[0, keys, 1, 0, 0] = sign * torch.inf
        pairs = both("segment_attention", backend, (qkv.to(dtype),), ([0, tokens], 1.0))
        lattice = qkv.to(dtype).view(1, tokens, 1, 1, 3, 2, 16)
        single = lattice[..., 1:, :, :], lattice[:, 5:6, :, :, 0], None, None
        for actual, exact in pairs + both("axial_attention", backend, single, ("time", 1.0)):
            assert torch.equal(actual.isnan(), exact.isnan()), f"{kind}, {tokens} tokens"
            there = exact.isfinite()
            # a gradient may be 0 except for rounding
            terms = max(float(exact[there].norm()), float(there.sum()) ** 0.5)
            error = float((actual[there].double() - exact[there]).norm()) / terms
            assert error < 2 * ATTENTION_16_BIT.get(dtype, 1e-5), f"{kind}, {tokens} tokens: {error:.2g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", INFINITE)
def test_infinite_scores_on_the_cpu(isa: str, dtype: torch.dtype, kind: str) -> None:
    check_infinite("cpu", dtype, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", INFINITE)
def test_infinite_scores_in_cuda(device: ModuleType, dtype: torch.dtype, kind: str) -> None:
    check_infinite("cuda", dtype, kind)


def logits_of(size: float, tokens: int, dtype: torch.dtype) -> Tensor:
    """qkv whose scores are about as large as `size`, at scale 1."""
    torch.manual_seed(0)
    qkv = torch.randn(1, tokens, 3, 2, 32)
    qkv[:, :, :2] *= (size / (3 * 32**0.5)) ** 0.5
    return qkv.to(dtype)


def errors(backend: str, qkv: Tensor, scale: float) -> dict[str, tuple[float, float]]:
    """(backend, reference in qkv's own dtype), each against float64.

    Errors of q and k are in units of the terms that cancel. If each query sees one key, dP - D is 0 except for
    rounding, and dq is that times a key.
    """
    options = ([0, qkv.shape[1]], scale)
    (out, exact_out), (gradient, exact) = both("segment_attention", backend, (qkv,), options)
    (plain_out, _), (plain, _) = both("segment_attention", "reference", (qkv,), options)
    terms = max(float(exact[:, :, :2].norm()), float(qkv[:, :, :2].double().norm()) * abs(scale))
    found = {"output": (relative_error(out, exact_out), relative_error(plain_out.to(qkv.dtype), exact_out))}
    found["v"] = relative_error(gradient[:, :, 2], exact[:, :, 2]), relative_error(plain[:, :, 2], exact[:, :, 2])
    for i, name in enumerate("qk"):
        found[name] = tuple(float((g[:, :, i].double() - exact[:, :, i]).norm()) / terms for g in (gradient, plain))
    return found


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("size", [1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_large_logits_on_the_cpu(isa: str, dtype: torch.dtype, size: float, scale: float) -> None:
    """If a query sees one key, within four roundings of the dtype, like the formula. Otherwise as float32 scores
    allow: each score is rounded by 6e-8 of itself (times the square root of its 32 terms), and a softmax takes
    that as an absolute error.
    """
    rounding = {torch.float32: 3e-7, torch.bfloat16: 4e-3}[dtype]
    for tokens in (17, 150):
        for name, (error, plain) in errors("cpu", logits_of(size, tokens, dtype), scale).items():
            felt = 0 if name in ("output", "v") and size > 1e5 else 4e-7 * size
            assert error <= 4 * rounding + 2 * plain + min(felt, 0.1), f"{name}, {tokens} tokens: {error:.2g}"


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("size", [1e3, 1e4, 1e5])
def test_large_logits_in_cuda(device: ModuleType, dtype: torch.dtype, size: float) -> None:
    """The output is exact. A gradient's probabilities come from a float32 log-sum-exp, and are off by 2e-7 of its
    size."""
    rounding = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for tokens in (17, 150):
        for name, (error, plain) in errors("cuda", logits_of(size, tokens, dtype), 1.0).items():
            felt = 0.0 if name == "output" and size >= 1e5 else 4e-7 * size
            assert error <= rounding + 2 * plain + felt, f"{name}, {tokens} tokens: {error:.2g}"
