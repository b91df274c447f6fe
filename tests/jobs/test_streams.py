"""If output can't be written, or only in part, the work still gets done."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training.small import SMALL, steps

from pvdm_fast.jobs.streams import Steady, steady_output

INFO = [sys.executable, "-m", "pvdm_fast.info"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_closed_pipe_is_no_error() -> None:
    """As with `| head -1`."""
    process = subprocess.Popen(INFO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


@pytest.mark.slow
def test_closed_streams_are_no_error() -> None:
    line = f"exec {shlex.join(INFO)} >&- 2>&-"
    assert subprocess.run(["sh", "-c", line], env=ENVIRONMENT, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_of_logs_doesn_t_end_a_run(tmp_path: Path) -> None:
    """Both streams go to a full disk. Everything is still trained and saved."""
    run = tmp_path / "run"
    with open("/dev/full", "w") as full:
        code = subprocess.run(
            [sys.executable, "-m", "pvdm_fast.train", *SMALL, *steps(2), "--run", str(run)],
            stdout=full,
            stderr=full,
            env=ENVIRONMENT,
            check=False,
        ).returncode
    assert code == 0
    assert {"results.json", "autoencoder", "denoiser", "samples.mp4"} <= {item.name for item in run.iterdir()}


@pytest.mark.slow
def test_letters_that_ascii_lacks_are_escaped(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pvdm_fast.train", "--config", "/no/fîlm\udce9.yaml"],
        capture_output=True,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii:strict"},
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == b"error: cannot read the config file /no/f\\xeelm\\xe9.yaml: No such file or directory\n"


class Failing(io.StringIO):
    """Refuses what it is told to refuse."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error: BaseException | None = error

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)

    def flush(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    "error", [OSError(28, "full"), BrokenPipeError(), ValueError("closed"), RuntimeError("reentrant call")]
)
def test_a_stream_that_fails_for_a_while(error: BaseException) -> None:
    inner = Failing(error)
    stream: Any = Steady(inner)
    print("lost", file=stream, flush=True)
    assert stream.lost and not stream.isatty()
    inner.error = None
    print("kept", file=stream, flush=True)
    assert inner.getvalue() == "kept\n"


def test_the_streams_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with steady_output():
        assert isinstance(sys.stdout, Steady)
        print("ä\udce9")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out.startswith("ä")
