"""`python -m benchmarks.samplers RUN`: how close each sampler comes to the exact trajectory, by steps and time.

The reference is decoded from 1000 DDIM steps without noise, from the same starting noise. A sampler that adds its own
noise follows another trajectory: its distance says how far it strays, not how well it samples.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.report import write_section
from pvdm_fast.diffusion.sampling import NoiseSource, sample_latents
from pvdm_fast.diffusion.schedulers import scheduler_of
from pvdm_fast.jobs.command import run_command
from pvdm_fast.losses.psnr import psnr
from pvdm_fast.sample import load_models
from pvdm_fast.training.run_folder import RunFolder

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results" / "samplers.md"
REFERENCE_STEPS = 1000
STEPS = (10, 20, 25, 50)


@dataclass(frozen=True)
class Sampler:
    """A scheduler under its name in the table."""

    label: str
    scheduler: str
    eta: float = 0.0


SAMPLERS = (
    Sampler("DDIM, eta 0", "ddim"),
    Sampler("DPM-Solver++", "dpm++"),
    Sampler("UniPC", "unipc"),
    Sampler("DDIM, eta 1", "ddim", eta=1.0),
    Sampler("DDPM", "ddpm"),
)


@dataclass(frozen=True)
class Row:
    """One sampler at one number of steps: PSNR of its videos against the reference's, mean over clips, and CPU
    seconds per clip."""

    sampler: str
    steps: int
    psnr: float
    seconds: float


def measure(
    autoencoder: Any, denoiser: Any, clips: int, reference_steps: int = REFERENCE_STEPS, steps: Sequence[int] = STEPS
) -> list[Row]:
    """One row per sampler and number of steps."""

    def videos(sampler: Sampler, steps: int) -> tuple[Tensor, float]:
        shape = (clips, int(denoiser.config["latent_channels"]), denoiser.layout.num_tokens)
        before = time.process_time()
        latents = sample_latents(
            denoiser,
            scheduler_of(denoiser, sampler.scheduler),
            shape,
            steps=steps,
            noise=NoiseSource(0),
            eta=sampler.eta,
        )
        seconds = time.process_time() - before
        with torch.no_grad():
            return autoencoder.decode(latents.to(autoencoder.dtype)).sample.float(), seconds / clips

    reference, _ = videos(SAMPLERS[0], reference_steps)
    rows = []
    for sampler in SAMPLERS:
        for number in steps:
            result, seconds = videos(sampler, number)
            rows.append(Row(sampler.label, number, psnr(result, reference).mean().item(), seconds))
    return rows


def table(rows: list[Row]) -> list[str]:
    """The rows as a Markdown table."""
    steps = sorted({row.steps for row in rows})
    lines = [f"| | {' | '.join(f'{number} steps' for number in steps)} |", "| --- " * (len(steps) + 1) + "|"]
    for sampler in dict.fromkeys(row.sampler for row in rows):
        cells = {row.steps: f"{row.psnr:.1f} dB, {row.seconds:.2f} s" for row in rows if row.sampler == sampler}
        lines.append(f"| {sampler} | {' | '.join(cells[number] for number in steps)} |")
    return lines


def caption(run: RunFolder, autoencoder: Any, clips: int) -> str:
    """What was measured, and where."""
    facts, results = machine.facts(), run.results()
    size = f"{autoencoder.config['frames']} frames of {autoencoder.config['height']} x {autoencoder.config['width']}"
    trained = ", ".join(f"{name} {result['steps']} steps" for name, result in results.items())
    return (
        f"{clips} clips of {size}, unconditional, seed 0; preset {run.read_config().preset}, trained for {trained} "
        f"(held-out loss {results['diffusion']['held_out_loss']}). {facts['cpu']}, {facts['threads']} thread"
        f"{'s' * (facts['threads'] > 1)}, torch {facts['torch']}, commit {facts['commit']}; times are CPU time, "
        "decoding left out."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samplers", description=__doc__)
    parser.add_argument("run", type=Path, help="a trained run")
    parser.add_argument(
        "--clips", type=int, default=16, metavar="N", help="clips to average over (default: %(default)s)"
    )
    parser.add_argument("--write-docs", action="store_true", help=f"write the table to {DOCUMENT.name}")
    options = parser.parse_args(arguments)

    def run() -> None:
        autoencoder, denoiser = load_models(options.run, "cpu", "fp32")
        text = "\n".join(
            [
                caption(RunFolder.existing(options.run), autoencoder, options.clips),
                "",
                *table(measure(autoencoder, denoiser, options.clips)),
            ]
        )
        print(text)
        if options.write_docs:
            write_section(DOCUMENT, "samplers", text)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
