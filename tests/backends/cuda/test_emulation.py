"""The host stand-in itself: it computes as the PTX manual says, and it finds every planted fault."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from backends.builds import Builds
from backends.cuda import emulated
from backends.cuda.sanitizers import FLAGS
from torch import Tensor

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: install g++")
SOURCE = Path(__file__).with_name("faults.cu")
K = 96


def built(builds: Builds, *flags: str) -> Path:
    def build(folder: Path) -> Path:
        return emulated.build(folder, flags, sources=(SOURCE,), name="_faults")

    return builds.get("faults" + "".join(flags[:1]).partition("=")[2].replace(",", "_"), build, *flags)


@pytest.fixture(scope="module")
def faults(builds: Builds) -> ModuleType:
    return emulated.load(built(builds))


def operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(-8, 9, (32, K), generator=generator).bfloat16() for _ in range(2))  # type: ignore[return-value]


def product(faults: ModuleType, fault: str, order: int) -> Tensor:
    """a @ b.T, by the kernel with `fault`. All sums are exact in float32."""
    faults.set_schedule(order)
    a, b = operands()
    out = torch.full((32, 32), float("nan"))
    getattr(faults, fault)(a.data_ptr(), b.data_ptr(), out.data_ptr(), K)
    return out


def total(faults: ModuleType, fault: str, order: int = 0, size: int = 300) -> float:
    faults.set_schedule(order)
    x, out = torch.ones(size), torch.zeros(1)
    getattr(faults, fault)(x.data_ptr(), 0, out.data_ptr(), size)
    return float(out)


def expected() -> Tensor:
    a, b = operands()
    return a.float() @ b.float().T


@pytest.mark.parametrize("order", [0, 1, 2])
def test_right_kernels_are_right(faults: ModuleType, order: int) -> None:
    assert torch.equal(product(faults, "none", order), expected())
    assert total(faults, "none", order) == 300


def test_counters(faults: ModuleType) -> None:
    faults.counts()
    product(faults, "none", 0)
    steps = K // 16
    assert faults.counts() == {
        "mma": steps * 2 * 4,  # two warps, four 16 x 8 tiles each
        "ldmatrix": steps * 2 * (4 + 2 * 4),
        "bank_conflicts": 0,  # rows of 48 bytes
        "barriers": 2 * steps,
        "async_bytes": 2 * 32 * K * 2,
    }
    product(faults, "wrong_lane", 0)
    assert faults.counts()["bank_conflicts"] == steps * 2 * 4  # pairs of lanes read one row


@pytest.mark.parametrize("fault", ["missing_wait", "missing_barrier", "early_overwrite"])
def test_pipeline_faults_give_nan_or_depend_on_the_order(faults: ModuleType, fault: str) -> None:
    results = [product(faults, fault, order) for order in (0, 1, 2)]
    assert any(not torch.isfinite(r).all() for r in results)


def test_a_wrong_lane_mapping_gives_wrong_values(faults: ModuleType) -> None:
    found = product(faults, "wrong_lane", 0)
    assert torch.isfinite(found).all() and not torch.equal(found, expected())


def test_unwritten_shared_memory_is_nan(faults: ModuleType) -> None:
    assert total(faults, "unwritten_shared") != total(faults, "unwritten_shared")


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergent_barrier", "barrier"),
        ("partial_warp", "can go on|different operations|barrier"),
        ("wrong_mask", "outside its"),
    ],
)
def test_divergence_is_an_error(faults: ModuleType, fault: str, message: str, order: int) -> None:
    with pytest.raises(RuntimeError, match=message):
        total(faults, fault, order)


def test_copies_never_waited_for_are_an_error(faults: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="asynchronous copies under way"):
        product(faults, "copies_left", 0)


def test_fragment_layouts(faults: ModuleType) -> None:
    """Against the figures of the PTX manual for m16n8k16 and ldmatrix, written out by row and column."""
    loaded, sums = torch.zeros(2, 32, 4, 2, dtype=torch.int16), torch.zeros(32, 4)
    for unit in range(0, 128, 5):
        faults.fragments(loaded.data_ptr(), sums.data_ptr(), unit)
        k, n = divmod(unit, 8)
        for lane in range(32):
            group, place = divmod(lane, 4)
            for i, (row, column) in enumerate(((group, 2 * place), (group, 2 * place + 1))):
                assert sums[lane, i] == (16 * row + k + 1 if column == n else 0)
                assert sums[lane, i + 2] == (16 * (row + 8) + k + 1 if column == n else 0)
    for lane in range(32):
        group, place = divmod(lane, 4)
        for matrix, (row, column) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
            for half in (0, 1):
                assert loaded[0, lane, matrix, half] == (row + group) * 100 + column + 2 * place + half
                assert loaded[1, lane, matrix, half] == (row + 2 * place + half) * 100 + column + group


def run_under(library: str, module: Path, fault: str) -> subprocess.CompletedProcess[str]:
    """Runs the faulty kernel in a separate process with a sanitizer preloaded."""
    found = subprocess.run(["g++", f"-print-file-name={library}"], capture_output=True, text=True, check=True)
    path = os.pathsep.join(str(Path(__file__).resolve().parents[up]) for up in (2, 3))
    environment = {**os.environ, "LD_PRELOAD": found.stdout.strip(), "PYTHONPATH": path}
    environment |= {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66"}
    command = [sys.executable, str(Path(__file__).with_name("faulty_run.py")), str(module), fault]
    if library == "libtsan.so":  # it can't cope with the amount of address randomisation in current kernels
        command = ["setarch", "-R", *command]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def with_addresses(builds: Builds) -> Path:
    return built(builds, *FLAGS)


@pytest.fixture(scope="module")
def with_races(builds: Builds) -> Path:
    if subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False).returncode:
        pytest.skip("ThreadSanitizer needs `setarch -R`, which this system refuses: run where it is allowed")
    return built(builds, "-fsanitize=thread")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["shared_out_of_bounds", "global_out_of_bounds", "none"])
def test_addresses(with_addresses: Path, fault: str) -> None:
    result = run_under("libasan.so", with_addresses, fault)
    if fault == "none":
        assert result.returncode == 0, result.stderr
    else:
        assert "AddressSanitizer" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["missing_atomic", "missing_barrier", "none"])
def test_races(with_races: Path, fault: str) -> None:
    result = run_under("libtsan.so", with_races, fault)
    if fault == "none":
        assert result.returncode == 0, result.stderr[-4000:]
    else:
        assert "data race" in result.stderr, result.stderr[-4000:]
