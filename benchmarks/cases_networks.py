"""Cases of blocks and of whole networks. All runners have the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from benchmarks import eager, eager_autoencoder, floors
from benchmarks.eager import Variant
from benchmarks.measure import Pack, Prepared, only
from benchmarks.registry import (
    Network,
    Registry,
    Setting,
    assemble_modules,
    planes_to_tokens,
    tokens_to_planes,
    with_variants,
)
from pvdm_fast.diffusion.guidance import guided_prediction
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.nn import AxialTransformer, PlaneAttention, PlaneProjection, ResidualBlock, TriplaneAttention

REGISTRY = Registry()
Call = Callable[..., Tensor | Sequence[Tensor]]


def _lazy(
    make: Callable[[], nn.Module], call: Call, inputs: Sequence[Tensor], pack: Pack = only
) -> Callable[[], Network]:
    """A network whose module is built on first use, without weights. All networks pack inputs and results alike."""

    def build() -> Network:
        with torch.device("meta"):
            return Network(make(), call, inputs, pack, pack)

    return build


def _block(
    setting: Setting, flops: float, ours: Callable[[], nn.Module], ours_call: Call,
    rival: Callable[[Variant], nn.Module], rival_call: Call, *, sdpa: bool = True,
) -> Prepared:  # fmt: skip
    """A denoiser block: ours on packed tokens, rivals on three planes."""
    layout, channels = setting.layout, setting.denoiser["model_channels"]
    tokens = setting.draw(setting.clips, layout.num_tokens, channels)
    planes = tokens_to_planes(tokens, layout)
    make = with_variants(lambda variant: _lazy(lambda: rival(variant), rival_call, planes, planes_to_tokens))
    if not sdpa:
        del make["sdpa"]
    shape = f"B{setting.clips} N{layout.num_tokens} C{channels}"
    return assemble_modules(setting, shape, {"ours": _lazy(ours, ours_call, [tokens]), **make}, flops)


@REGISTRY.add("block/cross-plane attention", "block")
def cross_plane_attention(setting: Setting) -> Prepared:
    channels, heads = setting.denoiser["model_channels"], setting.denoiser["num_heads"]
    tokens = setting.layout.num_tokens
    return _block(
        setting,
        setting.clips * floors.attention_block(tokens, [tokens], channels),
        lambda: TriplaneAttention(channels, heads),
        lambda module, x: module.forward_tokens(x),
        lambda variant: eager.CrossPlane(channels, heads, variant),
        lambda module, *planes: module.planes(planes),
    )


@REGISTRY.add("block/in-plane attention", "block")
def in_plane_attention(setting: Setting) -> Prepared:
    channels, heads = setting.denoiser["model_channels"], setting.denoiser["num_heads"]
    layout = setting.layout
    segments = [rows * columns for rows, columns in layout.planes]
    return _block(
        setting,
        setting.clips * floors.attention_block(layout.num_tokens, segments, channels),
        lambda: PlaneAttention(channels, heads),
        lambda module, x: module(x, layout),
        lambda variant: eager.Attention(channels, heads, variant),
        lambda module, *planes: [module(plane) for plane in planes],
    )


@REGISTRY.add("block/residual", "block")
def residual(setting: Setting) -> Prepared:
    channels, layout = setting.denoiser["model_channels"], setting.layout
    width = 4 * channels
    embedding = setting.draw(setting.clips, width, seed=9)
    return _block(
        setting,
        setting.clips * floors.residual_block(layout.num_tokens, channels, width, channels),
        lambda: ResidualBlock(channels, width, channels),
        lambda module, x: module(x, embedding.to(x.dtype), layout),
        lambda variant: eager.Residual(channels, width, channels),
        lambda module, *planes: [module(plane, embedding.to(plane.dtype)) for plane in planes],
        sdpa=False,
    )


@REGISTRY.add("block/TimeSformer layer", "block")
def timesformer_layer(setting: Setting) -> Prepared:
    layout, config = setting.lattice, setting.autoencoder
    sizes = (config["channels"], 1, config["num_heads"], config["head_dim"])
    x = setting.draw(setting.clips, layout.num_lattice_tokens, config["channels"])

    def call(module: nn.Module, x: Tensor) -> Tensor:
        return module(x, layout)

    make = with_variants(lambda variant: _lazy(lambda: eager_autoencoder.TimeSformer(*sizes, variant), call, [x]))
    make["ours"] = _lazy(lambda: AxialTransformer(*sizes), call, [x])
    flops = setting.clips * floors.timesformer_layer(layout, sizes[0], sizes[2] * sizes[3])
    shape = f"B{setting.clips} {layout.time}x{layout.height}x{layout.width} C{sizes[0]}"
    return assemble_modules(setting, shape, make, flops)


@REGISTRY.add("block/projection to xy", "block")
def projection(setting: Setting) -> Prepared:
    """From sequences to element 0 of the last layer."""
    layout, channels = setting.lattice, setting.autoencoder["channels"]
    sites, length = layout.height * layout.width, layout.time + 1
    x = setting.draw(setting.clips, sites, length, channels)

    def rival(module: nn.Module, x: Tensor) -> Tensor:
        return module(x.flatten(0, 1))[:, 0].unflatten(0, x.shape[:2])

    make = with_variants(
        lambda variant: _lazy(lambda: eager_autoencoder.Projection(channels, variant=variant), rival, [x])
    )
    make["ours"] = _lazy(lambda: PlaneProjection(channels), lambda module, x: module(x), [x])
    flops = setting.clips * floors.projection(sites, length, channels)
    return assemble_modules(setting, f"B{setting.clips} {sites} sequences of {length}, C{channels}", make, flops)


class _ToPlane(nn.Module):
    """A projection with all that belongs to its plane, for ours and for its rivals."""

    def __init__(self, layout: TriplaneLayout, channels: int, latents: int, projection: nn.Module) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(channels))
        self.positions = nn.Parameter(torch.empty(layout.time + 1, channels))
        self.projection, self.to_latent = projection, nn.Conv2d(channels, latents, 1)


@REGISTRY.add("block/lattice to xy", "block")
def lattice_to_plane(setting: Setting) -> Prepared:
    """From the lattice to a plane's latents, which is one operation where a kernel serves it."""
    layout, channels, latents = setting.lattice, setting.autoencoder["channels"], 4
    sites, length = layout.height * layout.width, layout.time + 1
    x = setting.draw(setting.clips, layout.time * sites, channels)

    def ours(module: Any, x: Tensor) -> Tensor:
        result: Tensor = module.projection.latents(x, layout, "xy", module.token, module.positions, module.to_latent)
        return result

    def rival(module: Any, x: Tensor) -> Tensor:
        rows = module.projection(eager_autoencoder.sequences(x, "xy", layout, module.token, module.positions))
        plane = rows[:, 0].view(x.shape[0], layout.height, layout.width, channels).movedim(3, 1)
        return module.to_latent(plane).tanh().flatten(2).mT

    def module_of(projection: nn.Module) -> nn.Module:
        return _ToPlane(layout, channels, latents, projection)

    make = with_variants(
        lambda variant: _lazy(lambda: module_of(eager_autoencoder.Projection(channels, variant=variant)), rival, [x])
    )
    make["ours"] = _lazy(lambda: module_of(PlaneProjection(channels)), ours, [x])
    flops = floors.projection(sites, length, channels) + floors.linear(sites, channels, latents)
    shape = f"B{setting.clips} {layout.time}x{layout.height}x{layout.width} C{channels}"
    return assemble_modules(setting, shape, make, setting.clips * flops)


def _denoisers(setting: Setting, call: Call, rival_call: Call, inputs: Sequence[Tensor]) -> dict[str, Any]:
    config = setting.denoiser
    make = with_variants(
        lambda variant: _lazy(lambda: eager.EagerDenoiser(**config, variant=variant), rival_call, inputs)
    )
    return {"ours": _lazy(lambda: Denoiser(**config), call, inputs), **make}


def _clip_name(layout: TriplaneLayout, setting: Setting) -> str:
    return f"B{setting.clips} {layout.time}x{layout.height}x{layout.width}"


@REGISTRY.add("denoiser", "network", ("forward", "both"))
def denoiser(setting: Setting) -> Prepared:
    """The predicted noise, with a condition."""
    config, layout = setting.denoiser, setting.layout
    shape = (setting.clips, config["latent_channels"], layout.num_tokens)
    latent, condition = setting.draw(*shape), setting.draw(*shape, seed=1)
    timestep = torch.full((setting.clips,), 500, device=setting.device)
    make = _denoisers(
        setting,
        lambda module, x, c: module(x, timestep, condition=c).sample,
        lambda module, x, c: module(x, timestep, c),
        [latent, condition],
    )
    pack = _stacked
    make = {name: _packed(build, pack) for name, build in make.items()}
    text = f"{_clip_name(layout, setting)} latent, C{config['model_channels']}"
    return assemble_modules(setting, text, make, setting.clips * floors.denoiser(config))


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors))


def _packed(build: Callable[[], Network], pack: Pack) -> Callable[[], Network]:
    """The network, with its inputs' gradients packed by `pack`."""

    def rebuilt() -> Network:
        network = build()
        return Network(network.module, network.call, network.inputs, pack, network.pack_results)

    return rebuilt


@REGISTRY.add("sampler step", "network", ("forward",))
def sampler_step(setting: Setting) -> Prepared:
    """One guided DDIM step: ours in one batched pass, the release's way in two calls."""
    from pvdm_fast.diffusion.schedulers import make_scheduler  # needs diffusers, as no other case does

    config, layout = setting.denoiser, setting.layout
    shape = (setting.clips, config["latent_channels"], layout.num_tokens)
    latent, condition = setting.draw(*shape), setting.draw(*shape, seed=1).tanh()
    noise = setting.draw(*shape, seed=2)
    with unset_fake_temporarily():  # times and noise levels need real numbers, even when only shapes run
        scheduler: Any = make_scheduler("ddim")
        scheduler.set_timesteps(50)
        time = int(scheduler.timesteps[25])
    guidance = 1.0
    timestep = torch.full((setting.clips,), time, device=setting.device)

    def advance(predicted: Tensor, x: Tensor) -> Tensor:
        return scheduler.step(predicted.float(), time, x.float(), variance_noise=noise).prev_sample

    def ours(module: Denoiser, x: Tensor) -> Tensor:
        return advance(guided_prediction(module, x, time, condition.to(x.dtype), guidance), x)

    def rival(module: nn.Module, x: Tensor) -> Tensor:
        with_condition, without = module(x, timestep, condition.to(x.dtype)), module(x, timestep)
        return advance((1 + guidance) * with_condition - guidance * without, x)

    text = f"{_clip_name(layout, setting)} latent, C{config['model_channels']}, guided"
    make = _denoisers(setting, ours, rival, [latent])
    return assemble_modules(setting, text, make, 2 * setting.clips * floors.denoiser(config))


def _autoencoders(setting: Setting, call: Call, rival_call: Call, x: Tensor, flops: float) -> Prepared:
    config = setting.autoencoder
    make = with_variants(
        lambda variant: _lazy(lambda: eager_autoencoder.EagerAutoencoder(**config, variant=variant), rival_call, [x])
    )
    make["ours"] = _lazy(lambda: Autoencoder(**config), call, [x])
    text = f"B{setting.clips} {config['frames']}x{config['height']}x{config['width']} video, C{config['channels']}"
    return assemble_modules(setting, text, make, setting.clips * flops)


def _video(setting: Setting) -> Tensor:
    config = setting.autoencoder
    return setting.draw(setting.clips, 3, config["frames"], config["height"], config["width"]).tanh()


@REGISTRY.add("autoencoder encode", "network", ("forward",))
def encode(setting: Setting) -> Prepared:
    return _autoencoders(
        setting,
        lambda module, video: module.encode(video).latent,
        lambda module, video: module.encode(video),
        _video(setting),
        floors.encoder(setting.autoencoder),
    )


@REGISTRY.add("autoencoder decode", "network", ("forward",))
def decode(setting: Setting) -> Prepared:
    latent = setting.draw(setting.clips, setting.autoencoder["latent_channels"], setting.lattice.num_tokens).tanh()
    return _autoencoders(
        setting,
        lambda module, latent: module.decode(latent).sample,
        lambda module, latent: module.decode(latent),
        latent,
        floors.decoder(setting.autoencoder),
    )


@REGISTRY.add("autoencoder", "network", ("both",))
def autoencoder(setting: Setting) -> Prepared:
    """The pass of a training step: encode, decode, and back."""
    config = setting.autoencoder
    return _autoencoders(
        setting,
        lambda module, video: module(video).sample,
        lambda module, video: module(video),
        _video(setting),
        floors.encoder(config) + floors.decoder(config),
    )
