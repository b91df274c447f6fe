"""Weights under autocast: cast once a pass for a whole network, with the same values and gradients as single casts."""

from __future__ import annotations

import copy
import io
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_close
from filling import randomised
from models.test_models import AE, UNET
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from pvdm_fast import ops
from pvdm_fast.analysis.recorder import Recorder, name_of
from pvdm_fast.diffusion.sampling import NoiseSource, sample_latents
from pvdm_fast.diffusion.schedulers import make_scheduler
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.nn import casting, copies, recomputed

NETWORKS = pytest.mark.parametrize("network", ["autoencoder", "denoiser"])
# Where attention runs fused for sampling, and where class embeddings and positions take part.
MORE: dict[str, Any] = UNET | dict(positions=True, prediction="v", num_classes=2)
MULTIPLY = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


def make(network: str) -> Any:
    torch.manual_seed(0)
    return randomised(Autoencoder(**AE) if network == "autoencoder" else Denoiser(**MORE))


def run(model: nn.Module, network: str, call: Callable[..., Any] | None = None) -> Tensor:
    call = model if call is None else call
    generator = torch.Generator().manual_seed(1)
    if network == "autoencoder":
        return call(torch.rand(2, 3, 3, 20, 28, generator=generator) * 2 - 1).sample
    return call(torch.randn(2, 4, 44, generator=generator), torch.tensor([7, 900])).sample


def step(model: nn.Module, network: str, call: Callable[..., Any] | None = None) -> Tensor:
    """One training step without its optimizer: the output; gradients are added to the parameters'."""
    with torch.autocast("cpu", torch.bfloat16):
        sample = run(model, network, call)
    sample.float().square().mean().backward()
    return sample.detach()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def one_by_one(modules: Any, device: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """In place of `casting.run`: each layer casts its own weights, as it did before."""
    return function(*arguments)


@pytest.fixture
def expected(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], tuple[Tensor, dict[str, Tensor | None]]]:
    """The output and gradients of a copy of a model that casts weight by weight."""

    def compute(model: Any, network: str) -> tuple[Tensor, dict[str, Tensor | None]]:
        with monkeypatch.context() as patch:
            patch.setattr(casting, "run", one_by_one)
            other = copy.deepcopy(model)
            return step(other, network), gradients(other)

    return compute


def assert_equal(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        other = expected[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            assert gradient.dtype == torch.float32, name
            assert_close(gradient, other, 1e-6, name)


class Casts(Recorder):
    """Counts casts of weights by the operation, by identity of memory; and of gradients, by shape, to float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.memory = {p.untyped_storage()._cdata: name for name, p in model.named_parameters()}
        self.shapes = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
        self.single: list[str] = []
        self.together: Counter[str] = Counter()

    def note(self, function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        name = name_of(function)
        if name == "_foreach_copy_":
            self.together[f"{arguments[1][0].dtype} to {arguments[0][0].dtype}"] += 1
        elif name in ("_to_copy", "copy_") and isinstance(arguments[0], Tensor):
            source, made = arguments[name == "copy_"], result
            if source.dtype == made.dtype:
                return
            if weight := self.memory.get(source.untyped_storage()._cdata):
                self.single.append(weight)
            elif made.dtype == torch.float32 and tuple(source.shape) in self.shapes:
                self.single.append(f"gradient {tuple(source.shape)}")


@NETWORKS
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("pieces", [False, True])
def test_no_cast_of_a_weight_inside_a_block(
    network: str, checkpointed: bool, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward and recomputation: one operation casts the weights (of encoder and decoder each), one their
    gradients, and nothing else casts either. (Where steps run in pieces, gradients are summed in float32.)"""
    if pieces:
        monkeypatch.setattr(recomputed, "PIECE_ON_CPU", 1 << 12)
    model = make(network)
    if checkpointed:
        model.enable_gradient_checkpointing()
    with Casts(model) as casts:
        step(model, network)
    assert not [name for name in casts.single if not pieces or not name.startswith("gradient")]
    calls = 2 if network == "autoencoder" else 1
    assert casts.together == {"torch.float32 to torch.bfloat16": calls, "torch.bfloat16 to torch.float32": calls}


@NETWORKS
def test_the_count_sees_single_casts(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(casting, "run", one_by_one)
    monkeypatch.setattr(ops, "fuses_projection", lambda *arguments: False)  # it casts stacked weights, not each
    model = make(network)
    with Casts(model) as casts:
        step(model, network)
    weights = sum(len(list(m.parameters(recurse=False))) for m in model.modules() if isinstance(m, MULTIPLY))
    assert len({name for name in casts.single if not name.startswith("gradient")}) >= 0.9 * weights
    assert any(name.startswith("gradient") for name in casts.single) and not casts.together


@NETWORKS
def test_16_bit_weights_are_never_cast(network: str) -> None:
    model = make(network).bfloat16().eval()
    with Casts(model) as casts, torch.no_grad():
        run(model, network, lambda x, *rest: model(x.bfloat16(), *rest))
    assert not casts.single and not casts.together


@NETWORKS
@pytest.mark.parametrize("checkpointed", [False, True])
def test_values_and_gradients(network: str, checkpointed: bool, expected: Any) -> None:
    model = make(network)
    output, slopes = expected(model, network)
    if checkpointed:
        model.enable_gradient_checkpointing()
    assert torch.equal(step(model, network), output)
    assert_equal(gradients(model), slopes)
    step(model, network)  # accumulated
    assert_equal(gradients(model), {name: None if g is None else 2 * g for name, g in slopes.items()})


@NETWORKS
def test_groups_of_gradients(network: str, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small groups give the same as one, and early ones are there before the backward pass is over."""
    model = make(network)
    _, slopes = expected(model, network)
    monkeypatch.setattr(copies, "GROUP", 1)
    arrived: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    step(model, network)
    assert_equal(gradients(model), slopes)
    names = [name for name, m in model.named_modules() if isinstance(m, MULTIPLY)]
    order = [name for name in dict.fromkeys(name.rpartition(".")[0] for name in arrived) if name in names]
    last, first = (
        ("to_pixel.1", "encoder.to_patch_embedding") if network == "autoencoder" else ("out.2", "time_embed.0")
    )
    assert (order[0], order[-1]) == (last, first)


@NETWORKS
def test_frozen_weights_get_no_gradient(network: str, expected: Any) -> None:
    """Where some are trained and some not, nothing is computed for those that aren't."""
    model = make(network)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 == 0)
    kept = [name for name, p in model.named_parameters() if not p.requires_grad]
    _, slopes = expected(model, network)
    step(model, network)
    assert_equal(gradients(model), slopes)
    assert kept and all(gradients(model)[name] is None for name in kept)
    made = copies.make("cpu", torch.bfloat16, list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [(made.of(parameter), parameter) for parameter in model.parameters()]
    assert all(c.dtype == torch.bfloat16 and c.requires_grad == p.requires_grad for c, p in pairs)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@NETWORKS
def test_layers_that_are_not_plain(network: str, expected: Any) -> None:
    """Hooked, parametrized, wrapped: they cast by themselves, and their gradients are right."""
    model = make(network)
    layers = [m for m in model.modules() if isinstance(m, MULTIPLY)]
    for index, layer in enumerate(layers):
        if index % 4 == 1:
            layer.register_forward_hook(lambda module, inputs, output: 0.5 * output)
        elif index % 4 == 2:
            parametrize.register_parametrization(layer, "weight", Twice())
    output, slopes = expected(model, network)
    assert torch.equal(step(model, network), output)
    assert_equal(gradients(model), slopes)


@NETWORKS
def test_functional_call(network: str, expected: Any) -> None:
    """The weights that are given are cast, not the model's; the gradients are theirs."""
    model = make(network)
    output, slopes = expected(model, network)
    given = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    call = lambda *inputs: torch.func.functional_call(model, given, inputs)  # noqa: E731
    assert torch.equal(step(model, network, call), output)
    assert_equal({name: tensor.grad for name, tensor in given.items()}, slopes)
    assert all(p.grad is None for p in model.parameters())


@NETWORKS
def test_differentiable_twice(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def penalty(model: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(model, network).float().square().mean()
        weights = [p for name, p in model.named_parameters() if name.endswith("weight") and p.dim() > 2][:4]
        first = torch.autograd.grad(loss, weights, create_graph=True)
        assert all(slope.requires_grad for slope in first)
        return list(torch.autograd.grad(sum(slope.square().sum() for slope in first), weights))

    model = make(network)
    together = penalty(model)
    monkeypatch.setattr(casting, "run", one_by_one)
    for actual, other in zip(together, penalty(model), strict=True):
        assert_close(actual, other, 2e-2)  # sums of bfloat16 gradients, in another order


@pytest.mark.slow
@NETWORKS
def test_compiles_to_one_graph(network: str, expected: Any) -> None:
    torch._dynamo.reset()
    model = make(network)
    output, _ = expected(model, network)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(step(model, network, compiled), output, 2e-2)  # the compiler rounds at other places
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    torch._dynamo.reset()
    blocks = [m for m in model.modules() if type(m).__name__ in ("ResidualBlock", "PreNorm")]
    blocks[0].compile(fullgraph=True, backend="aot_eager")  # one block alone, inside an eager pass
    assert_close(step(model, network), output, 2e-2)


@NETWORKS
def test_distributed(network: str, expected: Any, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make(network)
        _, slopes = expected(model, network)
        unused = any(p is None for p in slopes.values())
        parallel = DistributedDataParallel(model, find_unused_parameters=unused)
        with parallel.no_sync():
            step(model, network, parallel)
        step(model, network, parallel)
        assert_equal(gradients(model), {name: None if g is None else 2 * g for name, g in slopes.items()})
    finally:
        torch.distributed.destroy_process_group()


@NETWORKS
def test_no_state_is_left(network: str) -> None:
    model = make(network)
    state, attributes = set(model.state_dict()), {name: set(vars(m)) for name, m in model.named_modules()}
    with copies.kept(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run(model, network)
    step(model, network)
    assert set(model.state_dict()) == state
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    torch.save(model.state_dict(), io.BytesIO())
    assert copies._current.get() is None and copies._kept.get() is None


@NETWORKS
def test_copies_are_kept_until_a_weight_changes(network: str) -> None:
    model = make(network).eval()
    weight = next(m for m in model.modules() if isinstance(m, nn.Linear)).weight

    def cast() -> Counter[str]:
        with Casts(model) as casts, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            run(model, network)
        return casts.together

    passes = 2 if network == "autoencoder" else 1
    assert sum(cast().values()) == passes and sum(cast().values()) == passes, "outside of `kept`: each pass"
    with copies.kept():
        assert sum(cast().values()) == passes
        assert not cast()
        with torch.no_grad():
            weight.add_(1)  # by its version
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            changed = run(model, network)
        assert not cast()
        layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
        layer.weight = nn.Parameter(weight.detach().clone())  # by its identity
        assert sum(cast().values()) == 1 and not cast()
        step(model, network)  # with a gradient: not from what is kept
        assert layer.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(model, network), changed)


def test_sampling_casts_once() -> None:
    model = randomised(Denoiser(**UNET)).eval()
    with Casts(model) as casts, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        sample_latents(model, make_scheduler("ddim"), (1, 4, 44), steps=4, noise=NoiseSource(0))
    assert sum(casts.together.values()) == 1 and not casts.single
    with torch.no_grad():
        for parameter in model.parameters():  # as averaged weights are put in place: nothing counts that
            parameter.data.mul_(1.5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        arguments = model, make_scheduler("ddim"), (1, 4, 44)
        again = sample_latents(*arguments, steps=4, noise=NoiseSource(0))
        fresh = sample_latents(copy.deepcopy(model), *arguments[1:], steps=4, noise=NoiseSource(0))
    assert torch.equal(again, fresh)


def test_inference_mode() -> None:
    model = randomised(Denoiser(**UNET)).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = run(model, "denoiser")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), copies.kept():
        assert torch.equal(run(model, "denoiser"), expected)
        made = copy.deepcopy(model)  # its weights have no version
        assert torch.equal(run(made, "denoiser"), expected)


class WithoutAutocast(nn.Module):
    """Keeps a block in float32, whatever is around it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.block(x.float(), *rest)


def test_a_block_that_turns_autocast_off() -> None:
    model = randomised(Denoiser(**UNET))
    model.mid_attn = WithoutAutocast(model.mid_attn)
    with Casts(model) as casts:
        step(model, "denoiser")
    assert not casts.single
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.mid_attn.parameters())


def test_threads_do_not_see_each_others_copies() -> None:
    model = randomised(Denoiser(**UNET)).eval()
    with torch.no_grad():
        exact = run(model, "denoiser")
    inside, leave, outputs = threading.Event(), threading.Event(), []

    def wait(*_: Any) -> None:
        inside.set()
        leave.wait(60)

    handle = model.mid_attn.register_forward_hook(wait)

    def autocasting() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs.append(run(model, "denoiser"))

    thread = threading.Thread(target=autocasting)
    thread.start()
    assert inside.wait(60)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(run(model, "denoiser"), exact)
    leave.set()
    thread.join()
    assert not torch.equal(outputs[0], exact)


@NETWORKS
def test_without_autocast_nothing_is_copied(network: str) -> None:
    model = make(network)
    with Casts(model) as casts:
        run(model, network).square().mean().backward()
    assert not casts.together and not casts.single


def test_half_a_network_under_autocast() -> None:
    """Nested regions: off outside, on inside, and the other way round."""
    model = make("autoencoder").eval()
    video = torch.rand(1, 3, 3, 20, 28) * 2 - 1
    for outer, inner in ((False, True), (True, False)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if outer else nullcontext():
            latent = model.encode(video).latent
            with torch.autocast("cpu", torch.bfloat16, enabled=inner):
                sample = model.decode(latent.float()).sample
        assert torch.isfinite(sample).all() and latent.dtype == (torch.bfloat16 if outer else torch.float32)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert copies._current.get() is None and copies._kept.get() is None
