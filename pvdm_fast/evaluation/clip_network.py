"""The feature network that comes with this package: small, trained on rendered scenes, its weights beside this file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pvdm_fast.errors import UserError
from pvdm_fast.jobs.checksums import sha256

WEIGHTS = Path(__file__).with_name("clip_network.safetensors")
WIDTH = 64
SIDE, FRAMES, HOP = 32, 8, 4
WINDOWS_AT_ONCE = 128
INPUT = (
    f"8-bit frames, bilinear to {SIDE} x {SIDE} with antialiasing, scaled to [-1, 1]; windows of {FRAMES} frames every "
    f"{HOP} frames and one at the end, shorter clips filled up with their last frame; features averaged over windows"
)


class ClipNetwork(nn.Module):
    """Windows (B, 3, 8, 32, 32) in [-1, 1] to features (B, 64) of about unit variance over its training windows.

    Two-dimensional convolutions see each frame and its difference from the one before. One-dimensional ones then look
    along time. The last layer is normalised without a scale, so every feature counts alike in a distance.
    """

    def __init__(self) -> None:
        super().__init__()
        self.space = nn.Sequential(
            *_layer(nn.Conv2d(6, 32, 5, 2, 2, bias=False)),
            *_layer(nn.Conv2d(32, 64, 3, 2, 1, bias=False)),
            *_layer(nn.Conv2d(64, 64, 3, 2, 1, bias=False)),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 128),
            nn.ReLU(),
        )
        self.time = nn.Sequential(
            nn.Conv1d(128, 128, 3, padding=1), nn.ReLU(), nn.Conv1d(128, 128, 3, padding=1), nn.ReLU()
        )
        self.last = nn.Sequential(nn.Linear(3 * 128, WIDTH), nn.BatchNorm1d(WIDTH, affine=False))

    def forward(self, windows: Tensor) -> Tensor:
        before = torch.cat([windows[:, :, :1], windows[:, :, :-1]], dim=2)
        frames = torch.cat([windows, windows - before], dim=1).transpose(1, 2).flatten(0, 1)
        seen = self.space(frames.contiguous(memory_format=torch.channels_last))
        moving = self.time(seen.unflatten(0, (len(windows), -1)).transpose(1, 2))
        features: Tensor = self.last(torch.cat([moving.mean(2), moving.amax(2), moving.std(2)], dim=1))
        return features


def _layer(convolution: nn.Conv2d) -> tuple[nn.Module, ...]:
    return convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()


class ClipFeatures:
    """Features of clips of any size and length by the shipped weights.

    Raises:
        UserError: the file of the weights is missing or damaged.
    """

    def __init__(self, device: torch.device, path: Path = WEIGHTS) -> None:
        self.device = device
        self.network = ClipNetwork()
        try:
            self.sha256 = sha256(path)
            self.network.load_state_dict(load_file(path))
        except Exception as error:  # safetensors and torch raise several kinds
            raise UserError(f"the weights {path} cannot be read ({error}): install pvdm_fast again") from error
        self.network.to(device).float().eval()

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """Features (B, 64) float32 on the CPU, of videos (B, 3, T, H, W) in [-1, 1]."""
        windows = cut(prepare(video.to(self.device)))
        pieces = windows.flatten(0, 1).split(WINDOWS_AT_ONCE)
        features = torch.cat([self.network(piece) for piece in pieces])
        return features.unflatten(0, windows.shape[:2]).mean(1).cpu()


def prepare(video: Tensor) -> Tensor:
    """Videos (B, 3, T, H, W) in [-1, 1] in the network's form: float32 (B, 3, T, 32, 32) in [-1, 1]."""
    flat = video.float().add(1).mul(127.5).round().clamp(0, 255).transpose(1, 2).flatten(0, 1)
    resized = F.interpolate(flat, size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    return (resized / 127.5 - 1).unflatten(0, (len(video), -1)).transpose(1, 2)


def cut(video: Tensor) -> Tensor:
    """The windows (B, n, 3, 8, H, W) of videos (B, 3, T, H, W)."""
    frames = video.shape[2]
    if frames < FRAMES:
        video = torch.cat([video, video[:, :, -1:].expand(-1, -1, FRAMES - frames, -1, -1)], dim=2)
    last = video.shape[2] - FRAMES
    starts = [*range(0, last, HOP), last]
    return torch.stack([video[:, :, start : start + FRAMES] for start in starts], dim=1)
