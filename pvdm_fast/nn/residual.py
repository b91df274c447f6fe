"""The denoiser's residual block, on all planes at once."""

from __future__ import annotations

from torch import Tensor, nn

from pvdm_fast.backends.reference.plane_resample import resample_planes
from pvdm_fast.layout import PlaneLayout
from pvdm_fast.nn import checkpointing, planes
from pvdm_fast.nn.planes import PlaneConv, PlaneNorm


class ResidualBlock(nn.Module):
    """norm -> SiLU -> [x2] -> 3x3 conv -> norm, scale and shift by the embedding -> SiLU -> 3x3 conv, plus the skip.

    Parameter names and shapes are those of the release's `ResBlock` (use_scale_shift_norm). The last conv starts at
    zero. Norm statistics and conv borders are each plane's own.

    Args:
        channels, out_channels: multiples of 32.
        embedding_channels: width of the time embedding.
        resample: None, "up" or "down": sides of every plane x2 or / 2, on the skip path too.

    Attributes:
        gradient_checkpointing: set, the block keeps its inputs alone for the backward pass and is computed again there.
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

    def forward(self, x: Tensor, embedding: Tensor, layout: PlaneLayout) -> Tensor:
        """x: (B, N, C) packed tokens of `layout`, embedding: (B, E) -> (B, N', C') of `output_layout(layout)`."""
        return checkpointing.run(self, self._compute, x, embedding, layout)

    def _compute(self, x: Tensor, embedding: Tensor, layout: PlaneLayout) -> Tensor:
        after = self.output_layout(layout)
        first, last = self.in_layers, self.out_layers
        h = planes.norm(first["0"], x, layout, activation=True, resample=self.resample)
        h = planes.conv(first["2"], h, after)
        h = planes.norm(last["0"], h, after, scale_shift=self.emb_layers(embedding), activation=True)
        h = planes.conv(last["3"], h, after)
        if self.resample is not None:
            x = resample_planes(x, layout, planes.STEPS[self.resample])
        return planes.pointwise(self.skip_connection, x, after) + h
