"""`python -m benchmarks.first_contact`: the walk, its clocks and its page; parts of the GPU by stand-ins."""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import build_tools
from benchmarks.cases import all_cases
from benchmarks.first_contact import __main__ as command
from benchmarks.first_contact import checking, child, page, plot, preparing, speed, walk
from benchmarks.first_contact.context import Context, LeftOut, Wrong, read_json, write_json
from benchmarks.first_contact.parts import FUNCTIONS, PARTS, Part
from benchmarks.first_contact.speed import Measurement
from benchmarks.first_contact.walk import CUT, DONE, FAILED, LEFT, Outcome, Walk
from pvdm_fast import selftest
from pvdm_fast.backends import choice
from pvdm_fast.selftest import Job, Result

ROOT = Path(__file__).resolve().parents[2]


def context(tmp_path: Path, name: str = "part", device: str = "cpu", seconds: float = 100) -> Context:
    return Context(name, device, True, tmp_path, seconds)


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# ---- the walk


SCRIPTS = {
    "good": "open('good.json', 'w').write('{\"rows\": []}'); print('all is well')",
    "missing": "import sys; open('missing.json', 'w').write('{\"left_out\": \"it needs a fish\"}'); sys.exit(3)",
    "crash": "import os, signal; print('at the brink', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
    "wrong": "import sys; print('2 of 3 are wrong'); sys.exit(1)",
    "hang": "import subprocess as s; p = s.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()",
    "last": "print('still here')",
}


@pytest.fixture
def walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Walk, list[Outcome]]:
    """A walk whose parts end in every way there is."""
    monkeypatch.setattr(walk, "GRACE", 0.2)
    monkeypatch.setattr(walk, "ROOT", tmp_path)
    monkeypatch.setattr(Walk, "_command", lambda self, part, seconds: [sys.executable, "-c", SCRIPTS[part.name]])
    weights = {"hang": 0.001}
    parts = [Part(name, f"Part {name}", weights.get(name, 1), "a:b") for name in SCRIPTS]
    the_walk = Walk(tmp_path, "cpu", True, 200, parts)
    return the_walk, the_walk.run(lambda ended: page.write(the_walk, ended))


def ended(process: int) -> bool:
    """Whether a process is gone, or only waits to be counted, within 5 s."""
    for _ in range(50):
        state = Path(f"/proc/{process}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_part_that_fails_costs_only_itself(walked: tuple[Walk, list[Outcome]]) -> None:
    _, outcomes = walked
    assert {o.part: o.status for o in outcomes} == {
        "good": DONE, "missing": LEFT, "crash": FAILED, "wrong": FAILED, "hang": CUT, "last": DONE,
    }  # fmt: skip
    lines = {outcome.part: outcome.lines for outcome in outcomes}
    assert lines["missing"] == ["it needs a fish"]
    assert lines["crash"] == ["at the brink", "(ended by SIGSEGV)"]
    assert lines["wrong"] == ["2 of 3 are wrong", "(exit code 1)"]
    assert ended(int(lines["hang"][0]))  # what the part started ended with it
    with pytest.raises(command.Failed, match="3 of 6 parts failed: Part crash, Part wrong, Part hang") as failure:
        command.report(outcomes)
    assert failure.value.exit_code == 1


def test_the_page_says_what_failed(walked: tuple[Walk, list[Outcome]]) -> None:
    the_walk, _ = walked
    text = (the_walk.out / page.PAGE).read_text()
    for words in ("it needs a fish", "at the brink", "2 of 3 are wrong", "A dry walk", "| Part last | done |"):
        assert words in text
    stored = json.loads((the_walk.out / page.NUMBERS).read_text())
    assert [part["status"] for part in stored["parts"]] == [DONE, LEFT, FAILED, FAILED, CUT, DONE]
    assert stored["found"]["missing"] == {"left_out": "it needs a fish"}


def test_the_page_is_written_after_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And time that a part leaves goes to those after it."""
    shares: list[float] = []

    def run_part(self: Walk, part: Part, seconds: float) -> Outcome:
        shares.append(seconds)
        return Outcome(part.name, part.title, DONE, 0.0, [])

    monkeypatch.setattr(Walk, "run_part", run_part)
    the_walk, seen = Walk(tmp_path, "cpu", True, 92), []

    def after_each(ended: list[Outcome]) -> None:
        page.write(the_walk, ended)
        seen.append(len(json.loads((tmp_path / page.NUMBERS).read_text())["parts"]))

    the_walk.run(after_each)
    assert seen == list(range(1, len(PARTS) + 1))
    weights = [part.weight for part in PARTS]
    assert shares == pytest.approx([90 * w / sum(weights[i:]) for i, w in enumerate(weights)], rel=0.05)


def test_parts_are_found() -> None:
    names = [part.name for part in PARTS]
    assert names == list(dict.fromkeys(names))
    assert set(page.SECTIONS) == set(names)
    order = ["probe", "build", "self-test", "goldens", "sanitizer", "peaks", "operations", "networks"]
    assert names == [*order, "sampler-step", "training-step", "tune"]
    for function in FUNCTIONS.values():
        module, _, name = function.partition(":")
        assert callable(getattr(__import__(f"benchmarks.first_contact.{module}", fromlist=[name]), name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "run with --device cpu"),
        (["--minutes", "0"], "--minutes must be at least 0.5, not 0"),
        (["--colour"], "there is no option --colour"),
    ],
)
def test_wrong_options(tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU: run with CUDA_VISIBLE_DEVICES=")
    out = tmp_path / "out"
    assert command.main(["--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_the_whole_walk_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path), "--device", "cpu", "--dry", "--minutes", "120"]) == 0, (
        capsys.readouterr().out
    )
    stored = json.loads((tmp_path / page.NUMBERS).read_text())
    left_out = {part["part"] for part in stored["parts"] if part["status"] == LEFT}
    assert left_out == {"build", "sanitizer", "sampler-step", "tune"}
    found = stored["found"]
    assert len(found["self-test"]["results"]) == found["self-test"]["planned"] > 0
    assert [row["problem"] for row in found["goldens"]["results"]] == [""] * 6
    measured = {row["case"] for part in ("operations", "networks") for row in found[part]["rows"]}
    assert measured == set(all_cases())
    assert {row["network"] for row in found["training-step"]["rows"]} == {"denoiser", "autoencoder"}
    assert found["tune"]["planned"] > 10 and found["sampler-step"]["median"]["launched"] > 0
    text = (tmp_path / page.PAGE).read_text()
    for part in PARTS:
        if part.name not in ("build", "sanitizer"):
            assert f"## {part.title}" in text
    assert "no time for" not in text
    drawn = ElementTree.parse(tmp_path / page.PLOT).getroot()
    assert len(drawn.findall("{*}rect")) > len(measured)


# ---- what a part knows


def test_facts_are_whole_and_plain(tmp_path: Path) -> None:
    one = context(tmp_path)
    one.keep(error=math.inf, size=(1, 2))
    one.add("rows", {"x": math.nan})
    one.add("rows", {"x": 1.0})
    assert read_json(tmp_path / "part.json") == {"error": None, "size": [1, 2], "rows": [{"x": None}, {"x": 1.0}]}
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]


def test_time_is_asked_for_before_each_item(tmp_path: Path) -> None:
    one = context(tmp_path, seconds=1000)
    done = []
    for item in one.while_time(["a", "b", "c", "d"], least=10):
        done.append(item)
        if item == "b":
            one.seconds = 0
    assert done == ["a", "b"]
    assert read_json(tmp_path / "part.json") == {"no_time_for": ["c", "d"]}


@pytest.mark.parametrize(
    ("error", "code", "kept"),
    [(LeftOut("no fish"), 3, {"left_out": "no fish"}), (Wrong("1 is 2"), 1, {"wrong": "1 is 2"}), (None, 0, {})],
)
def test_how_a_child_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, code: int, kept: dict[str, str]
) -> None:
    def probe(context: Context) -> None:
        assert (context.device, context.dry, context.seconds) == ("cpu", True, 50.0)
        if error:
            raise error

    alarms: list[int] = []
    monkeypatch.setattr(preparing, "probe", probe)
    monkeypatch.setattr(child.signal, "alarm", alarms.append)
    assert child.main(["probe", "--device", "cpu", "--dry", "--out", str(tmp_path), "--seconds", "50"]) == code
    assert read_json(tmp_path / "probe.json") == kept
    assert alarms == [60]


BARE = """
import sys
ABSENT = {"diffusers", "accelerate", "av", "PIL", "matplotlib", "yaml", "tqdm", "pynvml", "tensorboard", "transformers"}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)
installed = [finder for finder in sys.meta_path if getattr(finder, "__module__", "").startswith("__editable__")]
sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in installed]
sys.meta_path[:] = [Without(finder) if hasattr(finder, "find_spec") else finder for finder in sys.meta_path]
from benchmarks.first_contact import child
from benchmarks.first_contact.context import importable
print("installed", importable("pvdm_fast.kernels"))
for part in ("probe", "sampler-step", "training-step"):
    code = child.main([part, "--device", "cpu", "--dry", "--out", sys.argv[1], "--seconds", "300"])
    print(part, code)
from benchmarks.first_contact import checking, page, speed, tuning, walk
from pvdm_fast.analysis import goldens
print(len(goldens.denoiser().state_dict()), len(goldens.autoencoder().state_dict()))
"""


@pytest.mark.slow
def test_without_any_other_package(tmp_path: Path) -> None:
    """PyTorch, Triton, numpy, safetensors and einops are enough, for the networks too; ours is not installed either."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "installed False" in result.stdout  # the source tree alone
    assert "probe 0" in result.stdout and "training-step 0" in result.stdout and "sampler-step 3" in result.stdout
    assert "diffusers" in read_json(tmp_path / "probe.json")["missing"]
    assert read_json(tmp_path / "training-step.json")["without_diffusers"] is True
    rows = read_json(tmp_path / "training-step.json")["rows"]
    assert [row["network"] for row in rows] == ["denoiser", "autoencoder"]


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


CHILD = "benchmarks.first_contact.checking.child_command"


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

    monkeypatch.setattr(selftest, "jobs", lambda device, full: iter([*jobs, "all triton not run: no."]))
    monkeypatch.setattr(selftest, "refusals", lambda device: iter([]))
    monkeypatch.setattr(CHILD, command)
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
    monkeypatch.setattr(CHILD, lambda *arguments: [sys.executable, "-c", script])
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
    assert set(one.found["cases"]) == set(choice.SERVED["cpu"])


def test_one_operation_in_a_process(tmp_path: Path) -> None:
    """What such a process does, here in this one."""
    if reason := choice.unavailable("cpu"):
        pytest.skip(reason)
    one = context(tmp_path)
    checking.self_test_of(one, "cpu/geglu")
    assert [row["precision"] for row in one.found["results"]] == ["float32", "bfloat16", "float16"]
    assert not any(row["problem"] for row in one.found["results"])


def test_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(tmp_path / "nvidia-smi", "print('Card, 580.1, 96.0, 700.00 W, 1980 MHz, 2619 MHz, Enabled')")
    monkeypatch.setenv("PATH", str(tmp_path))
    said = preparing._driver()
    assert list(said) == list(preparing.FIELDS)
    assert (said["driver_version"], said["ecc.mode.current"]) == ("580.1", "Enabled")
    executable(tmp_path / "nvidia-smi", "exit(9)")
    assert preparing._driver() == {}


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
    monkeypatch.setattr(speed, "relative_error", lambda found, exact: 0.5)
    monkeypatch.setattr(speed, "TF32_ROUNDING", 1e-3)
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


# ---- the page


def row(case: str, **ratio: float) -> dict[str, Any]:
    return {
        "case": case, "direction": "forward", "precision": "bfloat16", "median": {"ours": 0.002}, "ratio": ratio,
        "flops": 1e12, "bytes": 1e9, "memory": {"ours": 1 << 20, "eager": 3 << 20},
    }  # fmt: skip


def test_losses_and_shares_of_the_floor() -> None:
    peaks = {
        "products": [{"precision": "bfloat16", "flops_per_second": 1e15}],
        "memory": [{"bytes": 1, "bytes_per_second": 2e12}],
    }
    lines = page._speed({"rows": [row("a", eager=2.0, sdpa=0.5), row("b", eager=1.0)]}, {"peaks": peaks})
    assert (
        lines[0]
        == "| case | direction | dtype | ours, ms | eager / ours | sdpa / ours | of the floor | MiB, ours / eager |"
    )
    assert lines[2] == "| a | forward | bfloat16 | 2.000 | 2.00x | **0.50x** | 50 % | 1 / 3 |"
    assert lines[3] == "| b | forward | bfloat16 | 2.000 | 1.00x |  | 50 % | 1 / 3 |"


def test_the_page_of_a_card(tmp_path: Path) -> None:
    """Every section from what the parts write on a GPU; what is missing is named."""
    result = {"what": "plane_conv", "backend": "triton", "precision": "tf32", "error": None, "allowed": 1e-3}
    card = {"capability": "9.0", "memory": 80 << 30, "multiprocessors": 132}
    found: dict[str, dict[str, Any]] = {
        "probe": {"name": "NVIDIA H100", "card": card, "driver": {"driver_version": "580"}, "missing": ["av"]},
        "build": {"compiler": "nvcc 13.0", "targets": ["sm_90"]},
        "self-test": {"results": [{**result, "problem": "too far"}, {**result, "error": 0.0, "problem": ""}]},
        "goldens": {"results": [{**result, "error": 1e-6, "problem": ""}]},
        "sanitizer": {"runs": [{"tool": "memcheck", "backend": "cuda", "cases": [1], "status": "clean", "seconds": 3}]},
        "peaks": {"products": [{"precision": "bfloat16", "flops_per_second": 790e12}]},
        "operations": {"rows": [row("a", eager=2.0) | {"left_out": ["sdpa cudnn: no kernel"]}] * 2,
                       "no_time_for": [f"case {i}" for i in range(10)]},
        "networks": {"rows": [], "problems": [{"case": "denoiser", "problem": "no"}], "too_large": [{"case": "big"}]},
        "sampler-step": {"median": {"launched": 0.01, "graph": 0.002}, "errors": [0.0], "allowed": 0.012},
        "training-step": {"rows": [{
            "network": "denoiser", "clips": 4, "median": {"ours": 0.1, "sdpa": 0.3},
            "memory": {"ours": 1 << 30, "sdpa": 2 << 30}, "loss": {"ours": 1.0, "sdpa": 1.0},
        }]},
        "tune": {"planned": 9, "entries": [{"entry": "geglu", "config": "Config()", "problem": ""}]},
    }  # fmt: skip
    for name, content in found.items():
        write_json(tmp_path / f"{name}.json", content)
    the_walk = Walk(tmp_path, "cuda", False, 540)
    page.write(the_walk, [Outcome(part.name, part.title, DONE, 1.0, []) for part in PARTS])
    text = (tmp_path / page.PAGE).read_text()
    for words in (
        "# NVIDIA H100", "compute capability 9.0, 80 GiB, 132 multiprocessors", "nvcc 13.0 for sm_90",
        "1 of 2 comparisons are right", "| plane_conv | triton | tf32 | not finite | 1.0e-03 | too far |",
        "790.00 TFLOP/s", "case 7 and 2 more", "FAILED: denoiser: no", "does not fit in memory: big",
        "| graph | 2.000 |", "3.00x | 1.00 / 2.00", "1 of 9 entries timed", f"({page.PLOT})",
        "\n- sdpa cudnn: no kernel\n- no time for",
    ):  # fmt: skip
        assert words in text, words
    assert "dry walk" not in text


def test_the_plot() -> None:
    drawn = ElementTree.fromstring(
        plot.ratios([row("a < b", eager=2.0, sdpa=0.01), row("c", eager=100.0)], "Card & co")
    )
    bars = [rect for rect in drawn.findall("{*}rect") if rect.get("fill") != "white"]
    assert len(bars) == 3
    assert all(plot.LEFT <= float(bar.get("x", "0")) <= plot.LEFT + plot.WIDTH for bar in bars)
    assert "a < b, forward, bfloat16" in [text.text for text in drawn.findall("{*}text")]
    assert plot.ratios([], "Card") == ""


def test_results_cross_processes() -> None:
    """Infinity has no word in JSON; it comes back as what it was."""
    result = Result("geglu", "cuda", "tf32", math.inf, 1e-3, "RuntimeError: no")
    assert checking._number(None) == math.inf and checking._number(0.5) == 0.5
    assert "FAILED: RuntimeError: no" in str(result)
