"""The first parts: what is here, and the CUDA kernels built for this card alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import torch

import build_tools
from benchmarks import machine
from benchmarks.first_contact.context import ROOT, Context, LeftOut, Wrong, importable, read_json, write_json
from pvdm_fast.analysis.machine import collect, describe_machine

# What other parts, or other uses of the package, would like to have.
WANTED = ("triton", "numpy", "safetensors", "einops", "diffusers", "accelerate", "matplotlib", "pybind11", "ninja")
FIELDS = (
    "name",
    "driver_version",
    "vbios_version",
    "power.limit",
    "clocks.max.sm",
    "clocks.max.mem",
    "ecc.mode.current",
)
BUILD_FACTS = ROOT / "pvdm_fast" / "_build_info.json"


def probe(context: Context) -> None:
    """Versions, the card, what is missing."""
    facts = collect()
    context.keep(
        name=torch.cuda.get_device_name() if context.device == "cuda" else machine.facts()["cpu"],
        machine=machine.facts(),
        missing=[name for name in WANTED if not importable(name)],
        facts=facts,
    )
    print(*describe_machine(facts), sep="\n")
    if context.device == "cuda":
        context.keep(card=_card(), driver=_driver())
        if torch.zeros(1, device="cuda").add_(1).item() != 1:
            raise Wrong("PyTorch itself adds 0 and 1 wrongly on this GPU.")


def _card() -> dict[str, Any]:
    known = torch.cuda.get_device_properties(0)
    return {
        "name": known.name,
        "capability": f"{known.major}.{known.minor}",
        "memory": known.total_memory,
        "multiprocessors": known.multi_processor_count,
        "count": torch.cuda.device_count(),
    }


def _driver() -> dict[str, str]:
    """What nvidia-smi says of the card; {} where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader", "--id=0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return dict(zip(FIELDS, map(str.strip, result.stdout.split(",")), strict=False)) if result.returncode == 0 else {}


def build(context: Context) -> None:
    """The CUDA extension, in place, for the compute capability of this card only."""
    if context.device != "cuda":
        raise LeftOut("there is no card to build for: run with --device cuda on a machine with one.")
    if torch.version.hip:
        raise LeftOut("the CUDA kernels are for NVIDIA's cards: Triton serves here, install it.")
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    try:
        extension, toolkit, planned = build_tools.plan_cuda(
            ROOT / "pvdm_fast" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}",
            build_tools.python_flags(pybind11_headers()),
            os.environ.get("TORCH_CUDA_ARCH_LIST") or capability,
        )
    except build_tools.Unbuildable as reason:
        raise LeftOut(f"{reason}.") from None
    try:
        build_tools.run_ninja(extension, ROOT / "build" / "first_contact_cuda", toolkit.nvcc)
    except build_tools.Unbuildable as reason:
        raise Wrong(f"{reason}.") from None
    facts = {"abi": build_tools.abi(), **read_json(BUILD_FACTS)}
    facts["_cuda"] = {"built": True, **planned}
    write_json(BUILD_FACTS, facts)
    context.keep(**facts["_cuda"])


def pybind11_headers() -> Path:
    """The folder of pybind11's headers: its own, or those that PyTorch brings."""
    if importable("pybind11"):
        import pybind11

        return Path(pybind11.get_include())
    return Path(torch.__file__).parent / "include"
