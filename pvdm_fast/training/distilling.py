"""Distillation as a training stage: a denoiser learns to sample in few steps what its teacher samples in many."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pvdm_fast.diffusion.distillation import Velocity, distillation_loss, network_times
from pvdm_fast.diffusion.guidance import guided_prediction
from pvdm_fast.diffusion.sampling import check_pair, fitting_guidance
from pvdm_fast.errors import UserError
from pvdm_fast.jobs.processes import Processes
from pvdm_fast.training.config import OPTIONS, TrainConfig, get
from pvdm_fast.training.options import flag
from pvdm_fast.training.presets import SAMPLING_OPTIONS
from pvdm_fast.training.stages import DiffusionStage

if TYPE_CHECKING:
    from pvdm_fast.models import Autoencoder, Denoiser


TURNS = 3  # of distribution matching: the critic's, the critic's, the student's
SAMPLERS = {"distribution": "stochastic", "path": "auto"}  # by which a method's students are sampled
TIMES = ("time_mean", "time_std")  # of the options: they would change nothing here


class DistillationStage(DiffusionStage):
    """The student's mean velocity in windows of the teacher's path, see `pvdm_fast.diffusion.distillation`.

    It begins with the teacher's weights. Clips, conditions, classes and averaged weights are as in training a flow.
    """

    def __init__(self, config: TrainConfig, autoencoder: Autoencoder, student: Denoiser, teacher: Denoiser) -> None:
        super().__init__(config, autoencoder, student)
        check_pair(autoencoder, teacher)
        self.teacher = teacher.eval().requires_grad_(False)
        self.distillation = config.distillation
        self.windows = int(student.config["distilled_steps"])
        taught = teacher.config["distilled_steps"]
        self.teacher_is_distilled = taught is not None
        wanted = self.distillation.solver_steps if taught is None else taught
        self.solver_steps = math.ceil(wanted / self.windows)
        self.shift = float(student.config["time_shift"])

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.teacher.to(device)

    def before_training(self, clips: Iterable[Tensor], processes: Processes) -> None:
        """The latents' statistics are the teacher's, also where it has none."""

    def _draw_times(self, clips: int, generator: torch.Generator) -> Tensor:
        """Random windows (clips,), int64."""
        return torch.randint(self.windows, (clips,), generator=generator)

    def _error(
        self,
        model: nn.Module,
        target: Tensor,
        condition: Tensor,
        noise: Tensor,
        time: Tensor,
        labels: Tensor | None,
    ) -> Tensor:
        return distillation_loss(
            velocity_of(model, condition, labels),
            self._taught(condition, labels),
            target,
            noise,
            time,
            windows=self.windows,
            shift=self.shift,
            solver_steps=self.solver_steps,
            euler=self.teacher_is_distilled,
        )

    def _taught(self, condition: Tensor, labels: Tensor | None) -> Velocity:
        """The teacher's velocity, guided as the options say."""
        guidance = fitting_guidance(self.teacher, self.distillation.guidance)

        def velocity(latent: Tensor, time: Tensor) -> Tensor:
            return guided_prediction(self.teacher, latent, network_times(time), condition, guidance, labels)

        return velocity


def velocity_of(model: nn.Module, condition: Tensor, labels: Tensor | None) -> Velocity:
    """A denoiser's velocity, given the clip before and the class numbers of each clip, if it has any."""
    classed = {} if labels is None else {"class_labels": labels}

    def velocity(latent: Tensor, time: Tensor) -> Tensor:
        sample: Tensor = model(latent, network_times(time), condition=condition, **classed).sample
        return sample

    return velocity


def check_distillation(config: TrainConfig, teacher: Denoiser | None) -> None:
    """Raises UserError where a student can't follow the options, or ``teacher``, the denoiser of --init-from, can't
    teach them. For new runs, and for changes of those that go on."""
    options = config.distillation
    if options.steps is None:
        for name in ("method", "solver_steps", "guidance"):
            if getattr(options, name) != getattr(type(options), name):
                given = flag(OPTIONS[f"distillation.{name}"])
                raise UserError(f"{given} does nothing without --distillation-steps: give that too, or leave it out")
        return
    if config.stage != "diffusion" or teacher is None:
        raise UserError(
            "--distillation-steps needs --stage diffusion and a trained flow: name its run with --init-from, or use "
            "python -m pvdm_fast.distill RUN"
        )
    place = config.init_from
    if teacher.config["prediction"] != "flow":
        raise UserError(
            f"the denoiser in {place} predicts {teacher.config['prediction']}, and only a flow can be distilled: train "
            "one with --diffusion-prediction flow"
        )
    for key in SAMPLING_OPTIONS:
        if get(config, key) not in (get(TrainConfig(), key), 0.0):
            raise UserError(
                f"{flag(OPTIONS[key])} does nothing for a student, which has its own way to be sampled: leave it out, "
                "and give guidance that it learns along with --distillation-guidance"
            )
    for name in TIMES:
        if getattr(config.diffusion, name) != getattr(type(config.diffusion), name):
            given = flag(OPTIONS[f"diffusion.{name}"])
            raise UserError(f"{given} chooses the times of a flow, and a student learns its own few: leave it out")
    if config.diffusion.class_conditional != (teacher.config["num_classes"] is not None):
        have = "no classes" if teacher.config["num_classes"] is None else "classes"
        raise UserError(
            f"the denoiser in {place} has {have}, and its student can't differ: change --diffusion-class-conditional"
        )
    if options.method == "path":
        _check_path(config, teacher)
    else:
        _check_distribution(config, teacher)


def _check_path(config: TrainConfig, teacher: Denoiser) -> None:
    options, place = config.distillation, config.init_from
    taught, shift = teacher.config["distilled_steps"], config.diffusion.time_shift
    if taught is None:
        return
    if teacher.config["sampling_scheduler"] != SAMPLERS["path"]:
        raise UserError(
            f"the denoiser in {place} was distilled by distribution matching, and follows no path that it could show: "
            "name the run of the flow that taught it"
        )
    if options.solver_steps != type(options).solver_steps:
        raise UserError(
            f"--distillation-solver-steps does nothing here, because the denoiser in {place} was distilled itself and "
            "takes its own steps: leave it out"
        )
    if taught % options.steps or teacher.config["time_shift"] != shift or options.guidance:
        raise UserError(
            f"the denoiser in {place} was distilled for {taught} steps itself: take a number that divides it with "
            f"--distillation-steps, its --diffusion-time-shift {teacher.config['time_shift']:g}, and no guidance"
        )


def _check_distribution(config: TrainConfig, teacher: Denoiser) -> None:
    if teacher.config["distilled_steps"] is not None:
        raise UserError(
            f"the denoiser in {config.init_from} was distilled itself, and knows its own steps only: name the run of "
            "the flow that taught it"
        )
    if config.diffusion.steps < TURNS:
        raise UserError(
            f"--diffusion-steps must be {TURNS} at least with --distillation-method distribution: the student takes "
            "every third step"
        )
    if config.distillation.solver_steps != type(config.distillation).solver_steps:
        raise UserError(
            "--distillation-solver-steps belongs to --distillation-method path: choose that too, or leave it out"
        )
    if config.early_stop is not None:
        raise UserError(
            "--early-stop goes by the held-out loss, which in distribution matching is the critic's and says nothing "
            "of the student: leave it out"
        )
    if config.fsdp:
        raise UserError(
            "--fsdp doesn't cut the critic of --distillation-method distribution: choose --no-fsdp, or path"
        )
