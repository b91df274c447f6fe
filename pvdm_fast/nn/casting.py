"""Under autocast, a network's weights are cast once a pass, not one by one in the layers that multiply with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pvdm_fast.nn import copies
from pvdm_fast.nn.plain import TENSORS, is_plain, multiplies
from pvdm_fast.ops.derivatives import autocast_dtype, transforming


def run(modules: Iterable[nn.Module], device: torch.device, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), with the weights of all plain layers in `modules` cast to autocast's dtype beforehand.

    The gradients come back in float32, as they do from single casts. Where autocast is off nothing is done. Nor is it
    in compiled code, where the casts are part of the graph, and in transforms of `torch.func`: there each layer casts.
    The same holds for a layer that isn't plain, and for sharded weights, which are not there yet.
    """
    if torch.compiler.is_compiling():
        return function(*arguments)
    dtype = autocast_dtype(device.type)
    if dtype is None or transforming():
        return function(*arguments)
    return copies.run_with(copies.make(device.type, dtype, _weights(modules)), function, *arguments)


def _weights(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Weights and biases in float32, each once, in the order in which the modules were built."""
    found: dict[int, Tensor] = {}
    pending = list(modules)[::-1]
    while pending:
        module = pending.pop()
        state = module.__dict__
        if multiplies(type(module)) and is_plain(module, type(module)):
            for weight in state["_parameters"].values():
                if type(weight) in TENSORS and weight.dtype is torch.float32:
                    found[id(weight)] = weight
        pending.extend(child for child in reversed(state["_modules"].values()) if child is not None)
    return list(found.values())
