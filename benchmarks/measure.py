"""Runs the ways of computing a case, compares them, and measures their time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.floors import Work, work
from benchmarks.machine import Others
from pvdm_fast.analysis.comparison import relative_error
from pvdm_fast.backends import choice

DIRECTIONS = ("forward", "backward", "both")
Pack = Callable[[Sequence[Tensor]], Tensor]


def only(tensors: Sequence[Tensor]) -> Tensor:
    """Packing for a single tensor that already has the common form."""
    (tensor,) = tensors
    return tensor


@dataclass
class Runner:
    """One way of computing a case. It is made with its inputs and weights before any timing.

    run: computes the results from its own `inputs` and `parameters`.
    inputs: the differentiable ones. parameters: by name, with the same names in every runner of a case.
    pack_inputs, pack_results: bring tensors into a common form for comparison. (One runner may take three NCHW planes,
    another packed tokens.)
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

    def seed_gradients(self, results: Sequence[Tensor], packed: Tensor) -> None:
        """Use a gradient of the packed result as the incoming gradient, with the layout of this runner's results."""
        with torch.enable_grad():
            detached = [result.detach().requires_grad_() for result in results]
            gradients = torch.autograd.grad(self.pack_results(detached), detached, packed.to(detached[0].dtype))
        self.gradients = [gradient.contiguous() for gradient in gradients]

    def step(self, direction: str) -> Callable[[], object]:
        """What is timed in a direction. All preparation happens before, in this call.

        "forward": without a graph, as in inference. "backward": of a new graph. "both": the pass of a training step.
        """
        if direction == "forward":
            return self.infer
        if direction == "backward":
            graph = self.run()
            return lambda: self.differentiate(graph)
        return lambda: self.differentiate(self.run())


@dataclass
class Prepared:
    """A prepared case: runners by name, including "ours" and "eager", and the least work it needs.

    shape: a text for readers. flops: the least of the forward pass. written: bytes of the results, known after they
    were computed. truth: name of the runner that 16-bit runners are compared with. It has the same weights in float32.
    """

    shape: str
    runners: dict[str, Runner]
    flops: float
    dtype: torch.dtype
    device: str
    truth: str = "eager"
    written: int = 0

    def work(self, direction: str) -> Work:
        ours = self.runners["ours"]
        read, weights = (sum(t.nbytes for t in ts) for ts in (ours.inputs, ours.parameters.values()))
        return work(direction, self.flops, read, weights, self.written)


Outcome = dict[str, list[Tensor]]


def outcome(runner: Runner, differentiate: bool) -> tuple[Outcome, Sequence[Tensor]]:
    """Results and gradients in the common form ("result", and the gradients "input" and "weights"), and the raw
    results.

    The gradient of the packed result is random, the same for every runner of a case.
    """
    results = runner.run() if differentiate else runner.infer()
    packed = runner.pack_results(results)
    if not differentiate:
        return {"result": [packed]}, results
    gradient = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    runner.seed_gradients(results, gradient.to(packed.device))
    gradients = [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(runner.leaves, runner.differentiate(results), strict=True)
    ]
    found = {"result": [packed.detach()]}
    if runner.inputs:
        found["input"] = [runner.pack_inputs(gradients[: len(runner.inputs)])]
    if runner.parameters:
        found["weights"] = gradients[len(runner.inputs) :]
    return found, results


# Relative 2-norm in float32. As in the tests: 1e-5 for operations and blocks, 1e-4 for whole networks. The baseline's
# own error is of the same size, so twice that. In 16 bits: at most twice the error of the eager computation in 16 bits.
# (If eager is as good as exact because it rounds nothing in between, one rounding.)
AGREEMENT = {"operation": 2e-5, "block": 2e-5, "network": 2e-4}
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


class Disagreement(AssertionError):
    """Ours and the baseline compute different things, so their times aren't worth reporting."""


def check_agreement(prepared: Prepared, kind: str, *, differentiate: bool = True) -> dict[str, dict[str, float]]:
    """Compare every runner with the truth, results and gradients.

    Returns:
        Error by runner and quantity.

    Raises:
        Disagreement: our error is above `AGREEMENT` or, in 16 bits, above twice that of the eager computation.
    """
    truth = prepared.runners[prepared.truth]
    expected, _ = outcome(truth, differentiate)
    errors: dict[str, dict[str, float]] = {}
    for name, runner in prepared.runners.items():
        if runner is truth:
            continue
        found, results = outcome(runner, differentiate)
        errors[name] = {key: relative_error(found[key], value) for key, value in expected.items()}
        if name == "ours":
            prepared.written = sum(result.nbytes for result in results)
    for key, error in errors["ours"].items():
        allowed = AGREEMENT[kind]
        if prepared.dtype in ROUNDING:
            rival = "eager" if "eager" in errors else "sdpa"
            allowed = 2 * max(errors.get(rival, {}).get(key, 0.0), ROUNDING[prepared.dtype])
        if not error <= allowed:
            raise Disagreement(f"{key}: ours differs by {error:.2e} from {prepared.truth}, allowed {allowed:.2e}")
    return errors


def seconds(runner: Runner, direction: str, device: str) -> float:
    """Time one direction once (see `Runner.step`)."""
    step = runner.step(direction)
    clock = _GpuClock() if device == "cuda" else _CpuClock()
    clock.start()
    step()
    return clock.stop()


class _CpuClock:
    def start(self) -> None:
        self._start = time.perf_counter()

    def stop(self) -> float:
        return time.perf_counter() - self._start


class _GpuClock:
    """CUDA events around the work. The L2 cache is overwritten first."""

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
    """Seconds of each runner by round; round i of every runner was measured in turn.

    others: cores that other programs kept busy meanwhile.
    """

    seconds: dict[str, list[float]]
    others: float = 0.0

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def spread(self, name: str) -> tuple[float, float]:
        """The first and third quartile."""
        return quartiles(self.seconds[name])

    def ratio(self, name: str) -> tuple[float, float, float]:
        """Time of `name` relative to ours: first quartile, median and third quartile over rounds."""
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


def warm_up(
    runners: Mapping[str, Runner], direction: str, device: str, budget: float, rounds: int | None = None
) -> int:
    """Run each once: the first call in a direction may compile, so it says nothing about a round.

    Returns:
        How many alternating rounds are to follow: `rounds`, otherwise what one more shows to fit in `budget` seconds.
    """
    for runner in runners.values():
        seconds(runner, direction, device)
    if rounds is not None:
        return rounds
    return rounds_for(sum(seconds(runner, direction, device) for runner in runners.values()), budget)


def alternate(
    runners: Mapping[str, Runner],
    direction: str,
    device: str,
    *,
    budget: float = 1.0,
    rounds: int | None = None,
    beside: Callable[[], object] = lambda: None,
) -> Timings:
    """Time the runners in turn, many times, after uncounted rounds.

    Each round starts with another runner, so that none always finds the caches of the same predecessor. `beside` is
    called after each round.
    """
    rounds = warm_up(runners, direction, device, budget, rounds)
    names = list(runners)
    found: dict[str, list[float]] = {name: [] for name in names}
    others = Others()
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(seconds(runners[name], direction, device))
        beside()
    return Timings(found, others.cores())


@contextmanager
def record_backends() -> Iterator[dict[str, str]]:
    """Records the backend that really computed each operation in the block: {"plane_norm": "cpu", ...}."""
    served: dict[str, str] = {}
    original = choice.choose
    names = {package: name for name, package in choice.PACKAGE.items()}

    def choose(op: str, name: str, inputs: Sequence[Any]) -> Any:
        module = original(op, name, inputs)
        served[op] = names.get(module.__name__.rpartition(".")[0], module.__name__)
        return module

    choice.choose = choose
    try:
        yield served
    finally:
        choice.choose = original
