"""When an operation for inference alone takes the place of a part of a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pvdm_fast.backends import choice
from pvdm_fast.ops.derivatives import infers

# From here on tiles of 128 rows occupy half the multiprocessors of an H100. A tile takes the same time however few
# there are, while the separate steps' products spread over the whole GPU. Reasoned, not measured.
LEAST_TOKENS = 8192


def fuses(op: str, x: Tensor, weights: tuple[Tensor, ...], *inputs: Any) -> bool:
    """Whether `op` should take x (B, N, C) with its `weights`.

    So it should where nothing wants a gradient, a kernel serves it at these sizes, all have one dtype, and there are at
    least 8192 tokens. Not under autocast, nor under torch.compile, which fuses by itself. Without the weights you learn
    whether it is worth collecting them.

    Args:
        inputs: of the operation, as many as the kernel's `refusal` looks at. They count if there are weights.
    """
    return (
        infers(x.device.type)
        and x.shape[0] * x.shape[1] >= LEAST_TOKENS
        and choice.serves("triton", op, choice.requested(), x.device.type, x.dtype)
        and all(weight.dtype == x.dtype for weight in weights)
        and (not weights or choice.refusal("triton", op, inputs) is None)
    )
