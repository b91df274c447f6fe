"""How the CPU kernels are compiled: instruction sets are separate, and sanitizers find nothing."""

from __future__ import annotations

import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from backends.builds import Builds
from backends.cpu import amx, instrumented
from backends.cuda.sanitizers import FLAGS, RACE, THREAD_FLAGS, run_sanitized, run_thread_sanitized, thread_sanitizer

import build_tools
from pvdm_fast.backends import extensions

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: install g++")
MISSING = extensions.availability("cpu")
needs_extension = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have the plain set only: run on x86-64")
@pytest.mark.exhaustive
def test_instruction_sets_share_no_symbols(tmp_path: Path) -> None:
    """The linker may take a symbol from any object that defines it. AVX-512 code could then run on CPUs without
    AVX-512.

    So an object for an instruction set may define only symbols of its own namespace. (What the linker took is tested
    below, in the installed extension.)
    """
    extension = build_tools.cpu_extension(tmp_path / "unused.so", "")
    for name, (source, _, flags) in extension.objects.items():
        isa = name.rpartition("_")[2]
        if isa not in ("avx512", "amx"):
            continue
        target = tmp_path / f"{name}.o"
        common = [*build_tools.CXX_FLAGS.replace("-O3", "-O1").split(), f"-I{ROOT / 'csrc'}"]
        subprocess.run(["g++", *common, *shlex.split(flags), "-c", str(source), "-o", str(target)], check=True)
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", str(target)], capture_output=True, text=True, check=True
        )
        shared = re.findall(r"^[0-9a-f]+ ([TWi]) (.*)$", listing.stdout, re.MULTILINE)
        assert shared, "nm lists nothing"
        assert not [symbol for _, symbol in shared if f"pvdm::{isa}" not in symbol and f"{isa}::" not in symbol]


@pytest.fixture(scope="module")
def functions() -> list[tuple[str, str]]:
    """Name and machine code of every function of the installed extension."""
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump: install binutils")
    command = ["objdump", "-dC", "-M", "intel", "--no-show-raw-insn", str(extensions.extension("_cpu").__file__)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = (function.partition("\n") for function in re.split(r"^[0-9a-f]+ <", code, flags=re.MULTILINE)[1:])
    return [(name, body) for name, _, body in found]


def strangers(functions: list[tuple[str, str]]) -> list[str]:
    """Functions with an instruction of a set that neither they nor a better set's namespace may have."""
    of_avx512, of_avx2 = r"\b(avx512|avx512bf16|amx)::", r"\b(avx2|avx512|avx512bf16|amx)::"
    marks = ((r"\b(zmm\d+|[xy]mm(1[6-9]|2\d|3[01]))\b", of_avx512), (r"\tk[a-z]", of_avx512), (r"\tv[a-z]", of_avx2))
    return [name for name, body in functions for mark, of in marks if re.search(mark, body) and not re.search(of, name)]


@needs_extension
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have the plain set only: run on x86-64")
def test_no_function_has_another_sets_instructions(functions: list[tuple[str, str]]) -> None:
    """In the installed extension: what every CPU runs, has no AVX. What one with AVX2 runs, has no AVX-512."""
    assert any(re.search(r"\bavx512::", name) and "zmm" in body for name, body in functions)
    assert strangers(functions) == []
    for name, body in (
        ("float std::min<float>(...)>:", " 10:\tvminps zmm0,zmm1,zmm2\n"),
        ("float std::max<float>(...)>:", " 10:\tvmaxss xmm0,xmm1,xmm2\n"),
        ("pvdm::avx2::geglu_forward(...)>:", " 10:\tvaddps ymm17,ymm1,ymm2\n"),
        ("pvdm::plain::geglu_forward(...)>:", " 10:\tkmovb k1,eax\n"),
    ):
        assert strangers([(name, body)]), "a planted fault"


@needs_extension
@pytest.mark.skipif(
    "amx" not in extensions.build_info().get("_cpu", {}).get("targets", ()),
    reason="built without AMX: install binutils 2.36 or newer and build again",
)
def test_tile_instructions_are_in_amx_only(functions: list[tuple[str, str]]) -> None:
    """In the installed extension. Their operands are a sum (tiles 0-3), a left (4, 5) and a right operand (6, 7)."""
    found: dict[str, set[str]] = {}
    for name, body in functions:
        for instruction in re.findall(r"\s(ldtilecfg|tilerelease|tilezero|tileload\w+|tilestored|tdp\w+)\b", body):
            found.setdefault(instruction, set()).add(name)
        for operands in re.findall(r"tdpbf16ps\s+(\S+)", body):
            assert re.fullmatch(r"tmm[0-3],tmm[45],tmm[67]", operands), f"{operands} in {name}"
    assert set(found) == {"ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbf16ps"}
    assert all("pvdm::amx::" in name for names in found.values() for name in names), found


SCRIPT = Path(__file__).with_name("sanitized_cpu.py")


def best() -> str:
    return str(extensions.extension("_cpu").isas()[-1])


@pytest.mark.exhaustive  # compiling the kernels takes minutes; every change of a kernel runs it
@needs_extension
def test_addresses_and_undefined_behaviour(builds: Builds) -> None:
    """Every kernel, dtype and instruction set under AddressSanitizer and UBSan."""
    used = extensions.extension("_cpu").isas()
    built = builds.get("addresses", lambda folder: instrumented.build(folder, used, FLAGS), *used)
    run_sanitized(SCRIPT, built, 2, *used)


@pytest.mark.exhaustive
@needs_extension
def test_addresses_of_tiles(builds: Builds) -> None:
    """Attention in the set amx: loads and stores of the stand-in for tiles, and everything around them."""
    amx.skip_where_it_cannot_run(extensions.extension("_cpu").isas())
    built = builds.get("addresses_tiles", lambda folder: amx.build(folder, ("-O1", *FLAGS)))
    run_sanitized(SCRIPT, built, 2, "amx")


@pytest.fixture(scope="module")
def built_for_threads(builds: Builds) -> Path:
    thread_sanitizer()
    planted = SCRIPT.with_name("planted_race.cpp")
    return builds.get("threads", lambda folder: instrumented.build(folder, [best()], THREAD_FLAGS, planted), best())


@pytest.mark.exhaustive
@needs_extension
@pytest.mark.skipif(platform.system() != "Linux", reason="ThreadSanitizer is preloaded as on Linux: run on Linux")
def test_threads(built_for_threads: Path) -> None:
    """No kernel has a data race: ThreadSanitizer finds only the planted one.

    One instruction set is enough, because threads share the work in the same way in all.
    """
    planted = run_thread_sanitized(SCRIPT, built_for_threads, 3, "race")
    assert planted.returncode == RACE and "planted_race.cpp:9" in planted.stderr, planted.stderr[-3000:]
    result = run_thread_sanitized(SCRIPT, built_for_threads, 3, best())
    assert result.returncode == 0 and "clean" in result.stdout, result.stderr[-6000:]
