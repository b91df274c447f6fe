"""Which calls the networks make of the operations, recorded without running them."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from pvdm_fast.analysis.workload import Call, TensorSpec, calls
from pvdm_fast.backends.choice import FUSED, FUSED_PROJECTION, OPERATIONS
from pvdm_fast.ops import fusing

space_rule = import_module("pvdm_fast.ops.space_attention_heads")  # the package has a function of that name
HALF, SINGLE = torch.bfloat16, torch.float32


def dtypes(found: list[Call], op: str) -> set[torch.dtype]:
    return {a.dtype for call in found if call.op == op for a in call.arguments if isinstance(a, TensorSpec)}


@pytest.mark.slow
def test_every_operation_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "LEAST_TOKENS", 1)
    monkeypatch.setattr(space_rule, "LEAST_SITES", 1)
    found = {(call.op, call.direction) for call in calls("small", HALF)}
    training = {(op, direction) for op in OPERATIONS for direction in ("forward", "backward")}
    both = {(op, direction) for op in FUSED_PROJECTION for direction in ("forward", "backward")}
    assert found == training | both | {(op, "forward") for op in FUSED}


def test_calls_of_a_dtype_follow_from_another() -> None:
    """Statistics and rotation tables stay float32."""
    half = calls("tiny", HALF)
    assert [call.with_dtype(HALF, SINGLE) for call in half] == calls("tiny", SINGLE)
    assert dtypes(half, "plane_conv") == {HALF}


def test_mixed_precision() -> None:
    found = calls("tiny", HALF, mixed=True)
    assert dtypes(found, "plane_conv") == {HALF}
    assert dtypes(found, "add_layer_norm") == {HALF, SINGLE}


def test_other_heads() -> None:
    found = calls("tiny", HALF, denoiser={"num_heads": 1}, autoencoder={"head_dim": 32})
    widths = {call.op: call.arguments[0].shape[-1] for call in found if call.op.endswith("attention")}
    assert widths["segment_attention"] == 64


def test_defaults_are_restored() -> None:
    with pytest.raises(ValueError, match="no preset 'huge'"):
        calls("huge", HALF)
    calls("tiny", HALF)
    assert torch.get_default_dtype() == SINGLE


def test_inputs_have_the_recorded_strides() -> None:
    base = torch.zeros(4, 6, 8)[1:, ::2, 1:5]
    spec = TensorSpec.of(base)
    (made, planes), device = Call("op", "forward", (spec, (1, 2))).inputs("cpu", lambda s: s.fill_(3)), "meta"
    assert planes == [1, 2]
    assert (made.shape, made.stride(), made.storage_offset()) == (base.shape, base.stride(), base.storage_offset())
    assert (made == 3).all()
    assert spec.make(device, lambda s: s).is_meta
    expanded = TensorSpec.of(torch.zeros(1).expand(5)).make("cpu", lambda s: s)
    assert expanded.stride() == (0,)
    empty = TensorSpec.of(torch.zeros(0, 3)).make("cpu", lambda s: s)
    assert empty.shape == (0, 3)
