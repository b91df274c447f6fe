"""`python -m benchmarks.cost --write-docs`: what full-size training costs, computed for docs/results/cost.md.

Computed, not measured: no GPU has run this. FLOPs, memory and checkpoints are those of `pvdm_fast.estimate` (preset
base, bf16, one clip). The rules:

- FLOPs per step = clips per step x FLOPs of one clip. Diffusion encodes 1 + (conditional probability) windows of each.
- Steps = the preset's. If seeing every clip `epochs` times takes more, that many.
- Seconds per step on one GPU = FLOPs per step / (utilisation x peak). GPU-hours = steps x seconds per step / 3600.
- Bytes read per second by one GPU = batch / seconds per step x bytes of a clip's file, as if it were read whole. From
  cached latents: batch / seconds per step x 2 float32 latents.
- With cached latents the frozen autoencoder's FLOPs are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.report import write_section
from pvdm_fast.estimate import GIB, Estimate, estimate
from pvdm_fast.jobs.cards import CARDS, UTILISATION
from pvdm_fast.jobs.command import run_command
from pvdm_fast.training.config import STAGES, TrainConfig, make_config

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results" / "cost.md"
MARKER = "cost"
GPUS = ("A100", "H100")
EPOCHS = {"autoencoder": 1, "diffusion": 10}  # our choice, at least
LATENT_BYTES = 2 * 4 * 2048 * 4  # two latents of 4 channels and 2048 tokens in float32


@dataclass(frozen=True)
class Dataset:
    """clips: number of files. bytes: of one file."""

    name: str
    clips: int
    bytes: float


DATASETS = (
    Dataset("UCF-101", 13_320, 0.49e6),  # 6.5 GB as published
    Dataset("Kinetics-700", 650_000, 1.25e6),  # 10 s each, taken to be scaled to 340 x 256 at 1 Mbit/s
    Dataset("ten million clips", 10_000_000, 1.25e6),  # like Kinetics
)


@dataclass(frozen=True)
class Cost:
    """One stage on one data set with one GPU. `cached`: from latents that were encoded once."""

    dataset: Dataset
    stage: str
    cached: bool
    steps: int
    gpu_hours: dict[str, float]
    bytes_a_second: dict[str, float]


def clips_a_step(config: TrainConfig, stage: str) -> int:
    options = getattr(config, stage)
    return int(options.batch_size * options.accumulate)


def steps_of(config: TrainConfig, stage: str, clips: int) -> int:
    return max(getattr(config, stage).steps, -(-EPOCHS[stage] * clips // clips_a_step(config, stage)))


def trained_flops(found: Estimate) -> float:
    """FLOPs of training on one clip, without encoding."""
    return (found.flops - found.frozen_flops) / found.batch


def encoding_flops(config: TrainConfig, found: Estimate) -> float:
    """FLOPs of encoding one clip on average. The estimate of one clip has two windows: its own and its
    condition's."""
    return found.frozen_flops / 2 * (1 + config.diffusion.conditional_probability)


def cost(config: TrainConfig, found: Estimate, dataset: Dataset, cached: bool) -> Cost:
    steps, clips = steps_of(config, found.stage, dataset.clips), clips_a_step(config, found.stage)
    flops = clips * (trained_flops(found) + (0 if cached else encoding_flops(config, found)))
    seconds = {gpu: CARDS[gpu].seconds(flops) for gpu in GPUS}
    read = clips * (LATENT_BYTES if cached else dataset.bytes)
    return Cost(
        dataset=dataset,
        stage=found.stage,
        cached=cached,
        steps=steps,
        gpu_hours={gpu: steps * value / 3600 for gpu, value in seconds.items()},
        bytes_a_second={gpu: read / value for gpu, value in seconds.items()},
    )


def stage_table(config: TrainConfig, found: Sequence[Estimate]) -> list[str]:
    lines = [
        "| stage | parameters | clips a step | TFLOP a step | of these, encoding | memory, one clip | checkpoint |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for item in found:
        clips, encoding = clips_a_step(config, item.stage), encoding_flops(config, item)
        lines.append(
            f"| {item.stage} | {item.parameters / 1e6:.1f} M | {clips} | "
            f"{clips * (trained_flops(item) + encoding) / 1e12:.1f} | {clips * encoding / 1e12:.1f} | "
            f"{item.peak / GIB:.1f} GiB | {item.checkpoint / GIB:.2f} GiB |"
        )
    return lines


def cost_table(costs: Sequence[Cost]) -> list[str]:
    lines = [
        f"| data | stage | steps | {' | '.join(f'{gpu}-hours' for gpu in GPUS)} | "
        f"{' | '.join(f'MB/s, one {gpu}' for gpu in GPUS)} |",
        f"| --- | --- | --- |{' --- |' * 2 * len(GPUS)}",
    ]
    for item in costs:
        hours = " | ".join(f"{item.gpu_hours[gpu]:,.0f}" for gpu in GPUS)
        read = " | ".join(f"{item.bytes_a_second[gpu] / 1e6:.2f}" for gpu in GPUS)
        stage = f"{item.stage}, cached latents" if item.cached else item.stage
        lines.append(f"| {item.dataset.name} | {stage} | {item.steps:,} | {hours} | {read} |")
    return lines


def one_clip(config: TrainConfig) -> TrainConfig:
    """The configuration with batches of one clip. Everything else is a multiple of it."""
    return replace(
        config,
        autoencoder=replace(config.autoencoder, batch_size=1, accumulate=1),
        diffusion=replace(config.diffusion, batch_size=1, accumulate=1),
    )


def report(config: TrainConfig) -> str:
    """The tables in Markdown."""
    found = [estimate(one_clip(config), stage) for stage in STAGES]
    costs = [
        cost(config, item, dataset, cached)
        for dataset in DATASETS
        for item in found
        for cached in ((False, True) if item.frozen_flops else (False,))
    ]
    peaks = " and ".join(f"{CARDS[gpu].peak / 1e12:.0f} TFLOP/s ({gpu})" for gpu in GPUS)
    return "\n".join(
        [
            f"**Computed, not measured**: no GPU has run this. Preset {config.preset}, {config.mixed_precision}, "
            f"{UTILISATION:.0%} of {peaks} assumed.",
            "",
            *stage_table(config, found),
            "",
            *cost_table(costs),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=str(__doc__).splitlines()[0])
    parser.add_argument("--write-docs", action="store_true", help=f"write the tables to {DOCUMENT.name}")
    options = parser.parse_args(arguments)

    def action() -> None:
        text = report(make_config({"preset": "base", "mixed_precision": "bf16"}))
        print(text)
        if options.write_docs:
            write_section(DOCUMENT, MARKER, text)

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main())
