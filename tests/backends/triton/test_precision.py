"""The precision of float32 products follows both of PyTorch's switches, and only where it matters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")
from pvdm_fast.backends.float32 import tf32_allowed
from pvdm_fast.kernels.configs import assume
from pvdm_fast.kernels.math import dot_precision

MATMUL = torch.backends.cuda.matmul


def old_switch() -> None:
    MATMUL.allow_tf32 = True


def new_switch() -> None:
    MATMUL.fp32_precision = "tf32"


def every_product() -> None:
    MATMUL.fp32_precision = "none"  # PyTorch's initial value: follow the switch of all products
    torch.backends.fp32_precision = "tf32"


@pytest.mark.usefixtures("float32_switches")
@pytest.mark.parametrize("switch", [old_switch, new_switch, every_product])
def test_either_switch(switch: Callable[[], None]) -> None:
    x = torch.empty(1)
    assert not tf32_allowed()
    assert dot_precision(x) == "ieee"
    switch()
    assert tf32_allowed()
    with assume("sm90"):
        assert dot_precision(x) == "tf32"
        assert dot_precision(x.bfloat16()) == dot_precision(x.half()) == "ieee"
    with assume("gfx942"):
        assert dot_precision(x) == "ieee"


@pytest.mark.usefixtures("float32_switches")
def test_16_bits_never_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvdm_fast.kernels.math.tf32_allowed", lambda: pytest.fail("asked"))
    assert dot_precision(torch.empty(1, dtype=torch.bfloat16)) == "ieee"
