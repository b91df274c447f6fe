"""Damage of growing strength, planted into rendered clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pvdm_fast.data.shapes import Scene, draw_scene

FRAMES, SIDE = 8, 32
PER_OBJECT = ("kind", "radius", "start", "velocity", "bounces", "colour")


def scenes(count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw_scene(rng) for _ in range(count)]


def rendered(drawn: list[Scene]) -> Tensor:
    """(B, 3, 8, 32, 32) in [-1, 1]."""
    clips = np.stack([scene.render(FRAMES, SIDE, SIDE) for scene in drawn])
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3) / 127.5 - 1


def blurred(drawn: list[Scene], sigma: float) -> Tensor:
    places = torch.arange(-8, 9)
    window = torch.exp(-0.5 * (places / sigma) ** 2)
    window = (window / window.sum()).expand(3, 1, 1, -1)
    frames = rendered(drawn).transpose(1, 2).flatten(0, 1)
    for side, weight in (((8, 8, 0, 0), window), ((0, 0, 8, 8), window.transpose(2, 3))):
        frames = F.conv2d(F.pad(frames, side, mode="replicate"), weight, groups=3)
    return frames.unflatten(0, (len(drawn), FRAMES)).transpose(1, 2)


def shuffled(drawn: list[Scene], share: float) -> Tensor:
    """This share of the clips has its frames in random order."""
    clips, generator = rendered(drawn), torch.Generator().manual_seed(1)
    for number in range(round(share * len(clips))):
        clips[number] = clips[number][:, torch.randperm(FRAMES, generator=generator)]
    return clips


def frozen(drawn: list[Scene], share: float) -> Tensor:
    """In this share of the clips every frame is the first."""
    clips = rendered(drawn)
    count = round(share * len(clips))
    clips[:count] = clips[:count, :, :1]
    return clips


def shifted(drawn: list[Scene], amount: float) -> Tensor:
    """Red is brighter, blue darker."""
    return (rendered(drawn) + amount * torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1, 1)).clamp(-1, 1)


def missing(drawn: list[Scene], share: float) -> Tensor:
    """In this share of the clips the nearest object isn't there."""
    kept = []
    for number, scene in enumerate(drawn):
        if number < share * len(drawn):
            scene = dataclasses.replace(scene, **{name: getattr(scene, name)[:-1] for name in PER_OBJECT})
        kept.append(scene)
    return rendered(kept)


DAMAGE: dict[str, tuple[Callable[[list[Scene], float], Tensor], tuple[float, ...]]] = {
    "blur": (blurred, (0.6, 1.0, 2.0)),
    "shuffled frames": (shuffled, (0.25, 0.5, 1.0)),
    "frozen frames": (frozen, (0.25, 0.5, 1.0)),
    "colour shift": (shifted, (0.15, 0.3, 0.6)),
    "missing object": (missing, (0.25, 0.5, 1.0)),
}
