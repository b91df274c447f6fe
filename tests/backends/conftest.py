"""Fixtures of the native kernels' tests."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from backends.cpu import amx
from backends.cuda import emulated
from inputs import poisoned_empty
from instruction_sets import ISAS, using
from torch import Tensor


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    with using(request.param):
        yield request.param


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and Tensor.new_empty give NaN."""
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *size, **options: poisoned_empty(*size, **{"dtype": self.dtype, **options})
    )


@pytest.fixture
def poisoned_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and torch.empty_like give NaN."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], Path]) -> ModuleType:
    """The extension `name`, built once for all processes of a test run."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = list(folder.glob(f"{name}.*.so"))
        return emulated.load(found[0] if found else build(folder))


@pytest.fixture(scope="session")
def emulated_device(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The CUDA kernels built for the host."""
    return built_once(tmp_path_factory, "_emulated", emulated.build)


@pytest.fixture(scope="session")
def amx_stand_in(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Attention in the instruction set amx, with the stand-in of its tiles."""
    amx.skip_where_it_cannot_run(ISAS)
    module = built_once(tmp_path_factory, "_tiles", amx.build)
    module.set_isa("amx")
    return module


@pytest.fixture(scope="module")
def device(emulated_device: ModuleType) -> Iterator[ModuleType]:
    """The stand-in, in the place of `pvdm_fast._cuda`, with the host as its device."""
    with pytest.MonkeyPatch.context() as patch:
        emulated.replace_device(patch, emulated_device)
        yield emulated_device
