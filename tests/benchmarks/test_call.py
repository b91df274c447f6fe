"""What a call costs is compared with the same computation in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import call
from benchmarks.call import Call
from pvdm_fast.backends import choice

# How PyTorch's result lies otherwise than ours.
LAID: dict[str, Callable[[Tensor], Tensor]] = {
    "plane_norm": lambda theirs: theirs.transpose(1, 2),
    "segment_attention": lambda theirs: theirs.transpose(1, 2),
    "axial_attention": lambda theirs: theirs.permute(0, 3, 1, 2, 4).unflatten(2, (2, 2)),
}


@pytest.fixture(params=call.calls(), ids=lambda one: one.op)
def one(request: pytest.FixtureRequest) -> Call:
    return request.param


def test_both_compute_the_same(one: Call) -> None:
    tensors = [torch.randn_like(tensor) for tensor in one.tensors]  # biases of zero would say nothing
    theirs = one.theirs(*tensors)
    if one.op == "geglu":  # PyTorch's nearest is gelu alone, also of what ours takes as factors
        theirs = tensors[0].chunk(2, -1)[0] * theirs.chunk(2, -1)[1]
    torch.testing.assert_close(one.ours(*tensors), LAID.get(one.op, lambda same: same)(theirs))


def test_every_operation_has_its_row() -> None:
    assert sorted(one.op for one in call.calls()) == sorted(choice.OPERATIONS)


def test_the_table_has_both_directions() -> None:
    geglu = next(one for one in call.calls() if one.op == "geglu")
    found = call.measure(geglu, rounds=1, times=1)
    assert [row["direction"] for row in found] == ["forward", "both"]
    line = call.table(found).splitlines()[-1]
    assert line.startswith("| geglu | gelu | ") and len(line.split(" | ")) == 8
