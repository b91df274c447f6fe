"""The discriminators: their sizes, and every loss against the formulas written out in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import tolerances
import torch
from comparison import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

from pvdm_fast.losses import Discriminators, PatchDiscriminator
from pvdm_fast.losses.patchgan import frames_of

FRAMES = torch.tensor([3, 0])


def clips(seed: int, shape: tuple[int, ...] = (2, 3, 5, 18, 26)) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def written_out(net: PatchDiscriminator, x: Tensor) -> list[Tensor]:
    """The five blocks with functional operations. Batch statistics are means over everything but channels."""
    conv: Any = F.conv2d if x.dim() == 4 else F.conv3d
    found = []
    for index, block in enumerate(net.blocks):
        x = conv(x, block[0].weight, block[0].bias, stride=2 if index < 3 else 1, padding=2)
        if len(block) == 3:
            dims = (0, *range(2, x.dim()))
            centred = x - x.mean(dims, keepdim=True)
            shape = (1, -1, *(1,) * (x.dim() - 2))
            x = centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt() * block[1].weight.view(shape)
            x = x + block[1].bias.view(shape)
        x = torch.where(x > 0, x, 0.2 * x) if index < 4 else x
        found.append(x)
    return found


def test_sizes_are_the_release_s() -> None:
    """Weights and biases of convolutions 3-64-128-256-512-1 with 4^2 and 4^3 taps, and two per normalised
    channel."""
    widths = (3, 64, 128, 256, 512, 1)
    for dims in (2, 3):
        net = PatchDiscriminator(dims)  # type: ignore[arg-type]
        expected = sum(a * b * 4**dims + b for a, b in pairwise(widths)) + 2 * (128 + 256 + 512)
        assert sum(parameter.numel() for parameter in net.parameters()) == expected
        assert not list(net.buffers())
        spread = torch.cat([block[0].weight.flatten() for block in net.blocks]).std()
        assert abs(spread - 0.02) < 1e-4


@pytest.mark.parametrize("norm", ["batch", "spectral", "none"])
@pytest.mark.parametrize("size", [(1, 1, 8, 8), (2, 16, 24, 40)])
def test_any_size_is_judged(norm: str, size: tuple[int, ...]) -> None:
    batch, time, height, width = size
    nets = Discriminators(2, norm)  # type: ignore[arg-type]
    video = torch.rand(batch, 3, time, height, width)
    image, clip = nets.judge(video, torch.zeros(batch, dtype=torch.long))

    def patches(length: int) -> int:
        for _ in range(3):
            length = length // 2 + 1
        return length + 2

    assert image[-1].shape == (batch, 1, patches(height), patches(width))
    assert clip[-1].shape == (batch, 1, patches(time), patches(height), patches(width))


def test_frames_are_taken_from_their_clips() -> None:
    video = clips(0)
    assert torch.equal(frames_of(video, FRAMES), torch.stack([video[0, :, 3], video[1, :, 0]]))


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_losses_are_the_formulas(norm: str) -> None:
    nets = Discriminators(3, norm).double()  # type: ignore[arg-type]
    real, fake = clips(1), clips(2)
    pairs = [
        (written_out(nets.image, frames_of(real, FRAMES)), written_out(nets.image, frames_of(fake, FRAMES))),
        (written_out(nets.clip, real), written_out(nets.clip, fake)),
    ]
    own: Any = 0.0
    hinge: Any = 0.0
    matching: Any = 0.0
    for reals, fakes in pairs:
        own += (1 - reals[-1]).clamp_min(0).mean() / 2 + (1 + fakes[-1]).clamp_min(0).mean() / 2
        hinge -= fakes[-1].mean()
        matching += sum((a - b).abs().mean() for a, b in zip(reals[:-1], fakes[:-1], strict=True))
    terms = nets.generator_terms(fake, real, FRAMES)
    for name, actual, expected in (
        ("hinge", terms.hinge, hinge),
        ("matching", terms.feature_matching, matching),
        ("discriminators", nets(real, fake, FRAMES).loss, own),
    ):
        assert_close(actual, expected, tolerances.PATCHGAN, name)


def test_the_layers_are_the_formulas() -> None:
    nets = Discriminators(3).double()
    for net, x in ((nets.image, clips(1)[:, :, 0]), (nets.clip, clips(1))):
        for index, (actual, expected) in enumerate(zip(net(x), written_out(net, x), strict=True)):
            assert_close(actual, expected, tolerances.PATCHGAN, f"block {index}")


def test_the_penalty_is_the_squared_gradient() -> None:
    """Its value from each clip's own gradient, its own gradient from a difference quotient."""
    nets = Discriminators(2, "none").double()
    real, fake = clips(1), clips(2)

    def share() -> Tensor:  # of the loss; new networks have short gradients at first
        return nets(real, fake, FRAMES, 2e6).loss - nets(real, fake, FRAMES).loss

    expected: Any = 0.0
    for index in range(2):
        for net, x in ((nets.clip, real[index : index + 1]), (nets.image, frames_of(real, FRAMES)[index : index + 1])):
            leaf = x.clone().requires_grad_()
            written_out(net, leaf)[-1].sum().backward()
            assert leaf.grad is not None
            expected += leaf.grad.square().sum() / 2
    nets.zero_grad()
    assert_close(nets(real, fake, FRAMES, 2.0).penalty, expected, tolerances.PATCHGAN, "penalty")
    assert_close(share(), 1e6 * expected, tolerances.PENALTY_SLOPE, "its share of the loss")
    weight = nets.clip.blocks[1][0].weight
    (gradient,) = torch.autograd.grad(share(), weight)
    direction, step, values = clips(3, tuple(weight.shape)), 1e-4, []
    with torch.no_grad():
        for sign in (1, -2):
            weight.add_(sign * step * direction)
            values.append(share())
    assert_close((gradient * direction).sum(), (values[0] - values[1]) / (2 * step), tolerances.PENALTY_SLOPE, "slope")


def test_spectral_norm_bounds_every_convolution() -> None:
    nets = Discriminators(4, "spectral")
    for _ in range(30):
        nets(clips(1).float(), clips(2).float(), FRAMES)
    for module in nets.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            largest = torch.linalg.svdvals(module.weight.detach().flatten(1))[0]
            assert abs(largest - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_a_cpu_leaves_the_gradients_alone(dtype: torch.dtype) -> None:
    """PyTorch's gradients of 3D convolutions in bfloat16 are wrong on CPUs."""
    nets = Discriminators(8, "none")
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = nets(clips(1).float(), clips(2).float(), FRAMES).loss
        gradients.append(torch.autograd.grad(loss, list(nets.parameters())))
    for expected, actual in zip(*gradients, strict=True):
        assert_close(actual, expected, tolerances.FLOAT32_ERROR)


def test_each_clip_is_judged_on_its_own_without_batch_statistics() -> None:
    nets = Discriminators(2, "spectral").eval()
    both = nets.clip(clips(1).float())[-1]
    alone = nets.clip(clips(1)[:1].float())[-1]
    assert_close(both[:1], alone, tolerances.FLOAT32_ERROR)
