"""Running, comparing, timing and weighing the ways of computing a case."""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pvdm_fast import backends

DIRECTIONS = ("forward", "backward", "both")
Pack = Callable[[Sequence[Tensor]], Tensor]


def only(tensors: Sequence[Tensor]) -> Tensor:
    """Pack of a result that is one tensor already in the common form."""
    (tensor,) = tensors
    return tensor


@dataclass
class Runner:
    """One way of computing a case; made, with its inputs and weights, outside everything that is timed.

    run: computes the results from `inputs` and `parameters`, which it holds.
    inputs: differentiable ones; parameters: by name, the same names in every runner of a case.
    pack_inputs, pack_results: to the form in which the runners of a case are compared. (A runner may take three
        NCHW planes where another takes packed tokens.)
    """

    run: Callable[[], Sequence[Tensor]]
    inputs: list[Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    pack_inputs: Pack = only
    pack_results: Pack = only
    gradients: list[Tensor] = field(default_factory=list)

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.inputs, *self.parameters.values()]

    def infer(self) -> Sequence[Tensor]:
        with torch.no_grad():
            return self.run()

    def differentiate(self, results: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Gradients of inputs and parameters, from the gradient set by `seed_gradients`."""
        return torch.autograd.grad(results, self.leaves, self.gradients, allow_unused=True)

    def seed_gradients(self, packed: Tensor) -> None:
        """Lay out a gradient of the packed result as this runner's own results are (contiguous)."""
        with torch.enable_grad():
            results = [result.detach().requires_grad_() for result in self.infer()]
            gradients = torch.autograd.grad(self.pack_results(results), results, packed.to(results[0].dtype))
        self.gradients = [gradient.contiguous() for gradient in gradients]


@dataclass
class Prepared:
    """A case set up: runners by name, "ours" and "eager" among them, and what it needs at least.

    shape: for people. work: (FLOPs of the forward pass, bytes of inputs, of parameters, of results).
    truth: name of the runner that 16-bit runners are held against; its weights are theirs, in float32.
    """

    shape: str
    runners: dict[str, Runner]
    work: tuple[float, int, int, int]
    dtype: torch.dtype
    device: str
    truth: str = "eager"


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """|actual - expected| / |expected| in the 2-norm over all tensors of a list; infinite where one is not finite."""
    difference = total = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            return math.inf
        difference += float((a.detach().double() - e.detach().double()).square().sum())
        total += float(e.detach().double().square().sum())
    return math.sqrt(difference / max(total, 1e-300)) if math.isfinite(difference) else math.inf


Outcome = dict[str, list[Tensor]]


def outcome(runner: Runner, differentiate: bool) -> Outcome:
    """Results and gradients in the common form: "result", and the gradients "input" and "weights"."""
    if not differentiate:
        return {"result": [runner.pack_results(runner.infer())]}
    results = runner.run()
    gradients = [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(runner.leaves, runner.differentiate(results), strict=True)
    ]
    found = {"result": [runner.pack_results(results).detach()]}
    if runner.inputs:
        found["input"] = [runner.pack_inputs(gradients[: len(runner.inputs)])]
    if runner.parameters:
        found["weights"] = gradients[len(runner.inputs) :]
    return found


# Relative 2-norm in float32: as in the test-suite, blocks and operations 1e-5, whole networks 1e-4; the baseline's own
# error is of the same size, so twice that. 16 bits: at most twice the error of the eager computation in 16 bits (and
# where that is as good as exact, because it happens to round nothing in between, one rounding).
AGREEMENT = {"operation": 2e-5, "block": 2e-5, "network": 2e-4}
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


class Disagreement(AssertionError):
    """Ours and the baseline compute different things, so no time of theirs is worth reporting."""


def check_agreement(prepared: Prepared, kind: str, *, differentiate: bool = True) -> dict[str, dict[str, float]]:
    """Compare every runner with the truth, results and gradients.

    Returns:
        Error by runner and quantity.

    Raises:
        Disagreement: ours is further off than `AGREEMENT` or, in 16 bits, than twice the eager computation.
    """
    truth = prepared.runners[prepared.truth]
    first = next(iter(prepared.runners.values()))
    shape = first.pack_results(first.infer())
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(shape.shape, generator=generator).to(prepared.dtype).float().to(shape.device)
    for runner in prepared.runners.values():
        runner.seed_gradients(gradient)
    expected = outcome(truth, differentiate)
    errors: dict[str, dict[str, float]] = {}
    for name, runner in prepared.runners.items():
        if runner is truth:
            continue
        found = outcome(runner, differentiate)
        errors[name] = {key: relative_error(found[key], value) for key, value in expected.items()}
    for key, error in errors["ours"].items():
        allowed = AGREEMENT[kind]
        if prepared.dtype in ROUNDING:
            allowed = 2 * max(errors["eager"][key], ROUNDING[prepared.dtype])
        if not error <= allowed:
            raise Disagreement(f"{key}: ours differs by {error:.2e} from {prepared.truth}, allowed {allowed:.2e}")
    return errors


def seconds(runner: Runner, direction: str, device: str) -> float:
    """One timing of one direction; everything else it needs is done before the clock starts.

    "forward": without a graph, as in inference. "backward": of a graph just made. "both": a training step's pass.
    """
    graph = runner.run() if direction == "backward" else None
    clock = _GpuClock() if device == "cuda" else _CpuClock()
    clock.start()
    if direction == "forward":
        runner.infer()
    elif graph is not None:
        runner.differentiate(graph)
    else:
        runner.differentiate(runner.run())
    return clock.stop()


class _CpuClock:
    def start(self) -> None:
        self._start = time.perf_counter()

    def stop(self) -> float:
        return time.perf_counter() - self._start


class _GpuClock:
    """CUDA events around the work; the L2 cache is overwritten before."""

    def start(self) -> None:
        torch.empty(256 << 20, dtype=torch.int8, device="cuda").zero_()
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._events[0].record()

    def stop(self) -> float:
        self._events[1].record()
        torch.cuda.synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1000


@dataclass
class Timings:
    """Seconds of each runner by round; round i of every runner was measured in turn."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> tuple[float, float]:
        """First and third quartile."""
        return quartiles(self.seconds[name])

    def ratio(self, name: str) -> tuple[float, float, float]:
        """Time of `name` by ours: first quartile, median and third quartile over rounds."""
        ratios = [other / ours for other, ours in zip(self.seconds[name], self.seconds["ours"], strict=True)]
        low, high = quartiles(ratios)
        return low, statistics.median(ratios), high


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=4, method="inclusive")
    return cuts[0], cuts[2]


def rounds_for(round_seconds: float, budget: float, least: int = 3, most: int = 50) -> int:
    """How many alternating rounds fit in `budget` seconds."""
    return max(least, min(most, int(budget / max(round_seconds, 1e-9))))


def alternate(
    runners: Mapping[str, Runner], direction: str, device: str, *, budget: float = 1.0, rounds: int | None = None
) -> Timings:
    """Time the runners in turn, over and over; one round before that is not counted.

    Each round starts with another runner, so that none always finds the caches of the same predecessor.
    """
    warm = sum(seconds(runner, direction, device) for runner in runners.values())
    rounds = rounds or rounds_for(warm, budget)
    names = list(runners)
    found: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(seconds(runners[name], direction, device))
    return Timings(found)


def saved_bytes(run: Callable[[], Sequence[Tensor]], parameters: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages that the graph of `run()` keeps for its backward pass, parameters excluded.

    What a checkpointed function keeps (its inputs) is seen by the same hooks. Works on the meta device too.
    """
    excluded = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in excluded:
            kept[storage._cdata] = storage  # held, so that no other storage can take its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is on: `now`, and their highest sum, `peak`.

    Scratch inside a kernel is not seen. On the meta device nothing is allocated, so sizes that would not fit in memory
    can be weighed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self._alive:
                    self._count(storage)
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


@contextmanager
def record_backends() -> Iterator[dict[str, str]]:
    """The backend that really served each operation, while the context lasts: {"plane_norm": "cpu", ...}."""
    served: dict[str, str] = {}
    original = backends.choose
    names = {package: name for name, package in backends.PACKAGE.items()}

    def choose(op: str, name: str, tensor: Tensor) -> Any:
        module = original(op, name, tensor)
        served[op] = names.get(module.__name__.rpartition(".")[0], module.__name__)
        return module

    backends.choose = choose
    try:
        yield served
    finally:
        backends.choose = original
