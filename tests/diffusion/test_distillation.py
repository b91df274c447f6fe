"""Distillation on a Gaussian, where the flow's map from noise to latent is known in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pvdm_fast.diffusion.distillation import (
    distillation_loss,
    follow,
    matching_gradient,
    predicted_latent,
    window_ends,
)
from pvdm_fast.diffusion.flow import interpolate, sampling_times

MEAN, STD = 0.3, 0.15
SHIFT = 2.0


def velocity(latent: Tensor, time: Tensor) -> Tensor:
    """E[noise - latent] of latents N(MEAN, STD^2)."""
    t = time.view(-1, 1, 1)
    slope = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
    return slope * (latent - (1 - t) * MEAN) - MEAN


def moved(latent: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The flow's exact map: it keeps (latent - mean) / deviation of each time."""

    def moments(time: Tensor) -> tuple[Tensor, Tensor]:
        t = time.view(-1, 1, 1)
        return (1 - t) * MEAN, ((1 - t) ** 2 * STD**2 + t**2).sqrt()

    (mean, deviation), (later_mean, later_deviation) = moments(start), moments(end)
    return later_mean + later_deviation * (latent - mean) / deviation


class Affine(nn.Module):
    """A student that can learn any Gaussian's map: one affine function a window."""

    def __init__(self, windows: int) -> None:
        super().__init__()
        self.windows = windows
        self.starts = sampling_times(windows, SHIFT)[:-1].float()
        self.slope, self.offset = nn.Parameter(torch.zeros(windows)), nn.Parameter(torch.zeros(windows))

    def forward(self, latent: Tensor, time: Tensor) -> Tensor:
        window = (time[:, None] - self.starts).abs().argmin(1)
        return self.slope[window].view(-1, 1, 1) * latent + self.offset[window].view(-1, 1, 1)


def draw(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latent, noise = torch.randn((2, count, 4, 12), generator=generator)
    return MEAN + STD * latent, noise


def test_windows_end_at_the_sampling_times() -> None:
    windows, pieces = 4, 3
    times = window_ends(torch.arange(windows), windows, SHIFT, pieces)
    whole = sampling_times(windows * pieces, SHIFT).float()
    for window in range(windows):
        assert torch.equal(times[:, window], whole[window * pieces : (window + 1) * pieces + 1])


@pytest.mark.parametrize(("euler", "ratio"), [(False, 4.0), (True, 2.0)], ids=["heun", "euler"])
def test_following_the_teacher_has_the_methods_order(euler: bool, ratio: float) -> None:
    _, noise = draw(64)
    window = torch.arange(64) % 2
    errors = []
    for pieces in (20, 40):
        times = window_ends(window, 2, SHIFT, pieces)
        exact = moved(noise, times[0], times[-1])
        errors.append((follow(velocity, noise, times, euler=euler) - exact).square().mean().sqrt().item())
    assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.15)


def test_two_windows_in_a_row_are_the_whole_way() -> None:
    _, noise = draw(8)
    whole = follow(velocity, noise, window_ends(torch.zeros(8, dtype=torch.long), 1, SHIFT, 8))
    half = follow(velocity, noise, window_ends(torch.zeros(8, dtype=torch.long), 2, SHIFT, 4))
    assert torch.allclose(follow(velocity, half, window_ends(torch.ones(8, dtype=torch.long), 2, SHIFT, 4)), whole)


def learned(windows: int, teacher: Any, **options: Any) -> Affine:
    """A student whose loss is as small as it gets."""
    student = Affine(windows)
    latent, noise = draw(512)
    window = torch.arange(512) % windows

    def loss() -> Tensor:
        return distillation_loss(student, teacher, latent, noise, window, windows=windows, shift=SHIFT, **options)

    solver = torch.optim.LBFGS(student.parameters(), max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        found = loss()
        found.backward()
        return found

    solver.step(closure)  # type: ignore[no-untyped-call]
    assert loss() < 1e-6
    return student


@torch.no_grad()
def sampled(student: Any, noise: Tensor, windows: int) -> Tensor:
    """The student's own Euler steps."""
    for window in range(windows):
        ends = window_ends(torch.full((len(noise),), window), windows, SHIFT)
        noise = follow(student, noise, ends, euler=True)
    return noise


@pytest.mark.parametrize("windows", [1, 2, 4])
def test_a_students_steps_end_where_the_flow_does(windows: int) -> None:
    """One, two or four passes reach the exact map to 1e-2, where the teacher's own Euler steps are far off."""
    student = learned(windows, velocity, solver_steps=48 // windows)
    _, noise = draw(256, seed=1)
    exact = MEAN + STD * noise
    error = (sampled(student, noise, windows) - exact).square().mean().sqrt()
    own = (sampled(velocity, noise, windows) - exact).square().mean().sqrt()
    assert error < 1e-2
    assert own > 5 * error


def test_a_student_of_a_student_takes_its_teachers_own_steps() -> None:
    four = learned(4, velocity, solver_steps=12)
    one = learned(1, four, solver_steps=4, euler=True)
    _, noise = draw(256, seed=1)
    difference = (sampled(one, noise, 1) - sampled(four, noise, 4)).square().mean().sqrt()
    assert difference < 1e-3


def test_only_the_student_gets_gradients() -> None:
    latent, noise = draw(8)
    student, teacher = Affine(2), Affine(2)
    window = torch.arange(8) % 2
    distillation_loss(student, teacher, latent, noise, window, windows=2, shift=SHIFT, solver_steps=2).backward()  # type: ignore[no-untyped-call]
    assert student.slope.grad is not None and bool(student.slope.grad.isfinite().all())
    assert teacher.slope.grad is None


def exact_velocity(mean: Tensor, deviation: Tensor) -> Any:
    """The flow of latents N(mean, deviation^2)."""

    def flow(latent: Tensor, time: Tensor) -> Tensor:
        t = time.view(-1, 1, 1)
        slope = (t - (1 - t) * deviation**2) / ((1 - t) ** 2 * deviation**2 + t**2)
        return slope * (latent - (1 - t) * mean) - mean

    return flow


def stochastic(student: Any, windows: int, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clean latents that a student predicts in the last of some windows, with new noise before each of them; what it
    sees there, and the time."""
    generator, clean = torch.Generator().manual_seed(seed), torch.zeros(count, 4, 12)
    for window in range(windows):
        time = sampling_times(student.windows, SHIFT)[window].float().expand(count)
        latent = interpolate(clean.detach(), torch.randn(clean.shape, generator=generator), time)
        clean = predicted_latent(latent, student(latent, time), time)
    return clean, latent, time


@pytest.mark.parametrize("windows", [1, 2, 4])
def test_matched_students_sample_the_teachers_distribution(windows: int) -> None:
    """With a critic that knows the samples exactly, what is predicted in every window becomes N(MEAN, STD^2) to 1e-2.

    In one step an affine student has but one increasing map to that: the exact one.
    """
    student = Affine(windows)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for step in range(1500):
        sample, _, _ = stochastic(student, step % windows + 1, 64, step)
        critic = exact_velocity(sample.detach().mean(), sample.detach().std())
        noise, times = draw(64, seed=-step - 1)[1], torch.linspace(0.05, 0.95, 64)
        gradient, _ = matching_gradient(velocity, critic, sample, noise, times)
        optimizer.zero_grad()
        sample.backward(gradient / gradient.numel())  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        for window in range(windows):
            sample, latent, _ = stochastic(student, window + 1, 1024, 9999)
            assert sample.mean().item() == pytest.approx(MEAN, abs=1e-2)
            assert sample.std().item() == pytest.approx(STD, abs=1e-2)
    if windows == 1:
        assert (sample - (MEAN + STD * latent)).square().mean().sqrt() < 1e-2


def test_no_gradient_where_the_samples_are_the_teachers() -> None:
    latent, noise = draw(64)
    time = torch.linspace(0.05, 0.95, 64)
    gradient, error = matching_gradient(velocity, velocity, latent, noise, time)
    assert not gradient.any()
    assert error > 0, "even the exact flow cannot tell the noise"
    higher = exact_velocity(torch.tensor(MEAN + 0.1), torch.tensor(STD))
    gradient, _ = matching_gradient(velocity, higher, (latent + 0.1).requires_grad_(), noise, time)
    assert bool((gradient > 0).all()), "samples that lie too high go down"
    assert not gradient.requires_grad
