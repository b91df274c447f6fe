"""The last program to arrive adds: in any order of arrival, with counters that nobody else has at the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pvdm_fast.backends import choice

pytestmark = pytest.mark.skipif(
    not choice.interpreting(), reason="needs Triton's interpreter: run with TRITON_INTERPRET=1"
)
pytest.importorskip("triton", reason="needs Triton: pip install triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from backends.triton.interpreter import arriving  # noqa: E402

from pvdm_fast.kernels import arrivals  # noqa: E402
from pvdm_fast.kernels.configs import assume  # noqa: E402

X, BLOCK = torch.ones(1), 16


def shuffled(seed: int) -> Callable[[int], Sequence[int]]:
    return lambda count: torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


ORDERS: dict[str, Callable[[int], Sequence[int]]] = {
    "reversed": lambda count: range(count - 1, -1, -1),
    **{f"shuffled {seed}": shuffled(seed) for seed in range(3)},
}


@triton.jit
def shared_sum(x, parts, out, counters, BLOCK: tl.constexpr):
    """out (sums, BLOCK) = x (sums, programs, BLOCK) summed over programs, by whoever comes last."""
    own, programs = tl.program_id(0), tl.num_programs(1)
    at = own * programs * BLOCK + tl.arange(0, BLOCK)
    here = at + tl.program_id(1) * BLOCK
    tl.store(parts + here, tl.load(x + here))
    if arrivals.is_last(counters + own, programs):
        total = tl.zeros([BLOCK], tl.float32)
        for program in range(programs):
            total += tl.load(parts + at + program * BLOCK)
        tl.store(out + own * BLOCK + tl.arange(0, BLOCK), total)


def run(x: Tensor, counters: Tensor) -> Tensor:
    out = torch.full((x.shape[0], BLOCK), float("nan"))
    shared_sum[x.shape[:2]](x, torch.empty_like(x), out, counters, BLOCK=BLOCK)
    return out


@pytest.mark.parametrize("order", ORDERS)
def test_who_comes_last_makes_no_difference(order: str) -> None:
    x, counters = torch.randn(3, 7, BLOCK), torch.zeros(3, dtype=torch.int32)
    expected = torch.zeros(3, BLOCK)
    for part in range(7):
        expected += x[:, part]
    for _ in range(2):
        with arriving(ORDERS[order]):
            assert torch.equal(run(x, counters), expected)
        assert not counters.any()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int | None]]:
    """Nothing is held yet, and the last element is the stream in use; None: a graph captures it."""
    current: list[int | None] = [0]
    monkeypatch.setattr(arrivals, "_of_device", {})
    monkeypatch.setattr(arrivals, "stream_of", lambda device: current[-1])
    monkeypatch.setitem(arrivals.RESERVE, "cpu", 3 * arrivals.MOST_SUMS)
    return current


def counters(sums: int = 5, read: int = 8) -> Tensor:
    found = arrivals.counters_for(X, sums, read)
    assert found is not None and len(found) >= sums and found.dtype == torch.int32 and not found.any()
    return found


def overlap(a: Tensor, b: Tensor) -> bool:
    first, second = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in (a, b))
    return second[0] < first[1]


def test_a_stream_keeps_its_counters_and_shares_none(streams: list[int | None]) -> None:
    first = counters()
    assert counters(70) is first
    streams.append(7)
    second = counters()
    assert not overlap(first, second) and counters() is second
    streams.append(0)
    assert counters() is first


def test_every_captured_launch_has_its_own(streams: list[int | None]) -> None:
    """Graphs may be replayed side by side, on any streams."""
    kept = [counters()]
    streams.append(None)
    kept += [counters(sums) for sums in (5, 5, 33, 1)]
    streams.append(1)
    kept.append(counters())
    assert not any(overlap(a, b) for i, a in enumerate(kept) for b in kept[:i])
    assert all(c.data_ptr() % 128 == kept[0].data_ptr() % 128 for c in kept)  # no other code is compiled for one


def test_a_second_launch_where_there_are_none(streams: list[int | None]) -> None:
    """Before anything ran outside of a graph, since zeros would be captured, and where all are given away."""
    streams.append(None)
    assert arrivals.counters_for(X, 5, 8) is None
    streams.append(0)
    counters()
    streams.append(None)
    taken = 0
    while arrivals.counters_for(X, 1000, 8) is not None:
        taken += 1
    assert taken == 4
    streams.append(3)
    assert arrivals.counters_for(X, 5, 8) is None
    streams.append(0)
    counters()


def test_a_second_launch_where_it_is_better() -> None:
    assert arrivals.counters_for(X, arrivals.MOST_SUMS, arrivals.MOST_READ) is not None
    assert arrivals.counters_for(X, arrivals.MOST_SUMS + 1, arrivals.MOST_READ) is None
    assert arrivals.counters_for(X, arrivals.MOST_SUMS, arrivals.MOST_READ + 1) is None
    with assume("gfx942"):
        assert arrivals.counters_for(X, 1, 1) is None


def test_shapes_alone_leave_nothing_behind(streams: list[int | None]) -> None:
    with FakeTensorMode():
        assert arrivals.counters_for(torch.empty(3), 5, 8) is not None
    with assume("sm90"):
        meta = arrivals.counters_for(torch.empty(3, device="meta"), 5, 8)
    assert meta is not None and meta.is_meta
    assert not arrivals._of_device
