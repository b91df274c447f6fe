"""The precision of float32 products follows both of PyTorch's switches, and only where it matters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")
from pvdm_fast.backends.float32 import tf32_allowed
from pvdm_fast.kernels.configs import assume
from pvdm_fast.kernels.math import dot_precision

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


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


def older_convolutions() -> None:
    CUDNN.allow_tf32 = False


def newer_convolutions() -> None:
    CUDNN.conv.fp32_precision = "ieee"


def without_cudnn() -> None:
    CUDNN.enabled = False


@pytest.mark.usefixtures("float32_switches")
@pytest.mark.parametrize("switch", [older_convolutions, newer_convolutions, without_cudnn])
def test_convolutions_follow_their_own_switch(switch: Callable[[], None]) -> None:
    """They may take tf32 while products may not, which is PyTorch's default."""
    CUDNN.allow_tf32 = True
    x = torch.empty(1)
    with assume("sm90"):
        assert dot_precision(x, "convolution") == "tf32" and dot_precision(x) == "ieee"
        assert dot_precision(x.bfloat16(), "convolution") == "ieee"
        switch()
        assert dot_precision(x, "convolution") == "ieee"
    with assume("gfx942"):
        assert dot_precision(x, "convolution") == "ieee"


@pytest.mark.usefixtures("float32_switches")
def test_convolutions_without_cudnn_are_products() -> None:
    new_switch()
    without_cudnn()
    assert tf32_allowed("convolution")


@pytest.mark.usefixtures("float32_switches")
def test_16_bits_never_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvdm_fast.kernels.math.tf32_allowed", lambda kind: pytest.fail("asked"))
    assert dot_precision(torch.empty(1, dtype=torch.bfloat16)) == "ieee"
