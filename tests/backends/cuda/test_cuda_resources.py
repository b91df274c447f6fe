"""The machine code of the built CUDA extension keeps its budget, and the budget finds planted faults."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cuda_resources
from benchmarks.cuda_resources import GPUS, MATRIX, TILES, Resources, main_loop, multiplies, over_budget
from pvdm_fast.backends import extensions
from pvdm_fast.errors import UserError

GOOD = Resources("slice", "float, true", "sm_80", 256, 40, 0, 0, 4, 4, Counter())
GOOD_MATRIX = Resources("matrix_dq", "x, 64", "sm_90", 128, 128, 0, 40000, 9, 9, Counter(HMMA=48, LDSM=24, LDGSTS=4))
PRODUCTS = {"matrix_forward": 2, "matrix_dq": 3, "matrix_dkv": 4}
ROWS = {"matrix_forward": {32: 64, 64: 64, 128: 32}, "matrix_dq": {32: 32, 64: 32, 128: 16}}


@pytest.fixture(scope="module")
def rows() -> list[Resources]:
    try:
        library = Path(str(extensions.extension("_cuda").__file__))
        cuda_resources.cuobjdump()
    except (extensions.ExtensionError, UserError) as error:
        pytest.skip(str(error))
    return cuda_resources.resources(library)


@pytest.mark.slow
def test_every_kernel_keeps_the_budget(rows: list[Resources]) -> None:
    problems = [problem for row in rows for problem in over_budget(row)]
    assert not problems, "\n".join(problems)
    built = {target for target in extensions.build_info()["_cuda"]["targets"] if target.startswith("sm_")}
    assert {row.gpu for row in rows} == built <= set(GPUS)


@pytest.mark.slow
def test_main_loops_do_what_was_planned(rows: list[Resources]) -> None:
    """A warp's matrix instructions per step: its 16 rows times the step's rows, over all channels, for each product.

    The loop also copies all of the next step, and there is no separate loop for copies.
    """
    for row in (row for row in rows if row.kernel in TILES and multiplies(row.kernel, row.variant)):
        blocks = int(row.variant.split(", ")[1])  # of 16 rows, times 32 outputs and 32 channels of a weight
        assert row.step["HMMA"] == 2 * 4 * blocks, row
        assert row.step["LDSM"] == 2 * (blocks + 2), row
        assert row.step["LDGSTS"] == 4, row
    for row in (row for row in rows if row.kernel in MATRIX):
        depth = int(row.variant.split(", ")[1])
        steps = ROWS.get(row.kernel, ROWS["matrix_dq"])[depth]
        assert row.step["HMMA"] == PRODUCTS[row.kernel] * 16 * steps * depth // (16 * 8 * 16), row
        assert row.step["LDGSTS"] == 2 * steps * depth // (8 * 128)  # two tensors' rows, 16 bytes a thread
        assert row.step["F2F"] == 0, "a pair of floats is rounded by one instruction"


@pytest.mark.slow
def test_docs_have_every_kernel(rows: list[Resources]) -> None:
    text = cuda_resources.DOCS.read_text()
    missing = {row.kernel for row in rows if f"| {row.kernel} | {row.gpu} |" not in text}
    assert not missing, (
        f"run python -m benchmarks.cuda_resources --write-docs: {cuda_resources.DOCS.name} lacks {missing}"
    )


def test_planted_faults_are_found() -> None:
    assert over_budget(GOOD) == over_budget(GOOD_MATRIX) == []
    planted = {
        "spills": replace(GOOD, spilled=2),
        "shared memory": replace(GOOD, shared=200 << 10),
        "16-byte load": replace(GOOD, wide_loads=0),
        "tensor cores": replace(GOOD_MATRIX, step=Counter(LDSM=1, LDGSTS=1)),
        "ldmatrix": replace(GOOD_MATRIX, step=Counter(HMMA=1, LDGSTS=1)),
        "asynchronous copies": replace(GOOD_MATRIX, step=Counter(HMMA=1, LDSM=1)),
    }
    for message, found in planted.items():
        assert [problem for problem in over_budget(found) if message in problem], message
    assert over_budget(replace(GOOD, variant="float, false", wide_loads=0)) == []  # rows that aren't aligned


def test_main_loop() -> None:
    """It is the shortest loop with all the matrix instructions, not the loop around it, and not those next to it."""
    code = [
        *((0, "MOV", ""), (16, "LDG.E", ""), (32, "HMMA.1", ""), (48, "HMMA.1", ""), (64, "LDSM", "")),
        *((80, "BRA", "0x20"), (96, "STG", ""), (112, "BRA", "0x0"), (128, "LDS", ""), (144, "BRA", "0x80")),
    ]
    assert main_loop(code) == Counter(HMMA=2, LDSM=1, BRA=1)


def test_occupancy() -> None:
    assert replace(GOOD, registers=32).blocks == 8  # 2048 threads
    assert replace(GOOD, registers=129, threads=128).blocks == 3  # 136 registers
    assert replace(GOOD, threads=128, shared=40 << 10).blocks == 4  # of 164 KiB


def test_nothing_was_built(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(name: str) -> None:
        raise extensions.ExtensionError("it was left out.")

    monkeypatch.setattr(extensions, "extension", absent)
    assert cuda_resources.main([]) == 2
    assert "There is nothing to look at: it was left out." in capsys.readouterr().err
