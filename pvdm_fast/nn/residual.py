"""The denoiser's residual block, on all planes at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from pvdm_fast.layout import PlaneLayout
from pvdm_fast.nn import checkpointing, planes
from pvdm_fast.nn.joined import join
from pvdm_fast.nn.plain import Weights, is_plain, readable, weights_of
from pvdm_fast.nn.planes import PlaneConv, PlaneNorm

# One product for all blocks, where a launch should cost more than a copy of the weights. No GPU has measured it. On a
# CPU the copy takes longer than what it saves (`tiny`, 8 clips, one core of a Xeon, forward and backward: 355 us apart,
# 467 joined).
JOINED = frozenset({"cuda"})


def embedded(layers: nn.Module, x: Tensor) -> Tensor:
    """What an nn.Sequential of activations and linear layers, or what stands in its place, makes of x (B, E)."""
    if not is_plain(layers, nn.Sequential):
        return layers(x)
    for layer in cast(nn.Sequential, layers):
        weights = weights_of(layer, nn.Linear)
        x = layer(x) if weights is None else F.linear(x, *weights)
    return x


def scale_shifts(modules: Iterable[nn.Module], embedding: Tensor) -> dict[nn.Module, Tensor]:
    """What the `emb_layers` of all plain residual blocks among `modules` make of one embedding (B, E), by the block.

    They share the activation, and on a GPU the product, whose weights are joined once while sampling.
    """
    found = [(module, _embedding_weights(module)) for module in modules]
    layers = {block: weights for block, weights in found if weights is not None}
    if not layers:
        return {}
    x = F.silu(embedding)
    if x.device.type not in JOINED:
        return {block: F.linear(x, *weights) for block, weights in layers.items()}
    weights, biases = zip(*layers.values(), strict=True)
    parts = F.linear(x, join(weights), join(biases)).split([len(bias) for bias in biases], dim=1)
    return dict(zip(layers, parts, strict=True))


def _embedding_weights(block: nn.Module) -> Weights | None:
    """Of the linear layer of a residual block's `emb_layers`; None: the block is called with the embedding."""
    if not is_plain(block, ResidualBlock):
        return None
    layers = cast(nn.Sequential, block._modules["emb_layers"])
    if not is_plain(layers, nn.Sequential) or len(layers) != 2 or not is_plain(layers[0], nn.SiLU):
        return None
    return weights_of(layers[1], nn.Linear)


@readable
class ResidualBlock(nn.Module):
    """norm -> SiLU -> [x2] -> 3x3 conv -> norm, scale and shift by the embedding -> SiLU -> 3x3 conv, plus the skip.

    Parameter names and shapes are those of the release's `ResBlock` (use_scale_shift_norm). The last conv starts at
    zero. Each plane has its own norm statistics and conv borders.

    Args:
        channels, out_channels: multiples of 32.
        embedding_channels: width of the time embedding.
        resample: None, "up" or "down": sides of every plane x2 or / 2, on the skip path too.

    Attributes:
        gradient_checkpointing: if set, the block saves only its inputs for the backward pass, which recomputes it.
    """

    def __init__(self, channels: int, embedding_channels: int, out_channels: int, resample: str | None = None) -> None:
        super().__init__()
        self.resample = resample
        self.gradient_checkpointing = False
        self.in_layers = nn.ModuleDict({"0": PlaneNorm(channels), "2": PlaneConv(channels, out_channels)})
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_channels, 2 * out_channels))
        self.out_layers = nn.ModuleDict(
            {"0": PlaneNorm(out_channels), "3": PlaneConv(out_channels, out_channels, zero=True)}
        )
        self.skip_connection = nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)

    def output_layout(self, layout: PlaneLayout) -> PlaneLayout:
        if self.resample is None:
            return layout
        return layout.upsample(2) if self.resample == "up" else layout.downsample(2)

    def forward(self, x: Tensor, embedding: Tensor, layout: PlaneLayout, scale_shift: Tensor | None = None) -> Tensor:
        """x: (B, N, C) packed tokens of `layout`, embedding: (B, E) -> (B, N', C') of `output_layout(layout)`.

        scale_shift: what `scale_shifts` has made of the embedding for this block already; None: made here.
        """
        return checkpointing.run(self, self._compute, x, embedding, layout, scale_shift)

    def _compute(self, x: Tensor, embedding: Tensor, layout: PlaneLayout, scale_shift: Tensor | None) -> Tensor:
        if scale_shift is None:
            scale_shift = embedded(self.emb_layers, embedding)
        after = self.output_layout(layout)
        first, last = self.in_layers, self.out_layers
        h = planes.norm(first["0"], x, layout, activation=True, resample=self.resample)
        h = planes.conv(first["2"], h, after)
        h = planes.norm(last["0"], h, after, scale_shift=scale_shift, activation=True)
        if self.resample is not None:
            x = planes.resampled(x, layout, self.resample)
        return planes.conv(last["3"], h, after, residual=planes.pointwise(self.skip_connection, x, after))
