"""How an operation is called: straight to its backend where nothing watches, through the dispatcher where something
does, with the same numbers and the same errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from pvdm_fast import ops, use_backend
from pvdm_fast.analysis.cases import SMALL, USUAL, run_with_gradients
from pvdm_fast.backends import choice, extensions
from pvdm_fast.errors import BackendError
from pvdm_fast.ops import operation

pytestmark = [
    pytest.mark.skipif(
        extensions.availability("cpu") is not None,
        reason="needs the compiled extension: install it with a C++ compiler",
    ),
    pytest.mark.skipif(
        not hasattr(Tensor, "__dlpack_c_exchange_api__"),
        reason="needs DLPack's functions: install PyTorch 2.10 or newer",
    ),
]


@contextmanager
def no_dispatcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever goes through PyTorch's dispatcher fails."""

    def refuse(*arguments: Any) -> None:
        pytest.fail("went through the dispatcher")

    with monkeypatch.context() as patch:
        for each in operation._operations:
            patch.setattr(each, "_overload", refuse)
        yield


@contextmanager
def only_dispatcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(extensions, "call_key", lambda: lambda *arguments: None)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SMALL)
def test_same_bits_as_through_the_dispatcher(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL[name]
    inputs = case.inputs(dtype)
    with only_dispatcher(monkeypatch):
        expected = run_with_gradients(case, inputs, torch.bfloat16)
    with no_dispatcher(monkeypatch):
        for _ in range(2):  # with a new key, and with a known one
            found = run_with_gradients(case, inputs, torch.bfloat16)
        with torch.no_grad():
            alone = case.run(**inputs)
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        assert torch.equal(found[what], value), what
    for index, value in enumerate(alone if isinstance(alone, tuple) else (alone,)):
        assert torch.equal(value, expected[f"output {index}"])


def key_of(*arguments: Any) -> bytes | None:
    return extensions.call_key()(*arguments)


class Subclass(Tensor):
    pass


def test_keys_tell_apart_what_kernels_depend_on() -> None:
    x = torch.zeros(4, 8)
    others = [x[:, ::2], x.t(), x.double(), x.bfloat16(), x[:2], x[None], torch.zeros(33)[1:].view(4, 8), 1, 1.0, True]
    others += [None, "xy", [1], (1, 2)]
    keys = [key_of(value, "auto") for value in (x, *others)]
    assert None not in keys and len(set(keys)) == len(keys)
    assert key_of(x, "auto") == key_of(x.clone(), "auto") == key_of(torch.nn.Parameter(x), "auto")
    assert key_of([1, 2], "a") == key_of((1, 2), "a")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch._neg_view(torch.ones(2)),
        lambda: torch.empty(2, device="meta"),
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.empty(0),
        lambda: torch.ones(2).as_subclass(Subclass),
        lambda: torch._efficientzerotensor(3),
        lambda: 2**70,
        lambda: object(),
        lambda: {"a": 1},
        lambda: list(range(500)),
    ],
    ids=["negated", "meta", "sparse", "empty", "subclass", "zero", "large", "object", "dict", "long"],
)
def test_no_key_for_other_arguments(make: Callable[[], Any]) -> None:
    assert key_of(make()) is None
    assert key_of(torch.ones(1)) is not None


WATCHERS: dict[str, Callable[[], Any]] = {
    "fake": FakeTensorMode,
    "flops": lambda: FlopCounterMode(display=False),
    "device": lambda: torch.device("cpu"),
    "forward mode": forward_ad.dual_level,
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
}


@pytest.mark.parametrize("name", WATCHERS)
def test_no_key_where_something_watches(name: str) -> None:
    x = torch.ones(2)
    with WATCHERS[name]():
        assert key_of(x) is None
    assert key_of(x) is not None


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, lambda f: torch.jit.trace(f, torch.ones(2))])
def test_no_key_under_transforms(transform: Any) -> None:
    found = []

    def function(x: Tensor) -> Tensor:
        found.append(key_of(x))
        return x.sum()

    transform(function)(torch.ones(2))
    assert found[0] is None and key_of(torch.ones(2)) is not None


def test_views_that_are_negated_when_read() -> None:
    x = torch.randn(2, 8)
    ops.geglu(x)
    assert torch.equal(ops.geglu(torch._neg_view(x)), ops.geglu(-x))


@pytest.mark.parametrize(("shape", "dtype"), [((3,), None), ((4, 3), None), ((4,), torch.int32), ((1, 0), None)])
def test_the_same_errors(shape: tuple[int, ...], dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = torch.ones(shape, dtype=dtype)
    ops.geglu(torch.ones(4, 4))  # its key is known
    with only_dispatcher(monkeypatch), pytest.raises(ValueError, match="geglu") as expected:
        ops.geglu(wrong)
    for _ in range(2):  # nothing is kept of a call that is refused
        with pytest.raises(ValueError, match="geglu") as found:
            ops.geglu(wrong)
        assert str(found.value) == str(expected.value)


def test_backends_by_name() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(ops.geglu(x), ops.geglu(x))  # by the reference
    with use_backend("cpu"), pytest.raises(BackendError, match="float64"):
        ops.geglu(x)
    with use_backend("reference"):
        assert choice.requested() == "reference"
        ops.geglu(x.float())
    keys = operation._operations
    assert sum(len(each._runs) for each in keys) == 2


def test_keys_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "MOST_KEYS", 3)
    for rows in range(1, 12):
        assert ops.geglu(torch.ones(rows, 4)).shape == (rows, 2)
        assert all(len(each._runs) <= 3 for each in operation._operations)


def test_products_inside_are_not_cast_again() -> None:
    """plane_conv's products are PyTorch's own, which autocast would take in bfloat16."""
    case = SMALL["plane_conv"]
    inputs = case.inputs(torch.float64)
    expected = case.run(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.run(**inputs)  # float64 stays
    assert found.dtype == torch.float64 and torch.equal(found, expected)
    assert torch.is_autocast_enabled("cpu") is False


def functions_entered(step: Callable[[], Any]) -> int:
    """Python functions that a call enters."""
    entered = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call"

    step()
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return entered


# What a call costs, in a unit that no other process disturbs. Through the dispatcher it is 25 to 52 functions.
MOST_FUNCTIONS = 18


# Not of those that compute in Python: plane_conv's products are PyTorch's, and the reference resamples.
@pytest.mark.parametrize("name", [name for name in USUAL if USUAL[name].op not in ("plane_conv", "plane_resample")])
def test_python_of_a_call(name: str) -> None:
    case = USUAL[name]
    inputs = case.inputs(torch.float32)
    with torch.no_grad():
        assert functions_entered(lambda: case.run(**inputs)) <= MOST_FUNCTIONS
