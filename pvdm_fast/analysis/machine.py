"""What is installed, what was built, and which backend computes what on this machine, as plain values."""

from __future__ import annotations

import platform
from functools import cache
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


@cache
def cpu_fields() -> dict[str, str]:
    """What Linux says about the first core, as it names it. Empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def model_name() -> str:
    """The processor's name as it says it itself, which may be that of several generations."""
    return cpu_fields().get("model name") or platform.processor() or platform.machine()


def cpu_name() -> str:
    """The processor with its family and model, such as "AMD EPYC (family/model 26/2)".

    Clouds give processors of several generations one name: a Zen 4 is 25/17, a Zen 5 is 26/2.
    """
    fields, name = cpu_fields(), model_name()
    numbers = [fields[key] for key in ("cpu family", "model") if key in fields]
    return f"{name} (family/model {'/'.join(numbers)})" if len(numbers) == 2 else name


def cpu_flags() -> set[str]:
    """All features that Linux names."""
    fields = cpu_fields()
    return set((fields.get("flags") or fields.get("Features") or "").split())


def cpu_facts() -> dict[str, Any]:
    """The processor's name, its features that matter to kernels, and the instruction set in use."""
    flags = cpu_flags()
    served = extensions.availability("cpu") is None
    return {
        "name": cpu_name(),
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


def _build_lines(build: dict[str, Any]) -> list[str]:
    if not build:
        return [f"  nothing was built: {extensions.REINSTALL}"]
    lines = []
    for name in ("_cpu", "_cuda"):
        facts = build.get(name, {"built": False, "reason": "it was not asked for"})
        if facts["built"]:
            lines.append(f"  {name:<6} built by {facts['compiler']} for {', '.join(facts['targets'])}")
        else:
            lines.append(f"  {name:<6} left out: {facts['reason']}")
    return lines


def _table(operations: dict[str, dict[str, str | None]]) -> list[str]:
    """One row an operation: "*" the automatic choice, "serves", or the number of a note below the table."""
    notes: list[str] = []
    rows = [f"  {'operation':<18}" + "".join(f"{name:<13}" for name in choice.BACKENDS)]
    for op, facts in operations.items():
        cells = []
        for name in choice.BACKENDS:
            reason = facts[name]
            if reason is None:
                cells.append("serves *" if facts["auto"] == name else "serves")
                continue
            reason = reason.replace(op, "this operation")
            if reason not in notes:
                notes.append(reason)
            cells.append(f"no [{notes.index(reason) + 1}]")
        rows.append(f"  {op:<18}" + "".join(f"{cell:<13}" for cell in cells).rstrip())
    rows.append("  * chosen automatically here")
    return rows + [f"  [{i}] {note}" for i, note in enumerate(notes, start=1)]


def describe_machine(facts: dict[str, Any]) -> list[str]:
    """What `collect()` found, but for the table of operations, as lines of text."""
    cpu, gpu, triton = facts["cpu"], facts["gpu"], facts["triton"]
    lines = ["Versions"]
    versions = {name: value for name, value in facts["versions"].items() if name != "torch_cuda"}
    lines += [f"  {name:<14} {value or 'not installed'}" for name, value in versions.items()]
    lines += ["", "CPU", f"  {cpu['name']} ({cpu['architecture']}), {cpu['threads']} threads for PyTorch"]
    lines += [f"  has {', '.join(cpu['flags']) or 'none of the features that kernels know'}"]
    lines += [f"  kernels use {cpu['instruction_set'] or 'nothing: ' + str(facts['backends']['cpu'])}"]
    lines += ["", "GPU"]
    lines += [
        f"  {d['name']}, {d['memory_gib']} GiB, compute capability {d['compute_capability']}" for d in gpu["devices"]
    ] or [f"  none: {gpu.get('reason', 'the driver lists none.')}"]
    if gpu["devices"] and not gpu["usable_by_torch"]:
        lines.append("  PyTorch can't use it: install a CUDA build of PyTorch")
    lines += ["", "Triton", f"  {facts['versions']['triton'] or 'not installed'}"]
    lines += ["  TRITON_INTERPRET is set: kernels run in the interpreter, on the CPU"] if triton["interpreter"] else []
    measured = "" if triton["user_table_present"] else "none, python -m pvdm_fast.tune would write "
    lines += [f"  configurations measured here: {measured}{triton['user_table']}"]
    lines += ["", "Build", *_build_lines(facts["build"]), "", "Backends"]
    return lines + [f"  {name:<10} {reason or 'runs here'}" for name, reason in facts["backends"].items()]


def describe(facts: dict[str, Any]) -> str:
    """`collect()`'s facts as text."""
    return "\n".join([*describe_machine(facts), "", "Operations", *_table(facts["operations"])])
