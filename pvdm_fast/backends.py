"""Which backend serves an operation: what is available, why not, and the user's choice.

An operation `<op>` is served by a backend when `<package of the backend>.<op>` has `forward` and `backward` taking the
registered operation's arguments. `SERVED` lists them; everything else here follows from it.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, TracebackType

import torch
from torch import Tensor

log = logging.getLogger("pvdm_fast")

ENVIRONMENT_VARIABLE = "PVDM_FAST_BACKEND"
OPERATIONS = (
    "segment_attention",
    "axial_attention",
    "plane_norm",
    "plane_conv",
    "triplane_slice",
    "triplane_expand",
    "geglu",
    "add_layer_norm",
)
PACKAGE = {
    "reference": "pvdm_fast.reference",
    "cpu": "pvdm_fast.native.cpu",
    "triton": "pvdm_fast.kernels",
    "cuda": "pvdm_fast.native.cuda",
}
BACKENDS = tuple(PACKAGE)
# Not among OPERATIONS: without gradient, and used only where a kernel serves it (pvdm_fast/ops/attention_block.py).
FUSED = ("attention_block",)
SERVED: dict[str, tuple[str, ...]] = {
    "reference": (*OPERATIONS, *FUSED),
    "cpu": OPERATIONS,
    "triton": (*OPERATIONS, *FUSED),
    "cuda": ("triplane_expand",),
}
# What automatic choice tries, best first.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve; the message says why and what to do."""


def _check_name(name: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"Unknown backend {name!r}: choose one of {', '.join(BACKENDS)}, or auto.")
    return name


_requested = _check_name(os.environ.get(ENVIRONMENT_VARIABLE, "auto"))


def requested() -> str:
    """The backend asked for ("auto" where none was). Process-wide, so that autograd's threads see it too."""
    return _requested


class use_backend:
    """Ask for one backend, for the whole process: `use_backend("cpu")`, or `with use_backend("cpu"): ...`.

    Args:
        name: "reference", "cpu", "triton", "cuda", or "auto" to choose by device again.

    Raises:
        ValueError: the name is unknown.
        BackendError: nothing of that backend can run on this machine. A single operation or tensor that it cannot
            serve raises the same when it is used.
    """

    def __init__(self, name: str) -> None:
        global _requested
        _check_name(name)
        if name != "auto" and (reason := unavailable(name)):
            raise BackendError(f"Backend {name!r} cannot run here: {reason}")
        self._previous = _requested
        _requested = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _requested
        _requested = self._previous


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU: for tests and for looking into kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def unavailable(backend: str) -> str | None:
    """Why a backend can't run on this machine at all, with the remedy; None where it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        if find_spec("triton") is None:
            return "triton is not installed: pip install triton."
        if interpreting() or torch.cuda.is_available():
            return None
        return "no GPU is available to PyTorch: run on a machine with one, or set TRITON_INTERPRET=1 (slow)."
    from pvdm_fast import native

    return native.availability(backend)


def why_not(backend: str, op: str, tensor: Tensor | None = None) -> str | None:
    """Why `backend` can't serve `op` (for `tensor`, where one is given), with the remedy; None where it can."""
    if op not in SERVED[backend]:
        return f"it has no kernel for {op} yet: use another backend, or auto."
    if reason := unavailable(backend):
        return reason
    if tensor is None or backend == "reference":
        return None
    device = "cpu" if backend == "cpu" or (backend == "triton" and interpreting()) else "cuda"
    if tensor.device.type != device:
        return f"its tensors must be on {device}, not {tensor.device.type}: move them, or use auto."
    if tensor.dtype not in KERNEL_DTYPES:
        return f"it computes in float32, bfloat16 and float16, not {tensor.dtype}: convert, or use reference."
    return None


@cache
def implementation(backend: str, op: str) -> ModuleType:
    return import_module(f"{PACKAGE[backend]}.{op}")


def choose(op: str, name: str, tensor: Tensor) -> ModuleType:
    """The module that computes `op` for `tensor`: the backend called `name`, or with "auto" the best that serves.

    Raises:
        BackendError: a backend asked for by name cannot serve this operation or tensor.
    """
    if name != "auto":
        if reason := why_not(name, op, tensor):
            raise BackendError(f"Backend {name!r} was asked for, but cannot serve {op}: {reason}")
        return implementation(name, op)
    backend = automatic(op, tensor.device.type, tensor.dtype)
    return implementation(backend, op)


def serves(backend: str, op: str, name: str, device: str, dtype: torch.dtype) -> bool:
    """Whether `backend` is what computes `op` for tensors of this kind, where `name` (or "auto") is asked for."""
    return backend == _first(op, name, device, dtype)


@cache
def _first(op: str, name: str, device: str, dtype: torch.dtype) -> str | None:
    """The first backend of those asked for that serves an operation."""
    sample = torch.empty(0, dtype=dtype, device=device)
    asked = PREFERENCE.get(device, ("reference",)) if name == "auto" else (name,)
    return next((backend for backend in asked if why_not(backend, op, sample) is None), None)


@cache
def automatic(op: str, device: str, dtype: torch.dtype) -> str:
    """The backend that automatic choice takes for an operation; logged once for each (the cache sees to that)."""
    backend = _first(op, "auto", device, dtype) or "reference"
    level = logging.WARNING if device == "cuda" and backend == "reference" else logging.INFO
    log.log(level, "%s on %s, %s: backend %s", op, device, str(dtype).removeprefix("torch."), backend)
    return backend


def report(device: str | None = None) -> dict[str, dict[str, str | None]]:
    """For each operation: None (serves) or the reason why not, by backend, and the automatic choice under "auto"."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {
        op: {"auto": automatic(op, device, torch.float32), **{name: why_not(name, op) for name in BACKENDS}}
        for op in OPERATIONS
    }
