"""`triplane_project` in Triton's interpreter, forward, against the float64 reference, and where networks use it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

import torch
from comparison import assert_close, relative_error
from tolerances import BFLOAT16_FACTOR, OPERATION, PROJECTION_16_BIT
from torch import Tensor

from pvdm_fast import TriplaneLayout, ops, use_backend
from pvdm_fast.analysis.projections import Projection
from pvdm_fast.backends import choice
from pvdm_fast.backends.projection_layers import MATRICES
from pvdm_fast.backends.reference import triplane_project as reference
from pvdm_fast.kernels import configs, triplane_project
from pvdm_fast.kernels.configs import assume
from pvdm_fast.kernels.launch import Config, watch
from pvdm_fast.nn import PlaneProjection

# Sequences of 2 to 41, channels of 8 to 512, heads of 1 to 8, one layer to four. The interpreter's tile has 64 rows.
CASES = {
    "least": Projection((1, 1, 2), "xy", 8, 1, 1, hidden=8, depth=1, latent=1),
    "one layer": Projection((2, 3, 5), "yt", 24, 3, 5, hidden=17, depth=1),
    "tiles of two clips": Projection((3, 5, 9), "xy", 16, 4, 2, batch=2),
    "a tile each": Projection((2, 2, 40), "xt", 72, 2, 33, hidden=40),
    "like a network": Projection((16, 3, 3), "xy", 48, 4, 6, hidden=64, depth=4, latent=4),
    "wide": Projection((1, 1, 3), "xt", 512, 8, 70, hidden=136, depth=1, latent=40),
}


def computed(case: Projection, tensors: dict[str, Tensor]) -> Tensor:
    return triplane_project.forward(*tensors.values(), *case.arguments())


def exact(case: Projection, tensors: dict[str, Tensor]) -> Tensor:
    return reference.forward(*(t.double() for t in tensors.values()), *case.arguments())


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    case = CASES[name]
    tensors = {n: t.float() for n, t in case.tensors().items()}
    before = {n: t.clone() for n, t in tensors.items()}
    out = computed(case, tensors)
    assert out.is_contiguous()
    assert_close(out, exact(case, tensors), OPERATION[torch.float32])
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())


@pytest.mark.parametrize("blocks", [(64, 16, 16), (128, 32, 64)])
def test_steps_that_sizes_do_not_divide(monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, int, int]) -> None:
    """Several steps of outputs and channels with a rest, in tiles of either size, more tiles than programs."""
    sizes = dict(zip(("ROWS", "OUTPUTS", "CHANNELS"), blocks, strict=True))
    monkeypatch.setattr(triplane_project, "FORWARD", lambda *_: Config({**sizes, "PROGRAMS": 2}))
    case = Projection((2, 5, 12), "yt", 40, 2, 20, hidden=50, latent=33)
    tensors = {n: t.float() for n, t in case.tensors().items()}
    assert_close(computed(case, tensors), exact(case, tensors), OPERATION[torch.float32])


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_matrices_in_bfloat16_of_parameters_in_float32(x_dtype: torch.dtype) -> None:
    """As under autocast."""
    case = CASES["like a network"]
    tensors = {n: t.to(torch.bfloat16 if n in MATRICES else torch.float32) for n, t in case.tensors().items()}
    tensors["x"] = tensors["x"].to(x_dtype)
    out = computed(case, tensors)
    assert out.dtype == torch.bfloat16
    assert_close(out, exact(case, tensors), PROJECTION_16_BIT[torch.bfloat16])


def test_strides() -> None:
    case = CASES["tiles of two clips"]
    tensors = {n: t.float() for n, t in case.tensors().items()}
    expected = computed(case, tensors)
    wide = {n: t.repeat_interleave(2, -1)[..., ::2] for n, t in tensors.items()}
    wide["x"] = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(computed(case, wide), expected)


def test_one_launch() -> None:
    """Whose memory is that of the programs that run at the same time, however many clips there are."""
    launched: list[tuple[str, tuple[int, ...], int]] = []

    def watcher(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], *_: Any) -> None:
        memory = sum(a.nbytes for a in arguments if isinstance(a, Tensor) and a.dim() == 3 and a.shape[0] == grid[0])
        launched.append((kernel.fn.__name__, grid, memory))

    for batch in (1, 32):
        case = Projection((16, 32, 32), "xy", 384, 4, 48, hidden=512, depth=4, latent=4, batch=batch)
        shapes = case.case.shapes.values()
        tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
        with watch(watcher), assume("sm90"):
            triplane_project.forward(*tensors, *case.arguments())
    rows = 128 * (4 * 384 + 2 * 384 + 2 * 576)
    assert launched == [
        ("triplane_project_forward", (74,), 74 * rows),  # 147 tiles, two for each
        ("triplane_project_forward", (131,), 131 * rows),
    ]


class Network(torch.nn.Module):
    """A projection with all that belongs to its plane."""

    def __init__(self, length: int = 4) -> None:
        super().__init__()
        self.layout = TriplaneLayout(length, 3, 2)
        self.token = torch.nn.Parameter(torch.randn(16))
        self.positions = torch.nn.Parameter(torch.randn(length + 1, 16))
        self.projection, self.to_latent = PlaneProjection(16, 2, 24), torch.nn.Conv2d(16, 3, 1)

    def forward(self, lattice: Tensor) -> Tensor:
        return self.projection.latents(lattice, self.layout, "xy", self.token, self.positions, self.to_latent)


def calls_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    forward = triplane_project.forward
    monkeypatch.setattr(triplane_project, "forward", lambda *a: calls.append(a) or forward(*a))
    return calls


def test_a_network_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, network, x = calls_of_the_kernel(monkeypatch), Network().double(), torch.randn(2, 24, 16)
    expected = network(x.double())
    network.float()
    with use_backend("triton"):
        with torch.no_grad():
            assert_close(network(x), expected, OPERATION[torch.float32])
        assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [4, 33])
def test_16_bits(monkeypatch: pytest.MonkeyPatch, length: int, dtype: torch.dtype, autocast: bool) -> None:
    """At most twice the error of the layers one by one, with the same dtypes."""
    calls, network, x = calls_of_the_kernel(monkeypatch), Network(length).double(), torch.randn(1, 6 * length, 16)
    expected = network(x.double())
    network.to(torch.float32 if autocast else dtype)
    x = x if autocast else x.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        with use_backend("triton"):
            fused = network(x)
        assert len(calls) == 1
        with use_backend("reference"):
            layers = network(x)
    assert fused.dtype == layers.dtype == dtype
    allowed = BFLOAT16_FACTOR * relative_error(layers, expected) + OPERATION[dtype]
    assert relative_error(fused, expected) <= allowed


def test_longer_sequences_take_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of_the_kernel(monkeypatch)
    x, weight = torch.zeros(1, 384, 16), torch.zeros(3, 16)
    with use_backend("triton"), torch.no_grad():
        assert ops.fuses_projection(x, weight, TriplaneLayout(63, 3, 2), "xy")
        assert not ops.fuses_projection(x, weight, TriplaneLayout(64, 3, 2), "xy")
        assert ops.fuses_projection(x, weight, TriplaneLayout(64, 3, 2), "yt")
        Network(64)(torch.randn(1, 384, 16))
    assert not calls


def test_not_on_gpus_of_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in str(choice.why_not("triton", "triplane_project"))
    assert choice.why_not("triton", "triplane_slice") is None


def test_every_tile_holds_the_longest_sequence() -> None:
    table = configs.TABLES["triplane_project_forward"]
    known = (*table.entries.values(), *table.candidates)
    assert min(config.blocks["ROWS"] for config in known) == triplane_project.LONGEST
