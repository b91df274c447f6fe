"""Sizes beyond the kernels: automatic choice takes the next backend, a name raises, and no launcher does."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_close
from torch import Tensor

from pvdm_fast import TriplaneLayout, ops, use_backend
from pvdm_fast.analysis.projections import Projection
from pvdm_fast.backends import choice
from pvdm_fast.errors import BackendError
from pvdm_fast.layout import PlaneLayout

pytest.importorskip("triton")
import pvdm_fast.kernels
from pvdm_fast.kernels.configs import assume
from pvdm_fast.kernels.launch import watch

LAYOUT = TriplaneLayout(2, 2, 2)
WIDE_HEADS = r"heads of at most 256 channels, not 257: use more heads, or another backend"


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def norm(batch: int, channels: int) -> Tensor:
    x, weight, bias = draw(batch, 4, channels), draw(channels), draw(channels)
    return ops.plane_norm(x, PlaneLayout(((2, 2),)), weight, bias, groups=1)


def block(channels: int, heads: int, groups: int) -> Tensor:
    c = channels
    weights = draw(c), draw(c), draw(3 * c, c), draw(3 * c), draw(c, c), draw(c)
    with torch.no_grad():
        return ops.attention_block(draw(1, 3, c), *weights, heads=heads, groups=groups)


def feed_forward(channels: int, hidden: int) -> Tensor:
    c = channels
    weights = draw(c, 1), draw(c), draw(c), draw(c), draw(2 * hidden, c), draw(2 * hidden), draw(c, hidden), draw(c)
    with torch.no_grad():
        return ops.feed_forward_block(draw(1, 3, c), draw(1, 3, 1), *weights)


def time_attention(time: int, channels: int) -> Tensor:
    c = channels
    weights = draw(c), draw(c), draw(6, c), draw(c, 2), draw(c)
    with torch.no_grad():
        return ops.time_attention_block(
            draw(1, time, c), *weights, draw(time, 2).detach(), draw(time, 2).detach(), time=time, heads=1
        )


def space_attention(channels: int, outputs: int) -> Tensor:
    c = channels
    tables = draw(2, outputs // 3).detach(), draw(2, outputs // 3).detach()
    with torch.no_grad():
        return ops.space_attention_heads(draw(1, 4, c), draw(c), draw(c), draw(outputs, c), *tables, sites=2, heads=1)


LONG = Projection((64, 1, 2), "xy", channels=8, heads=2, head_width=4)
BEYOND: list[tuple[str, str, Callable[[], Tensor]]] = [
    ("segment_attention", WIDE_HEADS, lambda: ops.segment_attention(draw(1, 4, 3, 1, 257))),
    ("axial_attention", WIDE_HEADS, lambda: ops.axial_attention(draw(1, 2, 2, 2, 3, 1, 257), "time")),
    ("axial_attention", WIDE_HEADS, lambda: ops.axial_attention(draw(1, 1, 7, 10, 3, 1, 257), "space")),
    (
        "axial_attention",
        WIDE_HEADS,
        lambda: ops.axial_attention(draw(1, 2, 2, 2, 2, 1, 257), "time", query=draw(1, 1, 2, 2, 1, 257)),
    ),
    (
        "add_layer_norm",
        r"rows of at most 8192 values, not 8193: use another backend",
        lambda: ops.add_layer_norm(draw(2, 8193), draw(2, 8193), draw(8193), draw(8193))[1],
    ),
    ("plane_norm", r"groups of at most 1024 channels, not 1025: use more groups", lambda: norm(1, 1025)),
    ("plane_norm", r"batches of at most 65535, not 65536: split the batch", lambda: norm(65536, 2)),
    (
        "triplane_expand",
        r"latents of at most 20 channels, not 21: use another backend",
        lambda: ops.triplane_expand(draw(1, LAYOUT.num_tokens, 21), LAYOUT, draw(3, 4, 21), draw(3, 4)),
    ),
    (
        "triplane_project",
        r"sequences of at most 64 elements, not 65: use another backend",
        lambda: LONG.run(*(tensor.float() for tensor in LONG.tensors().values())),
    ),
    ("attention_block", WIDE_HEADS, lambda: block(257, 1, 257)),
    ("feed_forward_block", r"at most 32768 channels, inner or hidden, not 32769", lambda: feed_forward(2, 32769)),
    ("space_attention_heads", r"at most 16384 channels or inner, not 16385", lambda: space_attention(16385, 6)),
    (
        "space_attention_heads",
        r"heads of at most 64 channels, not 66: use more heads",
        lambda: space_attention(2, 198),
    ),
    ("time_attention_block", r"at most 16384 channels or inner, not 16385", lambda: time_attention(2, 16385)),
    ("time_attention_block", r"sequences of at most 64 tokens, not 65", lambda: time_attention(65, 4)),
    ("attention_block", r"groups of at most 128 channels, not 129: use more groups", lambda: block(129, 1, 1)),
]
UNLIMITED = ("geglu", "plane_conv", "plane_resample", "triplane_slice")


@pytest.fixture
def triton_first(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Automatic choice tries Triton (its interpreter) first on the CPU too."""
    monkeypatch.setitem(choice.PREFERENCE, "cpu", ("triton", "cpu", "reference"))
    choice.ranking.cache_clear()
    yield
    choice.ranking.cache_clear()


@pytest.mark.usefixtures("triton_first")
@pytest.mark.parametrize(("op", "reason", "run"), BEYOND, ids=[f"{op}: {reason[:30]}" for op, reason, _ in BEYOND])
def test_beyond_a_limit(op: str, reason: str, run: Callable[[], Tensor]) -> None:
    assert choice.automatic(op, "cpu", torch.float32) == "triton"
    launched: list[Any] = []
    torch.manual_seed(0)
    with watch(lambda *launch: launched.append(launch)):
        out = run()
        if out.requires_grad:
            out.sum().backward()
    assert not launched
    torch.manual_seed(0)
    with use_backend("reference"):
        assert_close(out, run(), 1e-4)
    message = rf"'triton' was asked for, but cannot serve {op}: .*{reason}"
    with use_backend("triton"), pytest.raises(BackendError, match=message):
        run()


def test_every_operation_is_here() -> None:
    assert {op for op, _, _ in BEYOND} | set(UNLIMITED) == set(choice.SERVED["triton"])
    limited = {op for op in choice.SERVED["triton"] if hasattr(choice.implementation("triton", op), "refusal")}
    assert limited == {op for op, _, _ in BEYOND}


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def run_largest() -> None:
    """Run the other operations in both directions, and the limited ones just within their limits, all on tensors
    without data."""
    both: list[tuple[str, list[Any], list[Any]]] = [
        ("geglu", [meta(70_000, 1 << 18)], [meta(70_000, 1 << 17), meta(70_000, 1 << 18)]),
        ("geglu", [meta(1 << 22, 6)], [meta(1 << 22, 3), meta(1 << 22, 6)]),
        *(
            ("plane_resample", [meta(batch, 4, c), [2, 2], 1], [meta(batch, 16, c), [2, 2], 1])
            for batch, c in ((1 << 22, 8), (1, 1 << 22))
        ),
        *(
            (
                "plane_conv",
                [meta(batch, 4, c), meta(written, c, 3, 3), meta(written), [2, 2]],
                [meta(batch, 4, written), meta(batch, 4, c), meta(written, c, 3, 3), [2, 2], [True, True]],
            )
            for batch, c, written in ((70_000, 8, 8), (1, 70_000, 8), (1, 8, 70_000))
        ),
        *(
            (
                "triplane_slice",
                [meta(batch, t * 4, c), meta(c), meta(t + 1, c), "xy", t, 2, 2],
                [meta(batch, 4, t + 1, c), meta(c), meta(t + 1, c), "xy", t, 2, 2],
            )
            for batch, t, c in ((70_000, 2, 8), (1, 70_000, 8), (1, 2, 70_000))
        ),
    ]
    for op, forward, backward in both:
        module = choice.implementation("triton", op)
        module.forward(*forward)
        module.backward(*backward)


@pytest.mark.parametrize("architecture", ["sm80", "sm120", "gfx942"])
def test_grids_fit_a_gpu(architecture: str) -> None:
    """Axes 1 and 2 of a grid end at 65535."""
    grids: list[tuple[str, tuple[int, ...]]] = []
    with assume(architecture), watch(lambda kernel, grid, *_: grids.append((kernel.__name__, grid))):
        run_largest()
    assert grids
    wrong = [(name, grid) for name, grid in grids if grid[0] >= 1 << 31 or max((0, *grid[1:])) > 65535]
    assert not wrong


def test_no_launcher_raises() -> None:
    """A limit that raises, instead of being refused, would end automatic choice. Only a damaged configuration
    table may raise."""
    files = sorted(Path(pvdm_fast.kernels.__path__[0]).glob("*.py"))
    assert len(files) > 20
    raising = {f.name for f in files if any(isinstance(n, ast.Raise) for n in ast.walk(ast.parse(f.read_text())))}
    assert raising == {"configs.py"}
