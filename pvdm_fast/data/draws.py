"""Everything random about a clip, as pure functions: seeds, order of videos, windows, crops, splits.

Nothing here depends on the process, the number of workers or Python's salted ``hash``. The same arguments give the same
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
    """A 128-bit number that depends only on the parts (strings, ints, None). It is the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest(), "little")


def generator(*parts: Hashable) -> np.random.Generator:
    """A random generator seeded by `stable_hash` of the parts."""
    return np.random.Generator(np.random.PCG64(stable_hash(*parts)))


@lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of ``count`` videos in an epoch: an int64 permutation, read-only."""
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

    If a video is too short for the stride, the largest stride that fits is used. Raises `UnreadableVideo` if it has
    fewer frames than the window even at stride 1.
    """
    if total < frames:
        raise UnreadableVideo(f"too short: {total} frame{'s' * (total != 1)}, a clip needs {frames}")
    if frames > 1:
        stride = min(stride, (total - 1) // (frames - 1))
    span = (frames - 1) * stride + 1
    return Window(int(rng.integers(total - span + 1)), stride, frames)


@dataclass(frozen=True)
class View:
    """Where a crop lies among those possible (0 to 1 on each axis, 0.5 is the centre), and whether it is
    mirrored."""

    down: float = 0.5
    right: float = 0.5
    mirrored: bool = False

    @classmethod
    def draw(cls, rng: np.random.Generator, *, flip: bool) -> View:
        down, right, mirror = rng.random(3)
        return cls(float(down), float(right), flip and bool(mirror < 0.5))


# Of two places in the middle, an odd number of pixels left over, `crop_box` takes the lower right one for 0.5. The
# release halves and rounds down.
BELOW_THE_MIDDLE = 0.5 - 2.0**-20


def crop_box(source: tuple[int, int], target: tuple[int, int], down: float, right: float) -> tuple[int, int, int, int]:
    """The part of a frame that becomes the crop when it is resized to ``target``: (top, left, height, width) in pixels.

    The box has the aspect of ``target`` (height, width), to the nearest pixel, and spans the frame on one axis. You get
    the same crop if you resize the frame, with its aspect, until it just covers the target.
    """
    (height, width), (rows, columns) = source, target
    scale = min(height / rows, width / columns)  # source pixels per target pixel
    box_height = min(max(round(rows * scale), 1), height)
    box_width = min(max(round(columns * scale), 1), width)
    top = min(int(down * (height - box_height + 1)), height - box_height)
    left = min(int(right * (width - box_width + 1)), width - box_width)
    return top, left, box_height, box_width


def is_held_out(keys: Sequence[str], usable: Callable[[int], bool] = lambda number: True) -> list[bool]:
    """Which videos belong to the test split, by a hash of their keys. It is about a tenth.

    Videos with equal keys stay together. With two or more different keys each split gets at least one. With a single
    key nothing is held out. If none of the held-out videos is ``usable``, those with the next hashes are held out too,
    so that one bad file can't spoil the split. ``usable`` takes a place in ``keys``, and is called no more often than
    needed.
    """
    members: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        members.setdefault(key, []).append(number)
    ranked = sorted((stable_hash("split", key), key) for key in members)
    test: set[str] = set()
    met_usable = False
    for rank, key in ranked[:-1]:  # the last key always trains
        if met_usable and rank >= TEST_FRACTION * 2**128:
            break
        test.add(key)
        met_usable = met_usable or any(usable(number) for number in members[key])
    return [key in test for key in keys]
