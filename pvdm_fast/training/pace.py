"""How long training takes: from steps that are measured on this machine."""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pvdm_fast.jobs.interrupt import StopRequest
from pvdm_fast.jobs.processes import Processes
from pvdm_fast.training.config import TrainConfig
from pvdm_fast.training.hyperparameters import StageOptions

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from pvdm_fast.training.stages import Stage

MINUTE, HOUR, DAY = 60, 3600, 86400


def about(seconds: float) -> str:
    """A duration for people: ``less than a minute``, ``about 12 minutes``, ``about 7 days``."""
    if seconds < MINUTE:
        return "less than a minute"
    unit, name = (MINUTE, "minute") if seconds < 1.5 * HOUR else (HOUR, "hour") if seconds < 2 * DAY else (DAY, "day")
    number = f"{seconds / unit:.1f}".removesuffix(".0") if seconds < 3 * unit else f"{seconds / unit:.0f}"
    return f"about {number} {name}{'' if number == '1' else 's'}"


@dataclass
class Pace:
    """Steps that were measured, and of what. The first warms up, and counts only if there is no other."""

    first: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    of: str = ""

    def add(self, seconds: float) -> None:
        """Count a step that took so many seconds, its data included."""
        if self.first == 0.0:
            self.first = seconds
        else:
            self.steps, self.seconds = self.steps + 1, self.seconds + seconds

    @property
    def a_step(self) -> float:
        """Seconds of a step."""
        return self.seconds / self.steps if self.steps else self.first

    def line(self, stage: str, steps: int) -> str:
        """What ``steps`` steps take at this pace, without scores, previews and checkpoints."""
        measured = f"{self.steps} steps" if self.steps > 1 else "one step"
        pace = f"{self.a_step:.3g} s a step, measured over {measured}{self.of}"
        return f"{stage}: {about(steps * self.a_step)} for {steps} steps here ({pace})"


def measure(config: TrainConfig, stage: str, seconds: float) -> Pace:
    """Take steps of a stage, with new weights and rendered clips, for so many seconds, but one step at least.

    Where too few steps of the whole batch fit in that time, they are steps of one clip, and their time is multiplied.

    Raises:
        UserError: sizes that do not fit.
    """
    from pvdm_fast.training.building import make_accelerator

    options: StageOptions = getattr(config, stage)
    clips = options.batch_size * options.accumulate
    single = replace(options, batch_size=1, accumulate=1)
    alone = {stage: single, "data": "synthetic:shapes"}
    accelerator = make_accelerator(replace(config, **alone))  # type: ignore[arg-type]
    small = _take_steps(replace(config, **alone), stage, accelerator, seconds / 4)  # type: ignore[arg-type]
    if clips == 1 or 4 * clips * small.a_step > seconds:
        return Pace(small.first * clips, small.steps, small.seconds * clips, " of one clip" if clips > 1 else "")
    return _take_steps(replace(config, data="synthetic:shapes"), stage, accelerator, seconds)


def _take_steps(config: TrainConfig, name: str, accelerator: Accelerator, seconds: float) -> Pace:
    from pvdm_fast.training.encoding import cached_latents
    from pvdm_fast.training.run_folder import RunFolder
    from pvdm_fast.training.stages import DiffusionStage
    from pvdm_fast.training.trainer import Trainer

    pace, begun = Pace(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        stop = StopRequest(Processes(accelerator))
        stage = _new_stage(config, name)
        if isinstance(stage, DiffusionStage) and config.diffusion.cached_clips:  # its steps encode nothing
            few = replace(config, diffusion=replace(config.diffusion, cached_clips=config.diffusion.batch_size))
            with redirect_stdout(sys.stderr):
                stage.data = cached_latents(stage, few, Path(folder), accelerator, stop)
        trainer = Trainer(stage, config, RunFolder(Path(folder)), accelerator, stop)
        trainer.begin()
        while pace.first == 0.0 or time.perf_counter() - begun + pace.a_step < seconds:
            started = time.perf_counter()
            trainer.train_step(trainer.read())
            pace.add(time.perf_counter() - started)
    accelerator.free_memory()
    return pace


def _new_stage(config: TrainConfig, name: str) -> Stage:
    """A stage without a run: with new weights, the autoencoder's included."""
    from pvdm_fast.training.building import make_autoencoder, make_denoiser
    from pvdm_fast.training.stages import AutoencoderStage, DiffusionStage

    autoencoder = make_autoencoder(config)
    if name == "autoencoder":
        if config.autoencoder.checkpointing:
            autoencoder.enable_gradient_checkpointing()
        return AutoencoderStage(config, autoencoder)
    denoiser = make_denoiser(config, autoencoder)
    if config.diffusion.checkpointing:
        denoiser.enable_gradient_checkpointing()
    return DiffusionStage(config, autoencoder, denoiser)


def free_bytes(device: torch.device) -> int:
    """Memory that a job could take now: the GPU's, or the machine's."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
