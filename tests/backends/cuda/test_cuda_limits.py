"""Sizes beyond the CUDA kernels are refused before anything is allocated, so that automatic choice can continue."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from backends import arguments
from backends.cuda import emulated

from pvdm_fast import ops
from pvdm_fast.backends import choice
from pvdm_fast.layout import PlaneLayout


def meta(*shape: int) -> Any:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def test_every_module_says_what_it_refuses() -> None:
    """And they refuse none of the usual calls, in either direction."""
    for call in arguments.recorded(torch.float32):
        if call.op not in choice.SERVED["cuda"]:
            continue
        module = choice.implementation("cuda", call.op)
        assert (module.refusal(*call.arguments) is None) == hasattr(module, call.direction), call


MANY, SIDE = 2**31, 2**16
BEYOND = {
    "heads": ("segment_attention", (meta(1, 4, 3, 1, 264), [0, 4], 1.0), "256 channels, not 264"),
    "segments": ("segment_attention", (meta(1, 33, 3, 1, 8), list(range(34)), 1.0), "32 segments, not 33"),
    "queries": ("segment_attention", (meta(MANY, 1, 3, 1, 8), [0, 1], 1.0), "2147483647 blocks"),
    "sequences": ("axial_attention", (meta(8, 2, SIDE, SIDE, 3, 1, 8), *(None,) * 3, "time", 1.0), "2147483647 blocks"),
    "planes": ("plane_norm", (meta(1, 33, 8), *(None,) * 3, [1] * 66, 2, 1e-5, False, 0), "32 planes, not 33"),
    "tokens": ("plane_norm", (meta(1, 2**30, 8), *(None,) * 3, [2**30, 1], 2, 1e-5, False, 0), "at most 536870911"),
    "batches": ("plane_norm", (meta(MANY, 1, 8), *(None,) * 3, [1, 1], 2, 1e-5, False, 0), "2147483647 blocks"),
    "groups": ("plane_norm", (meta(2**26, 1, 64), *(None,) * 3, [1, 1], 64, 1e-5, False, 0), "2147483647 blocks"),
    "slices": ("triplane_slice", (meta(1, MANY, 8), None, None, "xy", 2, SIDE, SIDE // 4), "2147483647 blocks"),
    "elements": ("triplane_project", (meta(1, 64, 8), "xy", 64, 1, 1, 1, 0.0), "at most 64 elements, not 65"),
    "lattice": ("triplane_expand", (meta(1, 1, 8), meta(3, 64, 8), meta(3, 64), 1, SIDE, SIDE), "2147483647 blocks"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_sizes_beyond_the_kernels(name: str) -> None:
    op, inputs, reason = BEYOND[name]
    said = choice.refusal("cuda", op, inputs)
    assert said is not None and reason in said and said.endswith("another backend.")


def test_automatic_choice_goes_on(device: ModuleType) -> None:
    """If the kernels refuse, the next backend computes: heads over 256, 33 segments, 33 planes."""
    many = PlaneLayout(((1, 2),) * 33)
    calls = {
        "wide heads": lambda: ops.segment_attention(torch.ones(1, 3, 3, 1, 264)),
        "segments": lambda: ops.segment_attention(torch.ones(1, 66, 3, 1, 8), many.offsets),
        "planes": lambda: ops.plane_norm(torch.ones(1, 66, 8), many, torch.ones(8), torch.zeros(8), groups=2),
        "along time": lambda: ops.axial_attention(torch.ones(1, 3, 1, 1, 3, 1, 260), "time"),
    }
    with emulated.registered(device):
        for name, call in calls.items():
            assert torch.isfinite(call()).all(), name
