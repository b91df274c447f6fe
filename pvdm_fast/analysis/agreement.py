"""Every backend that runs here against the reference: what `python -m pvdm_fast.selftest` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvdm_fast.analysis import cases, full_cases, projections
from pvdm_fast.analysis.cases import Case
from pvdm_fast.analysis.comparison import relative_error
from pvdm_fast.analysis.machine import collect, describe_machine
from pvdm_fast.backends import choice, extensions
from pvdm_fast.backends.choice import FUSED, FUSED_PROJECTION, OPERATIONS, use_backend
from pvdm_fast.errors import BackendError, UserError
from pvdm_fast.jobs.devices import claim_device

if TYPE_CHECKING:
    from pvdm_fast.diffusion.cuda_graph import GraphedPrediction
    from pvdm_fast.models import Denoiser

# How numbers are stored, and for float32 whether products may be rounded to tf32.
PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Relative 2-norm of the difference. Results are rounded once to their dtype: half a unit in the last place, and in
# float32 the sums of some thousand terms. Attention by tensor cores also rounds what lies between its two products, and
# convolution's gradient is a sum of rounded parts: two or three roundings. Tf32 rounds what is multiplied to as many
# bits as float16 has.
ONCE = {"float32": 1e-5, "tf32": 5e-4, "bfloat16": 4e-3, "float16": 5e-4}
THRICE = {"float32": 1e-5, "tf32": 1.5e-3, "bfloat16": 1.2e-2, "float16": 1.5e-3}
# Each of a projection's layers rounds the left operands of its four products to 16 bits, forward and backward.
IN_EACH_LAYER = {"float32": 1e-5, "tf32": 2e-3, "bfloat16": 1.5e-2, "float16": 2e-3}
ROUNDED_BETWEEN = ("segment_attention", "axial_attention", "plane_conv", *FUSED)
HAVE_PRODUCTS = (*ROUNDED_BETWEEN, *FUSED_PROJECTION, "triplane_expand")  # what tf32 can change


class Failed(UserError):
    """A kernel is wrong here."""

    exit_code = 1


SMALL = (
    *cases.SMALL.values(), *cases.USUAL.values(), *full_cases.FUSED.values(), *projections.CASES.values(),
)  # fmt: skip
FULL = tuple(full_cases.FULL.values())


@dataclass(frozen=True)
class Job:
    """One comparison: an operation on a backend in a precision, at some sizes ("small" or "full")."""

    op: str
    backend: str
    precision: str
    sizes: str = "small"


@dataclass(frozen=True)
class Result:
    """What came of a comparison: the worst relative error, what was allowed, what went wrong ("" for nothing), and how
    many full-size cases are beyond the backend's limits on this device."""

    what: str
    backend: str
    precision: str
    error: float
    allowed: float
    problem: str = ""
    beyond: int = 0

    def __str__(self) -> str:
        numbers = f"{self.error:<9.1e}{self.allowed:<9.1e}" + (f"({self.beyond} refused) " if self.beyond else "")
        verdict = f"FAILED: {self.problem}" if self.problem else "ok"
        return f"{self.what:<27}{self.backend:<9}{self.precision:<10}{numbers}{verdict}"


HEADER = f"{'operation':<27}{'backend':<9}{'dtype':<10}{'error':<9}{'allowed':<9}"


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Float32 products and convolutions may, or may not, be rounded to tf32; as before afterwards.

    PyTorch has two generations of switches, and other code may read either. So both are set. Reading the older one
    raises RuntimeError where a program has set them to different things; it is then left at what is set here.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    newer = (matmul, cudnn.conv, cudnn.rnn)
    before: list[tuple[Any, str, Any]] = []
    for switch in (matmul, cudnn):
        with suppress(RuntimeError):
            before.append((switch, "allow_tf32", switch.allow_tf32))
    before += [(switch, "fp32_precision", switch.fp32_precision) for switch in newer]
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    for switch in newer:  # "none" would follow the switch of all products
        switch.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        for switch, name, value in before:
            setattr(switch, name, value)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative, in the 2-norm; infinite where a value is not finite or the shape is another."""
    found = relative_error(actual, expected)
    return math.inf if math.isnan(found) else found


def told(problem: BaseException) -> str:
    """An exception on one line."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


def run(case: Case, inputs: dict[str, Tensor], dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Results and gradients of a case; results alone if `backend` has no kernel for its gradient."""
    if hasattr(choice.implementation(backend, case.op), "backward"):
        return cases.run_with_gradients(case, inputs, dtype)
    with torch.no_grad():
        return {f"output {i}": result for i, result in enumerate(cases.as_tuple(case.run(**inputs)))}


def expected_of(
    case: Case, inputs: dict[str, Tensor], dtype: torch.dtype, device: str, backend: str
) -> dict[str, Tensor]:
    """What `backend` should compute: the float64 reference on the CPU; of a full-size case on its device, where float64
    takes no minutes."""
    for place in (device, "cpu") if case in FULL else ("cpu",):
        exact = {name: tensor.to(place, torch.float64) for name, tensor in inputs.items()}
        try:
            with use_backend("reference"):
                return run(case, exact, dtype, backend)
        except torch.OutOfMemoryError:  # attention's matrix in float64 takes gigabytes
            torch.cuda.empty_cache()
    raise AssertionError("The CPU raises no torch.OutOfMemoryError.")


def compare(job: Job, device: str) -> Result:
    """The worst error of an operation's cases, each run twice."""
    dtype, allowed = PRECISIONS[job.precision], allowed_error(job.op, job.precision)
    worst, beyond = 0.0, 0
    what = job.op if job.sizes == "small" else f"{job.op}, {job.sizes}"

    def result(problem: str = "") -> Result:
        return Result(what, job.backend, job.precision, worst, allowed, problem, beyond)

    chosen = [case for case in (FULL if job.sizes == "full" else SMALL) if case.op == job.op]
    for case in chosen:
        inputs, shapes = case.inputs(dtype), list(case.shapes.values())
        try:
            with tf32(False):
                expected = expected_of(case, inputs, dtype, device, job.backend)
            there = {name: tensor.to(device) for name, tensor in inputs.items()}
            with tf32(job.precision == "tf32"), use_backend(job.backend):
                actual, again = (run(case, there, dtype, job.backend) for _ in range(2))
            found = max(error(actual[name], exact) for name, exact in expected.items())
        except Exception as problem:  # whatever a kernel or compiler raises is the finding
            if isinstance(problem, BackendError) and job.sizes == "full":  # it may refuse what a GPU has no memory for
                beyond += 1
                continue
            worst = math.inf
            return result(f"{told(problem)} (shapes {shapes})")
        worst = max(worst, found)
        if not found <= allowed:
            return result(f"too far from the reference (shapes {shapes})")
        if not all(torch.equal(actual[name], again[name]) for name in actual):
            return result(f"a second run gave other bits (shapes {shapes})")
    return result("every case was refused" if beyond and beyond == len(chosen) else "")


def allowed_error(op: str, precision: str) -> float:
    return (IN_EACH_LAYER if op in FUSED_PROJECTION else THRICE if op in ROUNDED_BETWEEN else ONCE)[precision]


def jobs(device: str, full: bool) -> Iterator[Job | str]:
    """Every comparison that can be made, and a line for each backend or operation that does not run.

    On a GPU these are all that automatic choice can take there, the fused operations among them.
    """
    for backend in choice.BACKENDS[1:]:
        if reason := choice.unavailable(backend):
            yield f"{'all':<27}{backend:<9}not run: {reason}"
            continue
        for op in (*OPERATIONS, *FUSED, *FUSED_PROJECTION):
            if op not in (*OPERATIONS, *choice.SERVED[backend]):
                continue
            for precision, dtype in PRECISIONS.items():
                if precision == "tf32" and not (device == "cuda" and op in HAVE_PRODUCTS and not torch.version.hip):
                    continue
                if reason := choice.why_not(backend, op, torch.empty(0, dtype=dtype, device=device)):
                    yield f"{op:<27}{backend:<9}{precision:<10}not run: {reason}"
                    continue
                for sizes in ("small", "full") if full else ("small",):
                    yield Job(op, backend, precision, sizes)


def network(name: str, precision: str, device: str) -> Iterator[Result]:
    """A whole network, by automatic choice, against its golden values; on a GPU the denoiser as a CUDA graph too."""
    from pvdm_fast.analysis import goldens

    dtype = PRECISIONS[precision]
    try:
        with tf32(False):  # which would give up digits that golden values have
            agreements = list(goldens.compare(name, device, dtype))
            graphed = [graph(precision, device)] if name == "unet_small" and device == "cuda" else []
    except Exception as error:
        yield Result(name, "auto", precision, math.inf, 0.0, told(error))
        return
    for found in agreements:
        problem = "" if found.right else "too far from the golden values"
        yield Result(found.what, "auto", precision, found.error, found.allowed, problem)
    yield from graphed


def replayed(
    model: Denoiser, latent: Tensor, condition: Tensor, guidance: float
) -> tuple[list[float], GraphedPrediction]:
    """The guided pass as a CUDA graph: its errors at three times against the pass without one, and the graph."""
    from pvdm_fast.diffusion.cuda_graph import GraphedPrediction
    from pvdm_fast.diffusion.guidance import guided_prediction

    predict, errors = GraphedPrediction(), []
    for time in (911, 500, 7):
        with torch.no_grad():
            expected = guided_prediction(model, latent, time, condition, guidance)
            errors.append(error(predict(model, latent, time, condition, guidance), expected))
    return errors, predict


def graph(precision: str, device: str) -> Result:
    """The denoiser's guided pass replayed as a CUDA graph at three times, against the pass without a graph."""
    from pvdm_fast.analysis import goldens

    dtype = PRECISIONS[precision]
    model = goldens.denoiser().eval().to(device, dtype)
    case = goldens.load_case("unet_small")
    latent = case.input("x").to(device)
    condition = case.draw("input.cond", tuple(latent.shape)).tanh().to(device, dtype)
    errors, predict = replayed(model, latent, condition, 1.5)
    worst = max(errors)
    # The same kernels; the products of libraries may take another algorithm inside a graph.
    allowed = goldens.NETWORK if dtype == torch.float32 else THRICE[precision]
    problem = "" if worst <= allowed else "the graph computes something else"
    if predict.refused:  # it went on without a graph, and so compared nothing
        problem = "no graph could be made: the log says why"
    return Result("CUDA graph, denoiser", "auto", precision, worst, allowed, problem)


def refusals(device: str) -> Iterator[Result]:
    """Tensors where a backend can't read them are refused: by the operation, the choice of backend, the binding."""
    from pvdm_fast import ops

    x, elsewhere = torch.ones(1, 4, 8, device=device), torch.ones(8, device="cpu" if device == "cuda" else "meta")
    yield refused("mixed devices", "auto", ValueError, lambda: ops.add_layer_norm(x, None, elsewhere, elsewhere))
    if device == "cpu":
        return
    for backend, where in choice.DEVICE.items():
        if where is not None and choice.unavailable(backend) is None:
            wrong = "cpu" if where == "cuda" else "cuda"
            yield refused("another device", backend, BackendError, partial(_ask, backend, wrong))
            if backend in ("cpu", "cuda"):
                yield refused("another device, binding", backend, ValueError, partial(_bind, f"_{backend}", wrong))


def refused(what: str, backend: str, kind: type[Exception], call: Callable[[], object]) -> Result:
    """Whether a call raises what it should."""
    try:
        call()
    except kind:
        return Result(what, backend, "float32", 0.0, 0.0)
    except Exception as problem:
        return Result(what, backend, "float32", math.inf, 0.0, f"raised {told(problem)}, not {kind.__name__}")
    return Result(what, backend, "float32", math.inf, 0.0, "a tensor that is elsewhere was taken")


def _ask(backend: str, device: str) -> None:
    """An operation by the name of a backend, with tensors on `device`."""
    case = cases.ONE_TOKEN["triplane_slice"]
    with use_backend(backend):
        case.run(**{name: tensor.to(device) for name, tensor in case.inputs(torch.float32).items()})


def _bind(name: str, device: str) -> None:
    """A binding of an extension, past every check of Python's, with tensors on `device`."""
    x, token, positions = (torch.ones(size, device=device) for size in ((1, 1, 8), (8,), (2, 8)))
    out = torch.empty(1, 1, 2, 8, device=device)
    target = (0, 0) if name == "_cuda" else (1,)  # a device and a stream, or the number of threads
    extensions.extension(name).triplane_slice_forward(x, token, positions, out, 0, 1, 1, 1, *target)


def results(device: str, full: bool) -> Iterator[Result | str]:
    """Everything that is compared, one after the other; lines say what is left out and why."""
    from pvdm_fast.analysis import goldens

    for job in jobs(device, full):
        yield job if isinstance(job, str) else compare(job, device)
    if not full:
        return
    yield from refusals(device)
    if goldens.folder() is None:
        yield f"{'networks':<27}{'auto':<9}not run: the golden values come with the source tree: run it there"
        return
    for name in goldens.NETWORKS:
        for precision in ("float32", "bfloat16", "float16"):
            yield from network(name, precision, device)


def check(device: str, full: bool) -> tuple[int, int]:
    """Print a line for each comparison. Returns how many ran, and how many of those failed."""
    ran = failed = 0
    print(HEADER)
    for found in results(device, full):
        print(found, flush=True)
        if isinstance(found, Result):
            ran, failed = ran + 1, failed + bool(found.problem)
    return ran, failed


def run_check(name: str, full: bool | None) -> None:
    """The command, on the device of a name. `full` is None where it was not asked for.

    Raises:
        UserError: there is no such device, nothing could be compared, or (Failed) something is wrong.
    """
    device = claim_device(name).type
    print(*describe_machine(collect()), "", sep="\n")
    ran, failed = check(device, device == "cuda" if full is None else full)
    if not ran:
        raise UserError(f"No backend but the reference runs on {device}: nothing was compared.")
    if failed:
        raise Failed(f"{failed} of {ran} are wrong.")
    print(f"\nAll {ran} are right.")
