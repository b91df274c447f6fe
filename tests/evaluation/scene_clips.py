"""Rendered scenes with planted damage, and what a judge without errors would see in them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pvdm_fast.data.draws import generator
from pvdm_fast.data.shapes import BACKDROPS, COLOURS, KINDS, Scene, draw_scene
from pvdm_fast.evaluation.scene_judge import FEATURES, Seen

SIDE = 32


def make_scene(*objects: tuple[str, str, tuple[float, float], tuple[float, float], bool]) -> Scene:
    """A scene of objects given as (kind, colour, start, velocity, whether it bounces), from far to near."""
    kinds, colours, starts, velocities, bounces = zip(*objects, strict=True)
    return Scene(
        extent=np.ones(2),
        kind=np.array([KINDS.index(kind) for kind in kinds]),
        radius=np.full(len(objects), 0.22),
        start=np.array(starts),
        velocity=np.array(velocities),
        bounces=np.array(bounces),
        colour=np.array([COLOURS.index(colour) for colour in colours]),
        backdrop=BACKDROPS[0],
    )


def held_out(count: int) -> list[Scene]:
    """Scenes that neither training nor the test split draws."""
    return [draw_scene(generator("scenes for tests of the judge", number)) for number in range(count)]


def rendered(scenes: list[Scene], frames: int, side: int = SIDE, stride: int = 1) -> Tensor:
    """uint8 (N, 3, T, side, side)."""
    return torch.stack([torch.from_numpy(scene.render(frames, side, side, stride)) for scene in scenes]).permute(
        0, 4, 1, 2, 3
    )


def truth(scenes: list[Scene], frames: int, stride: int = 1) -> Seen:
    """What a judge without errors sees in these scenes, with features of zeros."""
    shape = (len(scenes), frames, len(COLOURS))
    place, visible, kinds = torch.zeros(*shape, 2), torch.zeros(shape), torch.zeros(*shape, len(KINDS) + 1)
    kinds[..., -1] = 1
    for number, scene in enumerate(scenes):
        places = torch.from_numpy(scene.positions(np.arange(frames) * stride)).float()
        shares = torch.from_numpy(scene.visible(frames, SIDE, SIDE, stride)).float()
        for place_in_scene, (kind, colour) in enumerate(zip(scene.kind, scene.colour, strict=True)):
            place[number, :, colour], visible[number, :, colour] = places[:, place_in_scene], shares[:, place_in_scene]
            kinds[number, :, colour] = torch.eye(len(KINDS) + 1)[kind]
    present = (visible > 0.05).float()
    return Seen(present, kinds, place, visible, torch.zeros(*shape[:2], FEATURES), (1.0, 1.0))


def joined(first: Tensor, then: Tensor) -> Tensor:
    """The first half of one clip's frames, then the second half of the other's."""
    half = first.shape[2] // 2
    return torch.cat([first[:, :, :half], then[:, :, half:]], dim=2)


def blurred(clips: Tensor) -> Tensor:
    """uint8 clips after three means over 5 x 5 pixels: nearly a Gaussian of 2.4 pixels."""
    frames = clips.float().transpose(1, 2).flatten(0, 1)
    for _ in range(3):
        frames = F.avg_pool2d(F.pad(frames, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    return frames.round().to(torch.uint8).unflatten(0, (len(clips), -1)).transpose(1, 2)
