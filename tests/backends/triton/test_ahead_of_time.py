"""Compiles every kernel for every GPU family, without a GPU: budgets, and planted faults that they find."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from backends.triton.changed import changed_files, changed_operations, sources

from benchmarks import kernel_resources
from pvdm_fast.backends.choice import SERVED
from pvdm_fast.errors import UserError

pytest.importorskip("triton", reason="needs Triton: pip install triton")
ROOT = Path(__file__).parents[3]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs in a process that compiles, because this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


# One family always, the others where kernels changed: their faults are planted and found in the same way.
OTHERS = [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("sm100", "gfx942")]


@cache
def planted(architecture: str) -> dict[str, list[str]]:
    """The problems that the budget finds in each planted kernel."""
    result = run("tests/backends/triton/planted.py", architecture)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("architecture", ["sm80", *OTHERS])
@pytest.mark.slow
def test_good_kernels_keep_the_budget(architecture: str) -> None:
    found = planted(architecture)
    assert found["good product"] == found["good copy"] == []
    assert not any("over lanes" in problem for problem in found["good sum"])


@pytest.mark.parametrize("architecture", ["sm80", *OTHERS])
@pytest.mark.parametrize("fault", ["spills", "shared memory", "sums over lanes", "tensor cores", "16-byte load"])
@pytest.mark.slow
def test_planted_faults_are_found(fault: str, architecture: str) -> None:
    found = planted(architecture)
    absent = fault == "tensor cores" and architecture == "gfx942"  # AMD's tensor cores take float32 too
    assert any(fault in problem for problem in found[fault]) != absent, found


# What the last program of another kernel does at the networks' sizes, but not on AMD's GPUs (kernels/arrivals.py).
APART = ("plane_conv_forward_add",)


def check_resources(architectures: Sequence[str], operations: Sequence[str], *options: str) -> None:
    chosen = ("--architectures", *architectures, "--operations", *operations)
    result = run("-m", "benchmarks.kernel_resources", *options, *chosen)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split("|")[1:3] for line in result.stdout.splitlines() if line.startswith("|")][2:]
    kernels = {kernel.strip() for kernel, _ in rows}
    assert not [op for op in operations if not any(kernel.startswith(op) for kernel in kernels)]
    compiled = {(kernel.strip(), target.strip()) for kernel, target in rows}
    wanted = {(kernel, target) for kernel in kernels for target in architectures}
    assert compiled == {(kernel, target) for kernel, target in wanted if target[:3] == "gfx" or kernel not in APART}
    documented = kernel_resources.DOCS.read_text()
    missing = [kernel for kernel in kernels if f"| {kernel} |" not in documented]
    assert not missing, (
        f"run python -m benchmarks.kernel_resources --write-docs: {kernel_resources.DOCS.name} lacks {missing}"
    )


# The gradient of plane_norm, whose last program adds what all have stored.
ARRIVAL = """
import sys, torch
from benchmarks.ahead_of_time import compile_launch
from pvdm_fast.kernels import configs, plane_norm
from pvdm_fast.kernels.launch import watch
x, weight, mean = (torch.empty(shape, device="meta") for shape in ((1, 48, 64), 64, (1, 3, 32)))
launches = []
with configs.assume(sys.argv[1]), watch(lambda *launch: launches.append(launch)):
    plane_norm.backward(x, x, weight, weight, None, mean, mean, [4] * 6, 32, True, 0)
[(kernel, grid, arguments, config, constants)] = launches
print(compile_launch(sys.argv[1], kernel, grid, arguments, config, **constants).asm["ptx"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm80", *(pytest.param(a, marks=pytest.mark.exhaustive) for a in ("sm100",))])
def test_barriers_stand_around_the_atomic_that_counts_programs(architecture: str) -> None:
    """What the compiler makes of `arrivals.is_last`: all stores, a barrier, one acq_rel atomic, a barrier, all loads of
    what was stored. The interpreter can't tell the second barrier, which Triton itself writes."""
    result = run("-c", ARRIVAL, architecture)
    assert result.returncode == 0, result.stderr
    steps = re.findall(r"bar\.sync|st\.global|ld\.global\.cg|atom\S+", result.stdout)
    [counting] = [i for i, step in enumerate(steps) if step.startswith("atom")]
    assert steps[counting] == "atom.global.gpu.acq_rel.add.u32"
    before, after = steps[:counting], steps[counting + 1 :]
    assert before[-1] == "bar.sync" and before.count("st.global") >= 2 and "ld.global.cg" not in before
    assert after[0] == "bar.sync" and after.count("ld.global.cg") >= 2


# float32 under the switches as PyTorch sets them: its own convolutions then use tensor cores, its products don't.
DEFAULT_SWITCHES = """
import json, sys, torch
from benchmarks.ahead_of_time import compile_calls, over_budget
from benchmarks.kernel_resources import full_size_calls
calls = [call.with_dtype(torch.bfloat16, torch.float32) for call in full_size_calls()]
calls = [call for call in calls if call.op in ("plane_conv", "triplane_expand")]
found = [made for architecture in sys.argv[1:] for made in compile_calls(architecture, calls) if made.products]
print(json.dumps([
    (made.kernel, made.architecture, made.products_tf32, made.tensor_core_instructions, over_budget(made))
    for made in found
]))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("architectures", [("sm80", "sm120", "gfx942"), ("sm90", "sm100")], ids=" ".join)
def test_float32_takes_tensor_cores_where_eager_does(architectures: tuple[str, ...]) -> None:
    result = run("-c", DEFAULT_SWITCHES, *architectures)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    for architecture in architectures:
        of_convolutions = [row for row in rows if row[1] == architecture and row[0].startswith("plane_conv")]
        assert {row[0] for row in of_convolutions} == {"plane_conv_forward", "plane_conv_backward_dweight"}
        assert all(cores for *_, cores, _ in of_convolutions), of_convolutions  # AMD's have float32 too
    for kernel, architecture, tf32, cores, problems in rows:
        nvidia = architecture.startswith("sm")
        assert tf32 == (nvidia and kernel.startswith("plane_conv")), (kernel, architecture)
        assert bool(cores) == (tf32 or not nvidia), (kernel, architecture)
        assert problems == []


@pytest.mark.exhaustive
def test_every_kernel_on_one_target() -> None:
    """All that full-size networks launch in bfloat16, and every configuration of every table once, separately for
    float32 and 16 bits.

    Table entries that nothing uses are problems too. It is for the target with the least shared memory.
    """
    check_resources(["sm120"], SERVED["triton"], "--quick")


@pytest.mark.exhaustive
def test_every_configuration_in_every_dtype_on_every_target() -> None:
    """Also every set of dtypes that mixed precision makes, for the operations whose kernels changed."""
    operations = changed_operations(changed_files())
    if not operations:
        pytest.skip("no kernel changed: to compile all of them, run python -m benchmarks.kernel_resources")
    check_resources(kernel_resources.ARCHITECTURES, operations)


def test_an_operation_s_kernels_are_its_module_and_what_that_imports() -> None:
    everything = {str(path.relative_to(ROOT)) for path in (ROOT / "kernels").glob("*.py")}
    unused = {"kernels/__init__.py", "kernels/probe.py"}  # the second asks whether Triton runs at all
    assert set.union(*map(sources, SERVED["triton"])) == everything - unused
    assert {"kernels/plane_conv_product.py", "kernels/launch.py"} < sources("plane_conv")
    every = list(SERVED["triton"])
    for files in (None, ["kernels/launch.py"], ["docs/kernels.md", "benchmarks/ahead_of_time.py"]):
        assert changed_operations(files) == every
    found = changed_operations(["kernels/geglu.py", "kernels/plane_norm_tiles.py"])
    assert found == ["plane_norm", "geglu", "attention_block"], "the third begins with the first"
    assert changed_operations(["docs/kernels.md", "pvdm_fast/train.py"]) == []


def test_changes_are_seen_against_the_main_branch(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        name = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True)

    assert changed_files(tmp_path) is None, "no repository"
    git("init", "-q")
    for number in range(3):
        (tmp_path / f"{number}.py").write_text("")
        git("add", ".")
        git("commit", "-q", "-m", "more")
        assert changed_files(tmp_path) == ([f"{number}.py"] if number else None)
    git("update-ref", "refs/remotes/origin/main", "HEAD~2")
    assert changed_files(tmp_path) == ["1.py", "2.py"]
    (tmp_path / "1.py").write_text("not committed")
    git("update-ref", "refs/remotes/origin/main", "HEAD")
    assert changed_files(tmp_path) == ["1.py", "2.py"]


def test_refuses_the_interpreter() -> None:
    with pytest.raises(UserError, match="TRITON_INTERPRET is set, so kernels are not compiled: unset it"):
        kernel_resources.run([])


def test_writes_between_the_marks(tmp_path: Path) -> None:
    path = tmp_path / "triton_resources.md"
    begin, end = kernel_resources.BEGIN, kernel_resources.END
    path.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for _ in range(2):
        kernel_resources.write_docs([], path=path)
    text = path.read_text()
    assert text.startswith(f"before\n{begin}\nMade by") and text.endswith(f"{end}\nafter\n") and "old" not in text
    assert text.count("| kernel |") == 1


def test_does_not_write_without_marks(tmp_path: Path) -> None:
    path = tmp_path / "triton_resources.md"
    path.write_text("nothing")
    with pytest.raises(UserError, match="must have the lines"):
        kernel_resources.write_docs([], path=path)
