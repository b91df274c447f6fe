"""`python -m pvdm_fast.selftest`: the first command for a user with a GPU."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from pvdm_fast import selftest
from pvdm_fast.analysis import agreement
from pvdm_fast.backends import choice
from pvdm_fast.backends.choice import KERNEL_DTYPES, OPERATIONS
from pvdm_fast.backends.reference import geglu


@pytest.mark.slow
def test_right_kernels_pass(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if reason := choice.unavailable("cpu"):
        pytest.skip(reason)
    monkeypatch.setattr(choice, "BACKENDS", ("reference", "cpu", "cuda"))  # Triton's interpreter has its own tests
    assert selftest.main(["--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert f"All {3 * len(OPERATIONS)} are right." in text and "Versions" in text and torch.__version__ in text
    lines = [line.split() for line in text.splitlines()]
    for op in OPERATIONS:
        for dtype in KERNEL_DTYPES:
            (line,) = [line for line in lines if line[:3] == [op, "cpu", str(dtype).removeprefix("torch.")]]
            assert line[5:] == ["ok"] and 0 <= float(line[3]) <= float(line[4])
    assert torch.cuda.is_available() or ["all", "cuda", "not", "run:"] in [line[:4] for line in lines]


def faulty(monkeypatch: pytest.MonkeyPatch, backward: Any) -> None:
    """A backend "cpu" with a wrong backward pass of geglu."""
    module = SimpleNamespace(forward=geglu.forward, backward=backward)
    real = choice.implementation

    def implementation(backend: str, op: str) -> ModuleType | SimpleNamespace:
        return module if (backend, op) == ("cpu", "geglu") else real(backend, op)

    monkeypatch.setattr(choice, "unavailable", lambda backend: None if backend in ("cpu", "reference") else "not here.")
    monkeypatch.setattr(choice, "implementation", implementation)
    monkeypatch.setattr(agreement, "OPERATIONS", ("geglu",))


@pytest.mark.parametrize(
    ("backward", "message"),
    [
        (lambda grad, x: 1.1 * geglu.backward(grad, x), "too far from the reference"),
        (lambda grad, x: geglu.backward(grad, x) / 0, "too far from the reference"),
        (lambda grad, x: geglu.backward(grad, x) * (1 + 1e-7 * torch.rand(())), "a second run gave other bits"),
        (lambda grad, x: geglu.backward(grad, x[:0]), "RuntimeError: "),
    ],
)
def test_wrong_kernels_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backward: Any, message: str
) -> None:
    faulty(monkeypatch, backward)
    monkeypatch.setattr(agreement, "KERNEL_DTYPES", (torch.float32,))
    assert selftest.main(["--device", "cpu"]) == 1
    output = capsys.readouterr()
    assert f"FAILED: {message}" in output.out
    assert "error: 1 of 1 are wrong." in output.err


def test_nothing_to_compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(choice, "unavailable", lambda backend: "not here.")
    assert selftest.main(["--device", "cpu"]) == 2
    assert "nothing was compared" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: run with CUDA_VISIBLE_DEVICES=")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["--device", "cuda"]) == 2
    assert "run with --device cpu" in capsys.readouterr().err
