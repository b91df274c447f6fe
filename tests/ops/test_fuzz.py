"""Random calls of every operation, both directions, on every backend and instruction set, against the reference.

Sizes are odd or single. Tensors have every memory layout that PyTorch allows: transposed, sliced, expanded,
overlapping. Dtypes are mixed if the operation takes mixtures. Values are ordinary, 1e4 times as large (for attention
its scores), or hold NaN and infinities. Where the reference is finite, a result must be right. Where the reference is
NaN or infinite, a result must not be finite.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerances import ATTENTION_16_BIT, CONV_SUM, OPERATION
from torch import Tensor

from pvdm_fast import TriplaneLayout, ops, use_backend
from pvdm_fast.backends import choice
from pvdm_fast.backends.choice import SERVED, BackendError
from pvdm_fast.layout import PlaneLayout

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
VALUES = ("ordinary", "ordinary", "ordinary", "large", "nan", "inf", "-inf")

# What a kernel can't do, as documented there: (operation, backend, kind of values). Such calls are skipped. Triton's
# short sequences share a tile, and its products multiply a value that isn't finite in one sequence by the others'
# zeros.
KNOWN: tuple[tuple[str, str, str], ...] = (
    ("axial_attention", "triton", "nan"),
    ("axial_attention", "triton", "inf"),
    ("axial_attention", "triton", "-inf"),
    # oneDNN's bfloat16 product of an odd number of terms reads one of the next row, times 0. So does F.linear.
    ("plane_conv", "cpu", "nan"),
    ("plane_conv", "cpu", "inf"),
    ("plane_conv", "cpu", "-inf"),
)
LARGE = 1e2  # factor of queries and keys, so scores are 1e4 times as large


class Draw:
    """The choices of one call, from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.values = self.random.choice(VALUES)
        self.dtype = self.random.choice((torch.float32, torch.float32, *HALVES))
        self.victim = self.random.randrange(4)  # which tensor holds the special value
        self.count = 0
        self.notes: list[str] = []

    def size(self, most: int = 7) -> int:
        return self.random.choice((1, 1, 2, 3, 4, 5, 7, 8, 9, 17)) if most > 9 else self.random.randint(1, most)

    def tensor(self, *shape: int, large: float = 1e4, mixed: bool = False) -> Tensor:
        """Values and memory layout as drawn. large: the scale of large values. mixed: another dtype is allowed."""
        dtype = self.dtype
        if mixed and self.random.random() < 0.3:
            dtype = self.random.choice((*DTYPES, torch.float64))
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if self.values == "large" and self.count == self.victim:
            values = values * large
        elif self.values in ("nan", "inf", "-inf") and self.count == self.victim:
            flat = values.view(-1)
            flat[self.random.randrange(len(flat))] = float(self.values)
        self.count += 1
        return self.laid_out(values.to(dtype))

    def laid_out(self, x: Tensor) -> Tensor:
        """`x` in a drawn memory layout. If elements then share memory, values change."""
        form = self.random.choice(("dense", "dense", "transposed", "sliced", "offset", "expanded", "overlapping"))
        self.notes.append(f"{form}{tuple(x.shape)}{str(x.dtype)[6:]}")
        if form == "transposed" and x.dim() > 1:
            axes = self.random.sample(range(x.dim()), x.dim())
            return x.permute(axes).contiguous().permute([axes.index(i) for i in range(x.dim())])
        if form == "sliced":
            buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
            buffer[..., 1::2] = x
            return buffer[..., 1::2]
        if form == "offset":
            buffer = x.new_full((x.numel() + 3,), float("nan"))
            buffer[3:] = x.flatten()
            return buffer[3:].view(x.shape)
        if form == "expanded":
            axis = self.random.randrange(x.dim())
            return x.narrow(axis, 0, 1).expand(x.shape)
        if form == "overlapping" and x.dim() > 1:  # each row starts one element after the previous one
            strides = [*[1] * (x.dim() - 1), 1]
            return x.flatten().as_strided(x.shape, strides) if x.numel() >= sum(x.shape) else x
        return x


Call = tuple[dict[str, Tensor], Callable[..., Any]]


def _segment(d: Draw) -> Call:
    tokens, heads, width = d.size(20) * d.size(3), d.size(3), d.random.choice((1, 2, 3, 8, 16, 20, 33, 40))
    cuts = sorted(d.random.sample(range(1, tokens), min(tokens - 1, d.random.randint(0, 2))))
    scale = d.random.choice((None, 0.3, -0.5))
    return {"qkv": d.tensor(d.size(2), tokens, 3, heads, width, large=LARGE)}, lambda qkv: ops.segment_attention(
        qkv, [0, *cuts, tokens], scale
    )


def _axial(d: Draw) -> Call:
    time, height, width, heads = d.size(20), d.size(4), d.size(4), d.size(3)
    depth, axis, batch = 2 * d.random.choice((1, 2, 4, 8, 10, 17)), d.random.choice(("time", "space")), d.size(2)
    if axis == "time" and d.random.random() < 0.4:
        return {
            "qkv": d.tensor(batch, time, height, width, 2, heads, depth, large=LARGE),
            "query": d.tensor(batch, 1, height, width, heads, depth, large=LARGE),
        }, lambda qkv, query: ops.axial_attention(qkv, "time", query=query)
    length = time if axis == "time" else height * width
    angles = torch.randn(length, depth, generator=d.generator)
    tables = d.random.choice((None, (angles.sin(), angles.cos())))
    tables = tables and tuple(d.laid_out(t.to(d.random.choice((torch.float32, torch.float64)))) for t in tables)
    return {"qkv": d.tensor(batch, time, height, width, 3, heads, depth, large=LARGE)}, lambda qkv: ops.axial_attention(
        qkv, axis, tables
    )


def _planes(d: Draw, even: bool = False) -> PlaneLayout:
    by = 2 if even else 1
    return PlaneLayout(tuple((by * d.size(4), by * d.size(4)) for _ in range(d.random.randint(1, 3))))


def _norm(d: Draw) -> Call:
    resample = d.random.choice((None, None, "up", "down"))
    layout, groups = _planes(d, resample == "down"), d.size(4)
    channels, batch = groups * d.size(9), d.size(2)
    inputs = {
        "x": d.tensor(batch, layout.num_tokens, channels),
        "weight": d.tensor(channels, mixed=True),
        "bias": d.tensor(channels, mixed=True),
    }
    if d.random.random() < 0.5:
        inputs["scale_shift"] = d.tensor(batch, 2 * channels, mixed=True)
    activation = d.random.random() < 0.5
    return inputs, lambda x, weight, bias, scale_shift=None: ops.plane_norm(
        x, layout, weight, bias, scale_shift=scale_shift, groups=groups, activation=activation, resample=resample
    )


def _resample(d: Draw) -> Call:
    resample = d.random.choice(("up", "down"))
    layout = _planes(d, resample == "down")
    return {"x": d.tensor(d.size(2), layout.num_tokens, d.size(20))}, lambda x: ops.plane_resample(x, layout, resample)


def _conv(d: Draw) -> Call:
    layout, channels, out = _planes(d), d.size(9), d.size(9)
    return {
        "x": d.tensor(d.size(2), layout.num_tokens, channels),
        "weight": d.tensor(out, channels, 3, 3),
        "bias": d.tensor(out),
    }, lambda x, weight, bias: ops.plane_conv(x, layout, weight, bias)


def _slice(d: Draw) -> Call:
    layout, channels, plane = (
        TriplaneLayout(d.size(4), d.size(4), d.size(4)),
        d.size(20),
        d.random.choice(("xy", "yt", "xt")),
    )
    length = dict(xy=layout.time, yt=layout.height, xt=layout.width)[plane]
    return {
        "x": d.tensor(d.size(2), layout.num_lattice_tokens, channels),
        "token": d.tensor(channels, mixed=True),
        "positions": d.tensor(length + 1, channels, mixed=True),
    }, lambda x, token, positions: ops.triplane_slice(x, layout, plane, token, positions)


def _expand(d: Draw) -> Call:
    layout, channels, depth = TriplaneLayout(d.size(4), d.size(4), d.size(4)), d.size(20), d.size(9)
    return {
        "planes": d.tensor(d.size(2), layout.num_tokens, depth),
        "weight": d.tensor(3, channels, depth),
        "bias": d.tensor(3, channels),
    }, lambda planes, weight, bias: ops.triplane_expand(planes, layout, weight, bias)


def _geglu(d: Draw) -> Call:
    return {"x": d.tensor(*(d.size(4) for _ in range(d.random.randint(0, 2))), 2 * d.size(20))}, ops.geglu


def _add_norm(d: Draw) -> Call:
    shape = (*(d.size(4) for _ in range(d.random.randint(0, 2))), 1 + d.size(20))
    inputs = {"x": d.tensor(*shape)}
    if d.random.random() < 0.6:
        inputs["residual"] = d.tensor(*shape, mixed=True)
    inputs |= {"weight": d.tensor(shape[-1], mixed=True), "bias": d.tensor(shape[-1], mixed=True)}
    return inputs, lambda x, weight, bias, residual=None: ops.add_layer_norm(x, residual, weight, bias)


OPERATIONS: dict[str, Callable[[Draw], Call]] = {
    "segment_attention": _segment,
    "axial_attention": _axial,
    "plane_norm": _norm,
    "plane_resample": _resample,
    "plane_conv": _conv,
    "triplane_slice": _slice,
    "triplane_expand": _expand,
    "geglu": _geglu,
    "add_layer_norm": _add_norm,
}


def run(inputs: dict[str, Tensor], call: Callable[..., Any], incoming: list[Tensor]) -> dict[str, Tensor]:
    """Results and gradients by name, for incoming gradients that the first run draws."""
    required = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    results = call(**required)
    results = results if isinstance(results, tuple) else (results,)
    gradients = torch.autograd.grad(
        results, list(required.values()), [g.to(r.dtype) for g, r in zip(incoming, results, strict=True)]
    )
    found = {f"output {i}": r.detach() for i, r in enumerate(results)}
    return found | {f"gradient of {n}": g for n, g in zip(required, gradients, strict=True)}


def tolerance_of(op: str, inputs: dict[str, Tensor], what: str) -> float:
    dtypes = {t.dtype for t in inputs.values()}
    table = OPERATION
    if "attention" in op:
        table = {**OPERATION, **ATTENTION_16_BIT}
    elif op == "plane_conv":
        table = CONV_SUM
    return 2 * max(table[dtype] for dtype in dtypes)


def wrong(op: str, what: str, actual: Tensor, exact: Tensor, scale: float, tolerance: float) -> str | None:
    """Why `actual` isn't `exact`, a float64 tensor. None if it is. Errors are relative to at least `scale`."""
    if actual.shape != exact.shape:
        return f"{what}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    largest = torch.finfo(actual.dtype).max
    finite = exact.isfinite() & (exact.abs() < largest)
    if exact.isfinite().all():
        if not actual[finite].isfinite().all():
            return f"{what}: {int((~actual[finite].isfinite()).sum())} values are not finite, but should be"
    elif not torch.equal(actual.isfinite() & finite, finite):
        few = int((actual.isfinite() & ~finite).sum()), int((~actual.isfinite() & finite).sum())
        return f"{what}: {few[0]} values are finite where the reference's are not, {few[1]} not where they are"
    error = float((actual[finite].double() - exact[finite]).norm())
    if error > tolerance * max(float(exact[finite].norm()), scale):
        return f"{what}: error {error:.2e} of {float(exact[finite].norm()):.2e} (scale {scale:.2e})"
    return None


def rounding_of_scores(inputs: dict[str, Tensor]) -> float:
    """The effect of rounding on attention's probabilities. 0 for operations without scores.

    float32 rounds a score s by 6e-8 |s|, in its product and again in its difference from the largest. A softmax takes
    that as an absolute error.
    """
    if "qkv" not in inputs:
        return 0.0
    qkv = inputs["qkv"].double()
    q, k = inputs.get("query", qkv[..., 0, :, :]).double(), qkv[..., -2, :, :]
    largest = float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * max(0.5, q.shape[-1] ** -0.5)
    return 4 * 2**-24 * largest


def check(op: str, backend: str, seed: int) -> tuple[str | None, Draw]:
    """What is wrong with one call, if anything."""
    draw = Draw(seed)
    inputs, call = OPERATIONS[op](draw)
    if (op, backend, draw.values) in KNOWN:
        return None, draw
    with use_backend("reference"):
        wide = {n: t.double() for n, t in inputs.items()}
        results = call(**wide)
        results = results if isinstance(results, tuple) else (results,)
        incoming = [draw.laid_out(torch.randn(r.shape, generator=draw.generator, dtype=draw.dtype)) for r in results]
        expected = run(wide, call, incoming)
        same = run(inputs, call, incoming)  # the error of float32 sums: where terms cancel, nobody does better
    with use_backend(backend):
        try:
            actual = run(inputs, call, incoming)
        except BackendError:  # it says that it can't
            return None, draw
        except RuntimeError as error:
            return f"raised {error!r}", draw
    tolerance = tolerance_of(op, inputs, op) + (rounding_of_scores(inputs) if draw.values == "large" else 0.0)
    for what, exact in expected.items():
        reference = same[what].double()
        usual = reference.isfinite() & exact.isfinite()
        floor = 4 * float((reference[usual] - exact[usual]).norm()) / tolerance
        if draw.values != "ordinary" and not torch.equal(reference.isfinite(), exact.isfinite()):
            exact = torch.where(reference.isfinite(), exact, reference)  # what overflows in its own dtype
        scale = max(floor, 0.1 * exact[exact.isfinite()].numel() ** 0.5)
        if message := wrong(op, what, actual[what], exact, scale, tolerance):
            return message, draw
    return None, draw


def backends() -> list[str]:
    return [name for name in ("cpu", "triton") if choice.unavailable(name) is None]


def instruction_sets() -> list[str]:
    if choice.unavailable("cpu"):
        return []
    from pvdm_fast.backends.extensions import extension

    return list(extension("_cpu").isas())


@pytest.fixture
def each_set() -> Iterator[Callable[[str], None]]:
    """Sets the CPU's instruction set, and restores it afterwards."""
    from pvdm_fast.backends.extensions import extension

    module = extension("_cpu")
    before = module.isa()
    yield module.set_isa
    module.set_isa(before)


def failures(op: str, backend: str, seeds: range) -> list[str]:
    found = []
    for seed in seeds:
        message, draw = check(op, backend, seed)
        if message:
            found.append(f"{op} {backend} seed {seed} ({draw.values}, {draw.dtype}, {' '.join(draw.notes)}): {message}")
    return found


@pytest.mark.parametrize("op", OPERATIONS)
def test_random_calls(op: str, each_set: Callable[[str], None]) -> None:
    """The short version: every instruction set in turn, and a few calls in Triton's interpreter."""
    found = []
    for index, isa in enumerate(instruction_sets()):
        each_set(isa)
        found += [f"{isa}: {line}" for line in failures(op, "cpu", range(5 * index, 5 * index + 5))]
    if "triton" in backends() and op in SERVED["triton"]:
        found += failures(op, "triton", range(1000, 1002))
    assert not found, "\n".join(found)


@pytest.mark.exhaustive
@pytest.mark.parametrize("op", OPERATIONS)
def test_many_random_calls(op: str, each_set: Callable[[str], None]) -> None:
    """9 operations, 5 instruction sets, 150 seeds: 6,000 calls of the CPU's kernels (of 8), and 180 of Triton's."""
    found = []
    for index, isa in enumerate(instruction_sets()):
        each_set(isa)
        found += [f"{isa}: {line}" for line in failures(op, "cpu", range(10_000 + 150 * index, 10_150 + 150 * index))]
    if "triton" in backends() and op in SERVED["triton"]:
        found += failures(op, "triton", range(20_000, 20_020))
    assert not found, f"{len(found)} calls\n" + "\n".join(found)
