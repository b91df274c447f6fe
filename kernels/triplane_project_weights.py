"""The products for the weights' gradients of `triplane_project`, of all layers in one launch.

A program takes a block of one weight of one layer and sums over all rows in their order, so nothing is split, and the
bits are the same on every run. At full size that is 354 blocks of 128 x 64, of which 291 sum over 17408 rows.

A norm's result enters a product before the norm's weight and bias are applied, as the first launch stores it (`hat`).
With d the other side, the gradient is (d' hat) * weight + (sum of d) bias'. The sum of d is also the bias' gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pvdm_fast.kernels.configs import ConfigTable
from pvdm_fast.kernels.launch import Config, launch
from pvdm_fast.kernels.math import dot_precision

if TYPE_CHECKING:
    from pvdm_fast.kernels.triplane_project_backward import Operands, Sizes

# OUTPUTS x INPUTS: of a weight. ROWS: in a step.
WEIGHTS = ConfigTable(
    "triplane_project_weights",
    {
        ("*", "*", "*"): Config({"OUTPUTS": 128, "INPUTS": 64, "ROWS": 64}, 8, 3),
        ("*", "*", "float32"): Config({"OUTPUTS": 64, "INPUTS": 64, "ROWS": 32}, 8, 2),
        ("interpreter", "*", "*"): Config({"OUTPUTS": 128, "INPUTS": 128, "ROWS": 128}),
    },
    candidates=tuple(
        Config({"OUTPUTS": outputs, "INPUTS": inputs, "ROWS": rows}, 8, stages)
        for outputs, inputs in ((128, 64), (128, 128))
        for rows, stages in ((32, 3), (32, 4), (64, 3))
    ),
)


@triton.jit
def _blocks(outputs, inputs, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    return tl.cdiv(outputs, OUTPUTS) * tl.cdiv(inputs, INPUTS)


@triton.jit
def _add_to(target, place, total, mask, later):
    """Write sums, or add them to those of earlier launches."""
    total += tl.load(target + place, mask=mask & (later > 0), other=0.0).to(tl.float32)
    tl.store(target + place, total.to(target.dtype.element_ty), mask=mask)


@triton.jit
def triplane_project_weights(
    hat1, dqkv, attended, hat2, gelu, dhidden, flowing, dtotal, kept, dlatent,
    norm1_weight, norm1_bias, norm2_weight, norm2_bias, qkv_weight, out_weight, up_weight, down_weight, latent_weight,
    out_bias, up_bias, down_bias, latent_bias,
    sequences, layers, c, inner, hidden, latents, latents_stride, later,
    LENGTH: tl.constexpr, PRECISION: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Operands as `triplane_project_backward` writes them -> gradients, from qkv_weight on. `later`: adds to them.

    Grid: the blocks of every layer's four weights, then those of latent_weight.
    """
    layers, c, inner = tl.cast(layers, tl.int32), tl.cast(c, tl.int32), tl.cast(inner, tl.int32)
    hidden, latents, stride = tl.cast(hidden, tl.int32), tl.cast(latents, tl.int32), tl.cast(latents_stride, tl.int32)
    of_qkv = _blocks(3 * inner, c, OUTPUTS, INPUTS)
    of_out = of_qkv + _blocks(c, inner, OUTPUTS, INPUTS)
    of_up = of_out + _blocks(hidden, c, OUTPUTS, INPUTS)
    of_layer = of_up + _blocks(c, hidden, OUTPUTS, INPUTS)
    number = tl.program_id(0) // of_layer
    block = tl.program_id(0) - number * of_layer
    layer = tl.minimum(number, layers - 1).to(tl.int64)
    all_rows = tl.cast(sequences, tl.int64) * LENGTH
    at = layer * all_rows
    rows = tl.where(number < layers - 1, all_rows, tl.cast(sequences, tl.int64))  # from the attention's result on
    is_layer = number < layers
    is_qkv = is_layer & (block < of_qkv)
    is_out = is_layer & (block >= of_qkv) & (block < of_out)
    is_up = is_layer & (block >= of_out) & (block < of_up)
    is_down = is_layer & (block >= of_up)
    # Which product this is. Rows of the left side are `stride` apart, those of the right side `apart` times its width.
    left, right, target = dlatent, kept, latent_weight
    outputs, inputs, apart = latents, c, tl.cast(1, tl.int32)
    if is_qkv:
        left, right, target = dqkv + at * (3 * inner), hat1 + at * c, qkv_weight + layer * (3 * inner) * c
        outputs, stride, rows = 3 * inner, 3 * inner, all_rows
    if is_out:
        left, right, target = dtotal + at * c, attended + at * inner, out_weight + layer * c * inner
        outputs, stride, inputs, block = c, c, inner, block - of_qkv
        apart = tl.where(number < layers - 1, 1, LENGTH)
    if is_up:
        left, right, target = dhidden + at * hidden, hat2 + at * c, up_weight + layer * hidden * c
        outputs, stride, block = hidden, hidden, block - of_out
    if is_down:
        left, right, target = flowing + at * c, gelu + at * hidden, down_weight + layer * c * hidden
        outputs, stride, inputs, block = c, c, hidden, block - of_up
    across = tl.cdiv(inputs, INPUTS)
    output = block // across * OUTPUTS + tl.arange(0, OUTPUTS)
    column = block % across * INPUTS + tl.arange(0, INPUTS)
    products = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (output < stride)[None, :]
        d = tl.load(left + row[:, None] * stride + output[None, :], mask=inside, other=0.0)
        inside = (row < rows)[:, None] & (column < inputs)[None, :]
        value = tl.load(right + row[:, None] * (apart * inputs) + column[None, :], mask=inside, other=0.0)
        products = tl.dot(tl.trans(d), value, products, input_precision=PRECISION)
        sums += d.to(tl.float32)
    total = tl.sum(sums, 0)
    gain, shift = tl.full((INPUTS,), 1.0, tl.float32), tl.zeros((INPUTS,), tl.float32)
    if is_qkv:
        gain = tl.load(norm1_weight + layer * c + column, mask=column < c, other=0.0).to(tl.float32)
        shift = tl.load(norm1_bias + layer * c + column, mask=column < c, other=0.0).to(tl.float32)
    if is_up:
        gain = tl.load(norm2_weight + layer * c + column, mask=column < c, other=0.0).to(tl.float32)
        shift = tl.load(norm2_bias + layer * c + column, mask=column < c, other=0.0).to(tl.float32)
    products = products * gain[None, :] + total[:, None] * shift[None, :]
    inside = (output < outputs)[:, None] & (column < inputs)[None, :]
    _add_to(target, output.to(tl.int64)[:, None] * inputs + column[None, :], products, inside, later)
    first_column = (output < outputs) & (block % across == 0)
    _add_to(out_bias, layer * c + output, total, first_column & is_out, later)
    _add_to(up_bias, layer * hidden + output, total, first_column & is_up, later)
    _add_to(down_bias, layer * c + output, total, first_column & is_down, later)
    _add_to(latent_bias, output, total, first_column & (number >= layers), later)


MATRICES = ("qkv_weight", "out_weight", "up_weight", "down_weight", "latent_weight")
BIASES = ("out_bias", "up_bias", "down_bias", "latent_bias")


def weight_gradients(
    operands: Operands, named: dict[str, Tensor], earlier: dict[str, Tensor], sequences: int, sizes: Sizes, single: bool
) -> dict[str, Tensor]:
    """The gradients of `MATRICES` and `BIASES`, from the operands of some sequences.

    Args:
        named: all parameters.
        earlier: what this returned for the sequences before, to which it adds; empty for the first ones.
        single: there are no other sequences, so gradients have their parameters' dtypes at once, not float32.
    """
    matrix = named["qkv_weight"]
    found = earlier or {
        name: torch.empty(named[name].shape, dtype=named[name].dtype if single else torch.float32, device=matrix.device)
        for name in (*MATRICES, *BIASES)
    }
    config = WEIGHTS(matrix.device, "any", matrix.dtype)
    outputs, inputs = config.blocks["OUTPUTS"], config.blocks["INPUTS"]
    shapes = [tuple(named[name].shape) for name in MATRICES]
    blocks = [triton.cdiv(shape[-2], outputs) * triton.cdiv(shape[-1], inputs) for shape in shapes]
    o = operands
    launch(
        triplane_project_weights,
        (sizes.layers * sum(blocks[:-1]) + blocks[-1],),
        *(o.hat1, o.dqkv, o.attended, o.hat2, o.gelu, o.dhidden, o.flowing, o.dtotal, o.kept, o.dlatent),
        *(named[name] for name in ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")),
        *(found[name] for name in (*MATRICES, *BIASES)),
        *(sequences, sizes.layers, sizes.channels, sizes.inner, sizes.hidden, sizes.latents, o.dlatent.stride(0)),
        2 * bool(earlier),  # Triton compiles the number 1 anew
        config=config,
        LENGTH=sizes.length,
        PRECISION=dot_precision(matrix),
    )
    return found
