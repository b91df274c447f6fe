"""The parts that say whether the kernels are right: self-test, golden values, compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.first_contact.context import ROOT, Context, LeftOut, Wrong, read_json
from pvdm_fast.analysis import agreement, cases, projections
from pvdm_fast.analysis.agreement import Job, Result
from pvdm_fast.backends import choice

SANITIZER = "compute-sanitizer"
USUAL_TOOLKIT = Path("/usr/local/cuda")
TOOLS = ("memcheck", "racecheck")
FOUND_BY_SANITIZER = 86  # the exit code asked of it where it finds something
MOST_AT_ONCE = 8  # processes: each takes about 1 GB of the card's memory, more at full sizes


def self_test(context: Context) -> None:
    """Every operation on every backend and in every precision, also at full sizes on a card."""
    full = _full(context)
    wanted, not_run = _planned(context)
    context.keep(not_run=not_run, planned=len(wanted))
    if not wanted:
        raise LeftOut(
            f"no backend but the reference runs on {context.device}: install Triton, or build the extensions."
        )
    results = _in_processes(context, wanted) if context.device == "cuda" else _in_turn(context, wanted)
    for result in results:
        _note(context, result)
    if full:
        for result in agreement.refusals(context.device):
            _note(context, result)
    _judge(context)


def _full(context: Context) -> bool:
    """Whether full sizes are compared too."""
    return context.device == "cuda" and not context.dry


def _planned(context: Context) -> tuple[list[Job], list[str]]:
    """What is compared, and a line for whatever isn't; a dry walk leaves out float16."""
    found = list(agreement.jobs(context.device, _full(context)))
    wanted = [job for job in found if isinstance(job, Job) and not (context.dry and job.precision == "float16")]
    return wanted, [line for line in found if isinstance(line, str)]


def _in_turn(context: Context, wanted: list[Job]) -> Iterator[Result]:
    for job in context.while_time(wanted):
        yield agreement.compare(job, context.device)


def _in_processes(context: Context, wanted: list[Job]) -> Iterator[Result]:
    """Each operation of a backend in a process of its own, several at once.

    Kernels are compiled at the same time, for every later part too, and a fault of the GPU, which ends all that its
    process could still do there, costs one operation.
    """
    groups = list(dict.fromkeys(f"{job.backend}/{job.op}" for job in wanted))
    with ThreadPoolExecutor(max(1, min(MOST_AT_ONCE, (os.cpu_count() or 2) - 1))) as pool:
        begun = [pool.submit(_in_process, context, group) for group in groups]
        for done in as_completed(begun):
            results, unfinished = done.result()
            if unfinished:
                context.keep(no_time_for=[*context.found.get("no_time_for", []), *unfinished])
            yield from results


def _in_process(context: Context, group: str) -> tuple[list[Result], list[str]]:
    """The results of one operation on one backend, and what there was no time for; nothing is kept here."""
    if context.left() < 5:
        return [], [group]
    name = f"self-test-{group.replace('/', '-')}"
    command = context.command("self-test-of", context.left(), "--only", group, "--as", name)
    outcome = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(outcome.stdout, flush=True)
    written = read_json(context.out / f"{name}.json")
    results = [Result(**{**row, "error": _number(row["error"])}) for row in written.get("results", [])]
    if outcome.returncode and not any(result.problem for result in results):
        last = outcome.stdout.strip().splitlines()[-1:] or ["no output"]
        backend, _, op = group.partition("/")
        problem = f"its process ended with exit code {outcome.returncode}: {last[0][:300]}"
        results.append(Result(op, backend, "any", float("inf"), 0.0, problem))
    return results, written.get("no_time_for", [])


def _number(value: float | None) -> float:
    return float("inf") if value is None else value  # JSON has no word for infinity


def self_test_of(context: Context, only: str) -> None:
    """One operation of one backend, in every precision and size."""
    of_these = [job for job in _planned(context)[0] if f"{job.backend}/{job.op}" == only]
    for job in context.while_time(of_these):
        _note(context, agreement.compare(job, context.device))
        context.synchronize()  # after a fault nothing more can be learned here
    _judge(context)


def _note(context: Context, result: Result) -> None:
    print(result, flush=True)
    context.add("results", asdict(result))


def _judge(context: Context) -> None:
    """Raises Wrong where a result is."""
    wrong = [row for row in context.found.get("results", []) if row["problem"]]
    if wrong:
        first = wrong[0]
        raise Wrong(
            f"{len(wrong)} of {len(context.found['results'])} are wrong, the first {first['what']} on "
            f"{first['backend']} in {first['precision']}: {first['problem']}"
        )


def goldens(context: Context) -> None:
    """Whole networks against what the authors' release computes; on a card as CUDA graphs too."""
    from pvdm_fast.analysis import goldens

    if goldens.folder() is None:
        raise LeftOut("there are no golden values in tests/golden: run the whole source tree.")
    precisions = ("float32",) if context.dry else ("float32", "bfloat16", "float16")
    pairs = [(name, precision) for precision in precisions for name in reversed(goldens.NETWORKS)]
    for name, precision in context.while_time(pairs, " ".join):
        for result in agreement.network(name, precision, context.device):
            _note(context, result)
    _judge(context)


def sanitizer() -> str | None:
    """The program compute-sanitizer, on PATH or in a toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), str(USUAL_TOOLKIT)]
    places = [Path(home) / "bin" / SANITIZER for home in homes if home]
    return shutil.which(SANITIZER) or next((str(place) for place in places if os.access(place, os.X_OK)), None)


def sanitize(context: Context) -> None:
    """Accesses out of bounds and races in shared memory, at the smallest shapes."""
    if context.device != "cuda":
        raise LeftOut("it looks at a GPU's kernels: run with --device cuda on a machine with one.")
    program = sanitizer()
    if program is None:
        raise LeftOut(f"{SANITIZER} is neither on PATH nor in a CUDA toolkit: install the toolkit, or set CUDA_HOME.")
    backends = [name for name in ("cuda", "triton") if choice.unavailable(name) is None]
    runs = [(tool, backend) for tool in TOOLS for backend in backends]
    with ThreadPoolExecutor(max(1, len(runs))) as pool:  # all at once: most of their time is PyTorch's start
        begun = [pool.submit(_sanitized, context, program, tool, backend, context.left()) for tool, backend in runs]
        for done in begun:
            context.add("runs", done.result())
    wrong = [run for run in context.found.get("runs", []) if run["status"] == "found something"]
    if wrong:
        raise Wrong(f"{wrong[0]['tool']} of {wrong[0]['backend']}: {wrong[0]['lines'][-1]}")


def _sanitized(context: Context, program: str, tool: str, backend: str, seconds: float) -> dict[str, Any]:
    inner = context.command("every-kernel-once", seconds, "--only", backend, "--as", f"{tool}-{backend}")
    options = ["--tool", tool, "--error-exitcode", str(FOUND_BY_SANITIZER), "--target-processes", "all"]
    # PyTorch's cache of memory would hide accesses beyond a tensor's end.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    started = time.monotonic()
    try:
        outcome = subprocess.run(
            [program, *options, *inner], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=max(seconds, 1), check=False,
        )  # fmt: skip
        lines, code = outcome.stdout.splitlines(), outcome.returncode
    except subprocess.TimeoutExpired:
        lines, code = [], None
    print(*lines, sep="\n", flush=True)
    summary = [line for line in lines if "SUMMARY" in line or line.startswith("========= ")]
    status = {0: "clean", FOUND_BY_SANITIZER: "found something", None: "no time"}.get(code, f"exit code {code}")
    seconds = time.monotonic() - started
    cases_run = read_json(context.out / f"{tool}-{backend}.json").get("cases", [])
    return {
        "tool": tool, "backend": backend, "status": status, "seconds": seconds, "cases": len(cases_run),
        "lines": (summary or lines or ["no output"])[-5:],
    }  # fmt: skip


def every_kernel_once(context: Context, only: str) -> None:
    """Every operation of a backend at the smallest sizes, forward and backward; nothing is compared."""
    wanted = [*cases.ONE_TOKEN.values(), *cases.SMALL.values(), *projections.CASES.values()]
    served = [case for case in wanted if case.op in choice.SERVED[only]]
    for case in context.while_time(served, lambda case: case.op):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = {name: tensor.to(context.device) for name, tensor in case.inputs(dtype).items()}
            with choice.use_backend(only):
                agreement.run(case, inputs, dtype, only)
        context.synchronize()
        context.keep(cases=[*context.found.get("cases", []), case.op])
