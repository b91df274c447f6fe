"""Cases of single operations, at the sizes where the networks spend their time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import eager, eager_autoencoder, floors
from benchmarks.cases import (
    Form,
    Setting,
    assemble,
    planes_to_tokens,
    register,
    tokens_to_planes,
    with_variants,
)
from benchmarks.eager import Variant
from benchmarks.measure import Prepared
from pvdm_fast import ops
from pvdm_fast.layout import PLANE_NAMES, PlaneLayout
from pvdm_fast.nn.axial_transformer import space_rotation, time_rotation


def _segment_attention(setting: Setting, across: bool) -> Prepared:
    """qkv: ours (B, N, 3, heads, d); eager channels first, one tensor across planes, three inside."""
    layout, heads = setting.layout, setting.denoiser["num_heads"]
    channels = setting.denoiser["model_channels"]
    width = channels // heads
    packed = setting.draw(setting.clips, layout.num_tokens, 3, heads, width)
    offsets = (0, layout.num_tokens) if across else layout.offsets
    lengths = [stop - start for start, stop in pairwise(offsets)]
    channels_first = packed.permute(0, 3, 2, 4, 1).reshape(setting.clips, 3 * channels, -1)

    def unpack(parts: Sequence[Tensor]) -> Tensor:
        joined = torch.cat(list(parts), dim=2)
        return joined.unflatten(1, (heads, -1, width)).permute(0, 4, 2, 1, 3)

    def form(variant: Variant) -> Form:
        return Form(
            lambda *parts: [eager.attend(part, heads, variant) for part in parts],
            [part.contiguous() for part in channels_first.split(lengths, dim=2)],
            unpack,
            lambda parts: unpack(parts).squeeze(2),
        )

    flops = setting.clips * sum(floors.attention(1, n, n, channels) for n in lengths)
    forms = {"ours": Form(lambda qkv: ops.segment_attention(qkv, offsets), [packed]), **with_variants(form)}
    shape = f"B{setting.clips} N{'+'.join(map(str, lengths))} heads {heads} x {width}"
    return assemble(setting, shape, forms, {}, flops)


@register("segment_attention/across planes", "operation")
def segment_attention_across(setting: Setting) -> Prepared:
    return _segment_attention(setting, across=True)


@register("segment_attention/inside planes", "operation")
def segment_attention_inside(setting: Setting) -> Prepared:
    return _segment_attention(setting, across=False)


def _axial_attention(setting: Setting, axis: str) -> Prepared:
    layout, config = setting.lattice, setting.autoencoder
    heads, width = config["num_heads"], config["head_dim"]
    lattice = (layout.time, layout.height, layout.width)
    along_time = axis == "time"
    tables = time_rotation(layout.time, width) if along_time else space_rotation(layout.height, layout.width, width)
    sin, cos = (table.to(setting.device) for table in tables)
    qkv = setting.draw(setting.clips, layout.num_lattice_tokens, 3 * heads * width)

    def ours(x: Tensor) -> Tensor:
        out = ops.axial_attention(x.view(len(x), *lattice, 3, heads, width), axis, (sin, cos))
        return out.flatten(1, 3).flatten(2)

    def form(variant: Variant) -> Form:
        def function(x: Tensor) -> Tensor:
            rotation = (sin.to(x.dtype), cos.to(x.dtype))
            return eager_autoencoder.axial_attention(x, heads, axis, layout.time, rotation, variant)

        return Form(function, [qkv])

    sites = layout.height * layout.width
    sequences, length = (sites, layout.time) if along_time else (layout.time, sites)
    flops = setting.clips * floors.attention(sequences, length, length, heads * width)
    shape = f"B{setting.clips} {sequences} sequences of {length}, heads {heads} x {width}"
    return assemble(setting, shape, {"ours": Form(ours, [qkv]), **with_variants(form)}, {}, flops)


@register("axial_attention/time", "operation")
def axial_attention_time(setting: Setting) -> Prepared:
    return _axial_attention(setting, "time")


@register("axial_attention/space", "operation")
def axial_attention_space(setting: Setting) -> Prepared:
    return _axial_attention(setting, "space")


@register("axial_attention/single query", "operation")
def axial_attention_query(setting: Setting) -> Prepared:
    """The last layer of the projection to the xy plane: one query a sequence."""
    layout, heads = setting.lattice, eager_autoencoder.PROJECTION_HEADS
    width = setting.autoencoder["channels"] // 8
    count, length = setting.clips * layout.height * layout.width, layout.time + 1
    query = setting.draw(count, 1, heads * width, seed=1)
    qkv = setting.draw(count, length, 2 * heads * width)

    def ours(query: Tensor, qkv: Tensor) -> Tensor:
        sequences = qkv.view(count, length, 1, 1, 2, heads, width)
        return ops.axial_attention(sequences, "time", query=query.view(count, 1, 1, 1, heads, width)).view(count, 1, -1)

    def form(variant: Variant) -> Form:
        def function(query: Tensor, qkv: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, *qkv.chunk(2, dim=-1)))
            if variant.sdpa:
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return ((q @ k.mT * width**-0.5).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)

        return Form(function, [query, qkv], pack)

    def pack(tensors: Sequence[Tensor]) -> Tensor:
        query, qkv = tensors
        return torch.cat((query, *qkv.chunk(2, dim=-1)), dim=1)

    flops = floors.attention(count, 1, length, heads * width)
    shape = f"{count} sequences of {length}, heads {heads} x {width}"
    return assemble(setting, shape, {"ours": Form(ours, [query, qkv], pack), **with_variants(form)}, {}, flops)


@register("axial_attention/projection", "operation")
def axial_attention_projection(setting: Setting) -> Prepared:
    """The sequences of the projection to the xy plane: T + 1 long, no rotation, all queries."""
    layout, heads = setting.lattice, eager_autoencoder.PROJECTION_HEADS
    width = setting.autoencoder["channels"] // 8
    count, length = setting.clips * layout.height * layout.width, layout.time + 1
    qkv = setting.draw(count, length, 3 * heads * width)

    def ours(x: Tensor) -> Tensor:
        return ops.axial_attention(x.view(count, length, 1, 1, 3, heads, width), "time").view(count, length, -1)

    def form(variant: Variant) -> Form:
        return Form(lambda x: eager_autoencoder.sequence_attention(x, variant), [qkv])

    flops = floors.attention(count, length, length, heads * width)
    shape = f"{count} sequences of {length}, heads {heads} x {width}"
    return assemble(setting, shape, {"ours": Form(ours, [qkv]), **with_variants(form)}, {}, flops)


def _plane_norm(setting: Setting, *, joint: bool, scaled: bool, resample: str | None) -> Prepared:
    layout, channels = setting.layout, setting.denoiser["model_channels"]
    if resample == "up":
        layout = layout.downsample(2)
    tokens = setting.draw(setting.clips, layout.num_tokens, channels)
    parameters = {"weight": 1 + 0.1 * setting.draw(channels, seed=1), "bias": setting.draw(channels, seed=2)}
    if scaled:
        parameters["scale_shift"] = 0.2 * setting.draw(setting.clips, 2 * channels, seed=3)
    segments = PlaneLayout(((layout.num_tokens, 1),)) if joint else layout

    def ours(x: Tensor, weight: Tensor, bias: Tensor, scale_shift: Tensor | None = None) -> Tensor:
        return ops.plane_norm(
            x, segments, weight, bias, scale_shift=scale_shift, activation=not joint, resample=resample
        )

    def one(x: Tensor, weight: Tensor, bias: Tensor, scale_shift: Tensor | None) -> Tensor:
        h = eager.group_norm(x, weight, bias)
        if scale_shift is not None:
            scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return h if joint else eager.resample(F.silu(h), resample)

    def per_plane(*arguments: Tensor) -> list[Tensor]:
        count = 1 if joint else 3
        weight, bias, *rest = arguments[count:]
        return [one(plane, weight, bias, rest[0] if rest else None) for plane in arguments[:count]]

    planes = [tokens.transpose(1, 2).contiguous()] if joint else tokens_to_planes(tokens, layout)
    forms = {"ours": Form(ours, [tokens]), "eager": Form(per_plane, planes, planes_to_tokens, planes_to_tokens)}
    return assemble(setting, f"B{setting.clips} N{layout.num_tokens} C{channels}", forms, parameters, 0)


@register("plane_norm/joint", "operation")
def plane_norm_joint(setting: Setting) -> Prepared:
    """As before cross-plane attention: statistics over all tokens."""
    return _plane_norm(setting, joint=True, scaled=False, resample=None)


@register("plane_norm/scale, shift, SiLU", "operation")
def plane_norm_film(setting: Setting) -> Prepared:
    """As before a residual block's second convolution."""
    return _plane_norm(setting, joint=False, scaled=True, resample=None)


@register("plane_norm/SiLU, up", "operation")
def plane_norm_up(setting: Setting) -> Prepared:
    """As at the start of an up-sampling residual block."""
    return _plane_norm(setting, joint=False, scaled=False, resample="up")


@register("plane_conv/3x3", "operation")
def plane_conv(setting: Setting) -> Prepared:
    layout, channels = setting.layout, setting.denoiser["model_channels"]
    tokens = setting.draw(setting.clips, layout.num_tokens, channels)
    weight = setting.draw(channels, channels, 3, 3, seed=1) / (9 * channels) ** 0.5
    parameters = {"weight": weight, "bias": setting.draw(channels, seed=2)}

    def per_plane(*arguments: Tensor) -> list[Tensor]:
        *planes, weight, bias = arguments
        return [F.conv2d(plane, weight, bias, padding=1) for plane in planes]

    forms = {
        "ours": Form(lambda x, weight, bias: ops.plane_conv(x, layout, weight, bias), [tokens]),
        "eager": Form(per_plane, tokens_to_planes(tokens, layout), planes_to_tokens, planes_to_tokens),
    }
    flops = setting.clips * floors.conv(layout.num_tokens, channels, channels)
    return assemble(setting, f"B{setting.clips} N{layout.num_tokens} C{channels}", forms, parameters, flops)


@register("triplane_slice/xt", "operation")
def triplane_slice(setting: Setting) -> Prepared:
    layout, channels = setting.lattice, setting.autoencoder["channels"]
    lattice = setting.draw(setting.clips, layout.num_lattice_tokens, channels)
    parameters = {
        "token": setting.draw(channels, seed=1),
        "positions": setting.draw(layout.width + 1, channels, seed=2),
    }
    forms = {
        "ours": Form(
            lambda x, token, positions: ops.triplane_slice(x, layout, "xt", token, positions),
            [lattice],
            pack_results=lambda results: results[0].flatten(0, 1),
        ),
        "eager": Form(
            lambda x, token, positions: eager_autoencoder.sequences(x, "xt", layout, token, positions), [lattice]
        ),
    }
    shape = f"B{setting.clips} {layout.time}x{layout.height}x{layout.width} C{channels}"
    return assemble(setting, shape, forms, parameters, 0)


@register("triplane_expand/lattice", "operation")
def triplane_expand(setting: Setting) -> Prepared:
    layout, config = setting.lattice, setting.autoencoder
    channels, depth = config["channels"], config["latent_channels"]
    tokens = setting.draw(setting.clips, layout.num_tokens, depth)
    parameters = {
        "weight": setting.draw(len(PLANE_NAMES), channels, depth, seed=1),
        "bias": setting.draw(len(PLANE_NAMES), channels, seed=2),
    }

    def convolve(*arguments: Tensor) -> Tensor:
        *planes, weight, bias = arguments
        mapped = [F.conv2d(plane, w[:, :, None, None], b) for plane, w, b in zip(planes, weight, bias, strict=True)]
        return eager_autoencoder.expand(mapped, layout)

    forms = {
        "ours": Form(lambda x, weight, bias: ops.triplane_expand(x, layout, weight, bias), [tokens]),
        "eager": Form(convolve, tokens_to_planes(tokens, layout), planes_to_tokens),
    }
    flops = setting.clips * floors.linear(layout.num_tokens, depth, channels)
    shape = f"B{setting.clips} {layout.time}x{layout.height}x{layout.width} C{channels}"
    return assemble(setting, shape, forms, parameters, flops)


@register("geglu/feed-forward", "operation")
def geglu(setting: Setting) -> Prepared:
    tokens, channels = setting.lattice.num_lattice_tokens, setting.autoencoder["channels"]
    x = setting.draw(setting.clips, tokens, 8 * channels)
    forms = {"ours": Form(ops.geglu, [x]), "eager": Form(eager_autoencoder.geglu, [x])}
    return assemble(setting, f"B{setting.clips} {tokens} x {8 * channels}", forms, {}, 0)


@register("add_layer_norm/residual", "operation")
def add_layer_norm(setting: Setting) -> Prepared:
    tokens, channels = setting.lattice.num_lattice_tokens, setting.autoencoder["channels"]
    inputs = [setting.draw(setting.clips, tokens, channels, seed=seed) for seed in range(2)]
    parameters = {"weight": 1 + 0.1 * setting.draw(channels, seed=2), "bias": setting.draw(channels, seed=3)}

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        total = residual + x
        return [total, F.layer_norm(total, weight.shape, weight, bias)]

    def join(pair: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(pair), dim=-1)

    forms = {
        "ours": Form(lambda *arguments: ops.add_layer_norm(*arguments), inputs, join, join),
        "eager": Form(plain, inputs, join, join),
    }
    return assemble(setting, f"B{setting.clips} {tokens} x {channels}", forms, parameters, 0)
