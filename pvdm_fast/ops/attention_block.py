"""The denoiser's attention blocks as one operation, for sampling: few clips, no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.layout import PlaneLayout
from pvdm_fast.ops import costs
from pvdm_fast.ops.derivatives import infers
from pvdm_fast.ops.registry import expect_real, register_by_reference, tokens_of_planes

# Up to here launches take the time, not bytes or products: the output projection of 2048 tokens of 256 channels
# multiplies 0.3 GFLOP, 3 us at 100 TFLOP/s. With more, the vendor's product is worth a launch for the sum. Reasoned,
# not measured.
MOST_TOKENS = 2048
# Few tokens of one plane are normed in the projection to qkv, where every program norms all tokens of its clip. With
# more clips that costs more than the saved launches and bytes.
FEW_TOKENS = 128
MOST_CLIPS = 2


def _check(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    heads: int,
    groups: int,
    eps: float,
    planes: Sequence[int],
) -> None:
    weights = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias)
    expect_real("attention_block", x, *weights)
    if x.dim() != 3 or x.numel() == 0 or x.shape[1] > MOST_TOKENS:
        raise ValueError(
            f"attention_block: x must be (B, N, C) with N up to {MOST_TOKENS}, not empty; got {tuple(x.shape)}."
        )
    c = x.shape[-1]
    if heads < 1 or groups < 1 or c % heads or c % groups:
        raise ValueError(f"attention_block: {heads} heads and {groups} groups must divide the {c} channels.")
    if tokens_of_planes("attention_block", planes) != x.shape[1]:
        raise ValueError(
            f"attention_block: x has {x.shape[1]} tokens, which planes of sizes {list(planes)} don't hold."
        )
    shapes = [tuple(t.shape) for t in weights]
    expected = [(c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,)]
    if shapes != expected:
        raise ValueError(f"attention_block: the weights must have shapes {expected}, but have {shapes}.")
    if any(w.dtype != x.dtype for w in weights):
        raise ValueError(f"attention_block: the weights must be {x.dtype} as x, but are {[w.dtype for w in weights]}.")


def _flops(direction: str, x: Tensor, *inputs: Any) -> int:
    batch, tokens, channels = x.shape
    planes = inputs[-1]
    return batch * costs.attention_block(
        tokens, [h * w for h, w in zip(planes[::2], planes[1::2], strict=True)], channels
    )


def _fake(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    heads: int,
    groups: int,
    eps: float,
    planes: Sequence[int],
) -> Tensor:
    return x.new_empty(x.shape)


_forwards = register_by_reference(
    "attention_block",
    "attention_block",
    "forward",
    schema="(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor qkv_bias, Tensor proj_weight,"
    " Tensor proj_bias, int heads, int groups, float eps, int[] planes, str backend) -> Tensor",
    check=_check,
    fake=_fake,
    flops=_flops,
)


def fuses_attention_block(x: Tensor, weight: Tensor, *, heads: int, groups: int = 32) -> bool:
    """Whether `attention_block` should take x (B, N, C), of a block whose weights are like `weight`: nothing wants a
    gradient, a kernel serves it at these sizes, and N <= 2048, B <= 2. Above 128 tokens only where Triton computes
    attention anyway. Not under torch.compile, which fuses by itself."""
    return (
        infers(x.device.type)
        and x.shape[0] <= MOST_CLIPS
        and x.shape[1] <= MOST_TOKENS
        and x.dtype == weight.dtype
        and choice.serves("triton", "attention_block", choice.requested(), x.device.type, x.dtype)
        and (
            x.shape[1] <= FEW_TOKENS
            or choice.serves("triton", "segment_attention", choice.requested(), x.device.type, x.dtype)
        )
        and choice.refusal("triton", "attention_block", (x, *6 * (weight,), heads, groups)) is None
    )


def attention_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    *,
    heads: int,
    groups: int = 32,
    eps: float = 1e-5,
    layout: PlaneLayout | None = None,
) -> Tensor:
    """x + projection(attention(qkv(GroupNorm(x)))), across planes (PVDM, section 3.2) or inside each. For sampling.

    Args:
        x: (B, N, C), any strides, N up to 2048. float32, bfloat16 or float16, like all weights.
        norm_weight, norm_bias: (C). The norm's statistics are over a plane's tokens of a group of channels.
        qkv_weight, qkv_bias: (3C, C), (3C). Channels are grouped by head, each with its q, k, v.
        proj_weight, proj_bias: (C, C), (C).
        heads, groups: each divides C.
        layout: of planes whose tokens attend only to each other. None: all tokens are one.

    Returns:
        (B, N, C), contiguous.

    Raises:
        ValueError: shapes don't fit, or there are more tokens.

    Derivatives: every kind, computed by the reference: there is no kernel for a gradient. `vmap` runs the operation for
        each element in turn.
    Determinism: repeated calls give the same bits, on one machine with one number of threads.
    Backends: reference, triton.
    """
    weights = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias)
    planes = (x.shape[1] if x.dim() == 3 else 1, 1) if layout is None else layout.sizes
    return _forwards(x, *weights, heads, groups, eps, planes, choice.requested())
