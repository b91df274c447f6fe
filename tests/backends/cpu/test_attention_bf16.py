"""Attention by products of bf16 pairs, for long sequences: here and in amx with the stand-in for its tiles.

Errors against the float64 reference are at most twice those of eager PyTorch in bfloat16, or one rounding.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from backends.cpu import amx
from backends.cpu import test_attention_cpu as attention
from backends.cpu.test_attention_cpu import by_head, run
from comparison import assert_close, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import ISAS, using
from tolerances import BFLOAT16_FACTOR, OPERATION
from torch import Tensor

from pvdm_fast.backends import extensions
from pvdm_fast.backends.cpu import axial_attention, segment_attention
from pvdm_fast.backends.reference import axial_attention as axial_reference

pytestmark = [
    pytest.mark.skipif(extensions.availability("cpu") is not None, reason=str(extensions.availability("cpu"))),
    pytest.mark.usefixtures("poisoned_likes"),
]
SETS = [isa for isa in ISAS if isa in ("avx512bf16", "amx")]
STAND_IN = "amx stand-in"


@pytest.fixture(
    scope="module", params=[*SETS, pytest.param(STAND_IN, marks=pytest.mark.slow)]
)  # compiling it takes 20 s
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == STAND_IN:
            module: ModuleType = request.getfixturevalue("amx_stand_in")
            for launcher in (segment_attention, axial_attention):
                patch.setattr(launcher, "extension", lambda name: module)
            yield request.param
            return
        with using(request.param):
            yield request.param


def inputs(tokens: int, heads: int, width: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    return by_head(tokens, heads, width, batch).bfloat16(), torch.randn(batch, tokens, heads, width).bfloat16()


def check(qkv: Tensor, grad: Tensor, offsets: list[int], scale: float) -> None:
    actual, plain = run(qkv, grad, offsets, scale), attention.eager(qkv, grad, offsets, scale)
    exact = attention.expected(qkv, grad, offsets, scale)
    assert_close(actual["lse"], exact["lse"], 1e-4, "lse")
    for name in plain:
        parts = {name: (actual[name], plain[name], exact[name])}
        if name == "gradient":
            parts = {f"gradient of {part}": tuple(t[:, :, i] for t in parts[name]) for i, part in enumerate("qkv")}
        for what, (a, p, e) in parts.items():
            assert_close(a, e, max(BFLOAT16_FACTOR * relative_error(p, e), OPERATION[torch.bfloat16]), what)
    again = run(qkv, grad, offsets, scale)
    assert all(torch.equal(actual[name], again[name]) for name in actual), "differs on a second run"


@pytest.mark.parametrize("tokens", [64, 65, 77, 80, 96, 127, 128, 129, 144, 160, 161, 191, 192, 193, 300])
def test_lengths(isa: str, tokens: int) -> None:
    check(*inputs(tokens, 2, 40), [0, tokens], 40**-0.5)


@pytest.mark.parametrize("width", [1, 7, *attention.WIDTHS, 33])
def test_widths(isa: str, width: int) -> None:
    check(*inputs(150, 2, width), [0, 150], width**-0.5)


@pytest.mark.parametrize("offsets", [[0, 1, 130, 131, 300], [0, 65, 130, 195], [0, 17, 200], [0, 48, 64, 300]])
def test_unequal_segments(isa: str, offsets: list[int]) -> None:
    check(*inputs(offsets[-1], 3, 24, batch=2), offsets, 0.2)


@pytest.mark.parametrize("form", attention.FORMS)
def test_memory_orders(isa: str, form: str) -> None:
    qkv, grad = inputs(70, 2, 16, batch=2)
    check(attention.FORMS[form](qkv), attention.FORMS[form](grad), [0, 70], 0.25)
    check(qkv, grad[:, :1].expand_as(grad), [0, 70], 0.25)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_any_scale(isa: str, scale: float) -> None:
    qkv, grad = inputs(100, 1, 8)
    if scale:
        return check(qkv, grad, [0, 100], scale)
    actual, exact = run(qkv, grad, [0, 100], 0.0), attention.expected(qkv, grad, [0, 100], 0.0)
    assert_close(actual["output"], exact["output"], OPERATION[torch.bfloat16], "output")
    assert not actual["gradient"][:, :, :2].any()


@pytest.mark.parametrize("factor", [1e3, 1e4, 3e4])
def test_huge_scores(isa: str, factor: float) -> None:
    """A query takes the value of its best key, and nothing overflows."""
    qkv, grad = inputs(150, 2, 16)
    qkv = qkv * factor
    actual, exact = run(qkv, grad, [0, 150], 1.0), attention.expected(qkv, grad, [0, 150], 1.0)
    assert_close(actual["output"], exact["output"], OPERATION[torch.bfloat16], "output")
    assert_close(actual["lse"], exact["lse"], 1e-5, "lse")
    assert torch.isfinite(actual["gradient"]).all()


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("tokens", [70, 150])
def test_nan_is_passed_on(isa: str, tokens: int, part: int) -> None:
    """Exactly as far as in the reference: to results and gradients of query 5, or of all queries that see key or
    value 5."""
    qkv, grad = inputs(tokens, 2, 20, batch=2)
    qkv[0, 5, part, 1, 3] = float("nan")
    actual, exact = run(qkv, grad, [0, tokens], 0.25), attention.expected(qkv, grad, [0, tokens], 0.25)
    for name, tensor in exact.items():
        assert torch.equal(actual[name].isnan(), tensor.isnan()), name
    assert actual["gradient"].isnan().any()


@pytest.mark.parametrize("offsets", [[0, 300], [0, 40, 260, 300]])
def test_threads(isa: str, offsets: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that share a problem give the same bits on every run. The output has the same bits with any number
    of threads."""
    qkv, grad = inputs(300, 1, 64)
    first = run(qkv, grad, offsets, 0.125)
    for threads in (1, 2, 3, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        check(qkv, grad, offsets, 0.125)
        assert torch.equal(run(qkv, grad, offsets, 0.125)["output"], first["output"])


# Widths start at 2: with single numbers instead of vectors, q's gradient can be a small difference of large sums.
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(64, 200), min_size=1, max_size=3), st.integers(1, 3), st.integers(2, 70), st.integers(1, 2))
def test_any_shape(isa: str, segments: list[int], heads: int, width: int, batch: int) -> None:
    offsets = [sum(segments[:i]) for i in range(len(segments) + 1)]
    check(*inputs(offsets[-1], heads, width, batch), offsets, width**-0.5)


@pytest.mark.parametrize("width", [8, 48, 64])
@pytest.mark.parametrize("sizes", [(2, 8, 9), (1, 13, 10)])
def test_axial(isa: str, width: int, sizes: tuple[int, int, int]) -> None:
    """With and without rotated queries and keys."""
    qkv = torch.randn(1, *sizes, 3, 2, width).bfloat16()
    grad = torch.randn(1, *sizes, 2, width).bfloat16()
    scale, length = width**-0.5, sizes[1] * sizes[2]
    plain = torch.zeros(length, width), torch.ones(length, width)
    for rotation in (attention.tables(length, width), plain):
        given_tables = (None, None) if rotation is plain else rotation
        out, lse = axial_attention.forward(qkv, None, *given_tables, "space", scale)
        gradient, _ = axial_attention.backward(grad, qkv, None, *given_tables, out, lse, "space", scale)
        wide = qkv.double(), None, *(t.double() for t in rotation)
        exact = axial_reference.forward(*wide, "space", scale)
        exact_gradient, _ = axial_reference.backward(grad.double(), *wide, *exact, "space", scale)
        plain_out, plain_gradient = attention.eager_axial(qkv, *rotation, grad)
        assert_close(lse, exact[1], 2e-3, "lse")  # the rotated numbers are rounded to bfloat16 again
        assert_close(out, exact[0], BFLOAT16_FACTOR * relative_error(plain_out, exact[0]), "output")
        for i, name in enumerate("qkv"):
            a, p, e = (t[..., i, :, :] for t in (gradient, plain_gradient, exact_gradient))
            assert_close(a, e, BFLOAT16_FACTOR * relative_error(p, e), f"gradient of {name}")


def test_amx_is_taken_by_itself(amx_stand_in: ModuleType) -> None:
    for asked, used in (("", "amx"), ("avx512bf16", "avx512bf16"), ("amx", "amx")):
        code = "print(module.isa(), 'amx' in module.isas())"
        result = amx.run_apart(amx_stand_in, code, PVDM_FAST_CPU_ISA=asked)
        assert result.stdout.split() == [used, "True"], result.stderr


def test_the_rest_is_borrowed(amx_stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the set amx: other dtypes, short sequences and single queries."""
    for launcher in (segment_attention, axial_attention):
        monkeypatch.setattr(launcher, "extension", lambda name: amx_stand_in)
    attention.check(by_head(70, 2, 12), torch.randn(2, 70, 2, 12), [0, 70], 0.3)
    check(*inputs(20, 2, 12), [0, 20], 0.3)
    attention.check_axial(torch.randn(1, 9, 2, 2, 2, 1, 8), torch.randn(1, 1, 2, 2, 1, 8), None, "time")


def test_tiles_are_released(amx_stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a thread kept its tiles, every switch would save 8 KB more."""
    monkeypatch.setattr(segment_attention, "extension", lambda name: amx_stand_in)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    run(*inputs(70, 1, 8), [0, 70], 0.3)
    with pytest.raises(RuntimeError, match="no tiles are configured"):
        amx_stand_in.tilezero(0)


def in_a_fork(first: bool) -> str:
    """A program whose forked child computes the same as its parent. `first`: before the parent has used a kernel."""
    return f"""
import os, sys, torch
from pvdm_fast.backends import extensions
from pvdm_fast.backends.cpu import segment_attention
torch.manual_seed(0)
qkv = torch.randn(1, 200, 3, 2, 32).bfloat16()
def compute():
    out, lse = segment_attention.forward(qkv, [0, 200], 0.2)
    return out, segment_attention.backward(out, qkv, out, lse, [0, 200], 0.2)
expected = None if {first} else compute()
child = os.fork()
if not child:
    torch.save(compute(), sys.argv[1])
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
expected = expected or compute()
assert all(torch.equal(a, b) for a, b in zip(torch.load(sys.argv[1]), expected, strict=True))
print(extensions.extension("_cpu").isa())
"""


@pytest.mark.slow
@pytest.mark.skipif("amx" not in SETS, reason="run it on a CPU with AMX")
@pytest.mark.parametrize("first", [True, False])
def test_tiles_in_a_forked_worker(first: bool, tmp_path: Path) -> None:
    """The permission to use tiles belongs to a process. A child inherits its parent's, or asks for its own."""
    command = [sys.executable, "-c", in_a_fork(first), str(tmp_path / "child.pt")]
    environment = {name: value for name, value in os.environ.items() if name != "PVDM_FAST_CPU_ISA"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.stdout.split() == ["amx"], result.stderr
