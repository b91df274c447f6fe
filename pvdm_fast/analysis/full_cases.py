"""Cases at the sizes of full networks: what `base` asks of each operation, and planes longer than that.

Kernels take other paths there than at small sizes: the large tile of a convolution, planes whose statistics several
programs share, sequences that are read in pieces.
"""

from __future__ import annotations

from math import prod

from torch import Tensor

from pvdm_fast import ops
from pvdm_fast.analysis.cases import (
    Case,
    add_layer_norm,
    axial_attention,
    geglu,
    plane_conv,
    plane_norm,
    plane_resample,
    rotation,
    segment_attention,
    single_query,
    triplane_expand,
    triplane_slice,
)
from pvdm_fast.analysis.projections import Projection
from pvdm_fast.layout import PLANE_NAMES, PlaneLayout, TriplaneLayout

# The denoiser's levels, finest first, with their channels; groups of norms and heads are the same at all.
_LEVELS = [(TriplaneLayout(16, 32, 32).downsample(2**level), 256 * factor) for level, factor in enumerate((1, 2, 4, 4))]
_FINEST, _COARSEST = _LEVELS[0][0], _LEVELS[3][0]
_LONG = TriplaneLayout(16, 64, 64)  # 512 x 512 pixels
_LATTICE, _VIDEO = (16, 32, 32), TriplaneLayout(16, 32, 32)  # the autoencoder's
_WIDTH, _HEADS, _GROUPS = 384, 8, 32
_SITES = _VIDEO.height * _VIDEO.width


def _joint(tokens: int) -> PlaneLayout:
    return PlaneLayout(((tokens, 1),))


def attention_block(layout: PlaneLayout, channels: int, batch: int, heads: int = _HEADS) -> Case:
    """The fused block, which has a forward pass alone."""
    tokens = layout.num_tokens
    shapes: dict[str, tuple[int, ...]] = {
        "x": (batch, tokens, channels),
        "weight": (channels,),
        "bias": (channels,),
        "qkv_weight": (3 * channels, channels),
        "qkv_bias": (3 * channels,),
        "proj_weight": (channels, channels),
        "proj_bias": (channels,),
    }

    def run(
        x: Tensor, weight: Tensor, bias: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
        proj_bias: Tensor,
    ) -> Tensor:  # fmt: skip
        scale = 2.0 ** -(channels.bit_length() // 2)  # nearly unit variance goes through; exact in every dtype
        return ops.attention_block(
            x, weight, bias, qkv_weight * scale, qkv_bias, proj_weight * scale, proj_bias, heads=heads, groups=_GROUPS,
            layout=layout,
        )  # fmt: skip

    return Case("attention_block", shapes, run)


def feed_forward_block(tokens: int, channels: int, inner: int, hidden: int, batch: int) -> Case:
    """What follows attention in a layer, fused, which has a forward pass alone."""
    shapes: dict[str, tuple[int, ...]] = {
        "x": (batch, tokens, channels),
        "attended": (batch, tokens, inner),
        "out_weight": (channels, inner),
        "out_bias": (channels,),
        "weight": (channels,),
        "bias": (channels,),
        "up_weight": (2 * hidden, channels),
        "up_bias": (2 * hidden,),
        "down_weight": (channels, hidden),
        "down_bias": (channels,),
    }

    def run(**tensors: Tensor) -> Tensor:
        for name in ("out_weight", "up_weight", "down_weight"):
            scale = 2.0 ** -(tensors[name].shape[1].bit_length() // 2)  # as above
            tensors[name] = tensors[name] * scale
        return ops.feed_forward_block(*tensors.values())

    return Case("feed_forward_block", shapes, run)


def space_attention_heads(lattice: tuple[int, int, int], channels: int, heads: int, width: int, batch: int) -> Case:
    """Norm and heads of space attention, fused, which have a forward pass alone."""
    sites, inner = lattice[1] * lattice[2], heads * width
    shapes: dict[str, tuple[int, ...]] = {
        "x": (batch, prod(lattice), channels),
        "weight": (channels,),
        "bias": (channels,),
        "qkv_weight": (3 * inner, channels),
    }

    def run(x: Tensor, weight: Tensor, bias: Tensor, qkv_weight: Tensor) -> Tensor:
        scale = 2.0 ** -(channels.bit_length() // 2)  # as above
        tables = (t.to(x.device) for t in rotation(sites, width))
        return ops.space_attention_heads(x, weight, bias, qkv_weight * scale, *tables, sites=sites, heads=heads)

    return Case("space_attention_heads", shapes, run)


def time_attention_block(lattice: tuple[int, int, int], channels: int, heads: int, width: int, batch: int) -> Case:
    """Time attention with its norm and residual, fused, which has a forward pass alone."""
    (time, *_), inner = lattice, heads * width
    shapes: dict[str, tuple[int, ...]] = {
        "x": (batch, prod(lattice), channels),
        "weight": (channels,),
        "bias": (channels,),
        "qkv_weight": (3 * inner, channels),
        "out_weight": (channels, inner),
        "out_bias": (channels,),
    }

    def run(**tensors: Tensor) -> Tensor:
        for name in ("qkv_weight", "out_weight"):
            scale = 2.0 ** -(tensors[name].shape[1].bit_length() // 2)  # as above
            tensors[name] = tensors[name] * scale
        tables = (t.to(tensors["x"].device) for t in rotation(time, width))
        return ops.time_attention_block(*tensors.values(), *tables, time=time, heads=heads)

    return Case("time_attention_block", shapes, run)


def _norm(layout: PlaneLayout, channels: int, resample: str | None = None) -> Case:
    return plane_norm(
        layout, channels, groups=_GROUPS, modulated=resample is None, activation=True, resample=resample, batch=1
    )


FULL = {
    **{
        f"segment_attention-joint-{layout.num_tokens}": segment_attention(
            [0, layout.num_tokens], _HEADS, channels // _HEADS, batch=1
        )
        for layout, channels in _LEVELS
    },
    "segment_attention-planes": segment_attention(_FINEST.offsets, _HEADS, 32, batch=1),
    "segment_attention-long": segment_attention([0, _LONG.num_tokens], 2, 32, batch=1),
    "axial_attention-time": axial_attention("time", _LATTICE, _HEADS, 64, batch=1, tables=rotation(16, 64)),
    "axial_attention-space": axial_attention("space", _LATTICE, _HEADS, 64, batch=1, tables=rotation(_SITES, 64)),
    "axial_attention-query": single_query((33, 16, 32), 4, 48, batch=1),
    **{f"plane_norm-{layout.num_tokens}": _norm(layout, channels) for layout, channels in _LEVELS},
    "plane_norm-wide": _norm(_COARSEST, 2048),  # a level's own channels and those of its skip
    "plane_norm-long": _norm(_LONG, 256),
    "plane_norm-joint": plane_norm(PlaneLayout(((_FINEST.num_tokens, 1),)), 256, groups=_GROUPS, batch=1),
    "plane_norm-down": _norm(_FINEST, 256, "down"),
    "plane_norm-up": _norm(_COARSEST, 1024, "up"),
    "plane_resample-down": plane_resample(_FINEST, 256, "down", batch=1),
    "plane_resample-up": plane_resample(_COARSEST, 1024, "up", batch=1),
    **{
        f"plane_conv-{layout.num_tokens}": plane_conv(layout, channels, channels, batch=1)
        for layout, channels in _LEVELS
    },
    "plane_conv-wide": plane_conv(_COARSEST, 2048, 1024, batch=1),
    "plane_conv-long": plane_conv(_LONG, 256, 256, batch=1),
    "plane_conv-first": plane_conv(_FINEST, 8, 256, batch=1),
    "plane_conv-last": plane_conv(_FINEST, 256, 4, batch=1),
    **{f"triplane_slice-{plane}": triplane_slice(_VIDEO, plane, _WIDTH, batch=1) for plane in PLANE_NAMES},
    "triplane_expand": triplane_expand(_VIDEO, 4, _WIDTH, batch=1),
    **{
        f"triplane_project-{plane}": Projection(_LATTICE, plane, _WIDTH, 4, 48, hidden=512, depth=4, latent=4).case
        for plane in PLANE_NAMES[:2]  # the last has the second's sequences
    },
    "geglu": geglu((1, _VIDEO.num_lattice_tokens), 4 * _WIDTH),
    "add_layer_norm": add_layer_norm((1, _VIDEO.num_lattice_tokens), _WIDTH),
    "attention_block-2048": attention_block(_joint(2048), 256, 1),
    "attention_block-planes": attention_block(_FINEST, 256, 1),
    "attention_block-128": attention_block(_joint(128), 1024, 1),
    "attention_block-32": attention_block(_joint(32), 1024, 2),
    "feed_forward_block": feed_forward_block(_VIDEO.num_lattice_tokens, _WIDTH, 64 * _HEADS, 4 * _WIDTH, 1),
    "space_attention_heads": space_attention_heads(_LATTICE, _WIDTH, _HEADS, 64, 1),
    "time_attention_block": time_attention_block(_LATTICE, _WIDTH, _HEADS, 64, 1),
}
# For the fused operations, which the other tables don't hold: sizes that no block divides.
FUSED = {
    "attention_block-odd": attention_block(_joint(35), 96, 2, heads=3),
    "attention_block-one": attention_block(_joint(1), 96, 1, heads=3),
    "attention_block-planes": attention_block(TriplaneLayout(3, 5, 7), 96, 2, heads=3),
    "feed_forward_block-odd": feed_forward_block(35, 40, 24, 150, 2),
    "feed_forward_block-one": feed_forward_block(1, 24, 8, 17, 1),
    "space_attention_heads-odd": space_attention_heads((2, 9, 15), 40, 3, 12, 2),
    "space_attention_heads-one": space_attention_heads((1, 1, 1), 24, 1, 8, 1),
    "time_attention_block-odd": time_attention_block((9, 5, 7), 40, 3, 12, 2),
    "time_attention_block-one": time_attention_block((1, 1, 1), 24, 1, 8, 1),
}
