"""Runs that are small enough for tests: shared command lines and helpers."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import PIL.Image
import pytest
import torch

from pvdm_fast.jobs.files import whole_file
from pvdm_fast.train import main
from pvdm_fast.training import previews

SMALL = shlex.split("""
    --frames 4 --height 16 --width 16 --autoencoder-patch-size 8 --autoencoder-channels 16 --autoencoder-depth 1
    --autoencoder-num-heads 1 --autoencoder-head-dim 8 --autoencoder-batch-size 2 --autoencoder-warmup 2
    --diffusion-model-channels 32 --diffusion-channel-mult 1 --diffusion-num-res-blocks 1 --diffusion-num-heads 2
    --diffusion-attention-resolutions 1 --diffusion-batch-size 2 --diffusion-warmup 2 --diffusion-sampling-steps 2
    --save-every 100 --preview-every 100 --diffusion-cached-clips 0 --mixed-precision auto --optimizer adamw
    --autoencoder-latent-channels 4 --diffusion-prediction v --diffusion-learning-rate 3e-3
    --no-diffusion-class-conditional --held-out-clips 2 --workers 0 --device cpu --threads 1
""")


DRAWING = {name: getattr(previews, name) for name in ("_write_picture", "_write_loss_curves")}


def plain_picture(path: Path, content: Iterable[object]) -> None:
    """Reads what it is given, and writes an empty picture."""
    list(content)
    with whole_file(path) as temporary:
        PIL.Image.new("L", (8, 8)).save(temporary, format="PNG")


@contextmanager
def pictures(drawn: bool) -> Iterator[None]:
    """Whether runs draw their pictures and curves with Matplotlib, which is two thirds of a small run's time."""
    with pytest.MonkeyPatch.context() as patch:
        for name, draw in DRAWING.items():
            patch.setattr(previews, name, draw if drawn else plain_picture)
        yield


def steps(number: int) -> list[str]:
    """Options for this many steps of both stages."""
    return ["--autoencoder-steps", str(number), "--diffusion-steps", str(number)]


def losses(run: Path, stage: str) -> list[tuple[int, float, float | None]]:
    """(step, loss, gradient norm, if the model was trained) of every recorded step of a stage."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r.get("gradient_norm")) for r in records if r["stage"] == stage and "loss" in r]


def weights(run: Path, model: str) -> dict[str, torch.Tensor]:
    """The tensors of a saved model."""
    from safetensors.torch import load_file

    (file,) = (run / model).glob("*.safetensors")
    return load_file(file)


def same_weights(first: Path, second: Path, model: str) -> bool:
    """Bit for bit."""
    a, b = weights(first, model), weights(second, model)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_refused(arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of these options ends before it has a folder, with one sentence that has `message` in it."""
    assert main([*SMALL, *steps(1), "--run", str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
    assert not run.exists()


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """``python -m pvdm_fast.train`` in a separate process."""
    return subprocess.Popen(
        [sys.executable, "-m", "pvdm_fast.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def checkpoint_names(run: Path) -> list[str]:
    return sorted(item.name for item in (run / "checkpoints").iterdir())


def wait_for(condition: Callable[[], bool], process: object, seconds: float = 300) -> None:
    """Waits until ``condition`` holds while the process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the run did not get going"
        assert process.poll() is None, process.communicate()[0]  # type: ignore[attr-defined]
        time.sleep(0.1)
