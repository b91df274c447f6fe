"""How this package calls its registered operations: past PyTorch's dispatcher where nothing watches the call.

The dispatcher's way runs through Python twice and checks every time: a call of tiny tensors took 14 to 66 µs, where
PyTorch's own take 4 to 68. So a call first asks for its key: what it depends on, values aside, made in C++ in 0.9 µs
(see csrc/bindings/call_key.h). Under one key the arguments are checked and a backend is chosen once.

There is no key, and the call goes through the dispatcher, where torch.compile, `torch.func`, forward-mode AD, a mode, a
tracer or the profiler is at work, where a tensor is of a subclass, and where the compiled extension is missing or
PyTorch is older than 2.10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pvdm_fast.backends import choice, extensions
from pvdm_fast.ops import derivatives

# Keys an operation keeps. A network has some ten of each; shapes that change with every clip must not fill the memory.
MOST_KEYS = 1024
# Looked up once: each dot costs 30 ns.
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad
_is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
_operations: list[Operation] = []


class Operation:
    """One direction of an operation, called with its schema's arguments: the backend asked for is the last.

    Args:
        overload: as registered.
        check: of the arguments without the backend; raises.
        differentiable: its `torch.autograd.Function`, applied to the arguments and to what computes them.
    """

    def __init__(self, op: str, direction: str, overload: Any, check: Callable[..., None], differentiable: Any) -> None:
        self._op, self._direction, self._overload, self._check = op, direction, overload, check
        self._differentiable = differentiable
        self._runs: dict[bytes, Callable[..., Any]] = {}
        _operations.append(self)

    def __call__(self, *arguments: Any) -> Any:
        if _is_compiling():
            return self._overload(*arguments)
        key = extensions.call_key()(*arguments)
        if key is None:
            return self._overload(*arguments)
        run = self._runs.get(key) or self._prepare(key, arguments)
        if _is_grad_enabled() and _any_requires_grad(*arguments):  # `derivatives.records`, in line
            return self._differentiable.apply(*arguments, run)
        return run(*arguments, alone=True)

    def _prepare(self, key: bytes, arguments: Sequence[Any]) -> Callable[..., Any]:
        *inputs, backend = arguments
        self._check(*inputs)
        first = inputs[0]
        if first.is_cuda and first.dtype == torch.float32:  # the choice follows PyTorch's switches, which may change
            run = choosing(self._op, self._direction)
        else:
            run = serving(self._op, self._direction, choice.choose(self._op, backend, inputs))
        if len(self._runs) >= MOST_KEYS:
            self._runs.clear()
        self._runs[key] = run
        return run


def choosing(op: str, direction: str) -> Callable[..., Any]:
    """What computes an operation's checked arguments by the backend that is chosen for them, call by call."""

    def run(*arguments: Any, alone: bool = False) -> Any:
        *inputs, backend = arguments
        return serving(op, direction, choice.choose(op, backend, inputs))(*arguments, alone=alone)

    return run


def serving(op: str, direction: str, module: Any) -> Callable[..., Any]:
    """What computes an operation's checked arguments by a backend's module, or by the reference where that has no
    kernel for `direction`.

    Called with `alone`, no backward pass follows: a module may have `<direction>_alone`, which returns None in place of
    what it would save.
    """
    if not hasattr(module, direction):  # forward-mode derivatives have few kernels
        derivatives.say(op, "its gradient" if direction == "backward" else "its forward-mode derivative")
        module = choice.implementation("reference", op)

    unrecorded = f"{direction}_alone" if hasattr(module, f"{direction}_alone") else direction

    def run(*arguments: Any, alone: bool = False) -> Any:
        function = getattr(module, unrecorded if alone else direction)
        if not _is_any_autocast_enabled():
            return function(*arguments[:-1])
        # The dtypes are settled by now: what is inside must not be cast again.
        with derivatives.without_autocast(arguments[0].device.type):
            return function(*arguments[:-1])

    return run


def forget() -> None:
    """Drop what was prepared, where tests change what there is to choose from."""
    for operation in _operations:
        operation._runs.clear()
