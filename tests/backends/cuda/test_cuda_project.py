"""The CUDA kernel of triplane_project on the host stand-in: against the float64 reference, in three schedules."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from backends.cuda import emulated
from comparison import assert_close, relative_error
from inputs import poisoned_empty
from tolerances import BFLOAT16_FACTOR, OPERATION, PROJECTION_16_BIT
from torch import Tensor

from pvdm_fast import TriplaneLayout, ops, use_backend
from pvdm_fast.analysis.projections import Projection
from pvdm_fast.backends import choice
from pvdm_fast.backends.cuda import triplane_project as kernel
from pvdm_fast.backends.cuda.triplane_project import Sizes, Tile
from pvdm_fast.backends.projection_layers import MATRICES
from pvdm_fast.backends.reference import triplane_project as reference
from pvdm_fast.errors import BackendError
from pvdm_fast.nn import PlaneProjection

HALVES = (torch.bfloat16, torch.float16)
# Sequences of 2 to 41, channels of 8 to 136, heads of 1 to 8, layers 1 to 3; heads and hidden layers that are padded.
CASES = {
    "least": Projection((1, 1, 2), "xy", 8, 1, 1, hidden=8, depth=1, latent=1),
    "one layer": Projection((2, 4, 5), "yt", 24, 3, 5, hidden=17, depth=1),
    "2, tiles": Projection((1, 13, 7), "xy", 16, 4, 2, batch=2),
    "17": Projection((16, 3, 2), "xy", 48, 4, 6, hidden=64, depth=3, latent=4),
    "33": Projection((2, 32, 3), "yt", 40, 8, 3, hidden=50, latent=7),
    "41": Projection((3, 2, 40), "xt", 72, 2, 33, hidden=40, batch=2),
    "wide": Projection((2, 2, 4), "xt", 136, 4, 16, hidden=144, latent=40),
}
EVERY = pytest.mark.parametrize("name", CASES)


def computed(case: Projection, tensors: dict[str, Tensor]) -> Tensor:
    return kernel.forward(*tensors.values(), *case.arguments())


def exact(case: Projection, tensors: dict[str, Tensor]) -> Tensor:
    return reference.forward(*(t.double() for t in tensors.values()), *case.arguments())


def in_every_order(device: ModuleType, case: Projection, tensors: dict[str, Tensor]) -> Tensor:
    """The result, which three schedules of the threads must agree about, and which must be written whole."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned_empty)
        for order in (0, 1, 2):
            device.set_schedule(order)
            found.append(computed(case, tensors))
    device.set_schedule(0)
    assert all(torch.equal(found[0], other) for other in found[1:]), "the order of threads shows"
    return found[0]


@EVERY
def test_float32(device: ModuleType, name: str) -> None:
    case = CASES[name]
    tensors = {n: t.float() for n, t in case.tensors().items()}
    before = {n: t.clone() for n, t in tensors.items()}
    out = in_every_order(device, case, tensors)
    assert out.is_contiguous() and out.dtype == torch.float32
    assert_close(out, exact(case, tensors), OPERATION[torch.float32])
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())


@pytest.mark.parametrize("dtype", HALVES)
@EVERY
def test_16_bits(device: ModuleType, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    tensors = {n: t.to(dtype) for n, t in case.tensors().items()}
    device.counts()
    out = in_every_order(device, case, tensors)
    assert device.counts()["mma"] > 0
    assert out.is_contiguous() and out.dtype == dtype
    assert_close(out, exact(case, tensors), PROJECTION_16_BIT[dtype])


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_matrices_in_bfloat16_of_parameters_in_float32(device: ModuleType, x_dtype: torch.dtype) -> None:
    """As under autocast."""
    case = CASES["17"]
    tensors = {n: t.to(torch.bfloat16 if n in MATRICES else torch.float32) for n, t in case.tensors().items()}
    tensors["x"] = tensors["x"].to(x_dtype)
    out = computed(case, tensors)
    assert out.dtype == torch.bfloat16
    assert_close(out, exact(case, tensors), PROJECTION_16_BIT[torch.bfloat16])


@pytest.mark.parametrize(
    ("dtype", "tile"),
    [
        *((torch.float32, Tile(rows, warps, 1, 16)) for rows, warps in ((32, 8), (64, 1))),
        *((torch.bfloat16, Tile(rows, warps, 3, 32)) for rows, warps in ((32, 3), (64, 4), (96, 8), (112, 8))),
        (torch.float16, Tile(96, 2, 1, 48)),
    ],
)
def test_tiles(device: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tile: Tile) -> None:
    """Each size of a tile: more tiles than blocks, several groups of heads, parts of the hidden layer, and rests."""
    case = Projection((3, 5, 19), "yt", 24, 4, 16, hidden=80, depth=2, latent=5)
    monkeypatch.setattr(kernel, "best_tile", lambda *_: tile)
    monkeypatch.setattr(kernel, "limits", lambda _: (2, 0))
    tensors = {n: t.to(dtype) for n, t in case.tensors().items()}
    allowed = OPERATION[dtype] if dtype == torch.float32 else PROJECTION_16_BIT[dtype]
    assert_close(in_every_order(device, case, tensors), exact(case, tensors), allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sequences_do_not_meet(device: ModuleType, dtype: torch.dtype, value: float) -> None:
    """What isn't finite in one sequence leaves all others as they were, to the last bit."""
    case = Projection((5, 3, 4), "xy", 16, 2, 8, hidden=32)
    tensors = {n: t.to(dtype) for n, t in case.tensors().items()}
    before = computed(case, tensors)
    site = 7
    tensors["x"][:, 3 * 12 + site, 2] = value
    after = computed(case, tensors)
    others = torch.arange(12) != site
    assert torch.equal(after[:, others], before[:, others])
    expected = exact(case, tensors)[:, site]
    assert torch.equal(after[:, site].isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(device: ModuleType, dtype: torch.dtype) -> None:
    """Any order of axes, gaps, rows that start anywhere, parameters that start anywhere."""
    case = CASES["2, tiles"]
    tensors = {n: t.to(dtype) for n, t in case.tensors().items()}
    expected = computed(case, tensors)
    x = tensors["x"]
    lattices = [x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack((x, x), -1)[..., 0]]
    buffer = torch.full((*x.shape[:2], 21), float("nan"), dtype=dtype)
    buffer[..., 3:19] = x
    for lattice in (*lattices, buffer[..., 3:19]):
        assert torch.equal(computed(case, tensors | {"x": lattice}), expected)
    moved = {n: torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape) for n, t in tensors.items()}
    assert moved["qkv_weight"].data_ptr() % 16
    assert torch.equal(computed(case, moved | {"x": x}), expected)


def test_float16_is_no_worse_than_the_layers(device: ModuleType) -> None:
    """At most twice the error of the layers one by one in the same dtype."""
    network = Network().double()
    x = torch.randn(2, 24, 16)
    expected = network(x.double())
    for dtype in HALVES:
        network.to(dtype)
        with emulated.registered(device), torch.no_grad():
            fused = network(x.to(dtype))
            with use_backend("reference"):
                layers = network(x.to(dtype))
        allowed = BFLOAT16_FACTOR * relative_error(layers, expected) + OPERATION[dtype]
        assert relative_error(fused, expected) <= allowed


class Network(torch.nn.Module):
    """A projection with all that belongs to its plane."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = torch.nn.Parameter(torch.randn(16)), torch.nn.Parameter(torch.randn(5, 16))
        self.projection, self.to_latent = PlaneProjection(16, 2, 24), torch.nn.Conv2d(16, 3, 1)

    def forward(self, lattice: Tensor, length: int = 4) -> Tensor:
        layout = TriplaneLayout(length, 3, 2)
        return self.projection.latents(lattice, layout, "xy", self.token, self.positions, self.to_latent)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those of the kernel."""
    found: list[Any] = []
    forward = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *a: found.append(a) or forward(*a))
    return found


def test_a_network_takes_it_without_a_gradient(device: ModuleType, calls: list[Any]) -> None:
    """With a gradient it takes the layers, and gets their gradient."""
    network, x = Network().double(), torch.randn(2, 24, 16)
    expected = network(x.double())
    network.float()
    with emulated.registered(device):
        with torch.no_grad():
            assert_close(network(x), expected, OPERATION[torch.float32])
        assert len(calls) == 1
        network(x).sum().backward()
    assert len(calls) == 1 and network.token.grad is not None


def test_longer_sequences_take_the_layers(device: ModuleType) -> None:
    x, weight = torch.zeros(1, 384, 16), torch.zeros(3, 16)
    with emulated.registered(device), torch.no_grad():
        assert ops.fuses_projection(x, weight, TriplaneLayout(63, 3, 2), "xy")
        assert not ops.fuses_projection(x, weight, TriplaneLayout(64, 3, 2), "xy")
        assert not ops.fuses_projection(x[..., :12], weight, TriplaneLayout(63, 3, 2), "xy")


def test_a_gradient_is_refused_by_name(device: ModuleType, calls: list[Any]) -> None:
    """In one sentence, before anything is computed. By itself the next backend computes it."""
    case = CASES["one layer"]
    leaves = [t.float().requires_grad_() for t in case.tensors().values()]
    doubled = [t.detach().double().requires_grad_() for t in leaves]
    exactly = torch.autograd.grad(case.run(*doubled).sum(), doubled)
    with emulated.registered(device):
        message = 'cannot serve triplane_project: it computes no gradient: use backend "triton".'
        with use_backend(emulated.BACKEND), pytest.raises(BackendError, match=message):
            case.run(*leaves)
        assert not calls
        with use_backend(emulated.BACKEND):
            arguments = (*leaves, *case.arguments(), emulated.BACKEND)
            out = torch.ops.pvdm_fast.triplane_project(*arguments)
            with pytest.raises(BackendError, match=message):
                out.sum().backward()
        assert len(calls) == 1
        gradients = torch.autograd.grad(case.run(*leaves).sum(), leaves)
        assert len(calls) == 2
    for actual, expected in zip(gradients, exactly, strict=True):
        assert_close(actual, expected, OPERATION[torch.float32])


def test_tangents_need_no_gradient_of_the_kernel(device: ModuleType) -> None:
    """Forward mode is the reference's, though parameters require a gradient. What asks for one is refused here too."""
    case = CASES["one layer"]
    tensors = [t.float().requires_grad_() for t in case.tensors().values()]
    tangent = torch.randn_like(tensors[0])

    def along(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, *parameters = (t.to(dtype) for t in tensors)
        return torch.func.jvp(lambda x: case.run(x, *parameters), (x,), (tangent.to(dtype),))

    expected = along(torch.float64)
    with emulated.registered(device), use_backend(emulated.BACKEND):
        for actual, exactly in zip(along(torch.float32), expected, strict=True):
            assert_close(actual, exactly, OPERATION[torch.float32])
        with pytest.raises(BackendError, match="no gradient"):
            torch.func.grad(lambda x: case.run(x, *tensors[1:]).sum())(tensors[0])


# Multiprocessors, and KiB of shared memory that a block may have.
GPUS = {"A100": (108, 163), "H100": (132, 227), "B200": (148, 227), "RTX 3090": (82, 99), "RTX 5090": (170, 99)}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("length", "sequences"), [(17, 1024), (33, 512)])
def test_full_size_fits_every_gpu(device: ModuleType, gpu: str, length: int, sequences: int) -> None:
    """In 16 bits; and the kernel takes as much shared memory as the launcher thinks."""
    multiprocessors, room = GPUS[gpu][0], GPUS[gpu][1] << 10
    sizes = Sizes(2, length, 384, 4, 48, 512)
    tile = kernel.best_tile(sizes, sequences, multiprocessors, room)
    assert tile is not None and tile.rows >= length
    assert kernel.shared_bytes(sizes, tile) <= room
    for size, half in ((2, True), (4, False)):
        for some in (tile, Tile(64, 4, 3, 208), Tile(32, 8, 1, 512)):
            wide = sizes._replace(size=size, channels=264)
            assert device.triplane_project_shared(half, 264, 48, some) == kernel.shared_bytes(wide, some)


def test_tiles_that_are_chosen() -> None:
    """Full size, along time: a rest of a tile, and rounds that leave multiprocessors idle, cost as much as work."""
    sizes = Sizes(2, 17, 384, 4, 48, 512)
    assert kernel.best_tile(sizes, 1024, 132, 227 << 10) == Tile(96, 8, 2, 512)
    assert kernel.best_tile(sizes, 8, 132, 227 << 10) == Tile(32, 8, 4, 512)
    assert kernel.best_tile(sizes, 1024, 82, 99 << 10) == Tile(64, 4, 1, 176)
    assert kernel.best_tile(sizes._replace(channels=2048), 1024, 82, 99 << 10) is None


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 512, 384)
    assert kernel.refusal(x, "xy", 8, 8, 8, 1, 0.0) is None
    monkeypatch.setattr(kernel, "limits", lambda _: (82, 99 << 10))
    said = kernel.refusal(torch.empty(1, 512, 2048), "xy", 8, 8, 8, 1, 0.0)
    assert said == "a block's 99 KiB of shared memory hold no tile of its sequences: use another backend."
    said = choice.refusal("cuda", "triplane_project", (x[..., :12], "xy", 8, 8, 8, 1, 0.0))
    assert said is not None and "multiples of 8, not 12" in said


def test_border_refuses(device: ModuleType) -> None:
    """What the launcher wouldn't pass is refused before the kernel runs."""
    case = Projection((2, 3, 4), "yt", 16, 2, 16, hidden=32)
    tensors = {n: t.float() for n, t in case.tensors().items()}
    x, *_ = tensors.values()

    def call(tile: tuple[int, ...] = (32, 8, 2, 32), heads: int = 2, **changed: Tensor) -> None:
        given = {**tensors, "out": torch.empty(1, 8, 3), "stream": torch.empty(1, tile[0], 16), **changed}
        parameters = tuple(list(given.values())[1:16])
        where = (1, 2, 3, 4, heads, 1e-5, 0, 0)
        device.triplane_project_forward(given["x"], parameters, given["out"], given["stream"], tile, 0.25, *where)

    call()
    refused: dict[str, dict[str, Any]] = {
        "dtype of the matrices": {"out": torch.empty(1, 8, 3).half()},
        "out has not the shape": {"out": torch.empty(1, 7, 3)},
        "stream has not the shape": {"stream": torch.empty(1, 32, 8)},
        "32 or 64 rows": {"tile": (96, 8, 2, 32)},
        "1 to 8 warps": {"tile": (32, 9, 2, 32)},
        "some heads at a time": {"tile": (32, 8, 3, 32)},
        "a head's and those of the hidden layer of 16": {"heads": 4},
        "start at 16 bytes": {"token": torch.zeros(17)[1:]},
        "must be float32": {"token": tensors["token"].half()},
    }
    for message, change in refused.items():
        with pytest.raises(ValueError, match=message):
            call(**change)
    assert len(x) == 1
