"""FLOPs of products, from sizes alone. A multiply-add is 2. Exponentials, norms and activations don't count."""

from __future__ import annotations


def linear(tokens: int, inputs: int, outputs: int) -> int:
    """FLOPs of tokens x (inputs -> outputs)."""
    return 2 * tokens * inputs * outputs


def conv(tokens: int, inputs: int, outputs: int, kernel: int = 3) -> int:
    """FLOPs of a kernel x kernel convolution, including the zeros outside the border."""
    return linear(tokens, inputs * kernel * kernel, outputs)


def attention(sequences: int, queries: int, keys: int, channels: int) -> int:
    """FLOPs of q k' and p v: 2 products of queries x keys x channels (all heads together)."""
    return 4 * sequences * queries * keys * channels


def attention_block(layout_tokens: int, segments: list[int], channels: int) -> int:
    """FLOPs of qkv, attention inside each segment, and output projection."""
    inside = sum(attention(1, n, n, channels) for n in segments)
    return linear(layout_tokens, channels, 4 * channels) + inside


def attention_passes(direction: str, forward: int) -> int:
    """FLOPs of one direction of a fused attention, from those of its forward pass, which has 2 products.

    The backward pass has 5 (queries and keys are multiplied again), the forward pass with tangents 6.
    """
    return forward * {"forward": 2, "backward": 5, "jvp": 6}[direction] // 2


def none(direction: str, *inputs: object) -> int:
    """FLOPs of an operation without products."""
    return 0
