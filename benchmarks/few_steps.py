"""`python -m benchmarks.few_steps`: seconds of a full-size clip in one or four passes, and in the release's 400 steps.

From noise to pixels, one clip of 16 frames of 256 x 256, with random weights: time doesn't depend on them. The release
is its way of computing in eager PyTorch in float32. It has no 16 bits for sampling. Four of its passes are measured,
400 of them are extrapolated from these, and its decoding is added once. The release guides none of its samples, so each
step is one pass. Ours are `stream_video`'s own passes and decoding of a distilled denoiser in bfloat16 and float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.eager import EagerDenoiser
from benchmarks.eager_autoencoder import EagerAutoencoder
from benchmarks.report import write_section
from pvdm_fast.diffusion.sampling import SamplingOptions, sample_video
from pvdm_fast.jobs.command import run_command
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.models.presets import AUTOENCODER, DENOISER

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results" / "few_steps.md"
RELEASE_STEPS, MEASURED_STEPS = 400, 4
STEPS = (1, 4)
OURS_ALONE = ("positions", "prediction")  # arguments that the release's network doesn't have


@dataclass(frozen=True)
class Times:
    """Seconds a clip. ``ours``: by dtype and number of steps, each round's."""

    release_pass: list[float]
    release_decode: list[float]
    ours: dict[tuple[torch.dtype, int], list[float]]

    @property
    def release(self) -> float:
        """Of a whole clip, extrapolated."""
        return RELEASE_STEPS * statistics.median(self.release_pass) + statistics.median(self.release_decode)


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def release_sizes(size: str) -> dict[str, Any]:
    """The arguments of the release's denoiser."""
    sizes = {"latent_channels": AUTOENCODER[size]["latent_channels"], **DENOISER[size]}
    return {name: value for name, value in sizes.items() if name not in OURS_ALONE}


@torch.no_grad()
def release_times(size: str, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a pass (from MEASURED_STEPS in a row) and of decoding, by round."""
    sizes = release_sizes(size)
    denoiser = EagerDenoiser(**sizes).eval()
    latent = torch.randn(1, sizes["latent_channels"], denoiser.layout.num_tokens)

    def passes() -> None:
        for step in range(MEASURED_STEPS):
            denoiser(latent, torch.tensor([250 * step]))

    denoiser(latent, torch.tensor([0]))
    of_passes = [seconds(passes) / MEASURED_STEPS for _ in range(rounds)]
    autoencoder = EagerAutoencoder(**AUTOENCODER[size]).eval()
    return of_passes, [seconds(lambda: autoencoder.decode(latent.tanh())) for _ in range(rounds)]


def our_times(size: str, rounds: int, dtype: torch.dtype) -> dict[int, list[float]]:
    """Seconds of a clip from noise to pixels, by number of steps and round."""
    autoencoder = Autoencoder.from_preset(size).to(dtype).eval()
    found: dict[int, list[float]] = {}
    for steps in STEPS:
        denoiser = Denoiser.from_preset(size, prediction="flow", distilled_steps=steps).to(dtype).eval()
        options: Any = SamplingOptions(clips=1, frames=autoencoder.layout.time)

        def clip(denoiser: Denoiser = denoiser, options: SamplingOptions = options) -> None:
            sample_video(autoencoder, denoiser, options)

        clip()
        found[steps] = [seconds(clip) for _ in range(rounds)]
    return found


def measure(size: str = "base", rounds: int = 3) -> Times:
    """Ours before and after the release, so that a machine that changes its pace shows."""
    ours: dict[tuple[torch.dtype, int], list[float]] = {}
    release: tuple[list[float], list[float]] = ([], [])
    for turn in range(2):
        for dtype in (torch.bfloat16, torch.float32):
            for steps, found in our_times(size, rounds, dtype).items():
                ours.setdefault((dtype, steps), []).extend(found)
        if turn == 0:
            release = release_times(size, rounds)
    return Times(*release, ours)


def table(times: Times) -> list[str]:
    """Medians as a Markdown table."""
    lines = ["| | seconds a clip | times as fast |", "| --- | --- | --- |"]
    passed, decoded = statistics.median(times.release_pass), statistics.median(times.release_decode)
    text = (
        f"{times.release:.0f}, **extrapolated** from {MEASURED_STEPS}: {RELEASE_STEPS} x {passed:.2f} + {decoded:.2f}"
    )
    lines.append(f"| the release's way in eager PyTorch, float32, {RELEASE_STEPS} steps | {text} | 1 |")
    for (dtype, steps), found in times.ours.items():
        name = str(dtype).removeprefix("torch.")
        passes = f"{steps} pass{'es' * (steps > 1)}"
        median = statistics.median(found)
        spread = f"{median:.2f} ({min(found):.2f} to {max(found):.2f})"
        lines.append(f"| ours, {name}, {passes} and decoding | {spread} | {times.release / median:.0f} |")
    return lines


def caption(size: str, rounds: int) -> str:
    """What was measured, and where."""
    facts, sizes = machine.facts(), AUTOENCODER[size]
    return (
        f"One clip of {sizes['frames']} frames of {sizes['height']} x {sizes['width']}, sizes of `{size}`, random "
        f"weights; medians of {rounds} rounds, ours of {2 * rounds}. {facts['cpu']}, {facts['threads']} "
        f"thread{'s' * (facts['threads'] > 1)}, torch {facts['torch']}, commit {facts['commit']}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_steps", description=__doc__)
    parser.add_argument("--size", choices=list(AUTOENCODER), default="base", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--write-docs", action="store_true", help=f"write the table to {DOCUMENT.name}")
    options = parser.parse_args(arguments)

    def run() -> None:
        text = "\n".join([caption(options.size, options.rounds), "", *table(measure(options.size, options.rounds))])
        print(text)
        if options.write_docs:
            write_section(DOCUMENT, "few-steps", text)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
