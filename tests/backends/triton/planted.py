"""Compiles kernels with planted faults, and one without, and prints what the budget finds, as JSON.

test_ahead_of_time.py runs this in a process without TRITON_INTERPRET. Argument: the GPU family, such as sm80.
"""

import json
import sys
from dataclasses import replace

import torch
import triton
import triton.language as tl

from benchmarks.ahead_of_time import compile_launch, over_budget, resources
from pvdm_fast.kernels.launch import Config
from pvdm_fast.kernels.math import sum_of_products


@triton.jit
def product(x, y, z, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    left, right = tl.load(x + m[:, None] * K + k[None, :]), tl.load(y + k[:, None] * N + n[None, :])
    tl.store(z + m[:, None] * N + n[None, :], tl.dot(left, right, input_precision="ieee").to(tl.bfloat16))


@triton.jit
def square(x, y, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i * stride) * 2.0)


@triton.jit
def fused_sum(x, y, z, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(z + i, tl.load(x + i) * tl.sum(tl.load(x + i) * tl.load(y + i)))


@triton.jit
def symmetric_sum(x, y, z, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(z + i, tl.load(x + i) * sum_of_products(tl.load(x + i), tl.load(y + i), 0))


def compiled(architecture, kernel, tensors, config, *numbers):
    made = compile_launch(architecture, kernel, (1,), (*tensors, *numbers), config)
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    return resources(made, architecture, kernel.fn.__name__, dtype, config)


def main(architecture):
    half, single = (torch.empty(1 << 20, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))
    good = Config({"M": 64, "K": 64, "N": 64})
    by_hand = compiled(architecture, product, [single] * 3, good)  # full precision, without tensor cores
    kernels = {
        "good product": compiled(architecture, product, [half] * 3, good),
        "spills": compiled(architecture, product, [half] * 3, Config({"M": 256, "K": 64, "N": 128}, num_warps=1)),
        "shared memory": compiled(architecture, product, [half] * 3, Config({"M": 128, "K": 512, "N": 256}, 8)),
        "tensor cores": replace(by_hand, products_16_bit=True),
        "good copy": compiled(architecture, square, [single] * 2, Config({"BLOCK": 1024}), 1),
        "good sum": compiled(architecture, symmetric_sum, [single] * 3, Config({"BLOCK": 128})),
        "sums over lanes": compiled(architecture, fused_sum, [single] * 3, Config({"BLOCK": 128})),
        "16-byte load": compiled(architecture, square, [single] * 2, Config({"BLOCK": 1024}), 3),
    }
    print(json.dumps({name: over_budget(kernel) for name, kernel in kernels.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
