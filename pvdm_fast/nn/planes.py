"""PyTorch's own layers, parameters and all, computing on packed planes."""

from __future__ import annotations

from torch import Tensor, nn

from pvdm_fast import ops
from pvdm_fast.layout import PlaneLayout

NORM_GROUPS = 32


class PlaneNorm(nn.GroupNorm):
    """GroupNorm(32) of each plane on its own, with what may follow it: see `pvdm_fast.ops.plane_norm`."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        layout: PlaneLayout,
        *,
        scale_shift: Tensor | None = None,
        activation: bool = False,
        resample: str | None = None,
    ) -> Tensor:
        """x: (B, N, C) packed tokens of `layout` -> (B, N', C)."""
        return ops.plane_norm(
            x,
            layout,
            self.weight,
            self.bias,
            scale_shift=scale_shift,
            groups=self.num_groups,
            eps=self.eps,
            activation=activation,
            resample=resample,
        )


class PlaneConv(nn.Conv2d):
    """3x3 convolution of each plane with shared weights: see `pvdm_fast.ops.plane_conv`."""

    def __init__(self, channels: int, out_channels: int, *, zero: bool = False) -> None:
        super().__init__(channels, out_channels, 3, padding=1)
        assert self.bias is not None
        if zero:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, layout: PlaneLayout) -> Tensor:  # type: ignore[override]
        """x: (B, N, C) packed tokens of `layout` -> (B, N, C')."""
        assert self.bias is not None
        return ops.plane_conv(x, layout, self.weight, self.bias)
