"""Launchers of the CUDA C++ kernels: outputs and workspaces are made here, `pvdm_fast._cuda` fills them."""

from __future__ import annotations

import torch
from torch import Tensor


def launch_target(x: Tensor) -> tuple[int, int]:
    """The device of a tensor, and PyTorch's current stream there, as the extension takes them."""
    device = x.get_device()
    return device, torch.cuda.current_stream(device).cuda_stream


MOST_BLOCKS = 2**31 - 1  # of a launch


def launch_refusal(rows: int, channels: int = 1) -> str | None:
    """Why `rows` rows of so many channels, of which a block takes at least 32 in one row, are beyond one launch."""
    if rows * -(-channels // 32) > MOST_BLOCKS:
        return f"it takes at most {MOST_BLOCKS} blocks of work in a launch: use a smaller batch, or another backend."
    return None
