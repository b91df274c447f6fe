"""`plane_resample` in Triton: one launch for all planes, each way. Nothing but the values' own bytes is moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.backends.rows import rows_dense
from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.planes import place_of
from pvdm_fast.layout import PlaneLayout

# As for geglu: a warp has 256 neighbouring channels, 16 bytes a lane in 16 bits. A program has 4 squares of 4 tokens.
TILES = ConfigTable(
    "plane_resample",
    {
        ("*", "*", "*"): Config({"ROWS": 4, "COLUMNS": 256}),
        ("gfx942", "*", "*"): Config({"ROWS": 8, "COLUMNS": 256}),
        ("interpreter", "*", "*"): Config({"ROWS": 64, "COLUMNS": 64}),
    },
    candidates=tuple(Config({"ROWS": r, "COLUMNS": c}, w) for r, c, w in ((2, 256, 2), (8, 256, 8), (2, 512, 4))),
)


@triton.jit
def plane_resample_kernel(
    x, y, rows, channels, batch_stride, stride, scale,
    PLANES: tl.constexpr, TOKENS: tl.constexpr, UP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """UP: scale x at each token of a square of y. Else: scale times the sum of a square of x.

    PLANES and TOKENS are those of the coarse side, which has `rows` tokens in all clips. y is contiguous.
    """
    across = tl.cdiv(channels, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (channel < channels)
    clip, token = row // TOKENS, (row % TOKENS).to(tl.int32)
    _, j, _, columns = place_of(token, PLANES)
    corner = 4 * token - 2 * j  # 4 times the tokens of the rows and planes before, and 2 j
    below = (2 * columns)[:, None].to(tl.int64)
    if UP:
        source = x + clip[:, None] * batch_stride + token[:, None].to(tl.int64) * stride + channel
        value = tl.load(source, mask=inside, other=0.0).to(tl.float32) * scale
        value = value.to(y.dtype.element_ty)
        target = y + (clip * (4 * TOKENS) + corner)[:, None] * channels + channel
        tl.store(target, value, mask=inside)
        tl.store(target + channels, value, mask=inside)
        tl.store(target + below * channels, value, mask=inside)
        tl.store(target + (below + 1) * channels, value, mask=inside)
    else:
        source = x + clip[:, None] * batch_stride + corner[:, None].to(tl.int64) * stride + channel
        value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(source + stride, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(source + below * stride, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(source + (below + 1) * stride, mask=inside, other=0.0).to(tl.float32)
        target = y + row[:, None] * channels + channel
        tl.store(target, (value * scale).to(y.dtype.element_ty), mask=inside)


def _resampled(x: Tensor, planes: Sequence[int], resample: int, up: bool) -> Tensor:
    """A gradient is resampled in the other direction, with the same scale."""
    coarse = [size if resample > 0 else size // 2 for size in planes]
    tokens = PlaneLayout.from_sizes(coarse).num_tokens
    batch, _, channels = x.shape
    y = torch.empty(batch, 4 * tokens if up else tokens, channels, dtype=x.dtype, device=x.device)
    x, config = rows_dense(x), TILES(x.device, "any", x.dtype)
    launch(
        plane_resample_kernel,
        (triton.cdiv(batch * tokens, config.blocks["ROWS"]) * triton.cdiv(channels, config.blocks["COLUMNS"]),),
        *(x, y, batch * tokens, channels, x.stride(0), x.stride(1), 1.0 if resample > 0 else 0.25),
        config=config,
        **dict(PLANES=tuple(coarse), TOKENS=tokens, UP=up),
    )
    return y


def forward(x: Tensor, planes: Sequence[int], resample: int) -> Tensor:
    """x: (B, N, C) -> (B, N', C)."""
    return _resampled(x, planes, resample, resample > 0)


def backward(grad: Tensor, planes: Sequence[int], resample: int) -> Tensor:
    """The gradient of x, which has `planes`, from grad: (B, N', C)."""
    return _resampled(grad, planes, resample, resample < 0)
