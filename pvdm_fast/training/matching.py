"""Distillation by distribution matching (DMD2, Yin et al. 2024) as a training stage."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pvdm_fast.diffusion.distillation import (
    Velocity,
    matching_gradient,
    predicted_latent,
    window_ends,
)
from pvdm_fast.diffusion.flow import interpolate, logit_normal_times
from pvdm_fast.jobs.share import Share
from pvdm_fast.jobs.transfer import to_device
from pvdm_fast.training.config import TrainConfig
from pvdm_fast.training.distilling import TURNS, DistillationStage, velocity_of
from pvdm_fast.training.optimizer import make_optimizer
from pvdm_fast.training.second_model import KnownGradient, SecondModel
from pvdm_fast.training.stages import WHOLE, Classes
from pvdm_fast.training.trainer import learning_rate

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pvdm_fast.models import Autoencoder, Denoiser

CRITIC_RATE = 3.0  # times the student's learning rate, as in all trials (docs/notes/tiny_preset.md)
LEAST_TIME, LARGEST_TIME = 0.02, 0.98  # of comparisons: at 0 nothing is left to predict, at 1 nothing is known


class MatchingStage(DistillationStage):
    """The student's samples are to be distributed as the teacher's, see `pvdm_fast.diffusion.distillation`.

    Student and critic begin with the teacher's weights. After two turns of the critic the student has one. In both, the
    student's own steps lead from noise to a random one of its windows, whose prediction is judged. Between steps the
    prediction gets new noise, as in sampling. Clips give conditions and classes only.
    """

    ranks = False  # the loss is the critic's

    def __init__(self, config: TrainConfig, autoencoder: Autoencoder, student: Denoiser, teacher: Denoiser) -> None:
        super().__init__(config, autoencoder, student, teacher)
        critic = copy.deepcopy(teacher).train().requires_grad_(True)
        if config.diffusion.checkpointing:
            critic.enable_gradient_checkpointing()
        self.critic = SecondModel(critic, lambda nets: make_optimizer(config.optimizer, nets, config.diffusion))
        self._judged: list[Tensor] = []
        self._loss: Tensor | None = None

    def prepare(self, accelerator: Accelerator) -> None:
        super().prepare(accelerator)
        self.critic.prepare(accelerator)

    def before_step(self, step: int) -> None:
        super().before_step(step // TURNS)  # averages count the student's steps
        self.trains_model = step % TURNS == TURNS - 1
        self._judged = []
        self.critic.optimizer.zero_grad(set_to_none=True)
        self.critic.set_rate(CRITIC_RATE * learning_rate(self.options, step))

    def loss(
        self,
        model: nn.Module,
        video: Tensor,
        generator: torch.Generator,
        share: Share = WHOLE,
        classes: Classes = None,
    ) -> Tensor:
        """The critic's error on the student's samples. In the student's turn its gradient is that of the matching."""
        target, condition = self._latents(video, generator, share)
        clips, shape = share.world * len(target), target.shape[1:]
        window = int(torch.randint(self.windows, (), generator=generator))
        drawn = [share.of(torch.randn((clips, *shape), generator=generator)) for _ in range(window + 2)]
        normal = share.of(torch.randn(clips, generator=generator))
        drawn.append(logit_normal_times(normal, 0.0, 1.0, self.shift).clamp(LEAST_TIME, LARGEST_TIME))
        labels = self._labels(classes, len(target), generator, share)
        drawn += [] if labels is None else [labels]
        moved = to_device(drawn, target.device)
        labels = None if labels is None else moved.pop()
        *steps, noise, time = moved
        learns = self.trains_model and self.model.training
        sample = self._sample(velocity_of(model, condition, labels), steps, learns)
        critic = velocity_of(self.critic.prepared, condition, labels)
        if self.model.training and not self.trains_model:
            error = F.mse_loss(critic(interpolate(sample, noise, time), time).float(), noise - sample)
            self._loss = error
            return error.detach().requires_grad_()  # a leaf: its backward pass is empty
        gradient, error = matching_gradient(self._taught(condition, labels), critic, sample, noise, time)
        self._judged.append(gradient.square().mean())
        loss: Tensor = KnownGradient.apply(sample, gradient / gradient.numel(), error)
        return loss

    def _sample(self, student: Velocity, noises: list[Tensor], learns: bool) -> Tensor:
        """The clean latents (B, D, N) in float32 that the student predicts in the last of as many windows as there are
        noises."""
        clean = torch.zeros_like(noises[0])
        for window, noise in enumerate(noises):
            number = torch.full((len(noise),), window, device=noise.device)
            start = window_ends(number, self.windows, self.shift)[0]
            latent = interpolate(clean, noise, start)
            with torch.set_grad_enabled(learns and window == len(noises) - 1):
                clean = predicted_latent(latent, student(latent, start), start)
        return clean

    def after_backward(self) -> None:
        if self._loss is not None:
            self.critic.backward(self._loss / self.options.accumulate)
            self._loss = None

    def measured(self) -> dict[str, Tensor]:
        if self.trains_model:
            return {"matching": torch.stack(self._judged).mean()}
        return {"critic_gradient_norm": self.critic.clip(self.options.clip_norm or torch.inf)}

    def after_step(self, measured: Mapping[str, float]) -> None:
        if self.trains_model:
            super().after_step(measured)
        else:
            self.critic.step(measured["critic_gradient_norm"])

    def after_skip(self) -> None:
        if not self.trains_model:
            self.critic.abandon()

    def state(self) -> dict[str, Any]:
        return {**super().state(), "critic": self.critic.state()}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.critic.restore(state["critic"])
