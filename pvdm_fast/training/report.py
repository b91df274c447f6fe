"""What a run prints: at the start what will be done, at the end what came out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pvdm_fast.analysis.machine import cpu_name
from pvdm_fast.backends import choice
from pvdm_fast.backends.precision import choose_precision
from pvdm_fast.data import DataError, open_dataset
from pvdm_fast.errors import BackendError, UserError, printable
from pvdm_fast.training.adversarial import check_second_phase
from pvdm_fast.training.building import asks_for_other_sizes, check_latents, empty_denoiser
from pvdm_fast.training.config import STAGES, TrainConfig
from pvdm_fast.training.initialisation import Source, differences
from pvdm_fast.training.optimizer import adamw8bit
from pvdm_fast.training.presets import DENOISER_SIZES
from pvdm_fast.training.run_folder import RunFolder
from pvdm_fast.training.scores import score_text
from pvdm_fast.training.stages import video_size
from pvdm_fast.training.tracking import check_trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pvdm_fast.models import Autoencoder

NAMED_FILES = 10


@dataclass(frozen=True)
class Plan:
    """The stages to train, and lines of (label, text) for the reader."""

    stages: tuple[str, ...]
    lines: list[tuple[str, str]]

    def text(self, run: Path) -> str:
        return "\n".join(printable(f"{label:<10} {text}") for label, text in [*self.lines, ("run folder", str(run))])


def make_plan(
    config: TrainConfig, autoencoder: Autoencoder, accelerator: Accelerator, source: Source | None = None
) -> Plan:
    """Describe a run before anything is written.

    Args:
        source: the trained models that a new run starts from.

    Raises:
        UserError: what doesn't fit, or isn't installed: all of it that can be known before a step is taken.
        BackendError: the backend that the environment asks for cannot train here.
    """
    check_packages(config)
    stages = STAGES if config.stage == "all" else (config.stage,)
    frames, height, width = video_size(autoencoder)
    layout, channels = autoencoder.layout, autoencoder.config["latent_channels"]
    models = f"autoencoder {_count(autoencoder)} parameters"
    clip_frames = frames
    trained: dict[str, Any] = {"autoencoder": autoencoder}
    if "diffusion" in stages:
        if config.diffusion.cached_clips and config.video.pad_short:
            raise UserError(
                "--pad-short pads clips that are encoded in each step: take --diffusion-cached-clips 0, or leave it out"
            )
        clip_frames = 2 * frames
        trained["diffusion"] = denoiser = empty_denoiser(config, autoencoder)
        models += f", denoiser {_count(denoiser)}"
    data, held_out = (
        open_dataset(
            config.data,
            frames=clip_frames,
            height=height,
            width=width,
            split=split,
            seed=config.seed,
            pad_short=config.video.pad_short and "diffusion" in stages,
            **config.video.drawing(),
        )
        for split in ("train", "test")
    )
    check_latents(data, stages, autoencoder)
    held_out[0]  # else clips that cannot be read would end the run at its first score, hours later
    work = ", then ".join(f"{name} {getattr(config, name).steps} steps" for name in stages)
    lines = [
        ("training", f"{work} (preset {config.preset})"),
        ("machine", _machine(accelerator)),
        ("precision", _precision(config, stages, accelerator.device)),
        ("backends", _backends(accelerator.device)),
        ("models", models),
        ("clips", f"{frames} frames of {height}x{width}; latents {channels} x {layout.num_tokens} tokens"),
        ("data", data.description),
    ]
    if source is not None:
        lines.insert(1, ("start", _start(source, {stage: trained[stage] for stage in stages})))
    if data.left_out:
        lines.append(("left out", data.left_out))
    if "autoencoder" in stages:
        if config.early_stop is not None and config.adversarial.start is not None:
            raise UserError(
                "--early-stop goes by PSNR, which falls when the discriminators come in, as it should: leave out "
                "--early-stop, or --adversarial-start"
            )
        lines += check_second_phase(config, height, width, accelerator)
    if "diffusion" not in stages:
        lines += check_later_denoiser(config, autoencoder)
    return Plan(stages, lines)


def check_packages(config: TrainConfig) -> None:
    """Raises UserError for a package that an option needs and that isn't installed."""
    if config.optimizer == "adamw8bit":
        adamw8bit()
    check_trackers(config)


def check_later_denoiser(config: TrainConfig, autoencoder: Autoencoder) -> list[tuple[str, str]]:
    """A line of (label, text) where the denoiser that the preset has for this autoencoder doesn't fit it.

    Raises:
        UserError: it is the options of the command line or the config file that don't fit.
    """
    try:
        empty_denoiser(config, autoencoder)
    except UserError as error:
        if isinstance(error, DataError) or asks_for_other_sizes(config, DENOISER_SIZES):
            raise
        return [("denoiser", f"not trained here; for these latents it needs other sizes than the preset's: {error}")]
    return []


def _start(source: Source, models: dict[str, Any]) -> str:
    """Which models start from trained weights, and what is not just copied."""
    parts = []
    for stage, model in models.items():
        name, start = "autoencoder" if stage == "autoencoder" else "denoiser", source.of_stage(stage)
        if start is None:
            parts.append(f"{name} from scratch")
        else:
            notes = differences(model, start)
            parts.append(f"{name} from {source.place}{source.assumed}{f' ({notes})' if notes else ''}")
    return "; ".join(parts)


def _precision(config: TrainConfig, stages: tuple[str, ...], device: torch.device) -> str:
    precision = choose_precision(config.mixed_precision, device)
    apart = "diffusion" in stages and config.diffusion.float32 and precision.dtype != torch.float32
    return f"{precision}; the denoiser in float32" if apart else str(precision)


def _count(model: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M"


def _machine(accelerator: Accelerator) -> str:
    where = f"{cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    if accelerator.device.type == "cuda":
        where = torch.cuda.get_device_name(accelerator.device)
    if accelerator.num_processes > 1:
        where = f"{accelerator.num_processes} processes, here {where}"
    return f"{where}, PyTorch {torch.__version__}"


def _backends(device: torch.device) -> str:
    """Operations by the backend that computes them, for example ``cpu: plane_norm; plain PyTorch: 7 more``.

    Raises:
        BackendError: one that was asked for by name cannot serve an operation of the networks here.
    """
    name = choice.requested()
    if name != "auto":
        for operation in (op for op in choice.OPERATIONS if op not in choice.PLAIN_ELSEWHERE):
            if reason := choice.why_not(name, operation, torch.empty(0, device=device)):
                raise BackendError(f"Backend {name!r} was asked for, but cannot serve {operation}: {reason}")
        return f"{name}, as asked for"
    serving: dict[str, list[str]] = {}
    for operation, row in choice.report(device.type).items():
        serving.setdefault(str(row["auto"]), []).append(operation)
    plain = serving.pop("reference", [])
    parts = [f"{name}: {', '.join(operations)}" for name, operations in serving.items()]
    return "; ".join([*parts, *([f"plain PyTorch: {len(plain)} more"] if plain else [])])


def summary(run: RunFolder) -> str:
    """The table of results, the files written, how to sample, and the files that could not be read."""
    results = run.results()
    lines = ["", f"{'stage':<12} {'steps':>8} {'time':>9}   held-out score"]
    for stage, result in results.items():
        score = score_text(result)
        if result.get("best_step", result["steps"]) != result["steps"]:
            score += f", of step {result['best_step']}"
        lines.append(f"{stage:<12} {result['steps']:>8} {_duration(result['seconds']):>9}   {score}")
    written = sorted(item.name for item in run.path.iterdir() if not item.name.startswith("."))
    lines += ["", f"written to {run.path}: {', '.join(written)}"]
    if "diffusion" in results:
        lines.append(f"sample with: python -m pvdm_fast.sample {run.path} --out samples.mp4")
    else:
        lines.append(f"train the denoiser with: python -m pvdm_fast.train --resume {run.path} --stage diffusion")
    return "\n".join(printable(line) for line in lines + _unreadable(results))


def _unreadable(results: dict[str, Any]) -> list[str]:
    """The skipped files, the first ones by name."""
    files = {path: reason for result in results.values() for path, reason in result["unreadable_files"].items()}
    if not files:
        return []
    lines = [f"{len(files)} file{'s' if len(files) > 1 else ''} could not be read and were passed over:"]
    lines += [f"  {path}: {reason}" for path, reason in list(files.items())[:NAMED_FILES]]
    if len(files) > NAMED_FILES:
        lines.append(f"  and {len(files) - NAMED_FILES} more, all in results.json")
    return lines


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
