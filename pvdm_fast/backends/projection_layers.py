"""The parameters of `triplane_project`, in the order in which the operation and every backend take them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ProjectionLayer(NamedTuple):
    """The parameters of one layer: norm, attention, norm, feed-forward.

    norm1_weight, norm1_bias, norm2_weight, norm2_bias, out_bias, down_bias: (C). qkv_weight: (3 inner, C). out_weight:
    (C, inner). up_weight: (hidden, C), up_bias: (hidden). down_weight: (C, hidden).
    """

    norm1_weight: Tensor
    norm1_bias: Tensor
    qkv_weight: Tensor
    out_weight: Tensor
    out_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor


# The operation's tensors behind x. Those of layers are stacked, (layers, ...).
NAMES = ("token", "positions", *ProjectionLayer._fields, "latent_weight", "latent_bias")
MATRICES = ("qkv_weight", "out_weight", "up_weight", "down_weight", "latent_weight")
