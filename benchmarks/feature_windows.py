"""Rendered windows with known contents and known damage: what the shipped feature network learns from.

A window has 8 frames of 32 x 32. First a scene is rendered, sometimes with a cut to another state of it. Then its
frames are put out of order or held, and its pixels damaged. Everything that was done is a label.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pvdm_fast.data.shapes import COLOURS, KINDS, Scene, draw_scene
from pvdm_fast.evaluation.clip_network import FRAMES, SIDE

CUTS = ("none", "object gone", "other kind", "other colour", "other place", "other scene")
CUT_SHARE = 0.5
ORDERS = ("in order", "out of order", "held")
ORDER_SHARES = (0.6, 0.2, 0.2)
MAX_STRIDE = 3
# What pixels undergo: the greatest amount, in the unit that the function below applies, and the share of windows.
DAMAGE = {
    "blur": (2.5, 0.35),  # sigma in pixels
    "noise": (0.3, 0.25),  # standard deviation, where black to white is 2
    "warp": (0.25, 0.25),  # displacement in half frames
    "texture": (0.5, 0.2),  # share of a moving texture that is blended in
    "flicker": (0.3, 0.15),  # brightness that changes from frame to frame
}
SHIFT, SHIFT_SHARE = 0.4, 0.5  # of a colour channel: added, and gained


@dataclass(frozen=True)
class Windows:
    """``video`` (B, 3, 8, 32, 32) in [-1, 1]. Labels at the first and the last frame, by colour: ``present`` (B, 2, 6),
    ``kind`` (B, 2, 6) or -100, ``place`` (B, 2, 6, 2) in short sides. Of the whole window: ``cut`` and ``order`` (B,)
    as indices, ``disorder`` (B, 2): how far frames were moved, and the share held; ``damage`` (B, 5) as shares of the
    greatest, ``shift`` (B, 6): what was added to each colour channel, and its gain - 1."""

    video: Tensor
    present: Tensor
    kind: Tensor
    place: Tensor
    cut: Tensor
    order: Tensor
    disorder: Tensor
    damage: Tensor
    shift: Tensor


def draw_windows(rng: np.random.Generator, count: int, damaged: bool = True) -> Windows:
    """Random windows with their labels. Without damage they are plain renderings, in order, at the usual speed."""
    clips, labels, cuts, orders = [], [], [], []
    for _ in range(count):
        stride = int(rng.integers(1, MAX_STRIDE + 1)) if damaged else 1
        first = draw_scene(rng)
        cut = int(rng.integers(1, len(CUTS))) if damaged and rng.random() < CUT_SHARE else 0
        at = int(rng.integers(0, FRAMES)) if cut else FRAMES
        order, places = _order(rng) if damaged else (0, np.arange(FRAMES))
        second = alter(rng, first, CUTS[cut])
        frames = first.render(FRAMES, SIDE, SIDE, stride)
        if cut:
            frames[at:] = second.render(FRAMES, SIDE, SIDE, stride)[at:]
        clips.append(frames[places])
        ends = places[[0, -1]]
        labels.append(_contents([first if frame < at else second for frame in ends], ends * stride))
        cuts.append(cut)
        orders.append((order, np.abs(places - np.arange(FRAMES)).mean() / 2, np.mean(places[1:] == places[:-1])))
    video = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    amounts = {name: _amounts(rng, count, *limits) for name, limits in DAMAGE.items()}
    shift = torch.stack([_amounts(rng, count, SHIFT, SHIFT_SHARE, signed=True) for _ in range(6)], dim=1)
    if damaged:
        video = damage(video, amounts, shift, torch.Generator().manual_seed(int(rng.integers(2**62))))
    scaled = torch.stack([amounts[name] / most for name, (most, _) in DAMAGE.items()], dim=1)
    present, kind, place = (torch.from_numpy(np.stack(values)) for values in zip(*labels, strict=True))
    order_rows = torch.tensor(np.array(orders), dtype=torch.float32)
    return Windows(
        video, present, kind, place, torch.tensor(cuts), order_rows[:, 0].long(), order_rows[:, 1:], scaled, shift
    )


def alter(rng: np.random.Generator, scene: Scene, cut: str) -> Scene:
    """The scene after a cut, one of CUTS."""
    number = int(rng.integers(len(scene.kind)))
    if cut == "object gone":
        rest = {name: np.delete(getattr(scene, name), number, axis=0) for name in _OF_OBJECTS}
        return dataclasses.replace(scene, **rest)
    if cut == "other kind":
        kind = scene.kind.copy()
        kind[number] = (kind[number] + rng.integers(1, len(KINDS))) % len(KINDS)
        return dataclasses.replace(scene, kind=kind)
    if cut == "other colour":
        colour = scene.colour.copy()
        colour[number] = rng.choice(np.setdiff1d(np.arange(len(COLOURS)), scene.colour))
        return dataclasses.replace(scene, colour=colour)
    if cut == "other place":
        return dataclasses.replace(scene, start=draw_scene(rng).start[:1] * np.ones((len(scene.kind), 1)))
    return draw_scene(rng) if cut == "other scene" else scene


_OF_OBJECTS = ("kind", "radius", "start", "velocity", "bounces", "colour")


def _order(rng: np.random.Generator) -> tuple[int, np.ndarray]:
    """One of ORDERS, and which frame is shown at each place."""
    order, places = int(rng.choice(len(ORDERS), p=ORDER_SHARES)), np.arange(FRAMES)
    if ORDERS[order] == "out of order":
        for _ in range(int(rng.integers(1, FRAMES))):
            one, two = rng.choice(FRAMES, 2, replace=False)
            places[[one, two]] = places[[two, one]]
        if (places == np.arange(FRAMES)).all():
            order = 0
    if ORDERS[order] == "held":
        start, length = int(rng.integers(0, FRAMES - 1)), int(rng.integers(2, FRAMES + 1))
        places[start : start + length] = places[start]
    return order, places


def _contents(scenes: list[Scene], times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is seen where, by colour, in each scene at its time. Objects whose centre is outside count as absent."""
    present = np.zeros((len(scenes), len(COLOURS)), np.float32)
    kind = np.full(present.shape, -100)
    place = np.zeros((*present.shape, 2), np.float32)
    for row, (scene, time) in enumerate(zip(scenes, times, strict=True)):
        centres = scene.positions(np.array([time]))[0]
        for number in range(len(scene.kind)):
            if ((centres[number] > 0) & (centres[number] < 1)).all():
                colour = scene.colour[number]
                present[row, colour], kind[row, colour], place[row, colour] = 1, scene.kind[number], centres[number]
    return present, kind, place


def _amounts(rng: np.random.Generator, count: int, most: float, share: float, signed: bool = False) -> Tensor:
    """Amounts (count,): uniform up to the greatest for this share of windows, 0 for the others."""
    drawn = rng.uniform(-most if signed else 0, most, count) * (rng.random(count) < share)
    return torch.from_numpy(drawn).float()


def damage(video: Tensor, amounts: dict[str, Tensor], shift: Tensor, generator: torch.Generator) -> Tensor:
    """Windows (B, 3, T, S, S) in [-1, 1] with this much of each kind of DAMAGE (B,), and colour ``shift`` (B, 6)."""
    some = amounts["texture"].nonzero().flatten()
    share = amounts["texture"][some].view(-1, 1, 1, 1, 1)
    video = video.index_copy(0, some, torch.lerp(video[some], _texture(len(some), generator), share))
    some = amounts["warp"].nonzero().flatten()
    video = video.index_copy(0, some, _warp(video[some], amounts["warp"][some], generator))
    some = amounts["blur"].nonzero().flatten()
    video = video.index_copy(0, some, _blur(video[some], amounts["blur"][some]))
    added, gain = shift.view(-1, 6, 1, 1, 1).split(3, dim=1)
    video = video * (1 + gain) + added
    brighter = torch.randn(len(video), 1, FRAMES, 1, 1, generator=generator)
    video = video + amounts["flicker"].view(-1, 1, 1, 1, 1) * brighter
    some = amounts["noise"].nonzero().flatten()
    noise = amounts["noise"][some].view(-1, 1, 1, 1, 1) * torch.randn(video[some].shape, generator=generator)
    video = video.index_add(0, some, noise)
    return video.clamp(-1, 1)


def _blur(video: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a sigma (B,) in pixels for each window, as a product with a matrix on either side."""
    places = torch.arange(SIDE, dtype=torch.float32)
    distance = (places[:, None] - places).square()
    matrix = torch.exp(-distance / (2 * sigma.clamp_min(0.05).square())[:, None, None])
    matrix = (matrix / matrix.sum(-1, keepdim=True))[:, None, None]
    return matrix @ video @ matrix.transpose(-1, -2)


def _texture(count: int, generator: torch.Generator) -> Tensor:
    """Smooth random textures (B, 3, T, S, S) that move evenly, all alike."""
    field = F.interpolate(torch.rand(count, 3, 12, 12, generator=generator) * 2 - 1, size=(64, 64), mode="bicubic")
    steps = torch.randint(-2, 3, (2,), generator=generator).tolist()
    corners = [(SIDE // 2 + t * steps[0], SIDE // 2 + t * steps[1]) for t in range(FRAMES)]
    return torch.stack([field[:, :, top : top + SIDE, left : left + SIDE] for top, left in corners], dim=2)


def _warp(video: Tensor, amplitude: Tensor, generator: torch.Generator) -> Tensor:
    """Move pixels by a smooth field of another shape in every frame, (B,) in half frames."""
    count = len(video)
    field = F.interpolate(torch.randn(count * FRAMES, 2, 5, 5, generator=generator), size=(SIDE, SIDE), mode="bicubic")
    straight = F.affine_grid(torch.eye(2, 3).expand(count * FRAMES, 2, 3), [count * FRAMES, 3, SIDE, SIDE], False)
    grid = straight + (amplitude.repeat_interleave(FRAMES)[:, None, None, None] * field).permute(0, 2, 3, 1)
    moved = F.grid_sample(video.transpose(1, 2).flatten(0, 1), grid, padding_mode="border", align_corners=False)
    return moved.unflatten(0, (count, FRAMES)).transpose(1, 2)
