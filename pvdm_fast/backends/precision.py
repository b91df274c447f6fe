"""What to compute in: 16 bits on devices that have units for them; elsewhere they cost digits and gain nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

DTYPES = {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FIRST_CAPABILITY = (8, 0)  # of NVIDIA's GPUs that multiply bfloat16
AMD_FAMILIES = ("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")  # AMD's that do: CDNA 2 on, RDNA 3 on


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has AVX512-BF16 or AMX-BF16."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported())  # older PyTorch; CPUs with AMX-BF16 have this too


def without_16_bits(device: torch.device | str) -> str | None:
    """Why the GPU `device` has no units for what this package's kernels do in 16 bits; None where it has."""
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return None if name.startswith(AMD_FAMILIES) else f"this GPU ({name}) has no matrix units for bfloat16"
    capability = torch.cuda.get_device_capability(device)
    if capability >= FIRST_CAPABILITY:
        return None
    return "this GPU's compute capability is {}.{}, and bfloat16 begins with 8.0".format(*capability)


@dataclass(frozen=True)
class Precision:
    """What to compute in, and why; `refused`: something else was asked for by name."""

    dtype: torch.dtype
    why: str
    refused: bool = False

    @property
    def name(self) -> str:
        return NAMES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


def choose_precision(asked: str, device: torch.device | str) -> Precision:
    """The precision for `device`.

    Args:
        asked: "no" or "fp32", "bf16", "fp16"; or "auto": bf16 on GPUs that multiply it, else float32. On CPUs that is
            float32 always: there bf16 changes results that people compare bit for bit.
        device: a CPU or a GPU.
    """
    on_cpu = torch.device(device).type == "cpu"
    lack = None
    if asked in ("auto", "bf16") and not on_cpu:
        lack = without_16_bits(device)
    elif asked == "auto":
        lack = "auto takes 16 bits on GPUs only"
    elif asked == "bf16" and not cpu_multiplies_bfloat16():
        lack = "this CPU has neither AVX512-BF16 nor AMX-BF16"
    elif asked == "fp16" and on_cpu:
        lack = "it is for GPUs"
    if lack is not None:
        return Precision(torch.float32, lack, refused=asked != "auto")
    if asked == "auto":
        return Precision(torch.bfloat16, "chosen by auto, since this GPU has matrix units for it")
    return Precision(DTYPES[asked], "as asked for")


def announce(asked: str, precision: Precision, option: str) -> None:
    """Print, in one line, what `option` came to, where the name that was asked for doesn't say it."""
    if precision.refused:
        print(f"{option} {asked}: {precision.why}, so float32 is used instead", flush=True)
    elif asked == "auto":
        print(f"{option} auto: {precision}", flush=True)
