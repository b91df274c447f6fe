"""How the CPU kernels are compiled: each instruction set apart, and clean under the sanitizers."""

from __future__ import annotations

import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pybind11
import pytest
from backends.cpu import amx
from backends.cuda.sanitizers import FLAGS, RACE, THREAD_FLAGS, run_sanitized, run_thread_sanitized, thread_sanitizer

import build_tools
from pvdm_fast.backends import extensions

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
MISSING = extensions.availability("cpu")
needs_extension = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have the plain set only")
def test_instruction_sets_share_no_symbols(tmp_path: Path) -> None:
    """A symbol that two objects define is taken from either: AVX-512 code would then run where it can't.

    So an object compiled for an instruction set may only define symbols of its own namespace.
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


@needs_extension
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif("amx" not in extensions.build_info().get("_cpu", {}).get("targets", ()), reason="built without AMX")
def test_tile_instructions_are_in_amx_only() -> None:
    """In the installed extension; and their operands are a sum (tiles 0-3), a left (4, 5) and a right one (6, 7)."""
    command = ["objdump", "-dC", "-M", "intel", "--no-show-raw-insn", str(extensions.extension("_cpu").__file__)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, set[str]] = {}
    for function in re.split(r"^[0-9a-f]+ <", code, flags=re.MULTILINE)[1:]:
        name, _, body = function.partition("\n")
        for instruction in re.findall(r"\s(ldtilecfg|tilerelease|tilezero|tileload\w+|tilestored|tdp\w+)\b", body):
            found.setdefault(instruction, set()).add(name)
        for operands in re.findall(r"tdpbf16ps\s+(\S+)", body):
            assert re.fullmatch(r"tmm[0-3],tmm[45],tmm[67]", operands), f"{operands} in {name}"
    assert set(found) == {"ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbf16ps"}
    assert all("pvdm::amx::" in name for names in found.values() for name in names), found


def build_instrumented(folder: Path, isas: Sequence[str], flags: tuple[str, ...], *extra: Path) -> Path:
    """The extension with `flags`, and with the sources `extra`; its path. Left without `flags`, as they take long to
    compile, are the bindings and other instruction sets than `isas` (a set is offered only where those before are)."""
    include = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
    extension = build_tools.cpu_extension(folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}", include)
    extension.link += " " + " ".join(flags)
    others = (*(f"_{isa}" for isa in build_tools.isa_flags() if isa not in isas), "bindings_cpu")
    instrumented = f"-O1 -g {' '.join(flags)}"
    extension.objects = {
        name: (source, rule, f"{flags_of} {'-O0' if name.endswith(others) else instrumented}")
        for name, (source, rule, flags_of) in extension.objects.items()
    } | {path.stem: (path, "cxx", instrumented) for path in extra}
    build_tools.run_ninja(extension, folder / "objects")
    return extension.output


SCRIPT = Path(__file__).with_name("sanitized_cpu.py")


def best() -> str:
    return str(extensions.extension("_cpu").isas()[-1])


@pytest.mark.slow
@needs_extension
@pytest.mark.parametrize("isas", ["best", pytest.param("all", marks=pytest.mark.exhaustive)])
def test_addresses_and_undefined_behaviour(isas: str, tmp_path: Path) -> None:
    """Every kernel and dtype under AddressSanitizer and UBSan."""
    used = [best()] if isas == "best" else extensions.extension("_cpu").isas()
    run_sanitized(SCRIPT, build_instrumented(tmp_path, used, FLAGS), 2, *used)


@pytest.mark.slow
@needs_extension
def test_addresses_of_tiles(tmp_path: Path) -> None:
    """Attention in the set amx: what is loaded and stored by the stand-in of the tiles, and all around it."""
    amx.skip_where_it_cannot_run(extensions.extension("_cpu").isas())
    run_sanitized(SCRIPT, amx.build(tmp_path, ("-O1", *FLAGS)), 2, "amx")


@pytest.fixture(scope="module")
def built_for_threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    thread_sanitizer()
    folder = tmp_path_factory.mktemp("threads")
    return build_instrumented(folder, [best()], THREAD_FLAGS, SCRIPT.with_name("planted_race.cpp"))


@pytest.mark.slow
@needs_extension
@pytest.mark.skipif(platform.system() != "Linux", reason="ThreadSanitizer is preloaded as on Linux")
def test_threads(built_for_threads: Path) -> None:
    """No kernel has a data race: ThreadSanitizer finds none in any, and finds the one that is planted.

    In one instruction set: threads share the work alike in all.
    """
    planted = run_thread_sanitized(SCRIPT, built_for_threads, 3, "race")
    assert planted.returncode == RACE and "planted_race.cpp:9" in planted.stderr, planted.stderr[-3000:]
    result = run_thread_sanitized(SCRIPT, built_for_threads, 3, best())
    assert result.returncode == 0 and "clean" in result.stdout, result.stderr[-6000:]
