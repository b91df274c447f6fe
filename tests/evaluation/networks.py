"""Feature networks for tests. They have the interface of StyleGAN-V's I3D, but no meaning."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

WIDTH = 6


class MadeUpFeatures(nn.Module):
    """Six numbers per video: convolutions over tiles of 56 x 56 pixels and two frames, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(3, WIDTH, (2, 56, 56), stride=(1, 56, 56))

    def forward(
        self, video: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        assert not rescale and not resize and return_features
        assert list(video.shape[3:]) == [224, 224]
        return torch.tanh(self.layer(video)).mean([2, 3, 4])


class Interface(nn.Module):
    """Another network behind the same arguments."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, video: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        assert not rescale and not resize and return_features
        features: Tensor = self.network(video)
        return features


def save_network(path: Path) -> str:
    """Write a made-up network with fixed weights, and return its sha256."""
    generator = torch.Generator().manual_seed(5)
    network = MadeUpFeatures()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    torch.jit.save(torch.jit.script(network), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()
