"""Which backend computes an operation: what is available, why not, and the user's choice.

A backend computes an operation `<op>` if `<package of the backend>.<op>` has `forward` and `backward`, which take the
registered operation's arguments. `SERVED` lists these. Everything else here follows from it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from threading import Lock
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends import probe
from pvdm_fast.backends.float32 import tf32_allowed
from pvdm_fast.backends.precision import without_16_bits
from pvdm_fast.errors import BackendError

log = logging.getLogger("pvdm_fast")

ENVIRONMENT_VARIABLE = "PVDM_FAST_BACKEND"
OPERATIONS = (
    "segment_attention",
    "axial_attention",
    "plane_norm",
    "plane_resample",
    "plane_conv",
    "triplane_slice",
    "triplane_expand",
    "geglu",
    "add_layer_norm",
)
PACKAGE = {
    "reference": "pvdm_fast.backends.reference",
    "cpu": "pvdm_fast.backends.cpu",
    "triton": "pvdm_fast.kernels",
    "cuda": "pvdm_fast.backends.cuda",
}
BACKENDS = tuple(PACKAGE)
# Not in OPERATIONS: they have no gradient, and are used only if a kernel exists for them
# (pvdm_fast/ops/attention_block.py and fusing.py).
FUSED = ("attention_block", "feed_forward_block", "space_attention_heads", "time_attention_block")
# Nor this one: it is used only where a kernel serves it, which CPUs and Triton have for both directions, CUDA C++ for
# forward alone. Elsewhere its parts are used (pvdm_fast/ops/triplane_project.py).
FUSED_PROJECTION = ("triplane_project",)
# In OPERATIONS, but networks compute it in plain PyTorch where no kernel serves it. On a CPU that is as fast: it is a
# copy, or a mean of four.
PLAIN_ELSEWHERE = ("plane_resample",)
# A program's threads hand each other values through memory, behind a barrier. On AMD's GPUs it doesn't wait for stores.
THROUGH_MEMORY = ("feed_forward_block", "time_attention_block", *FUSED_PROJECTION)
SERVED: dict[str, tuple[str, ...]] = {
    "reference": (*OPERATIONS, *FUSED, *FUSED_PROJECTION),
    "cpu": (*(op for op in OPERATIONS if op not in PLAIN_ELSEWHERE), *FUSED_PROJECTION),
    "triton": (*OPERATIONS, *FUSED, *FUSED_PROJECTION),
    "cuda": (
        "segment_attention",
        "axial_attention",
        "plane_norm",
        "triplane_slice",
        "triplane_expand",
        *FUSED_PROJECTION,
    ),
}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
HALF_DTYPES = (torch.bfloat16, torch.float16)
DEVICE = {"reference": None, "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}  # where a backend's tensors must be

# What automatic choice tries, best first. On a GPU the order is reasoned from both kernels' instructions and launches,
# not measured.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
ATTENTION = ("segment_attention", "axial_attention")


def triton_first(op: str, dtype: torch.dtype, capability: tuple[int, int], tf32: bool) -> bool:
    """Whether Triton's kernel comes before the CUDA C++ one on a GPU of this compute capability.

    Args:
        tf32: whether PyTorch may use TF32 for float32 products.
    """
    if op in ATTENTION:
        # Triton uses the matrix instructions of Hopper (9.x) and Blackwell's data centre GPUs (10.x). They have about
        # twice the rate of mma.sync, which the CUDA kernels use, and which is the best on 8.x and 12.x. Triton also
        # uses TF32, where the CUDA kernels compute float32 without tensor cores.
        return capability[0] in (9, 10) or (dtype == torch.float32 and tf32)
    if op in FUSED_PROJECTION:
        # It has both directions, tiles of 128 rows on every GPU, and those matrix instructions. CUDA C++ serves where
        # there is no Triton, without a gradient.
        return True
    # One launch forward and two backward, against three and four. At one clip these tensors take microseconds.
    return op == "plane_norm"


def _check_name(name: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"Unknown backend {name!r}: choose one of {', '.join(BACKENDS)}, or auto.")
    return name


_default = _check_name(os.environ.get(ENVIRONMENT_VARIABLE, "auto"))
_requested = _default
_requests: list[use_backend] = []  # the last one counts
_changing = Lock()


def requested() -> str:
    """The backend that was asked for, or "auto". It holds for the process, so that autograd's threads see it too."""
    return _requested


class use_backend:
    """Ask for one backend, for the whole process: `use_backend("cpu")`, or `with use_backend("cpu"): ...`.

    The last request counts, in every thread. A block withdraws its own request when it ends. Blocks of several threads
    may end in any order: when all have ended, the request before them counts again. A request without `with` counts
    until the next one.

    Args:
        name: "reference", "cpu", "triton", "cuda", or "auto" to choose by device again.

    Raises:
        ValueError: the name is unknown.
        BackendError: the backend can't run on this machine at all. If it can't compute a particular operation or
            tensor, that raises the same error when it is used.
    """

    def __init__(self, name: str) -> None:
        _check_name(name)
        if name != "auto" and (reason := unavailable(name)):
            raise BackendError(f"Backend {name!r} cannot run here: {reason}")
        self.name, self._in_block = name, False
        # Of the requests without `with`, only the last one may count again after a block.
        outside = [request for request in _requests if not request._in_block][:-1]
        self._change(drop=(*outside, self), add=True)

    def __enter__(self) -> use_backend:
        self._in_block = True
        self._change(drop=(self,), add=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._change(drop=(self,), add=False)

    def _change(self, drop: Sequence[use_backend], add: bool) -> None:
        global _requested
        with _changing:
            _requests[:] = [request for request in _requests if request not in drop] + [self] * add
            _requested = _requests[-1].name if _requests else _default


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter on the CPU. It is for tests and for debugging kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_of(backend: str) -> str | None:
    """The type of device that a backend's tensors must be on; None where that makes no difference."""
    return "cpu" if backend == "triton" and interpreting() else DEVICE[backend]


@cache
def unavailable(backend: str) -> str | None:
    """Why a backend can't run on this machine at all, with the remedy; None where its first kernel has run."""
    if reason := _missing(backend):
        return reason
    here = device_of(backend)
    if here is None:
        return None
    return probe.failure(backend, torch.device("cuda", torch.cuda.current_device()) if here == "cuda" else CPU)


def _missing(backend: str) -> str | None:
    """What a backend lacks, as far as that is seen without running it."""
    if backend == "reference":
        return None
    from pvdm_fast.backends import extensions

    if backend != "triton":
        return extensions.availability(backend)
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton."
    if interpreting() or torch.cuda.is_available():
        return None
    if reason := extensions.refused_by_driver():
        return reason
    return "no GPU is available to PyTorch: run on a machine with one, or set TRITON_INTERPRET=1 (slow)."


def why_not(backend: str, op: str, tensor: Tensor | None = None) -> str | None:
    """Why `backend` can't compute `op` (for `tensor`, if given), with the remedy. None if it can."""
    if op not in SERVED[backend]:
        return f"it has no kernel for {op} yet: use another backend, or auto."
    if reason := unavailable(backend):
        return reason
    if backend == "triton" and op in THROUGH_MEMORY and torch.version.hip:
        return "on AMD's GPUs its threads wouldn't see what others of their program have stored: use another backend."
    if tensor is None or backend == "reference":
        return None
    device = device_of(backend)
    if tensor.device.type != device:
        return f"its tensors must be on {device}, not {tensor.device.type}: move them, or use auto."
    if tensor.dtype not in KERNEL_DTYPES:
        return f"it computes in float32, bfloat16 and float16, not {tensor.dtype}: convert, or use reference."
    if device == "cuda" and tensor.dtype in HALF_DTYPES and (reason := _without_16_bits(tensor.device)):
        return f"{reason}: compute in float32, or use auto."
    return probe.failure(backend, tensor.device)


@cache
def _without_16_bits(device: torch.device) -> str | None:
    """Why kernels refuse 16 bits on a GPU: without matrix units they would be slower there than float32."""
    return without_16_bits(device)


@cache
def implementation(backend: str, op: str) -> ModuleType:
    return import_module(f"{PACKAGE[backend]}.{op}")


def refusal(backend: str, op: str, inputs: Sequence[Any]) -> str | None:
    """Why `backend` can't take these arguments of `op` (of either direction), by its launcher's limits. None if
    it can."""
    limits = getattr(implementation(backend, op), "refusal", None)
    return limits(*inputs) if limits else None


def choose(op: str, name: str, inputs: Sequence[Any]) -> ModuleType:
    """The module that computes `op` for `inputs`: the backend called `name`, or with "auto" the best available one.

    Args:
        inputs: the arguments of either direction, a tensor first.

    Raises:
        BackendError: the backend called `name` can't compute this operation, or not for these arguments.
    """
    tensor = inputs[0]
    if name != "auto":
        if reason := why_not(name, op, tensor) or refusal(name, op, inputs):
            raise BackendError(f"Backend {name!r} was asked for, but cannot serve {op}: {reason}")
        return implementation(name, op)
    for backend in ranking(op, tensor.device, tensor.dtype, _tf32(tensor)):
        reason = refusal(backend, op, inputs)
        if reason is None:
            _log_choice(op, tensor.device.type, tensor.dtype, backend)
            return implementation(backend, op)
        _log_refusal(op, backend, reason)
    raise AssertionError("The reference refuses nothing.")


def _tf32(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype == torch.float32 and tf32_allowed()


def serves(backend: str, op: str, name: str, device: str, dtype: torch.dtype) -> bool:
    """Whether `backend` is the one that computes `op` for tensors of this kind when `name` (or "auto") is asked
    for."""
    if name == "auto":
        return ranking(op, torch.device(device), dtype)[0] == backend
    return name == backend and why_not(name, op, torch.empty(0, dtype=dtype, device=device)) is None


@cache
def ranking(op: str, device: torch.device, dtype: torch.dtype, tf32: bool = False) -> tuple[str, ...]:
    """The backends that compute `op` on `device`, best first. The reference is always among them."""
    sample = torch.empty(0, dtype=dtype, device=device)
    order = PREFERENCE.get(device.type, ("reference",))
    if device.type == "cuda" and dtype in HALF_DTYPES and (reason := _without_16_bits(device)):
        _log_16_bits(device, reason)
    if device.type == "cuda" and triton_first(op, dtype, torch.cuda.get_device_capability(device), tf32):
        order = tuple(sorted(order, key=("triton", "cuda", "reference").index))
    return tuple(backend for backend in order if why_not(backend, op, sample) is None)


@cache  # so that each choice is logged once
def _log_choice(op: str, device: str, dtype: torch.dtype, backend: str) -> None:
    level = logging.WARNING if device == "cuda" and backend == "reference" else logging.INFO
    log.log(level, "%s on %s, %s: backend %s", op, device, str(dtype).removeprefix("torch."), backend)


@cache
def _log_16_bits(device: torch.device, reason: str) -> None:
    log.warning("%s computes 16 bits in plain PyTorch: %s", device, reason)


@cache
def _log_refusal(op: str, backend: str, reason: str) -> None:
    log.info("%s: not backend %s: %s", op, backend, reason)


def automatic(op: str, device: str, dtype: torch.dtype) -> str:
    """The backend that automatic choice takes for an operation, unless the arguments are beyond its limits."""
    return ranking(op, torch.device(device), dtype)[0]


def report(device: str | None = None) -> dict[str, dict[str, str | None]]:
    """For each operation: by backend, None or the reason why it isn't available, and the automatic choice under
    "auto"."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {
        op: {"auto": automatic(op, device, torch.float32), **{name: why_not(name, op) for name in BACKENDS}}
        for op in (*OPERATIONS, *FUSED_PROJECTION)
    }
