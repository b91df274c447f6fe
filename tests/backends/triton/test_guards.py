"""The interpreter's checks. Each is tried on a kernel with its kind of fault, and on the same kernel without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")
import triton
import triton.language as tl
from backends.triton import interpreter
from comparison import assert_close
from torch import Tensor
from triton.runtime.errors import InterpreterError

from pvdm_fast.backends import choice

N, BLOCK = 100, 32


@triton.jit
def copy_kernel(x, y, reads, writes, BLOCK: tl.constexpr):
    """y = x, with masks that may be too wide."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < reads, other=0.0), mask=i < writes)


def copy(x: Tensor, reads: int = N, writes: int = N) -> Tensor:
    y = torch.empty(N)
    copy_kernel[(triton.cdiv(N, BLOCK),)](x, y, reads, writes, BLOCK=BLOCK)
    return y


def test_good_kernel_passes() -> None:
    x = torch.randn(N)
    assert torch.equal(copy(x), x)


def test_view_passes() -> None:
    """A view that starts after its storage does, and ends before it."""
    x = torch.randn(3 * N)[N : 2 * N]
    assert torch.equal(copy(x), x)


def test_load_out_of_bounds() -> None:
    with pytest.raises(InterpreterError, match=r"load out of bounds: program \(3, 0, 0\) of copy_kernel .* of x"):
        copy(torch.randn(N), reads=N + 1)


def test_load_beside_a_view() -> None:
    """The memory exists, but it isn't the tensor's."""
    with pytest.raises(InterpreterError, match=r"load out of bounds: .*800 bytes into the memory of x, outside"):
        copy(torch.randn(3 * N)[N : 2 * N], reads=N + 1)


def test_store_out_of_bounds() -> None:
    with pytest.raises(InterpreterError, match=r"store out of bounds: .* 0 bytes after the end of the memory of y"):
        copy(torch.randn(N), writes=N + 1)


@triton.jit
def columns_kernel(x, y, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    tl.store(y + row * BLOCK + i, tl.load(x + row * stride + i, mask=i < columns))


def test_gaps_of_a_view_are_out_of_bounds() -> None:
    x = torch.randn(4, 24)[:, :16]
    y = torch.empty(4, 16)
    columns_kernel[(4,)](x, y, 16, 24, BLOCK=16)
    assert torch.equal(y, x)
    with pytest.raises(InterpreterError, match="load out of bounds"):
        columns_kernel[(4,)](x[:, :15], y, 16, 24, BLOCK=16)


def test_undefined_lanes_are_nan() -> None:
    """A masked load without `other`."""
    x, y = torch.randn(4, 15), torch.empty(4, 16)
    columns_kernel[(4,)](x, y, 15, 15, BLOCK=16)
    assert torch.equal(y[:, :15], x)
    assert y[:, 15].isnan().all()


def test_stride_zero_passes() -> None:
    x = torch.randn(1, 16).expand(4, 16)
    y = torch.empty(4, 16)
    columns_kernel[(4,)](x, y, 16, 0, BLOCK=16)
    assert torch.equal(y, x)


@triton.jit
def overlapping_kernel(x, y, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))


def overlapping(step: int) -> None:
    overlapping_kernel[(3,)](torch.randn(96), torch.empty(96), step, BLOCK=32)


def test_write_race() -> None:
    overlapping(32)
    with pytest.raises(
        InterpreterError, match=r"race: store by program \(1, 0, 0\).* 1 addresses of y .*\(0, 0, 0\) sto"
    ):
        overlapping(31)


def test_checks_start_afresh_at_every_launch() -> None:
    x, y = torch.randn(N), torch.empty(N)
    for _ in range(2):
        copy_kernel[(4,)](x, y, N, N, BLOCK=BLOCK)
        copy_kernel[(4,)](y, x, N, N, BLOCK=BLOCK)


@triton.jit
def shift_kernel(x, source, target, BLOCK: tl.constexpr):
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + target + i, tl.load(x + source + i))


@pytest.mark.parametrize(("source", "target"), [(0, 32), (32, 0)])
def test_store_load_race(source: int, target: int) -> None:
    """In both orders: a later program loads what one stored, or stores what one loaded."""
    shift_kernel[(1, 2)](torch.randn(128), 0, 64, BLOCK=32)
    with pytest.raises(InterpreterError, match=r"race: (load|store) by program \(0, 1, 0\) of shift_kernel"):
        shift_kernel[(1, 2)](torch.randn(128), source, target, BLOCK=32)


@triton.jit
def colliding_kernel(y, x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i // 2, tl.load(x + i))


@triton.jit
def handing_over_kernel(y, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """Thread i stores, and its neighbour loads."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, i.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y + i, tl.load(y + (i ^ 1)))


def test_a_load_of_what_was_stored_needs_a_barrier() -> None:
    y = torch.zeros(2 * BLOCK)
    handing_over_kernel[(2,)](y, BARRIER=True, BLOCK=BLOCK)
    assert torch.equal(y, torch.arange(2 * BLOCK).view(-1, 2).flip(1).flatten().float())
    with pytest.raises(
        InterpreterError, match=r"race: program \(0, 0, 0\) of handing_over_kernel loads from y what it"
    ):
        handing_over_kernel[(2,)](y, BARRIER=False, BLOCK=BLOCK)


def test_two_values_at_one_address() -> None:
    y = torch.empty(8)
    colliding_kernel[(1,)](y, torch.ones(16), BLOCK=16)  # storing the same value twice is no fault
    with pytest.raises(InterpreterError, match="two values at one address in one store"):
        colliding_kernel[(1,)](y, torch.arange(16.0), BLOCK=16)


@triton.jit
def atomic_kernel(y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(y + i, i.to(tl.float32))


def test_atomics_are_no_race() -> None:
    y = torch.zeros(16)
    atomic_kernel[(3,)](y, BLOCK=16)
    assert torch.equal(y, 3 * torch.arange(16.0))
    with pytest.raises(InterpreterError, match="atomic out of bounds"):
        atomic_kernel[(3,)](y[:15], BLOCK=16)


@triton.jit
def last_adds_kernel(parts, out, counter, BARRIER: tl.constexpr, ORDER: tl.constexpr, EARLY: tl.constexpr):
    """out = the number of programs, each of which stores a 1, and the last adds them."""
    programs = tl.num_programs(0)
    tl.store(parts + tl.program_id(0), 1.0)
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem=ORDER, scope="gpu") == programs - 1 - EARLY:
        total = 0.0
        for program in range(programs):
            total += tl.load(parts + program)
        tl.store(out, total)


@pytest.mark.parametrize("backwards", [False, True])
def test_the_last_to_arrive_may_read_all(backwards: bool) -> None:
    """What others stored before a barrier and an acq_rel atomic, if its own atomic came after theirs."""

    def last_adds(barrier: bool = True, order: str = "acq_rel", early: int = 0) -> float:
        out = torch.zeros(1)
        with interpreter.arriving(lambda count: range(count)[:: -1 if backwards else 1]):
            last_adds_kernel[(4,)](torch.zeros(4), out, torch.zeros(1, dtype=torch.int32), barrier, order, early)
        return float(out)

    assert last_adds() == 4
    for wrong in (dict(barrier=False), dict(order="relaxed"), dict(early=1)):
        with pytest.raises(InterpreterError, match=r"race: .*of last_adds_kernel"):
            last_adds(**wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("allocate", [torch.empty_like, lambda x: x.new_empty(N), lambda x: torch.empty(N).to(x)])
def test_unwritten_output(dtype: torch.dtype, allocate: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(N, dtype=dtype)

    def launch(written: int) -> Tensor:
        y = allocate(x)
        copy_kernel[(4,)](x, y, N, written, BLOCK=BLOCK)
        return y

    launcher = interpreter.poisoning(launch)
    assert_close(launcher(N), x, 0.0)
    with pytest.raises(AssertionError, match="1 values are not finite"):
        assert_close(launcher(N - 1), x, 0.0)
    assert not torch.are_deterministic_algorithms_enabled()


def test_launchers_are_poisoned() -> None:
    for op in choice.SERVED["triton"]:
        module = choice.implementation("triton", op)
        assert hasattr(module.forward, "__wrapped__")
        assert op in choice.FUSED or hasattr(module.backward, "__wrapped__")


@triton.jit
def arithmetic_kernel(x, y, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)
    if OPERATION == "add":
        v = v + v
    elif OPERATION == "scale":
        v = v * tl.load(x)
    elif OPERATION == "negate":
        v = -v
    elif OPERATION == "compare":
        v = tl.where(v > tl.load(x), v, v)  # with a plain number Triton 3.8 compares in float32
    elif OPERATION == "reduce":
        v = tl.reduce(v, 0, largest) + tl.zeros_like(v)
    elif OPERATION == "choose":
        v = tl.where(i > 3, v, 0.0)
    else:
        v = (v.to(tl.float32) * 2.0).to(y.dtype.element_ty)
    tl.store(y + i, v)


@triton.jit
def largest(a, b):
    return tl.maximum(a, b)


@pytest.mark.parametrize("operation", ["add", "scale", "negate", "compare", "reduce"])
def test_bf16_arithmetic_is_refused(operation: str) -> None:
    x = torch.randn(16).bfloat16()
    with pytest.raises(InterpreterError, match="bf16 arithmetic"):
        arithmetic_kernel[(1,)](x, torch.empty_like(x), operation, BLOCK=16)
    arithmetic_kernel[(1,)](x.half(), torch.empty_like(x).half(), operation, BLOCK=16)


def test_bf16_moves_and_casts() -> None:
    x = torch.randn(16).bfloat16()
    y = torch.empty_like(x)
    arithmetic_kernel[(1,)](x, y, "widen", BLOCK=16)
    assert torch.equal(y, 2 * x)
    arithmetic_kernel[(1,)](x, y, "choose", BLOCK=16)
    assert torch.equal(y[4:], x[4:]) and not y[:4].any()


@triton.jit
def cast_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
def test_casts_round_to_nearest_even(source: torch.dtype, target: torch.dtype) -> None:
    """Random bit patterns, and those next to a tie. Infinities and NaN stay."""
    patterns = torch.randint(-(2**31), 2**31, (1024,), dtype=torch.int64).to(torch.int32)
    patterns[:256] = (patterns[:256] & ~0xFFFF) | (0x7FFF + torch.arange(256, dtype=torch.int32) % 3)
    x = patterns.view(torch.float32).to(source)
    x[:3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    y = torch.empty(1024, dtype=target)
    cast_kernel[(1,)](x, y, BLOCK=1024)
    assert torch.equal(y.nan_to_num(12.0), x.to(target).nan_to_num(12.0))
    assert torch.equal(y.isnan(), x.isnan())


@triton.jit
def product_kernel(x, y, z, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(z + at, tl.dot(tl.load(x + at), tl.trans(tl.load(y + at)), input_precision=PRECISION))


def product(dtype: torch.dtype, precision: str | None) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 32, 32).to(dtype)
    z = torch.empty(32, 32)
    product_kernel[(1,)](x, y, z, precision, SIZE=32)
    return z, x.double() @ y.double().T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products(dtype: torch.dtype) -> None:
    assert_close(*product(dtype, "ieee"), 1e-6)


@pytest.mark.parametrize("precision", ["tf32", None])
def test_tf32_shows(precision: str | None) -> None:
    """A mantissa of ten bits: if asked for, or if the precision isn't stated."""
    z, expected = product(torch.float32, precision)
    assert_close(z, expected, 1e-3)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(z, expected, 1e-5)


def test_another_version_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    needed: dict[str, Any] = {**interpreter.NEEDED, "GridExecutor": ("_init_arguments",)}
    monkeypatch.setattr(interpreter, "NEEDED", needed)
    with pytest.raises(RuntimeError, match=r"has no GridExecutor\._init_arguments, .* update it"):
        interpreter.install()
