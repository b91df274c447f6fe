"""The scene judge: a small network that names the objects of rendered scenes, frame by frame.

It knows the kinds and colours of `pvdm_fast.data.shapes` and nothing else. `python -m benchmarks.train_judge` trains it
on renderings and on damaged ones. `pvdm_fast.evaluation.scenes` makes scores of what it says.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pvdm_fast.data.shapes import COLOURS, KINDS

WEIGHTS = Path(__file__).with_name("scene_judge.safetensors")
SIDE = 32
FRAMES_AT_ONCE = 512
WINDOW = 24  # pixels; the largest object has 18
PAINTED = 0.2  # share of a pixel
LEAST_PIXELS = 3  # so many are painted where something is looked at
HIDDEN = 32
TOLD = 1 + len(KINDS) + 1 + 2 + 1
RIGHTWARDS = TOLD - 2  # which of these numbers a mirror turns round
FEATURES = len(COLOURS) + len(KINDS) + 1 + 2 + 1


@dataclass(frozen=True)
class Seen:
    """What the judge sees in frames, one slot for each colour: a colour occurs at most once in a scene.

    ``present`` (..., 6): probability that an object of this colour can be seen. ``kinds`` (..., 6, 6): probability of
    each of the five kinds, and last that it is none of them. ``place`` (..., 6, 2): centre as (down, right) in short
    sides of the frame. ``visible`` (..., 6): share of the object's area that can be seen. ``features`` (..., 15):
    the presence of each colour (6), and of the objects that are present the sum of their kinds' probabilities (6), of
    their places (2) and of their visible shares (1). ``extent``: height and width of the frame in short sides.
    """

    present: Tensor
    kinds: Tensor
    place: Tensor
    visible: Tensor
    features: Tensor
    extent: tuple[float, float]

    @property
    def kind(self) -> Tensor:
        """The likeliest kind (..., 6), an index into KINDS, or len(KINDS) for none of them."""
        return self.kinds.argmax(-1)

    @property
    def confidence(self) -> Tensor:
        """The probability of the likeliest of the five kinds (..., 6)."""
        return self.kinds[..., : len(KINDS)].amax(-1)


class Told(NamedTuple):
    """The network's result for B frames.

    ``painted`` (B, 6, H, W): logit of each pixel's share of each colour. ``frame``, ``colour`` (n,): where something
    was painted. Of each of these the logit of an object's presence (n,), logits of the five kinds (n, 5), the logit of
    its being one of them at all (n,), place (n, 2) and logit of the visible share (n,).
    """

    painted: Tensor
    frame: Tensor
    colour: Tensor
    present: Tensor
    kinds: Tensor
    known: Tensor
    place: Tensor
    visible: Tensor


class SceneJudge(nn.Module):
    """Paints which pixels belong to each colour, then looks at a window around the paint of one colour at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.paint = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, len(COLOURS), 1))
        self.look = nn.Sequential(
            *_layer(nn.Conv2d(3, 24, 5, 2, padding=2, bias=False)),
            *_layer(nn.Conv2d(24, 48, 3, 2, padding=1, bias=False)),
            *_layer(nn.Conv2d(48, 64, 3, padding=1, bias=False)),
            nn.Flatten(),
            nn.Linear(64 * (WINDOW // 4) ** 2, 64),
            nn.ReLU(),
            nn.Linear(64, HIDDEN),
            nn.ReLU(),
        )
        self.tell = nn.Linear(HIDDEN, TOLD)
        turned = torch.ones(TOLD)
        turned[RIGHTWARDS] = -1
        self.register_buffer("turned", turned, persistent=False)

    def forward(self, frames: Tensor) -> Told:
        """What is seen in frames (B, 3, H, W), float32 in [-1, 1], the short side of 32 pixels."""
        painted = self.paint(frames).float()  # training may be in bfloat16
        masks = painted.sigmoid()
        frame, colour = ((masks > PAINTED).sum((2, 3)) >= LEAST_PIXELS).nonzero(as_tuple=True)
        own = masks[frame, colour]
        centre = _centre(own.detach())
        others = masks.sum(1)[frame] - own
        windows = _cut(torch.stack([own, others, torch.ones_like(own)], dim=1), centre)
        hidden = self.look(windows)
        told = self.tell(hidden).float()
        if not self.training:  # kinds look the same in a mirror: two looks err less often than one
            mirrored = self.look(windows.flip(-1))
            told = (told + self.tell(mirrored) * self.turned) / 2
        present, kinds, known, offset, visible = told.split((1, len(KINDS), 1, 2, 1), dim=-1)
        place = centre + offset
        return Told(painted, frame, colour, present[:, 0], kinds, known[:, 0], place, visible[:, 0])


def _layer(convolution: nn.Conv2d) -> tuple[nn.Module, ...]:
    return convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()


def _centre(masks: Tensor) -> Tensor:
    """Centres of mass (n, 2) of masks (n, H, W), in short sides. Faint paint counts little."""
    masks = masks.square()
    mass = masks.sum((1, 2))
    rows, columns = ((torch.arange(side, device=masks.device) + 0.5) / SIDE for side in masks.shape[1:])
    return torch.stack([(masks.sum(2) * rows).sum(1) / mass, (masks.sum(1) * columns).sum(1) / mass], dim=1)


def _cut(layers: Tensor, centre: Tensor) -> Tensor:
    """Windows (n, C, 24, 24) of layers (n, C, H, W) around centres (n, 2). Beyond the frame they are 0."""
    height, width = layers.shape[-2:]
    reach = (torch.arange(WINDOW, device=layers.device) + 0.5 - WINDOW / 2) / SIDE
    down, right = (2 * SIDE * (centre[:, axis, None] + reach) / side - 1 for axis, side in enumerate((height, width)))
    shape = (len(layers), WINDOW, WINDOW)
    grid = torch.stack([right[:, None, :].expand(shape), down[:, :, None].expand(shape)], dim=-1)
    return F.grid_sample(layers, grid, align_corners=False)


def load_judge(device: torch.device | str = "cpu") -> SceneJudge:
    """The judge with the weights that come with this package, in eval mode."""
    judge = SceneJudge()
    judge.load_state_dict(load_file(WEIGHTS))
    return judge.to(device).eval().requires_grad_(False)


def prepare(frames: Tensor) -> Tensor:
    """Frames (B, 3, H, W) in the judge's form: float32 in [-1, 1], rounded to 8 bits, the short side of 32 pixels.

    Args:
        frames: uint8, or floating point in [-1, 1].
    """
    pixels = frames.float() if frames.dtype == torch.uint8 else frames.float().add(1).mul(127.5).round().clamp(0, 255)
    height, width = frames.shape[-2:]
    if min(height, width) != SIDE:
        size = [round(side * SIDE / min(height, width)) for side in (height, width)]
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
    return pixels / 127.5 - 1


@torch.no_grad()
def see(judge: SceneJudge, clips: Tensor) -> Seen:
    """What the judge sees in clips (N, 3, T, H, W), uint8 or in [-1, 1]: everything (N, T, ...) on the CPU.

    Raises:
        ValueError: the clips have another form.
    """
    if clips.ndim != 5 or clips.shape[1] != 3 or not (clips.dtype == torch.uint8 or clips.is_floating_point()):
        raise ValueError(
            f"clips must be (N, 3, T, H, W), uint8 or floating point in [-1, 1], not {tuple(clips.shape)} "
            f"{str(clips.dtype).removeprefix('torch.')}"
        )
    device = next(judge.parameters()).device
    flat = clips.transpose(1, 2).flatten(0, 1)
    parts = [_all_colours(judge(prepare(piece.to(device)))) for piece in flat.split(FRAMES_AT_ONCE)]
    whole = [torch.cat(group).cpu().unflatten(0, (len(clips), -1)) for group in zip(*parts, strict=True)]
    present, kinds, place, visible, features = whole
    height, width = clips.shape[-2:]
    extent = (height / min(height, width), width / min(height, width))
    return Seen(present, kinds, place, visible, features, extent)


def _all_colours(told: Told) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Presence, kinds, place, visible share and features of all colours of frames. Of colours that aren't there the
    kind is none, and the rest 0."""

    def spread(values: Tensor) -> Tensor:
        whole = values.new_zeros(len(told.painted), len(COLOURS), *values.shape[1:])
        whole[told.frame, told.colour] = values
        return whole

    present, place, visible = spread(told.present.sigmoid()), spread(told.place), spread(told.visible.sigmoid())
    kinds = spread(told.kinds.softmax(-1) * told.known.sigmoid()[:, None])
    kinds = torch.cat([kinds, 1 - kinds.sum(-1, keepdim=True)], dim=-1)
    shown = present[..., None]
    sums = [(values * shown).sum(1) for values in (kinds, place, visible[..., None])]
    return present, kinds, place, visible, torch.cat([present, *sums], dim=-1)
