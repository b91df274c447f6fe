"""PatchGAN discriminators of frames and of clips, the hinge loss, and feature matching."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

Norm = Literal["batch", "spectral", "none"]

KERNEL, PADDING, WIDEST = 4, 2, 512
INITIAL_SPREAD = 0.02


class PatchDiscriminator(nn.Module):
    """Judges each patch of an image or clip: five convolutions of width 4, the first three with stride 2.

    As in the release, with 2.77 M parameters for images and 11.05 M for clips. `norm` "batch" normalises between
    convolutions with the statistics of the batch itself. Real and reconstructed batches are separate, and there are no
    running averages. "spectral" instead divides each convolution by its largest singular value, and "none" does
    neither. Both of these judge each clip on its own.

    Args:
        dims: 2 for images (B, 3, H, W), 3 for clips (B, 3, T, H, W).
        channels: width after the first convolution. It doubles up to 512.
    """

    def __init__(self, dims: Literal[2, 3], channels: int = 64, norm: Norm = "batch") -> None:
        super().__init__()
        conv: Callable[..., nn.Conv2d | nn.Conv3d] = nn.Conv2d if dims == 2 else nn.Conv3d
        batch_norm: Callable[..., nn.Module] = nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
        widths = [3, *(min(channels * 2**i, WIDEST) for i in range(4))]
        self.blocks = nn.ModuleList()
        for index in range(4):
            layers: list[nn.Module] = [conv(*widths[index : index + 2], KERNEL, 2 if index < 3 else 1, PADDING)]
            if norm == "batch" and index > 0:
                layers.append(batch_norm(widths[index + 1], track_running_stats=False))
            self.blocks.append(nn.Sequential(*layers, nn.LeakyReLU(0.2, inplace=True)))
        self.blocks.append(nn.Sequential(conv(widths[-1], 1, KERNEL, 1, PADDING)))
        for module in list(self.modules()):
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.normal_(module.weight, 0.0, INITIAL_SPREAD)
                if norm == "spectral":
                    spectral_norm(module)
            elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
                nn.init.normal_(module.weight, 1.0, INITIAL_SPREAD)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The activations after each of the five blocks. The last ones are the verdicts (B, 1, ...), positive for
        real."""
        # Never in bfloat16 on a CPU: PyTorch 2.13 and 2.15 compute the weight gradient of 3D convolutions wrongly
        # there. (oneDNN with AVX512-BF16, 16 channels: relative error 0.9 at 3 x 4 x 4, NaN or infinite at 2 x 3 x 3.)
        on_cpu = x.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
            found = []
            for block in self.blocks:
                x = block(x)
                found.append(x)
        return found


class GeneratorTerms(NamedTuple):
    """What the discriminators tell the autoencoder, as scalars."""

    hinge: Tensor
    feature_matching: Tensor


class DiscriminatorTerms(NamedTuple):
    """What trains the discriminators: `loss` including the penalty, and the mean verdicts of both nets, as
    scalars."""

    loss: Tensor
    real: Tensor
    fake: Tensor
    penalty: Tensor


def frames_of(video: Tensor, frames: Tensor) -> Tensor:
    """One frame of each clip: (B, 3, H, W) from (B, 3, T, H, W) and frame numbers (B,)."""
    return video[torch.arange(len(video), device=video.device), :, frames]


class Discriminators(nn.Module):
    """The discriminator of one frame per clip, and the one of whole clips."""

    def __init__(self, channels: int = 64, norm: Norm = "batch") -> None:
        super().__init__()
        self.image = PatchDiscriminator(2, channels, norm)
        self.clip = PatchDiscriminator(3, channels, norm)

    def judge(self, video: Tensor, frames: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The activations of both. `frames` (B,) are the clips' chosen frames."""
        return self.image(frames_of(video, frames)), self.clip(video)

    def generator_terms(self, fake: Tensor, real: Tensor, frames: Tensor) -> GeneratorTerms:
        """Minus the mean verdicts, and the mean absolute difference of each layer's activations, without verdicts.

        Args:
            fake: (B, 3, T, H, W), differentiable.
            real: the same shape, a constant.
            frames: (B,) frame numbers.
        """
        with torch.no_grad():
            wanted = self.judge(real, frames)
        found = self.judge(fake, frames)
        hinge = -torch.stack([_wide(features[-1]).mean() for features in found]).sum()
        matching = [
            F.l1_loss(_wide(have), _wide(want))
            for have_all, want_all in zip(found, wanted, strict=True)
            for have, want in zip(have_all[:-1], want_all[:-1], strict=True)
        ]
        return GeneratorTerms(hinge, torch.stack(matching).sum())

    def forward(self, real: Tensor, fake: Tensor, frames: Tensor, r1: float = 0.0) -> DiscriminatorTerms:
        """The discriminators' own loss: the sum over both of half the mean of max(0, 1 - real) + max(0, 1 + fake).

        Args:
            real, fake: (B, 3, T, H, W), constants. frames: (B,) frame numbers.
            r1: weight of the penalty on the squared gradient of verdicts on real clips (Mescheder et al., 2018),
                computed without autocast.
        """
        penalty = real.new_zeros(())
        if r1 > 0:
            with torch.autocast(real.device.type, enabled=False):
                judged, penalty = self._judge_with_penalty(real, frames)
        else:
            judged = self.judge(real, frames)
        reals = [_wide(features[-1]) for features in judged]
        fakes = [_wide(features[-1]) for features in self.judge(fake, frames)]
        losses = [0.5 * (F.relu(1 - a).mean() + F.relu(1 + b).mean()) for a, b in zip(reals, fakes, strict=True)]
        loss = losses[0] + losses[1] + r1 / 2 * penalty
        return DiscriminatorTerms(loss, _mean_of_means(reals), _mean_of_means(fakes), penalty.detach())

    def _judge_with_penalty(self, real: Tensor, frames: Tensor) -> tuple[tuple[list[Tensor], list[Tensor]], Tensor]:
        with torch.enable_grad():
            inputs = frames_of(real, frames).detach().requires_grad_(), real.detach().requires_grad_()
            judged = self.image(inputs[0]), self.clip(inputs[1])
            verdicts = [features[-1].sum() for features in judged]
            gradients = torch.autograd.grad(verdicts, inputs, create_graph=True)
        return judged, torch.stack([gradient.square().sum() / len(real) for gradient in gradients]).sum()


def _mean_of_means(verdicts: list[Tensor]) -> Tensor:
    return torch.stack([verdict.detach().mean() for verdict in verdicts]).mean()


def _wide(x: Tensor) -> Tensor:
    """Means are taken in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
