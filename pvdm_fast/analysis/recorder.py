"""Watches operations as they reach PyTorch, below autograd, for whatever counts, records or measures calls."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Runs every operation that reaches PyTorch while it is active, including recomputation, and then calls
    `note`."""

    @abstractmethod
    def note(self, function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        """Called for each operation (a torch._ops.OpOverload), after it has run."""

    def __torch_dispatch__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        result = function(*args, **options)
        self.note(function, args, options, result)
        return result


class OwnCalls(Recorder):
    """Collects the calls of this package's operations in order: (function, arguments) each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def note(self, function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        if own_operation(function) is not None:
            self.calls.append((function, arguments))


def own_operation(function: Any) -> tuple[str, str] | None:
    """The name and direction of one of this package's operations. None for any other operation."""
    if function.namespace != "pvdm_fast":
        return None
    name = name_of(function)
    op, _, direction = name.rpartition("_")
    return (op, direction) if direction in ("backward", "jvp") else (name, "forward")


def name_of(function: Any) -> str:
    """An operation's name without its namespace and overload."""
    return str(function._schema.name.partition("::")[2])
