"""Everything random about a clip, as pure functions of numbers: seeds, order of videos, windows, crops, splits.

Nothing here depends on the process, the worker count or Python's salted ``hash``: the same arguments give the same
clip on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pvdm_fast.data.errors import UnreadableVideo

TEST_FRACTION = 0.1


def stable_hash(*parts: Hashable) -> int:
    """A 128-bit number that depends on the parts alone (strings, ints, None), equal in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest(), "little")


def generator(*parts: Hashable) -> np.random.Generator:
    """A random generator seeded by :func:`stable_hash` of the parts."""
    return np.random.Generator(np.random.PCG64(stable_hash(*parts)))


@lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which ``count`` videos are visited in an epoch: an int64 permutation, read-only."""
    order = generator("order", seed, epoch).permutation(count)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class Window:
    """``frames`` frames of a video: ``start``, ``start + stride``, and so on."""

    start: int
    stride: int
    frames: int

    @property
    def indices(self) -> range:
        return range(self.start, self.start + self.stride * (self.frames - 1) + 1, self.stride)


def draw_window(total: int, frames: int, stride: int, rng: np.random.Generator) -> Window:
    """A window drawn uniformly among those that fit a video of ``total`` frames.

    A video too short for the stride is read with the largest stride that fits. Raises :class:`UnreadableVideo` when
    it has fewer frames than the window even at stride 1.
    """
    if total < frames:
        raise UnreadableVideo(f"too short: {total} frame{'s' * (total != 1)}, a clip needs {frames}")
    if frames > 1:
        stride = min(stride, (total - 1) // (frames - 1))
    span = (frames - 1) * stride + 1
    return Window(int(rng.integers(total - span + 1)), stride, frames)


@dataclass(frozen=True)
class View:
    """Where a crop lies among those possible (0 to 1 on each axis; 0.5 is the centre), and whether it is mirrored."""

    down: float = 0.5
    right: float = 0.5
    mirrored: bool = False

    @classmethod
    def draw(cls, rng: np.random.Generator, *, flip: bool) -> View:
        down, right, mirror = rng.random(3)
        return cls(float(down), float(right), flip and bool(mirror < 0.5))


def crop_box(source: tuple[int, int], target: tuple[int, int], down: float, right: float) -> tuple[int, int, int, int]:
    """The part of a frame that, resized to ``target``, is the crop: (top, left, height, width) in source pixels.

    This is the crop one gets by resizing the frame, aspect kept, until it just covers ``target`` (height, width): the
    box spans the frame on one axis and has the target's aspect, to the nearest pixel.
    """
    (height, width), (rows, columns) = source, target
    scale = min(height / rows, width / columns)  # source pixels per target pixel
    box_height = min(max(round(rows * scale), 1), height)
    box_width = min(max(round(columns * scale), 1), width)
    top = min(int(down * (height - box_height + 1)), height - box_height)
    left = min(int(right * (width - box_width + 1)), width - box_width)
    return top, left, box_height, box_width


def is_held_out(keys: Sequence[str], usable: Callable[[int], bool] = lambda number: True) -> list[bool]:
    """Which of the videos belong to the test split, by a hash of their keys: about a tenth.

    Videos with equal keys stay together. With two or more different keys both splits get at least one; with a single
    key nothing is held out. While none of the videos held out is ``usable`` (asked by its place in ``keys``, no more
    often than needed), those with the next hashes are held out too, so that one bad file cannot spoil the split.
    """
    members: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        members.setdefault(key, []).append(number)
    ranked = sorted((stable_hash("split", key), key) for key in members)
    test: set[str] = set()
    met_usable = False
    for rank, key in ranked[:-1]:  # the last one trains in any case
        if met_usable and rank >= TEST_FRACTION * 2**128:
            break
        test.add(key)
        met_usable = met_usable or any(usable(number) for number in members[key])
    return [key in test for key in keys]
