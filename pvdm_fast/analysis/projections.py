"""Cases of `triplane_project` at any sizes, for tests and the self-test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pvdm_fast.analysis.cases import Case
from pvdm_fast.backends.projection_layers import NAMES, ProjectionLayer
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.ops import triplane_project


def _scaled(name: str, values: Tensor) -> Tensor:
    if name in ("norm1_weight", "norm2_weight"):
        return 1 + 0.1 * values
    if name.endswith("bias"):
        return 0.3 * values
    return values * values.shape[-1] ** -0.5 if name.endswith("weight") else values


@dataclass(frozen=True)
class Projection:
    """Sizes of a projection to one plane."""

    layout: tuple[int, int, int]
    plane: str
    channels: int
    heads: int
    head_width: int
    hidden: int = 24
    depth: int = 2
    latent: int = 3
    batch: int = 1

    @property
    def length(self) -> int:
        return self.layout[("xy", "yt", "xt").index(self.plane)]

    @property
    def case(self) -> Case:
        """This projection as the cases of other operations are."""
        c, inner, d = self.channels, self.heads * self.head_width, self.depth
        time, height, width = self.layout
        shapes: dict[str, tuple[int, ...]] = {"x": (self.batch, time * height * width, c), "token": (c,)}
        shapes["positions"] = (self.length + 1, c)
        for name in ("norm1_weight", "norm1_bias", "out_bias", "norm2_weight", "norm2_bias", "down_bias"):
            shapes[name] = (d, c)
        shapes |= {"qkv_weight": (d, 3 * inner, c), "out_weight": (d, c, inner), "up_weight": (d, self.hidden, c)}
        shapes |= {"up_bias": (d, self.hidden), "down_weight": (d, c, self.hidden)}
        shapes |= {"latent_weight": (self.latent, c), "latent_bias": (self.latent,)}
        ordered = {name: shapes[name] for name in ("x", *NAMES)}
        return Case("triplane_project", ordered, lambda **tensors: self.run(*tensors.values()), scaled=_scaled)

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """x and all parameters by name, in float64, as large as a network's."""
        return self.case.inputs(torch.float64, seed)

    def arguments(self) -> tuple[object, ...]:
        """What follows the tensors in the arguments of a backend."""
        return self.plane, *self.layout, self.heads, 1e-5

    def run(self, x: Tensor, token: Tensor, positions: Tensor, *parameters: Tensor) -> Tensor:
        """The public function on tensors in the order of `tensors`."""
        stacked, ends = parameters[:-2], parameters[-2:]
        layers = [ProjectionLayer(*kinds) for kinds in zip(*(t.unbind() for t in stacked), strict=True)]
        layout = TriplaneLayout(*self.layout)
        return triplane_project(x, layout, self.plane, token, positions, layers, *ends, heads=self.heads)


# Odd sizes, and sizes like the networks', which matrix units take.
CASES = {
    "triplane_project-odd": Projection((3, 5, 2), "yt", channels=24, heads=3, head_width=4, batch=2).case,
    "triplane_project-usual": Projection((8, 4, 4), "xy", channels=64, heads=4, head_width=8, hidden=128).case,
}
