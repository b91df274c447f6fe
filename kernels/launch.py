"""How a Triton kernel is launched: on its tensors' device, with blocks and warps from a table. Or watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pvdm_fast.backends import extensions


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


# What Triton compiled, by what its choice depends on; a network's launches are a few hundred.
MOST_COMPILED = 4096
_compiled: dict[Any, tuple[Any, tuple[Any, ...], Any]] = {}


def run(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], config: Config, constants: dict[str, Any]
) -> None:
    """What `launch` does when nobody watches.

    Triton finds out at every launch which of its compiled kernels fits, which takes 7 µs. Under the key of the
    arguments, which tells apart more than Triton does, all of this takes 4 (one thread of a Xeon, without a driver).
    """
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options(config, constants))
        return
    key = extensions.call_key()(*arguments)
    if key is None:  # something watches: Triton's own way tells it
        kernel[grid](*arguments, **options(config, constants))
        return
    # Kernel and configuration are compared as objects: both are kept, so that no other takes their place in memory.
    whole = (id(kernel), id(config), key, tuple(constants.values()))
    found = _compiled.get(whole)
    if found is None:
        compiled = kernel[grid](*arguments, **options(config, constants))
        if hasattr(compiled, "packed_metadata"):  # not from the interpreter
            if len(_compiled) >= MOST_COMPILED:
                _compiled.clear()
            rest = constants_in_order(kernel, len(arguments), config, constants)
            _compiled[whole] = compiled, rest, (kernel, config)
        return
    compiled, rest, _ = found
    compiled[(*grid, 1, 1)[:3]](*arguments, *rest)


def programs_for(tiles: int, config: Config) -> int:
    """How many programs share tiles where each has memory of its own: no more than it takes to be done at the same
    time, and at most the configuration's PROGRAMS."""
    rounds = -(-tiles // config.blocks["PROGRAMS"])
    return -(-tiles // rounds)


def constants_in_order(kernel: Any, given: int, config: Config, constants: dict[str, Any]) -> tuple[Any, ...]:
    """The compile-time constants as a compiled kernel takes them, after the `given` arguments: in its signature's
    order."""
    named = {**constants, **config.blocks}
    rest = list(kernel.signature.parameters.values())[given:]
    return tuple(named.get(parameter.name, parameter.default) for parameter in rest)
