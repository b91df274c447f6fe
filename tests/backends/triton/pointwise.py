"""Shared by the tests of the pointwise Triton kernels: memory layouts, and comparing in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from comparison import assert_close
from inputs import transposed
from tolerances import OPERATION
from torch import Tensor

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": transposed,
    "channels first": lambda t: t.mT.contiguous().mT,
    "stride 0 rows": lambda t: t[:, :1].expand_as(t),
    "all stride 0": lambda t: t[(slice(1),) * t.dim()].expand_as(t),
    "slice of wider rows": lambda t: torch.cat((t, torch.full_like(t, float("nan"))), -1)[..., : t.shape[-1]],
}


def wide(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


def compare(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, OPERATION[a.dtype], f"{what}, result {index}")


def same_again(run: Callable[[], Sequence[Tensor]]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
