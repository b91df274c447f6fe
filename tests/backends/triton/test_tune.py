"""`python -m pvdm_fast.tune`: what is planned for a network, how a configuration is chosen, and what is written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")
import triton
import triton.language as tl

from pvdm_fast import tune
from pvdm_fast.analysis import tuning
from pvdm_fast.analysis.workload import Call, TensorSpec, calls
from pvdm_fast.backends import choice
from pvdm_fast.errors import UserError
from pvdm_fast.kernels import configs
from pvdm_fast.kernels.configs import TABLES, ConfigTable
from pvdm_fast.kernels.launch import Config, launch

CPU = torch.device("cpu")
KEY = ("sm90", "any", "float32")


@triton.jit
def double(x, y, n, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) * (2.0 + FAULT), mask=i < n)


PRESENT = Config({"BLOCK": 16, "FAULT": 0})
QUICK, SLOW, WRONG = (Config({"BLOCK": block, "FAULT": fault}) for block, fault in ((64, 0), (32, 0), (128, 1)))
IMPOSSIBLE = Config({"BLOCK": 48, "FAULT": 0})  # not a power of two
OTHER = Config({"BLOCK_M": 32})


class Doubling:
    """An operation with one kernel."""

    table: ConfigTable

    @classmethod
    def forward(cls, x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        config = cls.table(x.device, "any", x.dtype)
        launch(double, (triton.cdiv(len(x), config.blocks["BLOCK"]),), x, y, len(x), config=config)
        return y


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    candidates = (SLOW, PRESENT, QUICK, WRONG, IMPOSSIBLE, OTHER, QUICK)
    Doubling.table = ConfigTable("double", {("*", "*", "*"): PRESENT}, candidates)
    monkeypatch.setattr(choice, "implementation", lambda backend, op: Doubling)
    yield Call("double", "forward", (TensorSpec((100,), (1,), 0, torch.float32),))
    del TABLES["double"]


def timer_of(seconds: dict[int, float]) -> Callable[[Callable[[], object]], float]:
    """A timer that runs the kernel and returns the given time for its block."""

    def timer(function: Callable[[], object]) -> float:
        function()
        (config,) = Doubling.table.asked.values()
        return seconds[config.blocks["BLOCK"]]

    return timer


def choose(call: Call, seconds: dict[int, float]) -> tuple[tuning.Task, Config | None, list[str]]:
    (task,) = tuning.plan([call], "sm90")
    said: list[str] = []
    with configs.assume("sm90"):
        return task, tuning.best(task, CPU, timer_of({128: 0.1, **seconds}), said.append), said


def test_plan_has_only_what_fits(call: Call) -> None:
    """Each candidate once, configured by the same blocks, and not what serves already."""
    (task,) = tuning.plan([call, call], "sm90")
    assert task.key == KEY
    assert task.present == PRESENT
    assert task.candidates == [SLOW, QUICK, WRONG, IMPOSSIBLE]
    assert not Doubling.table.asked


def test_quickest_is_chosen(call: Call) -> None:
    _, chosen, said = choose(call, {16: 1.0, 32: 0.9, 64: 0.5})
    assert chosen == QUICK
    assert any("128" in line and "its results differ" in line for line in said)
    assert any("48" in line and "left out" in line for line in said)
    assert "2.00x" in said[-1]


def test_small_gains_do_not_count(call: Call) -> None:
    _, chosen, said = choose(call, {16: 1.0, 32: 1.1, 64: 0.98})
    assert chosen is None
    assert "stays as it is" in said[-1]


def test_an_entry_that_fails_is_said_and_the_next_goes_on(call: Call) -> None:
    """What serves now can't be run, or timed: the entry stays as it is, and its table asks for nothing any more."""
    (good,) = tuning.plan([call], "sm90")
    broken = ConfigTable("broken", {("*", "*", "*"): IMPOSSIBLE}, (QUICK,))
    bad = tuning.Task(broken, KEY, [call])
    said: list[str] = []
    seconds = {16: 1.0, 32: 0.9, 64: 0.5, 128: 0.1}

    def timer(function: Callable[[], object]) -> float:
        function()
        if broken.asked:
            raise RuntimeError("device-side assert\nmore lines")
        return seconds[next(iter(Doubling.table.asked.values())).blocks["BLOCK"]]

    try:
        with configs.assume("sm90"):
            serving, Doubling.table = Doubling.table, broken
            ways = tuning.best_of_each([bad, good], CPU, timer, said.append)
            failed = next(ways)
            Doubling.table = serving
            (found,) = ways
            assert not broken.asked and not serving.asked
    finally:
        del TABLES["broken"]
    assert failed.config is None and failed.problem
    assert any("stays as it is, it can't be timed" in line and failed.problem in line for line in said)
    assert (found.config, found.problem) == (QUICK, "")


@pytest.mark.parametrize("problem", ["", "RuntimeError: an illegal memory access"])
def test_what_was_found_is_written_at_once(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], problem: str
) -> None:
    """Before the next entry begins; one that fails is no reason to lose the others, and the exit code tells."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choice, "interpreting", lambda: False)
    monkeypatch.setattr(configs, "architecture", lambda device: "sm90")
    monkeypatch.setattr(tuning.workload, "calls", lambda *arguments: [call])
    table = tmp_path / "pvdm_fast" / "triton.json"

    def best_of_each(tasks: list[tuning.Task], *arguments: object) -> Iterator[tuning.Found]:
        (task,) = tasks
        yield tuning.Found(task, QUICK)
        assert json.loads(table.read_text())["double"]["sm90/any/float32"]["blocks"] == QUICK.blocks
        yield tuning.Found(task, None, problem or "")

    monkeypatch.setattr(tuning, "best_of_each", best_of_each)
    monkeypatch.setitem(choice.SERVED, "triton", ("forward", "double"))
    assert tune.main(["--operations", "double"]) == (1 if problem else 0)
    captured = capsys.readouterr()
    assert "1 entries written to" in captured.out
    assert ("1 of 1 entries can't be timed" in captured.err) == bool(problem)
    assert ("sm90/any/float32" in table.read_text()) == bool(problem)


def test_written_table_serves(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(configs, "architecture", lambda device: "sm90")
    task, chosen, _ = choose(call, {16: 1.0, 32: 0.9, 64: 0.5})
    tuning.write_user_table([(task, chosen)], configs.user_table())
    configs._tuned.cache_clear()
    assert Doubling.table(CPU, "any", torch.float32) == QUICK
    assert Doubling.table(CPU, "any", torch.float16) == PRESENT
    configs._tuned.cache_clear()


def test_other_entries_are_kept(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "triton.json"
    old = {"double": {"sm90/any/float32": {}, "sm80/any/float32": {"num_warps": 4}}, "triple": {"a/b/c": {}}}
    path.write_text(json.dumps(old))
    (task,) = tuning.plan([call], "sm90")
    tuning.write_user_table([(task, QUICK)], path)
    written = json.loads(path.read_text())
    expected = {"blocks": QUICK.blocks, "num_warps": 4, "num_stages": 2}
    assert written == {"double": {**old["double"], "sm90/any/float32": expected}, "triple": {"a/b/c": {}}}
    tuning.write_user_table([(task, None)], path)
    assert "sm90/any/float32" not in json.loads(path.read_text())["double"]
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_table_is_replaced(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "triton.json"
    path.parent.mkdir()
    path.write_text("{")
    (task,) = tuning.plan([call], "sm90")
    tuning.write_user_table([(task, QUICK)], path)
    assert list(json.loads(path.read_text())) == ["double"]


def test_failed_write_leaves_the_table(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "triton.json"
    path.write_text("{}\n")
    (task,) = tuning.plan([call], "sm90")

    def full(self: Path, text: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        tuning.write_user_table([(task, QUICK)], path)
    assert path.read_text() == "{}\n"
    assert list(tmp_path.iterdir()) == [path]


def test_real_operations_in_the_interpreter() -> None:
    """Plans the operations' own launchers, and times the one with the smallest tensors."""
    tiny = [call for call in calls("tiny", torch.float32) if call.op in choice.SERVED["triton"]]
    tasks = tuning.plan(tiny, "interpreter")
    assert tasks
    smallest = min(tasks, key=lambda task: sum(map(tuning.size_of, task.calls)))
    with configs.assume("interpreter"):
        inputs = [call.inputs(CPU, lambda storage: storage.normal_(0, 0.1)) for call in smallest.calls]
        seconds, results = tuning.measure(smallest, smallest.present, inputs, lambda function: 1.0)
    assert seconds >= len(smallest.calls)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: run with CUDA_VISIBLE_DEVICES=")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "timed on a GPU, but PyTorch finds none: see python -m pvdm_fast.info" in capsys.readouterr().err


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--dry-run", "--size", "tiny", "--dtype", "float16", "--operations", "geglu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].startswith("geglu_forward ") and "/float16: " in lines[0] and "geglu forward (1×512×512)" in lines[0]
    )
    assert lines[-1].startswith("2 entries, ")


@pytest.mark.parametrize(
    ("option", "message"), [(["--size", "huge"], "huge"), (["--batch", "0"], "--batch must be at least 1, not 0")]
)
def test_wrong_options(option: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([*option, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_help() -> None:
    result = subprocess.run([sys.executable, "-m", "pvdm_fast.tune", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "triton.json" in result.stdout


def test_a_table_that_cannot_be_written_is_found_before_anything_is_timed(tmp_path: Path) -> None:
    (tmp_path / "pvdm_fast").write_text("a file in the folder's place")
    with pytest.raises(UserError, match="cannot make the folder"):
        tuning.check_writable(tmp_path / "pvdm_fast" / "triton.json")
    tuning.check_writable(tmp_path / "settings" / "triton.json")
    assert (tmp_path / "settings").is_dir()


def test_an_unknown_operation(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--dry-run", "--operations", "gelu"]) == 2
    assert "Triton has no kernel for 'gelu'" in capsys.readouterr().err
