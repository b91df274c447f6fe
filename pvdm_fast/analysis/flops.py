"""FLOPs of products, found without computing: a multiply-add is 2; exponentials, norms and activations are none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pvdm_fast.analysis.recorder import Recorder, own_operation


def linear(tokens: int, inputs: int, outputs: int) -> int:
    """FLOPs of tokens x (inputs -> outputs)."""
    return 2 * tokens * inputs * outputs


def conv(tokens: int, inputs: int, outputs: int, kernel: int = 3) -> int:
    """FLOPs of a kernel x kernel convolution, the zeros outside the border included."""
    return linear(tokens, inputs * kernel * kernel, outputs)


def attention(sequences: int, queries: int, keys: int, channels: int) -> int:
    """FLOPs of q k' and p v: 2 products of queries x keys x channels (all heads together)."""
    return 4 * sequences * queries * keys * channels


def attention_block(layout_tokens: int, segments: list[int], channels: int) -> int:
    """qkv, attention inside each segment, output projection."""
    inside = sum(attention(1, n, n, channels) for n in segments)
    return linear(layout_tokens, channels, 4 * channels) + inside


def operation_flops(op: str, direction: str, inputs: Sequence[Any]) -> int:
    """FLOPs of the products of one of this package's operations, as its Triton kernels compute them.

    A fused attention multiplies queries and keys again in its backward pass: 5 products to the forward's 2.
    """
    backward = direction == "backward"
    tensors = inputs[1:] if backward else inputs
    if op == "segment_attention":
        batch, _, _, heads, width = tensors[0].shape
        offsets = next(value for value in inputs if isinstance(value, (list, tuple)))
        forward = sum(attention(batch, end - start, end - start, heads * width) for start, end in pairwise(offsets))
        return forward * 5 // 2 if backward else forward
    if op == "axial_attention":
        batch, time, height, width, _, heads, size = tensors[0].shape
        along_time = next(value for value in inputs if isinstance(value, str)) == "time"
        sequences, length = (height * width, time) if along_time else (time, height * width)
        queries = length if tensors[1] is None else 1
        forward = attention(batch * sequences, queries, length, heads * size)
        return forward * 5 // 2 if backward else forward
    if op == "attention_block":
        batch, tokens, channels = inputs[0].shape
        return batch * attention_block(tokens, [tokens], channels)
    if op == "plane_conv":
        x, weight = tensors[:2]
        forward = conv(x.shape[0] * x.shape[1], weight.shape[1], weight.shape[0])
        return forward * sum(inputs[-1]) if backward else forward
    if op == "triplane_expand":
        planes, weight, *rest = tensors
        time, height, width = rest[-3:]
        forward = linear(planes.shape[0] * time * height * width, 3 * planes.shape[2], weight.shape[1])
        return 2 * forward if backward else forward
    return 0


class FlopCount(Recorder):
    """Adds up the FLOPs of every product that reaches PyTorch while it is on, those of recomputation too."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def note(self, function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        if own := own_operation(function):
            *inputs, _backend = arguments
            self.total += operation_flops(*own, inputs)
        else:
            self.total += product_flops(function, arguments, options, result)


def product_flops(function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> int:
    """FLOPs of one of PyTorch's own operations, by PyTorch's formula; 0 for what multiplies no matrices."""
    from torch.utils.flop_counter import flop_registry  # takes 0.15 s, and few who import this module count

    formula = flop_registry.get(function._overloadpacket)
    return int(formula(*arguments, **options, out_val=result)) if formula else 0
