"""What is installed, what was built, and which backend computes what on this machine, as plain values."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import pvdm_fast
from pvdm_fast.backends import choice, extensions
from pvdm_fast.kernels.configs import user_table

PACKAGES = ("torch", "triton", "numpy", "diffusers", "accelerate", "safetensors", "av", "nvidia-ml-py", "tensorboard")
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "amx_bf16")


def installed_version(package: str) -> str | None:
    """The version of an installed distribution without importing it, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_facts() -> dict[str, Any]:
    """The processor's name, its features that matter to kernels, and the instruction set in use."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", "")).split()
    served = extensions.availability("cpu") is None
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "instruction_set": extensions.extension("_cpu").isa() if served else None,
        "instruction_sets": extensions.extension("_cpu").isas() if served else [],
    }


def gpu_facts() -> dict[str, Any]:
    """The driver's GPUs, or why they can't be listed."""
    try:
        import pynvml
    except ImportError:
        return {"devices": [], "reason": "nvidia-ml-py is not installed: pip install nvidia-ml-py."}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"devices": [], "reason": f"the NVIDIA driver lists none ({error})."}
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        devices = [
            {
                "name": _text(pynvml.nvmlDeviceGetName(handle)),
                "memory_gib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
                "compute_capability": "{}.{}".format(*pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
            }
            for handle in handles
        ]
        return {"devices": devices, "driver": _text(pynvml.nvmlSystemGetDriverVersion())}
    except pynvml.NVMLError as error:
        return {"devices": [], "reason": f"the NVIDIA driver does not answer ({error})."}
    finally:
        pynvml.nvmlShutdown()


def triton_facts() -> dict[str, Any]:
    """Whether Triton's interpreter is on, and the file of configurations that were measured on this machine."""
    path = user_table()
    return {"interpreter": choice.interpreting(), "user_table": str(path), "user_table_present": path.exists()}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def collect() -> dict[str, Any]:
    """All facts of this module, as plain values."""
    return {
        "versions": {
            "pvdm_fast": pvdm_fast.__version__,
            "python": platform.python_version(),
            **{name: installed_version(name) for name in PACKAGES},
            "torch": str(torch.__version__),  # with its build (+cpu, +cu130), which the installed version may lack
            "torch_cuda": torch.version.cuda,
        },
        "cpu": cpu_facts(),
        "gpu": gpu_facts() | {"usable_by_torch": torch.cuda.is_available()},
        "triton": triton_facts(),
        "build": extensions.build_info(),
        "backends": {name: choice.unavailable(name) for name in choice.BACKENDS},
        "operations": choice.report(),
    }
