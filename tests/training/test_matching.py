"""What distribution matching makes student and critic learn, against the same written out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tolerances
import torch
from accelerate import Accelerator
from comparison import assert_close
from torch import Tensor
from torch.nn import functional as F

from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.training.config import make_config
from pvdm_fast.training.matching import CRITIC_RATE, MatchingStage
from pvdm_fast.training.trainer import learning_rate, step_generator

WINDOWS, CLIPS = 2, 3


def make_stage(**changes: Any) -> MatchingStage:
    """A student of two steps, and a critic that differs from the teacher."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(
        frames=4, height=16, width=16, channels=16, depth=1, num_heads=1, head_dim=8, patch_size=8
    )
    sizes: dict[str, Any] = dict(time=4, height=2, width=2, latent_channels=4, model_channels=32, channel_mult=[1])
    sizes |= dict(num_res_blocks=1, num_heads=2, attention_resolutions=[1], num_classes=2, class_names=["a", "b"])
    teacher = Denoiser(**sizes, prediction="flow", time_shift=2.0)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    student = Denoiser(
        **sizes, prediction="flow", time_shift=2.0, distilled_steps=WINDOWS, sampling_scheduler="stochastic"
    )
    student.load_state_dict(teacher.state_dict())
    keys = {"distillation.steps": WINDOWS, "distillation.guidance": 1.0, "diffusion.batch_size": CLIPS}
    stage = MatchingStage(make_config({**keys, **changes}), autoencoder, student, teacher)
    with torch.no_grad():
        for parameter in stage.critic.nets.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    stage.prepare(Accelerator(cpu=True))
    return stage


def clips() -> tuple[Tensor, list[str]]:
    """Latents (B, windows, D, N) as they are cached, and their classes."""
    return torch.randn(CLIPS, 2, 4, 20, generator=torch.Generator().manual_seed(1)), ["a", "b", "a"]


@contextmanager
def noted(module: torch.nn.Module) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """(latent, time in [0, 1] as (B, 1, 1), velocity) of each call of a denoiser."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(_: Any, inputs: tuple[Tensor, ...], result: Any) -> None:
        found.append((inputs[0], inputs[1].view(-1, 1, 1) / 1000, result.sample))

    handle = module.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def clean(latent: Tensor, time: Tensor, velocity: Tensor) -> Tensor:
    return latent - time * velocity


def target(sample: Tensor, latent: Tensor, time: Tensor) -> Tensor:
    """What a flow should say of a noisy sample: its noise minus the sample."""
    return ((latent - (1 - time) * sample) / time - sample).detach()


@pytest.mark.parametrize("seed", range(4))
def test_the_student_goes_against_the_difference_of_critic_and_teacher(seed: int) -> None:
    """Only what it predicted last has a gradient. The teacher is guided with weight 1."""
    stage = make_stage()
    stage.before_step(2)
    assert stage.trains_model
    video, classes = clips()
    with noted(stage.model) as own, noted(stage.critic.nets) as judged, noted(stage.teacher) as taught:
        loss = stage.loss(stage.model, video, step_generator(seed), classes=classes)
    loss.backward()  # type: ignore[no-untyped-call]
    assert len(own) in (1, WINDOWS) and len(judged) == 1
    sample, (latent, time, velocity) = clean(*own[-1]), judged[0]
    conditional, unconditional = torch.cat([result for _, _, result in taught]).chunk(2)
    right, found = clean(latent, time, 2 * conditional - unconditional), clean(latent, time, velocity)
    gradient = ((found - right) / (sample - right).abs().mean((1, 2), keepdim=True)).detach()
    student = list(stage.model.parameters())
    with noted(stage.model) as again:  # own[-1] has been differentiated
        stage.loss(stage.model, video, step_generator(seed), classes=classes)
    wanted = torch.autograd.grad(clean(*again[-1]), student, gradient / sample.numel())
    for parameter, expected in zip(student, wanted, strict=True):
        assert_close(parameter.grad, expected, tolerances.SECOND_PHASE_GRADIENT)
    assert gradient.abs().max() > 0.1
    assert all(parameter.grad is None for parameter in stage.critic.nets.parameters())
    assert loss.item() == pytest.approx(F.mse_loss(velocity, target(sample, latent, time)).item(), rel=1e-3)
    stage.after_backward()
    assert set(stage.measured()) == {"matching"}


def test_the_critic_learns_the_students_samples() -> None:
    """As a flow learns its data, from all batches of a step, at its own rate."""
    stage = make_stage(**{"diffusion.accumulate": 2})
    stage.before_step(0)
    assert not stage.trains_model
    critic, (video, classes) = list(stage.critic.nets.parameters()), clips()
    wanted = [torch.zeros_like(parameter) for parameter in critic]
    for number in range(2):
        with noted(stage.model) as own, noted(stage.critic.nets) as judged:
            loss = stage.loss(stage.model, video, step_generator(number), classes=classes)
        latent, time, velocity = judged[0]
        error = F.mse_loss(velocity, target(clean(*own[-1]), latent, time))
        assert loss.item() == pytest.approx(error.item(), rel=1e-3)
        for total, part in zip(wanted, torch.autograd.grad(error / 2, critic, retain_graph=True), strict=True):
            total += part
        loss.backward()  # type: ignore[no-untyped-call]
        stage.after_backward()
    # Together: a bias just before a norm has a gradient of rounding errors.
    found, expected = (torch.cat([part.flatten() for part in parts]) for parts in ([p.grad for p in critic], wanted))
    assert_close(found, expected, tolerances.SECOND_PHASE_GRADIENT)
    assert all(parameter.grad is None for parameter in stage.model.parameters())
    assert stage.critic.optimizer.param_groups[0]["lr"] == CRITIC_RATE * learning_rate(stage.options, 0)
    before = [parameter.detach().clone() for parameter in critic]
    stage.after_step({name: value.item() for name, value in stage.measured().items()})
    assert all(not torch.equal(old, new) for old, new in zip(before, critic, strict=True))


def test_going_on_the_critic_has_the_settings_of_now() -> None:
    stage = make_stage(optimizer="adamw", **{"diffusion.weight_decay": 0.01})
    stage.before_step(0)
    state = stage.state()
    other = make_stage(optimizer="adamw", **{"diffusion.weight_decay": 0.3, "diffusion.beta1": 0.5})
    other.restore(state)
    (group,) = other.critic.optimizer.param_groups
    assert (group["weight_decay"], group["betas"][0]) == (0.3, 0.5)
    own, theirs = stage.critic.nets.state_dict(), other.critic.nets.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
