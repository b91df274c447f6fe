"""Small moving scenes rendered on the fly: several objects with their own speeds, nearer ones hide farther ones.

Units are the frame's short side, so a scene looks the same at any resolution. Time is continuous: any number of frames
at any stride shows one uninterrupted motion. Objects either bounce at the walls, or leave the frame on one side and
enter on the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KINDS = 5  # disc, square, triangle, ring, diamond: see _distance
MAX_OBJECTS = 3


@dataclass(frozen=True)
class Scene:
    """Objects from far to near. Lengths in short sides of the frame, times in frames, colours in [0, 1].

    ``extent`` (2,): height and width of the frame; ``kind`` (n,); ``radius`` (n,); ``start``, ``velocity`` (n, 2) as
    (down, right); ``bounces`` (n,) bool; ``colours`` (n, 3); ``backdrop`` (2, 3): colours of opposite sides;
    ``slope`` (2,): direction in which the backdrop changes.
    """

    extent: np.ndarray
    kind: np.ndarray
    radius: np.ndarray
    start: np.ndarray
    velocity: np.ndarray
    bounces: np.ndarray
    colours: np.ndarray
    backdrop: np.ndarray
    slope: np.ndarray

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
        unit = np.float32(min(height, width))
        rows = (np.arange(height, dtype=np.float32) + 0.5) / unit
        columns = (np.arange(width, dtype=np.float32) + 0.5) / unit
        centres = self.positions(np.arange(frames) * stride).astype(np.float32)
        canvas = np.empty((3, frames, height, width), np.float32)
        canvas[:] = self._paint_backdrop(rows, columns)[:, None]
        for number, kind in enumerate(self.kind):
            down = rows - centres[:, number, :1]
            right = columns - centres[:, number, 1:]
            radius = np.float32(self.radius[number])
            cover = _distance(int(kind), down[:, :, None], right[:, None, :], radius)
            np.multiply(cover, -unit, out=cover)
            cover += np.float32(0.5)
            np.clip(cover, 0, 1, out=cover)
            for channel, colour in zip(canvas, self.colours[number], strict=True):
                channel += cover * (np.float32(colour) - channel)
        canvas *= 255
        canvas += 0.5
        return np.ascontiguousarray(canvas.astype(np.uint8).transpose(1, 2, 3, 0))

    def _paint_backdrop(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """float32 (3, height, width): an even transition from one colour to the other."""
        across = self.slope[0] * (rows / self.extent[0] - 0.5)[:, None] + self.slope[1] * (
            columns / self.extent[1] - 0.5
        )
        first, second = self.backdrop.astype(np.float32)
        share = np.clip(across + 0.5, 0, 1).astype(np.float32)
        return first[:, None, None] + share * (second - first)[:, None, None]


def draw_scene(rng: np.random.Generator, aspect: float = 1.0) -> Scene:
    """A random scene for frames of the given width / height."""
    extent = np.array([max(1.0, 1 / aspect), max(1.0, aspect)])
    count = int(rng.integers(2, MAX_OBJECTS + 1))
    radius = rng.uniform(0.14, 0.26, count)
    angle = rng.uniform(0, 2 * np.pi, count)
    speed = rng.uniform(0.02, 0.07, count)
    return Scene(
        extent=extent,
        kind=rng.integers(KINDS, size=count),
        radius=radius,
        start=radius[:, None] + rng.random((count, 2)) * (extent - 2 * radius[:, None]),
        velocity=speed[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1),
        bounces=rng.random(count) < 0.7,
        colours=_vivid(rng, count),
        backdrop=rng.uniform(0.05, 0.35, (2, 3)) if rng.random() < 0.7 else np.tile(rng.uniform(0.05, 0.35, 3), (2, 1)),
        slope=rng.uniform(-1, 1, 2),
    )


def _vivid(rng: np.random.Generator, count: int) -> np.ndarray:
    """Bright, saturated colours (count, 3) with hues well apart."""
    hue = (rng.random() + np.arange(count) / count + rng.uniform(-0.08, 0.08, count)) % 1.0
    wheel = np.clip(np.abs((hue[:, None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    lightest = rng.uniform(0.8, 1.0, (count, 1))
    return lightest * (1 - rng.uniform(0.75, 1.0, (count, 1)) * (1 - wheel))


def _distance(kind: int, down: np.ndarray, right: np.ndarray, radius: np.float32) -> np.ndarray:
    """Signed distance to the outline, negative inside. All shapes fit in a disc of ``radius``."""
    if kind == 0:  # disc
        return np.sqrt(down * down + right * right) - radius
    if kind == 1:  # square
        return np.maximum(np.abs(down), np.abs(right)) - radius * np.float32(0.75)
    if kind == 2:  # triangle, point up: the farthest of three sides
        slant = np.abs(right) * np.float32(3**0.5 / 2) - down * np.float32(0.5)
        return np.maximum(slant, down) - radius * np.float32(0.5)
    if kind == 3:  # ring
        return np.abs(np.sqrt(down * down + right * right) - radius * np.float32(0.75)) - radius * np.float32(0.25)
    return (np.abs(down) + np.abs(right) - radius) * np.float32(0.5**0.5)  # diamond
