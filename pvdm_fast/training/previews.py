"""What a run shows: videos of reconstructions and samples, one picture of both, and loss curves."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvdm_fast.data import video_grid, write_video
from pvdm_fast.training.config import STAGES
from pvdm_fast.training.files import whole_file

SHOWN_CLIPS = 8
SHOWN_FRAMES = 8


def write_reconstructions(path: Path, originals: Tensor, reconstructions: Tensor, fps: float) -> None:
    """A video with the clips (B, 3, T, H, W) in the upper row and their reconstructions below."""
    write_video(path, video_grid(torch.cat([originals, reconstructions]), columns=len(originals)), fps)


def write_samples(path: Path, samples: Tensor, fps: float) -> None:
    """A video of all samples (B, 3, T, H, W), four side by side."""
    write_video(path, video_grid(samples, columns=4), fps)


def write_picture(path: Path, rows: list[tuple[str, Tensor]]) -> None:
    """A PNG with one row of frames for each (label, video (3, T, H, W)), evenly chosen over time."""
    from matplotlib.figure import Figure

    strips = [(label, _strip(video)) for label, video in rows]
    heights = [strip.shape[0] / strip.shape[1] for _, strip in strips]
    figure = Figure(figsize=(10, 10 * sum(heights) + 0.3 * len(rows)), layout="constrained")
    every_axes = np.atleast_1d(figure.subplots(len(rows), height_ratios=heights))
    for axes, (label, strip) in zip(every_axes, strips, strict=True):
        axes.imshow(strip, interpolation="nearest")
        axes.set_title(label, fontsize=8, loc="left", pad=2)
        axes.axis("off")
    _save_figure(figure, path)


def _strip(video: Tensor) -> np.ndarray:
    """Up to SHOWN_FRAMES frames of a video (3, T, H, W) side by side: uint8 (H, width, 3)."""
    times = torch.linspace(0, video.shape[1] - 1, min(SHOWN_FRAMES, video.shape[1])).round().long()
    frames = video[:, times].transpose(0, 1).unsqueeze(2)
    return video_grid(frames, columns=len(times))[0]


def write_loss_curves(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """A PNG with the loss of each stage over its steps, as it was and smoothed; held-out scores are its title."""
    from matplotlib.figure import Figure

    points: dict[str, tuple[array[float], array[float]]] = {}
    for item in records:
        steps, losses = points.setdefault(item["stage"], (array("d"), array("d")))
        if item.get("loss") is not None:
            steps.append(item["step"])
            losses.append(item["loss"])
    stages = [stage for stage in STAGES if stage in points]
    figure = Figure(figsize=(5 * len(stages), 3.5), layout="constrained")
    for axes, stage in zip(np.atleast_1d(figure.subplots(1, len(stages))), stages, strict=True):
        steps, losses = points[stage]
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
        width = max(1, len(losses) // 40)
        if len(losses) >= width:
            smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
            axes.plot(steps[width - 1 :], smooth, color="tab:blue")
        axes.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
        axes.grid(alpha=0.3, which="both")
    _save_figure(figure, path)


def _save_figure(figure: Any, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
