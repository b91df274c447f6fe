"""Building and packaging: targets, toolkits and their messages, wheel and sdist contents, an installed package."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import build_tools
from build_tools import Unbuildable

ROOT = Path(__file__).resolve().parents[1]


def test_arch_list() -> None:
    assert build_tools.parse_arch_list("8.0;9.0+PTX") == (["80", "90"], ["90"])
    assert build_tools.parse_arch_list("9.0a, 10.0 12.0+PTX 9.0a") == (["90a", "100", "120"], ["120"])
    assert build_tools.parse_arch_list("Ampere;Hopper") == (["80", "86", "90"], [])
    targets, ptx = build_tools.parse_arch_list(";".join(build_tools.CUDA_TARGETS))
    assert targets == ["80", "90", "100", "120"]
    assert ptx == ["120"]
    assert build_tools.arch_flags(["90"], ["90"]) == (
        "-gencode=arch=compute_90,code=sm_90 -gencode=arch=compute_90,code=compute_90"
    )


@pytest.mark.parametrize("text", ["sm_90", "7.5", "9", "8.0;hello", ";"])
def test_bad_arch_list(text: str) -> None:
    with pytest.raises(Unbuildable, match=r"TORCH_CUDA_ARCH_LIST .*8\.0"):
        build_tools.parse_arch_list(text)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have the plain set only: run on x86-64")
def test_an_old_assembler_leaves_out_amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else is built, and nothing names the set."""
    old = tmp_path / "old-g++"
    old.write_text("#!/bin/sh\necho \"no such instruction: 'tilerelease'\" >&2\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    assert list(build_tools.isa_flags()) == ["plain", "avx2", "avx512", "avx512bf16"]
    assert "AMX" not in build_tools.ninja_file(build_tools.cpu_extension(tmp_path / "_cpu.so", ""))


def fake_nvcc(folder: Path, script: str) -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("script", "message"),
    [("echo release 11.8, V11.8.1", "nvcc 11.8 is too old"), ("exit 3", "does not run or names no release")],
)
def test_unusable_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "cuda", script)))
    with pytest.raises(Unbuildable, match=message):
        build_tools.find_toolkit()


def test_missing_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(Unbuildable, match="correct or unset it"):
        build_tools.find_toolkit()


def test_no_nvcc_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build_tools, "USUAL_TOOLKIT", tmp_path)
    with pytest.raises(Unbuildable, match=r"no nvcc found .*: install the CUDA toolkit and install again"):
        build_tools.find_toolkit()


def test_architecture_that_nvcc_does_not_know(tmp_path: Path) -> None:
    script = "printf 'sm_80\\nsm_90\\nsm_90a\\n'"
    nvcc = str(fake_nvcc(tmp_path, script) / "bin" / "nvcc")
    build_tools.check_targets(nvcc, ["80", "90a"])
    with pytest.raises(Unbuildable, match=r"asks for sm_130, which .*nvcc does not know: .* sm_80, sm_90, sm_90a"):
        build_tools.check_targets(nvcc, ["90", "130"])
    # its stderr says why
    build_tools.check_targets(str(fake_nvcc(tmp_path / "silent", "exit 1") / "bin" / "nvcc"), ["130"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "architectures", "message"),
    [
        ("echo release 12.4, V12.4.1", "9.0", "nvcc 12.4 is too old: CUDA 12.8 or newer is needed"),
        ('[ "$1" = --version ] && echo release 13.0 || echo sm_90', "8.0", "asks for sm_80, which"),
        ("echo release 13.0", "sm_90", "TORCH_CUDA_ARCH_LIST has 'sm_90': expected compute capabilities"),
        ('[ "$1" = --version ] && echo release 13.0', "9.0", "no C++ compiler found"),
        (None, "9.0", "does not exist: correct or unset it"),
    ],
)
def test_installation_goes_on_without_cuda(
    tmp_path: Path, script: str | None, architectures: str, message: str
) -> None:
    """Whatever is wrong with nvcc, one line says it and what to do, and installation continues."""
    home = tmp_path / "cuda" if script is None else fake_nvcc(tmp_path / "cuda", script)
    sources = copy_of_sources(tmp_path / "sources")
    output = run_setup(
        sources, "build", CXX="no-such-compiler", CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST=architectures
    )
    (line,) = [line for line in output.splitlines() if "left out _cuda" in line]
    assert message in line and line.endswith("Everything else works.")


def test_toolkit_of_a_wrapper(tmp_path: Path) -> None:
    """If nvcc is a script elsewhere, its dry run gives the root, not the folder above it."""
    folder = fake_nvcc(tmp_path / "elsewhere", f'echo "#\\$ TOP={tmp_path}/real/bin/.." >&2')
    assert build_tools._root_from_dryrun(str(folder / "bin" / "nvcc")) == tmp_path / "real"


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unbuildable, match=r"no C\+\+ compiler found \(looked for no-such-compiler\)"):
        build_tools.compiler()


def copy_of_sources(folder: Path) -> Path:
    """The tracked and new files of the source tree, without builds."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json", "*.egg-info")
    folder.mkdir()
    for name in ("csrc", "kernels", "pvdm_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "build_tools.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


ELSEWHERE = """
import platform, runpy, sys
platform.machine = lambda: "another"
sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""


def run_setup(folder: Path, *arguments: str, program: Sequence[str] = ("setup.py",), **variables: str) -> str:
    """Runs setup.py of a source tree, and returns its output."""
    result = subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout + result.stderr


@pytest.mark.slow
def test_nothing_can_be_built(tmp_path: Path) -> None:
    """With neither compiler installation continues. One line each says what was left out and why, and the facts
    are stored."""
    sources = copy_of_sources(tmp_path / "sources")
    output = run_setup(sources, "build", CXX="no-such-compiler", PVDM_FAST_BUILD_CUDA="0")
    assert "left out _cpu: no C++ compiler found" in output
    assert "left out _cuda: PVDM_FAST_BUILD_CUDA=0 was set" in output
    (stored,) = sources.glob("build/lib*/pvdm_fast/_build_info.json")
    facts = json.loads(stored.read_text())
    assert not facts["_cpu"]["built"]
    assert not facts["_cuda"]["built"]


@pytest.mark.slow
def test_compiler_that_fails(tmp_path: Path) -> None:
    compiler = tmp_path / "failing"
    compiler.write_text("#!/bin/sh\necho 'error: out of luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    output = run_setup(copy_of_sources(tmp_path / "sources"), "build", CXX=str(compiler), PVDM_FAST_BUILD_CUDA="0")
    assert "left out _cpu: compiling _cpu failed" in output
    assert "error: out of luck" in output


@pytest.mark.slow
def test_sdist(tmp_path: Path) -> None:
    """The sdist has everything that a build needs, and nothing that was built."""
    run_setup(copy_of_sources(tmp_path / "sources"), "-q", "sdist", "--dist-dir", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for path in (ROOT / "csrc").rglob("*.*"):
        assert str(path.relative_to(ROOT)) in names
    assert {"kernels/__init__.py", "build_tools.py", "LICENSE", "pvdm_fast/ops/plane_norm.py"} <= names
    assert not [name for name in names if name.endswith((".so", "_build_info.json"))]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: install g++")
def test_wheel_installs_and_runs(tmp_path: Path) -> None:
    """A wheel built from the sources and unpacked elsewhere has the kernels, the _cpu extension and the facts."""
    sources = copy_of_sources(tmp_path / "sources")
    # Without optimisation, and in the plain set alone, as on a machine that isn't x86-64: the kernels are only loaded.
    options = ("-q", "bdist_wheel", "--dist-dir", str(tmp_path))
    run_setup(sources, *options, program=("-c", ELSEWHERE), PVDM_FAST_BUILD_CUDA="0", CXXFLAGS="-O0")
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = (
        "import pvdm_fast, pvdm_fast.kernels, sys; from pvdm_fast.backends import extensions;"
        "assert extensions.availability('cpu') is None; assert 'triton' not in sys.modules;"
        "assert extensions.extension('_cpu').isas() == extensions.build_info()['_cpu']['targets'] == ['plain'];"
        "print(pvdm_fast.__file__); print(pvdm_fast.kernels.__file__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [
        str(installed / "pvdm_fast" / "__init__.py"),
        str(installed / "pvdm_fast" / "kernels" / "__init__.py"),
    ]
