"""The learning rate of the small networks that are trained here: up, constant, and down over the last third."""

from __future__ import annotations

import math

WARMUP = 200  # steps


def pace(step: int, steps: int) -> float:
    """The share of the learning rate at a step. The end is the half of a cosine, and until then the number of steps
    decides nothing."""
    left = min(1.0, 3 * (steps - step) / steps)
    return min(1.0, (step + 1) / WARMUP) * math.sin(left * math.pi / 2) ** 2
