"""FLOPs of products, counted without computing. A multiply-add is 2; exponentials, norms, activations are 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pvdm_fast.analysis.recorder import Recorder, own_operation
from pvdm_fast.ops.registry import FLOPS

# PyTorch's formulas are those of attention on GPUs. For a CPU's, which takes the same tensors, 2.14 for one has none.
ON_GPUS = {
    "_scaled_dot_product_flash_attention_for_cpu": "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "_scaled_dot_product_flash_attention_backward",
}


def operation_flops(op: str, direction: str, inputs: Sequence[Any]) -> int:
    """FLOPs of the products of one of this package's operations, as stated where it is registered.

    Args:
        direction: "forward", "backward" or "jvp".
        inputs: the registered operation's arguments, without the backend.
    """
    return FLOPS[op](direction, *inputs)


class FlopCount(Recorder):
    """Adds up the FLOPs of every product that reaches PyTorch while it is active, including recomputation."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def note(self, function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        if own := own_operation(function):
            *inputs, _backend = arguments
            self.total += operation_flops(*own, inputs)
        else:
            self.total += product_flops(function, arguments, options, result)


def product_flops(function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> int:
    """FLOPs of one of PyTorch's own operations, by PyTorch's formula. 0 if it multiplies no matrices."""
    from torch.utils.flop_counter import flop_registry  # takes 0.15 s, and few importers of this module count FLOPs

    packet = function._overloadpacket
    alike = ON_GPUS.get(packet.__name__)
    formula = flop_registry.get(getattr(torch.ops.aten, alike) if alike else packet)
    return int(formula(*arguments, **options, out_val=result)) if formula else 0
