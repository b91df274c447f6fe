"""Cases of single operations, at the sizes where the networks spend their time.

Our shapes, calls and FLOPs come from the package's registry (`pvdm_fast.analysis.cases`). Here are the sizes and the
baselines.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import eager, eager_autoencoder
from benchmarks.eager import Variant
from benchmarks.measure import Prepared
from benchmarks.registry import (
    Form,
    Registry,
    Setting,
    assemble,
    planes_to_tokens,
    tokens_to_planes,
    with_variants,
)
from pvdm_fast.analysis import cases
from pvdm_fast.layout import PlaneLayout, TriplaneLayout
from pvdm_fast.nn.axial_transformer import space_rotation, time_rotation
from pvdm_fast.nn.planes import as_kernels_read

REGISTRY = Registry()
GROUPS = 32  # of the release's norms


def _draw(setting: Setting, case: cases.Case) -> dict[str, Tensor]:
    """The case's tensors by name."""
    return case.tensors(lambda index, shape: setting.draw(*shape, seed=index))


def _lattice_name(setting: Setting, layout: TriplaneLayout, channels: int) -> str:
    return f"B{setting.clips} {layout.time}x{layout.height}x{layout.width} C{channels}"


def _segment_attention(setting: Setting, across: bool) -> Prepared:
    """qkv: ours is (B, N, 3, heads, d). Eager has channels first, in one tensor for attention across planes, and
    three inside."""
    layout, heads = setting.layout, setting.denoiser["num_heads"]
    channels = setting.denoiser["model_channels"]
    width = channels // heads
    offsets = [0, layout.num_tokens] if across else layout.offsets
    case = cases.segment_attention(offsets, heads, width, setting.clips)
    packed = _draw(setting, case)["qkv"]
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

    forms = {"ours": Form(case.run, [packed]), **with_variants(form)}
    shape = f"B{setting.clips} N{'+'.join(map(str, lengths))} heads {heads} x {width}"
    return assemble(setting, shape, forms, {}, case.flops)


@REGISTRY.add("segment_attention/across planes", "operation")
def segment_attention_across(setting: Setting) -> Prepared:
    return _segment_attention(setting, across=True)


@REGISTRY.add("segment_attention/inside planes", "operation")
def segment_attention_inside(setting: Setting) -> Prepared:
    return _segment_attention(setting, across=False)


def _axial_attention(setting: Setting, axis: str) -> Prepared:
    layout, config = setting.lattice, setting.autoencoder
    heads, width = config["num_heads"], config["head_dim"]
    lattice = (layout.time, layout.height, layout.width)
    along_time = axis == "time"
    tables = time_rotation(layout.time, width) if along_time else space_rotation(layout.height, layout.width, width)
    sin, cos = (table.to(setting.device) for table in tables)
    case = cases.axial_attention(axis, lattice, heads, width, setting.clips, (sin, cos))
    qkv = _draw(setting, case)["qkv"].flatten(1, 3).flatten(2)

    def ours(x: Tensor) -> Tensor:
        return case.run(x.view(case.shapes["qkv"])).flatten(1, 3).flatten(2)

    def form(variant: Variant) -> Form:
        def function(x: Tensor) -> Tensor:
            rotation = (sin.to(x.dtype), cos.to(x.dtype))
            return eager_autoencoder.axial_attention(x, heads, axis, layout.time, rotation, variant)

        return Form(function, [qkv])

    sites = layout.height * layout.width
    sequences, length = (sites, layout.time) if along_time else (layout.time, sites)
    shape = f"B{setting.clips} {sequences} sequences of {length}, heads {heads} x {width}"
    return assemble(setting, shape, {"ours": Form(ours, [qkv]), **with_variants(form)}, {}, case.flops)


@REGISTRY.add("axial_attention/time", "operation")
def axial_attention_time(setting: Setting) -> Prepared:
    return _axial_attention(setting, "time")


@REGISTRY.add("axial_attention/space", "operation")
def axial_attention_space(setting: Setting) -> Prepared:
    return _axial_attention(setting, "space")


@REGISTRY.add("axial_attention/single query", "operation")
def axial_attention_query(setting: Setting) -> Prepared:
    """The last layer of the projection to the xy plane: one query per sequence."""
    layout, heads = setting.lattice, eager_autoencoder.PROJECTION_HEADS
    width = setting.autoencoder["channels"] // 8
    count, length = setting.clips * layout.height * layout.width, layout.time + 1
    case = cases.single_query((length, 1, 1), heads, width, count)
    drawn = _draw(setting, case)
    query, qkv = drawn["query"].view(count, 1, -1), drawn["qkv"].view(count, length, -1)

    def ours(query: Tensor, qkv: Tensor) -> Tensor:
        return case.run(qkv.view(case.shapes["qkv"]), query.view(case.shapes["query"])).view(count, 1, -1)

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

    shape = f"{count} sequences of {length}, heads {heads} x {width}"
    return assemble(setting, shape, {"ours": Form(ours, [query, qkv], pack), **with_variants(form)}, {}, case.flops)


@REGISTRY.add("axial_attention/projection", "operation")
def axial_attention_projection(setting: Setting) -> Prepared:
    """The sequences of the projection to the xy plane: T + 1 tokens, no rotation, all queries."""
    layout, heads = setting.lattice, eager_autoencoder.PROJECTION_HEADS
    width = setting.autoencoder["channels"] // 8
    count, length = setting.clips * layout.height * layout.width, layout.time + 1
    case = cases.axial_attention("time", (length, 1, 1), heads, width, count)
    qkv = _draw(setting, case)["qkv"].view(count, length, -1)

    def ours(x: Tensor) -> Tensor:
        return case.run(x.view(case.shapes["qkv"])).view(count, length, -1)

    def form(variant: Variant) -> Form:
        return Form(lambda x: eager_autoencoder.sequence_attention(x, variant), [qkv])

    shape = f"{count} sequences of {length}, heads {heads} x {width}"
    return assemble(setting, shape, {"ours": Form(ours, [qkv]), **with_variants(form)}, {}, case.flops)


def _plane_norm(setting: Setting, *, joint: bool, scaled: bool, resample: str | None) -> Prepared:
    layout, channels = setting.layout, setting.denoiser["model_channels"]
    if resample == "up":
        layout = layout.downsample(2)
    segments = PlaneLayout(((layout.num_tokens, 1),)) if joint else layout
    case = cases.plane_norm(
        segments,
        channels,
        groups=GROUPS,
        modulated=scaled,
        activation=not joint,
        resample=resample,
        batch=setting.clips,
    )
    parameters = _draw(setting, case)
    tokens = parameters.pop("x")

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
    forms = {"ours": Form(case.run, [tokens]), "eager": Form(per_plane, planes, planes_to_tokens, planes_to_tokens)}
    return assemble(setting, f"B{setting.clips} N{layout.num_tokens} C{channels}", forms, parameters, 0)


@REGISTRY.add("plane_norm/joint", "operation")
def plane_norm_joint(setting: Setting) -> Prepared:
    """As before cross-plane attention: statistics over all tokens."""
    return _plane_norm(setting, joint=True, scaled=False, resample=None)


@REGISTRY.add("plane_norm/scale, shift, SiLU", "operation")
def plane_norm_film(setting: Setting) -> Prepared:
    """As before a residual block's second convolution."""
    return _plane_norm(setting, joint=False, scaled=True, resample=None)


@REGISTRY.add("plane_norm/SiLU, up", "operation")
def plane_norm_up(setting: Setting) -> Prepared:
    """As at the start of an up-sampling residual block."""
    return _plane_norm(setting, joint=False, scaled=False, resample="up")


@REGISTRY.add("plane_resample/down", "operation")
def plane_resample_down(setting: Setting) -> Prepared:
    """As on the skip of a down-sampling residual block."""
    layout, channels = setting.layout, setting.denoiser["model_channels"]
    case = cases.plane_resample(layout, channels, "down", setting.clips)
    tokens = _draw(setting, case)["x"]
    forms = {
        "ours": Form(case.run, [tokens]),
        "eager": Form(
            lambda *planes: [eager.resample(plane, "down") for plane in planes],
            tokens_to_planes(tokens, layout),
            planes_to_tokens,
            planes_to_tokens,
        ),
    }
    return assemble(setting, f"B{setting.clips} N{layout.num_tokens} C{channels}", forms, {}, 0)


@REGISTRY.add("plane_conv/3x3", "operation")
def plane_conv(setting: Setting) -> Prepared:
    layout, channels = setting.layout, setting.denoiser["model_channels"]
    case = cases.plane_conv(layout, channels, channels, setting.clips)
    parameters = _draw(setting, case)
    tokens, parameters["weight"] = parameters.pop("x"), as_kernels_read(parameters["weight"])

    def per_plane(*arguments: Tensor) -> list[Tensor]:
        *planes, weight, bias = arguments
        return [F.conv2d(plane, weight, bias, padding=1) for plane in planes]

    forms = {
        "ours": Form(case.run, [tokens]),
        "eager": Form(per_plane, tokens_to_planes(tokens, layout), planes_to_tokens, planes_to_tokens),
    }
    return assemble(setting, f"B{setting.clips} N{layout.num_tokens} C{channels}", forms, parameters, case.flops)


@REGISTRY.add("triplane_slice/xt", "operation")
def triplane_slice(setting: Setting) -> Prepared:
    layout, channels = setting.lattice, setting.autoencoder["channels"]
    case = cases.triplane_slice(layout, "xt", channels, setting.clips)
    parameters = _draw(setting, case)
    lattice = parameters.pop("x")
    forms = {
        "ours": Form(case.run, [lattice], pack_results=lambda results: results[0].flatten(0, 1)),
        "eager": Form(
            lambda x, token, positions: eager_autoencoder.sequences(x, "xt", layout, token, positions), [lattice]
        ),
    }
    return assemble(setting, _lattice_name(setting, layout, channels), forms, parameters, 0)


@REGISTRY.add("triplane_expand/lattice", "operation")
def triplane_expand(setting: Setting) -> Prepared:
    layout, config = setting.lattice, setting.autoencoder
    channels, depth = config["channels"], config["latent_channels"]
    case = cases.triplane_expand(layout, depth, channels, setting.clips)
    parameters = _draw(setting, case)
    tokens = parameters.pop("planes")

    def convolve(*arguments: Tensor) -> Tensor:
        *planes, weight, bias = arguments
        mapped = [F.conv2d(plane, w[:, :, None, None], b) for plane, w, b in zip(planes, weight, bias, strict=True)]
        return eager_autoencoder.expand(mapped, layout)

    forms = {
        "ours": Form(case.run, [tokens]),
        "eager": Form(convolve, tokens_to_planes(tokens, layout), planes_to_tokens),
    }
    return assemble(setting, _lattice_name(setting, layout, channels), forms, parameters, case.flops)


@REGISTRY.add("geglu/feed-forward", "operation")
def geglu(setting: Setting) -> Prepared:
    tokens, channels = setting.lattice.num_lattice_tokens, setting.autoencoder["channels"]
    case = cases.geglu((setting.clips, tokens), 4 * channels)
    x = _draw(setting, case)["x"]
    forms = {"ours": Form(case.run, [x]), "eager": Form(eager_autoencoder.geglu, [x])}
    return assemble(setting, f"B{setting.clips} {tokens} x {8 * channels}", forms, {}, 0)


@REGISTRY.add("add_layer_norm/residual", "operation")
def add_layer_norm(setting: Setting) -> Prepared:
    tokens, channels = setting.lattice.num_lattice_tokens, setting.autoencoder["channels"]
    case = cases.add_layer_norm((setting.clips, tokens), channels)
    parameters = _draw(setting, case)
    inputs = [parameters.pop(name) for name in ("x", "residual")]

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        total = residual + x
        return [total, F.layer_norm(total, weight.shape, weight, bias)]

    def join(pair: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(pair), dim=-1)

    forms = {
        "ours": Form(case.run, inputs, join, join),
        "eager": Form(plain, inputs, join, join),
    }
    return assemble(setting, f"B{setting.clips} {tokens} x {channels}", forms, parameters, 0)
