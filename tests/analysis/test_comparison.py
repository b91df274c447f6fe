"""The one measure of how far apart results are, and the one recorder of calls."""

from __future__ import annotations

import math

import pytest
import torch

from pvdm_fast import ops
from pvdm_fast.analysis.cases import SMALL, USUAL, Case
from pvdm_fast.analysis.comparison import relative_error
from pvdm_fast.analysis.flops import FlopCount
from pvdm_fast.analysis.recorder import OwnCalls, own_operation


def test_the_error_is_relative_over_all_tensors() -> None:
    exact = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    found = [torch.tensor([3.0, 0.3]), torch.tensor([[4.4]])]
    assert relative_error(found, exact) == pytest.approx(0.1, rel=1e-6)
    assert relative_error(found[0], exact[0]) == pytest.approx(0.1, rel=1e-6)
    assert relative_error(torch.tensor(1e-20), torch.tensor(0.0)) == pytest.approx(1e-20)


@pytest.mark.parametrize("bad", [torch.tensor([math.nan]), torch.tensor([math.inf]), torch.ones(2)])
def test_what_cannot_be_compared_passes_no_tolerance_and_is_none(bad: torch.Tensor) -> None:
    good = torch.ones(1)
    for error in (relative_error(bad, good), relative_error(good, bad)):
        assert not error <= 1e9
        assert not 2 * error >= 0.0, "as an allowance it allows nothing"


def test_own_operations_are_told_from_others() -> None:
    x = torch.ones(2, 4, requires_grad=True)
    with OwnCalls() as recorder:
        (ops.geglu(x) + 1).sum().backward()
    found = [own_operation(function) for function, _ in recorder.calls]
    assert found == [("geglu", "forward"), ("geglu", "backward")]
    assert own_operation(torch.ops.aten.add.Tensor) is None


@pytest.mark.parametrize(
    "case", [case for table in (SMALL, USUAL) for case in table.values() if case.flops], ids=lambda case: case.op
)
def test_a_case_states_the_least_flops(case: Case) -> None:
    """FLOPs are those of the kernels. (triplane_expand maps each lattice token, though mapping each plane token
    would do.)"""
    with FlopCount() as count:
        case.run(**case.inputs(torch.float32))
    assert (case.flops <= count.total) if case.op == "triplane_expand" else (case.flops == count.total)
