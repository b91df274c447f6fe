"""Fixtures of the native kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from native.inputs import poisoned_empty
from torch import Tensor

from pvdm_fast import native


@pytest.fixture(params=native.extension("_cpu").isas() if native.availability("cpu") is None else [])
def cpu_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    module = native.extension("_cpu")
    before = module.isa()
    module.set_isa(request.param)
    yield request.param
    module.set_isa(before)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and Tensor.new_empty give NaN."""
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    monkeypatch.setattr(
        Tensor, "new_empty", lambda self, *size, **options: poisoned_empty(*size, **{"dtype": self.dtype, **options})
    )
