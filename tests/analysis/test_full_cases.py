"""The cases of full networks: every operation has some, and they are calls that the operations take."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pvdm_fast.analysis import cases, full_cases
from pvdm_fast.backends.choice import FUSED, FUSED_PROJECTION, OPERATIONS


def test_every_operation_has_full_sizes() -> None:
    assert {case.op for case in full_cases.FULL.values()} == {*OPERATIONS, *FUSED, *FUSED_PROJECTION}
    assert {case.op for case in full_cases.FUSED.values()} == set(FUSED)


@pytest.mark.parametrize("name", full_cases.FULL)
def test_full_sizes_are_taken(name: str) -> None:
    """By shapes alone, forward and backward: results have gradients of every input's shape."""
    case = full_cases.FULL[name]
    with FakeTensorMode(allow_non_fake_inputs=True):  # tables of rotations are real
        inputs = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in case.shapes.items()}
        inputs = cases.leaves(inputs)
        results = cases.as_tuple(case.run(**inputs))
        gradients = torch.autograd.grad(results, list(inputs.values()), [torch.empty_like(r) for r in results])
    assert [tuple(gradient.shape) for gradient in gradients] == list(case.shapes.values())


@pytest.mark.parametrize("name", full_cases.FUSED)
def test_scaled_weights_are_exact(name: str) -> None:
    """A case of the fused block computes the same of 16-bit inputs in every dtype: its scale is a power of two."""
    case = full_cases.FUSED[name]
    inputs = case.inputs(torch.bfloat16)
    exact = case.run(**{name: tensor.double() for name, tensor in inputs.items()})
    rounded = case.run(**{name: tensor.float() for name, tensor in inputs.items()})
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-5, atol=1e-5)
