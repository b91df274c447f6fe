"""What a run shows: videos of reconstructions and samples, one picture of both, and loss curves."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvdm_fast.data import video_grid, write_video
from pvdm_fast.jobs.files import whole_file
from pvdm_fast.training.config import STAGES

SHOWN_CLIPS = 8
SHOWN_SAMPLES = 5  # in the picture: one of each kind of rendered scenes
SHOWN_FRAMES = 8
HELD_OUT = {"psnr": "held-out PSNR (dB)", "held_out_loss": "held-out loss"}
ADVERSARIAL_VALUES = ("d_loss", "g_loss", "feature_matching", "adversarial_weight")


def write_reconstructions(path: Path, originals: Tensor, reconstructions: Tensor, fps: float) -> None:
    """A video with the clips (B, 3, T, H, W) in the upper row and their reconstructions below."""
    write_video(path, video_grid(torch.cat([originals, reconstructions]), columns=len(originals)), fps)


def write_samples(path: Path, samples: Tensor, fps: float) -> None:
    """A video of all samples (B, 3, T, H, W), four side by side."""
    write_video(path, video_grid(samples, columns=4), fps)


def write_picture(path: Path, rows: list[tuple[str, Tensor]]) -> None:
    """A PNG with one row of frames for each (label, video (3, T, H, W)), evenly chosen over time."""
    with _own_style():
        _write_picture(path, rows)


def _write_picture(path: Path, rows: list[tuple[str, Tensor]]) -> None:
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
    """A PNG with the loss of each stage over its steps, raw and smoothed. Records are read once.

    Held-out scores are drawn with it: a loss by the same axis, PSNR by an axis of its own. If discriminators took part,
    whose terms can be negative, the autoencoder's curve is the pixel loss, and the discriminators have their own
    picture.
    """
    with _own_style():
        _write_loss_curves(path, records)


def _write_loss_curves(path: Path, records: Iterable[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    found: dict[tuple[str, str], tuple[array[float], array[float]]] = {}
    for item in records:
        shown = {**item, "loss": item.get("reconstruction", item.get("loss"))}
        for name in ("loss", *HELD_OUT, *ADVERSARIAL_VALUES):
            steps, values = found.setdefault((item["stage"], name), (array("d"), array("d")))
            if shown.get(name) is not None:
                steps.append(item["step"])
                values.append(shown[name])
    stages = [stage for stage in STAGES if (stage, "loss") in found]
    adversarial = [key for key in found if key[1] in ADVERSARIAL_VALUES and len(found[key][0])]
    pictures = len(stages) + bool(adversarial)
    figure = Figure(figsize=(5 * pictures, 3.5), layout="constrained")
    every_axes = np.atleast_1d(figure.subplots(1, pictures))
    for axes, stage in zip(every_axes, stages, strict=False):
        _draw(axes, *found[stage, "loss"], "loss", "tab:blue")
        axes.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
        for name, label in HELD_OUT.items():
            if len(found[stage, name][0]):
                _draw_held_out(axes, *found[stage, name], label, own_axis=name == "psnr")
    if adversarial:
        for number, key in enumerate(adversarial):
            _draw(every_axes[-1], *found[key], key[1], f"C{number}")
        every_axes[-1].set(title="adversarial phase", xlabel="step")
        every_axes[-1].legend(fontsize=8)
    for axes in every_axes:
        axes.grid(alpha=0.3, which="both")
    _save_figure(figure, path)


def _draw(axes: Any, steps: Sequence[float], values: Sequence[float], name: str, colour: str) -> None:
    """A recorded value over the steps, pale, and its running mean."""
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
    width = max(1, len(values) // 40)
    if len(values) >= width:
        axes.plot(
            steps[width - 1 :], np.convolve(values, np.ones(width) / width, mode="valid"), color=colour, label=name
        )


def _draw_held_out(axes: Any, steps: Sequence[float], values: Sequence[float], label: str, own_axis: bool) -> None:
    """A held-out score over the steps, with a coloured axis of its own or with a legend."""
    held_out = axes.twinx() if own_axis else axes
    held_out.plot(steps, values, color="tab:orange", marker="o", markersize=3.5, linewidth=1.2, label=label)
    if own_axis:
        held_out.set_ylabel(label, color="tab:orange")
        held_out.tick_params(axis="y", labelcolor="tab:orange")
    else:
        axes.legend(fontsize=8)


@contextmanager
def _own_style() -> Iterator[None]:
    """Matplotlib's own defaults. The user's matplotlibrc could end a run, for example by calling LaTeX."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def _save_figure(figure: Any, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
