"""`python -m pvdm_fast.selftest`: the first command for a user with a GPU."""

from __future__ import annotations

import math
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pvdm_fast import selftest
from pvdm_fast.analysis import agreement, goldens
from pvdm_fast.analysis.agreement import Job, Result
from pvdm_fast.analysis.cases import Case
from pvdm_fast.analysis.goldens import Agreement
from pvdm_fast.analysis.projections import Projection
from pvdm_fast.backends import choice
from pvdm_fast.backends.choice import FUSED, FUSED_PROJECTION, KERNEL_DTYPES, OPERATIONS, SERVED
from pvdm_fast.backends.float32 import tf32_allowed
from pvdm_fast.backends.reference import geglu
from pvdm_fast.diffusion import cuda_graph, guidance
from pvdm_fast.errors import BackendError


@pytest.mark.slow
def test_right_kernels_pass(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if reason := choice.unavailable("cpu"):
        pytest.skip(reason)
    monkeypatch.setattr(choice, "BACKENDS", ("reference", "cpu", "cuda"))  # Triton's interpreter has its own tests
    assert selftest.main(["--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert f"All {3 * len(SERVED['cpu'])} are right." in text and "Versions" in text and torch.__version__ in text
    lines = [line.split() for line in text.splitlines()]
    for op in SERVED["cpu"]:
        for dtype in KERNEL_DTYPES:
            (line,) = [line for line in lines if line[:3] == [op, "cpu", str(dtype).removeprefix("torch.")]]
            assert line[5:] == ["ok"] and 0 <= float(line[3]) <= float(line[4])
    assert torch.cuda.is_available() or ["all", "cuda", "not", "run:"] in [line[:4] for line in lines]


def faulty(monkeypatch: pytest.MonkeyPatch, backward: Any) -> None:
    """A backend "cpu" with a wrong backward pass of geglu."""
    module = SimpleNamespace(forward=geglu.forward, backward=backward)
    real = choice.implementation

    def implementation(backend: str, op: str) -> ModuleType | SimpleNamespace:
        return module if (backend, op) == ("cpu", "geglu") else real(backend, op)

    monkeypatch.setattr(choice, "unavailable", lambda backend: None if backend in ("cpu", "reference") else "not here.")
    monkeypatch.setattr(choice, "implementation", implementation)
    monkeypatch.setattr(agreement, "OPERATIONS", ("geglu",))
    monkeypatch.setattr(agreement, "FUSED_PROJECTION", ())


@pytest.mark.parametrize(
    ("backward", "message"),
    [
        (lambda grad, x: 1.1 * geglu.backward(grad, x), "too far from the reference"),
        (lambda grad, x: geglu.backward(grad, x) / 0, "too far from the reference"),
        (lambda grad, x: geglu.backward(grad, x) * (1 + 1e-7 * torch.rand(())), "a second run gave other bits"),
        (lambda grad, x: geglu.backward(grad, x[:0]), "RuntimeError: "),
    ],
)
def test_wrong_kernels_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backward: Any, message: str
) -> None:
    faulty(monkeypatch, backward)
    monkeypatch.setattr(agreement, "PRECISIONS", {"float32": torch.float32})
    assert selftest.main(["--device", "cpu"]) == 1
    output = capsys.readouterr()
    assert f"FAILED: {message}" in output.out
    assert "error: 1 of 1 are wrong." in output.err


def test_nothing_to_compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(choice, "unavailable", lambda backend: "not here.")
    assert selftest.main(["--device", "cpu"]) == 2
    assert "nothing was compared" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: run with CUDA_VISIBLE_DEVICES=")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["--device", "cuda"]) == 2
    assert "PyTorch finds no GPU here" in capsys.readouterr().err


def test_a_gpu_has_all_that_automatic_choice_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation of every backend there, the fused block among them, in every precision, small and full."""
    monkeypatch.setattr(choice, "unavailable", lambda backend: "not here." if backend == "cpu" else None)
    monkeypatch.setattr(choice, "interpreting", lambda: False)
    monkeypatch.setattr(choice, "_without_16_bits", lambda device: None)
    monkeypatch.setattr(choice.probe, "failure", lambda backend, device: None)
    monkeypatch.setattr(torch.version, "hip", None)
    with FakeTensorMode():
        found = [job for job in agreement.jobs("cuda", True) if isinstance(job, Job)]
    expected = {
        Job(op, backend, precision, sizes)
        for backend in ("triton", "cuda")
        for op in SERVED[backend]
        for precision in agreement.PRECISIONS
        for sizes in ("small", "full")
        if precision != "tf32" or op in agreement.HAVE_PRODUCTS
    }
    assert set(found) == expected and len(found) == len(expected)
    assert {job.op for job in found if job.backend == "triton"} == {*OPERATIONS, *FUSED, *FUSED_PROJECTION}
    with FakeTensorMode():
        small = [job for job in agreement.jobs("cuda", False) if isinstance(job, Job)]
    assert {job.sizes for job in small} == {"small"}
    monkeypatch.setattr(torch.version, "hip", "6.4")  # AMD's GPUs have no tf32
    with FakeTensorMode():
        assert not [job for job in agreement.jobs("cuda", True) if isinstance(job, Job) and job.precision == "tf32"]


@pytest.mark.slow
def test_the_fused_block_is_compared() -> None:
    """In Triton's interpreter, at sizes that no block divides."""
    if reason := choice.why_not("triton", "attention_block", torch.empty(0)):
        pytest.skip(reason)
    found = agreement.compare(Job("attention_block", "triton", "float32"), "cpu")
    assert found.problem == "" and 0 < found.error <= found.allowed


@pytest.mark.parametrize("most", [0, 17, 33])
def test_a_refusal_at_full_size_is_no_fault(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """As that of a GPU whose shared memory holds no tile. Unless nothing is left."""
    monkeypatch.setattr(agreement, "FULL", [Projection((n - 1, 1, 1), "xy", 8, 1, 4).case for n in (17, 33)])
    run = agreement.run

    def limited(case: Case, inputs: dict[str, Tensor], *rest: Any) -> dict[str, Tensor]:
        if inputs["x"].dtype == torch.float32 and len(inputs["positions"]) > most:
            raise BackendError("no memory holds a tile of it: use another backend.")
        return run(case, inputs, *rest)

    monkeypatch.setattr(agreement, "run", limited)
    found = agreement.compare(Job("triplane_project", "reference", "float32", "full"), "cpu")
    assert found.beyond == sum(length > most for length in (17, 33))
    assert found.problem == ("every case was refused" if found.beyond == 2 else "")
    assert ("(1 refused) ok" in str(found)) == (most == 17)


@pytest.mark.slow
def test_a_full_size_is_compared() -> None:
    if reason := choice.unavailable("cpu"):
        pytest.skip(reason)
    found = agreement.compare(Job("triplane_expand", "cpu", "bfloat16", "full"), "cpu")
    assert found.problem == "" and 0 < found.error <= found.allowed


def test_what_a_compiler_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("out of\n  resources")

    faulty(monkeypatch, geglu.backward)
    monkeypatch.setattr(choice, "implementation", lambda backend, op: SimpleNamespace(forward=broken))
    monkeypatch.setattr(agreement, "expected_of", lambda *arguments: {})
    found = agreement.compare(Job("geglu", "cpu", "float32"), "cpu")
    assert found.error == math.inf and "RuntimeError: out of resources (shapes " in found.problem
    assert "FAILED: RuntimeError" in str(found)


def test_tf32_is_on_for_its_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    seen: list[bool] = []
    real = agreement.run

    def run(*arguments: Any) -> Any:
        older = torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        assert tf32_allowed("product") == tf32_allowed("convolution") == older
        seen.append(older)
        return real(*arguments)

    monkeypatch.setattr(agreement, "run", run)
    monkeypatch.setattr(agreement, "SMALL", agreement.SMALL[-4:-3])  # geglu or add_layer_norm
    op = agreement.SMALL[0].op
    for precision, inside in (("tf32", True), ("float32", False)):
        seen.clear()
        assert agreement.compare(Job(op, "reference", precision), "cpu").problem == ""
        assert seen == [False, inside, inside]  # the expected values, then twice what is tested
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("of_all", ["none", "tf32"])
def test_tf32_where_a_program_used_the_newer_switches(float32_switches: Any, allowed: bool, of_all: str) -> None:
    """To set products and convolutions differently; then the older ones can't be read."""
    conv = torch.backends.cudnn.conv
    torch.backends.fp32_precision = of_all
    float32_switches.fp32_precision, conv.fp32_precision = "tf32", "ieee"
    with agreement.tf32(allowed):
        assert tf32_allowed("product") == tf32_allowed("convolution") == allowed
        assert float32_switches.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
    assert (float32_switches.fp32_precision, conv.fp32_precision) == ("tf32", "ieee")


@pytest.mark.parametrize(("error", "problem"), [(1e-6, ""), (1e-3, "too far"), (math.nan, "too far")])
def test_networks_are_held_against_golden_values(monkeypatch: pytest.MonkeyPatch, error: float, problem: str) -> None:
    monkeypatch.setattr(goldens, "compare", lambda *arguments: iter([Agreement("unet_small output", error, 1e-4)]))
    (found,) = agreement.network("unet_small", "float32", "cpu")
    assert found.problem.startswith(problem) and bool(found.problem) == bool(problem)

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(goldens, "compare", broken)
    (found,) = agreement.network("unet_small", "float32", "cpu")
    assert (found.error, found.problem) == (math.inf, "RuntimeError: no")


@pytest.mark.slow
def test_a_network_is_right() -> None:
    found = list(agreement.network("autoencoder_small", "bfloat16", "cpu"))
    assert len(found) == 3 and not any(result.problem for result in found)


def test_full_says_what_it_has_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the source tree there are no golden values; tensors on the wrong device are tried everywhere."""
    monkeypatch.setattr(agreement, "jobs", lambda device, full: iter([f"full: {full}"]))
    monkeypatch.setattr(goldens, "folder", lambda: None)
    assert selftest.main(["--device", "cpu", "--full"]) == 0
    text = capsys.readouterr().out
    assert "full: True" in text and "mixed devices" in text and "All 1 are right." in text
    assert "the golden values come with the source tree: run it there" in text
    monkeypatch.setattr(agreement, "jobs", lambda device, full: iter([f"full: {full}"]))
    assert selftest.main(["--device", "cpu"]) == 2
    assert "full: False" in capsys.readouterr().out


def test_what_should_be_refused() -> None:
    def raises(error: Exception) -> Any:
        def call() -> None:
            raise error

        return call

    assert agreement.refused("a", "cuda", ValueError, raises(ValueError("no"))).problem == ""
    assert "not ValueError" in agreement.refused("a", "cuda", ValueError, raises(RuntimeError("crash"))).problem
    assert "was taken" in agreement.refused("a", "cuda", ValueError, lambda: None).problem


def test_a_result_on_one_line() -> None:
    line = str(Result("plane_norm, full", "cuda", "tf32", 1e-4, 1e-3))
    assert line.split() == ["plane_norm,", "full", "cuda", "tf32", "1.0e-04", "1.0e-03", "ok"]


def test_a_precision_that_does_not_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As 16 bits on a GPU without units for them: the line says which, and why; the others are compared."""

    def why_not(backend: str, op: str, tensor: torch.Tensor) -> str | None:
        return "too old." if tensor.dtype == torch.bfloat16 else None

    monkeypatch.setattr(choice, "unavailable", lambda backend: None if backend == "cpu" else "not here.")
    monkeypatch.setattr(choice, "why_not", why_not)
    found = list(agreement.jobs("cpu", False))
    lines = [line for line in found if isinstance(line, str) and "too old." in line]
    assert len(lines) == len((*OPERATIONS, *FUSED_PROJECTION)) and all(
        line.split()[1:3] == ["cpu", "bfloat16"] for line in lines
    )
    assert {job.precision for job in found if isinstance(job, Job)} == {"float32", "float16"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shift", "refused", "problem"),
    [(0.0, False, ""), (1.0, False, "the graph computes something else"), (0.0, True, "no graph could be made")],
)
def test_the_graph_is_held_against_the_pass(
    monkeypatch: pytest.MonkeyPatch, shift: float, refused: bool, problem: str
) -> None:
    """A stand-in for the graph: right, wrong, or given up."""

    class StandIn:
        def __init__(self) -> None:
            self.refused = refused

        def __call__(self, *arguments: Any) -> torch.Tensor:
            with torch.no_grad():
                return guidance.guided_prediction(*arguments) + shift

    monkeypatch.setattr(cuda_graph, "GraphedPrediction", StandIn)
    found = agreement.graph("float32", "cpu")
    assert found.problem.startswith(problem) and bool(found.problem) == bool(problem)
