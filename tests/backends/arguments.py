"""Every call that the operations make of a backend, recorded, and the memory layouts that its tensors may have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pvdm_fast.analysis.cases import SMALL, run_with_gradients
from pvdm_fast.analysis.projections import Projection
from pvdm_fast.backends import choice

LOGS = {"segment_attention": 3, "axial_attention": 6}  # index of the scores' log-sum-exp among backward's arguments


@dataclass(frozen=True)
class Call:
    """`forward` or `backward` of a backend's module, with its arguments."""

    case: str
    op: str
    direction: str
    arguments: tuple[Any, ...]

    def of(self, module: Any, *changed: Any) -> tuple[Tensor, ...]:
        results = getattr(module, self.direction)(*(changed or self.arguments))
        return results if isinstance(results, tuple) else (results,)

    def tensors(self) -> Iterator[tuple[int, Tensor]]:
        for index, argument in enumerate(self.arguments):
            if isinstance(argument, Tensor) and argument.dim() and argument.numel():
                yield index, argument

    def with_form(self, index: int, form: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
        """The arguments with one of them in another memory layout. If that changes its values, the scores'
        log-sum-exp is updated."""
        changed = list(self.arguments)
        changed[index] = form(changed[index])
        logs = LOGS.get(self.op) if self.direction == "backward" else None
        if logs is not None and index != logs:
            inputs = (*changed[1 : logs - 1], *changed[logs + 1 :])
            changed[logs] = choice.implementation("reference", self.op).forward(*inputs)[1]
        return tuple(changed)

    def forms(self, index: int) -> tuple[Callable[[Tensor], Tensor], ...]:
        """The memory layouts to test. Expected results come from the reference, which recomputes the log-sum-exp."""
        derived = self.direction == "backward" and LOGS.get(self.op) == index
        return SAME_VALUES if derived else FORMS


def recorded(dtype: torch.dtype) -> list[Call]:
    """The calls of all cases, computed by the reference."""
    calls: list[Call] = []
    running = ""
    with pytest.MonkeyPatch.context() as patch:

        def choose(op: str, name: str, inputs: Any) -> Any:
            module = choice.implementation("reference", op)

            def noting(direction: str) -> Callable[..., Any]:
                def run(*arguments: Any) -> Any:
                    kept = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in arguments)
                    calls.append(Call(running, op, direction, kept))
                    return getattr(module, direction)(*arguments)

                return run

            return SimpleNamespace(forward=noting("forward"), backward=noting("backward"))

        patch.setattr(choice, "choose", choose)
        for running, case in SMALL.items():  # noqa: B007, `choose` reads it
            run_with_gradients(case, case.inputs(dtype), dtype)
        running, projection = "triplane_project", Projection((2, 3, 2), "yt", channels=8, heads=2, head_width=4)
        tensors = [tensor.to(dtype).requires_grad_() for tensor in projection.tensors().values()]
        result = projection.run(*tensors)
        torch.autograd.grad(result, tensors, torch.randn_like(result))
    return calls


def sliced(x: Tensor) -> Tensor:
    """Inside a larger tensor, so that rows start at any address."""
    around = torch.full([size + 3 for size in x.shape], float("nan"), dtype=x.dtype)
    inside = around[tuple(slice(1, size + 1) for size in x.shape)]
    return inside.copy_(x)


def every_second(x: Tensor) -> Tensor:
    """The last axis has stride 2, with NaN in between."""
    return torch.stack((x, torch.full_like(x, float("nan"))), -1)[..., 0]


def reversed_order(x: Tensor) -> Tensor:
    """The memory order of all axes reversed."""
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def expanded(x: Tensor) -> Tensor:
    """One number everywhere: all strides are 0."""
    return x.flatten()[:1].view((1,) * x.dim()).expand_as(x)


def expanded_rows(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def expanded_columns(x: Tensor) -> Tensor:
    return x[..., :1].expand_as(x)


def overlapping(x: Tensor) -> Tensor:
    """All strides are 1: rows are dense, and start inside one another."""
    return x.flatten().as_strided(x.shape, (1,) * x.dim())


SAME_VALUES = (sliced, every_second, reversed_order)
FORMS = (*SAME_VALUES, expanded, expanded_rows, expanded_columns, overlapping)
