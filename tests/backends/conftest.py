"""Fixtures of the native kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from backends.builds import Builds
from backends.cpu import amx
from backends.cuda import emulated
from inputs import poisoned_empty
from instruction_sets import ISAS, using
from torch import Tensor


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each instruction set of this machine."""
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


@pytest.fixture(scope="session")
def amx_stand_in(builds: Builds) -> ModuleType:
    """Attention in the instruction set amx, with the stand-in for its tiles."""
    amx.skip_where_it_cannot_run(ISAS)
    module = emulated.load(builds.get("tiles", amx.build))
    module.set_isa("amx")
    return module


@pytest.fixture(scope="module")
def device(emulated_device: ModuleType) -> Iterator[ModuleType]:
    """The stand-in replaces `pvdm_fast._cuda`, and the host is its device."""
    with pytest.MonkeyPatch.context() as patch:
        emulated.replace_device(patch, emulated_device)
        yield emulated_device
