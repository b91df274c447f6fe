"""Sequences along an axis of a lattice, (B, sites, L, heads, d) by strides, as the attention kernels address them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

WIDEST = 256  # head size: a block's rows of wider ones leave no room in a multiprocessor


def refuse_width(width: int) -> str | None:
    """Why heads of `width` channels are beyond the kernels, with the remedy; None where they aren't."""
    if width > WIDEST:
        return f"it takes heads of at most {WIDEST} channels, not {width}: use more heads, or another backend."
    return None


def strides_of(x: Tensor) -> tuple[int, int, int, int]:
    """x: (B, sites, L, heads, d), dense along d -> the strides of the others, as kernels take them."""
    return x.stride(0), x.stride(1), x.stride(2), x.stride(3)


def padded(width: int) -> int:
    """How wide a kernel's tile is for heads of `width`: a power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(width))


def width_class(width: int) -> str:
    """The part of a shape class that says how wide heads are: "d32" (at most 32), "d64", "d128" or "d256"."""
    return f"d{max(32, padded(width))}"


@triton.jit
def sequence_offset(sequence, head, sites, strides):
    """Elements from the first row of all to the first of this sequence (a number of B x sites) and head."""
    batch, site = sequence // sites, sequence % sites
    return batch.to(tl.int64) * strides[0] + site.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[3]
