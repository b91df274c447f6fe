"""FLOPs of products, found without computing: a multiply-add is 2; exponentials, norms and activations are none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pvdm_fast.ops.costs import attention, attention_block, conv, linear
from pvdm_fast.ops.registry import FLOPS

__all__ = ["FlopCount", "attention", "attention_block", "conv", "linear", "operation_flops"]


def operation_flops(op: str, direction: str, inputs: Sequence[Any]) -> int:
    """FLOPs of the products of one of this package's operations, as it states them where it is registered.

    Args:
        direction: "forward", "backward" or "jvp". inputs: the registered operation's arguments but the backend.
    """
    return FLOPS[op](direction, *inputs)


class FlopCount(TorchDispatchMode):
    """Adds up the FLOPs of every product that reaches PyTorch while it is on, those of recomputation too."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "pvdm_fast":
            name = function._schema.name.partition("::")[2]
            op, _, direction = name.rpartition("_")
            if direction not in ("backward", "jvp"):
                op, direction = name, "forward"
            *inputs, _backend = args
            self.total += operation_flops(op, direction, inputs)
        elif formula := flop_registry.get(function._overloadpacket):
            self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result
