"""Launches: Triton's own way the first time, its compiled kernel directly from then on, with the same arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from inspect import Parameter, Signature
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")
from pvdm_fast.backends import extensions
from pvdm_fast.kernels import launch
from pvdm_fast.kernels.launch import Config

pytestmark = pytest.mark.skipif(
    extensions.call_key()(torch.ones(1)) is None,
    reason="needs keys of calls: install PyTorch 2.10 or newer, and a C++ compiler before pvdm_fast",
)


class Compiled:
    packed_metadata = ()

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.calls.append(("directly", grid, arguments))


class Kernel:
    """A kernel (x, size, BLOCK, FLAG=True, WIDTH) that writes down how it is launched."""

    signature = Signature(
        [
            Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=True if name == "FLAG" else Parameter.empty)
            for name in ("x", "size", "BLOCK")
        ]
        + [Parameter(name, Parameter.KEYWORD_ONLY, default=name == "FLAG") for name in ("FLAG", "WIDTH")]
    )

    def __init__(self, compiles: bool = True) -> None:
        self.calls: list[Any] = []
        self.compiles = compiles

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*arguments: Any, **named: Any) -> Any:
            self.calls.append(("by Triton", grid, arguments, named))
            return Compiled(self.calls) if self.compiles else None

        return start


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch, "_compiled", {})
    return


CONFIG = Config({"BLOCK": 64})


def run(kernel: Kernel, x: torch.Tensor, size: int, config: Config = CONFIG, **constants: Any) -> Any:
    launch.launch(kernel, (3, 2), x, size, config=config, **constants)
    return kernel.calls[-1]


def test_the_second_launch_goes_to_the_compiled_kernel() -> None:
    kernel, x = Kernel(), torch.ones(4)
    how, grid, arguments, named = run(kernel, x, 5, WIDTH=7)
    assert (how, grid) == ("by Triton", (3, 2)) and arguments[1] == 5
    assert named["BLOCK"] == 64 and named["WIDTH"] == 7 and named["num_warps"] == 4
    y = torch.zeros(4)
    how, grid, arguments = run(kernel, y, 5, WIDTH=7)
    assert how == "directly" and grid == (3, 2, 1)
    assert arguments[0] is y and arguments[1:] == (5, 64, True, 7)  # in the signature's order, defaults filled in


def test_what_triton_tells_apart_is_told_apart() -> None:
    kernel, x = Kernel(), torch.ones(40)
    run(kernel, x, 5, WIDTH=7)
    other = Config({"BLOCK": 64})
    for tensor, size, config, width in (
        (x, 16, CONFIG, 7),
        (x, 1, CONFIG, 7),
        (x, 2**33, CONFIG, 7),
        (x.half(), 5, CONFIG, 7),
        (x[1:], 5, CONFIG, 7),
        (x, 5, other, 7),
        (x, 5, CONFIG, 8),
    ):
        assert run(kernel, tensor, size, config, WIDTH=width)[0] == "by Triton"
        assert run(kernel, tensor, size, config, WIDTH=width)[0] == "directly"
    assert run(Kernel(), x, 5, WIDTH=7)[0] == "by Triton"


def test_the_interpreter_and_watchers_take_tritons_way() -> None:
    kernel, x = Kernel(compiles=False), torch.ones(4)
    assert [run(kernel, x, 5, WIDTH=7)[0] for _ in range(2)] == ["by Triton"] * 2
    kernel = Kernel()
    run(kernel, x, 5, WIDTH=7)
    with torch.device("cpu"):
        assert run(kernel, x, 5, WIDTH=7)[0] == "by Triton"


def test_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_COMPILED", 3)
    kernel, x = Kernel(), torch.ones(4)
    for size in range(10):
        run(kernel, x, size, WIDTH=7)
        assert len(launch._compiled) <= 3


# Triton itself, with a driver that writes down what it is given: kernels are compiled for sm_90, none runs.
SCRIPT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

calls = []

class Launcher:
    def __init__(self, source, metadata): pass
    def __call__(self, *arguments): calls.append(arguments)

class Utilities:
    def load_binary(self, name, kernel, shared, device): return 1, 2, 32, 0, 1024
    def get_device_properties(self, device): return {"max_shared_mem": 232448, "warpSize": 32}
    def unload_module(self, *arguments): pass

class Driver:
    utils, launcher_cls = Utilities(), Launcher
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 7
    def get_device_capability(self, device): return 9, 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def map_python_to_cpp_type(self, kind): return kind

driver.set_active(Driver())
from pvdm_fast.kernels import configs, geglu, launch

def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return a == b

x, grad = torch.randn(2, 4, 32), torch.randn(2, 4, 16)
with configs.assume("sm90"):
    for step in (lambda: geglu.forward(x), lambda: geglu.backward(grad, x)):
        known = len(launch._compiled)
        step()
        assert len(launch._compiled) == known + 1
        step()
        assert len(launch._compiled) == known + 1
first, second, third, fourth = calls
for a, b in ((first, second), (third, fourth)):
    assert len(a) == len(b)
    # The seventh is what profilers are told; the direct way makes it only where one listens.
    assert all(same(left, right) for i, (left, right) in enumerate(zip(a, b)) if i != 6), (a, b)
print("same")
"""


@pytest.mark.slow
def test_triton_is_given_the_same_either_way() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same"
