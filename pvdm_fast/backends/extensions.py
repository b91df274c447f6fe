"""The compiled extensions: loads them on first use, and says why if it can't.

setup.py builds `pvdm_fast._cpu` and `pvdm_fast._cuda`, and writes the facts to `_build_info.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# Raise it with every change of a binding's arguments. The build reads it here, and the extensions contain it.
ABI = 7
REINSTALL = "install pvdm_fast again (pip install -e . in its source folder)"


class ExtensionError(ImportError):
    """An extension is missing, outdated or doesn't load. The message says why and what to do."""


@cache
def build_info() -> dict[str, Any]:
    """What was built, for which targets, with which compiler, and why not the rest. {} if nothing was built."""
    path = Path(__file__).resolve().parent.parent / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


@cache
def extension(name: str) -> ModuleType:
    """The extension "_cpu" or "_cuda". torch is imported first, so that the extension shares its OpenMP library.

    Raises:
        ExtensionError: it was left out of the build, doesn't load, or belongs to another version of these sources.
    """
    facts = build_info().get(name)
    if facts is not None and not facts["built"]:
        raise ExtensionError(f"pvdm_fast.{name} was left out when pvdm_fast was installed: {facts['reason']}.")
    try:
        module = import_module(f"pvdm_fast.{name}")
    except ImportError as error:
        if facts is None:
            raise ExtensionError(f"pvdm_fast.{name} has not been built: {REINSTALL}.") from error
        raise ExtensionError(f"pvdm_fast.{name} does not load ({error}): {REINSTALL}.") from error
    if module.abi != ABI:
        raise ExtensionError(f"pvdm_fast.{name} was built from other sources than these: {REINSTALL}.")
    return module


@cache
def call_key() -> Callable[..., bytes | None]:
    """What makes the key of a call's arguments (csrc/bindings/call_key.h); without the extension no call has one."""
    try:
        key: Callable[..., bytes | None] = extension("_cpu").call_key
    except ExtensionError:
        return lambda *arguments: None
    return key


@cache
def availability(name: str) -> str | None:
    """None if "cpu" or "cuda" kernels can run on this machine, otherwise one sentence with the reason and the
    remedy."""
    try:
        module = extension(f"_{name}")
        if name == "cpu":
            module.isa()  # raises if PVDM_FAST_CPU_ISA asks for a set that this CPU doesn't have
    except (ExtensionError, ValueError) as error:
        return str(error)
    return None if name == "cpu" else _gpu_reason(build_info().get("_cuda", {}).get("targets", ()))


def refused_by_driver() -> str | None:
    """What PyTorch says of a driver that it can't use, with the remedy; None where there is none."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0].strip(".")
        if "driver" in reason and "no NVIDIA driver" not in reason:
            return f"PyTorch can't use the GPU ({reason}): update the driver, or install a build of PyTorch for it."
    return None


def _gpu_reason(targets: Sequence[str]) -> str | None:
    if not torch.version.hip and not torch.cuda.is_available() and (reason := refused_by_driver()):
        return reason
    if torch.version.hip or not torch.cuda.is_available():
        return "no NVIDIA GPU is available to PyTorch: run on a machine with one, with a CUDA build of PyTorch."
    capability = torch.cuda.get_device_capability()
    if runs_on(targets, capability):
        return None
    return (
        f"it was built for {', '.join(targets)}, the GPU has compute capability {capability[0]}.{capability[1]}: "
        f"{REINSTALL}, with TORCH_CUDA_ARCH_LIST naming it (8.0 or newer)."
    )


def runs_on(targets: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code built for `targets` ("sm_90", "ptx_120", ...) runs on a GPU of this compute capability.

    Machine code runs within its major version, from its minor version on. PTX runs everywhere from its version on.
    Targets ending in "a" run on that version only. Those ending in "f" run within their family, which is taken to be
    the major version.
    """
    for target in targets:
        kind, _, version = target.partition("_")
        built = (int(version.rstrip("af")[:-1]), int(version.rstrip("af")[-1]))
        exact, later = built == capability, capability >= built
        same_major = later and capability[0] == built[0]
        if exact or (not version.endswith("a") and (same_major or (later and kind == "ptx" and version.isdigit()))):
            return True
    return False
