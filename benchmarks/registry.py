"""What a measured case is: its setting, and how its runners are put together.

A case sets up everything once, for both speed and memory. `benchmarks.cases` lists all cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.eager import RELEASE, SDPA, Variant
from benchmarks.measure import DIRECTIONS, Pack, Prepared, Runner, only
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.models.presets import AUTOENCODER, DENOISER
from pvdm_fast.nn import PlaneConv

# "tiny" is for tests: unequal sizes, two clips, and a bit of everything. "base" is the release's full size.
_TINY_DENOISER = dict(
    time=4, height=8, width=6, model_channels=64, channel_mult=[1, 2], num_res_blocks=1, attention_resolutions=[2],
    num_heads=4,
)  # fmt: skip
_TINY_AUTOENCODER = dict(
    frames=4, height=32, width=24, patch_size=4, channels=64, depth=2, num_heads=4, head_dim=16, projection_depth=2,
    projection_hidden=128,
)  # fmt: skip
SIZES = ("tiny", "small", "base")
OURS_ALONE = ("positions", "prediction")  # of denoisers: the release's has neither, as our small and base
VARIANTS = {"eager": RELEASE, "sdpa": SDPA}


@dataclass(frozen=True)
class Setting:
    """What a case is prepared for.

    size: "tiny", "small" or "base". device: "cpu" or "cuda". compiled: add torch.compile of the eager computation as a
    baseline. shapes_only: draw no numbers (for a FakeTensorMode). overrides: of the models' configs, for scaling.
    values: the dtype in which inputs and weights are exact. The default is the setting's own dtype.
    """

    size: str = "small"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    compiled: bool = False
    shapes_only: bool = False
    batch: int = 0
    denoiser_overrides: tuple[tuple[str, Any], ...] = ()
    autoencoder_overrides: tuple[tuple[str, Any], ...] = ()
    values: torch.dtype | None = None

    @property
    def clips(self) -> int:
        return self.batch or (2 if self.size == "tiny" else 1)

    @property
    def denoiser(self) -> dict[str, Any]:
        """Config of the denoiser."""
        config = _TINY_DENOISER if self.size == "tiny" else DENOISER[self.size]
        config = {name: value for name, value in config.items() if name not in OURS_ALONE}
        return {"latent_channels": 4, **config, **dict(self.denoiser_overrides)}

    @property
    def autoencoder(self) -> dict[str, Any]:
        """Config of the autoencoder."""
        config = _TINY_AUTOENCODER if self.size == "tiny" else AUTOENCODER[self.size]
        return {"latent_channels": 4, **config, **dict(self.autoencoder_overrides)}

    @property
    def layout(self) -> TriplaneLayout:
        """The layout of the denoiser's finest level."""
        return TriplaneLayout(*(self.denoiser[name] for name in ("time", "height", "width")))

    @property
    def lattice(self) -> TriplaneLayout:
        """The autoencoder's lattice."""
        config = self.autoencoder
        p = config["patch_size"]
        return TriplaneLayout(config["frames"], config["height"] // p, config["width"] // p)

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        """Standard normal float32 numbers, or none if only shapes matter."""
        if self.shapes_only:
            return torch.empty(shape, device=self.device)
        generator = torch.Generator().manual_seed(seed)
        return self.rounded(torch.randn(shape, generator=generator)).float().to(self.device)

    def rounded(self, x: Tensor) -> Tensor:
        """x in the dtype in which inputs and weights are exact."""
        return x.to(self.values or self.dtype)


@dataclass(frozen=True)
class Case:
    """name: "<operation or network>/<what of it>". kind: "operation", "block" or "network"."""

    name: str
    kind: str
    prepare: Callable[[Setting], Prepared]
    directions: tuple[str, ...] = DIRECTIONS


@dataclass
class Registry:
    """The cases of one module, by name."""

    cases: dict[str, Case] = field(default_factory=dict)

    def add(
        self, name: str, kind: str, directions: tuple[str, ...] = DIRECTIONS
    ) -> Callable[[Callable[[Setting], Prepared]], Callable[[Setting], Prepared]]:
        """Decorator for a function that sets the case up."""

        def decorate(prepare: Callable[[Setting], Prepared]) -> Callable[[Setting], Prepared]:
            self.cases[name] = Case(name, kind, prepare, directions)
            return prepare

        return decorate


@dataclass(frozen=True)
class Form:
    """A way of computing: function(*inputs, *parameters) -> results, with float32 inputs, and how to compare
    them."""

    function: Callable[..., Tensor | Sequence[Tensor]]
    inputs: Sequence[Tensor]
    pack_inputs: Pack = only
    pack_results: Pack = only


def assemble(
    setting: Setting, shape: str, forms: Mapping[str, Form], parameters: Mapping[str, Tensor], flops: float
) -> Prepared:
    """Runners of operations: all `forms`, including "ours" and "eager", with the same inputs and parameters."""

    def runner(form: Form, dtype: torch.dtype, compiled: bool = False) -> Runner:
        inputs = [setting.rounded(x).to(dtype, copy=True).requires_grad_() for x in form.inputs]
        weights = {name: setting.rounded(p).to(dtype, copy=True).requires_grad_() for name, p in parameters.items()}
        function = torch.compile(form.function) if compiled else form.function
        return Runner(_bound(function, inputs, weights), inputs, weights, form.pack_inputs, form.pack_results)

    runners = {name: runner(form, setting.dtype) for name, form in forms.items()}
    if setting.compiled:
        runners["compiled"] = runner(forms["eager"], setting.dtype, compiled=True)
    if setting.dtype != torch.float32:
        runners["eager fp32"] = runner(forms["eager"], torch.float32)
    return _prepared(setting, shape, runners, flops)


@dataclass(frozen=True)
class Network:
    """A module and how to call it: call(module, *inputs) -> results."""

    module: nn.Module
    call: Callable[..., Tensor | Sequence[Tensor]]
    inputs: Sequence[Tensor]
    pack_inputs: Pack = only
    pack_results: Pack = only


def assemble_modules(setting: Setting, shape: str, make: Mapping[str, Callable[[], Network]], flops: float) -> Prepared:
    """Runners of modules. `make` gives each one, including "ours" and "eager", without weights on the meta device.

    All get the same weights, and those of one dtype share memory. All weights are random, because a zero-initialised
    layer would hide what comes before it.
    """
    networks = {name: make_one() for name, make_one in make.items()}
    state = random_state(networks["ours"].module, setting)
    stored = {name: tensor.to(setting.dtype) for name, tensor in state.items()}

    def runner(network: Network, weights: Mapping[str, Tensor], compiled: bool = False) -> Runner:
        module = network.module
        module.load_state_dict(weights, assign=True)
        for layer in module.modules():
            if isinstance(layer, PlaneConv):
                layer.rearrange()
        module.train()
        parameters: dict[str, Tensor] = dict(sorted(module.named_parameters()))
        dtype = next(iter(parameters.values())).dtype
        inputs = [setting.rounded(x).to(dtype, copy=True).requires_grad_() for x in network.inputs]
        call = torch.compile(network.call) if compiled else network.call
        bound = _bound(lambda *xs: call(module, *xs), inputs, {})
        return Runner(bound, inputs, parameters, network.pack_inputs, network.pack_results)

    runners = {name: runner(network, stored) for name, network in networks.items()}
    if setting.compiled:
        runners["compiled"] = runner(make["eager"](), stored, compiled=True)
    if setting.dtype != torch.float32:
        runners["eager fp32"] = runner(make["eager"](), state)
    if setting.shapes_only and hasattr(networks["ours"].module, "enable_gradient_checkpointing"):
        recomputing = make["ours"]()
        module: Any = recomputing.module
        module.enable_gradient_checkpointing()
        runners["ours, recomputing"] = runner(recomputing, stored)
    return _prepared(setting, shape, runners, flops)


def _bound(
    function: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor], parameters: Mapping[str, Tensor]
) -> Callable[[], Sequence[Tensor]]:
    def run() -> Sequence[Tensor]:
        results = function(*inputs, *parameters.values())
        return [results] if isinstance(results, Tensor) else list(results)

    return run


def _prepared(setting: Setting, shape: str, runners: dict[str, Runner], flops: float) -> Prepared:
    truth = "eager" if setting.dtype == torch.float32 else "eager fp32"
    ours_first = {"ours": runners["ours"], **runners}
    return Prepared(shape, ours_first, flops, setting.dtype, setting.device, truth)


def random_state(module: nn.Module, setting: Setting) -> dict[str, Tensor]:
    """Float32 weights, rounded as the setting says. Layers keep unit variance, norms are around 1, buffers are
    zero."""
    parameters = dict(module.named_parameters())
    state = {}
    for index, (name, tensor) in enumerate(module.state_dict().items()):
        if name not in parameters:
            state[name] = torch.zeros(tensor.shape, device=setting.device)
            continue
        r = setting.draw(*tensor.shape, seed=1000 + index)
        if tensor.dim() >= 2:
            r = r.mul_(0.9 / math.sqrt(r[0].numel()))
        else:
            r = r.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)
        state[name] = setting.rounded(r).float()
    return state


def planes_to_tokens(planes: Sequence[Tensor]) -> Tensor:
    """Pack: (B, C, h, w) each -> (B, N, C)."""
    return torch.cat([plane.flatten(2) for plane in planes], dim=2).transpose(1, 2)


def tokens_to_planes(tokens: Tensor, layout: TriplaneLayout) -> list[Tensor]:
    """(B, N, C) -> (B, C, h, w) each, contiguous."""
    return [plane.permute(0, 3, 1, 2).contiguous() for plane in layout.split(tokens)]


def with_variants(make: Callable[[Variant], Any]) -> dict[str, Any]:
    """make(variant) for "eager" and "sdpa"."""
    return {name: make(variant) for name, variant in VARIANTS.items()}
