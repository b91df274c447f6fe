"""Whether a backend's kernels run on a device: found out by running one on one element, once a process."""

from __future__ import annotations

import logging
import sysconfig
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from subprocess import CalledProcessError
from threading import Lock, Thread

import torch
from torch import Tensor

log = logging.getLogger("pvdm_fast")

Kernel = Callable[[torch.device], tuple[Tensor, Tensor]]  # gives the result and what it must be
AT_RUN_TIME = "Triton compiles a launcher at run time"
COMPILER = f"{AT_RUN_TIME}: install a C compiler (apt-get install gcc), or name one in CC"
HEADERS = f"{AT_RUN_TIME} and Python.h is missing: install Python's headers (apt-get install python3-dev)"
# What messages of drivers and compilers mean, and what to do: the first that fits.
REMEDIES = (
    ("Failed to find C", COMPILER),
    ("libcuda.so", "the driver's library isn't found: start the container with its GPU, or set TRITON_LIBCUDA_PATH"),
    ("driver version is insufficient", "the NVIDIA driver is older than the CUDA that this was built with: update it"),
    ("unsupported toolchain", "the NVIDIA driver is older than the compiler of these kernels: update it"),
    ("image is invalid", "the NVIDIA driver doesn't know this machine code: update it, or install pvdm_fast again"),
    ("no kernel image", "nothing was built for this GPU: install pvdm_fast again, with TORCH_CUDA_ARCH_LIST naming it"),
)
OTHERWISE = "run python -m pvdm_fast.selftest to see more, or use another backend"

_found: dict[tuple[str, torch.device], str | None] = {}
_finding = Lock()


def failure(backend: str, device: torch.device) -> str | None:
    """Why kernels of `backend` don't run on `device`, with the remedy; None where the first one gave the right result.

    What is found stays so for the process, and a failure is logged once, as a warning.

    Raises:
        torch.OutOfMemoryError: not even one element fits, which says nothing about the backend.
    """
    key = (backend, device)
    if key not in _found and backend in KERNELS:
        with _finding:
            if key not in _found:
                _found[key] = _try(backend, device)
                if _found[key]:
                    log.warning("backend %s is left out on %s: %s", backend, device, _found[key])
    return _found.get(key)


def forget() -> None:
    """Find out again at the next use."""
    with _finding:
        _found.clear()


def _try(backend: str, device: torch.device) -> str | None:
    """In a thread of its own: there no mode (fake tensors, autocast, a default device) of the caller counts."""
    outcome: list[tuple[float, ...] | Exception] = []

    def work() -> None:
        try:
            result, expected = KERNELS[backend](device)
            outcome.append((*result.flatten().tolist(), *expected.flatten().tolist()))
        except Exception as error:  # whatever a driver or compiler raises is the finding
            outcome.append(error)

    thread = Thread(target=work, name="pvdm_fast probe", daemon=True)
    thread.start()
    thread.join()
    found = outcome[0]
    if isinstance(found, torch.OutOfMemoryError):
        raise found
    if isinstance(found, Exception):
        reason = " ".join(str(found).split())[:200]
        return f"its first kernel failed ({type(found).__name__}: {reason}): {_remedy(found)}."
    half = len(found) // 2
    got, wanted = found[:half], found[half:]
    if all(abs(a - b) <= 1e-5 * abs(b) for a, b in zip(got, wanted, strict=True)):
        return None
    return f"its first kernel gave {list(got)} instead of {list(wanted)}: {OTHERWISE}."


def _remedy(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):  # what CC names
        return COMPILER
    if isinstance(error, CalledProcessError) and not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return HEADERS
    return next((remedy for sign, remedy in REMEDIES if sign in str(error)), OTHERWISE)


# The backends are imported by name, as in `choice`: what they need may be missing.


def _triton(device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.full((1,), 1.5, dtype=torch.float32, device=device)
    return import_module("pvdm_fast.kernels.probe").add_one(x), torch.full((1,), 2.5, dtype=torch.float64, device="cpu")


def _cuda(device: torch.device) -> tuple[Tensor, Tensor]:
    """One value and one token, each with its position added."""
    values = torch.tensor([1.5, 4.0, 0.25, 0.5], dtype=torch.float32, device=device)
    x, token, positions = values[:1].reshape(1, 1, 1), values[1:2], values[2:].reshape(2, 1)
    expected = torch.tensor([1.75, 4.5], dtype=torch.float64, device="cpu")
    launcher = import_module("pvdm_fast.backends.cuda.triplane_slice")
    return launcher.forward(x, token, positions, "xy", 1, 1, 1), expected


def _cpu(device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.tensor([[2.0, 0.5]], dtype=torch.float32, device=device)
    launcher = import_module("pvdm_fast.backends.cpu.geglu")
    return launcher.forward(x), torch.tensor([0.6914624612740131], dtype=torch.float64, device="cpu")


KERNELS: dict[str, Kernel] = {"cpu": _cpu, "triton": _triton, "cuda": _cuda}
