"""The least time of a case: its arithmetic at the machine's peak, its bytes at the machine's bandwidth.

A floor is max(FLOPs / peak GEMM rate, bytes / bandwidth). Nothing here can beat it:

- FLOPs count products only (a multiply-add is 2), not exponentials, norms or activations. They are the fewest that give
  the result: the last layer of a projection runs only for the position that is read.
- A backward pass has two products for each one of forward, so twice the FLOPs. (Fused attention recomputes the scores
  and needs 2.5 times. The floor doesn't count that.)
- Bytes: each input, weight and result once, as if everything in between stayed in registers. Backward reads the
  result's gradient, the inputs and the weights, and writes the gradients of inputs and weights.

Peaks are measured, not looked up: the best of several square GEMMs and 1 x 1 convolutions in the case's
dtype, and the best of copying and adding on buffers of the case's own size, so that a case that fits in a cache is held
against that cache. They are timed again in the rounds of every case (`beside`), and the best counts. A share above
100 % therefore means that other programs were at work, and the tables mark it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pvdm_fast.backends.float32 import tf32_allowed
from pvdm_fast.layout import TriplaneLayout
from pvdm_fast.ops.costs import attention, attention_block, conv, linear

PROJECTION_HEADS = 4


def residual_block(after: int, channels: int, embedding: int, outputs: int) -> int:
    """Two 3 x 3 convolutions at the size after resampling, the embedding, and the skip if channels change."""
    skip = linear(after, channels, outputs) if channels != outputs else 0
    return conv(after, channels, outputs) + conv(after, outputs, outputs) + linear(1, embedding, 2 * outputs) + skip


def denoiser(config: dict[str, Any]) -> int:
    """FLOPs of one forward pass per clip. `config` is that of `pvdm_fast.models.Denoiser`."""
    layout = TriplaneLayout(config["time"], config["height"], config["width"])
    width, mults = config["model_channels"], config["channel_mult"]
    embedding, blocks = 4 * width, config["num_res_blocks"]
    total = linear(1, width, embedding) + linear(1, embedding, embedding)
    total += conv(layout.num_tokens, 2 * config["latent_channels"], width)
    total += conv(layout.num_tokens, width, config["latent_channels"])

    def across(at: Any, channels: int) -> int:
        return attention_block(at.num_tokens, [at.num_tokens], channels)

    def inside(at: Any, channels: int) -> int:
        return attention_block(at.num_tokens, [h * w for h, w in at.planes], channels)

    def residual(at: Any, channels: int, outputs: int) -> int:
        return residual_block(at.num_tokens, channels, embedding, outputs)

    channels, skips, levels = width, [width], [layout]
    for level, factor in enumerate(mults):
        attends = 2**level in config["attention_resolutions"]
        at = levels[-1]
        for _ in range(blocks):
            total += residual(at, channels, factor * width)
            channels = factor * width
            total += across(at, channels) + (inside(at, channels) if attends else 0)
            skips.append(channels)
        if level < len(mults) - 1:
            levels.append(at.downsample(2))
            total += residual(levels[-1], channels, channels) + across(levels[-1], channels)
            skips.append(channels)
    at = levels[-1]
    total += 2 * residual(at, channels, channels) + inside(at, channels) + across(at, channels)
    for level, factor in reversed(list(enumerate(mults))):
        attends = 2**level in config["attention_resolutions"]
        for index in range(blocks + 1):
            at = levels[level]
            total += residual(at, channels + skips.pop(), factor * width)
            channels = factor * width
            total += inside(at, channels) if attends else 0
            if level > 0 and index == blocks:
                at = levels[level - 1]
                total += residual(at, channels, channels)
            total += across(at, channels)
    return total


def timesformer_layer(layout: TriplaneLayout, channels: int, inner: int) -> int:
    """Time attention, space attention, gated feed-forward."""
    tokens, sites = layout.num_lattice_tokens, layout.height * layout.width
    products = 2 * linear(tokens, channels, 4 * inner)
    products += attention(sites, layout.time, layout.time, inner) + attention(layout.time, sites, sites, inner)
    return products + linear(tokens, channels, 8 * channels) + linear(tokens, 4 * channels, channels)


def projection(
    sites: int, length: int, channels: int, *, depth: int = 4, hidden: int = 512, whole: bool = False
) -> int:
    """The layers over `sites` sequences of `length` (the appended token included).

    Only one position of the last layer is needed. `whole` counts all of them, as the release computes.
    """
    inner = PROJECTION_HEADS * (channels // 8)

    def layer(queries: int) -> int:
        keys = linear(sites * length, channels, 2 * inner)
        one = linear(1, channels, inner) + linear(1, inner, channels) + 2 * linear(1, channels, hidden)
        return keys + sites * queries * one + attention(sites, queries, length, inner)

    return (depth - 1) * layer(length) + layer(length if whole else 1)


def _autoencoder_sizes(config: dict[str, Any]) -> tuple[TriplaneLayout, int, int, int]:
    p = config["patch_size"]
    layout = TriplaneLayout(config["frames"], config["height"] // p, config["width"] // p)
    return layout, config["channels"], config["num_heads"] * config["head_dim"], 3 * p * p


def encoder(config: dict[str, Any], *, whole: bool = False) -> int:
    """FLOPs of encoding a clip. `config` is that of `pvdm_fast.models.Autoencoder`, `whole` is as in
    `projection`."""
    layout, channels, inner, patch = _autoencoder_sizes(config)
    total = linear(layout.num_lattice_tokens, patch, channels)
    total += config["depth"] * timesformer_layer(layout, channels, inner)
    for (rows, columns), length in zip(layout.planes, (layout.time, layout.height, layout.width), strict=True):
        depth, hidden = config.get("projection_depth", 4), config.get("projection_hidden", 512)
        total += projection(rows * columns, length + 1, channels, depth=depth, hidden=hidden, whole=whole)
    return total + linear(layout.num_tokens, channels, config.get("latent_channels", 4))


def decoder(config: dict[str, Any]) -> int:
    """FLOPs of decoding a clip."""
    layout, channels, inner, patch = _autoencoder_sizes(config)
    total = linear(layout.num_tokens, config.get("latent_channels", 4), channels)
    total += config["depth"] * timesformer_layer(layout, channels, inner)
    return total + linear(layout.num_lattice_tokens, channels, patch)


@dataclass(frozen=True)
class Work:
    """The least work of one direction of a case."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Floor:
    """Seconds, the bound ("arithmetic" or "memory"), and the peaks that gave it."""

    seconds: float
    bound: str
    flops_per_second: float
    bytes_per_second: float


def work(direction: str, forward_flops: float, read: int, parameters: int, written: int) -> Work:
    """Work of "forward", "backward" or "both". read, parameters, written: bytes of inputs, weights and results."""
    forward = Work(forward_flops, read + parameters + written)
    backward = Work(2 * forward_flops, written + 2 * read + 2 * parameters)
    if direction == "both":
        return Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return forward if direction == "forward" else backward


def floor(needed: Work, dtype: torch.dtype, device: str) -> Floor:
    """The floor of `needed` on this machine."""
    return floor_at(needed, gemm_peak(dtype, device), bandwidth(_bucket(needed.bytes), device))


def floor_at(needed: Work, peak: float, speed: float) -> Floor:
    """The floor of `needed` at a peak in FLOP/s and a speed in bytes/s."""
    arithmetic, memory = needed.flops / peak, needed.bytes / speed
    return Floor(max(arithmetic, memory), "arithmetic" if arithmetic > memory else "memory", peak, speed)


def _bucket(size: float) -> int:
    """The power of two from 1 to 256 MiB just above `size`."""
    bucket = 1 << 20
    while bucket < size and bucket < 1 << 28:
        bucket *= 2
    return bucket


def _best(run: Callable[[], Any], device: str, seconds: float = 0.25) -> float:
    """The least seconds of a call within a time budget. Other programs can only make it longer."""
    best, stop = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < stop:
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


_seen: dict[str, float] = {}  # the highest rate measured so far, by name: a busy machine only shows lower ones


def load_peaks(path: Path) -> None:
    """Use the peaks that an earlier run on this machine stored, if they are higher."""
    if path.exists():
        for key, value in json.loads(path.read_text()).items():
            _seen[key] = max(value, _seen.get(key, 0.0))


def save_peaks(path: Path) -> None:
    """Store every peak known now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted(_seen.items())), indent=1) + "\n")


def _highest(key: str, measured: float) -> float:
    _seen[key] = max(measured, _seen.get(key, 0.0))
    return _seen[key]


@dataclass
class Probe:
    """A computation at one of the machine's peaks, which can be timed again; ``amount``: FLOPs or bytes of a run."""

    key: str
    amount: float
    run: Callable[[], Any]
    device: str
    rate: float = 0.0

    def measure(self, seconds: float) -> float:
        """Time it for so long, once at least; returns the highest rate so far."""
        self.rate = max(self.rate, self.amount / _best(self.run, self.device, seconds))
        return self.rate


def _fastest(probes: Iterable[Probe], seconds: float = 0.25) -> Probe:
    return max(probes, key=lambda probe: probe.measure(seconds))


def gemm_peak(dtype: torch.dtype, device: str) -> float:
    """The best FLOP/s of square GEMMs in `dtype`; in float32 on a GPU, as PyTorch's switches allow them."""
    probe = _gemm_probe(dtype, device, _tf32(dtype, device))
    return _highest(probe.key, probe.rate)


def _tf32(dtype: torch.dtype, device: str) -> bool:
    """Whether a product or a convolution may be rounded to tf32, whose peak is another one."""
    return device == "cuda" and dtype == torch.float32 and (tf32_allowed("product") or tf32_allowed("convolution"))


@lru_cache(maxsize=2)  # a report alternates between two dtypes; a probe keeps its tensors, up to 1 GB on a GPU
def _gemm_probe(dtype: torch.dtype, device: str, tf32: bool) -> Probe:
    key = f"FLOP/s {device} {'tf32' if tf32 else str(dtype).removeprefix('torch.')}"
    sizes = (512, 1024, 2048) if device == "cpu" else (4096, 8192)
    return _fastest(Probe(key, linear(n, n, n), run, device) for n in sizes for run in _products(n, dtype, device))


def _products(n: int, dtype: torch.dtype, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """PyTorch's GEMM and its 1 x 1 convolution (another library on a CPU)."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out: Tensor = a @ b
    image, kernel = a.view(1, n, n, 1).transpose(1, 2), b.view(n, n, 1, 1)

    def convolve() -> Tensor:
        with torch.no_grad():
            return F.conv2d(image, kernel)

    return lambda: torch.mm(a, b, out=out), convolve


def bandwidth(working_set: int, device: str) -> float:
    """The best bytes/s, reads and writes together, of copying and adding in `working_set` bytes."""
    probe = _bandwidth_probe(working_set, device)
    return _highest(probe.key, probe.rate)


@lru_cache(maxsize=1)  # a probe keeps its tensors, 1.7 times its working set
def _bandwidth_probe(working_set: int, device: str) -> Probe:
    count = working_set // 4 // 3
    a, b, out = (torch.ones(count, device=device) for _ in range(3))
    source, target = (torch.ones(working_set // 4 // 2, device=device) for _ in range(2))
    calls = max(1, (16 << 20) // working_set)  # long enough for the clock

    def add() -> None:
        for _ in range(calls):
            torch.add(a, b, out=out)

    def copy() -> None:
        for _ in range(calls):
            target.copy_(source)

    key = f"bytes/s {device} {working_set >> 20} MiB"
    amounts = ((12 * count * calls, add), (8 * source.numel() * calls, copy))
    return _fastest(Probe(key, amount, run, device) for amount, run in amounts)


def beside(needed: Work, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """What times both peaks of a case once more, to be called in each of its rounds: they see the same weather.

    It takes a tenth of the time at most: sooner after a long timing a call does nothing.
    """
    probes = (_gemm_probe(dtype, device, _tf32(dtype, device)), _bandwidth_probe(_bucket(needed.bytes), device))
    due = 0.0

    def again() -> None:
        nonlocal due
        started = time.perf_counter()
        if started < due:
            return
        for probe in probes:
            probe.measure(0)
        ended = time.perf_counter()
        due = ended + 9 * (ended - started)

    return again
