"""The stand-in for AMX tiles: it computes as Intel's manual says, and it finds every planted fault."""

from __future__ import annotations

import signal
import struct
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from backends.cpu import amx
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]
FULL: Shapes = ((16, 64),) * 8


def config(shapes: Shapes = FULL, palette: int = 1, start_row: int = 0, reserved: int = 0) -> bytes:
    """The operand of LDTILECFG for tiles with so many rows and bytes per row."""
    shapes = (*shapes, *((0, 0),) * (8 - len(shapes)))
    row_bytes, rows = struct.pack("<8H", *(s[1] for s in shapes)), bytes(s[0] for s in shapes)
    return bytes([palette, start_row, *[reserved] * 14]) + row_bytes + bytes(16) + rows + bytes(8)


@pytest.fixture
def tiles(amx_stand_in: ModuleType) -> Iterator[ModuleType]:
    amx_stand_in.tilerelease()
    yield amx_stand_in
    amx_stand_in.tilerelease()


def load(tiles: ModuleType, number: int, matrix: Tensor) -> None:
    tiles.tileloadd(number, matrix.data_ptr(), matrix.stride(0) * matrix.element_size())


def store(tiles: ModuleType, number: int) -> Tensor:
    """All 16 x 16 floats that the instruction could write. NaN where it wrote none."""
    matrix = torch.full((16, 16), float("nan"))
    tiles.tilestored(number, matrix.data_ptr(), 64)
    return matrix


def paired(b: Tensor) -> Tensor:
    """(2k, n) -> (k, 2n): neighbours in the summed index side by side, as a right operand needs them."""
    return b.unflatten(0, (-1, 2)).transpose(1, 2).flatten(1).contiguous()


def product(tiles: ModuleType, sums: Tensor, a: Tensor, b: Tensor) -> Tensor:
    load(tiles, 0, sums)
    load(tiles, 1, a)
    load(tiles, 2, paired(b))
    tiles.tdpbf16ps(0, 1, 2)
    return store(tiles, 0)


@pytest.mark.parametrize(("m", "k", "n"), [(16, 16, 16), (5, 3, 7), (1, 16, 2)])
def test_product(tiles: ModuleType, m: int, k: int, n: int) -> None:
    """Close to float64, and exact for whole numbers. Nothing outside a smaller tile is read or written."""
    tiles.ldtilecfg(config(((m, 4 * n), (m, 4 * k), (k, 4 * n))))
    sums, a, b = torch.randn(m, n), torch.randn(m, 2 * k).bfloat16(), torch.randn(2 * k, n).bfloat16()
    found = product(tiles, sums, a, b)
    assert found[m:].isnan().all() and found[:, n:].isnan().all()
    terms = a.double().abs() @ b.double().abs() + sums.double().abs()
    assert ((found[:m, :n].double() - (sums.double() + a.double() @ b.double())).abs() <= 2e-7 * terms).all()
    whole = torch.randint(-8, 9, (m, 2 * k)).bfloat16(), torch.randint(-8, 9, (2 * k, n)).bfloat16()
    assert torch.equal(product(tiles, sums.round(), *whole)[:m, :n], sums.round() + whole[0].float() @ whole[1].float())


def test_order_of_sums(tiles: ModuleType) -> None:
    """Even and odd terms are summed separately, then together, then added to the tile."""
    tiles.ldtilecfg(config())
    a, b, sums = torch.zeros(16, 32).bfloat16(), torch.ones(32, 16).bfloat16(), torch.ones(16, 16)
    a[0, :4] = torch.tensor([2.0**24, 1, 1, -(2.0**24)])  # even: 2^24 + 1 = 2^24; odd: 1 - 2^24; together 1
    a[1, :3], sums[1] = torch.tensor([1.0, 0, 1]), 2.0**24  # 2 + 2^24; added one by one, the ones would be lost
    found = product(tiles, sums, a, b)
    assert (found[0] == 2).all() and (found[1] == 2.0**24 + 2).all() and (found[2:] == 1).all()


def test_denormals_are_zeros_and_nan_spreads(tiles: ModuleType) -> None:
    tiles.ldtilecfg(config())
    a, b = torch.zeros(16, 32).bfloat16(), torch.zeros(32, 16).bfloat16()
    a[0, 0], b[0, 0] = 2.0**-130, 2.0**20  # read as zero
    a[1, 0], b[0, 1] = 2.0**-100, 2.0**-40  # a product that is written as zero
    a[2, 1], b[1, 2] = float("nan"), 0.0
    sums = torch.zeros(16, 16)
    sums[3, 3] = 2.0**-130
    found = product(tiles, sums, a, b)
    assert found[0, 0] == 0 and found[1, 1] == 0 and found[3, 3] == 0
    assert found[2].isnan().all() and found[[0, 1, 3]].isfinite().all()


def test_loads_clear_what_they_do_not_fill(tiles: ModuleType) -> None:
    tiles.ldtilecfg(config(((4, 16),)))
    load(tiles, 0, torch.ones(16, 16))
    tiles.tilezero(0)
    assert not store(tiles, 0)[:4, :4].any()


@pytest.mark.parametrize("number", [-1, 8])
def test_there_are_eight_tiles(tiles: ModuleType, number: int) -> None:
    tiles.ldtilecfg(config())
    with pytest.raises(RuntimeError, match="eight tiles"):
        tiles.tilezero(number)


def test_tiles_must_be_configured(tiles: ModuleType) -> None:
    memory = torch.zeros(16, 16)
    uses = [
        lambda: tiles.tilezero(0),
        lambda: tiles.tileloadd(0, memory.data_ptr(), 64),
        lambda: tiles.tilestored(0, memory.data_ptr(), 64),
        lambda: tiles.tdpbf16ps(0, 1, 2),
    ]
    for released in (False, True):
        for use in uses:
            with pytest.raises(RuntimeError, match="no tiles are configured"):
                use()
        if not released:
            tiles.ldtilecfg(config())
            tiles.tilerelease()
    tiles.ldtilecfg(config(((16, 64),)))
    with pytest.raises(RuntimeError, match="this tile is not configured"):
        tiles.tilezero(1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (config(((17, 64),)), "at most 16 rows of 64 bytes"),
        (config(((16, 68),)), "at most 16 rows of 64 bytes"),
        (config(((16, 0),)), "or neither"),
        (config(palette=2), "palette"),
        (config(start_row=3), "first row"),
        (config(reserved=1), "reserved"),
    ],
)
def test_wrong_configurations(tiles: ModuleType, wrong: bytes, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        tiles.ldtilecfg(wrong)


def test_a_missing_release(tiles: ModuleType) -> None:
    tiles.ldtilecfg(config())
    with pytest.raises(RuntimeError, match="not released"):
        tiles.ldtilecfg(config())


@pytest.mark.parametrize(
    ("instruction", "message"),
    [("unconfigured", "TILEZERO: no tiles are configured."), ("other", "SIGILL: this is no tile instruction.")],
)
def test_faults_of_machine_code_end_the_process(tiles: ModuleType, instruction: str, message: str) -> None:
    result = amx.run_apart(tiles, f"module.run_{instruction}()")
    assert result.returncode == -signal.SIGABRT and result.stderr.startswith(message)


@pytest.mark.parametrize(
    "shapes",
    [((16, 64), (15, 64), (16, 64)), ((16, 64), (16, 32), (16, 64)), ((16, 64), (16, 64), (16, 32))],
    ids=["rows", "summed words", "columns"],
)
def test_shapes_must_match(tiles: ModuleType, shapes: Shapes) -> None:
    tiles.ldtilecfg(config(shapes))
    with pytest.raises(RuntimeError, match="shapes don't match"):
        tiles.tdpbf16ps(0, 1, 2)


def test_operands_are_three_tiles_of_whole_words(tiles: ModuleType) -> None:
    tiles.ldtilecfg(config(((2, 6), (2, 4), (1, 6))))
    with pytest.raises(RuntimeError, match="whole words"):
        tiles.tdpbf16ps(0, 1, 2)
    for same in ((0, 0, 2), (0, 1, 0), (0, 1, 1)):
        with pytest.raises(RuntimeError, match="three"):
            tiles.tdpbf16ps(*same)
