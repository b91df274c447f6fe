"""A training run from its configuration to its results: models, stages, pictures."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from pvdm_fast.allocator import keep_freed_memory
from pvdm_fast.checksums import write_checksums
from pvdm_fast.errors import Interrupted, UserError
from pvdm_fast.pipeline import sample_video
from pvdm_fast.training import checkpoint, previews, report
from pvdm_fast.training.building import empty_autoencoder, existing_autoencoder, make_accelerator, make_stage
from pvdm_fast.training.config import OPTIONS, TrainConfig, get, make_config
from pvdm_fast.training.files import whole_folder
from pvdm_fast.training.interrupt import StopRequest
from pvdm_fast.training.options import Request, flag
from pvdm_fast.training.run_folder import RunFolder
from pvdm_fast.training.stages import AutoencoderStage, DiffusionStage, video_size
from pvdm_fast.training.trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator


def run_training(request: Request) -> RunFolder:
    """Do what the command line asks for; returns the run's folder.

    Raises:
        UserError: something the user can mend; Interrupted: a signal came, and everything is saved.
    """
    keep_freed_memory()
    config = resumed_config(request) if request.resume else make_config(request.changes)
    accelerator = make_accelerator(config)
    found = existing_autoencoder(config, request.resume)
    plan = report.make_plan(config, found or empty_autoencoder(config), accelerator)
    if request.resume:
        run = RunFolder.existing(request.resume)
        run.clean_up()
        run.write_config(config)
    else:
        run = RunFolder.create(request.run, config)
        if found is not None:
            save_model(found, run.autoencoder)
    print(plan.text(run.path), flush=True)
    if config.tensorboard:
        run.listeners.append(report.tensorboard_listener(run.path))
    with StopRequest() as stop:
        try:
            for name in plan.stages:
                if name not in run.results():
                    train_stage(name, config, run, accelerator, stop)
                stop.check()
        except Interrupted:
            print(f"stopped and saved; continue with: python -m pvdm_fast.train --resume {run.path}", flush=True)
            raise
    print(report.summary(run), flush=True)
    return run


def resumed_config(request: Request) -> TrainConfig:
    """The run's own configuration, with the changes that are harmless; raises UserError for others."""
    assert request.resume is not None
    config = RunFolder.existing(request.resume).read_config()
    values = {key: get(config, key) for key in OPTIONS}
    for key, value in request.changes.items():
        if value != values[key] and not OPTIONS[key].metadata["resumable"]:
            raise UserError(f"{flag(OPTIONS[key])} cannot change when a run is resumed; start a new run for that")
    return make_config({**values, **request.changes})


def train_stage(name: str, config: TrainConfig, run: RunFolder, accelerator: Accelerator, stop: StopRequest) -> None:
    """Train one stage from its newest checkpoint, or from the start, and write its model and results."""
    stage = make_stage(name, config, run)
    trainer = Trainer(stage, config, run, accelerator, stop)
    restore_newest(trainer, run)
    trainer.fit(lambda: show(trainer))
    scores = show(trainer)
    with stage.evaluation_weights():
        model: Any = accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        save_model(model, run.path / ("autoencoder" if name == "autoencoder" else "denoiser"))
    run.record_result(
        name,
        {
            "steps": trainer.progress.step,
            "seconds": round(trainer.progress.seconds, 1),
            **{key: round(value, 4) for key, value in scores.items()},
            "unreadable_files": trainer.progress.unreadable,
        },
    )
    accelerator.free_memory()


def restore_newest(trainer: Trainer, run: RunFolder) -> None:
    """Continue from the newest good checkpoint of the trainer's stage; later records are dropped."""
    newest, passed_over = checkpoint.newest_good(run.checkpoints)
    for sentence in passed_over:
        print(sentence)
    stage = trainer.stage.name
    if newest is None or newest.stage_name != stage:
        run.forget_after(stage, 0)
        return
    trainer.restore(checkpoint.load(newest))
    run.forget_after(stage, newest.step)
    print(f"continuing the {stage} stage after step {newest.step}")


def save_model(model: Any, path: Path) -> None:
    """``save_pretrained``, whole or not at all."""
    try:
        with whole_folder(path) as temporary:
            model.save_pretrained(temporary)
            write_checksums(temporary)
    except (OSError, SafetensorError) as error:  # the latter's writer has errors of its own
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the model folder {path}: {reason}") from error


def show(trainer: Trainer) -> dict[str, float]:
    """Score held-out clips and write videos, picture and curves, with the weights that will be saved."""
    run, stage, config = trainer.run, trainer.stage, trainer.config
    scores = trainer.score()
    autoencoder: Any = stage.model if isinstance(stage, AutoencoderStage) else stage.autoencoder  # type: ignore[attr-defined]
    with torch.no_grad(), stage.evaluation_weights(), trainer.accelerator.autocast():
        frames = video_size(autoencoder)[0]
        originals = next(trainer.held_out())[: previews.SHOWN_CLIPS, :, :frames]
        reconstructions = autoencoder.decode(autoencoder.encode(originals).latent).sample.float()
        rows = []
        for index in range(min(3, len(originals))):
            rows += [("held-out clip", originals[index]), ("its reconstruction", reconstructions[index])]
        if isinstance(stage, DiffusionStage):
            samples = sample_video(
                autoencoder,
                stage.model,
                clips=previews.SHOWN_CLIPS,
                frames=2 * frames,
                steps=config.diffusion.sampling_steps,
                seed=config.seed,
                progress=lambda done, total: trainer.stop.check(),
            )
            previews.write_samples(run.path / "samples.mp4", samples, config.video.fps)
            rows += [(f"sample, {2 * frames} frames", video) for video in samples[:4]]
        else:
            path = run.path / "reconstructions.mp4"
            previews.write_reconstructions(path, originals, reconstructions, config.video.fps)
    previews.write_picture(run.path / "grid.png", rows)
    previews.write_loss_curves(run.path / "loss.png", run.records())
    gc.collect()  # a figure is a ring of references: 2 MB a preview stayed until the collector happened to come
    return scores
