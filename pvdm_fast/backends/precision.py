"""bfloat16 on the CPU: only if the CPU multiplies it. Otherwise it costs digits and gains nothing."""

from __future__ import annotations

from functools import cache

import torch


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has AVX512-BF16 or AMX-BF16."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported())  # older PyTorch; CPUs with AMX-BF16 have this too


def bfloat16_serves(device: torch.device | str, option: str) -> bool:
    """Whether to use bfloat16, which `option` asks for, on `device`. If not, prints one line that says why."""
    if torch.device(device).type != "cpu" or cpu_multiplies_bfloat16():
        return True
    print(f"{option}: this CPU has neither AVX512-BF16 nor AMX-BF16, so float32 is used instead", flush=True)
    return False
