"""Sums that programs share, in one launch: the last program to arrive adds what all have written, in order.

Each program writes its part to memory and counts itself (`is_last`). Whoever finds that all others are counted reads
the parts and adds them in their own order. So a sum has the same bits on every run: chance only decides who adds.

Why the last program sees every part, by PTX's memory model: `tl.debug_barrier` (bar.sync) orders the stores of a
program's threads before the atomic, which one of them does. It is acq_rel at the scope of the GPU. A release is
cumulative: it covers what that thread has seen through the barrier. And read-modify-writes continue a release sequence,
so the last one acquires from all before it. Triton hands its result to the other threads through shared memory, behind
another barrier, so their loads come later too. These loads are `.cg`: they pass by the L1 cache, which isn't coherent.
CUTLASS' semaphores and stream-K rely on the same.

Counters are zero between launches: the last program sets its own back, and the launch's end makes that visible. Two
launches that may run at the same time never share any. Launches of one stream share that stream's, because they follow
each other. Each launch that a CUDA graph captures gets counters that nobody else ever has, because the graph may be
replayed on any stream. (It never runs beside itself.) All are cut from one piece of memory for each device, made where
nothing is captured. So no graph contains its zeros, nor owns it.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pvdm_fast.kernels.configs import architecture

MOST_SUMS = 2048  # of a launch
# Counters of a device. A GPU's take 4 MiB: those of 64 streams, and of 300 graphs of the full-size denoiser's pass.
RESERVE = {"cuda": 1 << 20, "cpu": MOST_SUMS}
# Bytes that a last program reads, at most. A multiprocessor reads about 64 bytes a clock from the L2, so this takes it
# 2.5 us: as long as a second launch, which has the whole GPU, takes to start and end. Reasoned, not measured.
MOST_READ = 256 << 10


class _Counters:
    """The counters of one device, all zero."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.zeros(RESERVE[device.type], dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # any stream may be the next to use them
        self.used = 0
        self.of_stream: dict[int, Tensor] = {}

    def take(self, count: int) -> Tensor | None:
        """Counters that nobody else gets; None where none are left. They are aligned to 128 bytes."""
        start, self.used = self.used, self.used + -(-count // 32) * 32
        return self.memory[start : start + count] if self.used <= len(self.memory) else None


_of_device: dict[torch.device, _Counters] = {}
_changing = Lock()


def counters_for(x: Tensor, sums: int, read: int) -> Tensor | None:
    """Zeros to count programs with, for a launch on x's device and stream. None: let a second launch add.

    That is so on AMD's GPUs, where `tl.debug_barrier` doesn't wait for stores (see triplane_project.py), and where a
    last program would read so much that it takes longer. Also where a graph is captured before any launch outside of
    one, or after so many others that no counters are left.

    Args:
        sums: how many sums there are, each with a counter.
        read: bytes of the parts of one sum.
    """
    if sums > MOST_SUMS or read > MOST_READ or architecture(x.device).startswith("gfx"):
        return None
    if x.is_meta or isinstance(x, FakeTensor):
        return x.new_empty(sums, dtype=torch.int32)
    stream, found = stream_of(x.device), _of_device.get(x.device)
    if found is not None and stream in found.of_stream:
        return found.of_stream[stream]
    with _changing:
        if found is None and stream is not None:
            # In another thread neither modes of this one count, nor a graph's pool that it allocates from.
            with ThreadPoolExecutor(1) as aside:
                found = _of_device.setdefault(x.device, aside.submit(_Counters, x.device).result())
        if found is None:
            return None
        taken = found.take(sums if stream is None else MOST_SUMS)
        if stream is not None and taken is not None:
            taken = found.of_stream.setdefault(stream, taken)
        return taken


def most_parts(device: torch.device, size: int) -> int:
    """How many parts of `size` bytes a last program may add; on AMD's GPUs, where it never does, any number."""
    return sys.maxsize if architecture(device).startswith("gfx") else max(1, MOST_READ // size)


def stream_of(device: torch.device) -> int | None:
    """The stream that launches on this device go to; None while a graph captures it."""
    if device.type != "cuda":
        return 0
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return stream_of(device)
    return None if torch.cuda.is_current_stream_capturing() else torch._C._cuda_getCurrentRawStream(device.index)


@triton.jit
def is_last(counter, programs):
    """Whether all others of `programs` programs have been here. Then the caller sees what they stored before."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)
    return last
