"""Run by test_cuda_emulated.py under AddressSanitizer and UBSan: the emulated kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from native import emulated

from pvdm_fast.native.cuda import triplane_expand as kernels

module = emulated.load(Path(sys.argv[1]))
kernels.extension = lambda name: module
kernels.place = lambda tensor: (0, 0)
for dtype in (torch.float32, torch.bfloat16):
    for sizes, channels in (((3, 5, 7), 21), ((9, 6, 9), 32)):
        time, height, width = sizes
        planes = torch.randn(2, height * width + time * (width + height), 3).to(dtype)
        weight = torch.randn(3, channels, 3)
        out = kernels.forward(planes, weight, torch.randn(3, channels), *sizes)
        kernels.backward(out, planes, weight, *sizes)
print("clean")
