"""Shared by all tests: helpers next to this file can be imported, and every test starts with the same seeds."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # xdist starts as many processes as cores, so one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton; kernels then run on the CPU, with checks

import pytest
import torch
from backends.builds import Builds
from backends.cuda import emulated
from hypothesis import HealthCheck, settings

# An example must not fail because the machine is busy.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

if find_spec("triton"):
    from backends.triton import interpreter

    interpreter.install()

from pvdm_fast.backends import choice  # noqa: E402
from pvdm_fast.ops import operation  # noqa: E402

# Interpreted kernels follow PyTorch's switches too. By default convolutions may take tf32, which would hide faults.
torch.backends.cudnn.allow_tf32 = False

# The files that take longest go first: with --dist loadfile one that begins last keeps a single process at work.
LONGEST = (
    "backends/triton/test_networks.py",
    "backends/triton/test_ahead_of_time.py",
    "backends/cuda/test_cuda_networks.py",
    "backends/cpu/test_cpu_build.py",
    "ops/test_operations.py",
    "benchmarks/test_first_contact.py",
    "training/test_processes.py",
    "training/test_training.py",
)
REMEDY = re.compile(r"\b(install|run|rerun|set|unset|use)\b.")


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
    operation.forget()  # which backends were chosen: tests change what there is to choose from
    if "accelerate.state" in sys.modules:  # it keeps the first job's device and precision for the whole process
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def float32_switches() -> Generator[Any, None, None]:
    """PyTorch's switches for float32 products and convolutions, put back afterwards as they were.

    This covers both generations. Reading the older one (`allow_tf32`) raises if the newer ones contradict it, and that
    would hit every later test in the process.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    older, enabled = (matmul.allow_tf32, cudnn.allow_tf32), cudnn.enabled
    every, newer = torch.backends.fp32_precision, (matmul.fp32_precision, cudnn.conv.fp32_precision)
    recurrent = cudnn.rnn.fp32_precision  # which the older switch of cuDNN is asked about too
    yield matmul
    matmul.allow_tf32, cudnn.allow_tf32 = older
    torch.backends.fp32_precision = every
    matmul.fp32_precision, cudnn.conv.fp32_precision = newer
    cudnn.rnn.fp32_precision, cudnn.enabled = recurrent, enabled
    assert (matmul.allow_tf32, cudnn.allow_tf32) == older


@pytest.fixture(scope="session")
def builds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """What is compiled for tests, kept for later runs (except with `-p no:cacheprovider`)."""
    kept = getattr(request.config, "cache", None)
    return Builds(kept.mkdir("builds") if kept else tmp_path_factory.getbasetemp() / "builds")


@pytest.fixture(scope="session")
def emulated_device(builds: Builds) -> ModuleType:
    """The CUDA kernels built for the host."""
    return emulated.load(builds.get("emulated", emulated.build))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip must say what would run the test. Otherwise it is a failure."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple) and not REMEDY.search(report.longrepr[2]):
        report.outcome = "failed"
        report.longrepr = f"the reason of a skip must say what would run the test: {report.longrepr[2]!r}"
    return report


def kernel_of(path: Path) -> str:
    """The operation whose own kernel a file tests, one direction or both."""
    return path.stem.removeprefix("test_").removesuffix("_backward")


def interpreted_again(items: list[pytest.Item]) -> Iterator[tuple[pytest.Item, str]]:
    """Tests that interpret Triton kernels once more, and the mark that lets them wait.

    A case takes 0.5 s, a hundred times a CPU kernel's. The inner loop has every third size of the kernels' own tests,
    in float32, which runs all of their code. The others are slow, as are bfloat16 and an operation's tests on every
    backend. float16 runs bfloat16's code, so of its sizes every third is slow and the rest exhaustive.
    """
    seen: Counter[tuple[str, object]] = Counter()
    for item in items:
        given = item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        if item.path.parent.name == "triton" and kernel_of(item.path) in choice.SERVED["triton"]:
            dtypes = [value for value in given if isinstance(value, torch.dtype)]
            dtype = dtypes[0] if len(dtypes) == 1 else torch.float32  # several: mixed in small calls
            third = seen[item.nodeid.partition("[")[0], dtype] % 3 == 0
            seen[item.nodeid.partition("[")[0], dtype] += 1
            if dtype == torch.float16 and not third:
                yield item, "exhaustive"
            if dtype != torch.float32 or not third:
                yield item, "slow"
        elif item.path.parent.name == "ops" and any(isinstance(value, str) and value == "triton" for value in given):
            yield item, "slow"


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # xdist would start with the files that have the most tests
        config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # before pytest evaluates -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need much memory or minutes run only if you ask for them. The longest files come first."""
    items.sort(key=lambda item: not item.nodeid.removeprefix("tests/").startswith(LONGEST))
    for item, mark in interpreted_again(items):
        item.add_marker(mark)
    for item in items:
        if "amx_stand_in" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")  # compiling it takes 20 s
    reasons = {"huge": "needs 15 GB of memory", "exhaustive": "takes minutes"}
    for name, reason in reasons.items():
        if name in config.getoption("markexpr"):
            continue
        for item in items:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"{reason}: run with -m {name}"))
