"""A backend is available once its first kernel has run: what stops it, by stand-ins for GPUs, drivers and compilers."""

from __future__ import annotations

import logging
import stat
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pvdm_fast import ops, use_backend
from pvdm_fast.backends import choice, extensions, probe
from pvdm_fast.backends.choice import BackendError

CPU = torch.device("cpu")


def forget() -> None:
    probe.forget()
    for found in (choice.unavailable, choice.ranking, choice._without_16_bits, choice._log_16_bits):
        found.cache_clear()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What is found out once a process is found out again for each test, and after it."""
    forget()
    yield
    forget()


@pytest.fixture
def first_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """Puts another first kernel in the place of a backend's: what it gives, or the error that it raises."""

    def replace(backend: str, outcome: Any) -> None:
        def kernel(device: torch.device) -> tuple[Tensor, Tensor]:
            if callable(outcome):
                outcome()
            if isinstance(outcome, Exception):
                raise outcome
            return torch.tensor([outcome]), torch.tensor([2.5])

        monkeypatch.setitem(probe.KERNELS, backend, kernel)

    return replace


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_right_kernels_are_found_right(backend: str) -> None:
    if reason := choice._missing(backend):
        pytest.skip(f"{reason} Install what is missing, and run again.")
    assert probe.failure(backend, CPU) is None
    assert choice.unavailable(backend) is None


def test_the_cuda_kernel_on_the_stand_in(device: Any) -> None:
    result, expected = probe.KERNELS["cuda"](CPU)
    assert result.flatten().tolist() == expected.tolist()


def test_modes_of_the_caller_do_not_count() -> None:
    with FakeTensorMode(), torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
        assert probe.failure("cpu", CPU) == choice._missing("cpu")


@pytest.mark.parametrize(
    ("outcome", "sentence"),
    [
        (2.5, None),
        (2.4, "its first kernel gave [2.4000000953674316] instead of [2.5]: run python -m pvdm_fast.selftest"),
        (float("nan"), "its first kernel gave [nan] instead of [2.5]"),
        (RuntimeError("boom"), "its first kernel failed (RuntimeError: boom): run python -m pvdm_fast.selftest"),
        (
            RuntimeError("slice: CUDA reports 'CUDA driver version is insufficient for CUDA runtime version'."),
            "the NVIDIA driver is older than the CUDA that this was built with: update it",
        ),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "doesn't know this machine code"),
        (
            RuntimeError("the provided PTX was compiled with an unsupported toolchain."),
            "the NVIDIA driver is older than the compiler of these kernels: update it",
        ),
        (AssertionError("libcuda.so cannot found!\nPossible files"), "set TRITON_LIBCUDA_PATH"),
        (RuntimeError("no kernel image is available"), "TORCH_CUDA_ARCH_LIST naming it"),
    ],
)
def test_what_stops_a_backend(
    outcome: Any, sentence: str | None, first_kernel: Callable[[str, Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    first_kernel("cpu", outcome)
    found = [probe.failure("cpu", CPU) for _ in range(3)]
    assert found[0] == found[1] == found[2]
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    if sentence is None:
        assert found[0] is None and not warnings
    else:
        assert sentence in str(found[0])
        assert warnings == [f"backend cpu is left out on cpu: {found[0]}"]


def launcher_of_triton() -> None:
    """What Triton's driver does first: it compiles a C file."""
    from triton.runtime import build

    build._find_compiler.cache_clear()
    try:
        build.compile_module_from_src("#include <Python.h>\n// " + str(time.time_ns()), "probe")
    finally:
        build._find_compiler.cache_clear()


@pytest.mark.parametrize("lack", ["compiler", "what CC names", "headers"])
def test_triton_cannot_compile_its_launcher(
    lack: str, first_kernel: Callable[[str, Any], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With Triton's own code: what images without a compiler, or without Python's headers, give."""
    pytest.importorskip("triton", reason="needs Triton: pip install triton, and run again")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if lack == "what CC names":
        monkeypatch.setenv("CC", str(tmp_path / "none"))
    if lack == "headers":
        compiler = tmp_path / "gcc"
        compiler.write_text("#!/bin/sh\nexit 1\n")  # as gcc at: fatal error: Python.h: No such file or directory
        compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
        paths = {**sysconfig.get_paths(), "include": str(tmp_path)}
        monkeypatch.setattr(sysconfig, "get_paths", lambda **_: paths)
    first_kernel("triton", launcher_of_triton)
    reason = str(probe.failure("triton", CPU))
    expected = probe.HEADERS if lack == "headers" else probe.COMPILER
    assert reason.startswith("its first kernel failed (") and reason.endswith(f": {expected}.")


def test_the_next_backend_is_taken(first_kernel: Callable[[str, Any], None], caplog: pytest.LogCaptureFixture) -> None:
    """By automatic choice, said once; by name it is refused, with the reason."""
    if reason := choice._missing("cpu"):
        pytest.skip(f"{reason} Install pvdm_fast with g++, and run again.")
    first_kernel("cpu", RuntimeError("boom"))
    x = torch.randn(2, 6)
    with caplog.at_level(logging.WARNING, logger="pvdm_fast"):
        assert torch.equal(ops.geglu(x), choice.implementation("reference", "geglu").forward(x))
        ops.add_layer_norm(x, x, torch.ones(6), torch.ones(6))
    assert [record.message for record in caplog.records] == [
        f"backend cpu is left out on cpu: {probe.failure('cpu', CPU)}"
    ]
    with pytest.raises(BackendError, match="Backend 'cpu' cannot run here: its first kernel failed"):
        use_backend("cpu")


def test_many_threads_run_it_once(first_kernel: Callable[[str, Any], None]) -> None:
    runs, start = [], threading.Barrier(8)

    def slow() -> None:
        runs.append(threading.get_ident())
        time.sleep(0.05)
        raise RuntimeError("boom")

    first_kernel("cpu", slow)
    found: list[str | None] = []

    def ask() -> None:
        start.wait()
        found.append(probe.failure("cpu", CPU))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1 and len(set(found)) == 1 and len(found) == 8


def test_out_of_memory_says_nothing_of_a_backend(first_kernel: Callable[[str, Any], None]) -> None:
    first_kernel("cpu", torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        probe.failure("cpu", CPU)
    first_kernel("cpu", 2.5)
    assert probe.failure("cpu", CPU) is None


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_16_bits_are_refused_on_older_gpus(
    dtype: torch.dtype,
    capability: tuple[int, int],
    first_kernel: Callable[[str, Any], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A T4 would compute them without tensor cores: the next backend is taken, and the reason is said once."""
    first_kernel("triton", 2.5)
    first_kernel("cuda", 2.5)
    monkeypatch.setattr(choice, "unavailable", lambda backend: "not built." if backend == "cuda" else None)
    monkeypatch.setattr(choice, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: real(*size, dtype=dtype).as_subclass(OnGpu))
    with caplog.at_level(logging.WARNING, logger="pvdm_fast"):
        taken = [choice.ranking(op, OnGpu.device, dtype)[0] for op in ("geglu", "plane_conv", "geglu")]
    refused = capability < (8, 0) and dtype != torch.float32
    assert taken == (["reference"] * 3 if refused else ["triton"] * 3)
    reason = "this GPU's compute capability is 7.5, and bfloat16 begins with 8.0"
    messages = [record.message for record in caplog.records]
    assert messages == ([f"cuda:0 computes 16 bits in plain PyTorch: {reason}"] if refused else [])
    tensor = torch.empty(1, dtype=dtype, device="cuda")
    by_name = choice.why_not("triton", "geglu", tensor)
    assert by_name == (f"{reason}: compute in float32, or use auto." if refused else None)


def test_a_driver_older_than_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch then says that no GPU is available; what it says of the driver is passed on."""

    def init() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by "
            "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("TRITON_INTERPRET")
    expected = (
        "PyTorch can't use the GPU (The NVIDIA driver on your system is too old (found version 12040)): update the "
        "driver, or install a build of PyTorch for it."
    )
    assert extensions._gpu_reason(["sm_80"]) == expected
    if choice.find_spec("triton"):
        assert choice.unavailable("triton") == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: run with CUDA_VISIBLE_DEVICES=")
def test_no_driver_is_no_gpu() -> None:
    assert extensions.refused_by_driver() is None
