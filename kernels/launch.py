"""How a Triton kernel is launched: on its tensors' device, with blocks and warps from a table. Or watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """How one kernel is launched: block sizes and other compile-time constants by name, warps, pipeline stages."""

    blocks: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2


Watcher = Callable[[Any, tuple[int, ...], tuple[Any, ...], Config, dict[str, Any]], None]
_watcher: Watcher | None = None


@contextmanager
def watch(watcher: Watcher) -> Iterator[None]:
    """Pass every launch to `watcher(kernel, grid, arguments, config, constants)` instead of running it.

    This is how kernels are compiled for devices that aren't here, and how launches are counted. Tensors may be on the
    meta device.
    """
    global _watcher
    previous, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = previous


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, config: Config, **constants: Any) -> None:
    """Run `kernel[grid](*arguments, **constants)` with `config`, on the device and stream of the first tensor."""
    (_watcher or run)(kernel, grid, arguments, config, constants)


def options(config: Config, constants: dict[str, Any]) -> dict[str, Any]:
    """All keyword arguments of a launch. Multiply-adds are always fused, whatever this Triton version's default."""
    compiler = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return {**constants, **config.blocks, **compiler}


def run(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], config: Config, constants: dict[str, Any]
) -> None:
    """What `launch` does when there is no watcher."""
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options(config, constants))
    else:
        kernel[grid](*arguments, **options(config, constants))
