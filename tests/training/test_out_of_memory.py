"""A GPU whose memory gives out: one sentence with what a step needs, and remedies that work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from training.small import SMALL, steps

from pvdm_fast.backends import precision
from pvdm_fast.estimate import GIB, estimate
from pvdm_fast.train import main
from pvdm_fast.training.run_folder import RunFolder
from pvdm_fast.training.trainer import Trainer


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_out_of_memory_is_one_sentence_with_the_estimate(
    stage: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a step needs, and what to change. The run goes on by the remedy that it names first."""
    run, builds_on = tmp_path / "run", ["--autoencoder-from", str(finished)] * (stage == "diffusion")
    with monkeypatch.context() as patch:

        def step(*arguments: object) -> NoReturn:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

        patch.setattr(Trainer, "train_step", step)
        patch.setattr(precision, "cpu_multiplies_bfloat16", lambda: True)
        assert main([*SMALL, *steps(1), "--stage", stage, *builds_on, "--run", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    found = estimate(replace(RunFolder(run).read_config(), mixed_precision="no"), stage)
    needs = (
        f"puts a step of 2 clips at {found.peak / GIB:.3f} GiB, {found.standing / GIB:.3f} GiB of which stand between"
    )
    assert line.startswith(f"error: the {stage} stage is out of memory: python -m pvdm_fast.estimate {needs} steps; ")
    remedies = line.partition("; ")[2].split(", or ")
    assert remedies == [
        f"continue with python -m pvdm_fast.train --resume {run} --{stage}-checkpointing",
        f"start a new run with a smaller --{stage}-batch-size, and --{stage}-accumulate larger by as much",
        "start a new run with --mixed-precision bf16",
        "take smaller clips or a smaller model",
    ]
    assert main(["--resume", str(run), f"--{stage}-checkpointing"]) == 0
