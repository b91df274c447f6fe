"""How the CPU kernels are compiled: each instruction set apart, and clean under the sanitizers."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest
from native.sanitizers import FLAGS, RACE, THREAD_FLAGS, run_sanitized, run_thread_sanitized, thread_sanitizer

from pvdm_fast import native

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import build_tools  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have the plain set only")
def test_instruction_sets_share_no_symbols(tmp_path: Path) -> None:
    """A symbol that two objects define is taken from either: AVX-512 code would then run where it can't.

    So an object compiled for an instruction set may only define symbols of its own namespace.
    """
    extension = build_tools.cpu_extension(tmp_path / "unused.so", "")
    for name, (source, _, flags) in extension.objects.items():
        if not name.endswith("_avx512"):
            continue
        target = tmp_path / f"{name}.o"
        common = [*build_tools.CXX_FLAGS.replace("-O3", "-O1").split(), f"-I{ROOT / 'csrc'}"]
        subprocess.run(["g++", *common, *flags.split(), "-c", str(source), "-o", str(target)], check=True)
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", str(target)], capture_output=True, text=True, check=True
        )
        shared = re.findall(r"^[0-9a-f]+ ([TWi]) (.*)$", listing.stdout, re.MULTILINE)
        assert shared, "nm lists nothing"
        assert not [symbol for _, symbol in shared if "pvdm::avx512" not in symbol and "avx512::" not in symbol]


def without(flags: str, isas: list[str]) -> str:
    return " ".join(flag for flag in flags.split(" ") if flag not in {f"-DPVDM_HAVE_{isa.upper()}" for isa in isas})


def build_instrumented(folder: Path, flags: tuple[str, ...], used: set[str], *extra: Path) -> Path:
    """The extension in the instruction sets `used`, with `flags` and the sources `extra`; its path."""
    include = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
    extension = build_tools.cpu_extension(folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}", include)
    extension.link += " " + " ".join(flags)
    left_out = [isa for isa in build_tools.isa_flags() if isa not in used]
    extension.objects = {
        name: (source, rule, f"{without(flags_of, left_out)} -O1 -g {' '.join(flags)}")
        for name, (source, rule, flags_of) in extension.objects.items()
        if not name.endswith(tuple(f"_{isa}" for isa in left_out))
    }
    extension.objects |= {path.stem: (path, "cxx", f"-O1 -g1 {' '.join(flags)}") for path in extra}
    build_tools.run_ninja(extension, folder / "objects")
    return extension.output


needs_extension = pytest.mark.skipif(native.availability("cpu") is not None, reason=str(native.availability("cpu")))
SCRIPT = Path(__file__).with_name("sanitized_cpu.py")


@pytest.mark.slow
@needs_extension
def test_addresses_and_undefined_behaviour(tmp_path: Path) -> None:
    """Every kernel and dtype under AddressSanitizer and UBSan."""
    best = native.extension("_cpu").isas()[-1]
    run_sanitized(SCRIPT, build_instrumented(tmp_path, FLAGS, {"plain", best}), 2)


@pytest.fixture(scope="module")
def built_for_threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """How work is dealt out to threads does not depend on the instruction set."""
    thread_sanitizer()
    folder = tmp_path_factory.mktemp("threads")
    return build_instrumented(folder, THREAD_FLAGS, {"plain"}, SCRIPT.with_name("planted_race.cpp"))


@pytest.mark.slow
@needs_extension
@pytest.mark.skipif(platform.system() != "Linux", reason="ThreadSanitizer is preloaded as on Linux")
def test_threads(built_for_threads: Path) -> None:
    """No kernel has a data race: ThreadSanitizer finds none in any, and finds the one that is planted."""
    planted = run_thread_sanitized(SCRIPT, built_for_threads, 3, "race")
    assert planted.returncode == RACE and "planted_race.cpp:9" in planted.stderr, planted.stderr[-3000:]
    result = run_thread_sanitized(SCRIPT, built_for_threads, 3)
    assert result.returncode == 0 and "clean" in result.stdout, result.stderr[-6000:]
