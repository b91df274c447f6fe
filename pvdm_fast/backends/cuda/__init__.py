"""Launchers of the CUDA C++ kernels: they allocate outputs and workspaces, and `pvdm_fast._cuda` fills them."""

from __future__ import annotations

import torch
from torch import Tensor


def launch_target(x: Tensor) -> tuple[int, int]:
    """A tensor's device and PyTorch's current stream there, in the form that the extension takes."""
    device = x.get_device()
    return device, torch.cuda.current_stream(device).cuda_stream


MOST_BLOCKS = 2**31 - 1  # per launch


def launch_refusal(rows: int, channels: int = 1) -> str | None:
    """Why one launch can't take `rows` rows of so many channels, or None. A block takes at least 32 channels of
    one row."""
    if rows * -(-channels // 32) > MOST_BLOCKS:
        return f"it takes at most {MOST_BLOCKS} blocks of work in a launch: use a smaller batch, or another backend."
    return None
