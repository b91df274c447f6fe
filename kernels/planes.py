"""Where packed planes lie, for Triton kernels. PLANES is the constant (rows, columns, rows, columns, ...).

Sizes are compile-time constants, so a kernel is compiled once per layout (a U-Net has one per level). It needs no table
in memory and divides by constants, which become shifts for the powers of two that models use.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_of(chunk, PLANES: tl.constexpr, SIZE: tl.constexpr):
    """Finds chunk number `chunk`, counted through all planes. Each plane is cut into chunks of at most SIZE tokens.

    Returns: the plane's number, first token, rows and columns, and the number of the plane's first chunk.
    """
    plane, first, rows, columns, start = chunk * 0, chunk * 0, chunk * 0, chunk * 0, chunk * 0
    before: tl.constexpr = 0
    tokens: tl.constexpr = 0
    for p in tl.static_range(len(PLANES) // 2):
        here = chunk >= before
        plane = tl.where(here, p, plane)
        first = tl.where(here, tokens, first)
        rows = tl.where(here, PLANES[2 * p], rows)
        columns = tl.where(here, PLANES[2 * p + 1], columns)
        start = tl.where(here, before, start)
        before += (PLANES[2 * p] * PLANES[2 * p + 1] + SIZE - 1) // SIZE
        tokens += PLANES[2 * p] * PLANES[2 * p + 1]
    return plane, first, rows, columns, start


@triton.jit
def chunks_of(plane, PLANES: tl.constexpr, SIZE: tl.constexpr):
    """The number of a plane's first chunk, and how many chunks it has."""
    start, count = plane * 0, plane * 0
    before: tl.constexpr = 0
    for p in tl.static_range(len(PLANES) // 2):
        own = (PLANES[2 * p] * PLANES[2 * p + 1] + SIZE - 1) // SIZE
        start = tl.where(plane == p, before, start)
        count = tl.where(plane == p, own, count)
        before += own
    return start, count


@triton.jit
def place_of(token, PLANES: tl.constexpr):
    """Row and column of each token in its plane, and the plane's numbers of rows and columns."""
    i, j, rows, columns = token * 0, token * 0, token * 0, token * 0
    tokens: tl.constexpr = 0
    for p in tl.static_range(len(PLANES) // 2):
        here = token >= tokens
        i = tl.where(here, (token - tokens) // PLANES[2 * p + 1], i)
        j = tl.where(here, (token - tokens) % PLANES[2 * p + 1], j)
        rows = tl.where(here, PLANES[2 * p], rows)
        columns = tl.where(here, PLANES[2 * p + 1], columns)
        tokens += PLANES[2 * p] * PLANES[2 * p + 1]
    return i, j, rows, columns
