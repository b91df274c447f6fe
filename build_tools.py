"""Finds compilers, chooses targets and drives ninja for setup.py. Needs neither torch nor setuptools."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
# Code for x.0 also runs on x.1 to x.9 (8.0 on 8.6 and 8.9). GPUs newer than all of these compile the PTX on first use.
CUDA_TARGETS = ("8.0", "9.0", "10.0", "12.0+PTX")
USUAL_TOOLKIT = Path("/usr/local/cuda")
CUDA_MINIMUM = (12, 8)  # the first toolkit that supports 10.0 and 12.0
ARCH_NAMES = {"Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0;12.0+PTX"}

# Every csrc/cpu/*.cpp is compiled once for each of these. The choice between them is made at run time.
AVX512 = (
    # GCC 12 warns about the headers of its own intrinsics.
    "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512 -Wno-maybe-uninitialized"
)
X86_ISAS = {
    "plain": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512bf16": f"{AVX512} -mavx512bf16",
    "amx": f"{AVX512} -mavx512bf16",  # the tile instructions are in assembly
}
# What amx is compiled for; avx512bf16 lends it the rest.
TILE_SOURCES = ("attention_forward", "attention_backward", "triplane_project_forward", "triplane_project_backward")
CXX_FLAGS = "-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wextra"


class Unbuildable(Exception):
    """An extension that can't be built here. The message is the one line that is shown and stored in the build
    facts."""


@dataclass
class Extension:
    """What ninja builds: objects (name -> source, rule, flags), then one shared library."""

    name: str
    output: Path
    link: str
    objects: dict[str, tuple[Path, str, str]] = field(default_factory=dict)


def compiler() -> str:
    """The C++ compiler: CXX, otherwise g++, c++ or clang++, in this order.

    Raises:
        Unbuildable: there is none.
    """
    asked = os.environ.get("CXX")
    candidates = (asked,) if asked else ("g++", "c++", "clang++")
    for name in candidates:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise Unbuildable(
        f"no C++ compiler found (looked for {', '.join(candidates)}): install g++, or set CXX, and install again"
    )


def assembles(instruction: str) -> bool:
    """Whether the compiler's assembler supports an instruction."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*shlex.split(compiler()), "-x", "c++", "-c", "-", "-o", str(Path(folder) / "probe.o")]
        probe = f'void probe() {{ asm("{instruction}"); }}'
        return subprocess.run(command, input=probe, capture_output=True, text=True, check=False).returncode == 0


def isa_flags() -> dict[str, str]:
    """Instruction sets to build for on this machine's architecture, with their compiler flags.

    Without amx if the assembler is too old for it (GNU before 2.36, such as Debian 11's).
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"plain": ""}
    return {isa: flags for isa, flags in X86_ISAS.items() if isa != "amx" or assembles("tilerelease")}


def isa_defines(isas: Sequence[str]) -> str:
    """The lists of instruction sets that csrc/cpu/runtime/isa.h reads, for a shell."""
    lists = {
        "PVDM_ISAS": isas,
        "PVDM_WHOLE_ISAS": [isa for isa in isas if isa != "amx"],
        "PVDM_TILE_ISAS": [isa for isa in isas if isa == "amx"],
    }
    entries = {name: "".join(f"X({isa},__VA_ARGS__)" for isa in sets) for name, sets in lists.items()}
    return " ".join(shlex.quote(f"-D{name}(X,...)={entry}") for name, entry in entries.items())


def abi() -> int:
    """The version number of the bindings' arguments. Only pvdm_fast/backends/extensions.py states it."""
    source = (ROOT / "pvdm_fast" / "backends" / "extensions.py").read_text()
    found = re.search(r"^ABI = (\d+)", source, re.MULTILINE)
    assert found, "pvdm_fast/backends/extensions.py names no ABI"
    return int(found[1])


def first_line(command: list[str], pattern: str = ".*") -> str:
    """The first match of `pattern` in a command's output, or ""."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(pattern, result.stdout)
    return match.group(0) if match else ""


def parse_arch_list(text: str) -> tuple[list[str], list[str]]:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX", separators ";", "," or blanks) -> compute targets, PTX targets.

    Raises:
        Unbuildable: these kernels can't be built for an entry.
    """
    for name, value in ARCH_NAMES.items():
        text = re.sub(rf"\b{name}\b", value, text)
    targets: list[str] = []
    ptx: list[str] = []
    for entry in filter(None, re.split(r"[;,\s]+", text)):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match or int(match[1]) < 8:
            raise Unbuildable(
                f"TORCH_CUDA_ARCH_LIST has {entry!r}: expected compute capabilities from 8.0 on, such as '8.0;9.0+PTX'"
            )
        target = match[1] + match[2] + match[3]
        if target not in targets:
            targets.append(target)
        if match[4] and target not in ptx:
            ptx.append(target)
    if not targets:
        raise Unbuildable("TORCH_CUDA_ARCH_LIST is set, but names no architecture: unset it, or write '8.0;9.0+PTX'")
    return targets, ptx


def arch_flags(targets: list[str], ptx: list[str]) -> str:
    flags = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets]
    flags += [f"-gencode=arch=compute_{t},code=compute_{t}" for t in ptx]
    return " ".join(flags)


def check_targets(nvcc: str, targets: list[str]) -> None:
    """Raise Unbuildable if a compiler doesn't support a target."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout.split()
    known = [code.removeprefix("sm_") for code in listed if code.startswith("sm_")]
    if unknown := [target for target in targets if known and target not in known]:
        raise Unbuildable(
            f"TORCH_CUDA_ARCH_LIST asks for sm_{', sm_'.join(unknown)}, which {nvcc} does not know: it can build for "
            f"sm_{', sm_'.join(known)}"
        )


@dataclass
class Toolkit:
    """A CUDA toolkit: its compiler, root folder and version."""

    nvcc: str
    root: Path
    version: tuple[int, int]


def find_toolkit() -> Toolkit:
    """The CUDA toolkit: CUDA_HOME, otherwise that of nvcc on PATH, otherwise /usr/local/cuda.

    nvcc on PATH may be a wrapper elsewhere. So if it isn't in /usr/local/cuda, nvcc itself is asked.

    Raises:
        Unbuildable: nvcc is missing, too old, or doesn't run.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    usual = USUAL_TOOLKIT
    if home:
        root, nvcc = Path(home), str(Path(home) / "bin" / "nvcc")
        if not Path(nvcc).exists():
            raise Unbuildable(f"CUDA_HOME is {home}, but {nvcc} does not exist: correct or unset it")
    else:
        nvcc = shutil.which("nvcc") or str(usual / "bin" / "nvcc")
        if not Path(nvcc).exists():
            raise Unbuildable(
                "no nvcc found (CUDA_HOME, PATH, /usr/local/cuda): install the CUDA toolkit and install again"
            )
        root = usual if (usual / "include" / "cuda_runtime.h").exists() else _root_from_dryrun(nvcc)
    found = re.search(r"release (\d+)\.(\d+)", first_line([nvcc, "--version"], r"release \d+\.\d+"))
    if not found:
        raise Unbuildable(f"{nvcc} --version does not run or names no release: repair the CUDA toolkit")
    version = (int(found[1]), int(found[2]))
    if version < CUDA_MINIMUM:
        raise Unbuildable(
            f"nvcc {version[0]}.{version[1]} is too old: CUDA {CUDA_MINIMUM[0]}.{CUDA_MINIMUM[1]} or newer is needed"
        )
    return Toolkit(nvcc, root, version)


def _root_from_dryrun(nvcc: str) -> Path:
    """The toolkit's root as nvcc itself states it (`#$ TOP=...` of its dry run)."""
    result = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    match = re.search(r"^#\$ TOP=(.+)$", result.stderr, re.MULTILINE)
    if not match:
        raise Unbuildable(f"{nvcc} --dryrun does not name its toolkit: set CUDA_HOME")
    return Path(match[1].strip()).resolve()


def cpu_extension(output: Path, python_flags: str, isas: dict[str, str] | None = None) -> Extension:
    """pvdm_fast._cpu: bindings and runtime are compiled once, each operation once per instruction set.

    Args:
        isas: instruction sets and their flags. None: all of this machine's architecture.
    """
    link = f"{compiler()} -shared -fopenmp -Wl,--gc-sections"
    ext = Extension("_cpu", output, link)
    isas = isa_flags() if isas is None else isas
    defines = isa_defines(list(isas))
    source = ROOT / "csrc"
    ext.objects["bindings_cpu"] = (source / "bindings_cpu.cpp", "cxx", f"-DPVDM_ABI={abi()} {defines} {python_flags}")
    for path in sorted((source / "cpu" / "runtime").glob("*.cpp")):
        ext.objects[f"runtime_{path.stem}"] = (path, "cxx", f"{defines} -fopenmp")
    for path in sorted((source / "cpu").glob("*.cpp")):
        for isa, flags in isas.items():
            if isa == "amx" and path.stem not in TILE_SOURCES:
                continue
            own = f"-DPVDM_ISA={isa} -DPVDM_ISA_{isa.upper()}"
            ext.objects[f"{path.stem}_{isa}"] = (path, "cxx", f"{own} {defines} {flags}")
    return ext


def cuda_extension(output: Path, python_flags: str, toolkit: Toolkit, architectures: str) -> Extension:
    """pvdm_fast._cuda: every csrc/cuda/*.cu for all targets. The CUDA runtime is linked statically."""
    compiler()
    link = f"{shlex.quote(toolkit.nvcc)} -shared -cudart static {architectures}"
    ext = Extension("_cuda", output, link)
    source = ROOT / "csrc"
    include = f"-I{shlex.quote(str(toolkit.root / 'include'))}"
    ext.objects["bindings_cuda"] = (source / "bindings_cuda.cpp", "cxx", f"-DPVDM_ABI={abi()} {include} {python_flags}")
    for path in sorted((source / "cuda").glob("*.cu")):
        ext.objects[f"cuda_{path.stem}"] = (path, "nvcc", architectures)
    return ext


def python_flags(pybind11: str | Path) -> str:
    """The options that make Python's and pybind11's headers known; `pybind11`: the folder of the latter.

    Raises:
        Unbuildable: one of them isn't there.
    """
    python = sysconfig.get_paths()["include"]
    if not (Path(pybind11) / "pybind11" / "pybind11.h").exists():
        raise Unbuildable("there are no headers of pybind11: pip install pybind11")
    if not (Path(python) / "Python.h").exists():
        raise Unbuildable("there is no Python.h: install Python's headers (python3-dev)")
    return " ".join(f"-isystem {shlex.quote(str(folder))}" for folder in (pybind11, python))


def plan_cuda(output: Path, flags: str, architectures: str) -> tuple[Extension, Toolkit, dict[str, Any]]:
    """pvdm_fast._cuda for architectures as in TORCH_CUDA_ARCH_LIST: what ninja builds, with which toolkit, and the
    facts to keep of it. `flags` are those of `python_flags`.

    Raises:
        Unbuildable: there is no compiler or toolkit, or a target that the toolkit doesn't know.
    """
    toolkit = find_toolkit()
    targets, ptx = parse_arch_list(architectures)
    check_targets(toolkit.nvcc, targets)
    extension = cuda_extension(output, flags, toolkit, arch_flags(targets, ptx))
    version = ".".join(map(str, toolkit.version))
    return (
        extension,
        toolkit,
        {
            "compiler": f"nvcc {version}",
            "targets": [f"sm_{target}" for target in targets] + [f"ptx_{target}" for target in ptx],
        },
    )


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def ninja_file(ext: Extension, nvcc: str = "nvcc") -> str:
    """The build.ninja of an extension. Headers are tracked by the compilers' own dependency files."""
    include = f"-I{shlex.quote(str(ROOT / 'csrc'))}"
    user_flags = os.environ.get("CXXFLAGS", "").replace("$", "$$")
    nvcc_flags = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -Xfatbin -compress-all --expt-relaxed-constexpr"
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {compiler()} {CXX_FLAGS} {include} $flags {user_flags} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {shlex.quote(nvcc)} {nvcc_flags} {include} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {ext.link} $in -o $out",
    ]
    for name, (source, rule, flags) in ext.objects.items():
        lines += [f"build {name}.o: {rule} {_escape(source)}", f"  flags = {flags}"]
    lines += [f"build {_escape(ext.output)}: link {' '.join(f'{name}.o' for name in ext.objects)}"]
    return "\n".join(lines) + "\n"


def run_ninja(ext: Extension, folder: Path, nvcc: str = "nvcc") -> None:
    """Build an extension. Objects stay in `folder`, so the next build compiles only what changed.

    Raises:
        Unbuildable: there is no ninja; or a compiler failed: its output is printed.
    """
    program = [sys.executable, "-m", "ninja"] if find_spec("ninja") else [shutil.which("ninja") or ""]
    if not program[0]:
        raise Unbuildable("no ninja found: pip install ninja, and install again")
    folder.mkdir(parents=True, exist_ok=True)
    ext.output.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(ext, nvcc))
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    result = subprocess.run([*program, *jobs], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        print(result.stdout, file=sys.stderr)
        raise Unbuildable(f"compiling {ext.name} failed (the compiler's messages are in the build's output)")
