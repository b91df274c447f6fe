"""Every signal with which a terminal or a scheduler ends a job saves and stops. A second one stops at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training.small import SMALL, checkpoint_names, steps, wait_for

from pvdm_fast.data import DataError
from pvdm_fast.jobs.signals import ENDING
from pvdm_fast.train import main
from pvdm_fast.training import trainer
from pvdm_fast.training.stages import AutoencoderStage


def train(run: Path, *arguments: str) -> int:
    return main([*SMALL, *steps(6), "--stage", "autoencoder", "--run", str(run), *arguments])


def send(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: int, pause: float = 0.7) -> None:
    """Sends this process signals during the given step, with ``pause`` seconds in between."""
    original, seen = AutoencoderStage.loss, []

    def loss(self: AutoencoderStage, *arguments: Any) -> torch.Tensor:
        seen.append(None)
        if len(seen) == step:
            for index, number in enumerate(numbers):
                time.sleep(pause if index else 0)
                os.kill(os.getpid(), number)
        return original(self, *arguments)

    monkeypatch.setattr(AutoencoderStage, "loss", loss)


def test_all_of_them_are_there() -> None:
    names = "SIGINT SIGTERM SIGHUP SIGQUIT SIGUSR1 SIGUSR2 SIGXCPU SIGPWR"
    assert {number.name for number in ENDING} == set(names.split())


@pytest.mark.parametrize("number", ENDING)
def test_each_saves_and_stops(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(item) for item in ENDING]
    send(monkeypatch, 3, number)
    assert train(tmp_path / "run") == 128 + number
    assert checkpoint_names(tmp_path / "run") == ["autoencoder-step-0000003"]
    assert "stopped and saved; continue with: python -m pvdm_fast.train --resume" in capsys.readouterr().out
    assert [signal.getsignal(item) for item in ENDING] == before


@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)]
)
def test_a_second_one_stops_at_once_with_its_own_code(
    numbers: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    send(monkeypatch, 3, *numbers)
    assert train(tmp_path / "run") == 128 + numbers[1]
    assert not (tmp_path / "run" / "checkpoints").exists()
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == "stopped at once" and "Traceback" not in error


def test_a_signal_that_a_launcher_passes_on_is_the_same_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    send(monkeypatch, 3, signal.SIGINT, signal.SIGTERM, pause=0.05)
    assert train(tmp_path / "run") == 128 + signal.SIGINT
    assert checkpoint_names(tmp_path / "run") == ["autoencoder-step-0000003"]


@pytest.mark.slow
def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send(monkeypatch, 3, signal.SIGHUP)
        assert train(tmp_path / "run") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def stall(monkeypatch: pytest.MonkeyPatch, wait: Any) -> None:
    """After two batches, ``wait`` is called instead of a third batch."""
    original = trainer.Trainer.batches

    def batches(self: trainer.Trainer) -> Iterator[Any]:
        source = original(self)
        yield next(source)
        yield next(source)
        wait()

    monkeypatch.setattr(trainer.Trainer, "batches", batches)


def test_a_signal_is_answered_while_no_batch_comes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wait() -> None:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(60)

    stall(monkeypatch, wait)
    started = time.monotonic()
    assert train(tmp_path / "run") == 128 + signal.SIGTERM
    assert time.monotonic() - started < 50
    assert checkpoint_names(tmp_path / "run") == ["autoencoder-step-0000002"]


def test_data_that_give_out_lose_no_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def give_out() -> None:
        raise DataError("no usable video any more")

    stall(monkeypatch, give_out)
    assert train(tmp_path / "run") == 2
    assert capsys.readouterr().err.endswith("error: no usable video any more\n")
    assert checkpoint_names(tmp_path / "run") == ["autoencoder-step-0000002"]


def test_training_in_a_thread(tmp_path: Path) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(train(tmp_path / "run", "--workers", "1")))
    thread.start()
    thread.join()
    assert codes == [0]
    assert (tmp_path / "run" / "results.json").is_file()


COMMANDS = {
    "train": [],
    "sample": ["/nothing"],
    "distill": ["."],
    "encode": ["/nothing", "/nothing", "--autoencoder", "/nothing"],
    "estimate": [],
    "convert": ["/nothing", "/nothing"],
    "info": [],
    "selftest": [],
    "tune": ["--dry-run"],
    "evaluate": ["/nothing", "--data", "synthetic:shapes"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_it_starts_is_one_line(command: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("preset: tiny\n")  # else distill ends before it imports torch
    process = subprocess.Popen(
        [sys.executable, "-m", f"pvdm_fast.{command}", *COMMANDS[command]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libtorch" in maps.read_text(), process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (error, process.returncode) == ("stopped at once\n", 130)


AT_THE_FIRST_IMPORT = """
import os, signal, sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "pvdm_fast._operations":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_in_the_first_moment_is_one_line(command: str, tmp_path: Path) -> None:
    """As the package itself is imported, some 20 ms after Python has started."""
    (tmp_path / "sitecustomize.py").write_text(AT_THE_FIRST_IMPORT)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    arguments = [sys.executable, "-m", f"pvdm_fast.{command}", *COMMANDS[command]]
    process = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (process.stderr, process.returncode) == ("stopped at once\n", 130)


def test_ctrl_c_in_other_programs_is_theirs(tmp_path: Path) -> None:
    """A program that imports this package, started with -m as our commands are."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("import pvdm_fast\n")
    code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    (tmp_path / "theirs" / "program.py").write_text(code)
    # A job in the background of a script would have SIGINT ignored.
    restored = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    arguments = [sys.executable, "-c", restored, "-m", "theirs.program", "pvdm_fast.train"]
    process = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert process.stdout == "True\n", process.stderr


def test_a_signal_leaves_no_half_a_video(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling has nothing to save: on any signal it stops at once, and removes its unfinished file."""
    from pvdm_fast.diffusion import sampling
    from pvdm_fast.sample import main as sample

    def killed(*arguments: Any, **options: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError

    monkeypatch.setattr(sampling, "sample_latents", killed)
    assert sample([str(finished), "--out", str(tmp_path / "out.npy"), "--device", "cpu"]) == 143
    assert not list(tmp_path.iterdir())
