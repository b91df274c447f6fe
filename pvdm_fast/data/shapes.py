"""Small moving scenes rendered on the fly: one or two objects of plain colours before a plain, dark backdrop.

They are made so that you see at a glance what a small model has learned: every object is one of five kinds, in one of
six colours, large enough to be named in a frame of 32 x 32 pixels. All objects of a scene are of one kind, which is its
class. Time matters all the same: objects move, the nearer one hides the farther, and some leave the frame on one side
and come back on the other.

Units are the frame's short side, so a scene looks the same at any resolution. Time is continuous: any number of frames
at any stride shows one uninterrupted motion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

RECIPE = 3  # of these scenes: raised by one with every change of what is drawn, so that results of two don't mix
KINDS = ("disc", "square", "triangle", "ring", "diamond")
COLOURS = ("red", "yellow", "green", "blue", "pink", "white")
MAX_OBJECTS = 2
PAIRS = 0.35  # share of scenes with two objects
RADII = (0.22, 0.26)  # in short sides of the frame
SPEEDS = (0.02, 0.05)  # in short sides of the frame a frame
PALETTE = np.array(
    [
        (0.90, 0.16, 0.14),
        (0.96, 0.80, 0.14),
        (0.16, 0.74, 0.28),
        (0.18, 0.44, 0.94),
        (0.92, 0.36, 0.78),
        (0.94, 0.94, 0.92),
    ]
)
BACKDROPS = np.array([(0.08, 0.08, 0.10), (0.06, 0.13, 0.26), (0.08, 0.20, 0.16), (0.24, 0.10, 0.18)])


@dataclass(frozen=True)
class Scene:
    """Objects from far to near. Lengths in short sides of the frame, times in frames, colours in [0, 1].

    ``extent`` (2,): height and width of the frame; ``kind`` (n,): indices into KINDS; ``radius`` (n,); ``start``,
    ``velocity`` (n, 2) as (down, right); ``bounces`` (n,) bool: at the walls, or leaves the frame and comes back;
    ``colour`` (n,): indices into PALETTE; ``backdrop`` (3,).
    """

    extent: np.ndarray
    kind: np.ndarray
    radius: np.ndarray
    start: np.ndarray
    velocity: np.ndarray
    bounces: np.ndarray
    colour: np.ndarray
    backdrop: np.ndarray

    @property
    def label(self) -> str:
        """The scene's class: the kind of all its objects."""
        return KINDS[int(self.kind[0])]

    def positions(self, times: np.ndarray) -> np.ndarray:
        """Centres (frames, n, 2) at the given times (frames,)."""
        straight = self.start + self.velocity * times[:, None, None]
        radius = self.radius[:, None]
        room = self.extent - 2 * radius  # bouncing objects stay inside as a whole
        folded = room - np.abs((straight - radius) % (2 * room) - room) + radius
        lap = self.extent + 2 * radius  # crossing objects vanish completely before they come back
        wrapped = (straight + radius) % lap - radius
        return np.where(self.bounces[:, None], folded, wrapped)

    def render(self, frames: int, height: int, width: int, stride: int = 1) -> np.ndarray:
        """uint8 (frames, height, width, 3). Edges are antialiased over one pixel."""
        canvas = np.empty((3, frames, height, width), np.float32)
        canvas[:] = self.backdrop.astype(np.float32)[:, None, None, None]
        covers = self._covers(frames, height, width, stride)
        for cover, colours in zip(covers, PALETTE[self.colour], strict=True):
            for channel, colour in zip(canvas, colours, strict=True):
                channel += cover * (np.float32(colour) - channel)
        canvas *= 255
        canvas += 0.5
        return np.ascontiguousarray(canvas.astype(np.uint8).transpose(1, 2, 3, 0))

    def visible(self, frames: int, height: int, width: int, stride: int = 1) -> np.ndarray:
        """(frames, n): the share of each object's area that is inside the frame and behind no nearer object."""
        margin = min(height, width)  # more than any object reaches beyond the frame
        inside = (slice(None), slice(margin, margin + height), slice(margin, margin + width))
        covers = list(self._covers(frames, height, width, stride, margin))
        shares = []
        for number, cover in enumerate(covers):
            seen = cover[inside]
            for nearer in covers[number + 1 :]:
                seen = seen * (1 - nearer[inside])
            shares.append(seen.sum((1, 2)) / cover.sum((1, 2)))
        return np.stack(shares, axis=1)

    def _covers(self, frames: int, height: int, width: int, stride: int, margin: int = 0) -> Iterator[np.ndarray]:
        """The share of each pixel that each object covers, float32 (frames, height, width). A margin of pixels on
        every side goes on beyond the frame."""
        unit = np.float32(min(height, width))
        rows = (np.arange(-margin, height + margin, dtype=np.float32) + 0.5) / unit
        columns = (np.arange(-margin, width + margin, dtype=np.float32) + 0.5) / unit
        centres = self.positions(np.arange(frames) * stride).astype(np.float32)
        for number, kind in enumerate(self.kind):
            down = rows - centres[:, number, :1]
            right = columns - centres[:, number, 1:]
            radius = np.float32(self.radius[number])
            cover = signed_distance(int(kind), down[:, :, None], right[:, None, :], radius)
            np.multiply(cover, -unit, out=cover)
            cover += np.float32(0.5)
            yield np.clip(cover, 0, 1, out=cover)


def draw_scene(rng: np.random.Generator, aspect: float = 1.0) -> Scene:
    """A random scene for frames of the given width / height."""
    extent = np.array([max(1.0, 1 / aspect), max(1.0, aspect)])
    count = 1 + int(rng.random() < PAIRS)
    radius = rng.uniform(*RADII, count)
    angle = rng.uniform(0, 2 * np.pi, count)
    speed = rng.uniform(*SPEEDS, count)
    return Scene(
        extent=extent,
        kind=np.full(count, rng.integers(len(KINDS))),
        radius=radius,
        start=radius[:, None] + rng.random((count, 2)) * (extent - 2 * radius[:, None]),
        velocity=speed[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1),
        bounces=rng.random(count) < 0.8,
        colour=rng.permutation(len(COLOURS))[:count],
        backdrop=BACKDROPS[rng.integers(len(BACKDROPS))],
    )


def signed_distance(kind: int, down: np.ndarray, right: np.ndarray, radius: np.ndarray | np.float32) -> np.ndarray:
    """Signed distance to the outline of a kind, negative inside, at offsets from its centre.

    All shapes fit in a disc of ``radius``. Everything is in short sides of the frame, and broadcasts.
    """
    if KINDS[kind] == "disc":
        return np.sqrt(down * down + right * right) - radius
    if KINDS[kind] == "square":
        return np.maximum(np.abs(down), np.abs(right)) - radius * np.float32(0.75)
    if KINDS[kind] == "triangle":  # point up: the farthest of three sides
        slant = np.abs(right) * np.float32(3**0.5 / 2) - down * np.float32(0.5)
        return np.maximum(slant, down) - radius * np.float32(0.5)
    if KINDS[kind] == "ring":
        return np.abs(np.sqrt(down * down + right * right) - radius * np.float32(0.75)) - radius * np.float32(0.25)
    return (np.abs(down) + np.abs(right) - radius) * np.float32(0.5**0.5)  # diamond
