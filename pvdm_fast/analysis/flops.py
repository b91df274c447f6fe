"""FLOPs of products, found without computing: a multiply-add is 2; exponentials, norms and activations are none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


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


class FlopCount(TorchDispatchMode):
    """Adds up the FLOPs of every product that reaches PyTorch while it is on, those of recomputation too."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "pvdm_fast":
            name = function._schema.name.partition("::")[2]
            op = name.removesuffix("_backward")
            *inputs, _backend = args
            self.total += operation_flops(op, "forward" if op == name else "backward", inputs)
        elif formula := flop_registry.get(function._overloadpacket):
            self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result
