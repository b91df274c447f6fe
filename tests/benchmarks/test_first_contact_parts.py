"""Parts of `benchmarks.first_contact` that need a GPU, by stand-ins; and how its parts measure."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from first_contact_tools import context, executable

import build_tools
from benchmarks.cases import all_cases
from benchmarks.first_contact import checking, preparing, speed
from benchmarks.first_contact.context import Context, LeftOut, Wrong, read_json
from benchmarks.first_contact.speed import Measurement
from pvdm_fast.analysis import agreement
from pvdm_fast.analysis.agreement import Job, Result
from pvdm_fast.backends import choice

ROOT = Path(__file__).resolve().parents[2]


# ---- parts of the GPU, by stand-ins


def test_only_this_card_is_built_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = executable(tmp_path / "nvcc", "print('sm_80 sm_89 sm_90')")
    toolkit = build_tools.Toolkit(str(nvcc), tmp_path, (13, 0))
    built: list[build_tools.Extension] = []
    facts = tmp_path / "_build_info.json"
    facts.write_text('{"abi": 5, "_cpu": {"built": true}}')
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(preparing, "BUILD_FACTS", facts)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(build_tools, "find_toolkit", lambda: toolkit)
    monkeypatch.setattr(build_tools, "run_ninja", lambda extension, folder, nvcc: built.append(extension))
    one = context(tmp_path, "build", "cuda")
    preparing.build(one)
    ((kernels, rule, flags),) = {entry for name, entry in built[0].objects.items() if name == "cuda_plane_norm"}
    assert (kernels.name, rule, flags) == ("plane_norm.cu", "nvcc", "-gencode=arch=compute_89,code=sm_89")
    assert built[0].output.parent == ROOT / "pvdm_fast"
    expected = {"built": True, "compiler": "nvcc 13.0", "targets": ["sm_89"]}
    assert read_json(facts) == {"abi": 5, "_cpu": {"built": True}, "_cuda": expected}
    assert one.found == expected

    def fails(*arguments: Any) -> None:
        raise build_tools.Unbuildable("compiling _cuda failed")

    monkeypatch.setattr(build_tools, "run_ninja", fails)
    with pytest.raises(Wrong, match="compiling _cuda failed"):
        preparing.build(one)
    monkeypatch.setattr(build_tools, "find_toolkit", fails)
    with pytest.raises(LeftOut, match="compiling _cuda failed"):
        preparing.build(one)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    monkeypatch.setattr(build_tools, "find_toolkit", lambda: toolkit)
    with pytest.raises(LeftOut, match=r"expected compute capabilities from 8\.0"):
        preparing.build(one)


def test_each_operation_has_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that crashes is one wrong result; the others count."""
    jobs = [
        Job(op, "cuda", precision) for op in ("geglu", "plane_norm", "plane_conv") for precision in ("tf32", "float16")
    ]
    right = {"what": "geglu", "backend": "cuda", "precision": "tf32", "error": 0.0, "allowed": 1e-3, "problem": ""}
    wrong = {**right, "what": "plane_norm", "error": None, "problem": "too far"}
    content = {"geglu": {"results": [right], "no_time_for": ["geglu full"]}, "plane_norm": {"results": [wrong]}}

    def command(context: Context, part: str, seconds: float, *more: str) -> list[str]:
        assert part == "self-test-of"
        _, group, _, name = more
        op = group.partition("/")[2]
        script = f"import os, signal\nprint('{op} here', flush=True)\n"
        if op == "plane_conv":
            return [sys.executable, "-c", script + "os.kill(os.getpid(), signal.SIGABRT)"]
        path = context.out / f"{name}.json"
        code = int(op == "plane_norm")
        return [
            sys.executable,
            "-c",
            script + f"open({str(path)!r}, 'w').write({json.dumps(content[op])!r}); exit({code})",
        ]

    monkeypatch.setattr(agreement, "jobs", lambda device, full: iter([*jobs, "all triton not run: no."]))
    monkeypatch.setattr(agreement, "refusals", lambda device: iter([]))
    monkeypatch.setattr(Context, "command", command)
    one = context(tmp_path, "self-test", "cuda")
    with pytest.raises(Wrong, match="2 of 3 are wrong"):
        checking.self_test(one)
    stored = read_json(tmp_path / "self-test.json")
    problems = {row["what"]: row["problem"] for row in stored["results"]}
    assert problems["geglu"] == "" and problems["plane_norm"] == "too far"
    assert "its process ended with exit code -6: plane_conv here" in problems["plane_conv"]
    assert stored["no_time_for"] == ["geglu full"] and stored["not_run"] == ["all triton not run: no."]


SANITIZER = """import subprocess, sys
tool = sys.argv[sys.argv.index("--tool") + 1]
inner = sys.argv[sys.argv.index("all") + 1:]
code = subprocess.run(inner).returncode
print("========= COMPUTE-SANITIZER")
print(f"========= ERROR SUMMARY: {int(tool == 'racecheck')} errors", flush=True)
sys.exit(86 if tool == "racecheck" else code)
"""


def test_what_the_sanitizer_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(tmp_path / "compute-sanitizer", SANITIZER)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(choice, "unavailable", lambda backend: None if backend == "cuda" else "not here.")
    script = "import os; print('caching off:', os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'])"
    monkeypatch.setattr(Context, "command", lambda *arguments: [sys.executable, "-c", script])
    with pytest.raises(Wrong, match=r"racecheck of cuda: .*1 errors"):
        checking.sanitize(context(tmp_path, "sanitizer", "cuda"))
    runs = read_json(tmp_path / "sanitizer.json")["runs"]
    assert [(run["tool"], run["status"]) for run in runs] == [("memcheck", "clean"), ("racecheck", "found something")]


def test_a_sanitizer_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = executable(tmp_path / "sanitizer", "import time; time.sleep(600)")
    run = checking._sanitized(context(tmp_path, device="cuda"), str(program), "memcheck", "cuda", 1.0)
    assert run["status"] == "no time"


def test_no_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(checking, "USUAL_TOOLKIT", tmp_path)
    with pytest.raises(LeftOut, match="install the toolkit"):
        checking.sanitize(context(tmp_path, device="cuda"))


def test_every_kernel_once(tmp_path: Path) -> None:
    if reason := choice.unavailable("cpu"):
        pytest.skip(reason)
    one = context(tmp_path)
    checking.every_kernel_once(one, "cpu")
    assert set(one.found["cases"]) == {*choice.SERVED["cpu"]}


def test_one_operation_in_a_process(tmp_path: Path) -> None:
    """What such a process does, here in this one."""
    if reason := choice.unavailable("cpu"):
        pytest.skip(reason)
    one = context(tmp_path)
    checking.self_test_of(one, "cpu/geglu")
    assert [row["precision"] for row in one.found["results"]] == [
        "float32",
        "bfloat16",
    ]  # a dry walk leaves out float16
    assert not any(row["problem"] for row in one.found["results"])


def test_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(tmp_path / "nvidia-smi", "print('Card, 580.1, 96.0, 700.00 W, 1980 MHz, 2619 MHz, Enabled')")
    monkeypatch.setenv("PATH", str(tmp_path))
    said = preparing._driver()
    assert list(said) == list(preparing.FIELDS)
    assert (said["driver_version"], said["ecc.mode.current"]) == ("580.1", "Enabled")
    executable(tmp_path / "nvidia-smi", "exit(9)")
    assert preparing._driver() == {}


@pytest.mark.slow
def test_tuning_keeps_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In DIR, each entry at once, largest shapes first; one that fails makes the part fail at its end."""
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    from benchmarks.first_contact import tuning
    from pvdm_fast.kernels import configs

    written: list[int] = []

    def best_of_each(tasks: Any, device: torch.device, timer: Any, say: Any) -> Any:
        for index, task in enumerate(tasks):
            problem = "RuntimeError: no" if index == 1 else ""
            yield tuning.tuning.Found(task, None if problem else task.candidates[0], problem)
            table = json.loads((tmp_path / "tuned" / "pvdm_fast" / "triton.json").read_text())
            written.append(sum(len(entries) for entries in table.values()))
            one.seconds = 0 if index == 2 else one.seconds

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "mine"))
    monkeypatch.setattr(configs, "architecture", lambda device: "sm90")
    monkeypatch.setattr(tuning.tuning, "best_of_each", best_of_each)
    one = context(tmp_path, "tune", "cuda", seconds=1000)
    with pytest.raises(Wrong, match="1 of 3 entries can't be timed"):
        tuning.tune(one)
    assert written == [1, 1, 2]
    assert len(one.found["no_time_for"]) == one.found["planned"] - 3
    assert [bool(entry["config"]) for entry in one.found["entries"]] == [True, False, True]
    assert not (tmp_path / "mine").exists()


# ---- measuring


def test_tf32_is_compared_with_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the switch changes nothing, so both have no error; one that is too far is refused before any timing."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    case = replace(all_cases()["plane_conv/3x3"], directions=("forward",))
    one = context(tmp_path)
    (row,) = speed.measure(Measurement(case, "tf32"), one, 0.01)
    assert set(row["errors"]) == {"ours", "eager"} and row["errors"]["ours"]["result"] < 2e-5
    assert row["median"]["ours"] > 0 and row["precision"] == "tf32" and row["ratio"]["eager"] > 0
    errors = iter([0.5, 1e-4])
    monkeypatch.setattr(speed, "relative_error", lambda found, exact: next(errors))
    with pytest.raises(speed.Disagreement, match=r"in tf32: ours differs by 5\.00e-01"):
        speed.measure(Measurement(case, "tf32"), one, 0.01)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_a_case_that_fails_is_said_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["geglu/feed-forward", "plane_conv/3x3", "plane_norm/joint"]
    real = speed.measure

    def measure(one: Measurement, context: Context, budget: float) -> list[dict[str, Any]]:
        if one.case.name == names[0]:
            raise speed.Disagreement("result: ours differs by 1")
        if one.case.name == names[1]:
            raise torch.OutOfMemoryError("GPU full")
        return real(one, context, budget)

    monkeypatch.setattr(speed, "measure", measure)
    one = context(tmp_path, "operations")
    with pytest.raises(Wrong, match="1 cases failed, the first geglu"):
        speed._measure_all(one, [all_cases()[name] for name in names], to_compile=1)
    assert {row["case"] for row in one.found["rows"]} == {"plane_norm/joint"}
    assert one.found["too_large"][0]["case"] == "plane_conv/3x3, bfloat16"


def test_torch_compile_that_does_not_run_is_no_fault_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(one: Measurement, context: Context, budget: float) -> list[dict[str, Any]]:
        if one.compiled:
            raise RuntimeError("no Python.h")
        return []

    monkeypatch.setattr(speed, "measure", measure)
    one = replace(context(tmp_path, "operations"), dry=False)
    speed._measure_all(one, [all_cases()["geglu/feed-forward"]], to_compile=1)
    assert one.found["not_run"] == ["geglu/feed-forward, bfloat16, with torch.compile: RuntimeError: no Python.h"]


def test_other_inputs_at_every_timing() -> None:
    x = torch.arange(3000.0, requires_grad=True)
    runner = speed.SeveralInputs(run=lambda: [2 * x], inputs=[x])
    before = x.detach().clone()
    runner.step("forward")
    assert not torch.equal(x, before) and torch.equal(x.sort().values, before)
    assert x.requires_grad and x.is_leaf


def test_results_cross_processes() -> None:
    """Infinity has no word in JSON; it comes back as what it was."""
    result = Result("geglu", "cuda", "tf32", math.inf, 1e-3, "RuntimeError: no")
    assert checking._number(None) == math.inf and checking._number(0.5) == 0.5
    assert "FAILED: RuntimeError: no" in str(result)
