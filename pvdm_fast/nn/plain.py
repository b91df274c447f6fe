"""Whether a layer is exactly as built. Only then may its weights be read instead of calling it.

The networks compute several layers in one operation, from the layers' weights. An adapter (LoRA), a hook, a
parametrization, a quantised or otherwise replaced layer would then silently do nothing. So every place that reads a
layer's weights asks here first. If the answer is no, it calls the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import (  # global hooks are dictionaries without a public reader
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from pvdm_fast.nn import copies

# Tensors of other classes (quantised ones, for example) compute in their own way.
TENSORS = frozenset({Tensor, nn.Parameter, FakeTensor, FunctionalTensor})

# (kernel, stride, padding, dilation, groups, padding mode)
POINTWISE_1D = ((1,), (1,), (0,), (1,), 1, "zeros")
POINTWISE_2D = ((1, 1), (1, 1), (0, 0), (1, 1), 1, "zeros")
THREE_BY_THREE = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")

# What calling a layer does, by its class. Other code may replace the method later.
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {}
_MULTIPLY = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
Module = TypeVar("Module", bound=type[nn.Module])
Weights = tuple[Tensor, Tensor]  # of a plain layer: weight and bias


def readable(kind: Module) -> Module:
    """Class decorator: plain layers of this class may be computed from their weights."""
    _FORWARDS[kind] = kind.forward
    return kind


for _kind in (*_MULTIPLY, nn.LayerNorm, nn.Identity, nn.SiLU, nn.Sequential):
    readable(_kind)


def multiplies(kind: type[nn.Module]) -> bool:
    """Whether `kind` is a `readable` class of layers that multiply by a weight, which autocast casts."""
    return kind in _FORWARDS and issubclass(kind, _MULTIPLY)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what the `readable` class `kind` says, and nothing else.

    It doesn't if its class is another (even a subclass: a parametrization makes one), if it has its own forward (hooks
    of accelerate and diffusers set one), if its call is compiled separately, or if there is any hook, its own or a
    global one. The test takes half a microsecond. Nothing is cached between calls, because hooks come and go without
    notice.
    """
    state = module.__dict__
    return not (
        type(module) is not kind
        or state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_compiled_call_impl" in state
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
        or kind.forward is not _FORWARDS.get(kind)
    )


def weights_of(module: nn.Module, kind: type[nn.Module], shape: tuple[Any, ...] | None = None) -> Weights | None:
    """Weight and bias of a layer, for reading, if it `is_plain` and has both. None means that you must call it.

    Under autocast they are the copies that this pass has of them: see `casting`.

    Args:
        shape: of a convolution, such as POINTWISE_2D. With another kernel, stride or padding you must call it too.
    """
    if not is_plain(module, kind):
        return None
    parameters = module.__dict__["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if type(weight) not in TENSORS or type(bias) not in TENSORS or (shape is not None and shape != shape_of(module)):
        return None
    return (weight, bias) if copies.active() is None else (copies.of(weight), copies.of(bias))


def weight_of(module: nn.Module, kind: type[nn.Module]) -> Tensor | None:
    """The weight, or its copy, of a layer that `is_plain` and has no bias, for reading; None: call it."""
    if not is_plain(module, kind):
        return None
    parameters = module.__dict__["_parameters"]
    weight = parameters.get("weight")
    return copies.of(weight) if type(weight) in TENSORS and parameters.get("bias") is None else None


def shape_of(conv: nn.Module) -> tuple[Any, ...]:
    """How a convolution slides over its input: kernel, stride, padding, dilation, groups, padding mode."""
    state = conv.__dict__
    return (
        state["kernel_size"],
        state["stride"],
        state["padding"],
        state["dilation"],
        state["groups"],
        state["padding_mode"],
    )
