"""Every module of both networks counts: hook, replace, parametrize or adapt it, and the results change."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from comparison import assert_close
from filling import randomised
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._pytree import tree_map_only

from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.nn import recomputed
from pvdm_fast.nn.linear import Linear
from pvdm_fast.nn.plain import is_plain, weight_of, weights_of
from pvdm_fast.nn.planes import PlaneConv, PlaneNorm

SIZES: dict[str, Any] = dict(frames=2, height=8, width=12, patch_size=4, channels=32, depth=1, num_heads=2, head_dim=8)


@functools.cache
def built(name: str) -> nn.Module:
    """A small network with every kind of module, and no zeros."""
    torch.manual_seed(0)
    if name == "autoencoder":
        model: Any = Autoencoder(**SIZES, projection_depth=2, projection_hidden=48)
    else:
        model = Denoiser(
            time=2, height=4, width=4, model_channels=32, channel_mult=[1, 2], num_res_blocks=1,
            attention_resolutions=[1], num_heads=2, positions=True, prediction="v", num_classes=2,
        )  # fmt: skip
    return randomised(model).eval()


def make(name: str) -> Any:
    return copy.deepcopy(built(name))


def run(model: Any, call: Callable[..., Any] | None = None) -> Tensor:
    call = model if call is None else call
    generator, dtype = torch.Generator().manual_seed(1), model.dtype
    if isinstance(model, Autoencoder):
        return call((torch.rand(1, 3, 2, 8, 12, generator=generator) * 2 - 1).to(dtype)).sample
    latent = torch.randn(1, 4, model.layout.num_tokens, generator=generator).to(dtype)
    return call(latent, torch.tensor([500])).sample


def gradients(model: nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(run(model).square().sum(), list(model.parameters()), allow_unused=True))


def callable_modules(model: nn.Module) -> list[str]:
    """All except the model itself, containers and tables of constants. PyTorch doesn't call those either."""
    modules = model.named_modules()
    return [name for name, m in modules if name and type(m).forward is not nn.Module.forward]


NETWORKS = pytest.mark.parametrize("network", ["autoencoder", "denoiser"])
# The three projections to planes are alike, so one of them stands for all.
EVERY = pytest.mark.parametrize(
    ("network", "name"),
    [
        (network, name)
        for network in ("autoencoder", "denoiser")
        for name in callable_modules(built(network))
        if not name.startswith(("yt_quant_attn", "xt_quant_attn"))
    ],
)


def doubled(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: 2 * t + 0.1, value)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent)._modules[last] = module


def expect_change(model: nn.Module, before: Tensor) -> None:
    with torch.no_grad():
        after = run(model)
    assert torch.isfinite(after).all() and not torch.equal(after, before)


@pytest.fixture(scope="module")
def outputs() -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: run(built(name)) for name in ("autoencoder", "denoiser")}


@pytest.fixture(scope="module")
def gradient_of() -> dict[str, list[Tensor | None]]:
    return {name: gradients(built(name)) for name in ("autoencoder", "denoiser")}


def differ(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return any(
        (x is None) != (y is None) or (x is not None and not torch.equal(x, y)) for x, y in zip(a, b, strict=True)
    )  # type: ignore[arg-type]


@pytest.mark.slow
@EVERY
def test_a_forward_hook(
    network: str, name: str, outputs: dict[str, Tensor], gradient_of: dict[str, list[Tensor | None]]
) -> None:
    model = make(network)
    handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, output: doubled(output))
    expect_change(model, outputs[network])
    assert differ(gradients(model), gradient_of[network])
    handle.remove()
    with torch.no_grad():
        assert torch.equal(run(model), outputs[network]), "without the hook it computes as before"


@pytest.mark.slow
@EVERY
def test_a_forward_pre_hook(network: str, name: str, outputs: dict[str, Tensor]) -> None:
    """Each hook gets tensors, and the module sees what the hook makes of them. (A norm doesn't see a factor, but
    it sees a slope.)"""
    model = make(network)

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        called.append(isinstance(inputs[0], Tensor) if inputs else True)
        return tuple(x * (1 + torch.linspace(0, 1, x.shape[-1])) if isinstance(x, Tensor) and x.is_floating_point()
                     else x for x in inputs)  # fmt: skip

    called: list[bool] = []
    module = model.get_submodule(name)
    module.register_forward_pre_hook(hook)
    with torch.no_grad():
        after = run(model)
    assert called and all(called)
    takes_numbers = not isinstance(module, nn.Embedding) and type(module).__name__ != "PlanePositions"
    assert takes_numbers is not torch.equal(after, outputs[network])


@pytest.mark.slow
@EVERY
def test_a_backward_hook(network: str, name: str, gradient_of: dict[str, list[Tensor | None]]) -> None:
    """Every module's full backward hook gets the gradients, and its answer is used."""
    model, called = make(network), []

    def hook(module: nn.Module, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        called.append(1)
        return tuple(None if g is None else 2 * g for g in grads)

    model.get_submodule(name).register_full_backward_pre_hook(hook)
    after = gradients(model)
    assert called and differ(after, gradient_of[network])


@EVERY
def test_a_subclass_in_its_place(network: str, name: str, outputs: dict[str, Tensor]) -> None:
    model = make(network)
    module = model.get_submodule(name)
    kind: Any = type(module)
    module.__class__ = type(
        "Doubling", (kind,), {"forward": lambda self, *a, **k: doubled(kind.forward(self, *a, **k))}
    )
    expect_change(model, outputs[network])


@NETWORKS
def test_a_forward_of_its_own(network: str, outputs: dict[str, Tensor]) -> None:
    """As accelerate's and diffusers' hooks set one."""
    model = make(network)
    for name in callable_modules(model):
        module = model.get_submodule(name)
        forward = module.forward
        module.forward = lambda *a, _forward=forward, **k: doubled(_forward(*a, **k))  # type: ignore[method-assign]
        expect_change(model, outputs[network])
        del module.forward


class Wrapper(nn.Module):
    """What adapters and quantisation put in a layer's place: a module of another class, called with only the
    input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x) + 0.1


class Same(Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding, nn.SiLU)


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, m) for name, m in list(model.named_modules()) if isinstance(m, LAYERS) or type(m) is nn.Identity)


@pytest.mark.slow
@NETWORKS
def test_a_wrapper_in_place_of_each_layer(network: str) -> None:
    """The inner layer is called as PyTorch calls it (with images for convolutions), and gives the same values."""
    model = make(network).double()
    expected = run(model).detach()
    for name, layer in layers(model):
        replace(model, name, Wrapper(layer))
        expect_change(model, expected)
        replace(model, name, Same(layer))
        with torch.no_grad():
            assert_close(run(model), expected, 1e-6, name)  # the norms' statistics are float32
        replace(model, name, layer)


@NETWORKS
def test_hooks_of_all_modules(network: str) -> None:
    """A global hook sees every module."""
    model, seen = make(network), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, i, o: seen.add(id(module)))
    try:
        run(model)
    finally:
        handle.remove()
    missed = [name for name in callable_modules(model) if id(model.get_submodule(name)) not in seen]
    assert not missed


@NETWORKS
@pytest.mark.parametrize("pieces", [False, True])
def test_called_layers_compute_the_same(network: str, pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hook that does nothing on everything: the same values and gradients, with and without checkpointing."""
    model = make(network).double()
    expected, slopes = run(model).detach(), gradients(model)
    for name in callable_modules(model):
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output: None)
    if pieces:
        monkeypatch.setattr(recomputed, "PIECE_ON_CPU", 1024)
    assert_close(run(model), expected, 1e-6)  # the norms' statistics are float32
    for _ in range(2):
        assert_close(flat(gradients(model)), flat(slopes), 1e-5)
        model.enable_gradient_checkpointing()


def flat(gradients: list[Tensor | None]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients if g is not None])


@pytest.mark.slow
@NETWORKS
def test_parametrized_and_normed_weights(network: str, outputs: dict[str, Tensor]) -> None:
    """Parametrizations, weight norm, the old weight norm, and pruning, each on every layer with such a weight."""
    changes: dict[str, Callable[[nn.Module], Any]] = {
        "parametrization": lambda m: parametrize.register_parametrization(m, "weight", Twice()),
        "spectral norm": lambda m: parametrizations.spectral_norm(m),
        "pruning": lambda m: prune.random_unstructured(m, "weight", 0.5),
    }
    for what, change in changes.items():
        for name, layer in layers(built(network)):
            if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)):
                continue
            model = make(network)
            change(model.get_submodule(name))
            try:
                expect_change(model, outputs[network])
            except AssertionError as error:
                raise AssertionError(f"{what} of {name}") from error


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.slow
@NETWORKS
def test_layers_built_otherwise(network: str, outputs: dict[str, Tensor]) -> None:
    """PyTorch's own layers with other options: with or without a bias, and with other padding than zeros."""
    for name, layer in layers(built(network)):
        model = make(network)
        if isinstance(layer, nn.Linear):
            bias = layer.bias is None
            replace(model, name, type(layer)(layer.in_features, layer.out_features, bias=bias))
        elif isinstance(layer, PlaneConv):
            model.get_submodule(name).padding_mode = "circular"
            model.get_submodule(name)._reversed_padding_repeated_twice = [1, 1, 1, 1]
        elif isinstance(layer, nn.Conv2d):
            replace(model, name, nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1))
        else:
            continue
        expect_change(model, outputs[network])


@NETWORKS
def test_quantised_layers(network: str, outputs: dict[str, Tensor]) -> None:
    """PyTorch's dynamic int8 replaces every nn.Linear. The output stays close."""
    model = make(network)
    kinds = {nn.Linear: torch.ao.quantization.default_dynamic_qconfig}
    for name, layer in layers(model):
        if isinstance(layer, nn.Linear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.load_state_dict(layer.state_dict())
            replace(model, name, plain)
    with torch.no_grad():
        assert_close(run(model), outputs[network], 1e-5)
    model = torch.ao.quantization.quantize_dynamic(model, kinds)
    kind = "Linear"
    assert all(type(m).__module__.startswith("torch.ao") for _, m in model.named_modules() if type(m).__name__ == kind)
    with torch.no_grad():
        after = run(model)
    assert not torch.equal(after, outputs[network])
    assert_close(after, outputs[network], 0.1)  # 8 bits


@NETWORKS
def test_offloaded_by_accelerate_and_cast_by_diffusers(network: str, outputs: dict[str, Tensor]) -> None:
    """Weights that are on the meta device between calls, and weights that are stored in 8 bits and cast at each
    call."""
    from accelerate import cpu_offload

    model = make(network)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in model.parameters())
    with torch.no_grad():
        assert_close(run(model), outputs[network], 1e-5)
    model = make(network)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    low = [p for p in model.parameters() if p.dtype == torch.bfloat16]
    assert len(low) > 20
    with torch.no_grad():
        assert_close(run(model), outputs[network], 3e-2)  # weights rounded to 8 bits


@pytest.mark.slow
@NETWORKS
def test_a_hook_counts_in_compiled_code(network: str) -> None:
    torch._dynamo.reset()
    model = make(network)
    names = [name for name, layer in layers(model) if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear))][::5]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output: 2 * output)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(run(model, compiled), run(model), 1e-5)


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def test_what_is_plain() -> None:
    """The predicate itself, case by case."""
    layer, conv = nn.Conv1d(2, 2, 1), PlaneConv(2, 2)
    assert is_plain(layer, nn.Conv1d) and not is_plain(layer, nn.Conv2d)
    assert not is_plain(conv, nn.Conv2d), "a subclass"
    assert weights_of(layer, nn.Conv1d) == (layer.weight, layer.bias)
    assert weights_of(nn.Conv1d(2, 2, 1, bias=False), nn.Conv1d) is None
    assert weights_of(nn.Conv1d(2, 2, 3), nn.Conv1d, ((1,), (1,), (0,), (1,), 1, "zeros")) is None
    bare = Linear(2, 2, bias=False)
    assert weight_of(bare, Linear) is bare.weight and weight_of(Linear(2, 2), Linear) is None
    with changed(nn.Conv1d, "forward", lambda self, x: x):
        assert not is_plain(layer, nn.Conv1d), "the class's method replaced"
    handle = nn.modules.module.register_module_full_backward_hook(lambda *a: None)
    assert not is_plain(layer, nn.Conv1d), "a hook of all modules"
    handle.remove()
    assert is_plain(layer, nn.Conv1d)
    layer.compile()
    assert not is_plain(layer, nn.Conv1d), "compiled by itself"
    quantised = Linear(2, 2)
    quantised.weight = nn.Parameter(Special(torch.randn(2, 2)))
    assert weights_of(quantised, Linear) is None, "a weight of another class of tensors"
    assert weights_of(PlaneNorm(32), PlaneNorm) is not None


class Special(Tensor):
    """A tensor subclass."""

    @staticmethod
    def __new__(cls, values: Tensor) -> Special:
        return Tensor._make_subclass(cls, values)
