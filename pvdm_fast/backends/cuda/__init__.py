"""Launchers of the CUDA C++ kernels: outputs and workspaces are made here, `pvdm_fast._cuda` fills them."""

from __future__ import annotations

import torch
from torch import Tensor


def launch_target(x: Tensor) -> tuple[int, int]:
    """The device of a tensor, and PyTorch's current stream there, as the extension takes them."""
    device = x.get_device()
    return device, torch.cuda.current_stream(device).cuda_stream


def parameter(x: Tensor) -> Tensor:
    """A parameter as the kernels read it: float32, contiguous."""
    return x.float().contiguous()
